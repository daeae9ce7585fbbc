"""Time spent in ``optimizer.step()``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from . import methods, stream
from .run import Advance, Settings, one_thread

WARM_UP_ROUNDS = 2

TIMED: dict[str, tuple[str, Callable[[nn.Sequential, float], torch.optim.Optimizer]]] = {
    "adamw": ("AdamW", methods.adamw),
    "adamw_foreach": (
        "AdamW, foreach=True",
        lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, foreach=True),
    ),
    "nested": ("NestedOptimizer, f = 1", methods.nested),
    "nested_levels": (f"NestedOptimizer, f = {methods.LEVELS}", methods.nested_levels),
}


def time_optimizers(settings: Settings, advance: Advance) -> dict[str, Any]:
    """Time of ``optimizer.step()`` alone, the optimizers taking turns.

    A block is one period of the slowest level, so that every block holds its cheap steps and its
    dear ones in their true proportion. In every round each optimizer runs one block, in rotating
    order; the medians are over rounds, and ratios are formed within a round before their median is
    taken, so that a busy machine slows both sides.
    """
    block = max(methods.FREQUENCIES)
    data = stream.make_stream(settings.seeds[0])
    inputs = data.train[0].inputs[: settings.batch_size]
    labels = data.train[0].labels[: settings.batch_size]
    seconds: dict[str, list[float]] = {key: [] for key in TIMED}
    with one_thread():
        pairs = {}
        for key, (_, make) in TIMED.items():
            model = stream.build_model(settings.seeds[0])
            pairs[key] = model, make(model, settings.identity_lr)
        for turn in range(WARM_UP_ROUNDS + settings.timing_rounds):
            keys = list(pairs)
            first = turn % len(keys)
            for key in keys[first:] + keys[:first]:
                model, optimizer = pairs[key]
                spent = _time_block(model, optimizer, inputs, labels, block)
                if turn >= WARM_UP_ROUNDS:
                    seconds[key].append(spent / block)
            advance()
    result: dict[str, Any] = {"rounds": settings.timing_rounds, "steps_per_block": block}
    for key, (label, _) in TIMED.items():
        ratios = [a / b for a, b in zip(seconds[key], seconds["adamw"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[key] = {
            "label": label,
            "microseconds_per_step": statistics.median(seconds[key]) * 1e6,
            "ratio_to_adamw": middle,
            "ratio_quartiles": [low, high],
        }
    return result


def timing_turns(settings: Settings) -> int:
    return settings.timing_rounds + WARM_UP_ROUNDS


def _time_block(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
) -> float:
    spent = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        start = time.perf_counter()
        optimizer.step()
        spent += time.perf_counter() - start
    return spent
