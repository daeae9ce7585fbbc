"""The runs: AdamW against its one-line replacement, and every method over the lr grid."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nested_optim.weight_memory import memory_of

from . import methods, stream
from .training import train

Advance = Callable[[], None]  # told after every unit of work
Accuracies = tuple[float, ...]  # one per task
READINGS = ("known", "unknown")


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = tuple(range(5))
    lrs: tuple[float, ...] = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
    # A multiple of every frequency: each window closes on a task's last step. The loop knows
    # nothing of windows, so nothing is flushed between tasks, and nothing is left to flush.
    steps_per_task: int = 256
    batch_size: int = 16
    evaluate_every: int = 16
    identity_lr: float = 1e-3
    timing_rounds: int = 60
    workers: int = 1

    def __post_init__(self) -> None:
        for frequency in (*methods.FREQUENCIES, methods.ACCUMULATE):
            if self.steps_per_task % frequency:
                raise ValueError(f"steps_per_task must be a multiple of {frequency}")

    @property
    def steps(self) -> int:
        return self.steps_per_task * len(stream.TASKS)


QUICK: dict[str, Any] = {
    "lrs": (1e-3, 4e-3, 1.6e-2),
    "steps_per_task": 128,
    "timing_rounds": 20,
}


@dataclass(frozen=True)
class Job:
    method: str
    lr: float
    seed: int


def _per_reading() -> dict[str, list[Accuracies]]:
    return {reading: [] for reading in READINGS}


@dataclass
class Run:
    """One training run. ``test["known"][i][j]``: accuracy on task j after task i."""

    job: Job
    losses: list[float] = field(default_factory=list)
    validation: dict[str, list[Accuracies]] = field(default_factory=_per_reading)
    test: dict[str, list[Accuracies]] = field(default_factory=_per_reading)
    # Test accuracies at each of ``steps``.
    steps: list[int] = field(default_factory=list)
    curves: dict[str, list[Accuracies]] = field(default_factory=_per_reading)
    parameters: list[torch.Tensor] = field(default_factory=list, repr=False)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The tensors are too small for more, and results must not depend on how work is split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_on_stream(
    job: Job,
    make: Callable[[nn.Sequential, float], torch.optim.Optimizer],
    settings: Settings,
    accumulate: int = 1,
) -> Run:
    data = stream.make_stream(job.seed)
    model = stream.build_model(job.seed)
    optimizer = make(model, job.lr)
    memory = memory_of(optimizer)
    run = Run(job)

    def accuracies(tasks: tuple[stream.Samples, ...]) -> tuple[Accuracies, Accuracies]:
        with memory.read_out() if memory is not None else contextlib.nullcontext():
            return stream.accuracies(model, tasks)

    def evaluate(step: int) -> None:
        task_over = step % settings.steps_per_task == 0
        if not task_over and step % settings.evaluate_every:
            return
        on_test = accuracies(data.test)
        run.steps.append(step)
        for reading, values in zip(READINGS, on_test, strict=True):
            run.curves[reading].append(values)
        if step and task_over:
            on_validation = accuracies(data.validation)
            for i, reading in enumerate(READINGS):
                run.test[reading].append(on_test[i])
                run.validation[reading].append(on_validation[i])

    evaluate(0)
    run.losses = train(
        model,
        optimizer,
        stream.batches(data, job.seed, settings.steps_per_task, settings.batch_size),
        accumulate=accumulate,
        after_step=evaluate,
    )
    run.parameters = [p.detach() for p in model.parameters()]
    return run


def check_identity(settings: Settings) -> dict[str, Any]:
    """Train with AdamW and with NestedOptimizer in its place, and compare every bit.

    Raises:
        RuntimeError: they differ, so nothing else here would mean anything.
    """
    with one_thread():
        job = Job("identity", settings.identity_lr, settings.seeds[0])
        reference = train_on_stream(job, methods.adamw, settings)
        replaced = train_on_stream(job, methods.nested, settings)
    loss_gap = max(abs(a - b) for a, b in zip(reference.losses, replaced.losses, strict=True))
    parameter_gap = max(
        float((p - q).abs().max())
        for p, q in zip(reference.parameters, replaced.parameters, strict=True)
    )
    same = reference.losses == replaced.losses and all(
        torch.equal(p, q) for p, q in zip(reference.parameters, replaced.parameters, strict=True)
    )
    if not same:
        raise RuntimeError(
            f"NestedOptimizer at frequency 1 left AdamW's path within {settings.steps} steps: "
            f"losses by up to {loss_gap}, parameters by up to {parameter_gap}"
        )
    return {
        "lr": job.lr,
        "seed": job.seed,
        "steps": len(reference.losses),
        "max_abs_loss_difference": loss_gap,
        "max_abs_parameter_difference": parameter_gap,
        "bit_identical": same,
        "losses_adamw": reference.losses,
        "losses_nested": replaced.losses,
    }


def run_job(job: Job, settings: Settings) -> Run:
    """One cell of the grid. Runs in a worker process: everything it needs, it makes."""
    method = methods.BY_KEY[job.method]
    run = train_on_stream(job, method.make, settings, method.accumulate)
    run.parameters = []  # not needed any more, and costly to send
    return run


def run_grid(settings: Settings, advance: Advance) -> list[Run]:
    """Every method at every lr with every seed, in an order that no scheduling changes."""
    jobs = [
        Job(method.key, lr, seed)
        for method in methods.METHODS
        for lr in settings.lrs
        for seed in settings.seeds
    ]
    if settings.workers <= 1:
        runs = []
        with one_thread():
            for job in jobs:
                runs.append(run_job(job, settings))
                advance()
        return runs
    # Spawned, not forked: a forked child inherits torch's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        settings.workers, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(run_job, job, settings) for job in jobs]
        for done in as_completed(futures):
            done.result()  # a failed run ends the demo now, not after all the others
            advance()
        return [future.result() for future in futures]


def grid_size(settings: Settings) -> int:
    return len(methods.METHODS) * len(settings.lrs) * len(settings.seeds)
