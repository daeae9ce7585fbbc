"""Tables and numbers for people: groups, levels, bytes and learning rates of an optimizer."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .levels import gradients_seen, updates_expected
from .tensors import local

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = {
    "name": "group",
    "frequency": "frequency",
    "phase": "phase",
    "updates": "updates",
    "expected_updates": "expected",
    "tensors": "tensors",
    "parameters": "parameters",
    "parameter_bytes": "size",
    "state_bytes": "state",
    "effective_lr": "effective lr",
}


class GroupTable(list[dict[str, Any]]):
    """What :func:`describe` returns: one dict of plain values per group.

    ``print`` and ``rich.print`` show it as a table, for which ``rich`` must be installed.
    """

    def __rich__(self) -> Table:
        try:
            from rich.table import Table
        except ImportError as error:
            raise ImportError(
                "the table is drawn by rich (pip install rich); the rows are plain dicts without it"
            ) from error
        table = Table()
        for key, title in _COLUMNS.items():
            table.add_column(title, justify="left" if key == "name" else "right")
        for row in self:
            table.add_row(*(_cell(key, row[key]) for key in _COLUMNS))
        return table

    def __str__(self) -> str:
        table = self.__rich__()
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=160).print(table)
        return out.getvalue().rstrip()


def describe(optimizer: Optimizer, model: nn.Module | None = None) -> GroupTable:
    """Where each parameter group of an optimizer stands.

    Args:
        optimizer: any optimizer of this package; another torch optimizer counts as frequency 1.
        model: adds a last row for its trainable parameters that no group holds, and names to groups
            that have none (their parameters' common module path).

    Returns:
        Per group, in order:

        - ``name``: the group's ``name``, or ``"group <i>"``;
        - ``frequency``: gradients per update;
        - ``phase``: gradients in the running window, ``(smallest, largest)`` over its parameters;
        - ``updates``: updates applied, ``(smallest, largest)`` likewise;
        - ``expected_updates``: the updates that the most gradients any parameter of the optimizer
        has
          seen would have made at this frequency. It counts on frequencies having been constant, and
          is a number to compare ``updates`` with: a parameter that had no gradients lags behind it;
        - ``tensors``, ``parameters``: how many tensors, how many elements;
        - ``parameter_bytes``, ``state_bytes``: of the parameters and of all their state, on this
          rank;
        - ``effective_lr``: the learning rate of the next update, a float.

        Reading counters that live on an accelerator waits for it.
    """
    names = {p: n for n, p in model.named_parameters()} if model is not None else {}
    groups = [_read_group(optimizer, group) for group in optimizer.param_groups]
    gradients = max((g["gradients"] for g in groups), default=0)
    rows = GroupTable()
    for i, (group, read) in enumerate(zip(optimizer.param_groups, groups)):
        params = group["params"]
        path = _common_path([names[p] for p in params if p in names])
        rows.append(
            {
                "name": str(group.get("name", path or f"group {i}")),
                "frequency": read["frequency"],
                "phase": read["phase"],
                "updates": read["updates"],
                "expected_updates": updates_expected(gradients, read["frequency"]),
                **_sizes(params),
                "state_bytes": sum(map(_bytes, _state_tensors(optimizer, params))),
                "effective_lr": float(group["lr"]),
            }
        )
    if model is not None:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        left = [p for p in names if p.requires_grad and p not in held]
        if left:
            rows.append(
                {
                    **dict.fromkeys(_COLUMNS),
                    "name": "(in no group)",
                    **_sizes(left),
                    "state_bytes": 0,
                }
            )
    return rows


def _read_group(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    frequency = int(group.get("frequency", 1))
    counters = []
    for p in group["params"]:
        state = optimizer.state.get(p, {})
        counters.append(tuple(int(state.get(key, 0)) for key in ("step", "window_count")))
    updates, phases = zip(*counters) if counters else ((0,), (0,))
    seen = [gradients_seen(step, count, frequency) for step, count in counters]
    return {
        "frequency": frequency,
        "phase": (min(phases), max(phases)),
        "updates": (min(updates), max(updates)),
        "gradients": max(seen, default=0),
    }


def _sizes(params: Iterable[Tensor]) -> dict[str, int]:
    params = list(params)
    return {
        "tensors": len(params),
        "parameters": sum(p.numel() for p in params),
        "parameter_bytes": sum(map(_bytes, params)),
    }


def _state_tensors(optimizer: Optimizer, params: Iterable[Tensor]) -> Iterable[Tensor]:
    for p in params:
        yield from (t for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor))


def _bytes(tensor: Tensor) -> int:
    tensor = local(tensor)
    return int(tensor.numel() * tensor.element_size())


def _common_path(names: list[str]) -> str:
    """The dotted path that all these parameters share: ``"encoder.layer.0"``."""
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        low, high = value
        return f"{low}" if low == high else f"{low} to {high}"
    if key.endswith("_bytes"):
        from rich.filesize import decimal

        return decimal(value)
    return (
        f"{value:.3g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else value
    )
