"""A small network that chooses learning rate and momentum while the model trains: an example.

The model takes a step of SGD with momentum whose two numbers come from a *meta-network*, which sees
how training goes. The step is differentiable, so the loss *after* it has a gradient in the
meta-network's weights: "the next loss would have been lower had the learning rate been larger". The
meta-network follows that gradient with an optimizer of its own, the model keeps the step, and both
go on. Nothing is learnt in advance, and there is no second model.

    network = MetaNetwork(RICH, lr=0.01)
    trainer = NestedTrainer(model, F.cross_entropy, network)
    for batch, later_batch in pairs:  # each is (inputs, targets)
        metrics = trainer.step([batch], later_batch)
    trainer.write_back()  # the parameters, into the model

One step looks one step ahead: it knows nothing of what a choice does later, and so prefers small
learning rates that lower the present loss (short-horizon bias, Wu et al. 2018). Hence the options:

- *multi-step*: give ``step`` several batches, and the loss after all of them is what is followed;
- *truncated*: ``truncate=t`` follows the last ``t`` of them only, at the cost of those;
- *checkpointed*: ``checkpointed=True`` keeps only the state between steps and recomputes one step
  at a time on the way back: the same gradient, with the memory of one step's graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchopt.pytree import tree_leaves, tree_map

from nested_optim import NestedOptimizer, functional

Batch = tuple[Tensor, Tensor]
Carry = tuple[dict[str, Tensor], functional.LevelState]  # the parameters, the momentum's state

LOSS = ("loss",)
RICH = ("loss", "gradient", "parameters", "agreement")


class MetaNetwork(nn.Module):
    """Statistics of a step -> its learning rate and momentum.

    Args:
        statistics: what it sees: ``"loss"``, ``"gradient"``, ``"parameters"`` (logarithms of the
            loss and of two norms), ``"agreement"`` (the cosine of gradient and momentum).
        lr, momentum: what it says before it has learnt anything.
        reach: the learning rate stays within ``lr / reach`` and ``lr * reach``.
    """

    def __init__(
        self,
        statistics: Sequence[str] = LOSS,
        lr: float = 0.1,
        momentum: float = 0.9,
        reach: float = 100.0,
        hidden: int = 16,
    ) -> None:
        super().__init__()
        if unknown := set(statistics) - set(RICH):
            raise ValueError(f"unknown statistics {sorted(unknown)}: choose of {', '.join(RICH)}")
        self.statistics, self.lr = tuple(statistics), lr
        self.log_reach, self.logit = math.log(reach), math.log(momentum / (1 - momentum))
        self.body = nn.Sequential(nn.Linear(len(statistics), hidden), nn.Tanh())
        self.head = nn.Linear(hidden, 2)
        nn.init.zeros_(self.head.weight)  # says (lr, momentum), whatever it sees
        nn.init.zeros_(self.head.bias)

    def forward(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        faster, longer = self.head(self.body(statistics)).unbind()
        # Smooth bounds: a clamp would have no gradient where it holds.
        lr = self.lr * torch.exp(self.log_reach * torch.tanh(faster / self.log_reach))
        return lr, torch.sigmoid(self.logit + longer)


class NestedTrainer:
    """Trains a model by steps whose learning rate and momentum a network chooses and learns.

    Args:
        model: any module without running statistics. Its own parameters stay as they are until
            :meth:`write_back`.
        loss_fn: ``loss_fn(model(inputs), targets)``, positive.
        network: the meta-network.
        meta_lr: of the optimizer that trains the network; with 0 the numbers stay as they are.
        truncate: follow the last so many steps of an unroll only; None for all.
        checkpointed: recompute steps on the way back instead of keeping their graphs.
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
        self.model, self.loss_fn, self.network = model, loss_fn, network
        self.truncate, self.checkpointed = truncate, checkpointed
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.carry: Carry = (params, functional.momentum().init(params))
        self.meta_optimizer = NestedOptimizer(network.parameters(), lr=meta_lr, weight_decay=0.0)

    def loss(self, params: dict[str, Tensor], batch: Batch) -> Tensor:
        return self.loss_fn(functional_call(self.model, params, (batch[0],)), batch[1])

    def inner_step(self, carry: Carry, batch: Batch, metrics: dict[str, Tensor]) -> Carry:
        """One step of the model, differentiable in the network's weights and, where it has a
        history of its own, in the carry."""
        params, state = carry
        depends = any(p.requires_grad for p in params.values())
        given = params if depends else {k: p.detach().requires_grad_() for k, p in params.items()}
        loss = self.loss(given, batch)
        found = torch.autograd.grad(loss, list(given.values()), create_graph=depends)
        grads = dict(zip(params, found))
        seen = self._statistics(loss, grads, given, state)
        lr, momentum = self.network(seen if depends else seen.detach())
        metrics |= {"loss": loss.detach(), "lr": lr.detach(), "momentum": momentum.detach()}
        return functional.momentum(lr=lr, momentum=momentum).step(grads, state, params)

    def _statistics(
        self,
        loss: Tensor,
        grads: dict[str, Tensor],
        params: dict[str, Tensor],
        state: functional.LevelState,
    ) -> Tensor:
        def flat(tree: dict[str, Tensor]) -> Tensor:
            return torch.cat([t.reshape(-1) for t in tree.values()])

        gradient = flat(grads)
        buffer = flat({k: leaf["momentum_buffer"] for k, leaf in state.leaves.items()})
        # Logarithms: losses and norms range over decades. The small number keeps 0 finite.
        known = {
            "loss": lambda: torch.log(loss + 1e-8),
            "gradient": lambda: 0.5 * torch.log(gradient.square().sum() + 1e-16),
            "parameters": lambda: 0.5 * torch.log(flat(params).square().sum() + 1e-16),
            "agreement": lambda: torch.cosine_similarity(gradient, buffer, dim=0),
        }
        return torch.stack([known[name]() for name in self.network.statistics])

    def gradient(
        self, batches: Sequence[Batch], meta_batch: Batch
    ) -> tuple[Tensor, list[Tensor], Carry, dict[str, Tensor]]:
        """The loss after a step on each batch, its gradient in the network's weights, the carry."""
        first = len(batches) - min(self.truncate or len(batches), len(batches))
        metrics: dict[str, Tensor] = {}
        carry, starts = self.carry, []
        for i, batch in enumerate(batches):
            if self.checkpointed or i <= first:
                carry = _detached(carry)
            starts.append(carry)
            carry = self.inner_step(carry, batch, metrics)
        if self.checkpointed:
            loss, grads = self._gradient_backwards(
                starts[first:], batches[first:], carry, meta_batch
            )
        else:
            loss = self.loss(carry[0], meta_batch)
            grads = torch.autograd.grad(loss, list(self.network.parameters()))
        return loss.detach(), list(grads), _detached(carry), metrics

    def _gradient_backwards(
        self, starts: list[Carry], batches: Sequence[Batch], end: Carry, meta_batch: Batch
    ) -> tuple[Tensor, list[Tensor]]:
        """The same gradient from the carries alone, one recomputed step after the other."""
        weights = list(self.network.parameters())
        total = [torch.zeros_like(weight) for weight in weights]
        moving = [t.requires_grad for t in tree_leaves(end)]  # the rest counts steps
        given = _detached(end)
        loss = self.loss({k: p.requires_grad_() for k, p in given[0].items()}, meta_batch)
        inputs = [t.requires_grad_() for t, moves in zip(tree_leaves(given), moving) if moves]
        back = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        for k, (start, batch) in reversed(list(enumerate(zip(starts, batches)))):
            given = _detached(start)
            inputs = [t for t, moves in zip(tree_leaves(given), moving) if moves and k]
            for tensor in inputs:
                tensor.requires_grad_()
            after = tree_leaves(self.inner_step(given, batch, {}))
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
        """Train the model on each batch, and the network on the loss that this leads to.

        Returns:
            ``meta_loss``; of the last batch ``loss`` (before its step), ``lr``, ``momentum``.
        """
        loss, grads, carry, metrics = self.gradient(batches, meta_batch)
        for weight, grad in zip(self.network.parameters(), grads):
            weight.grad = grad
        self.meta_optimizer.step()
        self.carry = carry
        return {"meta_loss": loss, **metrics}

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the trained parameters into the model."""
        for name, p in self.model.named_parameters():
            p.copy_(self.carry[0][name])


def _detached(tree: Any) -> Any:
    return tree_map(torch.Tensor.detach, tree)
