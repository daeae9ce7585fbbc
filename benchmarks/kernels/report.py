"""What people read: the tables in the terminal and the JSON of every number."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .contestants import BASELINE, BY_KEY
from .run import SCALED

HIGHEST_SHARE_AHEAD = 0.9  # a device time whose host was ahead less often is an upper bound


def seconds(value: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(value: float) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def is_upper_bound(result: dict[str, Any]) -> bool:
    return bool(result.get("host_was_ahead", 1.0) < HIGHEST_SHARE_AHEAD)


def _median(result: dict[str, Any], key: str) -> str:
    return seconds(result[key]["median"]) if key in result else "-"


def _deciles(figure: dict[str, Any], scale: Any) -> str:
    return "" if figure["p10"] is None else f"{scale(figure['p10'])}-{scale(figure['p90'])}"


def print_results(console: Console, results: dict[str, Any]) -> None:
    on_cuda = "gpu" in results["machine"]
    for model in results["models"].values():
        _print_model(console, model, results["missing"], on_cuda)
    copy = results["copy_bandwidth"]
    console.print(
        f"Copy bandwidth: {copy['bytes_per_second']['median'] / 1e9:,.0f} GB/s, read plus written. "
        "Share: of it, by the fewest bytes that the optimizer's rule and state allow a step. "
        + (_CUDA_NOTE if on_cuda else _CPU_NOTE)
    )
    for key, reason in results["missing"].items():
        console.print(f"{BY_KEY[key].label}: {reason}", highlight=False)
    for contestant in (BY_KEY[key] for key in _present(results)):
        if contestant.note:
            console.print(f"{contestant.label}: {contestant.note}.")
    if "scaling" in results:
        _print_scaling(console, results["scaling"])


_CUDA_NOTE = (
    "Time: of the device, with the host ahead (<= where it could not be). From idle: from the call "
    "to the last kernel's end, the device idle before. Wall: steps in a row. "
    "Host: within step() on an idle device, the gradients at new addresses, and at the same. "
    "Ranges: 10th to 90th percentile."
)
_CPU_NOTE = (
    "Time: within step(), the optimizers taking turns; ratios are formed within a round. Ranges: "
    "10th to 90th percentile. A copy on a CPU may read what it overwrites, and its caches help "
    "small models: a share can exceed 100%. Memory that a step takes was not measured."
)


def _present(results: dict[str, Any]) -> list[str]:
    found: dict[str, None] = {}
    for model in results["models"].values():
        for key, result in model.get("results", {}).items():
            if result["status"] == "timed":
                found[key] = None
    return list(found)


def _print_model(
    console: Console, model: dict[str, Any], missing: dict[str, str], on_cuda: bool
) -> None:
    title = f"{model['summary']}: {model['parameters']:,} parameters, {model['tensors']:,} tensors"
    console.print()
    if "skipped" in model:
        console.print(f"[bold]{title}[/bold]\nskipped: {model['skipped']}")
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("optimizer")
    headings = ["time", "10-90 %", "ratio", "share"]
    headings += (
        ["from idle", "ratio", "wall", "host", "host, same"] if on_cuda else ["10-90 % of ratio"]
    )
    headings += ["state", *(["extra"] if on_cuda else []), "error"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    left_out = []
    for key, result in model["results"].items():
        label = BY_KEY[key].label
        if result["status"] != "timed":
            if key not in missing:  # named once for all models
                left_out.append(f"{label}: {result['status']}")
            continue
        checked = result["check"]
        bound = "<= " if is_upper_bound(result) else ""
        cells = [
            bound + _median(result, "time"),
            _deciles(result["time"], seconds),
            f"{result['ratio_to_baseline']['median']:.2f}",
            f"{result['share_of_copy_bandwidth']:.0%}" if BY_KEY[key].is_adamw else "-",
        ]
        if on_cuda:
            idle = result["from_idle"]["median"] / model["results"][BASELINE]["from_idle"]["median"]
            cells += [_median(result, "from_idle"), f"{idle:.2f}"]
            cells += [
                _median(result, key)
                for key in ("wall", "host_new_gradients", "host_same_gradients")
            ]
        else:
            cells.append(_deciles(result["ratio_to_baseline"], lambda ratio: f"{ratio:.2f}"))
        cells.append(size(result["state_bytes"]))
        if on_cuda:
            cells.append(size(result["peak_extra_bytes"]))
        cells.append("-" if checked is None else f"{checked['error']:.0e}")
        table.add_row(label, *cells)
    console.print(table)
    for line in left_out:
        console.print(f"  {line}", highlight=False)
    again = model["results"][BASELINE].get("time_again")
    if again is not None:
        drift = again["median"] / model["results"][BASELINE]["time"]["median"] - 1
        console.print(f"  {BY_KEY[BASELINE].label}, timed again at the end: {drift:+.1%}")
    limits = model["copy_limit_seconds"]
    names = {"every_step": "AdamW at every step", "mix": "the mix of frequencies"}
    console.print(
        "  A copy of as many bytes takes "
        + ", ".join(f"{seconds(limits[rule])} for {names[rule]}" for rule in limits)
    )


def _print_scaling(console: Console, scaling: dict[str, Any]) -> None:
    for name, points in scaling.items():
        table = Table(title=f"Time against {name}", title_justify="left", title_style="bold")
        table.add_column("parameters", justify="right")
        table.add_column("tensors", justify="right")
        for key in SCALED:
            table.add_column(BY_KEY[key].label, justify="right")
        for point in points:
            row = [f"{point['parameters']:,}", f"{point['tensors']:,}"]
            if "skipped" in point:
                row.append(point["skipped"])
            else:
                row += [_point(point["results"][key]) for key in SCALED]
            table.add_row(*row)
        console.print()
        console.print(table)


def _point(result: dict[str, Any]) -> str:
    if result["status"] != "timed":
        return str(result["status"])
    bound = "<= " if is_upper_bound(result) else ""
    host = f", wall {_median(result, 'wall')}" if "wall" in result else ""
    return f"{bound}{_median(result, 'time')}{host}"
