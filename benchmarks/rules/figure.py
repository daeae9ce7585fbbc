"""The pictures of the experiments on rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from ..output import STYLE
from . import toy

#: The landscape whose paths are drawn.
SHOWN = (10.0, 1.0, 1.0)


def draw_toy(results: dict[str, dict[str, dict[str, Any]]], steps: int, path: Path) -> None:
    """Paths and losses on one landscape; tuned steps and shares on all."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 8.2), layout="constrained")
        (paths, losses), (expected, shares) = figure.subplots(2, 2)
        _draw_runs(results, steps, paths, losses)
        _draw_landscapes(results, "expected", 1, expected)
        expected.set_yscale("log")
        expected.set_title(f"steps to arrive, best of {toy.TRIES} random configurations (expected)")
        _draw_landscapes(results, "share", 100, shares)
        shares.set_title("configurations that arrive, %")
        expected.legend(loc="lower right", fontsize=8)
        figure.savefig(path, dpi=110)


def _draw_runs(results: Any, steps: int, paths: Any, losses: Any) -> None:
    r, t = torch.meshgrid(
        torch.linspace(-4.2, 2.2, 200), torch.linspace(-7.5, 4.5, 200), indexing="ij"
    )
    height = toy.psi(torch.stack([r, t], -1), SHOWN).log10()
    paths.contourf(r.numpy(), t.numpy(), height.numpy(), levels=24, cmap="Greys", alpha=0.6)
    shown = results[", ".join(f"{x:g}" for x in SHOWN)]
    for key, method in toy.METHODS.items():
        if shown[key]["best"] == float("inf"):
            continue
        points, values = toy.run_optimizer(shown[key]["best_options"], SHOWN, steps)
        paths.plot(*points.T.numpy(), ".-", color=method.colour, markersize=4, linewidth=1)
        label = f"{method.label}: {shown[key]['best_by_optimizer']:.0f}"
        losses.plot(values.clamp(min=1e-12).numpy(), color=method.colour, label=label)
    paths.plot(*toy.START, "k*", markersize=10)
    paths.plot(0, 0, "kx")
    paths.set(xlim=(-4.2, 2.2), ylim=(-7.5, 4.5), xlabel="r", ylabel="t")
    k, a, w = (f"{x:g}" for x in SHOWN)
    paths.set_title(f"best configurations' paths, k = {k}, a = {a}, w = {w}")
    losses.axhline(toy.ARRIVED, color="black", linewidth=0.8, linestyle=":")
    losses.set(yscale="log", xlabel="step", xlim=(0, 120), ylim=(1e-10, 1e3))
    losses.set_title("psi on these paths, and steps to arrive")
    losses.legend(fontsize=8)


def _draw_landscapes(results: Any, name: str, factor: float, axes: Any) -> None:
    for key, method in toy.METHODS.items():
        axes.plot(
            [factor * of_methods[key][name] for of_methods in results.values()],
            "o",
            color=method.colour,
            label=method.label,
            alpha=0.85,
        )
    axes.set_xticks(range(len(results)), list(results), rotation=60, fontsize=8)
    axes.set_xlabel("k, a, w")
