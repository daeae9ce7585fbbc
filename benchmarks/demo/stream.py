"""The stream: scikit-learn's 8x8 digits, first 0-4, then 5-9, no replay, one head for all ten."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

TASKS = (range(0, 5), range(5, 10))
TASK_NAMES = ("digits 0-4", "digits 5-9")
WIDTHS = (64, 128, 64, 10)
TEST_SHARE = 0.3
VALIDATION_SHARE = 0.2
# One test set for every seed: seeds vary what is trained on, never what is reported on, so that a
# learning rate chosen on validation digits has not seen a single test digit.
TEST_SPLIT_SEED = 0


@dataclass(frozen=True)
class Samples:
    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Stream:
    """Each part holds one ``Samples`` per task."""

    train: tuple[Samples, ...]
    validation: tuple[Samples, ...]
    test: tuple[Samples, ...]


@functools.cache
def make_stream(seed: int) -> Stream:
    """The digits split by task; ``seed`` draws the validation digits, stratified by class."""
    images, digits = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 16, dtype=torch.float32)
    labels = torch.tensor(digits, dtype=torch.int64)

    def split(indices: Tensor, share: float, split_seed: int) -> tuple[Tensor, Tensor]:
        kept, taken = train_test_split(
            indices.numpy(),
            test_size=share,
            stratify=labels[indices].numpy(),
            random_state=split_seed,
        )
        return torch.from_numpy(kept), torch.from_numpy(taken)

    def by_task(indices: Tensor) -> tuple[Samples, ...]:
        parts = []
        for task in TASKS:
            here = (labels[indices] >= task.start) & (labels[indices] < task.stop)
            parts.append(Samples(inputs[indices[here]], labels[indices[here]]))
        return tuple(parts)

    rest, test = split(torch.arange(len(labels)), TEST_SHARE, TEST_SPLIT_SEED)
    train, validation = split(rest, VALIDATION_SHARE, seed)
    return Stream(by_task(train), by_task(validation), by_task(test))


def batches(
    stream: Stream, seed: int, steps_per_task: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The tasks one after the other, each from reshuffled epochs cut after ``steps_per_task``."""
    generator = torch.Generator().manual_seed(seed)
    for task in stream.train:
        needed, size = steps_per_task * batch_size, len(task.labels)
        epochs = -(-needed // size)
        order = torch.cat([torch.randperm(size, generator=generator) for _ in range(epochs)])
        for chosen in order[:needed].split(batch_size):
            yield task.inputs[chosen], task.labels[chosen]


def build_model(seed: int) -> nn.Sequential:
    """An MLP whose start depends on ``seed`` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(WIDTHS):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


@torch.no_grad()
def accuracies(
    model: nn.Module, tasks: tuple[Samples, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Accuracy on each task, read twice from the same logits.

    Returns:
        with the task known (only its own five logits compete: task-IL), and with the task unknown
        (all ten compete: class-IL).
    """
    known, unknown = [], []
    for classes, samples in zip(TASKS, tasks, strict=True):
        logits = model(samples.inputs)
        unknown.append(_share_right(logits.argmax(1), samples.labels))
        own = logits[:, classes.start : classes.stop]
        known.append(_share_right(own.argmax(1) + classes.start, samples.labels))
    return tuple(known), tuple(unknown)


def _share_right(predicted: Tensor, labels: Tensor) -> float:
    # Counted in integers: a mean in float32 would round.
    return int((predicted == labels).sum()) / len(labels)
