"""A momentum whose scale, shift and damping are learned."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import networks
from .controller import check_count
from .features import TENSOR_FEATURES, measure, tensor_features

#: Of the logarithm of scale, a factor of 10, and of shift, one whole gradient.
LIMITS = (math.log(10.0), 1.0)
#: How fast scale, shift and damping are learned beside a multiplier. What one step says about shift
#: and damping is mostly that momentum is too old for the next step (short-horizon bias); learned at
#: a multiplier's pace they do harm.
PACES = (1 / 4, 1 / 16, 1 / 32)


class Correction(NamedTuple):
    """What a momentum is changed by; plain momentum is (1, 0, 0)."""

    scale: Tensor
    shift: Tensor
    damping: Tensor


def longest_memory(beta: Any) -> Any:
    """How far below 0 damping may go: a momentum then remembers twice as long."""
    if isinstance(beta, Tensor):
        return torch.where(beta > 0, 0.5 * (1 - beta) / beta, 1.0)
    return 0.5 * (1 - beta) / beta if beta > 0 else 1.0


def corrections(
    weights: Tensor, features: Tensor, hidden: int, layers: int, beta: float | Tensor
) -> Correction:
    """Scale, shift and damping, each ``(rows,)``; exactly 1, 0, 0 at the start.

    Scale is in (0.1, 10), shift in (-1, 1). Damping is below 1 (which forgets all), and above the
    value at which ``beta * (1 - damping)`` were halfway between beta and 1.

    Args:
        weights: flat, of the features' dtype.
        features: ``(rows, features)``.
        hidden: units per layer.
        layers: hidden layers.
        beta: the momentum's decay rate, or ``(rows,)`` of them.
    """
    out = networks.mlp(weights, features, hidden, 3, layers)
    scale, shift, damping = (part * pace for part, pace in zip(out.unbind(-1), PACES))
    factor, furthest = LIMITS
    return Correction(
        torch.exp(networks.bounded(scale, -factor, factor)),
        networks.bounded(shift, -furthest, furthest),
        networks.bounded(damping, -longest_memory(beta), 1.0),
    )


def objective(momentum: Tensor, grad: Tensor, beta: float, damping: Tensor | float) -> Tensor:
    r"""The L2 regression whose descent step is the momentum.

    .. math::
        \tfrac{1-\beta}{2} |m - g|^2 + \tfrac{\beta d}{2} |m|^2

    A step of size 1 down its gradient is :math:`m \leftarrow \beta (1 - d)\,m + (1-\beta) g`: plain
    momentum regresses on the gradients (Nested Learning, arXiv 2512.24695, section 4), and damping
    is the weight of a ridge penalty.
    """
    fit = (1 - beta) / 2 * (momentum - grad).square().sum()
    return fit + beta * damping / 2 * momentum.square().sum()


class L2RegressionMomentum(nn.Module):
    r"""Momentum as a regression on gradients, whose scale, shift and damping a network learns.

    .. math::
        m \leftarrow m - \nabla_m \Big(\tfrac{1-\beta}{2} |m - g|^2
            + \tfrac{\beta d}{2} |m|^2\Big), \qquad u = s\,m + b\,g

    s, b and d come from sizes and angle of g and m. They are (1, 0, 0), exactly, until the weights
    have moved: plain momentum. Train the weights on a loss that the direction u leads to; in
    ``DeepNestedOptimizer`` it is the model's. It uses the same functions, with a second moment
    below u.

    Args:
        hidden_dim: units per hidden layer (default: 64).
        num_layers: hidden layers (default: 2).
        beta: decay rate of the momentum, in [0, 1) (default: 0.9).

    Raises:
        ValueError: an argument is out of its range.

    Example::

        >>> momentum = L2RegressionMomentum(hidden_dim=16)
        >>> m, u = momentum.update(torch.zeros(3), torch.ones(3))
        >>> torch.equal(m, u)
        True
    """

    def __init__(self, hidden_dim: int = 64, num_layers: int = 2, beta: float = 0.9) -> None:
        super().__init__()
        self.hidden_dim = check_count("hidden_dim", hidden_dim)
        self.num_layers = check_count("num_layers", num_layers)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta: {beta}. Give a number in [0, 1)")
        self.beta = beta
        start = networks.initial(TENSOR_FEATURES, hidden_dim, 3, num_layers)
        self.weights = nn.Parameter(start)

    def forward(self, features: Tensor) -> Correction:
        """Scale, shift and damping, each ``(rows,)``, of ``(rows, 4)`` statistics."""
        if features.dim() != 2 or features.shape[1] != TENSOR_FEATURES:
            raise ValueError(
                f"features must be (rows, {TENSOR_FEATURES}), but are {tuple(features.shape)}"
            )
        return corrections(
            self.weights,
            features.to(self.weights.dtype),
            self.hidden_dim,
            self.num_layers,
            self.beta,
        )

    def statistics(self, momentum: Tensor, grad: Tensor, param: Tensor | None = None) -> Tensor:
        """``(1, 4)``: logarithms of sizes, and the cosine, of what one tensor's update sees."""
        param = grad if param is None else param
        sizes = measure([param], [grad], [momentum], maximize=False, home=grad.device)
        return tensor_features([param], sizes)

    def objective(self, momentum: Tensor, grad: Tensor, damping: Tensor | float = 0.0) -> Tensor:
        """The internal L2 objective, 0-d; see :func:`objective`."""
        return objective(momentum, grad, self.beta, damping)

    def update(
        self, momentum: Tensor, grad: Tensor, param: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The new momentum and the direction u, both of the gradient's shape.

        The momentum takes its step down the internal objective's gradient. Differentiable in
        weights, momentum and gradient.
        """
        scale, shift, damping = self(self.statistics(momentum, grad, param))
        slope = (1 - self.beta) * (momentum - grad) + self.beta * damping.to(grad) * momentum
        momentum = momentum - slope
        return momentum, scale.to(grad) * momentum + shift.to(grad) * grad
