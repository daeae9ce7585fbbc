"""``python -m benchmarks rules ...``: one command per experiment."""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from ..demo import report
from ..output import write_json
from . import figure, toy

RESULTS = Path(__file__).resolve().parents[1] / "results"


@click.group()
def rules() -> None:
    """Update rules on problems small enough to see through. Each experiment has its own --help."""


@rules.command(name="toy")
@click.option("--configs", type=click.IntRange(min=2), default=4096, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for rules-toy.json and rules-toy.png (with --quick rules-toy-quick.*).",
)
@click.option("--quick", is_flag=True, help="256 configurations drawn once, 300 steps: a look.")
def toy_command(configs: int, steps: int, seeds: int, out: Path, quick: bool) -> None:
    """Momentum and Delta Momentum on the paper's curved valley (Eq. 53)."""
    if quick:
        configs, steps, seeds = 256, 300, 1
    console = Console() if Console().is_terminal else Console(width=120)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.set_num_threads(1)  # the tensors are small
    results = toy.measure(configs, steps, seeds, console)
    name = "rules-toy-quick" if quick else "rules-toy"
    document = {
        "config": {
            "configs": configs,
            "steps": steps,
            "seeds": seeds,
            "start": toy.START,
            "arrived_below": toy.ARRIVED,
            "ranges": toy.RANGES,
            "tries": toy.TRIES,
        },
        "machine": report.machine(),
        "results": results,
        "verdict": toy.verdict(results),
        "seconds": time.perf_counter() - started,
    }
    write_json(document, out / f"{name}.json")
    figure.draw_toy(results, steps, out / f"{name}.png")
    console.print(_table(results))
    console.print(toy.sentence(document["verdict"]))
    console.print(f"{out / name}.json and .png written")


def _table(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table(
        title=f"steps to arrive and stay: best configuration / expected best of {toy.TRIES} / "
        "share that arrives (medians over draws)"
    )
    table.add_column("k, a, w")
    for method in toy.METHODS.values():
        table.add_column(method.label, justify="right")
    for landscape, of_methods in results.items():
        cells = [
            f"{_steps(r['best'])} / {r['expected']:.0f} / {100 * r['share']:.0f} %"
            for r in of_methods.values()
        ]
        table.add_row(landscape, *cells)
    return table


def _steps(value: float) -> str:
    return "never" if value == float("inf") else f"{value:.0f}"
