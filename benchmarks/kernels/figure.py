"""The picture: each model's times beside the limit that copying sets, then how they scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..output import STYLE
from .contestants import BASELINE, BY_KEY, MIX_LABEL
from .report import is_upper_bound, seconds
from .run import SCALED

OWN_COLOUR, BASE_COLOUR, PEER_COLOUR = "#0072B2", "#000000", "#999999"
LIMIT_COLOURS = {"every_step": "#D55E00", "mix": "#009E73"}
LIMIT_LABELS = {
    "every_step": "a copy of the bytes that AdamW at every step must move",
    "mix": f"the same for f = {MIX_LABEL}",
}
CURVE_COLOURS = dict(zip(SCALED, (OWN_COLOUR, BASE_COLOUR, PEER_COLOUR)))
# Bars longer than this many of the baseline's are cut, or the others could not be compared.
LONGEST_BAR = 4.0


def draw(results: dict[str, Any], path: Path) -> None:
    on_cuda = "gpu" in results["machine"]
    models = [m for m in results["models"].values() if _timed(m)]
    scaling = results.get("scaling", {})
    columns = max(len(models), 2)
    bandwidth = results["copy_bandwidth"]["bytes_per_second"]["median"]
    heights = ([9.0] if models else []) + ([4.8] if scaling else [])
    if not heights:
        return
    with matplotlib.rc_context(STYLE):
        # No pyplot: nothing global is left behind, and no display is needed.
        figure = Figure(figsize=(6.4 * columns, sum(heights) + 0.6), layout="constrained")
        parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
        if models:
            panels = next(parts)
            grid = panels.subplots(2, len(models), squeeze=False)
            for (above, below), model in zip(grid.T, models):
                _times(above, model, on_cuda)
                if on_cuda:
                    _host_times(below, model)
                else:
                    _ratios(below, model)
            panels.legend(
                handles=[
                    Line2D([], [], color=LIMIT_COLOURS[rule], linestyle="--", label=label)
                    for rule, label in LIMIT_LABELS.items()
                ],
                loc="outside lower center",
                ncols=len(LIMIT_LABELS),
            )
        if scaling:
            pair = next(parts).subplots(1, len(scaling), squeeze=False)[0]
            for axes, (name, points) in zip(pair, scaling.items()):
                _curve(axes, name, points, on_cuda, bandwidth)
        machine = results["machine"]
        name = machine["gpu"]["name"] if on_cuda else f"{machine['cpu']}, {machine['cores']} cores"
        figure.suptitle(
            f"One optimizer step, {results['settings']['dtype']}, {name}, "
            f"torch {results['versions']['torch']}",
            fontsize=13,
        )
        figure.savefig(path, dpi=100, metadata={"Software": None})


def _timed(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = model.get("results", {}).items()
    return {key: result for key, result in found if result["status"] == "timed"}


def _colour(key: str) -> str:
    if key == BASELINE:
        return BASE_COLOUR
    return OWN_COLOUR if BY_KEY[key].own else PEER_COLOUR


def _bars(axes: Axes, rows: list[tuple[str, dict[str, Any], str]], longest: float) -> None:
    """Horizontal bars with their deciles: (key, median and deciles, text)."""
    for place, (key, figure, text) in enumerate(rows):
        value = min(figure["median"], longest)
        axes.barh(place, value, color=_colour(key), height=0.62, alpha=0.75)
        low, high = figure["p10"], figure["p90"]
        if low is not None and figure["median"] <= longest:
            error = [[max(value - low, 0)], [max(min(high, longest) - value, 0)]]
            axes.errorbar(value, place, xerr=error, color="#555555", capsize=3, linewidth=1)
        beyond = "  → " if figure["median"] > longest else "  "
        edge = value if low is None else max(value, min(high, longest))
        axes.text(edge, place, beyond + text, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [BY_KEY[key].label for key, _, _ in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(min(f["p90"] or f["median"], longest) for _, f, _ in rows))
    axes.grid(axis="y", visible=False)


def _in_milliseconds(figure: dict[str, Any]) -> dict[str, Any]:
    keys = ("median", "p10", "p90")
    return {key: None if figure[key] is None else figure[key] * 1e3 for key in keys}


def _times(axes: Axes, model: dict[str, Any], on_cuda: bool) -> None:
    timed = _timed(model)
    rows = [
        (
            key,
            _in_milliseconds(result["time"]),
            ("≤ " if is_upper_bound(result) else "") + seconds(result["time"]["median"]),
        )
        for key, result in timed.items()
    ]
    base = timed.get(BASELINE)
    longest = LONGEST_BAR * base["time"]["median"] * 1e3 if base else float("inf")
    _bars(axes, rows, longest)
    for rule, limit in model["copy_limit_seconds"].items():
        axes.axvline(limit * 1e3, color=LIMIT_COLOURS[rule], linewidth=1.6, linestyle="--")
    axes.set_xlabel("ms on the device, the host ahead" if on_cuda else "ms within step()")
    axes.set_title(f"{model['summary']}: time")


def _host_times(axes: Axes, model: dict[str, Any]) -> None:
    timed = _timed(model)
    rows = [
        (
            key,
            _in_milliseconds(result["host_new_gradients"]),
            seconds(result["host_new_gradients"]["median"]),
        )
        for key, result in timed.items()
    ]
    base = timed.get(BASELINE)
    longest = LONGEST_BAR * base["host_new_gradients"]["median"] * 1e3 if base else float("inf")
    _bars(axes, rows, longest)
    axes.set_xlabel("ms of the host within step(), gradients at new addresses")
    axes.set_title("host time")


def _ratios(axes: Axes, model: dict[str, Any]) -> None:
    rows = [
        (key, result["ratio_to_baseline"], f"{result['ratio_to_baseline']['median']:.2f}")
        for key, result in _timed(model).items()
    ]
    _bars(axes, rows, LONGEST_BAR)
    axes.axvline(1, color=BASE_COLOUR, linewidth=1, linestyle=":")
    axes.set_xlabel(f"time relative to {BY_KEY[BASELINE].label}, within a round")
    axes.set_title("ratio")


def _curve(
    axes: Axes, name: str, points: list[dict[str, Any]], on_cuda: bool, bandwidth: float
) -> None:
    for key in SCALED:
        for clock, style in (("time", "-"), ("wall", ":")):
            found = [
                (point[name], point["results"][key][clock]["median"] * 1e3)
                for point in points
                if clock in point.get("results", {}).get(key, {})
            ]
            if found:
                label = BY_KEY[key].label if clock == "time" else None
                axes.plot(
                    *zip(*found), style, marker="o", ms=4, color=CURVE_COLOURS[key], label=label
                )
    moved = [
        (point[name], point["results"][BASELINE]["bytes_per_step"] / bandwidth * 1e3)
        for point in points
        if "bytes_per_step" in point.get("results", {}).get(BASELINE, {})
    ]
    if moved:
        axes.plot(*zip(*moved), "--", color=LIMIT_COLOURS["every_step"], label="copy of the bytes")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(name)
    axes.set_ylabel("ms per step")
    fixed = "tensors" if name == "parameters" else "parameters"
    held = f"{points[0][fixed]:,} {fixed}"
    clocks = " (solid: device, dotted: wall)" if on_cuda else ""
    axes.set_title(f"time against {name}, {held}{clocks}")
    if axes.lines:
        axes.legend(fontsize=9)
