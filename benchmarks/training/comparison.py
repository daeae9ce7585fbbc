"""``python -m benchmarks training compare``: equal budgets, learning rates and seeds for all."""

from __future__ import annotations

import functools
import hashlib
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from ..jobs import Pool, Store
from ..kernels.machine import describe, pick_device
from ..output import write_json
from . import data as datasets
from . import figure
from .methods import METHODS
from .run import PROTOCOL, SIZES, Job, time_steps, work
from .sweep import GRID, Plan, differences, measure, summary

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: Pairs whose difference decides something, by test loss.
PAIRS = (
    ("m3", "muon"),
    ("m3", "muon_flat"),
    ("m3", "adamw"),
    ("adamw_95", "adamw"),
    ("m3_slow", "m3"),
    ("m3_slow", "m3_stale"),
    ("nested", "nested_lr"),
    ("ademamix", "adamw"),
)


def load_data(task: str, text: Path | None, images: Path | None) -> datasets.Text | datasets.Images:
    """What the task trains on.

    Raises:
        ValueError: a task of images without images, or nothing at a path.
    """
    if task == "lm":
        return datasets.text(text)
    if images is None:
        raise ValueError(f"the task {task} trains on CIFAR-100: give --data")
    return datasets.images(images)


@click.command(name="compare")
@click.option("--task", type=click.Choice(list(SIZES)), default="lm", show_default=True)
@click.option(
    "--size",
    type=click.Choice(["full", "small", "tiny", "test"]),
    default="full",
    show_default=True,
    help="full wants a GPU (11M parameters for lm), small trains the same models on a smaller "
    "budget, tiny is for a CPU, test is for looking.",
)
@click.option("--text", type=click.Path(path_type=Path), help="Default: Python's own source.")
@click.option("--data", "images", type=click.Path(path_type=Path), help="CIFAR-100: .npz or .tar.")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)))
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--lr", "lrs", multiple=True, type=float, help=f"Default: {GRID}.")
@click.option("--no-refine", is_flag=True, help="Leave out the half-way learning rates.")
@click.option("--device", "device_name", default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--work",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where finished runs are kept, to go on from. Default: a temporary folder.",
)
@click.option("--timing/--no-timing", default=True, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
)
def compare(
    task: str,
    size: str,
    text: Path | None,
    images: Path | None,
    methods: tuple[str, ...],
    seeds: int,
    lrs: tuple[float, ...],
    no_refine: bool,
    device_name: str,
    workers: int,
    folder: Path | None,
    timing: bool,
    out: Path,
) -> None:
    """Train a small model with every optimizer: same batches, schedule, decay, grid and seeds.

    tasks: a byte-level GPT (lm) on Python's own source or --text, a ViT and a ResNet (vit, resnet)
    on CIFAR-100.
    """
    try:
        device = pick_device(device_name)
        data = load_data(task, text, images)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    console = Console() if Console().is_terminal else Console(width=130)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    chosen = tuple(methods) or tuple(METHODS)
    grid = tuple(sorted(lrs)) or GRID
    plan = Plan(task, size, data.name, chosen, seeds, grid=grid, refine=not no_refine)
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(data.name.encode()).hexdigest()[:12]
        prepared = place / f"{task}-{digest}.pt"
        if not prepared.exists():
            part = prepared.with_suffix(".part")
            torch.save(data, part)
            part.replace(prepared)  # a command that is stopped here leaves no half of a file
        store = Store(place / "runs.jsonl", PROTOCOL)
        worker = functools.partial(work, path=str(prepared), device=str(device))
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress, Pool(worker, store, workers) as pool:
            bar = progress.add_task("runs", total=0)

            def execute(jobs: Any) -> None:
                pending = {job for job in jobs if job not in store}
                total = (progress.tasks[0].total or 0) + len(pending)
                progress.update(bar, total=total)
                pool(pending_in_order(jobs, pending), lambda: progress.advance(bar))

            rows = measure(plan, store, execute)
    clocks = {}
    if timing:
        for row in rows:
            job = plan.job(row.method, row.lr, 0)
            clocks[row.method] = time_steps(job, data, device)
    table = summary(rows)
    name = f"training-{task}" + ("" if size == "full" else f"-{size}")
    document = {
        "command": f"python -m benchmarks training compare --task {task} --size {size}",
        "config": {**asdict(plan), "model": asdict(SIZES[task][size]), "workers": workers},
        "machine": describe(device),
        "table": table,
        "differences": {f"{a} - {b}": differences(rows, a, b) for a, b in PAIRS},
        "time": clocks,
        "curves": {row.method: dict(zip(("steps", "validation"), row.curve())) for row in rows},
        "runs": {row.method: row.runs for row in rows},
        "seconds": time.perf_counter() - started,
    }
    write_json(document, out / f"{name}.json")
    figure.draw(rows, f"{task}, {size}", out / f"{name}.png")
    console.print(render(table, clocks))
    for pair, difference in document["differences"].items():
        if difference is not None:
            console.print(
                f"test loss, {pair}: {difference['mean']:+.4f} "
                f"± {difference['standard_error']:.4f} (standard error, paired seeds)"
            )
    console.print(f"{out / name}.json and .png written")


def pending_in_order(jobs: Any, pending: set[Job]) -> list[Job]:
    return [job for job in dict.fromkeys(jobs) if job in pending]


def render(table: list[dict[str, Any]], clocks: dict[str, Any]) -> Table:
    shown = Table(title="chosen on validation, reported on test; ± standard deviation over seeds")
    columns = ("optimizer", "lr", "test loss", "accuracy", "share of AdamW's steps", "step, ms")
    for i, title in enumerate(columns):
        shown.add_column(title, justify="right" if i else "left")
    for entry in sorted(table, key=lambda e: e["test_loss"]):
        spread = entry["spread"]
        loss = f"{entry['test_loss']:.4f}" + ("" if spread is None else f" ±{spread:.4f}")
        accuracy = entry.get("test_accuracy")
        share = entry["share_of_steps"]
        clock = clocks.get(entry["method"])
        shown.add_row(
            METHODS[entry["method"]].label,
            f"{entry['lr']:g}" + (" (edge)" if entry["at_edge"] else ""),
            loss if math.isfinite(entry["test_loss"]) else "diverged",
            "" if accuracy is None else f"{100 * accuracy:.1f} %",
            "never" if share is None else f"{share:.2f}",
            "" if clock is None else f"{clock['step_ms']:.2f}",
        )
    return shown
