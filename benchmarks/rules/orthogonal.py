"""Linear regressions on orthogonal inputs, one after the other (after the paper's Eq. 45).

Task k's inputs lie in a subspace of their own, orthogonal to all others, so that one weight matrix
can solve all tasks, and the gradient of a task says nothing about the others. Plain descent then
forgets nothing. What an optimizer forgets here, it forgets by itself: by momentum that it carries
over a change of tasks, by mixing directions that gradients keep apart, by decay.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from nested_optim import DGD, M3, DeltaMomentum, NestedOptimizer

from ..output import STYLE

OUTPUTS = 16
#: Half a decade apart, for methods whose steps scale with gradients and those whose do not, and
#: on to where DGD's step is the longest that it takes at any rate.
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
SMALLEST = 1e-6  # that a logarithmic axis shows
COLUMNS = ("learnt", "final", "forgetting")


@dataclass(frozen=True)
class Problem:
    """The stream: ``tasks`` subspaces of ``width`` dimensions, visited once each."""

    tasks: int = 8
    width: int = 8
    steps: int = 100
    batch: int = 16
    noise: float = 0.1


@dataclass(frozen=True)
class Method:
    label: str
    build: Callable[[nn.Linear, float], Optimizer]
    colour: str


METHODS = {
    "sgd": Method("SGD", lambda m, lr: SGD(m.parameters(), lr), "#000000"),
    "momentum": Method(
        "SGD, momentum 0.9", lambda m, lr: SGD(m.parameters(), lr, momentum=0.9), "#D55E00"
    ),
    "delta": Method(
        "DeltaMomentum 0.9", lambda m, lr: DeltaMomentum(m.parameters(), lr), "#E69F00"
    ),
    "adamw": Method("AdamW", lambda m, lr: AdamW(m.parameters(), lr, weight_decay=0.0), "#CC79A7"),
    "accumulation": Method(
        "AdamW, gradient accumulation 4",
        lambda m, lr: NestedOptimizer(m.parameters(), lr, weight_decay=0.0, frequency=4),
        "#999999",
    ),
    "nested": Method(
        "NestedOptimizer, levels 1 / 4",
        # Half of the outputs at each level: one matrix has no other parts.
        lambda m, lr: NestedOptimizer(_halves(m), lr, weight_decay=0.0),
        "#56B4E9",
    ),
    "muon": Method(
        "M3 without slow momentum (Muon)",
        lambda m, lr: M3(m.parameters(), lr, weight_decay=0.0, alpha=0.0),
        "#009E73",
    ),
    "m3": Method(
        "M3, alpha = 0.25",
        lambda m, lr: M3(m.parameters(), lr, weight_decay=0.0, alpha=0.25),
        "#117733",
    ),
    "dgd": Method("DGD, decay 1", lambda m, lr: DGD(m, lr, decay=1.0), "#0072B2"),
    "dgd-weak": Method("DGD, decay 0.01", lambda m, lr: DGD(m, lr, decay=0.01), "#332288"),
}


class _TwoHalves(nn.Module):
    """A linear map whose outputs are in two matrices."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, OUTPUTS // 2, bias=False)
        self.second = nn.Linear(inputs, OUTPUTS // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], dim=-1)


def _halves(model: Any) -> list[dict[str, Any]]:
    return [
        {"params": [model.first.weight]},
        {"params": [model.second.weight], "frequency": 4},
    ]


def make_model(method: str, inputs: int) -> nn.Module:
    """A linear map without bias that starts at 0."""
    model = _TwoHalves(inputs) if method == "nested" else nn.Linear(inputs, OUTPUTS, bias=False)
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def make_tasks(problem: Problem, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bases of the subspaces, (tasks, width, inputs), and the true map, (outputs, inputs)."""
    inputs = problem.tasks * problem.width
    rotation = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    truth = torch.randn(OUTPUTS, inputs, generator=generator)
    return rotation.T.reshape(problem.tasks, problem.width, inputs), truth


def losses(model: nn.Module, bases: Tensor, truth: Tensor) -> Tensor:
    """Each task's expected squared error as a share of its targets' variance; exact."""
    with torch.no_grad():
        errors = (model(bases) - bases @ truth.T).square().sum((1, 2))
        return errors / (bases @ truth.T).square().sum((1, 2))


def run(method: str, lr: float, seed: int, problem: Problem, every: int = 0) -> dict[str, Any]:
    """One stream. Losses are shares of the targets' variance: 1 is no better than zero.

    Returns:
        ``learnt``: each task's loss right after it; ``final``: after the last task; with
        ``every``, ``curve``: all tasks' losses after every so many steps.
    """
    generator = torch.Generator().manual_seed(seed)
    bases, truth = make_tasks(problem, generator)
    model: Any = make_model(method, bases.size(-1))
    optimizer = METHODS[method].build(model, lr)
    learnt, curve = [], [losses(model, bases, truth).tolist()]
    for task, basis in enumerate(bases):
        for step in range(problem.steps):
            inputs = torch.randn(problem.batch, problem.width, generator=generator) @ basis
            noise = problem.noise * torch.randn(problem.batch, OUTPUTS, generator=generator)
            loss = (model(inputs) - inputs @ truth.T - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if every and (step + 1) % every == 0:
                curve.append(losses(model, bases, truth).tolist())
        learnt.append(losses(model, bases, truth)[task].item())
    result = {"learnt": learnt, "final": losses(model, bases, truth).tolist()}
    return {**result, "curve": curve} if every else result


def figures(result: dict[str, Any]) -> dict[str, float]:
    """What one stream came to; ``forgetting`` leaves the last task out."""
    learnt, final = result["learnt"], result["final"]
    pairs = list(zip(learnt[:-1], final[:-1]))
    return {
        "final": _capped(statistics.fmean(final)),
        "learnt": _capped(statistics.fmean(learnt)),
        "forgetting": _capped(statistics.fmean(b - a for a, b in pairs)),
    }


def _capped(value: float) -> float:
    """A diverged run as a large number, so that means and JSON can hold it."""
    return value if abs(value) < 1e6 else 1e6  # also for nan


def sweep(
    methods: Iterable[str],
    lrs: Iterable[float],
    problem: Problem,
    selection: range,
    seeds: range,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """For each method the rate of the least final loss on ``selection``, measured on ``seeds``.

    Returns:
        ``results[method]``: ``lr``, ``at_edge`` (whether that was an end of the grid), ``sweep``
        (final loss by rate) and the figures' mean, standard deviation and values over seeds.
    """
    results: dict[str, Any] = {}
    lrs = sorted(lrs)
    for method in methods:
        by_rate = {}
        for lr in lrs:
            finals = [figures(run(method, lr, seed, problem))["final"] for seed in selection]
            by_rate[lr] = statistics.fmean(finals)
            progress()
        best = min(by_rate, key=by_rate.__getitem__)
        runs = [run(method, best, seed, problem, every=10 if seed == seeds[0] else 0)
                for seed in seeds]  # fmt: skip
        progress()
        values = [figures(r) for r in runs]
        results[method] = {
            "label": METHODS[method].label,
            "lr": best,
            "at_edge": best in (lrs[0], lrs[-1]),
            "sweep": {f"{lr:g}": value for lr, value in by_rate.items()},
            "curve": runs[0]["curve"],
            **{
                key: {
                    "mean": statistics.fmean(v[key] for v in values),
                    "sd": statistics.stdev(v[key] for v in values) if len(values) > 1 else 0.0,
                    "values": [v[key] for v in values],
                }
                for key in values[0]
            },
        }
    return results


def table(results: dict[str, Any], problem: Problem) -> Table:
    drawn = Table(
        title=f"{problem.tasks} regressions on orthogonal inputs: loss as a share of the targets' "
        "variance, mean ± standard deviation"
    )
    for title in ("method", "lr", "right after each task", "after all tasks", "forgotten"):
        drawn.add_column(title, justify="left" if title == "method" else "right")
    for row in results.values():
        cells = [f"{row[key]['mean']:.2g} ±{row[key]['sd']:.1g}" for key in COLUMNS]
        drawn.add_row(row["label"], f"{row['lr']:g}{' (edge)' * row['at_edge']}", *cells)
    return drawn


def draw(results: dict[str, Any], problem: Problem, path: Path) -> None:
    """What is left beside what was learnt, and the first task's loss through the whole stream."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for key, row in results.items():
            method = METHODS[key]
            x, y = (max(row[name]["mean"], SMALLEST) for name in ("learnt", "final"))
            spreads = [min(row[name]["sd"], 0.9 * v) for name, v in (("learnt", x), ("final", y))]
            left.errorbar(x, y, xerr=spreads[0], yerr=spreads[1], fmt="o", color=method.colour)
            first = [max(losses[0], SMALLEST) for losses in row["curve"]]
            steps = range(0, 10 * len(first), 10)
            right.plot(steps, first, color=method.colour, label=method.label)
        ends = (SMALLEST, 1.0)
        left.plot(ends, ends, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
        left.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        left.set_xlabel("loss right after each task")
        left.set_ylabel("loss after all tasks")
        left.set_title("above the line: forgotten; below: learnt later")
        right.set_yscale("log")
        for task in range(1, problem.tasks):
            right.axvline(task * problem.steps, color="#999999", linewidth=0.5)
        right.set_title("loss of the first task, one seed")
        right.set_xlabel("step (lines: a new task begins)")
        figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
        figure.savefig(path, dpi=110)
