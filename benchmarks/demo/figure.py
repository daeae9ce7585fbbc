"""The picture: losses on top of each other, accuracies during the stream, retention, time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from ..output import STYLE
from . import methods
from .run import READINGS

NESTED_COLOUR = methods.BY_KEY["nested_levels"].colour
TIME_COLOURS = {
    "adamw": methods.BY_KEY["adamw"].colour,
    "adamw_foreach": "#888888",
    "nested": "#CC79A7",
    "nested_levels": NESTED_COLOUR,
}


def draw(results: dict[str, Any], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        # No pyplot: nothing global is left behind, and no display is needed.
        figure = Figure(figsize=(15, 9.2), layout="constrained")
        cells = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1))
        boundary = results["config"]["steps_per_task"]
        _losses(figure.add_subplot(cells[0, 0]), results["identity"], boundary)
        for column, reading in enumerate(READINGS, start=1):
            rows = results["by_lr_rule"]["learning"]["methods"]
            _accuracy(figure.add_subplot(cells[0, column]), rows, reading, boundary)
        _retention(figure.add_subplot(cells[1, :2]), results["lr_grid"])
        _time(figure.add_subplot(cells[1, 2]), results["timing"])
        seeds = len(results["config"]["seeds"])
        handles = [
            Line2D([], [], color=m.colour, linewidth=2.5, label=m.label) for m in methods.METHODS
        ]
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles),
            fontsize=10.5,
            title=f"f = {methods.LEVELS} steps per update, from the first layer to the last",
        )
        figure.suptitle(
            f"Digits 0-4, then 5-9, no replay (means over {seeds} seeds, bands and bars: "
            "standard deviation)",
            fontsize=13,
        )
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _mark_boundary(axes: Axes, boundary: int) -> None:
    axes.axvline(boundary, color="#999999", linewidth=1, linestyle=":")
    axes.set_xlabel("step (one batch each); dotted: digits 5-9 begin")


def _losses(axes: Axes, identity: dict[str, Any], boundary: int) -> None:
    steps = np.arange(1, identity["steps"] + 1)
    axes.plot(steps, identity["losses_adamw"], color="#000000", linewidth=3.5, label="AdamW")
    axes.plot(
        steps,
        identity["losses_nested"],
        color="#F0E442",
        linewidth=1.1,
        label="NestedOptimizer in its place (f = 1)",
    )
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(identity["losses_adamw"]) / 8)  # room for the legend
    axes.set_ylabel("training loss (cross-entropy, nats)")
    axes.set_title(
        "1. Replaced in one line: the same losses\n"
        f"    max |difference| = {identity['max_abs_loss_difference']} over "
        f"{identity['steps']} steps"
    )
    axes.legend(loc="lower left", fontsize=9)
    _mark_boundary(axes, boundary)


def _accuracy(axes: Axes, rows: dict[str, Any], reading: str, boundary: int) -> None:
    for key, row in rows.items():
        steps = np.array(row["curve"]["steps"])
        mean = np.array(row["curve"][reading]["mean"]) * 100
        spread = row["curve"][reading]["std"]
        colour = methods.BY_KEY[key].colour
        for task, linestyle in enumerate(("-", "--")):
            axes.plot(steps, mean[:, task], color=colour, linestyle=linestyle, linewidth=1.8)
            if spread is not None and task == 0:
                band = np.array(spread)[:, task] * 100
                low, high = mean[:, task] - band, mean[:, task] + band
                axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("test accuracy (%)")
    competing = "its own 5 logits" if reading == "known" else "all 10 logits"
    axes.set_title(
        f"2. Task {reading} ({competing}), each method at the\n"
        "    lr that learns best; solid: old digits, dashed: new"
    )
    _mark_boundary(axes, boundary)


def _stretch(learning: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spread out the crowded end: equal steps divide the error by equal factors."""
    result: NDArray[np.float64] = -np.log10(np.maximum(101.0 - np.asarray(learning), 1e-3))
    return result


def _unstretch(position: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = 101.0 - 10.0 ** -np.asarray(position)
    return result


def _retention(axes: Axes, grid: dict[str, Any]) -> None:
    for method in methods.METHODS:
        cells = grid[method.key]

        def column(name: str, part: str, cells: list[dict[str, Any]] = cells) -> Any:
            return np.array([(c["known"][name][part] or 0.0) * 100 for c in cells])

        learning, kept = column("learning_accuracy", "mean"), column("old_digits", "mean")
        top = int(learning.argmax()) + 1
        axes.plot(learning[:top], kept[:top], color=method.colour, linewidth=1.8)
        axes.plot(learning[top - 1 :], kept[top - 1 :], color=method.colour, lw=0.9, ls=":")
        axes.errorbar(
            learning,
            kept,
            yerr=column("old_digits", "std"),
            color=method.colour,
            fmt="o",
            markersize=5,
            elinewidth=0.7,
            alpha=0.9,
        )
    axes.set_xscale("function", functions=(_stretch, _unstretch))
    lowest = min(c["known"]["learning_accuracy"]["mean"] for cells in grid.values() for c in cells)
    left = max(0.0, lowest * 100 - 3)
    ticks = [tick for tick in (20, 40, 60, 80, 90, 95, 98, 99) if tick >= left]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(left, 99.4)
    axes.set_ylim(0, 103)
    axes.set_xlabel("learning accuracy: right after each task (%, task known; stretched scale)")
    axes.set_ylabel("old digits kept at the end (%)")
    axes.set_title(
        "2. Retention against learning: one point per lr of the same grid (higher at equal x = "
        "keeps more)\n    dotted: past the lr that learns best"
    )


def _time(axes: Axes, timing: dict[str, Any]) -> None:
    rows = [(key, timing[key]) for key in TIME_COLOURS]
    for place, (key, row) in enumerate(rows):
        ratio, (low, high) = row["ratio_to_adamw"], row["ratio_quartiles"]
        axes.barh(place, ratio, color=TIME_COLOURS[key], height=0.6)
        axes.errorbar(
            ratio, place, xerr=[[ratio - low], [high - ratio]], color="#444444", capsize=3
        )
        axes.text(0.04, place, f"{ratio:.2f}x", va="center", color="white", weight="bold")
    labels = [
        f"{row['label'].replace(', ', chr(10))}\n{row['microseconds_per_step']:.0f} µs"
        for _, row in rows
    ]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, max(row["ratio_quartiles"][1] for _, row in rows) + 0.1)
    axes.grid(axis="y", visible=False)
    axes.axvline(1, color="#999999", linewidth=1, linestyle=":")
    axes.set_xlabel("time in optimizer.step() relative to AdamW")
    axes.set_title("3. Time in the optimizer per step\n    median and quartiles, one thread")
