"""A plain PyTorch training loop. It takes any optimizer and knows nothing of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    accumulate: int = 1,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train on ``batches`` and return the loss of each.

    Args:
        model: any classifier.
        optimizer: any torch optimizer of its parameters.
        batches: inputs and labels.
        accumulate: batches per optimizer step, by gradient accumulation.
        after_step: called with the number of batches seen so far, after each.
    """
    losses = []
    optimizer.zero_grad()
    for step, (inputs, labels) in enumerate(batches, start=1):
        loss = F.cross_entropy(model(inputs), labels)
        (loss / accumulate).backward()
        if step % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if after_step is not None:
            after_step(step)
    return losses
