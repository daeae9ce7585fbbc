"""``python -m benchmarks retention``."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..demo.cli import usable_cores
from ..jobs import Pool, Store
from ..kernels.machine import pick_device
from ..output import write_json
from . import data as datasets
from . import figure, report
from . import methods as known
from .data import Dataset
from .methods import Method
from .sweep import Settings, measure
from .training import PROTOCOL, Job, work, work_together

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / ".benchmarks" / "retention"
DEFAULTS = Settings()
QUICK: dict[str, Any] = {"seeds": 1, "selection_seeds": 1, "growth": 0, "points": 2}
QUICK_EPOCHS = 3
#: Runs that a process makes in turns on a GPU.
TOGETHER = 4


def run_retention(
    data: Dataset,
    methods: list[Method],
    settings: Settings,
    pool: Pool,
    device: str,
    out: Path,
    name: str,
    console: Console,
) -> dict[str, Any]:
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
        replay = f"replay {settings.replay}" if settings.replay else "no replay"
        task = progress.add_task(f"{data.name}, {replay} (runs)", total=0)
        total = 0

        def execute(jobs: Iterable[Job]) -> None:
            nonlocal total
            wanted = list(dict.fromkeys(jobs))
            total += sum(job not in pool.store for job in wanted)
            progress.update(task, total=total)
            pool(wanted, lambda: progress.advance(task))

        rows = measure(data, methods, settings, pool.store, execute)
    results = report.document(rows, data, settings, device)
    results["seconds"] = time.perf_counter() - started
    results["runs_done_now"] = total
    write_json(results, out / f"{name}.json", digits=6)
    figure.draw(results, out / f"{name}.png")
    report.show(console, results)
    console.print(f"{out / name}.json and .png written; {results['seconds']:.0f} s, {total} runs")
    return results


def file_name(data: Dataset, settings: Settings, quick: bool) -> str:
    parts = ["retention", data.name]
    if settings.replay:
        parts.append(f"replay{settings.replay}")
    if settings.epochs != data.epochs and not quick:
        parts.append(f"epochs{settings.epochs}")
    return "-".join([*parts, *["quick"] * quick])


def _classes(context: Any, parameter: Any, value: str | None) -> range | None:
    if value is None:
        return None
    if not (match := re.fullmatch(r"(\d+)-(\d+)", value)):
        raise click.BadParameter("write the first and the last class, such as 0-49")
    return range(int(match[1]), int(match[2]) + 1)


def _chosen(names: str | None, added: tuple[str, ...]) -> list[Method]:
    keys = names.split(",") if names else list(known.METHODS)
    try:
        found = [known.get(key.strip()) for key in [*keys, *added]]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return list({method.key: method for method in found}.values())


@click.command(
    epilog="Methods: " + ", ".join(known.METHODS) + ". A memory by its settings is written "
    "BASE:FREQUENCIES:WRITE:PULL, such as adamw_lrf:10/50:0.5:0.5, with :bfloat16 behind it if its "
    "copies are to be of that dtype."
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="CIFAR-100 (.npz, .tar of image sheets or a folder of these) or the folder of CLINC150. "
    "[default: scikit-learn's digits]",
)
@click.option("--classes", callback=_classes, help="Of CIFAR-100, such as 0-49.")
@click.option("--methods", "names", help="Names with commas between. [default: all]")
@click.option("--memory", multiple=True, help="A further memory by its settings. Repeatable.")
@click.option(
    "--replay",
    "replays",
    type=click.IntRange(min=0),
    multiple=True,
    default=(0,),
    show_default=True,
    help="Samples in the reservoir; 0 for none. Repeatable: one result each.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over a task. [default: by data]")
@click.option("--seeds", type=click.IntRange(min=1), help="That are reported. [default: 5]")
@click.option(
    "--selection-seeds",
    type=click.IntRange(min=1),
    help="Others, that learning rates are chosen with. [default: 3]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes side by side, on one GPU or on the cores. [default: one per core]",
)
@click.option(
    "--together",
    type=click.IntRange(min=1),
    help="Runs that a process makes in turns, on a GPU each on a stream of its own. "
    "[default: 1 on a CPU, 4 on a GPU]",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:1.")
@click.option(
    "--work",
    "work_in",
    type=click.Path(file_okay=False, path_type=Path),
    default=WORK,
    show_default=".benchmarks/retention of this checkout",
    help="Folder of finished runs, which are not done again.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for retention-*.json and .png (with --quick retention-*-quick.*).",
)
@click.option("--quick", is_flag=True, help="One seed, two learning rates, few passes: a look.")
def retention(
    data: Path | None,
    classes: range | None,
    names: str | None,
    memory: tuple[str, ...],
    replays: tuple[int, ...],
    epochs: int | None,
    seeds: int | None,
    selection_seeds: int | None,
    workers: int | None,
    together: int | None,
    device: str,
    work_in: Path,
    out: Path,
    quick: bool,
) -> None:
    """What optimizers keep of old tasks, when tasks come one after the other.

    One network with one head for all classes is trained on task after task. Every method gets the
    same batches and a learning rate of its own. Both readings (task-IL and class-IL) come from one
    run, and learning accuracy stands beside all forgetting. Stopped, it goes on where it was.
    """
    chosen = _chosen(names, memory)
    try:
        found, on = datasets.find(data, classes), pick_device(device)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    console = Console() if Console().is_terminal else Console(width=170)
    work_in.mkdir(parents=True, exist_ok=True)
    prepared = work_in / f"{found.name}.pt"
    found.save(prepared)
    given = {"seeds": seeds, "selection_seeds": selection_seeds}
    options = {**(QUICK if quick else {}), **{k: v for k, v in given.items() if v is not None}}
    store = Store(work_in / f"{found.name}.jsonl", PROTOCOL)
    passes = epochs or (min(found.epochs, QUICK_EPOCHS) if quick else found.epochs)
    at_once = together or (TOGETHER if on.type == "cuda" else 1)
    do = functools.partial(work_together if at_once > 1 else work, data=prepared, device=on)
    with Pool(do, store, workers or usable_cores(), at_once if at_once > 1 else None) as pool:
        for replay in replays:
            settings = Settings(replay=replay, epochs=passes, **options)
            name = file_name(found, settings, quick)
            try:
                run_retention(found, chosen, settings, pool, on.type, out, name, console)
            except RuntimeError as error:
                raise click.ClickException(f"{error}. What was done is kept.") from error
