"""The controller: statistics of a param group -> a multiplier of its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import networks


def check_count(name: str, value: Any, where: str = "") -> int:
    """``value`` as an integer >= 1, or a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}Invalid {name}: {value!r}. Give an integer >= 1")
    return value


def check_range(low: Any, high: Any, where: str = "") -> tuple[float, float]:
    """The bounds of a multiplier that starts at 1, or a ValueError."""
    for name, value in (("min_lr_mult", low), ("max_lr_mult", high)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}Invalid {name}: {value!r}. Give a number")
    if not 0.0 < low < 1.0 < high < math.inf:
        raise ValueError(
            f"{where}Invalid min_lr_mult, max_lr_mult: {low}, {high}. Multipliers start at 1 and "
            "move both ways: 0 < min_lr_mult < 1 < max_lr_mult"
        )
    return float(low), float(high)


def multipliers(
    weights: Tensor, features: Tensor, hidden: int, layers: int, low: float, high: float
) -> Tensor:
    """Learning rate multipliers in (low, high), spaced by their logarithms; exactly 1 at the start.

    Args:
        weights: flat, of the features' dtype.
        features: ``(rows, features)``.
        hidden: units per layer.
        layers: hidden layers.
        low: bound, below 1.
        high: bound, above 1.

    Returns:
        ``(rows,)``.
    """
    return torch.exp(log_multipliers(weights, features, hidden, layers, low, high))


def log_multipliers(
    weights: Tensor, features: Tensor, hidden: int, layers: int, low: float, high: float
) -> Tensor:
    """The logarithms of :func:`multipliers`."""
    out = networks.mlp(weights, features, hidden, 1, layers).squeeze(-1)
    return networks.bounded(out, math.log(low), math.log(high))


class NestedController(nn.Module):
    r"""A small network that maps statistics of param groups to learning rate multipliers.

    .. math::
        \mu = \exp(b(f(x; \phi) - f(x; \phi_0)))

    with a tanh network f, its weights :math:`\phi_0` at the start, and a smooth map b into
    (log min_lr_mult, log max_lr_mult) with slope 1 at 0. So multipliers are exactly 1 until the
    weights have moved, every weight has a gradient from the start, and none is lost at a bound.
    ``DeepNestedOptimizer`` computes its multipliers with the same functions.

    Args:
        hidden_dim: units per hidden layer (default: 32).
        num_layers: hidden layers (default: 2).
        min_lr_mult: lower bound, in (0, 1) (default: 0.01).
        max_lr_mult: upper bound, above 1 (default: 100).
        n_groups: rows that the input must have; None takes any number (default: None).
        n_features: statistics per group, of order 1 (logarithms of norms, say) (default: 3).

    Raises:
        ValueError: an argument is out of its range.

    Example::

        >>> controller = NestedController(hidden_dim=32)
        >>> controller(torch.tensor([[0.5, 1.2, 0.3], [0.3, 0.8, 0.5]])).tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        hidden_dim: int = 32,
        num_layers: int = 2,
        min_lr_mult: float = 0.01,
        max_lr_mult: float = 100.0,
        n_groups: int | None = None,
        n_features: int = 3,
    ) -> None:
        super().__init__()
        self.hidden_dim = check_count("hidden_dim", hidden_dim)
        self.num_layers = check_count("num_layers", num_layers)
        self.n_features = check_count("n_features", n_features)
        self.n_groups = None if n_groups is None else check_count("n_groups", n_groups)
        self.min_lr_mult, self.max_lr_mult = check_range(min_lr_mult, max_lr_mult)
        start = networks.initial(n_features, hidden_dim, 1, num_layers)
        self.weights = nn.Parameter(start)

    def forward(self, stats: Tensor) -> Tensor:
        """Multipliers ``(groups,)`` of statistics ``(groups, n_features)``."""
        fits = stats.dim() == 2 and stats.shape[1] == self.n_features
        if not fits or self.n_groups not in (None, stats.shape[0]):
            rows = "groups" if self.n_groups is None else self.n_groups
            raise ValueError(
                f"stats must be ({rows}, {self.n_features}), but are {tuple(stats.shape)}"
            )
        return multipliers(
            self.weights,
            stats.to(self.weights.dtype),
            self.hidden_dim,
            self.num_layers,
            self.min_lr_mult,
            self.max_lr_mult,
        )
