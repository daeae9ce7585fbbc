"""Optimizers behind the wrappers of training libraries, and what trainers tell them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .random_state import ranked

#: Packages whose optimizer classes wrap another one, in their attribute ``optimizer``.
_WRAPPERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer itself, behind the wrappers of Accelerate, Lightning and Fabric.

    Optimizers that wrap another one themselves are returned as they are: their methods are what
    the user chose.

    Raises:
        TypeError: no ``torch.optim.Optimizer``.
    """
    found = optimizer
    while any(cls.__module__.split(".")[0] in _WRAPPERS for cls in type(found).__mro__):
        inner = getattr(found, "optimizer", None)
        if inner is None or inner is found:
            break
        found = inner
    if not isinstance(found, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, but got {type(optimizer).__name__}")
    return found


def observe_loss(optimizer: Any, loss: Tensor | float | None, *, required: bool = True) -> bool:
    """Tell an optimizer the loss of the step that it is about to take.

    For optimizers with a method ``observe_loss(loss)``, which keep the loss for their next step and
    forget it after that step. The loss is that of the whole step: the mean over accumulated
    micro-batches. Here it is averaged over the ranks, if ``torch.distributed`` is initialised, so
    that all of them take the same step; every rank must call this.

    Args:
        optimizer: the optimizer, or a wrapper around it.
        loss: one number, or a tensor of one element. None withdraws a loss that no step has used,
            which is for a step that was skipped: a loss must not serve a later step.
        required: whether to raise for an optimizer that does not take a loss.

    Returns:
        Whether the optimizer takes losses.

    Raises:
        TypeError: the optimizer does not take losses, or the loss is no number.
    """
    base = unwrap_optimizer(optimizer)
    observe = getattr(base, "observe_loss", None)
    if observe is None:
        if required:
            raise TypeError(
                f"{type(base).__name__} does not take a loss: it has no method observe_loss(). "
                "Leave the call out, or pass required=False to pass over such optimizers"
            )
        return False
    device = base.param_groups[0]["params"][0].device
    observe(None if loss is None else mean_over_ranks(loss, device))
    return True


def mean_over_ranks(loss: Tensor | float, device: torch.device) -> Tensor:
    """The loss as a 0-d float tensor of its own, averaged over the ranks where there are some.

    ``device``: where the ranks' backend reduces.
    """
    if not isinstance(loss, (Tensor, float, int)) or isinstance(loss, bool):
        raise TypeError(f"a loss is a number or a tensor of one element, but got {loss!r}")
    value = torch.as_tensor(loss).detach()
    if value.numel() != 1 or value.is_complex():
        raise TypeError(f"a loss has one real element, but got a tensor of {tuple(value.shape)}")
    value = value.reshape(()).to(torch.promote_types(value.dtype, torch.float32), copy=True)
    if ranked():
        value = value.to(device)
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def logged_metrics(optimizer: Any, prefix: str = "nested") -> dict[str, float]:
    """What ``optimizer.metrics()`` says, under names for a logger; empty for optimizers without it.

    ``lr_multiplier/body`` becomes ``nested/lr_multiplier_body``: loggers take what is before the
    slash for a section.
    """
    metrics = getattr(unwrap_optimizer(optimizer), "metrics", None)
    found = metrics() if metrics is not None else {}
    return {f"{prefix}/{key.replace('/', '_')}": float(value) for key, value in found.items()}
