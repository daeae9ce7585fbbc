"""What of a weight memory a checkpoint holds: checked before loading, put back after it.

And what an optimizer has loaded before the memory was attached.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .exchanges import Settings
from .memory_buffers import BUFFERS
from .memory_levels import COUNT, MEMORY_OPTIONS, copy_dtype, group_label, is_memory_key
from .rules.exchange import narrower
from .tensors import laid_out_like, local


class Loading(NamedTuple):
    """What is kept from torch's loading, which rounds state and replaces groups."""

    copies: dict[Tensor, dict[str, Any]]
    groups: list[dict[str, Any]]
    steps: int
    settings: list[Settings]  # that groups will have
    rows: Tensor | None  # averages of buffers


def look_at(
    optimizer: Optimizer, state_dict: dict[str, Any], check_group: Callable[[int, Any], Settings]
) -> Loading:
    """Check what the checkpoint has of a memory, and keep it; changes nothing.

    Raises:
        ValueError: settings are invalid, copies have other shapes, or counts differ.
    """
    copies: dict[Tensor, dict[str, Any]] = {}
    counts = set()
    settings = []
    for at, (live, saved) in enumerate(
        zip(optimizer.param_groups, state_dict.get("param_groups", ()))
    ):
        saved_keys = {k: saved[k] for k in MEMORY_OPTIONS if k in saved}
        merged = {**{k: live.get(k) for k in MEMORY_OPTIONS}, **saved_keys}
        settings.append(check_group(at, merged))
        for key, p in zip(saved["params"], live["params"]):
            entries = state_dict["state"].get(key, {})
            own = {k: v for k, v in entries.items() if is_memory_key(k)}
            for k, v in own.items():
                if k != COUNT and isinstance(v, Tensor) and v.shape != p.shape:
                    raise ValueError(
                        f"checkpoint's {k!r} of a parameter of param group {at} has shape "
                        f"{tuple(v.shape)}, where the parameter has {tuple(p.shape)}"
                    )
            if COUNT in own:
                counts.add(int(own[COUNT]))
            copies[p] = own
    if len(counts) > 1:
        raise ValueError(
            f"checkpoint's parameters disagree on {COUNT}, the steps of the memory: "
            f"{sorted(counts)}"
        )
    groups = [{k: group.get(k) for k in MEMORY_OPTIONS} for group in optimizer.param_groups]
    rows = next((saved.get(BUFFERS) for saved in state_dict.get("param_groups", ())), None)
    return Loading(copies, groups, max(counts, default=0), settings, rows)


def restore_settings(optimizer: Optimizer, loading: Loading) -> None:
    """Give groups what the checkpoint does not know; tell where its own settings win."""
    changed = set()
    for group, live in zip(optimizer.param_groups, loading.groups):
        for key, value in live.items():
            if key not in group:
                group[key] = value
            elif group[key] != value:
                changed.add(key)
    if changed:
        warnings.warn(
            f"the checkpoint's {', '.join(sorted(changed))} replace the memory's where they "
            "differ. To keep your own, set them in param_groups after loading.",
            stacklevel=6,
        )


def restore_copies(optimizer: Optimizer, loading: Loading) -> None:
    """Put the checkpoint's copies in the state, in the dtypes of the groups' settings."""
    count = torch.tensor(loading.steps, dtype=torch.int64)
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in loading.copies.get(p, {}).items():
                own = optimizer.state[p]
                if key == COUNT:
                    own[key] = count
                elif isinstance(value, Tensor):
                    dtype = copy_dtype(p, group["memory_dtype"])
                    value = laid_out_like(value, p).to(device=p.device, dtype=dtype)
                    # The checkpoint may be loaded once more, and must not move.
                    own[key] = value.clone(memory_format=torch.preserve_format)
                else:
                    del own[key]


@torch.no_grad()
def take_over(optimizer: Optimizer, groups: list[Settings], default: str | None) -> None:
    """Bring a memory's state, put there before it was attached, to the dtypes that it has to have.

    An optimizer that loads a checkpoint without a memory rounds it to the parameters' dtypes.

    Args:
        groups: the settings of each group.
        default: dtype of the copies where a group has none of its own.

    Raises:
        ValueError: something was lost. Nothing has changed.
    """
    changes: list[tuple[dict[str, Any], str, Tensor]] = []
    counts: dict[int, Tensor] = {}
    known: dict[int, int] = {}  # by id: copies of an optimizer share one
    members = []
    for at, (group, settings) in enumerate(zip(optimizer.param_groups, groups)):
        dtype = group.get("memory_dtype", default)
        where = f"of a parameter of {group_label(at, group)}"
        for p in group["params"] if settings.levels else ():
            own = optimizer.state.get(p, {})
            if isinstance(count := own.get(COUNT), Tensor):
                if id(count) not in known:
                    known[id(count)] = _exact_count(count, where)
                counts.setdefault(known[id(count)], count)
                members.append(own)
            for key in settings.keys:
                value = own.get(key)
                wanted = copy_dtype(p, dtype)
                if not isinstance(value, Tensor) or value.dtype == wanted:
                    continue
                if narrower(value.dtype, wanted):
                    raise _lost(f"{key!r} {where}", f"is {value.dtype}, rounded from {wanted}")
                new = value.to(wanted)
                if torch.equal(local(new).to(value.dtype), local(value)):
                    changes.append((own, key, new))
    if len(counts) > 1:
        raise ValueError(
            f"the parameters' state disagrees on {COUNT}, the steps of the memory: {sorted(counts)}"
        )
    for steps, count in counts.items():
        if count.dtype != torch.int64 or len(known) > 1:
            count = torch.tensor(steps, dtype=torch.int64)
            changes += [(own, COUNT, count) for own in members]
    for own, key, value in changes:
        own[key] = value


def _exact_count(count: Tensor, where: str) -> int:
    steps = int(count)
    if count.is_floating_point() and (steps != count or steps >= 2 / torch.finfo(count.dtype).eps):
        raise _lost(
            f"{COUNT!r} {where}", f"is {steps} in {count.dtype}, which may be a rounded one"
        )
    return steps


def _lost(what: str, why: str) -> ValueError:
    return ValueError(
        f"{what} {why}: the state was loaded before there was a WeightMemory, and torch rounds "
        "what it loads to the parameter's dtype. Attach the memory first, then load"
    )
