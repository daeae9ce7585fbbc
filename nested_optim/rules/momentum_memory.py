"""The memory of deep momentum (Nested Learning, arXiv 2512.24695, Eq. 50): a small MLP.

The MLP ``f`` is one for all coordinates of all parameters. A coordinate has three *features*: the
momentum's mean gradient, and a fast and a slow exponential average of its gradient, each corrected
for its start and divided by the scale of the tensor's gradients. ``f`` has no biases and odd units,
so ``f(-x) = -f(x)``: a gradient of the opposite sign gives the opposite update, and a coordinate
that has seen only zeros gets none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FEATURES = 3
#: Entries of a tensor's ``scales``: mean square of the gradient as a decaying sum, the weights in
#: that sum, and the weights in the momentum, the fast and the slow average.
MEMORY_SCALES = 5
OBJECTIVES = ("l2", "dot")

_SQUARE_DECAY = 0.9
#: Gradients beyond this root mean square either way have no features: float32 squares end there.
_SMALLEST, _LARGEST = 1e-18, 1e18
#: Coordinates whose hidden units are in memory at once; on a CPU, in its cache.
MEMORY_SLICE, _CPU_SLICE = 2**19, 2**15


def memory_size(hidden: int) -> int:
    """How many weights a memory with so many hidden units has."""
    return (FEATURES + 1) * hidden


def initial_memory(hidden: int, seed: int) -> Tensor:
    """Flat float32 weights: a normal first layer, and a zero second one, so that ``f`` is zero.

    The global random state is neither read nor moved.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(FEATURES * hidden, generator=generator, dtype=torch.float32)
    return torch.cat([first / math.sqrt(FEATURES), torch.zeros(hidden, dtype=torch.float32)])


def correction(weights: Tensor, features: Tensor) -> Tensor:
    """``f``: what the memory adds to the mean gradient.

    Args:
        weights: flat, ``(4 * hidden,)``: the first layer ``(hidden, 3)``, then the second.
        features: ``(3, n)``, of the weights' dtype.

    Returns:
        ``(n,)``, in units of the gradients' scale.
    """
    hidden = weights.numel() // (FEATURES + 1)
    first = weights[: FEATURES * hidden].view(hidden, FEATURES)
    second = weights[FEATURES * hidden :]
    return second @ torch.tanh(first @ features)


def prediction_loss(
    momentum: Tensor, added: Tensor, target: Tensor, valid: Tensor, objective: str
) -> Tensor:
    """How badly the memory foresaw the next gradient, on a sample of coordinates.

    Args:
        momentum: ``(n,)``, the mean gradient of the momentum, in units of the gradients' scale.
        added: ``(n,)``, ``f``: what the memory adds to it.
        target: ``(n,)``, the gradient that then came, in the same units.
        valid: ``(n,)``, 1 where there was something to predict from, else 0.
        objective: ``"l2"``, the square of the error; or ``"dot"``, minus the product of prediction
            and gradient, plus half the square of ``f``, without which no ``f`` would be large
            enough. The best ``f`` is the expected error of the momentum for the one, the expected
            gradient itself for the other.

    Returns:
        The mean over what is valid, a scalar; 0 where nothing is.
    """
    predicted = momentum + added
    squared, product = (predicted - target) ** 2, predicted * target
    losses = squared if objective == "l2" else added**2 / 2 - product
    return (valid * losses).sum() / valid.sum().clamp(min=1)


def memory_loss(
    weights: Tensor, features: Tensor, target: Tensor, valid: Tensor, objective: str
) -> Tensor:
    """:func:`prediction_loss` of the memory with these weights, differentiable in them."""
    added = correction(weights, features)
    return prediction_loss(features[0], added, target, valid, objective)


def memory_units(scales: Tensor) -> Tensor:
    """What turns a tensor's state into features and an output of the memory into a direction.

    Args:
        scales: ``(..., 5)``.

    Returns:
        ``(..., 5)``: factors for momentum buffer, fast and slow average that make features of them;
        the factor that makes a direction in the buffer's units of an ``f``; and the factor that
        brings a gradient to the features' units. All zero where the scale is not known.
    """
    square, square_weight, *weights = scales.unbind(-1)
    scale = (square / square_weight).sqrt()
    known = (scale > _SMALLEST) & (scale < _LARGEST)  # false for 0 / 0
    zero = torch.zeros_like(scale)

    def factor(weight: Tensor) -> Tensor:
        return torch.where(known & (weight > 0), 1 / (weight * scale), zero)

    direction = torch.where(known, weights[0] * scale, zero)
    per_gradient = factor(torch.ones_like(scale))
    return torch.stack([*map(factor, weights), direction, per_gradient], -1)


def advance_scales(
    scales: Tensor, mean_square: Tensor, momentum: float, decays: tuple[float, float]
) -> Tensor:
    """``scales`` ``(..., 5)`` after a gradient of this mean square ``(...)``."""
    square, *weights = scales.unbind(-1)
    mean_square = mean_square.to(scales.dtype).clamp(max=_LARGEST**2)
    # In numbers: a tensor of them would have to be brought to the device.
    parts = [_SQUARE_DECAY * square + (1 - _SQUARE_DECAY) * mean_square]
    fast, slow = decays
    kept_and_added = (
        (_SQUARE_DECAY, 1 - _SQUARE_DECAY),
        (momentum, 1.0),
        (fast, 1 - fast),
        (slow, 1 - slow),
    )
    parts += [kept * w + added for w, (kept, added) in zip(weights, kept_and_added)]
    return torch.stack(parts, -1)


def mean_square(grad: Tensor) -> Tensor:
    """The mean square of a real tensor, 0-d, in at least float32."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=wide)
    return norm * norm / max(1, grad.numel())


def memory_output(weights: Tensor, state: Sequence[Tensor], units: Tensor) -> Tensor:
    """``f`` in the momentum buffer's units, of its shape, in at least float32.

    Args:
        weights: of the memory, flat.
        state: momentum buffer, fast and slow average, real, of one shape.
        units: as of :func:`memory_units`: ``(5,)``, or ``(5, n)`` with a column per coordinate.
    """
    dtype = torch.promote_types(state[0].dtype, torch.float32)
    weights, units = weights.to(dtype), units.to(dtype)
    flat = [t.reshape(-1) for t in state]
    parts = []
    size = _CPU_SLICE if flat[0].is_cpu else MEMORY_SLICE
    for start in range(0, max(1, flat[0].numel()), size):
        here = slice(start, start + size)
        factors = units if units.dim() == 1 else units[:, here]
        rows = [row[here].to(dtype) * factor for row, factor in zip(flat, factors)]
        parts.append(factors[FEATURES] * correction(weights, torch.stack(rows)))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(state[0].shape)


def trusted_direction(momentum_buffer: Tensor, output: Tensor, trust: float) -> Tensor:
    """The direction to descend along: the momentum plus what the memory adds to it.

    The norm of what is added is at most ``trust`` times the momentum's, so that with a trust of 1
    the sum never points against the momentum, however wrong the memory is.

    Args:
        momentum_buffer: any shape, real.
        output: of :func:`memory_output`, same shape.
        trust: at least 0.
    """
    allowed = trust * torch.linalg.vector_norm(momentum_buffer, dtype=output.dtype)
    wanted = torch.linalg.vector_norm(output)
    ratio = torch.where(wanted > allowed, allowed / wanted, torch.ones_like(wanted))
    return (momentum_buffer.to(output.dtype) + ratio * output).to(momentum_buffer.dtype)
