"""The learning rate of each read-out of each method, and the runs that are reported.

The rate is the best of the method's grid by the mean criterion over the selection seeds, measured
on validation samples; where that is an end of the grid, the grid grows by half a decade until it
is not. Reported runs have other seeds, so other streams, and are measured on test samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..jobs import Store
from . import aggregate
from .data import Dataset
from .methods import Method
from .training import Job

FIRST_SELECTION_SEED = 1000
#: How many rates a grid may grow by at each end.
GROWTH = 6


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    selection_seeds: int = 3
    replay: int = 0
    epochs: int = 1
    batch: int = 10
    growth: int = GROWTH
    points: int | None = None  # of each grid; None for all of them

    @property
    def criterion(self) -> str:
        """The reading whose final accuracy chooses learning rates."""
        return "class_il" if self.replay else "task_il"


Execute = Callable[[Iterable[Job]], None]


@dataclass
class Row:
    """One read-out of one method, at its own learning rate."""

    method: Method
    read_out: str
    lr: float
    at_edge: bool
    sweep: list[dict[str, float]]
    runs: list[dict[str, Any]]

    @property
    def score(self) -> float:
        """The mean criterion at the chosen rate, on the selection seeds."""
        return max(point["score"] for point in self.sweep)


def step_of(lr: float) -> int:
    """The place of a rate on the ladder ..., 1e-3, 3e-3, 1e-2, ...; 0 is 1.

    Raises:
        ValueError: it is not on the ladder.
    """
    mantissa, exponent = f"{lr:.0e}".split("e")
    place = 2 * int(exponent) + (mantissa == "3")
    if rate_at(place) != lr:
        raise ValueError(f"the grid is of 1 and 3 times powers of ten, which {lr} is not")
    return place


def rate_at(place: int) -> float:
    return float(f"{(1, 3)[place % 2]}e{place // 2}")


def make_job(data: Dataset, method: Method, settings: Settings, lr: float, seed: int) -> Job:
    return Job(
        stream=data.name,
        method=method.key,
        settings=method.settings,
        lr=lr,
        seed=seed,
        replay=0 if method.joint else settings.replay,  # it sees all tasks at all times
        epochs=settings.epochs,
        batch=settings.batch,
        purpose="select" if seed >= FIRST_SELECTION_SEED else "report",
    )


def grid(method: Method, points: int | None) -> list[float]:
    """The method's rates, or so many from the middle of them, two steps apart where that fits."""
    rates = list(method.lrs)
    if points is None or points >= len(rates):
        return rates
    stride = 2 if 2 * points <= len(rates) + 1 else 1
    start = (len(rates) - stride * (points - 1) - 1) // 2
    return rates[start : start + stride * points : stride]


def select(
    data: Dataset, methods: list[Method], settings: Settings, store: Store, execute: Execute
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Score every rate of every method until the best of each read-out is inside its grid.

    Returns:
        ``found[method][read_out]``: points with ``lr``, ``score``, ``spread`` (over seeds) and,
        but for joint training, ``la`` (learning accuracy, task-IL), by rising rate.
    """
    seeds = range(FIRST_SELECTION_SEED, FIRST_SELECTION_SEED + settings.selection_seeds)
    rates = {m.key: [step_of(lr) for lr in grid(m, settings.points)] for m in methods}
    bounds = {k: (min(r) - settings.growth, max(r) + settings.growth) for k, r in rates.items()}
    while True:
        jobs = {
            (m.key, place): [make_job(data, m, settings, rate_at(place), seed) for seed in seeds]
            for m in methods
            for place in rates[m.key]
        }
        execute([job for of_rate in jobs.values() for job in of_rate])
        found = {
            m.key: _points(m, settings, [(p, jobs[m.key, p]) for p in rates[m.key]], store)
            for m in methods
        }
        grown = False
        for key, of_read_out in found.items():
            low, high = min(rates[key]), max(rates[key])
            best = {step_of(best_of(points)["lr"]) for points in of_read_out.values()}
            for edge, beyond in ((low, low - 1), (high, high + 1)):
                if edge in best and bounds[key][0] <= beyond <= bounds[key][1]:
                    rates[key] = sorted([*rates[key], beyond])
                    grown = True
        if not grown:
            return found


def _points(
    method: Method, settings: Settings, of_rates: list[tuple[int, list[Job]]], store: Store
) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {}
    for place, jobs in of_rates:
        results = [store[job] for job in jobs]
        for name in results[0]["read_outs"]:
            runs = [aggregate.run_metrics(r, name, joint=method.joint) for r in results]
            scores = [run[settings.criterion]["final_accuracy"] for run in runs]
            point = {
                "lr": rate_at(place),
                "score": statistics.fmean(scores),
                "spread": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            }
            if not method.joint:
                learning = [run["task_il"]["learning_accuracy"] for run in runs]
                point["la"] = statistics.fmean(learning)
            found.setdefault(name, []).append(point)
    return found


def best_of(points: list[dict[str, float]]) -> dict[str, float]:
    """The point of the highest score, the lowest rate of equals."""
    return max(points, key=lambda point: (point["score"], -point["lr"]))


def measure(
    data: Dataset, methods: list[Method], settings: Settings, store: Store, execute: Execute
) -> list[Row]:
    """Choose rates, then train every chosen one on the reported seeds."""
    selected = select(data, methods, settings, store, execute)

    def jobs(method: Method, lr: float) -> list[Job]:
        return [make_job(data, method, settings, lr, seed) for seed in range(settings.seeds)]

    best = {
        (m.key, name): best_of(points)["lr"]
        for m in methods
        for name, points in selected[m.key].items()
    }
    execute(
        [job for m in methods for (k, _), lr in best.items() if k == m.key for job in jobs(m, lr)]
    )
    rows = []
    for method in methods:
        for name, points in selected[method.key].items():
            lr = best[method.key, name]
            at_edge = len(points) > 1 and lr in (points[0]["lr"], points[-1]["lr"])
            runs = [store[job] for job in jobs(method, lr)]
            rows.append(Row(method, name, lr, at_edge, points, runs))
    return rows
