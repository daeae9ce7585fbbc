"""``python -m benchmarks rules ...``: one command per experiment."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..demo import report
from ..kernels import machine
from ..output import write_json
from . import cost, figure, orthogonal, toy

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


@rules.command(name="orthogonal")
@click.option("--seeds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--selection",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Further seeds, on which each method's learning rate is chosen.",
)
@click.option("--steps", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--method", "methods", multiple=True, type=click.Choice(list(orthogonal.METHODS)))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for rules-orthogonal.json and .png (with --quick rules-orthogonal-quick.*).",
)
@click.option("--quick", is_flag=True, help="Two seeds, three learning rates, 40 steps: a look.")
def orthogonal_command(
    seeds: int, selection: int, steps: int, methods: tuple[str, ...], out: Path, quick: bool
) -> None:
    """Forgetting on a sequence of regressions whose inputs are orthogonal (Eq. 45)."""
    lrs: tuple[float, ...] = orthogonal.LRS
    if quick:
        seeds, selection, steps, lrs = 2, 1, 40, (0.03, 0.3, 3.0)
    console = Console() if Console().is_terminal else Console(width=130)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.set_num_threads(1)  # the matrices are small
    problem = orthogonal.Problem(steps=steps)
    chosen = methods or tuple(orthogonal.METHODS)
    with Progress(console=console) as progress:
        task = progress.add_task("runs", total=len(chosen) * (len(lrs) + 1))
        results = orthogonal.sweep(
            chosen,
            lrs,
            problem,
            range(1000, 1000 + selection),
            range(seeds),
            lambda: progress.advance(task),
        )
    name = "rules-orthogonal-quick" if quick else "rules-orthogonal"
    document = {
        "config": {
            **asdict(problem),
            "seeds": seeds,
            "selection_seeds": selection,
            "lrs": lrs,
            "outputs": orthogonal.OUTPUTS,
        },
        "machine": report.machine(),
        "results": results,
        "seconds": time.perf_counter() - started,
    }
    write_json(document, out / f"{name}.json")
    orthogonal.draw(results, problem, out / f"{name}.png")
    console.print(orthogonal.table(results, problem))
    console.print(f"{out / name}.json and .png written")


@rules.command(name="cost")
@click.option("--preset", type=click.Choice(list(cost.PRESETS)), default=None)
@click.option("--seconds", type=click.FloatRange(min=0.0), default=3.0, show_default=True)
@click.option("--device", default=None, help="cpu or cuda (default: cuda where there is one).")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for rules-cost-<device>-<preset>.json (with --quick rules-cost-quick.json).",
)
@click.option("--quick", is_flag=True, help="The tiny preset, three steps: a look.")
def cost_command(
    preset: str | None, seconds: float, device: str | None, out: Path, quick: bool
) -> None:
    """What DGD adds to a training step, DeltaMomentum and DeepMomentum to SGD's, learning to a
    step of NestedOptimizer."""
    console = Console() if Console().is_terminal else Console(width=120)
    out.mkdir(parents=True, exist_ok=True)
    try:
        chosen = machine.pick_device(device or "auto")
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from error
    kind = chosen.type
    preset = preset or ("gpt2" if kind == "cuda" else "small")
    period = cost.PERIOD
    if quick:
        preset, seconds, period = "tiny", 0.0, 5
    document = {
        **cost.measure(preset, str(chosen), seconds, period),
        "machine": machine.describe(chosen),
        "versions": machine.versions([]),
    }
    name = "rules-cost-quick" if quick else f"rules-cost-{kind}-{preset}"
    write_json(document, out / f"{name}.json")
    for table in cost.tables(document):
        console.print(table)
    console.print(f"{out / name}.json written")


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
