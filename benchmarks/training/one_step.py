"""A small network that chooses learning rate and momentum while the model trains: an example.

The model takes a step of SGD with momentum whose two numbers come from a *meta-network*, which sees
how training goes. The step is differentiable, so the loss *after* it has a gradient in the
meta-network's weights: "the next loss would have been lower had the learning rate been larger". The
meta-network follows that gradient with an optimizer of its own, and the model keeps the step.

    trainer = OneStepTrainer(model, F.cross_entropy, MetaNetwork(RICH, lr=0.01))
    for batch, later_batch in pairs:  # each is (inputs, targets)
        metrics = trainer.step(batch, later_batch)
    trainer.write_back()  # the parameters, into the model

One step knows nothing of what a choice does later, and so prefers small learning rates (short-
horizon bias, Wu et al. 2018); ``several_steps.py`` looks further ahead.
"""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchopt.pytree import tree_map

from nested_optim import NestedOptimizer, functional

LOSS = ("loss",)
RICH = ("loss", "gradient", "parameters", "agreement")
Batch = tuple[Tensor, Tensor]
Carry = tuple[dict[str, Tensor], functional.LevelState]  # the parameters, the momentum's state


class MetaNetwork(nn.Module):
    """Statistics of a step (of ``RICH``) -> its learning rate and momentum.

    At first it says ``lr`` and ``momentum``; the former stays within a factor of ``reach``.
    """

    def __init__(self, statistics=LOSS, lr=0.1, momentum=0.9, reach=100.0, hidden=16):
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


class OneStepTrainer:
    """Trains a model; its own parameters stay as they are until :meth:`write_back`."""

    def __init__(self, model: nn.Module, loss_fn, network: MetaNetwork, meta_lr: float = 1e-2):
        self.model, self.loss_fn, self.network = model, loss_fn, network
        refuse_running_statistics(model)
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.carry: Carry = (params, functional.momentum().init(params))
        self.meta_optimizer = NestedOptimizer(network.parameters(), lr=meta_lr, weight_decay=0.0)

    def loss(self, params: dict[str, Tensor], batch: Batch) -> Tensor:
        return self.loss_fn(functional_call(self.model, params, (batch[0],)), batch[1])

    def observe(self, carry: Carry, batch: Batch):
        """The loss, its gradients, and what the meta-network sees of them."""
        params = {name: p.detach().requires_grad_() for name, p in carry[0].items()}
        loss = self.loss(params, batch)
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
        return loss, grads, self.statistics(loss, grads, params, carry[1]).detach()

    def statistics(self, loss, grads, params, state):
        buffers = [leaf["momentum_buffer"] for leaf in state.leaves.values()]
        gradient, weights, buffer = (
            torch.cat([t.reshape(-1) for t in tensors])
            for tensors in (grads.values(), params.values(), buffers)
        )
        # Logarithms: losses and norms range over decades. The small number keeps 0 finite.
        known = {
            "loss": lambda: torch.log(loss + 1e-8),
            "gradient": lambda: 0.5 * torch.log(gradient.square().sum() + 1e-16),
            "parameters": lambda: 0.5 * torch.log(weights.square().sum() + 1e-16),
            "agreement": lambda: torch.cosine_similarity(gradient, buffer, dim=0),
        }
        return torch.stack([known[name]() for name in self.network.statistics])

    def inner_step(self, carry: Carry, batch: Batch) -> tuple[Carry, dict[str, Tensor]]:
        """The carry after a step of the model, differentiable in the network's weights; numbers."""
        refuse_running_statistics(self.model)  # modules may have changed their mode
        loss, grads, seen = self.observe(carry, batch)
        lr, momentum = self.network(seen)
        after = functional.momentum(lr, momentum).step(grads, carry[1], carry[0])
        return after, detached({"loss": loss, "lr": lr, "momentum": momentum})

    def step(self, batch: Batch, later_batch: Batch) -> dict[str, Tensor]:
        """Train the model on one batch, and the network on the loss that this leads to on another.

        Returns ``meta_loss``, ``loss`` (before the step), ``lr`` and ``momentum``.
        """
        carry, metrics = self.inner_step(self.carry, batch)
        meta_loss = self.loss(carry[0], later_batch)
        self.meta_optimizer.zero_grad()
        meta_loss.backward()
        self.meta_optimizer.step()
        self.carry = detached(carry)
        return {"meta_loss": meta_loss.detach(), **metrics}

    @torch.no_grad()
    def write_back(self) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(self.carry[0][name])


def refuse_running_statistics(model: nn.Module) -> None:
    """They would count batches that only look ahead, or are seen twice."""
    for name, module in model.named_modules():
        if module.training and getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) has running statistics, which "
                "each pass would move: use GroupNorm or LayerNorm, or its eval() mode"
            )


def detached(tree):
    return tree_map(torch.Tensor.detach, tree)
