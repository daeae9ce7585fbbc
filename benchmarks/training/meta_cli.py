"""``python -m benchmarks training meta``: starts at a learning rate that is wrong."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn
from rich.table import Table

from ..demo import report
from ..demo.cli import usable_cores
from ..jobs import Pool, Store
from ..kernels import machine
from ..kernels.machine import pick_device
from ..output import STYLE, write_json
from . import data, meta, meta_tasks
from .data import Images, Text

RESULTS = Path(__file__).resolve().parents[1] / "results"
SEEDS, SELECTION = 5, 2
#: As many as there are methods, or some would not be drawn.
COLOURS = (
    "#000000",
    "#999999",
    "#E69F00",
    "#56B4E9",
    "#D55E00",
    "#CC79A7",
    "#009E73",
    "#0072B2",
    "#F0E442",
    "#7F3C8D",
    "#8C510A",
    "#80B1D3",
    "#666600",
    "#B2182B",
)
QUICK_STEPS, QUICK_METHODS = 30, ("adamw", "deep_default")
#: Whose recorded multipliers are drawn. Prodigy's are rates.
MULTIPLIERS = {"deep_default": "#0072B2", "deep_lr": "#D55E00", "hypergradient": "#009E73"}


@dataclass(frozen=True)
class Call:
    """What was asked of the command, as far as results depend on it.

    Attributes:
        steps: None for the tasks' own.
        data: the name of the data set's file, without its folder; None for none.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int = SEEDS
    selection: int = SELECTION
    steps: int | None = None
    data: str | None = None
    quick: bool = False

    def _unusual_steps(self) -> bool:
        return self.steps is not None and any(
            self.steps != meta_tasks.TASKS[name].steps for name in self.tasks
        )

    def _some_methods(self) -> bool:
        return set(self.methods) != set(meta.METHODS)

    def file_name(self) -> str:
        """Without an ending: another one for all that is not as the published results are."""
        if self.quick:
            return "training-meta-quick"
        parts = [] if set(self.tasks) == set(meta_tasks.DEFAULTS) else list(self.tasks)
        if self._unusual_steps():
            parts.append(f"{self.steps}-steps")
        if self.seeds != SEEDS:
            parts.append(f"{self.seeds}-seeds")
        if self.selection != SELECTION:
            parts.append(f"{self.selection}-selection")
        if self._some_methods():
            parts.append("some-methods")
        return "-".join(["training-meta", *parts])

    def command(self) -> str:
        """With every option that is not at its default, --quick's among them."""
        parts = ["python -m benchmarks training meta", *(["--quick"] if self.quick else [])]
        if self.tasks != (("digits",) if self.quick else meta_tasks.DEFAULTS):
            parts += [f"--task {name}" for name in self.tasks]
        if self.data is not None:
            parts.append(f"--data {self.data}")
        if self.seeds != (1 if self.quick else SEEDS):
            parts.append(f"--seeds {self.seeds}")
        if self.selection != (1 if self.quick else SELECTION):
            parts.append(f"--selection {self.selection}")
        if self.steps != QUICK_STEPS if self.quick else self._unusual_steps():
            parts.append(f"--steps {self.steps}")
        if self.methods != QUICK_METHODS if self.quick else self._some_methods():
            parts += [f"--method {name}" for name in self.methods]
        return " ".join(parts)


@click.command(name="meta")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=click.Choice(list(meta_tasks.TASKS)),
    help="Default: digits and lm. The others want a GPU, and vit and resnet --data.",
)
@click.option(
    "--data",
    "data_path",
    type=click.Path(path_type=Path),
    help="CIFAR-100, for vit and resnet (see `training compare`).",
)
@click.option("--device", "device_name", default="auto", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=SEEDS, show_default=True)
@click.option(
    "--selection",
    type=click.IntRange(min=1),
    default=SELECTION,
    show_default=True,
    help="Further seeds, on which every method's numbers are chosen.",
)
@click.option("--steps", type=click.IntRange(min=5), help="Default: 500 (digits), else 1000.")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(meta.METHODS)))
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Runs side by side, one thread each, on one GPU or on the cores. Default: the cores.",
)
@click.option(
    "--together",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Runs that a process makes in turns, on a GPU each on a stream of its own; the time of a "
    "step is then that of all of them.",
)
@click.option(
    "--work",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where finished runs are kept, which later calls (with other --method, say) do not do "
    "again; default: nowhere.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for training-meta.json and .png (training-meta-TASKS.* for other tasks than the "
    "default ones, ...-N-steps.* with other --steps, likewise for --seeds, --selection and "
    "--method; training-meta-quick.* with --quick).",
)
@click.option("--quick", is_flag=True, help="One seed, 30 steps, digits, two methods: a look.")
def meta_command(
    tasks: tuple[str, ...],
    data_path: Path | None,
    device_name: str,
    seeds: int,
    selection: int,
    steps: int | None,
    methods: tuple[str, ...],
    workers: int | None,
    together: int,
    folder: Path | None,
    out: Path,
    quick: bool,
) -> None:
    """Learned update rules and their rivals, started at a learning rate that is wrong."""
    names = tuple(methods) or tuple(meta.METHODS)
    chosen = tuple(tasks) or meta_tasks.DEFAULTS
    if quick:
        seeds, selection, steps, workers, together = 1, 1, steps or QUICK_STEPS, 1, 1
        names = tuple(methods) or QUICK_METHODS
        chosen = tuple(tasks) or ("digits",)
    if "adamw" not in names:
        names = ("adamw", *names)  # what all are compared with
    contents = _contents(chosen, data_path)
    read = data_path if any(_is_of_images(name) for name in chosen) else None
    call = Call(chosen, names, seeds, selection, steps, read.name if read else None, quick)
    try:
        device = pick_device(device_name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from None
    console = Console() if Console().is_terminal else Console(width=130)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results = {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as scratch:
        store = Store((folder or Path(scratch)) / "runs.jsonl", meta.PROTOCOL)
        done_before = len(store)
        for name in chosen:
            task = meta_tasks.TASKS[name]
            setting, of = meta_tasks.Setting(), ""
            if task.kind:
                setting = meta_tasks.Setting(str(device), str(Path(scratch) / f"{name}.pt"))
                torch.save(contents[name], setting.saved)
                of = contents[name].name
            work = partial(meta.work_together if together > 1 else meta.work, setting=setting)
            at_once = together if together > 1 else None
            with (
                Progress(*columns, console=console) as progress,
                Pool(work, store, workers or usable_cores(), at_once) as pool,
            ):
                bar = progress.add_task(name, total=0)

                def execute(
                    jobs: list[meta.Job],
                    pool: Pool = pool,
                    progress: Progress = progress,
                    bar: TaskID = bar,
                ) -> None:
                    pending = {job for job in jobs if job not in store}
                    progress.update(bar, total=(progress.tasks[0].total or 0) + len(pending))
                    pool(jobs, lambda: progress.advance(bar))

                try:
                    results[name] = meta.measure(
                        name,
                        range(seeds),
                        range(1000, 1000 + selection),
                        steps or task.steps,
                        names,
                        task.lrs[:2] if quick else task.lrs,
                        store,
                        execute,
                        of,
                    )
                except RuntimeError as error:
                    kept = " What was done is kept." if folder else ""
                    raise click.ClickException(f"{error}.{kept}") from error
        done_now = len(store) - done_before
    name = call.file_name()
    document: dict[str, Any] = {
        "command": call.command(),
        # Of runs by this call and by those before it, which --work has kept.
        "device": sorted({on for found in results.values() for on in found["runs_on"]["device"]}),
        "config": {
            "seeds": seeds,
            "selection_seeds": selection,
            "methods": names,
            "steps": {k: steps or meta_tasks.TASKS[k].steps for k in chosen},
            "default_steps": {k: meta_tasks.TASKS[k].steps for k in chosen},
            "batch_size": {k: meta_tasks.TASKS[k].batch for k in chosen},
            "data": {k: found.name for k, found in contents.items()},
            "lrs": {k: meta_tasks.TASKS[k].lrs for k in chosen},
            "factors": meta.FACTORS,
        },
        "results": results,
        "runs": sum(found["runs"] for found in results.values()),
        # Of all of them, whichever call made them. Runs side by side, or in turns, add up to more
        # than the time that passes.
        "runs_seconds": sum(found["runs_seconds"] for found in results.values()),
        "runs_done_now": done_now,
        "this_call": {
            "machine": report.machine(),
            "device": machine.describe(device) if contents else "cpu",
            "workers": workers or usable_cores(),
            "together": together,
            "seconds": time.perf_counter() - started,
        },
    }
    if "lm" in chosen:
        document["config"]["text"] = meta_tasks.source().name
    write_json(document, out / f"{name}.json", digits=5)
    draw(results, out / f"{name}.png")
    for result in results.values():
        for measured in result["measures"]:
            console.print(table(result, measured))
    spent = document["runs_seconds"]
    console.print(f"{document['runs']} runs of {spent:.0f} s together, {done_now} of them now")
    console.print(f"{out / name}.json and .png written")


def _is_of_images(name: str) -> bool:
    return meta_tasks.TASKS[name].kind not in ("", "lm")


def _contents(chosen: Sequence[str], data_path: Path | None) -> dict[str, Text | Images]:
    """What the tasks for a GPU read.

    Raises:
        click.UsageError: images are wanted and not there.
    """
    found: dict[str, Text | Images] = {}
    for name in chosen:
        kind = meta_tasks.TASKS[name].kind
        if kind == "lm":
            found[name] = data.text(None)
        elif kind:
            if data_path is None:
                raise click.UsageError(f"--task {name} trains on CIFAR-100: give --data PATH")
            try:
                found[name] = data.images(data_path)
            except ValueError as error:
                raise click.BadParameter(str(error), param_hint="--data") from None
    return found


def table(result: dict[str, Any], measured: str) -> Table:
    """Losses at the end, as multiples of tuned AdamW's."""
    drawn = Table(
        title=f"{result['label']}: {measured} after {result['steps']} steps, and as a multiple of "
        f"AdamW's at its tuned rate of {result['lr']:g}; the rate was set to so many times that"
    )
    drawn.add_column("method")
    for factor in meta.FACTORS:
        drawn.add_column(f"x {factor:g}", justify="right")
    drawn.add_column("ms per step", justify="right")
    drawn.add_column("chosen")
    for row in result["rows"].values():
        cells = [
            f"{e[measured]:.4g} x/÷ {e[f'{measured}, factor']:.3g} "
            f"({e['of_tuned_adamw'][measured]:.4g})"
            for e in row["by_factor"].values()
        ]
        speed = f"{row['by_factor']['1']['ms_per_step']:.1f}"
        chosen = ", ".join(f"{k}={v}" for k, v in row["chosen"].items())
        drawn.add_row(row["label"], *cells, speed, chosen)
    return drawn


def draw(results: dict[str, Any], path: Path) -> None:
    """Losses by the rate that was set, and multipliers over time; a line of plots per task."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.6 * len(results)), layout="constrained")
        axes = figure.subplots(len(results), 2, squeeze=False)
        for (losses, rates), result in zip(axes, results.values()):
            measured = result["measures"][-1]
            for i, (row, colour) in enumerate(zip(result["rows"].values(), COLOURS)):
                # Beside each other, so that the bars can be told apart.
                aside = 1.04 ** (i - len(result["rows"]) / 2)
                places = [float(f) * aside for f in row["by_factor"]]
                found = [entry[measured] for entry in row["by_factor"].values()]
                factors = [entry[f"{measured}, factor"] for entry in row["by_factor"].values()]
                bars = [
                    [x - x / f for x, f in zip(found, factors)],
                    [x * f - x for x, f in zip(found, factors)],
                ]
                losses.errorbar(
                    places, found, bars, fmt="o-", markersize=4, color=colour, label=row["label"]
                )
            losses.set(xscale="log", yscale="log", xlabel="learning rate set / tuned one")
            losses.set_title(f"{result['label']}: {measured}")
            losses.set_ylabel("mean over seeds; bars: x/÷ the standard deviation")
            losses.legend(fontsize=7)
            styles = dict(zip(result["rows"]["adamw"]["by_factor"], (":", "-", "--")))
            shown = {key: of for key, of in MULTIPLIERS.items() if key in result["rows"]}
            for key, colour in shown.items():
                row = result["rows"][key]
                for factor, entry in row["by_factor"].items():
                    column = [sum(v) / len(v) for v in entry["multipliers"]]
                    at = [result["steps"] * k / len(column) for k in range(len(column))]
                    label = f"{row['label']}, set to x {factor}"
                    rates.plot(at, column, styles[factor], color=colour, label=label)
            rates.set(yscale="log", xlabel="step")
            rates.set_title("multipliers (first seed)")
            if shown:
                rates.legend(fontsize=7)
        figure.savefig(path, dpi=110)
