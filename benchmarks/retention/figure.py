"""The picture: accuracy matrices, curves around changes of tasks, learning beside final."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..output import STYLE
from .report import name_of

# Okabe and Ito: told apart with any colour vision.
LINES = ("#000000", "#0072B2", "#E69F00", "#D55E00")
KINDS = {"control": "#666666", "other": "#E69F00", "memory": "#D55E00", "ceiling": "#009E73"}
TITLES = {"task_il": "task-IL", "class_il": "class-IL"}


def draw(results: dict[str, Any], path: Path) -> None:
    config = results["config"]
    reading = "class_il" if config["replay"] else "task_il"
    drawn = [row for row in results["rows"] if "curve" in row]
    listed = [row for row in results["rows"] if row["headline"]]
    with matplotlib.rc_context({**STYLE, "image.cmap": "viridis"}):
        # No pyplot: nothing global is left behind, and no display is needed.
        figure = Figure(figsize=(17, 10), layout="constrained")
        cells = figure.add_gridspec(2, 6, height_ratios=(1, 1.5))
        shown = _matrices(figure, cells, drawn, reading)
        if shown is not None:
            figure.colorbar(shown, ax=figure.axes[: len(drawn)], label="accuracy (%)", shrink=0.85)
        if drawn:
            _curves(figure.add_subplot(cells[1, :4]), drawn, reading)
        _points(figure.add_subplot(cells[:, 4:]), listed, reading)
        replay = f"reservoir of {config['replay']}" if config["replay"] else "no replay"
        figure.suptitle(
            f"{config['stream']}: {config['tasks']} tasks of {config['classes_per_task']} classes, "
            f"{config['epochs']} pass{'es' * (config['epochs'] > 1)}, {replay}; {TITLES[reading]}, "
            f"{len(config['seeds'])} seed{'s' * (len(config['seeds']) > 1)}",
            fontsize=13,
        )
        figure.savefig(path, dpi=100, metadata={"Software": None})


def _matrices(figure: Figure, cells: Any, drawn: list[dict[str, Any]], reading: str) -> Any:
    shown = None
    for place, row in enumerate(drawn):
        axes = figure.add_subplot(cells[0, place])
        record = row["accuracy_matrix"][reading]
        values = np.array([[np.nan if v is None else v for v in line] for line in record])
        shown = axes.imshow(100 * values, vmin=0, vmax=100)
        axes.grid(visible=False)
        tasks = len(values)
        ticks = range(0, tasks, 1 if tasks <= 5 else 3)
        axes.set_xticks(ticks, [str(t + 1) for t in ticks])
        axes.set_yticks(ticks, [str(t + 1) for t in ticks])
        axes.set_xlabel("accuracy on task")
        if place == 0:
            axes.set_ylabel("after task")
        axes.set_title(textwrap.fill(name_of(row), 22), fontsize=9)
    return shown


def _curves(axes: Axes, drawn: list[dict[str, Any]], reading: str) -> None:
    for row, colour in zip(drawn, LINES):
        curve = row["curve"]
        earlier = np.array([np.nan if v is None else v for v in curve[reading]["earlier"]], float)
        current = np.array(curve[reading]["current"], float)
        steps = np.array(curve["steps"])
        ends = [*curve["changes"][1:], steps[-1] + 1]
        for begin, end in zip(curve["changes"], ends):  # a line does not cross a change
            here = (steps > begin) & (steps <= end)
            label = name_of(row) if begin == 0 else None
            axes.plot(steps[here], 100 * earlier[here], color=colour, linewidth=1.8)
            axes.plot(steps[here], 100 * current[here], color=colour, linewidth=0.8, ls=":",
                      label=label)  # fmt: skip
    for change in drawn[0]["curve"]["changes"][1:]:
        axes.axvline(change, color="#999999", linewidth=0.7)
    axes.set_xlabel("batch (lines: a new task begins)")
    axes.set_ylabel(f"{TITLES[reading]} accuracy (%)")
    axes.set_title("Solid: mean of the earlier tasks; dotted: the task being learnt")
    legend = axes.legend(loc="lower left", fontsize=8)
    for line in legend.get_lines():
        line.set(linestyle="-", linewidth=2)


def _points(axes: Axes, listed: list[dict[str, Any]], reading: str) -> None:
    order = sorted(listed, key=lambda row: row["figures"][reading]["final_accuracy"]["mean"])
    for place, row in enumerate(order):
        colour = KINDS[row["kind"]]
        figures = row["figures"][reading]
        kept = figures["final_accuracy"]
        learnt = figures.get("learning_accuracy")
        if learnt is not None:
            ends = (100 * kept["mean"], 100 * learnt["mean"])
            axes.plot(ends, (place, place), color=colour, linewidth=1, alpha=0.5)
            axes.plot(ends[1], place, "o", color=colour, markerfacecolor="white")
        error = None if kept["std"] is None else 100 * kept["std"]
        axes.errorbar(100 * kept["mean"], place, xerr=error, fmt="o", color=colour, capsize=2)
    axes.set_yticks(range(len(order)), [name_of(row) for row in order], fontsize=8)
    for label, row in zip(axes.get_yticklabels(), order):
        label.set_color(KINDS[row["kind"]])
    axes.set_xlabel(f"{TITLES[reading]} accuracy (%)")
    axes.set_title("Full: final ± standard deviation; open: right after\neach task (LA)")
