"""Each method's learning rate by the same rule, then its runs on every seed.

The grid is the same for all. Its rates are tried with the first seed; where the best is an end, the
grid grows by one point until it is not; then the points half-way (in the logarithm) to its
neighbours are tried, and the best of all trains with every seed. Chosen on validation data;
reported is the test loss.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..jobs import Store
from .run import Job

GRID = (3e-4, 1e-3, 3e-3, 1e-2)
STEP = math.sqrt(10)
#: How many points the grid may grow by at each end.
GROWTH = 3

Execute = Callable[[Iterable[Job]], None]


@dataclass(frozen=True)
class Plan:
    task: str
    size: str
    data: str
    methods: tuple[str, ...]
    seeds: int = 3
    weight_decay: float = 0.1
    grid: tuple[float, ...] = GRID
    refine: bool = True

    def job(self, method: str, lr: float, seed: int) -> Job:
        return Job(self.task, self.size, self.data, method, lr, self.weight_decay, seed)


@dataclass
class Row:
    """One method at its learning rate.

    Attributes:
        sweep: (rate, validation loss with the first seed), by rising rate.
        at_edge: the best rate is the end of what was tried.
        runs: the results of all seeds.
    """

    method: str
    lr: float
    at_edge: bool
    sweep: list[tuple[float, float]]
    runs: list[dict[str, Any]]

    @property
    def test_losses(self) -> list[float]:
        return [math.inf if r["test"] == "inf" else r["test"]["loss"] for r in self.runs]

    def curve(self) -> tuple[list[int], list[float]]:
        """Steps, and the mean validation loss over seeds at each."""
        losses = [[float(x) for x in run["validation"]] for run in self.runs]
        return self.runs[0]["steps"], [statistics.fmean(at) for at in zip(*losses)]


def rounded(lr: float) -> float:
    return float(f"{lr:.2g}")


def measure(plan: Plan, store: Store, execute: Execute) -> list[Row]:
    """Run what is missing, all methods side by side."""
    rates = {m: sorted(plan.grid) for m in plan.methods}
    bounds = (min(plan.grid) / STEP ** (GROWTH + 0.5), max(plan.grid) * STEP ** (GROWTH + 0.5))

    def losses(method: str) -> dict[float, float]:
        return {lr: final_loss(store[plan.job(method, lr, 0)]) for lr in rates[method]}

    def best(method: str) -> float:
        found = losses(method)
        return min(found, key=lambda lr: (found[lr], lr))

    while True:
        execute([plan.job(m, lr, 0) for m in plan.methods for lr in rates[m]])
        grown = False
        for method in plan.methods:
            lr, tried = best(method), rates[method]
            for edge, beyond in ((tried[0], lr / STEP), (tried[-1], lr * STEP)):
                if lr == edge and bounds[0] < beyond < bounds[1]:
                    rates[method] = sorted({*tried, rounded(beyond)})
                    grown = True
        if not grown:
            break
    if plan.refine:
        for method in plan.methods:
            lr = best(method)
            between = [rounded(lr / STEP**0.5), rounded(lr * STEP**0.5)]
            rates[method] = sorted({*rates[method], *between})
        execute([plan.job(m, lr, 0) for m in plan.methods for lr in rates[m]])
    chosen = {m: best(m) for m in plan.methods}
    execute([plan.job(m, chosen[m], s) for m in plan.methods for s in range(plan.seeds)])
    rows = []
    for method in plan.methods:
        lr, found = chosen[method], losses(method)
        runs = [store[plan.job(method, lr, seed)] for seed in range(plan.seeds)]
        edge = lr in (rates[method][0], rates[method][-1])
        rows.append(Row(method, lr, edge, sorted(found.items()), runs))
    return rows


def final_loss(result: dict[str, Any]) -> float:
    final = result["final_validation"]
    return math.inf if final == "inf" else float(final["loss"])


def steps_to(steps: list[int], losses: list[float], target: float) -> float | None:
    """The step at which a curve first is at ``target``, between evaluations linearly."""
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return float(steps[0])
            before = losses[i - 1]
            share = (before - target) / (before - loss) if math.isfinite(before) else 1.0
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


def summary(rows: list[Row], against: str = "adamw") -> list[dict[str, Any]]:
    """Per method: test loss with spread, and the share of the steps that reach AdamW's end."""
    reference = next((row for row in rows if row.method == against), None)
    target = reference.curve()[1][-1] if reference is not None else None
    table = []
    for row in rows:
        steps, curve = row.curve()
        losses = row.test_losses
        finite = all(map(math.isfinite, losses))
        reached = steps_to(steps, curve, target) if target is not None else None
        entry: dict[str, Any] = {
            "method": row.method,
            "lr": row.lr,
            "at_edge": row.at_edge,
            "test_loss": statistics.fmean(losses),
            "spread": statistics.stdev(losses) if len(losses) > 1 and finite else None,
            "validation_loss": curve[-1],
            "share_of_steps": None if reached is None else reached / steps[-1],
            "sweep": row.sweep,
        }
        if finite and "accuracy" in row.runs[0]["test"]:
            scores = [run["test"]["accuracy"] for run in row.runs]
            entry["test_accuracy"] = statistics.fmean(scores)
            entry["accuracy_spread"] = statistics.stdev(scores) if len(scores) > 1 else None
        table.append(entry)
    return table


def differences(rows: list[Row], left: str, right: str) -> dict[str, float] | None:
    """Mean and standard error, over paired seeds, of left's test loss less right's."""
    of = {row.method: row.test_losses for row in rows}
    if left not in of or right not in of:
        return None
    pairs = [a - b for a, b in zip(of[left], of[right])]
    if not all(map(math.isfinite, pairs)) or len(pairs) < 2:
        return None
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return {"mean": statistics.fmean(pairs), "standard_error": error}
