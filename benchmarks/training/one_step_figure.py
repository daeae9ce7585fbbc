"""What the nested trainer reaches from each learning rate, and what it chose on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ..output import STYLE

COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7")


def draw(results: dict[str, Any], steps: int, path: Path) -> None:
    """Write a PNG: losses by starting learning rate, and learning rates over time."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.4), layout="constrained")
        losses, rates = figure.subplots(1, 2)
        for name, style in (("fixed", "-"), ("cosine", "--")):
            row = results[name][str(steps)]["momentum 0.9, by lr"]
            _losses(losses, row, name, color="black", linestyle=style)
        for (_, row), colour in zip(results["nested"].items(), COLOURS):
            _losses(losses, row["by_lr"], row["label"], color=colour)
            for i, of_lr in enumerate(row["by_lr"].values()):
                readings = [lr for lr, _ in of_lr["lr_and_momentum"][0]]
                places = [steps * k / len(readings) for k in range(len(readings))]
                label = row["label"] if i == 0 else None
                rates.plot(places, readings, color=colour, alpha=0.7, linewidth=1, label=label)
        losses.set(xscale="log", yscale="log", xlabel="learning rate set at the start")
        losses.set_title(f"training loss after {steps} steps (geometric mean, all seeds)")
        rates.set(yscale="log", xlabel="step")
        rates.set_title("learning rates chosen, from each start (first seed)")
        losses.legend(fontsize=8)
        figure.savefig(path, dpi=110)


def _losses(axes: Any, row: dict[str, Any], label: str, **style: Any) -> None:
    lrs = [float(lr) for lr in row]
    axes.plot(lrs, [r["loss"] for r in row.values()], label=label, marker="o", **style)
    axes.fill_between(
        lrs,
        [min(r["losses"]) for r in row.values()],
        [max(r["losses"]) for r in row.values()],
        color=style["color"],
        alpha=0.12,
        linewidth=0,
    )
