"""From the records of runs to figures: per run, and over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import METRICS
from .training import READINGS

Matrix = Sequence[Sequence[float | None]]


def matrix(record: Matrix) -> NDArray[np.float64]:
    """R with NaN where it was not measured."""
    return np.array([[np.nan if v is None else v for v in row] for row in record], np.float64)


def run_metrics(result: dict[str, Any], read_out: str, *, joint: bool = False) -> dict[str, Any]:
    """The metrics of one run in both readings.

    What a run did not measure (see ``training.run``) is missing: a run that selects has no average
    incremental accuracy and no forgetting, joint training only a final accuracy.
    """
    found: dict[str, Any] = {}
    for reading in READINGS:
        record = matrix(result["read_outs"][read_out][reading])
        learnt = np.tril(np.ones_like(record)) == 1
        whole = not np.isnan(record[learnt]).any()
        names = list(METRICS)
        if not whole:
            names = ["final_accuracy", "learning_accuracy", "backward_transfer"]
        if joint:
            names = ["final_accuracy"]
        # Tasks that are not learnt yet count as 0: they are the least that forgetting can start at.
        full = np.where(learnt, np.nan_to_num(record), 0.0)
        found[reading] = {name: METRICS[name](full) for name in names}
        if "curves" in result:
            found[reading] |= gaps(result["curves"][read_out][reading], result)
    return found


def gaps(curve: list[list[float]], result: dict[str, Any]) -> dict[str, float]:
    """What curves show and the ends of tasks hide (De Lange et al. 2023, arXiv 2205.13452).

    Returns:
        ``stability_gap``: the earlier tasks' mean accuracy at the end of a task less its lowest
        during that task, so what was lost for a while only; a mean over tasks. ``min_accuracy``:
        each earlier task's lowest accuracy since the next task began; a mean over these tasks.
    """
    tasks = len(result["changes"])
    if tasks == 1:
        return {"stability_gap": 0.0, "min_accuracy": curve[-1][0]}
    transient = []
    for task in range(1, tasks):
        earlier = [statistics.fmean(point[:task]) for point in curve if len(point) == task + 1]
        transient.append(earlier[-1] - min(earlier))
    lowest = [min(p[task] for p in curve if len(p) > task + 1) for task in range(tasks - 1)]
    return {
        "stability_gap": statistics.fmean(transient),
        "min_accuracy": statistics.fmean(lowest),
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (None of a single value) over seeds, and the values."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "values": list(values)}


def over_seeds(
    runs: Sequence[dict[str, Any]], read_out: str, *, joint: bool = False
) -> dict[str, dict[str, dict[str, Any]]]:
    """``found[reading][metric]``: its summary over the runs."""
    each = [run_metrics(run, read_out, joint=joint) for run in runs]
    return {
        reading: {name: summary([e[reading][name] for e in each]) for name in each[0][reading]}
        for reading in READINGS
    }


def mean_matrix(runs: Sequence[dict[str, Any]], read_out: str, reading: str) -> list[list[Any]]:
    """R averaged over runs; None where it was not measured."""
    stacked = np.stack([matrix(run["read_outs"][read_out][reading]) for run in runs])
    mean = stacked.mean(axis=0)
    return [[None if np.isnan(v) else round(float(v), 5) for v in row] for row in mean]


def mean_curve(runs: Sequence[dict[str, Any]], read_out: str) -> dict[str, Any]:
    """The curves averaged over runs; the same steps in all of them, or those of the shortest.

    Returns:
        ``steps``, ``changes`` and for each reading ``first`` (the first task), ``earlier`` (mean of
        the tasks before the current one, None during the first) and ``current``.
    """
    shortest = min(runs, key=lambda run: len(run["curve_steps"]))
    found: dict[str, Any] = {"steps": shortest["curve_steps"], "changes": shortest["changes"]}
    for reading in READINGS:
        by_position = [_by_position(run, run["curves"][read_out][reading]) for run in runs]
        points = [
            [of_run[position] for of_run in by_position]
            for position in by_position[0]
            if all(position in of_run for of_run in by_position)
        ]
        positions = [p for p in by_position[0] if all(p in of_run for of_run in by_position)]
        found["steps"] = [shortest["changes"][task] + within for task, within in positions]
        found[reading] = {
            "first": _means([[p[0] for p in point] for point in points]),
            "current": _means([[p[-1] for p in point] for point in points]),
            "earlier": _means(
                [[statistics.fmean(p[:-1]) for p in point if len(p) > 1] for point in points]
            ),
        }
    return found


def _by_position(run: dict[str, Any], curve: list[list[float]]) -> dict[tuple[int, int], Any]:
    """Points by (task, batches since it began): tasks of two streams may differ in length."""
    return {
        (len(point) - 1, step - run["changes"][len(point) - 1]): point
        for step, point in zip(run["curve_steps"], curve)
    }


def _means(values: list[list[float]]) -> list[float | None]:
    return [round(statistics.fmean(v), 4) if v else None for v in values]
