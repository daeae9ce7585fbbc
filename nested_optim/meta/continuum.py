"""Momenta of several time scales of one tensor, as an object that can be used by itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..levels import check_frequency
from ..rules.deep_nested import slow_momentum, slow_weight
from .controller import check_count


def check_frequencies(value: object, where: str = "") -> tuple[int, ...]:
    """Frequencies of momenta as a tuple, or a ValueError: ascending, the first of them 1."""
    if isinstance(value, (str, int)) or not isinstance(value, Sequence):
        raise ValueError(f"{where}Invalid cms_frequencies: {value!r}. Give some, such as (1, 10)")
    found = tuple(check_frequency(f, f"{where}cms_frequencies[{i}]: ") for i, f in enumerate(value))
    if found[:1] != (1,) or any(b <= a for a, b in pairwise(found)):
        raise ValueError(
            f"{where}Invalid cms_frequencies: {found}. The first is 1 (the momentum of every "
            "optimizer), and each further one is larger"
        )
    return found


class ContinuumMemoryState:
    r"""The momenta of one parameter, level i with a chunk of ``frequencies[i]`` gradients.

    .. math::
        m_i \leftarrow \beta\, m_i \;\text{where a chunk opens}, \qquad
        m_i \leftarrow m_i + \tfrac{1-\beta}{f_i} g

    At the end of a chunk this is the average of chunks' means with decay rate :math:`\beta`; it
    needs no second tensor to gather a chunk in, and divided by its weights so far
    (:meth:`get_momentum`) it is an average of the gradients at any time. ``DeepNestedOptimizer``
    keeps the same momenta in its state.

    Args:
        param_shape: shape of the parameter.
        num_levels: how many momenta (default: 3).
        base_frequency: level i has the frequency ``base_frequency ** i`` (default: 10).
        device: of the momenta.
        frequencies: instead of the two: ascending, the first of them 1.
        beta: decay rate (default: 0.9).
        dtype: of the momenta (default: torch.float32).

    Raises:
        ValueError: an argument is out of its range.

    Example::

        >>> state = ContinuumMemoryState((2,), num_levels=2)
        >>> state.update(torch.ones(2))
        >>> state.get_momentum(1).tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        param_shape: Sequence[int],
        num_levels: int = 3,
        base_frequency: int = 10,
        device: torch.device | str | None = None,
        *,
        frequencies: Sequence[int] | None = None,
        beta: float = 0.9,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if frequencies is None:
            check_count("num_levels", num_levels)
            check_count("base_frequency", base_frequency)
            frequencies = [base_frequency**i for i in range(num_levels)]
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta: {beta}. Give a number in [0, 1)")
        self.frequencies = check_frequencies(frequencies)
        self.beta = beta
        self.step = 0
        self.momenta = [
            torch.zeros(tuple(param_shape), device=device, dtype=dtype) for _ in self.frequencies
        ]

    @property
    def num_levels(self) -> int:
        """How many momenta there are."""
        return len(self.momenta)

    def update(self, grad: Tensor) -> None:
        """Take one gradient, of the parameter's shape, into every momentum."""
        if grad.shape != self.momenta[0].shape:
            raise ValueError(
                f"the gradient has shape {tuple(grad.shape)}, the momenta "
                f"{tuple(self.momenta[0].shape)}"
            )
        self.step += 1
        self.momenta = [
            slow_momentum(momentum, grad, self.step, frequency, self.beta)
            for momentum, frequency in zip(self.momenta, self.frequencies)
        ]

    def get_momentum(self, level: int) -> Tensor:
        """An average of the gradients so far, on this level's time scale; 0 before the first."""
        if self.step == 0:
            return self.momenta[level]
        weight: float = slow_weight(self.step, self.frequencies[level], self.beta)
        return self.momenta[level] / weight

    def mix(self, weights: Sequence[float] | Tensor) -> Tensor:
        """The levels' averages with these weights, one for each level."""
        if len(weights) != self.num_levels:
            raise ValueError(f"{self.num_levels} levels need as many weights, not {len(weights)}")
        total = torch.zeros_like(self.momenta[0])
        for level, weight in enumerate(weights):
            total = total + weight * self.get_momentum(level)
        return total
