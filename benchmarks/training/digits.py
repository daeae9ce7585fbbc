"""The nested trainer of ``several_steps.py`` beside fixed and scheduled numbers, on digits.

SGD with momentum trains the MLP of the demo on all ten digits. The same batches for every method of
a seed; the trainer's later losses are of batches of their own from the same training digits. What
has a number to choose has it chosen on other seeds, by the training loss at the end.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..demo.run import one_thread
from ..demo.stream import build_model, make_stream
from .one_step import LOSS, RICH, Batch, MetaNetwork
from .several_steps import NestedTrainer

LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
MOMENTA = (0.0, 0.9, 0.97)
START_MOMENTUM = 0.9
META_LRS = (1e-3, 1e-2, 1e-1)
SELECTION_LRS = (0.001, 0.03, 1.0)  # starts on which the meta learning rate is chosen
BATCH_SIZE = 64
DIVERGED = 1e6  # the loss of a run that has left the numbers


@dataclass(frozen=True)
class Variant:
    label: str
    statistics: tuple[str, ...]
    unroll: int = 1
    truncate: int | None = None

    @property
    def passes(self) -> float:
        """Forward and backward passes per step of the model.

        One for the step's gradient, one per unroll for the later loss, and two for each
        Hessian-vector product: one per step through which the gradient goes on to earlier ones.
        """
        through = min(self.unroll, self.truncate or self.unroll) - 1
        return 1 + (1 + 2 * through) / self.unroll


VARIANTS = {
    "one": Variant("one step, sees the loss", LOSS),
    "one-rich": Variant("one step, richer statistics", RICH),
    "five": Variant("five steps, richer statistics", RICH, 5),
    "five-truncated": Variant("five steps, last two followed", RICH, 5, 2),
}


def whole(seed: int) -> tuple[Batch, Batch]:
    """All training and all test digits."""
    stream = make_stream(seed)
    train, test = (
        (torch.cat([s.inputs for s in part]), torch.cat([s.labels for s in part]))
        for part in (stream.train, stream.test)
    )
    return train, test


def batches(data: Batch, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(data[1]), (BATCH_SIZE,), generator=generator)
        yield data[0][chosen], data[1][chosen]


@torch.no_grad()
def figures(model: torch.nn.Module, train: Batch, test: Batch) -> dict[str, float]:
    loss = float(F.cross_entropy(model(train[0]), train[1]))
    right = model(test[0]).argmax(1) == test[1]
    return {
        "loss": loss if loss < DIVERGED else DIVERGED,  # so is NaN
        "accuracy": 100 * float(right.float().mean()),
    }


def run_fixed(
    lr: float, momentum: float, seed: int, steps: int, cosine: bool = False
) -> dict[str, Any]:
    """``torch.optim.SGD`` with these numbers, or a cosine from ``lr`` to 0."""
    train, test = whole(seed)
    model = build_model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    started = time.perf_counter()
    for inputs, labels in itertools.islice(batches(train, seed), steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    seconds = time.perf_counter() - started
    return {**figures(model, train, test), "ms_per_step": 1e3 * seconds / steps}


def run_nested(
    variant: Variant, lr: float, meta_lr: float, seed: int, steps: int
) -> dict[str, Any]:
    """The nested trainer, starting from this learning rate and a momentum of 0.9."""
    train, test = whole(seed)
    model = build_model(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MetaNetwork(variant.statistics, lr=lr, momentum=START_MOMENTUM)
    trainer = NestedTrainer(model, F.cross_entropy, network, meta_lr, truncate=variant.truncate)
    now, later = batches(train, seed), batches(train, seed + 10_000)
    chosen: list[list[float]] = []
    started = time.perf_counter()
    for _ in range(steps // variant.unroll):
        given = list(itertools.islice(now, variant.unroll))
        metrics = trainer.step(given, next(later))
        chosen.append([float(metrics["lr"]), float(metrics["momentum"])])
    seconds = time.perf_counter() - started
    trainer.write_back()
    return {
        **figures(model, train, test),
        "ms_per_step": 1e3 * seconds / steps,
        "lr_and_momentum": chosen[:: max(1, len(chosen) // 50)],
    }


def spread(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds. Losses range over decades, so their mean is the geometric one."""
    logs = [math.log(run["loss"]) for run in runs]
    return {
        "loss": math.exp(statistics.fmean(logs)),
        "loss_factor": math.exp(statistics.stdev(logs)) if len(logs) > 1 else 1.0,
        "losses": [run["loss"] for run in runs],
        "accuracy": statistics.fmean(run["accuracy"] for run in runs),
        "accuracies": [run["accuracy"] for run in runs],
        "ms_per_step": statistics.median(run["ms_per_step"] for run in runs),
    }


def measure(
    seeds: Sequence[int],
    selection: Sequence[int],
    steps: int,
    lrs: Sequence[float] = LRS,
    meta_lrs: Sequence[float] = META_LRS,
    selection_lrs: Sequence[float] = SELECTION_LRS,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """All runs. ``fixed`` and ``cosine`` also with as many passes as each variant takes."""
    results: dict[str, Any] = {"fixed": {}, "cosine": {}, "nested": {}}
    check_steps(steps)
    budgets = {"steps": steps} | {k: round(v.passes * steps) for k, v in VARIANTS.items()}
    with one_thread():
        for name, cosine in (("fixed", False), ("cosine", True)):
            for budget in sorted(set(budgets.values())):
                found = {
                    (lr, momentum): _log_loss(
                        run_fixed(lr, momentum, seed, budget, cosine) for seed in selection
                    )
                    for lr, momentum in itertools.product(lrs, MOMENTA)
                }
                best = min(found, key=lambda key: found[key])
                by_lr = {}
                for lr in lrs if budget == steps else ():
                    runs = [run_fixed(lr, START_MOMENTUM, seed, budget, cosine) for seed in seeds]
                    by_lr[f"{lr:g}"] = spread(runs)
                runs = [run_fixed(*best, seed, budget, cosine) for seed in seeds]
                results[name][str(budget)] = {
                    "lr": best[0],
                    "momentum": best[1],
                    "tuned": spread(runs),
                    "momentum 0.9, by lr": by_lr,
                }
                advance()
        for key, variant in VARIANTS.items():
            losses = {
                meta_lr: _log_loss(
                    run_nested(variant, lr, meta_lr, seed, steps)
                    for lr, seed in itertools.product(selection_lrs, selection)
                )
                for meta_lr in meta_lrs
            }
            meta_lr = min(losses, key=lambda key: losses[key])
            starts = {
                lr: _log_loss(run_nested(variant, lr, meta_lr, s, steps) for s in selection)
                for lr in lrs
            }
            row: dict[str, Any] = {
                "label": variant.label,
                "meta_lr": meta_lr,
                "lr": min(starts, key=lambda key: starts[key]),
                "selection": {f"{k:g}": math.exp(v) for k, v in losses.items()},
                "passes_per_step": variant.passes,
                "budget": budgets[key],
                "by_lr": {},
            }
            for lr in lrs:
                runs = [run_nested(variant, lr, meta_lr, seed, steps) for seed in seeds]
                row["by_lr"][f"{lr:g}"] = {
                    **spread(runs),
                    "lr_and_momentum": [run["lr_and_momentum"] for run in runs],
                }
            results["nested"][key] = row
            advance()
    return results


def _log_loss(runs: Iterator[dict[str, Any]]) -> float:
    return statistics.fmean(math.log(run["loss"]) for run in runs)


def check_steps(steps: int) -> None:
    """Raise if an unroll would not divide them."""
    for variant in VARIANTS.values():
        if steps % variant.unroll:
            raise ValueError(f"steps must be a multiple of {variant.unroll}, not {steps}")


def units() -> int:
    """How often ``measure`` tells that it has advanced."""
    budgets = {1.0} | {variant.passes for variant in VARIANTS.values()}
    return 2 * len(budgets) + len(VARIANTS)
