"""A learning rate that is set wrong, and who makes up for it.

AdamW trains the MLP of the demo on all ten digits. Its learning rate is tuned; then every method is
started at a tenth of it, at it, and at ten times it. What else a method has to choose is chosen on
other seeds, by the mean logarithm of the final training loss over the three starts: one choice for
all of them, as somebody has to make who does not know the right rate.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from nested_optim import DeepNestedOptimizer

from ..demo.run import one_thread
from ..demo.stream import build_model
from .digits import batches, figures, spread, whole

LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FACTORS = (0.1, 1.0, 10.0)
#: What is written down of a run's multipliers.
READINGS = 50


class Hypergradient:
    """AdamW whose one learning rate follows the angle between a gradient and the last update.

    The multiplicative form of hypergradient descent (Baydin et al. 2018; Rubio 2017): the rate
    grows by a factor of up to ``1 + rate`` where the update before went down the present gradient,
    and shrinks where it went up.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, rate: float) -> None:
        self.params = list(params)
        self.optimizer = AdamW(self.params, lr=lr, weight_decay=0.0)
        self.rate = rate
        self._update: list[Tensor] = []

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        if self._update:
            along = sum(float((g * u).sum()) for g, u in zip(grads, self._update))
            lengths = [
                math.sqrt(sum(float(t.square().sum()) for t in ts)) for ts in (grads, self._update)
            ]
            cosine = along / max(lengths[0] * lengths[1], 1e-30)
            self.optimizer.param_groups[0]["lr"] *= 1 - self.rate * cosine
        before = [p.clone() for p in self.params]
        self.optimizer.step()
        self._update = [p - b for p, b in zip(self.params, before)]

    def multipliers(self, lr: float) -> list[float]:
        return [self.optimizer.param_groups[0]["lr"] / lr]


class Plain:
    """An optimizer of torch's kind, perhaps with a schedule."""

    def __init__(self, optimizer: Optimizer, schedule: Any = None) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.zero_grad = optimizer.zero_grad

    def step(self, loss: Tensor) -> None:
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def multipliers(self, lr: float) -> list[float]:
        return []


class Learned(Plain):
    """DeepNestedOptimizer, one group per layer, told each step's loss."""

    def step(self, loss: Tensor) -> None:
        self.optimizer.step(loss.detach())  # type: ignore[arg-type]

    def multipliers(self, lr: float) -> list[float]:
        found: list[float] = self.optimizer.get_lr_multipliers().tolist()  # type: ignore[attr-defined]
        return found


def layers(model: nn.Sequential) -> list[dict[str, Any]]:
    linear = [module for module in model if isinstance(module, nn.Linear)]
    return [
        {"params": list(layer.parameters()), "name": f"layer{i}"} for i, layer in enumerate(linear)
    ]


def _adamw(model: nn.Sequential, lr: float, steps: int) -> Plain:
    return Plain(AdamW(model.parameters(), lr=lr, weight_decay=0.0))


def _cosine(model: nn.Sequential, lr: float, steps: int) -> Plain:
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    return Plain(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))


def _hypergradient(model: nn.Sequential, lr: float, steps: int, rate: float) -> Hypergradient:
    return Hypergradient(model.parameters(), lr, rate)


def _learned(model: nn.Sequential, lr: float, steps: int, **options: Any) -> Learned:
    return Learned(DeepNestedOptimizer(params=layers(model), lr=lr, weight_decay=0.0, **options))


def _prodigy(model: nn.Sequential, lr: float, steps: int) -> Plain:
    from prodigyopt import Prodigy

    # Its own unit is 1; what was set here is a factor of that.
    return Plain(Prodigy(model.parameters(), lr=1.0, d0=1e-6, weight_decay=0.0))


@dataclass(frozen=True)
class Method:
    """A row: how it is built, and what may be chosen on other seeds."""

    label: str
    build: Callable[..., Any]
    choices: tuple[dict[str, Any], ...] = field(default=({},))


METHODS = {
    "adamw": Method("AdamW", _adamw),
    "cosine": Method("AdamW, cosine to 0", _cosine),
    "hypergradient": Method(
        "hypergradient, one lr",
        _hypergradient,
        tuple({"rate": r} for r in (0.003, 0.01, 0.03, 0.1)),
    ),
    "deep_default": Method("DeepNestedOptimizer, defaults", _learned),
    "deep": Method(
        "DeepNestedOptimizer",
        _learned,
        tuple(
            {"meta_lr": meta_lr, "meta_update_freq": every}
            for meta_lr, every in itertools.product((3e-4, 1e-3, 3e-3), (1, 10))
        ),
    ),
    "deep_lr": Method(
        "... multipliers only",
        _learned,
        tuple(
            {"meta_lr": m, "meta_update_freq": 1, "learn_momentum": False, "learn_mixing": False}
            for m in (3e-4, 1e-3, 3e-3)
        ),
    ),
}
if find_spec("prodigyopt"):
    METHODS["prodigy"] = Method("Prodigy", _prodigy)


def run(
    method: Method, options: dict[str, Any], lr: float, seed: int, steps: int
) -> dict[str, Any]:
    train, test = whole(seed)
    model = build_model(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learner = method.build(model, lr, steps, **options)
    multipliers: list[list[float]] = []
    every = max(1, steps // READINGS)
    started = time.perf_counter()
    for step, (inputs, labels) in enumerate(itertools.islice(batches(train, seed), steps)):
        learner.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        learner.step(loss)
        if step % every == 0:
            multipliers.append(learner.multipliers(lr))
    seconds = time.perf_counter() - started
    return {
        **figures(model, train, test),
        "ms_per_step": 1e3 * seconds / steps,
        "multipliers": multipliers,
    }


def _log_loss(runs: Iterable[dict[str, Any]]) -> float:
    return statistics.fmean(math.log(r["loss"]) for r in runs)


def measure(
    seeds: Sequence[int],
    selection: Sequence[int],
    steps: int,
    names: Sequence[str] | None = None,
    lrs: Sequence[float] = LRS,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Everything: the tuned rate, each method's own choice, and its runs from the three starts."""
    with one_thread():
        of_lr = {
            lr: _log_loss(run(METHODS["adamw"], {}, lr, s, steps) for s in selection) for lr in lrs
        }
        tuned = min(of_lr, key=lambda lr: of_lr[lr])
        advance()
        rows = {}
        for name in names or METHODS:
            method = METHODS[name]
            scores = []
            for options in method.choices:
                starts = itertools.product(FACTORS, selection)
                runs = (run(method, options, f * tuned, s, steps) for f, s in starts)
                scores.append(_log_loss(runs) if len(method.choices) > 1 else 0.0)
            chosen = method.choices[scores.index(min(scores))]
            by_factor = {}
            for factor in FACTORS:
                found = [run(method, chosen, factor * tuned, s, steps) for s in seeds]
                by_factor[f"{factor:g}"] = {
                    **spread(found),
                    "multipliers": found[0]["multipliers"],
                }
            rows[name] = {
                "label": method.label,
                "chosen": chosen,
                "choices": [
                    {**options, "log_loss": score} for options, score in zip(method.choices, scores)
                ],
                "by_factor": by_factor,
            }
            advance()
    best = rows["adamw"]["by_factor"]["1"]["loss"] if "adamw" in rows else math.nan
    for row in rows.values():
        for entry in row["by_factor"].values():  # type: ignore[attr-defined]
            entry["of_tuned_adamw"] = entry["loss"] / best
    return {"lr": tuned, "by_lr": {f"{k:g}": math.exp(v) for k, v in of_lr.items()}, "rows": rows}
