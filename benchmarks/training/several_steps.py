"""The nested trainer of ``one_step.py``, looking several steps ahead.

One step looks one step ahead: it knows nothing of what a choice does later, and so prefers small
learning rates that lower the present loss (short-horizon bias, Wu et al. 2018). Hence the options:

- *multi-step*: give ``step`` several batches, and the loss after all of them is what is followed;
- *truncated*: ``truncate=t`` follows the last ``t`` of them only, at the cost of those;
- *checkpointed*: ``checkpointed=True`` keeps only the state between steps and recomputes one step
  at a time on the way back: the same gradient, with the memory of one step's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchopt.pytree import tree_leaves

from .one_step import Batch, Carry, MetaNetwork, OneStepTrainer, detached


class NestedTrainer(OneStepTrainer):
    """Trains a model by steps whose learning rate and momentum a network chooses and learns.

    Args:
        model: any module without running statistics. Its own parameters stay as they are until
            :meth:`write_back`.
        loss_fn: ``loss_fn(model(inputs), targets)``, positive.
        network: the meta-network.
        meta_lr: of the optimizer that trains the network; with 0 the numbers stay as they are.
        truncate: follow the last so many steps of an unroll only; None for all.
        checkpointed: recompute steps on the way back instead of keeping their graphs.

    Raises:
        ValueError: running statistics, or a number of steps below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Tensor], Tensor],
        network: MetaNetwork,
        meta_lr: float = 1e-2,
        *,
        truncate: int | None = None,
        checkpointed: bool = False,
    ) -> None:
        if truncate is not None and truncate < 1:
            raise ValueError(f"truncate is a number of steps, at least 1, or None, not {truncate}")
        super().__init__(model, loss_fn, network, meta_lr)
        self.truncate, self.checkpointed = truncate, checkpointed

    def observe(self, carry: Carry, batch: Batch) -> Any:
        """As one step does, but differentiable in a carry that has a history of its own."""
        params, state = carry
        if not any(p.requires_grad for p in params.values()):
            return super().observe(carry, batch)
        loss = self.loss(params, batch)
        found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        grads = dict(zip(params, found))
        return loss, grads, self.statistics(loss, grads, params, state)

    def gradient(
        self, batches: Sequence[Batch], meta_batch: Batch
    ) -> tuple[Tensor, list[Tensor], Carry, dict[str, Tensor]]:
        """The loss after a step on each batch, its gradient in the network's weights, the carry."""
        first = len(batches) - min(self.truncate or len(batches), len(batches))
        metrics: dict[str, Tensor] = {}
        carry, starts = self.carry, []
        for i, batch in enumerate(batches):
            if self.checkpointed or i <= first:
                carry = detached(carry)
            starts.append(carry)
            carry, metrics = self.inner_step(carry, batch)
        if self.checkpointed:
            loss, grads = self._gradient_backwards(
                starts[first:], batches[first:], carry, meta_batch
            )
        else:
            loss = self.loss(carry[0], meta_batch)
            grads = list(torch.autograd.grad(loss, list(self.network.parameters())))
        return loss.detach(), grads, detached(carry), metrics

    def _gradient_backwards(
        self, starts: list[Carry], batches: Sequence[Batch], end: Carry, meta_batch: Batch
    ) -> tuple[Tensor, list[Tensor]]:
        """The same gradient from the carries alone, one recomputed step after the other."""
        weights = list(self.network.parameters())
        total = [torch.zeros_like(weight) for weight in weights]
        moving = [t.requires_grad for t in tree_leaves(end)]  # the rest counts steps
        given = detached(end)
        loss = self.loss({k: p.requires_grad_() for k, p in given[0].items()}, meta_batch)
        inputs = [t.requires_grad_() for t, moves in zip(tree_leaves(given), moving) if moves]
        back = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        for k, (start, batch) in reversed(list(enumerate(zip(starts, batches)))):
            given = detached(start)
            inputs = [t for t, moves in zip(tree_leaves(given), moving) if moves and k]
            for tensor in inputs:
                tensor.requires_grad_()
            after = tree_leaves(self.inner_step(given, batch)[0])
            found = torch.autograd.grad(
                [t for t, moves in zip(after, moving) if moves],
                [*inputs, *weights],
                back,
                allow_unused=True,
                materialize_grads=True,
            )
            back = found[: len(inputs)]
            total = [a + b for a, b in zip(total, found[len(inputs) :])]
        return loss, total

    def step(self, batches: Sequence[Batch], meta_batch: Batch) -> dict[str, Tensor]:
        """Train the model on each batch of a list, and the network on the loss that they lead to.

        Returns:
            ``meta_loss``; of the last batch ``loss`` (before its step), ``lr``, ``momentum``.
        """
        loss, grads, carry, metrics = self.gradient(batches, meta_batch)
        for weight, grad in zip(self.network.parameters(), grads):
            weight.grad = grad
        self.meta_optimizer.step()
        self.carry = carry
        return {"meta_loss": loss, **metrics}
