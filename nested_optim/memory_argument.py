"""``memory=`` of our optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from .weight_memory import WeightMemory

#: What ``memory=`` of our optimizers takes.
MemoryT = str | Sequence[int] | dict[str, Any] | None


def attach_memory(optimizer: Optimizer, memory: Any) -> WeightMemory:
    """A WeightMemory as ``memory=`` says: a preset's name, frequencies, or a dict of arguments.

    Raises:
        TypeError: it is none of these, or the dict has a name that WeightMemory does not know.
        ValueError: WeightMemory refuses the settings.
    """
    if isinstance(memory, str):
        return WeightMemory(optimizer, preset=memory)
    if isinstance(memory, dict):
        return WeightMemory(optimizer, **memory)
    if isinstance(memory, Sequence):
        return WeightMemory(optimizer, memory)
    raise TypeError(
        "memory= takes a preset's name, frequencies such as (10, 50), or a dict of WeightMemory's "
        f"arguments, but got {memory!r}"
    )
