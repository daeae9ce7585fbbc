"""What is trained from a learning rate that is wrong: the demo's MLP, and a small language model.

Neither needs a file: scikit-learn's digits, and the source files of Python's standard library.
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
from . import data, digits
from .models import VOCABULARY, Transformer

LENGTH, BATCH, WIDTH, LAYERS = 64, 16, 64, 2
VALIDATION_BATCHES, VALIDATION_SEED = 8, 999


@dataclass(frozen=True)
class Task:
    """A model, its batches, and what is measured at the end.

    Attributes:
        lrs: AdamW's learning rate is chosen from these.
        build: ``(seed) -> model``.
        losses: ``(model, seed) -> an endless iterator of losses`` of the next training batch each.
        figures: ``(model, seed) -> numbers``, among them the losses that ``measures`` names.
        measures: the losses that methods are compared by; choices are made by the first.
        layers: the model's parameters, a list for each layer.
    """

    label: str
    steps: int
    lrs: tuple[float, ...]
    build: Callable[[int], nn.Module]
    losses: Callable[[nn.Module, int], Iterator[Tensor]]
    figures: Callable[[nn.Module, int], dict[str, float]]
    measures: tuple[str, ...]
    layers: Callable[[Any], list[list[nn.Parameter]]]


def _digit_losses(model: nn.Module, seed: int) -> Iterator[Tensor]:
    train, _ = digits.whole(seed)
    for inputs, labels in digits.batches(train, seed):
        yield F.cross_entropy(model(inputs), labels)


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


def _linear_layers(model: nn.Sequential) -> list[list[nn.Parameter]]:
    return [list(module.parameters()) for module in model if isinstance(module, nn.Linear)]


@functools.cache
def source() -> data.Text:
    return data.text(None)


def _transformer(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(WIDTH, LAYERS, 2, LENGTH, VOCABULARY)


def _next_bytes(model: nn.Module, of: Tensor, generator: torch.Generator, batch: int) -> Tensor:
    found = data.windows(of, LENGTH + 1, batch, generator)
    return F.cross_entropy(model(found[:, :-1]).flatten(0, 1), found[:, 1:].flatten())


def _text_losses(model: nn.Module, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield _next_bytes(model, source().train, generator, BATCH)


@torch.no_grad()
def _text_figures(model: nn.Module, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(VALIDATION_SEED)  # the same bytes for every run
    losses = [
        _next_bytes(model, source().validation, generator, 4 * BATCH)
        for _ in range(VALIDATION_BATCHES)
    ]
    loss = float(torch.stack(losses).mean())
    return {"validation loss": loss if loss < digits.DIVERGED else digits.DIVERGED}


def _blocks(model: Transformer) -> list[list[nn.Parameter]]:
    inside = [list(block.parameters()) for block in model.blocks]
    known = {id(p) for block in inside for p in block}
    return [[p for p in model.parameters() if id(p) not in known], *inside]


TASKS = {
    "digits": Task(
        "MLP on digits",
        500,
        (1e-3, 3e-3, 1e-2, 3e-2),
        build_model,
        _digit_losses,
        _digit_figures,
        ("training loss", "test loss"),
        _linear_layers,
    ),
    "lm": Task(
        "byte-level transformer on Python's source",
        1000,
        (1e-3, 2e-3, 3e-3, 6e-3),
        _transformer,
        _text_losses,
        _text_figures,
        ("validation loss",),
        _blocks,
    ),
}
