"""The levels of a weight memory as tensors: their keys, dtypes and mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import find_state_probes
from .rules.kahan import kahan_join
from .tensors import resolve_dtype

#: options of a memory that ride in each param group
MEMORY_OPTIONS = ("memory_frequencies", "memory_write", "memory_pull", "memory_dtype")
#: the steps that a memory has seen, in a parameter's state
COUNT = "memory_count"


class Default(tuple[Any, ...]):
    """What nobody has given: a preset's values come before it."""


class Preset(NamedTuple):
    """Settings under a name, with what to read out: -1 for the slowest, or ``"mean"`` of all.

    Not a level's number: other frequencies may be given with a preset, and so more or fewer levels.
    """

    frequencies: tuple[int, ...]
    write: tuple[float, ...]
    pull: tuple[float, ...]
    read: int | str


#: Settings for streams of tasks: without replay, and with replay.
PRESETS = {
    "continual": Preset((5, 50), (0.2, 0.2), (0.6, 0.2), "mean"),
    "replay": Preset((1, 10), (0.02, 0.1), (0.06, 0.02), -1),
}


def group_label(at: int, group: dict[str, Any]) -> str:
    """How messages call a group."""
    name = group.get("name")
    return f"param group {at}" + (f" ({name!r})" if name is not None else "")


def level_key(level: int) -> str:
    """The key of a slow level (1, 2, ...) in a parameter's state."""
    return f"memory_{level}"


def resolve_level(level: Any, n_slow: int, where: str) -> int:
    """``level`` as a number from 0 (live) to ``n_slow``; 0 in a group that has no copies.

    Raises:
        ValueError: there is no such level.
    """
    if isinstance(level, bool) or not isinstance(level, int):
        raise ValueError(
            f"level must be an integer, 'mean', or one weight per level, but is {level!r}"
        )
    size = n_slow + 1
    if n_slow and not -size <= level < size:
        raise ValueError(
            f"there is no level {level} in {where}, which has the live weights (0) and {n_slow} "
            "slow ones"
        )
    return level % size if n_slow else 0


def mixture(level: Any, n_slow: int, where: str) -> list[float]:
    """The weight of each level in a read-out, live first; they sum to 1.

    Raises:
        ValueError: no such level, or weights that do not fit.
    """
    size = n_slow + 1
    if level == "mean":
        return [1 / size] * size
    if isinstance(level, Sequence) and not isinstance(level, str):
        if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in level):
            raise ValueError(f"the weights of levels must be numbers, but are {level!r}")
        if n_slow and len(level) != size:
            raise ValueError(
                f"{len(level)} weights were given for the {size} levels of {where}: give one per "
                "level, the live one first"
            )
        if not abs(sum(level) - 1) <= 1e-6:
            raise ValueError(f"the weights of levels must sum to 1, but sum to {sum(level)}")
        return list(level) if n_slow else [1.0]
    chosen = resolve_level(level, n_slow, where)
    return [float(k == chosen) for k in range(size)]


def is_memory_key(key: Any) -> bool:
    if not isinstance(key, str) or not key.startswith("memory_"):
        return False
    return key == COUNT or key.removeprefix("memory_").isdecimal()


def dtype_name(dtype: torch.dtype | str, where: str = "") -> str:
    return str(resolve_dtype(dtype, f"{where}memory dtype: ")).removeprefix("torch.")


def copy_dtype(param: Tensor, name: str | None) -> torch.dtype:
    if name is None:
        return torch.promote_types(param.dtype, torch.float32)
    dtype = resolve_dtype(name)
    return dtype.to_complex() if param.is_complex() else dtype


def make_copy(param: Tensor, name: str | None, comp: Tensor | None = None) -> Tensor:
    """A copy of the weights; of compensated ones, with what rounding has taken from them."""
    dtype = copy_dtype(param, name)
    copied = param.detach().clone(memory_format=torch.preserve_format)
    if comp is not None:
        wide = torch.promote_types(param.dtype, torch.float32)
        return kahan_join(copied, comp, wide).to(dtype)
    return copied.to(dtype)


def is_probe(work: list[tuple[dict[str, Any], list[Tensor], list[Any]]]) -> bool:
    """Whether this step only serves to create state (lr 0, zero gradients)."""
    if any("lr" not in group for group, params, _ in work if params):
        return False
    return find_state_probes({}, work) == {p for _, params, _ in work for p in params}


def flat(buffers: list[Tensor]) -> Tensor:
    wide = [b.detach().reshape(-1).to(buffers[0].device) for b in buffers]
    dtype = torch.float32
    for b in wide:
        dtype = torch.promote_types(dtype, b.dtype)
    return torch.cat([b.to(dtype) for b in wide])


def mix(tensors: Sequence[Tensor], mixture: Sequence[float]) -> Tensor:
    """The weighted sum of the levels of a parameter, in the widest of their dtypes."""
    if 1.0 in mixture and sum(map(bool, mixture)) == 1:
        return tensors[list(mixture).index(1.0)]
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    total = torch.zeros_like(tensors[0], dtype=dtype)
    for weight, tensor in zip(mixture, tensors):
        total.add_(tensor.to(dtype), alpha=weight)
    return total
