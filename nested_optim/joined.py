"""Exchanges that our fused kernels do on the way, while they have the weights at hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .exchanges import Settings
from .fused import FusedSteps, JoinedExchange
from .rules.exchange import pull_after_write
from .tensors import capturing


def withdraw(optimizer: Optimizer) -> FusedSteps | None:
    """The optimizer's fused steps, if it has any; nothing is asked of them any more."""
    fused = getattr(optimizer, "_fused", None)
    if not isinstance(fused, FusedSteps):
        return None
    fused.exchange = None
    return fused


def ask(
    optimizer: Optimizer, count: Tensor | None, groups: Iterable[tuple[dict[str, Any], Settings]]
) -> JoinedExchange | None:
    """Ask the kernels of the step to come for the exchanges of live weights that it makes due.

    They answer in ``done``. Where the host does not know what the step will be (a step counted on
    the device, captured, or skipped there by a GradScaler) or has no kernels, nothing is asked.
    """
    fused = withdraw(optimizer)
    if fused is None:
        return None
    scaling = (getattr(optimizer, key, None) for key in ("grad_scale", "found_inf"))
    if count is None or not count.is_cpu or capturing() or any(x is not None for x in scaling):
        return None
    coming = int(count) + 1
    copies: dict[Tensor, tuple[Tensor, int, float, float]] = {}
    for group, settings in groups:
        if not settings.levels or coming % settings.frequencies[0]:
            continue
        frequency, write, pull = settings.frequencies[0], settings.write[0], settings.pull[0]
        numbers = frequency, write, pull_after_write(write, pull)
        first, last = settings.keys[0], settings.keys[-1]
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if last in state:
                copies[p] = (state[first], *numbers)
    if copies:
        fused.exchange = JoinedExchange(coming, copies)
    return fused.exchange
