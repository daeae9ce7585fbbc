"""Learning curves and learning-rate sweeps of every method."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

from ..output import STYLE
from .methods import METHODS
from .sweep import Row

matplotlib.use("Agg")

import matplotlib.pyplot as plt

LINES = {"control": "--", "ours": "-", "ablation": ":"}


def draw(rows: list[Row], title: str, path: Path) -> None:
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        colours = plt.get_cmap("tab20")(range(20))
        for i, row in enumerate(rows):
            method = METHODS[row.method]
            style: dict[str, Any] = {
                "color": colours[i % 20],
                "linestyle": LINES[method.kind],
                "label": f"{method.label} ({row.lr:g})",
            }
            steps, curve = row.curve()
            shown = [(s, x) for s, x in zip(steps, curve) if math.isfinite(x) and s]
            left.plot(*zip(*shown), **style)
            finite = [(lr, loss) for lr, loss in row.sweep if math.isfinite(loss)]
            right.plot(*zip(*finite), marker="o", markersize=3, **style)
        finals = [c for row in rows if math.isfinite(c := row.curve()[1][-1])]
        if finals:
            span = max(finals) - min(finals)
            left.set_ylim(min(finals) - 0.3 * span - 0.01, max(finals) + 2.5 * span + 0.05)
        left.set_title(f"{title}: validation loss, mean over seeds")
        left.set_xlabel("step")
        right.set_title("final validation loss by learning rate, first seed")
        right.set_xlabel("learning rate")
        right.set_xscale("log")
        right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(path, dpi=110)
        plt.close(figure)
