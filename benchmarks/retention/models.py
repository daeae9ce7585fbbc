"""The networks: one head for all classes, no dropout, no statistics of batches.

Each is a ``Sequential`` whose numbered children are the depths that learning rates and windows are
divided by: shallow slowest.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

#: Divisors of the learning rate ("lr / f"), or frequencies of windows, by number of depths.
LEVELS = {5: (100, 30, 10, 3, 1), 3: (100, 10, 1)}
#: Windows short enough that the slowest level updates many times within a task.
SHORT_LEVELS = {5: (16, 8, 4, 2, 1), 3: (16, 4, 1)}
DEPTHS = {"mlp": 5, "conv": 5, "text": 3}
WIDTHS = {"mlp": (64, 128, 128, 128, 64), "text": (2048, 128, 128)}
CHANNELS = (3, 32, 64, 128, 128)  # at strides of 2: 32 pixels become 2
PIXELS = 2 * 2
GROUPS = 8


def describe(kind: str) -> str:
    if kind == "conv":
        widths = "-".join(map(str, CHANNELS[1:]))
        return f"4 convolutions 3x3, stride 2, of {widths} channels, GroupNorm({GROUPS}), ReLU"
    return "MLP " + "-".join(map(str, WIDTHS[kind])) + "-classes, ReLU"


def build(kind: str, classes: int, seed: int) -> nn.Sequential:
    """A network whose start depends on ``seed`` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "conv":
            blocks: list[nn.Module] = [_block(a, b) for a, b in itertools.pairwise(CHANNELS)]
            head = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS[-1] * PIXELS, classes))
            return nn.Sequential(*blocks, head)
        widths = (*WIDTHS[kind], classes)
        layers = itertools.chain.from_iterable(
            (nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)
        )
        return nn.Sequential(*list(layers)[:-1])


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.ReLU(),
    )
