"""Where the time of a step goes: by kernel on CUDA, by operation on a CPU (torch.profiler)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def where(
    work: Callable[[], Any], device: torch.device, steps: int, most: int = 12
) -> dict[str, float]:
    """Milliseconds of a step by the name of what took them, the ``most`` largest first.

    Args:
        work: ``steps`` steps, with the first ones of all behind them.
        device: where it runs.
        steps: times are means over them.
        most: how many names; all others are added up as ``"others"``.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        work()
        if cuda:
            torch.cuda.synchronize(device)
    times: dict[str, float] = {}
    for event in profiled.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0:
            times[event.key] = times.get(event.key, 0.0) + spent / steps / 1e3
    ordered = sorted(times.items(), key=lambda item: -item[1])
    found = dict(ordered[:most])
    if ordered[most:]:
        found["others"] = sum(spent for _, spent in ordered[most:])
    return found
