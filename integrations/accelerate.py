"""Our optimizers behind Accelerate's wrapper: their methods, and the loss of a whole step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .optimizers import observe_loss

try:
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise ImportError(
        "this module needs Accelerate: `pip install accelerate` (or 'nested_optim[hf]')"
    ) from error


class ExposedOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """Accelerate's wrapper, with all that the optimizer has and the wrapper does not.

    What Accelerate defines (``step``, ``zero_grad``, ``state_dict``) stays its own; hooks that are
    registered here are the optimizer's.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # half-built or unpickled
        return getattr(self.optimizer, name)


def expose(optimizer: AcceleratedOptimizer) -> AcceleratedOptimizer:
    """Let a prepared optimizer answer for all methods of the optimizer inside it.

    ``accelerator.prepare`` returns a wrapper that hides what torch's optimizers do not have:
    ``flush()``, ``metrics()``, ``meta_update()``, ``register_meta_update_hook()``. After
    ``optimizer = expose(optimizer)`` they work; ``step`` still does what Accelerate does.

    Returns:
        The same object, which the Accelerator goes on knowing.

    Raises:
        TypeError: not a prepared optimizer, or one of DeepSpeed, which flattens parameters.
    """
    if type(optimizer) is not ExposedOptimizer:
        if "DeepSpeed" in type(optimizer).__name__:
            raise TypeError(
                "DeepSpeed's ZeRO flattens parameters: the names, shapes and state of each, which "
                "these optimizers work with, are gone. Shard with FSDP2, or replicate with DDP"
            )
        if type(optimizer) is not AcceleratedOptimizer:
            raise TypeError(
                "expose() takes what accelerator.prepare() made of an optimizer, but got "
                f"{type(optimizer).__name__}"
            )
        optimizer.__class__ = ExposedOptimizer
    return optimizer


class StepLoss:
    """Tells an optimizer the loss of each whole step: over micro-batches, and over ranks.

    Call it with the loss of every batch, between ``backward`` and ``step``::

        step_loss = StepLoss(accelerator, optimizer)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model, batch)
                accelerator.backward(loss)
                step_loss(loss)
                optimizer.step()
                optimizer.zero_grad()

    Args:
        accelerator: says which batch is a step's last.
        optimizer: prepared or not; it needs a method ``observe_loss`` (see
            :func:`~nested_optim.integrations.optimizers.observe_loss`).
        required: whether to raise for an optimizer that takes no loss. Default True.

    Raises:
        TypeError: the optimizer takes no loss.
    """

    def __init__(self, accelerator: Any, optimizer: Any, *, required: bool = True) -> None:
        self.accelerator, self.optimizer = accelerator, optimizer
        self._losses: list[Tensor] = []
        self._takes = observe_loss(optimizer, None, required=required)

    def __call__(self, loss: Tensor) -> None:
        """Note a batch's undivided loss; at a step's last batch the optimizer is told the mean."""
        if not self._takes:
            return
        if getattr(self.optimizer, "step_was_skipped", False):
            observe_loss(self.optimizer, None)
        self._losses.append(loss.detach().reshape(()))
        if self.accelerator.sync_gradients:
            losses, self._losses = self._losses, []
            observe_loss(self.optimizer, torch.stack(losses).mean())
