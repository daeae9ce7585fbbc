"""Meta updates of ``mode="explicit"``: through real steps, to the validation loss after them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from . import learned
from . import unroll as unrolled

if TYPE_CHECKING:
    from ..deep_nested import DeepNestedOptimizer


class ExplicitUpdates:
    """What ``DeepNestedOptimizer`` has for them."""

    param_groups: list[dict[str, Any]]
    #: The model that :meth:`meta_update` unrolls, and its loss; not saved with the state.
    model: nn.Module | None
    loss_fn: Callable[[nn.Module, Any], Tensor] | None
    last_meta_loss: Tensor | None
    controller_grad_norm: Tensor
    _batches: deque[Any]

    def observe_batch(self, batch: Any) -> None:
        """Keep a training batch for :meth:`meta_update`; the last ``k_unroll`` are kept.

        They are held as they are and not saved with the state: after resuming, meta updates by
        ``val_batch_fn`` begin when as many have come again.
        """
        self._batches.append(batch)
        while len(self._batches) > self.param_groups[0]["k_unroll"]:
            self._batches.popleft()

    def _scheduled_meta_update(self, val_batch_fn: Callable[[], Any]) -> None:
        # Fewer batches than an unroll needs are on their way: at the start, and after resuming.
        if not 0 < len(self._batches) < self.param_groups[0]["k_unroll"]:
            self.meta_update(val_batch_fn())

    @torch._disable_dynamo
    def meta_update(
        self,
        val_batch: Any,
        train_batches: Iterable[Any] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> Tensor:
        """Unroll real steps, and descend on the validation loss after them in all learned weights.

        Steps of this optimizer are taken on copies, one per training batch, from where training
        stands. Parameters, gradients, optimizer state, buffers and random number generators are
        left as they are. See :mod:`nested_optim.meta.unroll` for what a model must bear.

        Args:
            val_batch: what the loss after the steps is taken of.
            train_batches: a batch per step; None takes those of :meth:`observe_batch`, of which
                there must be ``k_unroll``.
            loss_fn: ``loss_fn(model, batch)`` gives a loss; None takes the constructor's, or
                without one the ``loss`` of what the model returns.

        Returns:
            The validation loss after the steps, 0-d.

        Raises:
            RuntimeError: there is no model, there are too few batches, or the model or its loss
                cannot be unrolled. Nothing has changed.
        """
        first = self.param_groups[0]
        if first["mode"] != "explicit":
            raise RuntimeError(
                "meta_update() is for mode='explicit'; in mode='simple' the optimizer learns in "
                "step()"
            )
        batches = list(self._batches if train_batches is None else train_batches)
        if train_batches is None and len(batches) < first["k_unroll"]:
            raise RuntimeError(
                f"meta_update() unrolls {first['k_unroll']} steps, but {len(batches)} batches have "
                "been seen: call observe_batch() at each step, or pass train_batches="
            )
        if not learned.modules(first):
            raise RuntimeError(
                "there is nothing to learn: switch learn_lr, learn_momentum or learn_mixing on"
            )
        loss, grads = unrolled.meta_gradient(
            cast("DeepNestedOptimizer", self),
            val_batch,
            batches,
            loss_fn or self.loss_fn,
            first["unroll"],
        )
        learned.gather(first, grads)
        self.controller_grad_norm = learned.meta_step(first, 1, "adam")
        self.last_meta_loss = loss
        return loss
