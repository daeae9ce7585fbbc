"""Small networks whose weights are one flat tensor, and which begin as a constant, exactly."""

from __future__ import annotations

import functools
import math
import random
from itertools import pairwise

import torch
from torch import Tensor

#: What networks' outputs are multiplied by. A meta learning rate of 1e-4, which moves weights of
#: order 0.1, then changes outputs of order 1 within hundreds of steps.
GAIN = 16.0


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which networks of this size are computed: float64 where there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


def sizes(inputs: int, hidden: int, outputs: int, layers: int) -> list[tuple[int, int]]:
    """(rows, columns) of each layer's matrix, its last column the bias."""
    widths = [inputs, *[hidden] * layers, outputs]
    return [(rows, columns + 1) for columns, rows in pairwise(widths)]


def size(inputs: int, hidden: int, outputs: int, layers: int) -> int:
    """How many weights there are."""
    return sum(rows * columns for rows, columns in sizes(inputs, hidden, outputs, layers))


@functools.lru_cache(maxsize=16)
def _start(inputs: int, hidden: int, outputs: int, layers: int) -> Tensor:
    # Python's generator: its numbers are the same in every release, and nobody else's are used up.
    generator = random.Random(0)
    values = []
    for rows, columns in sizes(inputs, hidden, outputs, layers):
        bound = 1 / math.sqrt(columns)
        values += [generator.uniform(-bound, bound) for _ in range(rows * columns)]
    return torch.tensor(values, dtype=torch.float32)


@functools.lru_cache(maxsize=64)
def start_on(
    inputs: int, hidden: int, outputs: int, layers: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The same, kept for all who ask: not to be written to."""
    return _start(inputs, hidden, outputs, layers).to(device, dtype)


def initial(inputs: int, hidden: int, outputs: int, layers: int) -> Tensor:
    """The flat float32 weights that a network begins with, the same on every machine."""
    return _start(inputs, hidden, outputs, layers).clone()


def mlp(weights: Tensor, features: Tensor, hidden: int, outputs: int, layers: int) -> Tensor:
    """A tanh network's outputs less those of its start, times GAIN: 0 until a weight has moved.

    So an output begins as a constant while the gradients of all weights are there from the first
    step on, which a last layer of zeros would give to that layer only.

    Args:
        weights: flat, as :func:`initial` laid them out, of the features' dtype.
        features: ``(rows, inputs)``.
        hidden: units in each hidden layer.
        outputs: how many.
        layers: hidden layers.

    Returns:
        ``(rows, outputs)``.
    """
    inputs = features.shape[-1]
    start = start_on(inputs, hidden, outputs, layers, weights.device, weights.dtype)
    shapes = sizes(inputs, hidden, outputs, layers)
    return GAIN * (_forward(weights, features, shapes) - _forward(start, features, shapes))


def _forward(weights: Tensor, x: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    at = 0
    for i, (rows, columns) in enumerate(shapes):
        matrix = weights[at : at + rows * columns].view(rows, columns)
        at += rows * columns
        x = torch.addmm(matrix[:, -1], x, matrix[:, :-1].t())
        if i < len(shapes) - 1:
            x = torch.tanh(x)
    return x


def bounded(x: Tensor, low: float | Tensor, high: float) -> Tensor:
    """A smooth map of all numbers into (low, high) with 0 at 0 and slope 1 there; low < 0 < high.

    A clamp has no gradient beyond its bounds, and a sigmoid's or tanh's is soon rounded to 0. The
    slope of x / sqrt(1 + x^2) falls as 1 / x^3, which leaves a way back.
    """
    bound = torch.where(x < 0, -low, high)
    return x / torch.sqrt(1 + (x / bound).square())
