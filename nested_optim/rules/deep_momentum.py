"""Deep momentum (Nested Learning, arXiv 2512.24695, Eq. 50) as a pure function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .momentum import decay, descend
from .momentum_memory import (
    advance_scales,
    mean_square,
    memory_output,
    memory_units,
    trusted_direction,
)


class DeepMomentumState(NamedTuple):
    """What one update returns: new tensors, none of them an argument."""

    param: Tensor
    momentum_buffer: Tensor
    exp_avg_fast: Tensor
    exp_avg_slow: Tensor
    scales: Tensor


def deep_momentum(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    exp_avg_fast: Tensor,
    exp_avg_slow: Tensor,
    scales: Tensor,
    weights: Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    decays: tuple[float, float],
    trust: float = 1.0,
    weight_decay: float | Tensor = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> DeepMomentumState:
    r"""One update with the momentum that a memory of these weights makes of the gradients.

    .. math::
        b \leftarrow \alpha b + g, \qquad
        \theta \leftarrow \theta - \eta\,(b + w \sigma f(x)), \qquad
        x = (\tfrac{b}{w}, \bar g_{fast}, \bar g_{slow}) / \sigma

    with :math:`w = 1 + \alpha + \alpha^2 + \dots` the weights in ``b``, so that ``b / w`` is a mean
    gradient, and :math:`\sigma` the running root mean square of the tensor's gradients. What is
    added to ``b`` is cut to ``trust`` times its norm. With ``f = 0`` this is SGD with momentum. The
    weights are trained on :func:`momentum_memory.memory_loss`.

    Args:
        param: the parameter, any shape, real or complex (then as its real and imaginary parts).
        grad: its gradient, same shape and dtype.
        momentum_buffer: ``b``, same shape.
        exp_avg_fast: exponential average of the gradient, from zeros, same shape.
        exp_avg_slow: the same with a slower decay.
        scales: ``(5,)``, zeros before the first update.
        weights: of the memory, flat.
        lr: learning rate ``eta``, a number or a tensor of one element.
        momentum: decay rate ``alpha`` of the buffer, below 1.
        decays: of the two averages.
        trust: bound of ``|w sigma f|`` over ``|b|``, norms of the whole tensor.
        weight_decay: weight of SGD's L2 penalty, or with ``decoupled`` of a decay like AdamW's.
        decoupled: shrink the parameter instead of adding to the gradient.
        maximize: ascend.

    Returns:
        The new parameter and state.
    """
    param, grad = decay(
        param, grad, lr=lr, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize
    )
    momentum_buffer = torch.add(momentum_buffer * momentum, grad)
    exp_avg_fast = torch.lerp(exp_avg_fast, grad, 1 - decays[0])
    exp_avg_slow = torch.lerp(exp_avg_slow, grad, 1 - decays[1])
    kept = [momentum_buffer, exp_avg_fast, exp_avg_slow]
    is_complex = param.is_complex()
    if is_complex:
        grad, *kept = map(torch.view_as_real, (grad, *kept))
    scales = advance_scales(scales, mean_square(grad), momentum, decays)
    output = memory_output(weights, kept, memory_units(scales))
    direction = trusted_direction(kept[0], output, trust)
    if is_complex:
        direction = torch.view_as_complex(direction)
    return DeepMomentumState(
        descend(param, direction, lr), momentum_buffer, exp_avg_fast, exp_avg_slow, scales
    )
