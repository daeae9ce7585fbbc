"""``python -m benchmarks precision``: bfloat16 parameters, with and without Kahan sums.

An MLP on scikit-learn's digits, all in bfloat16, at learning rates whose updates are small beside
the spacing of bfloat16 numbers. Plain AdamW then stands still although its gradients are large; the
same with ``kahan_sum=True`` should do what float32 parameters do. Equal steps, batches and seeds.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from nested_optim import NestedOptimizer

from .demo import report
from .demo.stream import WIDTHS, make_stream
from .output import STYLE, write_json

RESULTS = Path(__file__).resolve().parent / "results"
LRS = (1e-5, 3e-5, 1e-4, 1e-3)
BATCH_SIZE = 64


class Method(NamedTuple):
    label: str
    dtype: torch.dtype
    options: dict[str, Any]
    colour: str


METHODS = {
    "float32": Method("float32", torch.float32, {}, "#000000"),
    "plain": Method("bfloat16", torch.bfloat16, {}, "#D55E00"),
    "moments": Method(
        "bfloat16, float32 moments", torch.bfloat16, {"state_dtype": "float32"}, "#E69F00"
    ),
    "kahan": Method("bfloat16, kahan_sum", torch.bfloat16, {"kahan_sum": True}, "#0072B2"),
    "both": Method(
        "bfloat16, kahan_sum, float32 moments",
        torch.bfloat16,
        {"kahan_sum": True, "state_dtype": "float32"},
        "#009E73",
    ),
}


def _parts(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    stream = make_stream(seed)
    train, test = (
        (torch.cat([s.inputs for s in part]), torch.cat([s.labels for s in part]))
        for part in (stream.train, stream.test)
    )
    return train, test


def run(method: Method, lr: float, seed: int, steps: int) -> dict[str, float]:
    """Train once. Losses are of the whole training set, in float32 arithmetic on the parameters."""
    (inputs, labels), test = _parts(seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).to(method.dtype)
    initial = [p.detach().clone() for p in model.parameters()]
    optimizer = NestedOptimizer(model.parameters(), lr=lr, **method.options)
    generator = torch.Generator().manual_seed(seed)
    loss_of = nn.functional.cross_entropy
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        loss_of(model(inputs[batch].to(method.dtype)), labels[batch]).backward()
        optimizer.step()
    moved = [(p.detach() != q).float().mean() for p, q in zip(model.parameters(), initial)]
    model.float()
    with torch.no_grad():
        accuracy = (model(test[0]).argmax(-1) == test[1]).float().mean()
        loss = loss_of(model(inputs), labels)
    return {
        "loss": float(loss),
        "accuracy": 100 * float(accuracy),
        "moved": 100 * float(torch.stack(moved).mean()),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": values,
    }


def measure(seeds: range, steps: int, console: Console) -> dict[str, Any]:
    """All runs: ``results[method][lr][figure]`` with mean, standard deviation and values."""
    jobs = [(key, lr) for key in METHODS for lr in LRS]
    results: dict[str, Any] = {key: {} for key in METHODS}
    for key, lr in track(jobs, description="runs", console=console):
        runs = [run(METHODS[key], lr, seed, steps) for seed in seeds]
        results[key][f"{lr:g}"] = {name: _spread([r[name] for r in runs]) for name in runs[0]}
    return results


def _table(results: dict[str, Any]) -> Table:
    table = Table(title="training loss / test accuracy in % / weights that ever moved in %")
    table.add_column("parameters")
    for lr in LRS:
        table.add_column(f"lr {lr:g}", justify="right")
    for key, method in METHODS.items():
        cells = []
        for lr in LRS:
            loss, accuracy, moved = (
                results[key][f"{lr:g}"][name] for name in ("loss", "accuracy", "moved")
            )
            cells.append(
                f"{loss['mean']:.3f} ±{loss['sd']:.3f}\n"
                f"{accuracy['mean']:.1f} ±{accuracy['sd']:.1f}\n{moved['mean']:.0f}"
            )
        table.add_row(method.label, *cells, end_section=True)
    return table


def _draw(results: dict[str, Any], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        for axes, name, title in zip(
            figure.subplots(1, 2),
            ("loss", "accuracy"),
            ("loss on the training set", "accuracy on the test set, %"),
        ):
            for key, method in METHODS.items():
                points = [results[key][f"{lr:g}"][name] for lr in LRS]
                axes.errorbar(
                    LRS,
                    [p["mean"] for p in points],
                    [p["sd"] for p in points],
                    label=method.label,
                    color=method.colour,
                    # What float32 does lies under what should equal it.
                    linewidth=6 if key == "float32" else 1.5,
                    alpha=0.25 if key == "float32" else 1.0,
                    linestyle=":" if key == "both" else "-",
                    marker="o",
                    markersize=4,
                    capsize=3,
                )
            axes.set_xscale("log")
            axes.set_xlabel("learning rate")
            axes.set_title(title)
        axes.legend(loc="lower right")
        figure.savefig(path, dpi=110)


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=500, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for precision.json and precision.png (with --quick precision-quick.*).",
)
@click.option("--quick", is_flag=True, help="One seed, 60 steps: a look only.")
def precision(seeds: int, steps: int, out: Path, quick: bool) -> None:
    """bfloat16 parameters: where plain AdamW stands still, and kahan_sum does not."""
    if quick:
        seeds, steps = 1, 60
    console = Console() if Console().is_terminal else Console(width=120)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.set_num_threads(1)  # the layers are small
    results = measure(range(seeds), steps, console)
    name = "precision-quick" if quick else "precision"
    document = {
        "config": {"seeds": seeds, "steps": steps, "batch_size": BATCH_SIZE, "lrs": LRS},
        "machine": report.machine(),
        "results": results,
        "seconds": time.perf_counter() - started,
    }
    write_json(document, out / f"{name}.json")
    _draw(results, out / f"{name}.png")
    console.print(_table(results))
    console.print(f"{out / name}.json and .png written")
