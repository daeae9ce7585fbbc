"""``python -m benchmarks training one-step``: learning rate and momentum, learnt on the way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..demo import report
from ..output import write_json
from . import digits, one_step_figure

RESULTS = Path(__file__).resolve().parents[1] / "results"


@click.command(name="one-step")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--selection",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Further seeds, on which every method's numbers are chosen.",
)
@click.option("--steps", type=click.IntRange(min=5), default=500, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for training-one-step.json and .png (with --quick training-one-step-quick.*).",
)
@click.option("--quick", is_flag=True, help="One seed, 30 steps, two learning rates: a look.")
def one_step_command(seeds: int, selection: int, steps: int, out: Path, quick: bool) -> None:
    """The nested trainer beside fixed and scheduled learning rates and momenta, on digits."""
    grids: dict[str, Any] = {
        "lrs": digits.LRS,
        "meta_lrs": digits.META_LRS,
        "selection_lrs": digits.SELECTION_LRS,
    }
    if quick:
        seeds, selection, steps = 1, 1, 30
        grids = {"lrs": (0.01, 0.1), "meta_lrs": (1e-3, 1e-2), "selection_lrs": (0.01,)}
    try:
        digits.check_steps(steps)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--steps") from None
    console = Console() if Console().is_terminal else Console(width=120)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with Progress(console=console) as progress:
        task = progress.add_task("methods", total=digits.units())
        results = digits.measure(
            range(seeds),
            range(1000, 1000 + selection),
            steps,
            **grids,
            advance=lambda: progress.advance(task),
        )
    name = "training-one-step-quick" if quick else "training-one-step"
    document = {
        "command": "python -m benchmarks training one-step" + (" --quick" if quick else ""),
        "config": {
            "seeds": seeds,
            "selection_seeds": selection,
            "steps": steps,
            "batch_size": digits.BATCH_SIZE,
            "momenta": digits.MOMENTA,
            "start_momentum": digits.START_MOMENTUM,
            **grids,
        },
        "machine": report.machine(),
        "results": results,
        "seconds": time.perf_counter() - started,
    }
    write_json(document, out / f"{name}.json", digits=5)
    one_step_figure.draw(results, steps, out / f"{name}.png")
    for table in tables(results, steps):
        console.print(table)
    console.print(f"{out / name}.json and .png written")


def tables(results: dict[str, Any], steps: int) -> list[Table]:
    """By the learning rate that a run starts from, and with everything tuned."""
    fixed = {name: results[name][str(steps)]["momentum 0.9, by lr"] for name in ("fixed", "cosine")}
    by_lr = Table(
        title=f"loss on the training digits after {steps} steps, by the learning rate set"
    )
    by_lr.add_column("lr")
    rows = {name: values for name, values in fixed.items()}
    rows |= {row["label"]: row["by_lr"] for row in results["nested"].values()}
    for label in rows:
        by_lr.add_column(label, justify="right")
    for lr in fixed["fixed"]:
        cells = [f"{row[lr]['loss']:.2g} / {row[lr]['accuracy']:.0f} %" for row in rows.values()]
        by_lr.add_row(lr, *cells)
    tuned = Table(title="everything tuned")
    for column in ("method", "passes", "numbers", "loss", "x/÷", "test accuracy", "ms per step"):
        tuned.add_column(column, justify="left" if column == "method" else "right")
    for name in ("fixed", "cosine"):
        for budget, row in results[name].items():
            numbers = f"lr {row['lr']:g}, momentum {row['momentum']:g}"
            tuned.add_row(name, budget, numbers, *_cells(row["tuned"]))
    for row in results["nested"].values():
        start = f"{row['lr']:g}"
        numbers = f"from lr {start}, meta lr {row['meta_lr']:g}"
        tuned.add_row(row["label"], str(row["budget"]), numbers, *_cells(row["by_lr"][start]))
    return [by_lr, tuned]


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['loss']:.2g}",
        f"{row['loss_factor']:.2f}",
        f"{row['accuracy']:.1f} %",
        f"{row['ms_per_step']:.1f}",
    ]
