"""The optimizers that are compared. All get the same lr grid, weights, batches and loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nested_optim import NestedOptimizer, WeightMemory

# Gradients per update of the three linear layers, from input to output: shallow slowest. With the
# demo's 256 steps per task even the slowest layer updates 16 times per task.
FREQUENCIES = (16, 4, 1)
ACCUMULATE = 4


@dataclass(frozen=True)
class Method:
    key: str
    label: str
    name: str  # within a sentence
    colour: str
    make: Callable[[nn.Sequential, float], torch.optim.Optimizer]
    accumulate: int = 1


def linear_layers(model: nn.Sequential) -> list[nn.Linear]:
    return [module for module in model if isinstance(module, nn.Linear)]


def adamw(model: nn.Sequential, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def nested(model: nn.Sequential, lr: float) -> torch.optim.Optimizer:
    return NestedOptimizer(model.parameters(), lr=lr)


def adamw_divided_lr(model: nn.Sequential, lr: float) -> torch.optim.Optimizer:
    """The control of the three levels: every step moves every layer, the slow ones 1/f as far."""
    groups: list[dict[str, Any]] = [
        {"params": list(layer.parameters()), "lr": lr / frequency}
        for layer, frequency in zip(linear_layers(model), FREQUENCIES, strict=True)
    ]
    return torch.optim.AdamW(groups, lr=lr)


def nested_levels(model: nn.Sequential, lr: float) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": list(layer.parameters()), "frequency": frequency}
        for layer, frequency in zip(linear_layers(model), FREQUENCIES, strict=True)
    ]
    return NestedOptimizer(groups, lr=lr)


def adamw_memory(model: nn.Sequential, lr: float) -> torch.optim.Optimizer:
    """Divided learning rates and slow copies that exchange with the weights, read as a mean."""
    optimizer = adamw_divided_lr(model, lr)
    WeightMemory(optimizer, preset="continual")
    return optimizer


# The colours of Okabe and Ito, told apart with any colour vision.
METHODS = (
    Method("adamw", "AdamW", "plain AdamW", "#000000", adamw),
    Method(
        "adamw_accumulation",
        f"AdamW, accumulation {ACCUMULATE}",
        "gradient accumulation",
        "#E69F00",
        adamw,
        ACCUMULATE,
    ),
    Method("adamw_divided_lr", "AdamW, lr / f", "per-layer lr / f", "#0072B2", adamw_divided_lr),
    Method(
        "adamw_memory",
        "AdamW, lr / f, WeightMemory",
        "a weight memory with lr / f",
        "#009E73",
        adamw_memory,
    ),
    Method("nested_levels", "NestedOptimizer, levels", "three levels", "#D55E00", nested_levels),
)
BY_KEY = {method.key: method for method in METHODS}
LEVELS = "/".join(map(str, FREQUENCIES))
