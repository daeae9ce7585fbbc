"""What is trained from a learning rate that is wrong.

For a CPU, and without a file: the demo's MLP on scikit-learn's digits, and a small language model
on the source files of Python's standard library. For a GPU: the models that ``training compare``
trains, on the same bytes and on CIFAR-100.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..demo.stream import build_model
from ..gradients import Gradients
from . import data, digits, run
from .models import VOCABULARY, Transformer

LENGTH, BATCH, WIDTH, LAYERS = 64, 16, 64, 2
VALIDATION_BATCHES, VALIDATION_SEED = 8, 999
#: Of the models for a GPU, see ``run.SIZES``.
LARGE = "small"
#: Added to a run's seed for draws of its own.
FRESH = 10_000


@dataclass(frozen=True)
class Setting:
    """Where the tasks for a GPU run, and where their data has been saved for workers."""

    device: str = "cpu"
    saved: str = ""


@dataclass(frozen=True)
class Trial:
    """A task from one seed.

    Attributes:
        model: what is trained.
        next_gradient: puts the next training batch's gradient into the parameters' ``grad``, in
            place of what was there, and returns its loss: a tensor that the next call may write
            over.
        figures: numbers at the end, among them the losses that the task's ``measures`` names.
        layers: the model's parameters, a list for each layer.
        fresh: a training batch that no step has taken, from draws of its own.
        loss_of: ``(model, batch)``, the training loss of what ``fresh`` gives.
    """

    model: nn.Module
    next_gradient: Callable[[], Tensor]
    figures: Callable[[], dict[str, float]]
    layers: list[list[nn.Parameter]]
    fresh: Callable[[], Any]
    loss_of: Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its batches, and what is measured at the end.

    Attributes:
        steps: how many, if nobody says otherwise.
        lrs: AdamW's learning rate is chosen from these.
        begin: ``(seed, setting) -> Trial``.
        measures: the losses that methods are compared by; choices are made by the first.
        batch: samples per step.
        kind: what of ``run.SIZES`` it is, for a task that wants a GPU.
    """

    label: str
    steps: int
    lrs: tuple[float, ...]
    begin: Callable[[int, Setting], Trial]
    measures: tuple[str, ...]
    batch: int
    kind: str = ""


def _each(model: nn.Module, losses: Iterator[Tensor]) -> Callable[[], Tensor]:
    """``Trial.next_gradient`` of the losses of one batch after another."""

    def next_gradient() -> Tensor:
        loss = next(losses)
        model.zero_grad()
        loss.backward()
        return loss.detach()

    return next_gradient


def _digits(seed: int, setting: Setting) -> Trial:
    model = build_model(seed)
    layers = [list(module.parameters()) for module in model if isinstance(module, nn.Linear)]
    figures = functools.partial(_digit_figures, model, seed)
    train, _ = digits.whole(seed)
    fresh = functools.partial(next, digits.batches(train, seed + FRESH))
    losses = (_digit_loss(model, batch) for batch in digits.batches(train, seed))
    return Trial(model, _each(model, losses), figures, layers, fresh, _digit_loss)


def _digit_loss(model: nn.Module, batch: digits.Batch) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


@torch.no_grad()
def _digit_figures(model: nn.Module, seed: int) -> dict[str, float]:
    train, test = digits.whole(seed)
    found = digits.figures(model, train, test)
    of_test = digits.figures(model, test, test)
    return {
        "training loss": found["loss"],
        "test loss": of_test["loss"],
        "accuracy": found["accuracy"],
    }


@functools.cache
def source() -> data.Text:
    return data.text(None)


def _bytes(seed: int, setting: Setting) -> Trial:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(WIDTH, LAYERS, 2, LENGTH, VOCABULARY)
    figures = functools.partial(_text_figures, model)
    fresh = functools.partial(next, _texts(source().train, seed + FRESH, BATCH))
    losses = (_text_loss(model, batch) for batch in _texts(source().train, seed, BATCH))
    return Trial(model, _each(model, losses), figures, _layers(model), fresh, _text_loss)


def _text_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def _texts(of: Tensor, seed: int, batch: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield data.windows(of, LENGTH + 1, data.starts(of, LENGTH + 1, batch, generator))


@torch.no_grad()
def _text_figures(model: nn.Module) -> dict[str, float]:
    batches = _texts(source().validation, VALIDATION_SEED, 4 * BATCH)  # the same for every run
    losses = [_text_loss(model, next(batches)) for _ in range(VALIDATION_BATCHES)]
    loss = float(torch.stack(losses).mean())
    return {"validation loss": loss if loss < digits.DIVERGED else digits.DIVERGED}


def _layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """A list for each block, and one for the rest."""
    blocks = model.blocks if isinstance(model, Transformer) else model.children()
    inside = [list(block.parameters()) for block in blocks]
    known = {id(p) for block in inside for p in block}
    found = [[p for p in model.parameters() if id(p) not in known], *inside]
    return [layer for layer in found if layer]


def _large(kind: str, seed: int, setting: Setting) -> Trial:
    job = run.Job(kind, LARGE, "", "adamw", 0.0, 0.0, seed)
    with torch.random.fork_rng():
        task = run.Task(job, run.load(setting.saved, setting.device), torch.device(setting.device))
    gradients = Gradients(task.model, task.loss_of, task.size.batch, task.device, adds=False)
    drawn = task.drawn()

    def next_gradient() -> Tensor:
        return gradients.add(next(drawn))

    def figures() -> dict[str, float]:
        found = task.held_out(1)
        loss = found.pop("loss")
        return {"validation loss": loss if loss < digits.DIVERGED else digits.DIVERGED, **found}

    others = torch.Generator().manual_seed(seed + FRESH)

    def fresh() -> Tensor:
        return task.draw(others).to(task.device)

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        return task.loss_of(batch)  # of the same model

    return Trial(task.model, next_gradient, figures, _layers(task.model), fresh, loss_of)


def _large_task(label: str, kind: str) -> Task:
    size = run.SIZES[kind][LARGE]
    return Task(
        label,
        size.steps,
        (1e-4, 3e-4, 1e-3, 3e-3, 6e-3),
        functools.partial(_large, kind),
        ("validation loss",),
        size.batch,
        kind,
    )


TASKS = {
    "digits": Task(
        "MLP on digits",
        500,
        (1e-3, 3e-3, 1e-2, 3e-2),
        _digits,
        ("training loss", "test loss"),
        digits.BATCH_SIZE,
    ),
    "lm": Task(
        "byte-level transformer on Python's source",
        1000,
        (1e-3, 2e-3, 3e-3, 6e-3),
        _bytes,
        ("validation loss",),
        BATCH,
    ),
    "lm-large": _large_task("byte-level transformer of 11M parameters", "lm"),
    "vit": _large_task("small ViT on CIFAR-100", "vit"),
    "resnet": _large_task("small ResNet on CIFAR-100", "resnet"),
}
#: What runs if no task is named.
DEFAULTS = ("digits", "lm")
