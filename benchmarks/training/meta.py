"""A learning rate that is set wrong, and who makes up for it.

AdamW's learning rate is tuned on each task; then every method is started at a tenth of it, at it,
and at ten times it. What else a method has to choose is chosen on other seeds, by the mean
logarithm of the final loss over the three starts: one choice for all of them, as somebody has to
make who does not know the right rate.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nested_optim import DeepNestedOptimizer, kernels

from ..jobs import Run, Store, finish, interleave
from ..kernels.machine import cpu_name
from .meta_tasks import TASKS, Setting, Trial

FACTORS = (0.1, 1.0, 10.0)
#: What is written down of a run's multipliers.
READINGS = 50
#: Changes when a job's result does.
PROTOCOL = 1


#: Multipliers; a tensor stays where it is until the run is over.
Reading = Tensor | list[float]


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

    def multipliers(self, lr: float) -> Reading:
        return [self.optimizer.param_groups[0]["lr"] / lr]


class Joined:
    """A model's parameters as one tensor, of which they become views.

    For optimizers that treat all elements alike: they take few launches and reads on a device.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.params = list(params)
        self.whole = nn.Parameter(torch.cat([p.detach().flatten() for p in self.params]))
        parts = self.whole.detach().split([p.numel() for p in self.params])
        for p, part in zip(self.params, parts):
            p.data = part.view_as(p)
        self.grad = self.whole.grad = torch.zeros_like(self.whole)

    def gather(self) -> Tensor:
        """The parameters' gradients as ``grad`` of the whole."""
        grads = [p.grad for p in self.params]
        return torch.cat([grad.flatten() for grad in grads if grad is not None], out=self.grad)


class HypergradientOnDevice:
    """``Hypergradient`` whose rate never leaves the device, so that no step waits for it."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, rate: float) -> None:
        self.joined, self.rate = Joined(params), rate
        whole = self.joined.whole
        rates = torch.tensor(lr, device=whole.device)
        self.optimizer = AdamW([whole], lr=rates, weight_decay=0.0, fused=True)
        self._update: Tensor | None = None

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        grad, whole = self.joined.gather(), self.joined.whole
        if self._update is not None:
            lengths = torch.linalg.vector_norm(grad) * torch.linalg.vector_norm(self._update)
            cosine = torch.dot(grad, self._update) / lengths.clamp_min(1e-30)
            self.optimizer.param_groups[0]["lr"].mul_(1 - self.rate * cosine)
        before = whole.clone()
        self.optimizer.step()
        self._update = whole - before

    def multipliers(self, lr: float) -> Reading:
        found: Tensor = self.optimizer.param_groups[0]["lr"] / lr
        return found.reshape(1)


class Plain:
    """An optimizer of torch's kind, perhaps with a schedule."""

    def __init__(self, optimizer: Optimizer, schedule: Any = None) -> None:
        self.optimizer, self.schedule = optimizer, schedule

    def step(self, loss: Tensor) -> None:
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def multipliers(self, lr: float) -> Reading:
        return []


class Learned(Plain):
    """DeepNestedOptimizer, one group per layer, told each step's loss."""

    def step(self, loss: Tensor) -> None:
        self.optimizer.step(loss.detach())  # type: ignore[arg-type]

    def multipliers(self, lr: float) -> Reading:
        found: Tensor = self.optimizer.get_lr_multipliers()  # type: ignore[attr-defined]
        return found


class Unrolled(Learned):
    """DeepNestedOptimizer that learns by meta updates only, each through fresh training batches."""

    #: Steps per meta update.
    EVERY = 20

    def __init__(self, trial: Trial, optimizer: DeepNestedOptimizer) -> None:
        super().__init__(optimizer)
        self.trial, self.steps = trial, 0

    def step(self, loss: Tensor) -> None:
        super().step(loss)
        self.steps += 1
        if self.steps % self.EVERY == 0:
            length = self.optimizer.param_groups[0]["k_unroll"]
            batches = [self.trial.fresh() for _ in range(length)]
            optimizer: Any = self.optimizer
            optimizer.meta_update(self.trial.fresh(), batches, self.trial.loss_of)


@dataclass(frozen=True)
class Start:
    """What a method is built with: the rate that is set, and for controls the one that is right."""

    lr: float
    tuned: float
    steps: int


class Recovered(Plain):
    """AdamW that is told the right rate after one step at the wrong one.

    No rule whose first step is AdamW's can know better sooner, so this is what the start costs.
    """

    def __init__(self, params: Iterable[nn.Parameter], start: Start) -> None:
        super().__init__(_torch_adamw(params, start.lr))
        self.tuned = start.tuned

    def step(self, loss: Tensor) -> None:
        super().step(loss)
        self.optimizer.param_groups[0]["lr"] = self.tuned


class Adapted(Plain):
    """Prodigy, on all parameters as one tensor: its estimate is one for all of them anyway.

    A step reads two numbers from the device, where on a list of tensors it would read two of each.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        from prodigyopt import Prodigy

        self.joined = Joined(params)
        # As its authors advise: lr 1, everything else by default, no schedule.
        super().__init__(Prodigy([self.joined.whole], lr=lr))

    def step(self, loss: Tensor) -> None:
        self.joined.gather()
        super().step(loss)

    def multipliers(self, lr: float) -> Reading:
        return [self.optimizer.param_groups[0]["d"]]


def _torch_adamw(params: Iterable[nn.Parameter], lr: float) -> AdamW:
    """On CUDA in one launch; elsewhere as torch does by default."""
    found = list(params)
    return AdamW(found, lr=lr, weight_decay=0.0, fused=found[0].is_cuda or None)


def _adamw(trial: Trial, start: Start) -> Plain:
    return Plain(_torch_adamw(trial.model.parameters(), start.lr))


def _recovered(trial: Trial, start: Start) -> Plain:
    return Recovered(trial.model.parameters(), start)


def _cosine(trial: Trial, start: Start) -> Plain:
    optimizer = _torch_adamw(trial.model.parameters(), start.lr)
    return Plain(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, start.steps))


def _hypergradient(
    trial: Trial, start: Start, rate: float
) -> Hypergradient | HypergradientOnDevice:
    on_device = next(trial.model.parameters()).is_cuda
    kind = HypergradientOnDevice if on_device else Hypergradient
    return kind(trial.model.parameters(), start.lr, rate)


def _learned(trial: Trial, start: Start, groups: str = "one", **options: Any) -> Learned:
    params: Any = [{"params": list(trial.model.parameters()), "name": "all"}]
    if groups == "layers":
        params = [{"params": layer, "name": f"layer{i}"} for i, layer in enumerate(trial.layers)]
    device = next(trial.model.parameters()).device
    options = {"fused": kernels.available(device) or None, **options}
    return Learned(DeepNestedOptimizer(params=params, lr=start.lr, weight_decay=0.0, **options))


def _unrolled(trial: Trial, start: Start, **options: Any) -> Unrolled:
    params: Any = [{"params": list(trial.model.parameters()), "name": "all"}]
    options = {"lr": start.lr, "weight_decay": 0.0, "mode": "explicit", **options}
    return Unrolled(trial, DeepNestedOptimizer(params=params, model=trial.model, **options))


def _prodigy(trial: Trial, start: Start) -> Plain:
    return Adapted(trial.model.parameters(), start.lr)


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        build: ``(trial, start, **options)``.
        choices: options, of which one is chosen on other seeds.
        lr: what it is always started at, if it has no use for a rate that is set.
    """

    label: str
    build: Callable[..., Any]
    choices: tuple[dict[str, Any], ...] = field(default=({},))
    lr: float | None = None


_MULTIPLIERS = {"learn_momentum": False, "learn_mixing": False}

METHODS = {
    "adamw": Method("AdamW", _adamw),
    "recovered": Method("AdamW, told the right rate after one step", _recovered),
    "cosine": Method("AdamW, cosine to 0", _cosine),
    "hypergradient": Method(
        "hypergradient, one lr",
        _hypergradient,
        tuple({"rate": r} for r in (0.01, 0.03, 0.1, 0.3)),
    ),
    "deep_default": Method("DeepNestedOptimizer, defaults", _learned),
    "deep_step": Method(
        "... horizon='step': by the next losses alone", _learned, ({"horizon": "step"},)
    ),
    "deep_layers": Method("... a group per layer", _learned, ({"groups": "layers"},)),
    "deep_lr": Method("... multipliers only", _learned, (_MULTIPLIERS,)),
    # What the default has beside multipliers, one at a time.
    "deep_momentum": Method(
        "... multipliers and momentum, no mixture", _learned, ({"learn_mixing": False},)
    ),
    "deep_mixing": Method(
        "... multipliers and mixture, plain momentum", _learned, ({"learn_momentum": False},)
    ),
    "deep_10": Method(
        "... multipliers only, every 10 steps",
        _learned,
        ({"meta_update_freq": 10, **_MULTIPLIERS},),
    ),
    "deep_adam": Method(
        "... meta_rule='adam', every 10 steps",
        _learned,
        ({"meta_rule": "adam", "meta_lr": 2e-4, "meta_update_freq": 10},),
    ),
    # By true meta-gradients.
    "explicit_5": Method(
        "... mode='explicit' through 5 steps, every 20",
        _unrolled,
        tuple({"k_unroll": 5, "meta_lr": rate} for rate in (1e-4, 1e-3, 1e-2)),
    ),
}
if find_spec("prodigyopt"):
    METHODS["prodigy"] = Method("Prodigy, which takes no rate", _prodigy, lr=1.0)


@dataclass(frozen=True)
class Job:
    """One training run, by all that its result depends on."""

    task: str
    method: str
    options: tuple[tuple[str, Any], ...]
    lr: float
    tuned: float
    seed: int
    steps: int
    data: str = ""  # of a task whose data is not the task's own

    def identity(self) -> dict[str, Any]:
        found = asdict(self)
        if not self.data:
            del found["data"]
        return found


def work(job: Job, setting: Setting = Setting()) -> dict[str, Any]:  # noqa: B008 (a constant)
    """Train as the job says."""
    return finish(steps_of(job, setting))


def work_together(jobs: list[Job], setting: Setting) -> list[dict[str, Any]]:
    """The same for several, which take turns; the time of a step is then that of all."""
    return interleave(jobs, partial(steps_of, setting=setting), torch.device(setting.device))


def steps_of(job: Job, setting: Setting) -> Run:
    """:func:`work`, which stops after each step."""
    trial = TASKS[job.task].begin(job.seed, setting)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        start = Start(job.lr, job.tuned, job.steps)
        learner = METHODS[job.method].build(trial, start, **dict(job.options))
    multipliers: list[Reading] = []
    every = max(1, job.steps // READINGS)
    started = time.perf_counter()
    for step in range(job.steps):
        learner.step(trial.next_gradient())
        if step % every == 0:
            multipliers.append(learner.multipliers(job.lr))
        yield
    figures = trial.figures()  # which waits for a device
    seconds = time.perf_counter() - started
    return {
        **figures,
        "ms_per_step": 1e3 * seconds / job.steps,
        "multipliers": [m.tolist() if isinstance(m, Tensor) else m for m in multipliers],
        "device": _name(trial.model),
        "torch": str(torch.__version__),
    }


def _name(model: nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def spread(runs: Sequence[dict[str, Any]], measures: Sequence[str]) -> dict[str, Any]:
    """Over seeds. Losses may range over decades, so their mean is the geometric one."""
    found: dict[str, Any] = {}
    for measure_ in measures:
        logs = [math.log(run[measure_]) for run in runs]
        found[measure_] = math.exp(statistics.fmean(logs))
        found[f"{measure_}, factor"] = math.exp(statistics.stdev(logs)) if len(logs) > 1 else 1.0
        found[f"{measure_}, runs"] = [run[measure_] for run in runs]
    if "accuracy" in runs[0]:
        found["accuracy"] = statistics.fmean(run["accuracy"] for run in runs)
    found["ms_per_step"] = statistics.median(run["ms_per_step"] for run in runs)
    return found


def _counted(values: Iterable[str | None]) -> dict[str, int]:
    found = Counter(value or "not written down" for value in values)
    return dict(sorted(found.items()))


def measure(
    name: str,
    seeds: Sequence[int],
    selection: Sequence[int],
    steps: int,
    names: Sequence[str],
    lrs: Sequence[float],
    store: Store,
    execute: Callable[[list[Job]], None],
    data: str = "",
) -> dict[str, Any]:
    """A task's tuned rate, each method's own choice, and its runs from the three starts."""
    measures = TASKS[name].measures

    def job(method: str, options: dict[str, Any], lr: float, tuned: float, seed: int) -> Job:
        return Job(name, method, tuple(sorted(options.items())), lr, tuned, seed, steps, data)

    def score(jobs: list[Job]) -> float:
        return statistics.fmean(math.log(store[j][measures[0]]) for j in jobs)

    searched = {lr: [job("adamw", {}, lr, 0.0, s) for s in selection] for lr in lrs}
    execute(list(itertools.chain(*searched.values())))
    by_lr = {lr: score(jobs) for lr, jobs in searched.items()}
    tuned = min(by_lr, key=lambda lr: by_lr[lr])

    def start(method: str, options: dict[str, Any], factor: float, seed: int) -> Job:
        # One job for all starts where they are no different runs.
        if method == "recovered" and factor == 1:
            method, options = "adamw", {}
        # A rate that is right must not make a job of its own for methods that are not told it.
        told = tuned if method == "recovered" else 0.0
        own = METHODS[method].lr
        return job(method, options, factor * tuned if own is None else own, told, seed)

    trials = {
        (method, i): [
            start(method, options, *pair) for pair in itertools.product(FACTORS, selection)
        ]
        for method in names
        if len(METHODS[method].choices) > 1
        for i, options in enumerate(METHODS[method].choices)
    }
    execute(list(itertools.chain(*trials.values())))
    scores = {key: score(jobs) for key, jobs in trials.items()}
    chosen = {}
    for method in names:
        choices = METHODS[method].choices
        best = min(range(len(choices)), key=lambda i: scores.get((method, i), 0.0))
        chosen[method] = choices[best]
    final = {
        (method, factor): [start(method, chosen[method], factor, s) for s in seeds]
        for method in names
        for factor in FACTORS
    }
    execute(list(itertools.chain(*final.values())))

    used = set(itertools.chain(*searched.values(), *trials.values(), *final.values()))
    rows: dict[str, Any] = {}
    for method in names:
        by_factor = {}
        for factor in FACTORS:
            runs = [store[j] for j in final[method, factor]]
            by_factor[f"{factor:g}"] = {
                **spread(runs, measures),
                "multipliers": runs[0]["multipliers"],
            }
        rows[method] = {
            "label": METHODS[method].label,
            "chosen": chosen[method],
            "choices": [
                {**options, "log_loss": scores[method, i]}
                for i, options in enumerate(METHODS[method].choices)
                if (method, i) in scores
            ],
            "by_factor": by_factor,
        }
    best = rows["adamw"]["by_factor"]["1"]
    for row in rows.values():
        for entry in row["by_factor"].values():
            entry["of_tuned_adamw"] = {m: entry[m] / best[m] for m in measures}
    return {
        "label": TASKS[name].label,
        "steps": steps,
        "lr": tuned,
        "by_lr": {f"{k:g}": math.exp(v) for k, v in by_lr.items()},
        "measures": measures,
        "runs": len(used),
        "runs_seconds": sum(store[j]["ms_per_step"] * steps / 1e3 for j in used),
        "runs_on": {key: _counted(store[j].get(key) for j in used) for key in ("device", "torch")},
        "rows": rows,
    }
