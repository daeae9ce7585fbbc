"""``python -m benchmarks kernels``."""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..output import write_json
from . import figure, machine, report
from .contestants import ADAMW, MIX, PEERS, field
from .run import Settings, measure, own_failures
from .shapes import MODELS
from .timing import Sampling, threads
from .workload import DTYPES

RESULTS = Path(__file__).resolve().parent.parent / "results"
PEER_KEYS = tuple(c.key for c in PEERS)
NO_PEERS = "none"

SAMPLING = {
    # A period of the mix is as long as its longest window.
    "cuda": Sampling(seconds=0.5, fewest=10, most=60, periods=3),
    "cpu": Sampling(seconds=4.0, fewest=5, most=50, periods=1),
    "quick": Sampling(seconds=0.05, fewest=5, most=20, periods=1),
}
QUICK_PATIENCE = 20.0


def default_models(device: torch.device, quick: bool) -> tuple[str, ...]:
    # All optimizers live at once on a CPU, and a step takes a thousand times as long.
    return tuple(MODELS) if device.type == "cuda" or quick else ("resnet", "tiny")


def file_name(settings: Settings) -> str:
    parts = ["kernels", machine.slug(settings.device)]
    if settings.dtype != "float32":
        parts.append(settings.dtype)
    if settings.quick:
        parts.append("quick")
    return "-".join(parts)


def run_kernels(settings: Settings, out: Path, command: str, console: Console) -> dict[str, Any]:
    """Measure, print the tables, and write the JSON and the picture into ``out``."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    # Small tensors gain nothing from threads, and lose much where others use the cores.
    alone = 1 if settings.quick and not settings.on_cuda else None
    with (
        threads(alone),
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):

        def stage(description: str, total: int) -> Callable[[], None]:
            task = progress.add_task(description, total=total)
            if not console.is_terminal:  # which shows no bars before the end
                console.print(f"{time.perf_counter() - started:6.1f} s  {description}")
            return lambda: progress.advance(task)

        described = machine.describe(settings.device)
        measured = measure(settings, stage)
    results = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": described,
        "versions": machine.versions(field(settings.device, settings.peers)),
        "settings": {
            "dtype": settings.dtype,
            "quick": settings.quick,
            "hyperparameters": ADAMW,
            "mix_of_frequencies": MIX,
            "patience": settings.patience,
            "sampling": asdict(settings.sampling),
        },
        **measured,
        "seconds": time.perf_counter() - started,
    }
    name = file_name(settings)
    # Six digits are more than any clock here has.
    write_json(results, out / f"{name}.json", digits=6)
    figure.draw(results, out / f"{name}.png")
    report.print_results(console, results)
    console.print(f"\n{out / name}.json and .png written; {results['seconds']:.0f} s.")
    return results


def _device(context: click.Context, parameter: click.Parameter, value: str) -> torch.device:
    try:
        return machine.pick_device(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def _without_out(arguments: list[str]) -> list[str]:
    """A command line for others, who have other folders."""
    kept = []
    skip = False
    for argument in arguments:
        if not (skip or argument == "--out" or argument.startswith("--out=")):
            kept.append(argument)
        skip = argument == "--out"
    return kept


@click.command()
@click.option(
    "--device",
    default="auto",
    show_default=True,
    callback=_device,
    metavar="auto|cpu|cuda[:N]",
    help="Where to measure; auto takes CUDA if it is there.",
)
@click.option(
    "--shapes",
    "models",
    type=click.Choice(tuple(MODELS)),
    multiple=True,
    help="Whose tensors; may be repeated. "
    + "; ".join(f"{name}: {model.summary}" for name, model in MODELS.items())
    + ". [default: all, on a CPU resnet and tiny]",
)
@click.option(
    "--peers",
    type=click.Choice((*PEER_KEYS, NO_PEERS)),
    multiple=True,
    help="Beside whom; may be repeated. torch's fused AdamW is always there: ratios are to it. "
    "Those that are not installed are named. [default: all]",
)
@click.option(
    "--dtype",
    type=click.Choice(tuple(DTYPES)),
    default="float32",
    show_default=True,
    help="Of parameters and gradients; moments follow the optimizers' defaults.",
)
@click.option(
    "--scaling", is_flag=True, help="Also time against the numbers of parameters and of tensors."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="Time for one measurement of one optimizer. [default: "
    f"{SAMPLING['cuda'].seconds:g}, on a CPU {SAMPLING['cpu'].seconds:g}]",
)
@click.option(
    "--periods",
    type=click.IntRange(min=1),
    help=f"Periods of {max(MIX)} steps for the mix of frequencies, as far as the time allows. "
    f"[default: {SAMPLING['cuda'].periods}, on a CPU {SAMPLING['cpu'].periods}]",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds after which a peer that still compiles is left out. "
    f"[default: {Settings.patience:g}, with --quick {QUICK_PATIENCE:g}]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for kernels-NAME.json and .png, named after the GPU or CPU.",
)
@click.option("--quick", is_flag=True, help="Small models and few steps: a look only.")
@click.pass_context
def kernels(
    context: click.Context,
    device: torch.device,
    models: tuple[str, ...],
    peers: tuple[str, ...],
    dtype: str,
    scaling: bool,
    seconds: float | None,
    periods: int | None,
    patience: float | None,
    out: Path,
    quick: bool,
) -> None:
    """Time, memory and bandwidth of one optimizer step, beside other optimizers.

    NestedOptimizer on its paths, with all groups at frequency 1 and with frequencies 1, 10 and 100
    on a third of the bytes each, and its peers, on tensors of known models. Every optimizer is
    first checked against a float64 reference; one that is wrong is named and not timed. What is
    measured and how: docs/benchmarks.md.

    Exits with 1 if a path of NestedOptimizer is wrong or fails.
    """
    sampling = SAMPLING["quick" if quick else device.type]
    chosen = {"seconds": seconds, "periods": periods}
    sampling = Sampling(
        **{**asdict(sampling), **{k: v for k, v in chosen.items() if v is not None}}
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    settings = Settings(
        device=device,
        models=tuple(dict.fromkeys(models)) or default_models(device, quick),
        peers=tuple(k for k in PEER_KEYS if k in peers) if peers else PEER_KEYS,
        dtype=dtype,
        sampling=sampling,
        scaling=scaling,
        quick=quick,
        patience=patience or (QUICK_PATIENCE if quick else Settings.patience),
    )
    # Columns of figures need room that a pipe does not announce.
    console = Console() if Console().is_terminal else Console(width=180)
    command = shlex.join(["python", "-m", "benchmarks", "kernels", *_without_out(sys.argv[2:])])
    results = run_kernels(settings, out, command, console)
    failures = own_failures(results)
    for line in failures:
        console.print(f"[red]{line}[/red]")
    if failures:
        context.exit(1)
