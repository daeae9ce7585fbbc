"""What tells a step that it is like the one before, so that its plans hold and need no look."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .optimizer import LevelOptimizer

_params = itemgetter("params")


def same_objects(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether both hold the very same objects."""
    return len(some) == len(others) and all(map(is_, some, others))


class Roster:
    """Which groups and parameters an optimizer had in a step, and which had no gradient."""

    def __init__(self, optimizer: LevelOptimizer, present: Iterable[Tensor]) -> None:
        self._groups = list(optimizer.param_groups)
        self._members = [list(group["params"]) for group in self._groups]
        known = set(map(id, present))
        self._absent = [p for members in self._members for p in members if id(p) not in known]

    def holds(self, optimizer: LevelOptimizer) -> bool:
        """Whether they are the same, and none of those without a gradient has one now."""
        groups = optimizer.param_groups
        return (
            same_objects(groups, self._groups)
            and all(map(same_objects, map(_params, groups), self._members))
            and not any(p.grad is not None for p in self._absent)
        )
