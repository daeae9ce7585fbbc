"""From runs to figures: lr by rule, means and spreads, retention at equal learning accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from benchmarks import metrics

from . import methods
from .run import READINGS, Run, Settings

Array = NDArray[np.float64]

# How an lr is chosen for a method: the largest mean over seeds of this metric on the validation
# digits with the task known. Test digits are reported and never chosen by.
LR_RULES = {
    "learning": ("learning_accuracy", "at the lr that learns best"),
    "final": ("final_accuracy", "at the lr that ends best"),
}
# Two methods are compared at equal learning accuracy: over this far below the most that both reach
# (what matters to who wants both tasks learned), and at one smaller learning accuracy.
LEARNING_SPAN = 0.05
LESS_LEARNING = 0.92
TARGETS = (0.90, 0.92, 0.94, 0.96, 0.98)
# A difference counts when 0 lies outside its interval of this confidence (Student's t).
CONFIDENCE = 0.95
OURS = "nested_levels"
CONTROLS = ("adamw", "adamw_accumulation", "adamw_divided_lr")


def mean_and_spread(values: Sequence[float] | Array) -> dict[str, float | None]:
    """Mean and sample standard deviation; None where one value has no spread."""
    array = np.asarray(values, dtype=np.float64)
    spread = float(array.std(ddof=1)) if len(array) > 1 else None
    return {"mean": float(array.mean()), "std": spread}


class Grid:
    """Runs by method, lr and seed, as arrays of shape (seed, lr)."""

    def __init__(self, runs: Sequence[Run], settings: Settings) -> None:
        self.settings = settings
        self._runs = {(run.job.method, run.job.lr, run.job.seed): run for run in runs}

    def at(self, method: str, lr: float) -> list[Run]:
        return [self._runs[method, lr, seed] for seed in self.settings.seeds]

    def metric(self, method: str, name: str, split: str = "test", reading: str = "known") -> Array:
        function = metrics.METRICS[name]
        columns = [
            [function(getattr(run, split)[reading]) for run in self.at(method, lr)]
            for lr in self.settings.lrs
        ]
        return np.array(columns).T

    def old_kept(self, method: str, reading: str = "known") -> Array:
        """Accuracy on the first task after the last."""
        columns = [
            [run.test[reading][-1][0] for run in self.at(method, lr)] for lr in self.settings.lrs
        ]
        return np.array(columns).T

    def choose_lr(self, method: str, rule: str) -> float:
        scores = self.metric(method, LR_RULES[rule][0], "validation").mean(axis=0)
        return self.settings.lrs[int(scores.argmax())]  # of equals the smallest

    def summary(self, method: str, lr: float) -> dict[str, Any]:
        """Every metric on test digits at one lr, with the task known and unknown."""
        result: dict[str, Any] = {}
        for reading in READINGS:
            matrices = [run.test[reading] for run in self.at(method, lr)]
            figures = {
                name: mean_and_spread([function(matrix) for matrix in matrices])
                for name, function in metrics.METRICS.items()
            }
            figures["old_digits"] = mean_and_spread([matrix[-1][0] for matrix in matrices])
            figures["new_digits"] = mean_and_spread([matrix[-1][1] for matrix in matrices])
            result[reading] = figures
        return result

    def curve(self, method: str, lr: float) -> dict[str, Any]:
        """Test accuracy during the stream, mean and spread over seeds, in ``[step][task]``."""
        runs = self.at(method, lr)
        result: dict[str, Any] = {"steps": runs[0].steps}
        for reading in READINGS:
            stacked = np.array([run.curves[reading] for run in runs])
            result[reading] = {
                "mean": stacked.mean(axis=0).tolist(),
                "std": stacked.std(axis=0, ddof=1).tolist() if len(runs) > 1 else None,
            }
        return result


def retention_at(learning: Array, kept: Array, target: float) -> float | None:
    """Old-digit accuracy where learning accuracy first reaches ``target`` as the lr grows.

    Both arrays run along the lr grid; between its points the curve is a straight line. None where
    the target is never reached, or is passed before the grid starts.
    """
    reached = np.flatnonzero(learning >= target)
    if not len(reached):
        return None
    i = int(reached[0])
    if learning[i] == target:
        return float(kept[i])
    if i == 0:
        return None
    share = (target - learning[i - 1]) / (learning[i] - learning[i - 1])
    return float(kept[i - 1] + share * (kept[i] - kept[i - 1]))


def shared_range(learning_a: Array, learning_b: Array) -> tuple[float, float] | None:
    """The learning accuracies just below the most that both grids reach."""
    high = min(learning_a.max(), learning_b.max())
    low = max(high - LEARNING_SPAN, learning_a[0], learning_b[0])
    return (float(low), float(high)) if low < high else None


def mean_gap(la_a: Array, kept_a: Array, la_b: Array, kept_b: Array) -> float | None:
    """Retention of a minus that of b at equal learning accuracy, averaged over that range."""
    span = shared_range(la_a, la_b)
    if span is None:
        return None
    gaps = [gap_at(target, la_a, kept_a, la_b, kept_b) for target in np.linspace(*span, 41)]
    found = [gap for gap in gaps if gap is not None]
    return float(np.mean(found)) if found else None


def gap_at(target: float, la_a: Array, kept_a: Array, la_b: Array, kept_b: Array) -> float | None:
    """Retention of a minus that of b where both learned ``target``."""
    a, b = retention_at(la_a, kept_a, target), retention_at(la_b, kept_b, target)
    return None if a is None or b is None else a - b


def compare(
    grid: Grid, control: str, gap_of: Callable[[Array, Array, Array, Array], float | None]
) -> dict[str, Any]:
    """The three levels minus a control by ``gap_of``, with a standard error over seeds.

    The curves are means over seeds, as drawn; the error is the jackknife's, which leaves out one
    seed of both methods at a time (a seed fixes weights, batches and validation digits of both).
    """
    la_a, la_b = (grid.metric(method, "learning_accuracy") for method in (OURS, control))
    arrays = (la_a, grid.old_kept(OURS), la_b, grid.old_kept(control))
    gap = gap_of(*(a.mean(axis=0) for a in arrays))
    error = None
    seeds = len(la_a)
    if gap is not None and seeds > 1:
        left_out = [
            gap_of(*(np.delete(a, seed, axis=0).mean(axis=0) for a in arrays))
            for seed in range(seeds)
        ]
        if None not in left_out:
            values = np.array(left_out, dtype=np.float64)
            error = float(math.sqrt((seeds - 1) / seeds * ((values - values.mean()) ** 2).sum()))
    return {
        "control": control,
        "learning_accuracy_range": shared_range(la_a.mean(axis=0), la_b.mean(axis=0)),
        "gap": gap,
        "standard_error": error,
        "verdict": verdict(gap, error, seeds),
    }


def verdict(gap: float | None, error: float | None, seeds: int) -> str:
    """``more``, ``less``, ``equal`` (not told apart) or ``unknown`` (no error or no overlap)."""
    if gap is None or error is None:
        return "unknown"
    if abs(gap) <= standard_errors_needed(seeds) * error:
        return "equal"
    return "more" if gap > 0 else "less"


def standard_errors_needed(seeds: int) -> float:
    """How many standard errors a difference over this many seeds must exceed."""
    return float(stdtrit(seeds - 1, (1 + CONFIDENCE) / 2))


def analyse(runs: Sequence[Run], settings: Settings) -> dict[str, Any]:
    grid = Grid(runs, settings)
    by_rule: dict[str, Any] = {}
    for rule, (metric, description) in LR_RULES.items():
        rows = {}
        for method in methods.METHODS:
            lr = grid.choose_lr(method.key, rule)
            rows[method.key] = {
                "label": method.label,
                "lr": lr,
                "lr_at_edge_of_grid": lr in (settings.lrs[0], settings.lrs[-1]),
                **grid.summary(method.key, lr),
                "curve": grid.curve(method.key, lr),
            }
        by_rule[rule] = {"metric": metric, "description": description, "methods": rows}
    whole_grid = {
        method.key: [{"lr": lr, **grid.summary(method.key, lr)} for lr in settings.lrs]
        for method in methods.METHODS
    }
    retention: dict[str, Any] = {}
    for method in methods.METHODS:
        learning = grid.metric(method.key, "learning_accuracy").mean(axis=0)
        kept = grid.old_kept(method.key).mean(axis=0)
        retention[method.key] = [retention_at(learning, kept, target) for target in TARGETS]
    return {
        "by_lr_rule": by_rule,
        "lr_grid": whole_grid,
        "equal_learning": {
            "learning_accuracy_targets": TARGETS,
            "old_digits_kept": retention,
            "near_most_learned": [compare(grid, control, mean_gap) for control in CONTROLS],
            "less_learned": [
                compare(grid, control, partial(gap_at, LESS_LEARNING)) for control in CONTROLS
            ],
        },
    }
