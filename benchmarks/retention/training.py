"""One run: a method trained on the stream of one seed, measured at the end of every task."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..gradients import Gradients
from ..jobs import Run, finish, interleave
from ..kernels.machine import cpu_name
from . import methods, models
from .data import Dataset
from .methods import Learner
from .stream import Indices, Stream, make_stream, plan

#: Raised when a job comes to another result than before, so that old ones are not reused.
PROTOCOL = 1
READINGS = ("task_il", "class_il")
#: Steps after a change of tasks at which curves have a point, and so on every 50 steps.
CURVE_STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 75, 100)
CURVE_EVERY = 50
CURVE_SAMPLES = 30  # of each task
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Job:
    """One run and everything that decides how it comes out.

    Attributes:
        purpose: ``"select"`` runs choose a learning rate, on validation samples, and measure only
            what that and the learning accuracy take; ``"report"`` runs are measured on test samples
            after every task, with curves.
    """

    stream: str
    method: str
    settings: tuple[Any, ...]
    lr: float
    seed: int
    replay: int
    epochs: int
    batch: int
    purpose: str

    def identity(self) -> dict[str, Any]:
        return asdict(self)


class Evaluator:
    """Accuracies of a model on the stream's tasks, in both readings, from the same logits."""

    def __init__(self, data: Dataset, stream: Stream, prepare: Any, device: torch.device) -> None:
        self.prepare = prepare
        self.class_tasks = stream.class_tasks.to(device)
        members = [
            torch.nonzero(stream.test_tasks == task)[:, 0] for task in range(len(stream.classes))
        ]
        # Evenly spread, since samples of one class may lie together.
        few = [m[torch.linspace(0, len(m) - 1, min(CURVE_SAMPLES, len(m))).long()] for m in members]
        self.samples = {}
        for which, parts in (("all", members), ("few", few)):
            order = torch.cat(parts)  # task after task, so that tasks in a row are one slice
            tensors = (stream.test_inputs, stream.test_labels, stream.test_tasks)
            ends = [0, *itertools.accumulate(map(len, parts))]
            self.samples[which] = (*(t[order].to(device) for t in tensors), ends)

    @torch.no_grad()
    def __call__(self, model: nn.Module, first: int, last: int, which: str = "all") -> Tensor:
        """Tasks ``first`` to ``last`` inclusive, where ``last`` is the latest that was seen.

        Returns:
            shape (tasks, 2): with each task's own logits, and with those of all classes seen.
        """
        inputs, labels, tasks, ends = self.samples[which]
        here = slice(ends[first], ends[last + 1])
        parts = [model(self.prepare(part)) for part in inputs[here].split(EVALUATION_BATCH)]
        logits = torch.cat(parts).float()
        sound = logits.isfinite().all(1)  # a network that has diverged is right about nothing
        right = []
        for competing in (self.class_tasks == tasks[here, None], self.class_tasks <= last):
            predicted = logits.masked_fill(~competing, -torch.inf).argmax(1)
            right.append(((predicted == labels[here]) & sound).double())
        sizes = [ends[task + 1] - ends[task] for task in range(first, last + 1)]
        return torch.stack([part.mean(1) for part in torch.stack(right).split(sizes, dim=1)])


def run(job: Job, data: Dataset, device: torch.device) -> dict[str, Any]:
    """Train and measure.

    Returns:
        ``seconds``, ``steps`` (batches), ``read_outs``: for each read-out and reading R, where
        R[i][j] is the accuracy on task j after task i, None where it was not measured (j > i, which
        is not learnt yet, and in ``"select"`` runs all but the diagonal and the last row); for
        ``"report"`` runs ``curve_steps``, ``changes`` (batches before each task) and ``curves``.
    """
    return finish(steps_of(job, data, device))


def steps_of(job: Job, data: Dataset, device: torch.device) -> Run:
    """:func:`run`, which stops after each batch."""
    started = time.perf_counter()
    method = methods.get(job.method)
    stream = make_stream(data, job.seed, selection=job.purpose == "select")
    inputs = stream.train_inputs.to(device)
    labels = stream.train_labels.to(device)
    prepare = _prepare(data, device)
    model = models.build(data.model, data.classes, job.seed).to(device)
    learner = method.build(model, data.model, job.lr)
    evaluate = Evaluator(data, stream, prepare, device)
    tasks = (np.concatenate(stream.train),) if method.joint else stream.train
    # Samples are given to a run in one order: of its stream's seed, whatever the method.
    planned = plan(tasks, job.seed, epochs=job.epochs, batch=job.batch, replay=job.replay)

    def loss(indices: Tensor) -> Tensor:
        cost = F.cross_entropy(model(prepare(inputs[indices])), labels[indices])
        return cost / learner.accumulate

    gradients = Gradients(model, loss, job.batch * (2 if job.replay else 1), device)
    record = _Record(learner, model, evaluate, len(stream.classes), job.purpose, method.joint)
    steps = 0
    for task, batches in enumerate(planned):
        record.begin_task(steps)
        for within, indices in enumerate(_uploaded(batches, device), start=1):
            gradients.add(indices)
            steps += 1
            if steps % learner.accumulate == 0:
                if learner.ewc is not None:
                    learner.ewc.add_gradient()
                learner.optimizer.step()
                gradients.clear()
                for act in learner.after_step:
                    act()
            record.after_batch(steps, within, task, last=within == len(batches))
            yield
        record.end_task(task)
        if learner.ewc is not None and task + 1 < len(planned):
            learner.ewc.end_task(prepare(inputs[torch.from_numpy(tasks[task]).to(device)]))
    return {"steps": steps, **record.results(), "seconds": time.perf_counter() - started}


def work(job: Job, data: Path, device: torch.device) -> dict[str, Any]:
    """``run`` in a worker process: ``data`` is the file that a data set was saved to."""
    return _on(device, run(job, _load(data), device))


def work_together(jobs: list[Job], data: Path, device: torch.device) -> list[dict[str, Any]]:
    """The same for several, which take turns; the seconds of each are those of all."""
    found = interleave(jobs, functools.partial(steps_of, data=_load(data), device=device), device)
    return [_on(device, result) for result in found]


def _on(device: torch.device, result: dict[str, Any]) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {**result, "device": name}


@functools.lru_cache(maxsize=1)
def _load(data: Path) -> Dataset:
    return Dataset.load(data)


def _prepare(data: Dataset, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What a network is given of stored samples."""
    if not data.mean:
        return Tensor.float
    mean, std = (
        torch.tensor(v, device=device).mul_(255).view(-1, 1, 1) for v in (data.mean, data.std)
    )
    return lambda stored: (stored.float() - mean) / std


def _uploaded(batches: list[Indices], device: torch.device) -> Iterator[Tensor]:
    """The batches' indices on the device, copied there in one piece."""
    whole = torch.from_numpy(np.concatenate(batches)).to(device)
    yield from whole.split([len(batch) for batch in batches])


class _Record:
    """The accuracies of one run, kept on the device until it is over."""

    def __init__(
        self,
        learner: Learner,
        model: nn.Module,
        evaluate: Evaluator,
        tasks: int,
        purpose: str,
        joint: bool,
    ) -> None:
        self.learner, self.model, self.evaluate = learner, model, evaluate
        self.tasks, self.joint = tasks, joint
        self.full = purpose == "report"
        # Of each read-out, what was measured after a task: (task, first task measured, accuracies).
        self.found: dict[str, list[tuple[int, int, Tensor]]] = {n: [] for n in learner.read_outs}
        self.curves: dict[str, list[Tensor]] = {n: [] for n in learner.read_outs}
        self.steps: list[int] = []
        self.changes: list[int] = []

    @contextlib.contextmanager
    def _weights(self, name: str) -> Iterator[nn.Module]:
        with self.learner.read_outs[name]():
            yield self.learner.averages.get(name, self.model)

    def begin_task(self, steps: int) -> None:
        self.changes.append(steps)

    def after_batch(self, steps: int, within: int, task: int, *, last: bool) -> None:
        if not self.full or self.joint:
            return
        if within not in CURVE_STEPS and within % CURVE_EVERY and not last:
            return
        self.steps.append(steps)
        for name, points in self.curves.items():
            with self._weights(name) as model:
                points.append(self.evaluate(model, 0, task, "few"))

    def end_task(self, task: int) -> None:
        task = self.tasks - 1 if self.joint else task
        first = 0 if self.full or task + 1 == self.tasks else task
        for name, rows in self.found.items():
            with self._weights(name) as model:
                rows.append((task, first, self.evaluate(model, first, task)))

    def results(self) -> dict[str, Any]:
        read_outs = {}
        for name, rows in self.found.items():
            read_outs[name] = {reading: self._matrix(rows, reading) for reading in READINGS}
        for alias, name in self.learner.aliases.items():
            read_outs[alias] = read_outs[name]
        result: dict[str, Any] = {"read_outs": read_outs}
        if self.full and not self.joint:
            result["changes"], result["curve_steps"] = self.changes, self.steps
            result["curves"] = {}
            for name, points in self.curves.items():
                pairs = [point.cpu().tolist() for point in points]
                result["curves"][name] = {
                    reading: [[round(pair[place], 4) for pair in point] for point in pairs]
                    for place, reading in enumerate(READINGS)
                }
            for alias, name in self.learner.aliases.items():
                result["curves"][alias] = result["curves"][name]
        return result

    def _matrix(self, rows: list[tuple[int, int, Tensor]], reading: str) -> list[list[Any]]:
        found: list[list[Any]] = [[None] * self.tasks for _ in range(self.tasks)]
        place = READINGS.index(reading)
        for task, first, accuracies in rows:
            values = [round(value, 6) for value in accuracies[:, place].tolist()]
            found[task][first : task + 1] = values
        return found
