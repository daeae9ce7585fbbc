"""The stream of one run: which classes are which task, and which samples are in which batch.

All of it depends on the seed alone, never on the method, and is known before training begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data import Dataset

VALIDATION_SHARE = 0.1
Indices = NDArray[np.int64]
# One generator for each purpose, so that replay, say, does not change the order of new samples.
_CLASS_ORDER, _SAMPLE_ORDER, _RESERVOIR, _HOLD_OUT = range(4)


def _generator(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng((seed, purpose))


@dataclass(frozen=True)
class Stream:
    """Tasks in order. Labels are renamed to their place in it: task t has the t-th range.

    Attributes:
        classes: each task's classes as the data set numbers them.
        train_labels: of all training samples of the data set, renamed.
        train: of each task, the indices of its training samples.
        test_inputs, test_labels, test_tasks: what accuracies are measured on; labels renamed.
    """

    classes: tuple[tuple[int, ...], ...]
    train_inputs: Tensor
    train_labels: Tensor
    train: tuple[Indices, ...]
    test_inputs: Tensor
    test_labels: Tensor
    test_tasks: Tensor

    @property
    def class_tasks(self) -> Tensor:
        """The task of each renamed class."""
        sizes = torch.tensor([len(c) for c in self.classes])
        return torch.repeat_interleave(torch.arange(len(self.classes)), sizes)


def make_stream(data: Dataset, seed: int, *, selection: bool = False) -> Stream:
    """Draw the order of the classes (or of the tasks, where the data fixes their classes).

    Args:
        selection: measure on validation samples instead of test samples. Where the data set has
            none of its own, a tenth of each class's training samples serves and is not trained on.
    """
    order = _generator(seed, _CLASS_ORDER)
    if data.groups is not None:
        classes = tuple(data.groups[i] for i in order.permutation(len(data.groups)))
    else:
        drawn = order.permutation(data.classes).reshape(data.tasks, data.classes_per_task)
        classes = tuple(tuple(int(c) for c in row) for row in drawn)
    renamed = torch.empty(data.classes, dtype=torch.int64)
    renamed[torch.tensor([c for task in classes for c in task])] = torch.arange(data.classes)
    labels = renamed[data.train[1]]
    inputs = data.train[0]
    pool = np.arange(len(labels))
    measured = data.test
    if selection:
        if data.validation is not None:
            measured = data.validation
        else:
            held_out = _hold_out(data.train[1].numpy(), seed)
            measured = (inputs[held_out], data.train[1][held_out])
            pool = np.setdiff1d(pool, held_out)
    task_of = torch.repeat_interleave(
        torch.arange(len(classes)), torch.tensor([len(c) for c in classes])
    )
    of_pool = task_of[labels].numpy()[pool]
    test_labels = renamed[measured[1]]
    return Stream(
        classes,
        inputs,
        labels,
        tuple(pool[of_pool == t] for t in range(len(classes))),
        measured[0],
        test_labels,
        task_of[test_labels],
    )


def _hold_out(labels: Indices, seed: int) -> Indices:
    generator = _generator(seed, _HOLD_OUT)
    parts = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(VALIDATION_SHARE * len(members)))
        parts.append(generator.choice(members, count, replace=False))
    return np.concatenate(parts)


class Reservoir:
    """A uniform sample of fixed size of everything offered so far (Vitter's algorithm R)."""

    def __init__(self, capacity: int, generator: np.random.Generator) -> None:
        self.capacity = capacity
        self.generator = generator
        self.seen = 0
        self.held: Any = np.empty(capacity, np.int64)

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def offer(self, samples: Indices) -> None:
        places = self.generator.integers(0, self.seen + 1 + np.arange(len(samples)))
        for sample, place in zip(samples, places):
            place = self.seen if self.seen < self.capacity else place
            if place < self.capacity:
                self.held[place] = sample
            self.seen += 1

    def draw(self, count: int) -> Indices:
        """Up to ``count`` of the samples held, all different."""
        chosen = self.generator.choice(len(self), min(count, len(self)), replace=False)
        drawn: Indices = self.held[chosen]
        return drawn


def plan(
    tasks: tuple[Indices, ...], seed: int, *, epochs: int, batch: int, replay: int = 0
) -> list[list[Indices]]:
    """The samples of every batch of every task.

    Each task is passed ``epochs`` times in fresh random orders. With replay, as many old samples as
    new ones (less while there are fewer) are appended to each batch, drawn from a reservoir of that
    size over all samples before; each sample is offered to it once, in its first pass.
    """
    order = _generator(seed, _SAMPLE_ORDER)
    reservoir = Reservoir(replay, _generator(seed, _RESERVOIR))
    planned = []
    for samples in tasks:
        batches = []
        for epoch in range(epochs):
            shuffled = order.permutation(samples)
            for start in range(0, len(shuffled), batch):
                new = shuffled[start : start + batch]
                batches.append(np.concatenate([new, reservoir.draw(batch)]) if replay else new)
                if replay and epoch == 0:
                    reservoir.offer(new)
        planned.append(batches)
    return planned
