"""``python -m benchmarks training meta``: starts at a learning rate that is wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..demo import report
from ..output import STYLE, write_json
from . import digits, meta

RESULTS = Path(__file__).resolve().parents[1] / "results"
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#CC79A7", "#D55E00", "#009E73", "#0072B2")


@click.command(name="meta")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--selection",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Further seeds, on which every method's numbers are chosen.",
)
@click.option("--steps", type=click.IntRange(min=5), default=500, show_default=True)
@click.option("--method", "methods", multiple=True, type=click.Choice(list(meta.METHODS)))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for training-meta.json and .png (with --quick training-meta-quick.*).",
)
@click.option("--quick", is_flag=True, help="One seed, 30 steps, two methods: a look.")
def meta_command(
    seeds: int, selection: int, steps: int, methods: tuple[str, ...], out: Path, quick: bool
) -> None:
    """Learned update rules and their rivals, started at a learning rate that is wrong."""
    names = tuple(methods) or tuple(meta.METHODS)
    lrs = meta.LRS
    if quick:
        seeds, selection, steps, lrs = 1, 1, 30, (1e-3, 1e-2)
        names = tuple(methods) or ("adamw", "deep_default")
    if "adamw" not in names:
        names = ("adamw", *names)  # what all are compared with
    console = Console() if Console().is_terminal else Console(width=120)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with Progress(console=console) as progress:
        task = progress.add_task("methods", total=1 + len(names))
        results = meta.measure(
            range(seeds),
            range(1000, 1000 + selection),
            steps,
            names,
            lrs,
            advance=lambda: progress.advance(task),
        )
    name = "training-meta-quick" if quick else "training-meta"
    document = {
        "command": "python -m benchmarks training meta" + (" --quick" if quick else ""),
        "config": {
            "seeds": seeds,
            "selection_seeds": selection,
            "steps": steps,
            "batch_size": digits.BATCH_SIZE,
            "lrs": lrs,
            "factors": meta.FACTORS,
        },
        "machine": report.machine(),
        "results": results,
        "seconds": time.perf_counter() - started,
    }
    write_json(document, out / f"{name}.json", digits=5)
    draw(results, steps, out / f"{name}.png")
    console.print(table(results, steps))
    console.print(f"{out / name}.json and .png written")


def table(results: dict[str, Any], steps: int) -> Table:
    """Final training losses, as multiples of tuned AdamW's."""
    drawn = Table(
        title=f"training loss after {steps} steps, and as a multiple of AdamW's at its tuned "
        f"learning rate of {results['lr']:g}; the rate was set to so many times that"
    )
    drawn.add_column("method")
    for factor in meta.FACTORS:
        drawn.add_column(f"x {factor:g}", justify="right")
    drawn.add_column("ms per step", justify="right")
    drawn.add_column("chosen")
    for row in results["rows"].values():
        cells = [
            f"{e['loss']:.2g} x/÷ {e['loss_factor']:.2f} ({e['of_tuned_adamw']:.3g})"
            for e in row["by_factor"].values()
        ]
        speed = f"{row['by_factor']['1']['ms_per_step']:.1f}"
        chosen = ", ".join(f"{k}={v}" for k, v in row["chosen"].items())
        drawn.add_row(row["label"], *cells, speed, chosen)
    return drawn


def draw(results: dict[str, Any], steps: int, path: Path) -> None:
    """Losses by the rate that was set, and multipliers over time."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.4), layout="constrained")
        losses, rates = figure.subplots(1, 2)
        for (_, row), colour in zip(results["rows"].items(), COLOURS):
            places = [float(f) for f in row["by_factor"]]
            found = [entry["loss"] for entry in row["by_factor"].values()]
            losses.plot(places, found, "o-", color=colour, label=row["label"])
        losses.set(xscale="log", yscale="log", xlabel="learning rate set / tuned one")
        losses.set_title(f"training loss after {steps} steps (geometric mean of the seeds)")
        losses.legend(fontsize=8)
        learned = next(
            (results["rows"][k] for k in ("deep", "deep_default") if k in results["rows"]), None
        )
        styles = dict(zip(results["rows"]["adamw"]["by_factor"], (":", "-", "--")))
        for factor, entry in (learned or {"by_factor": {}})["by_factor"].items():
            columns = list(zip(*entry["multipliers"]))
            for i, (column, colour) in enumerate(zip(columns, COLOURS[2:])):
                at = [steps * k / len(column) for k in range(len(column))]
                label = f"layer {i}, set to x {factor}"
                rates.plot(at, column, styles[factor], color=colour, label=label)
        rates.set(yscale="log", xlabel="step")
        rates.set_title("DeepNestedOptimizer's multipliers (first seed)")
        if learned:
            rates.legend(fontsize=7)
        figure.savefig(path, dpi=110)
