"""Known remedies against forgetting, written out: Lookahead and EWC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.optim import Optimizer


class Lookahead:
    """Slow weights that go a part of the way to the fast ones, which then start from there.

    Zhang et al. 2019 (arXiv 1907.08610), Algorithm 1. Counts and acts in the optimizer's post hook.
    """

    def __init__(self, optimizer: Optimizer, every: int = 10, alpha: float = 0.5) -> None:
        self.every, self.alpha, self.count = every, alpha, 0
        self.fast = [p for group in optimizer.param_groups for p in group["params"]]
        self.slow = [p.detach().clone() for p in self.fast]
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.count += 1
        if self.count % self.every == 0:
            torch._foreach_lerp_(self.slow, self.fast, self.alpha)
            torch._foreach_copy_(self.fast, self.slow)

    @contextmanager
    def read_out(self) -> Iterator[None]:
        """The slow weights in the model's place; the fast ones come back."""
        live = [p.detach().clone() for p in self.fast]
        with torch.no_grad():
            torch._foreach_copy_(self.fast, self.slow)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.fast, live)


class EWC:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796).

    The penalty is strength / 2 * sum over tasks t and weights i of F_ti (w_i - w_ti)^2, with w_t
    the weights at the end of task t and F_t the diagonal of its Fisher information there: the mean
    of squared gradients of log p(y | x), one sample at a time, with y drawn from the model. Only
    the sums of F_t and of F_t w_t are kept, which give the gradient exactly.

    Args:
        samples: how many of the task's samples the Fisher information is estimated on.
    """

    def __init__(self, model: nn.Module, strength: float, samples: int = 256, seed: int = 0):
        self.model, self.strength, self.samples = model, strength, samples
        self.params = list(model.parameters())
        self.fisher = [torch.zeros_like(p) for p in self.params]
        self.anchor = [torch.zeros_like(p) for p in self.params]  # sum of F_t w_t
        self.generator = torch.Generator().manual_seed(seed)
        self.tasks = 0

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to the model's."""
        if not self.tasks:
            return
        pulls = torch._foreach_mul(self.fisher, self.params)
        torch._foreach_sub_(pulls, self.anchor)
        grads = [p.grad for p in self.params if p.grad is not None]
        torch._foreach_add_(grads, pulls, alpha=self.strength)

    def end_task(self, inputs: Tensor) -> None:
        """Keep the weights as they are now; ``inputs`` are samples of the task that has ended."""
        chosen = torch.randperm(len(inputs), generator=self.generator)[: self.samples]
        fisher = self.estimate(inputs[chosen.to(inputs.device)])
        torch._foreach_add_(self.fisher, fisher)
        with torch.no_grad():
            torch._foreach_add_(self.anchor, torch._foreach_mul(fisher, self.params))
        self.tasks += 1

    def estimate(self, inputs: Tensor) -> list[Tensor]:
        """The diagonal of the Fisher information, in the order of the model's parameters."""
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        with torch.no_grad():
            shares = self.model(inputs).softmax(1).cpu()
        if not torch.isfinite(shares).all():  # diverged: there is nothing to hold on to
            return [torch.zeros_like(p) for p in self.params]
        drawn = torch.multinomial(shares, 1, generator=self.generator)[:, 0].to(inputs.device)
        per_sample: Callable[..., dict[str, Tensor]] = vmap(grad(self._loss), (None, 0, 0))
        total = [torch.zeros_like(p) for p in self.params]
        for x, y in zip(inputs.split(32), drawn.split(32)):
            gradients = per_sample(weights, x, y)
            torch._foreach_add_(total, [g.square().sum(0) for g in gradients.values()])
        torch._foreach_div_(total, len(inputs))
        return total

    def _loss(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(self.model, weights, (x[None],))
        return F.cross_entropy(logits, y[None])
