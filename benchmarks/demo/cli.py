"""``python -m benchmarks demo``."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..output import write_json
from . import figure, report
from .analysis import analyse
from .run import QUICK, Settings, check_identity, grid_size, run_grid
from .sentence import conclude
from .timing import time_optimizers, timing_turns

RESULTS = Path(__file__).resolve().parent.parent / "results"
QUICK_SEEDS = 2


def usable_cores() -> int:
    # Where the system can say so, those that this process may run on.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_demo(settings: Settings, out: Path, name: str, console: Console) -> dict[str, Any]:
    """Measure, print the tables, and write ``name.json`` and ``name.png`` into ``out``."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:

        def stage(description: str, total: int) -> Any:
            task = progress.add_task(description, total=total)
            return lambda: progress.advance(task)

        advance = stage("1. replaced in one line", 1)
        identity = check_identity(settings)
        advance()
        runs = run_grid(settings, stage("2. three levels (runs)", grid_size(settings)))
        # The processes of the grid are gone by now.
        advance = stage("3. time in the optimizer", timing_turns(settings))
        timing = time_optimizers(settings, advance)
    results = {
        "config": report.config(settings),
        "machine": report.machine(),
        "identity": identity,
        **analyse(runs, settings),
        "timing": timing,
    }
    results["sentence"] = conclude(results)
    results["runs"] = report.run_records(runs)
    figure.draw(results, out / f"{name}.png")
    results["seconds"] = time.perf_counter() - started
    write_json(results, out / f"{name}.json")

    report.print_identity(console, identity)
    report.print_levels(console, results)
    report.print_timing(console, timing)
    console.print()
    console.print(Panel(results["sentence"], title="What this shows", title_align="left"))
    console.print(
        f"{out / name}.png and .json written; {results['seconds']:.0f} s with "
        f"{settings.workers} process{'es' if settings.workers > 1 else ''}."
    )
    return results


@click.command()
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help=f"How many seeds: 0, 1, ... [default: {len(Settings.seeds)}, with --quick {QUICK_SEEDS}]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for digits.json and digits.png (with --quick digits-quick.*).",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes that share the runs. Results do not depend on it. [default: one per core]",
)
@click.option("--quick", is_flag=True, help="Shorter tasks and fewer learning rates: a look only.")
def demo(seeds: int | None, out: Path, workers: int | None, quick: bool) -> None:
    """AdamW replaced in one line, then three levels, on a stream of digits.

    A plain PyTorch loop trains a small MLP on scikit-learn's digits 0-4, then 5-9, without replay.
    It shows (1) that NestedOptimizer in AdamW's place gives the same losses to the last bit, (2)
    what three levels learn and forget beside AdamW, gradient accumulation and per-layer learning
    rates, and (3) the time each spends in the optimizer. A minute or two on two cores.
    """
    settings = replace(Settings(), workers=workers or usable_cores())
    if quick:
        settings = replace(settings, seeds=tuple(range(QUICK_SEEDS)), **QUICK)
    if seeds is not None:
        settings = replace(settings, seeds=tuple(range(seeds)))
    # Columns of figures need room that a pipe does not announce.
    console = Console() if Console().is_terminal else Console(width=100)
    run_demo(settings, out, "digits-quick" if quick else "digits", console)
