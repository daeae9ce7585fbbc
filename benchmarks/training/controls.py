"""Optimizers to be compared with: two momenta without matrices, a stale copy, Muon on any shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nested_optim import M3, rules
from nested_optim.m3_steps import matrix_form, ns_dtype
from nested_optim.orthogonalize import orthogonalize


class AdEMAMix(Optimizer):
    """AdamW with a second, slow momentum added (Pagliardini et al. 2024, arXiv 2409.03137).

    ``p -= lr ((m1 / (1 - beta1^t) + alpha m2) / (sqrt(v / (1 - beta2^t)) + eps) + wd p)``, the slow
    momentum m2 with decay beta3 and without correction. The paper warms alpha and beta3 up over the
    whole run; ``warmup`` steps do so here, linearly for alpha and in half-life for beta3.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "warmup": warmup})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "step": 0,
                        **{key: torch.zeros_like(p) for key in ("fast", "slow", "second")},
                    }
                self.state[p]["step"] += 1
            grads: list[Any] = [p.grad for p in params]
            fast, slow, second = (
                [self.state[p][key] for p in params] for key in ("fast", "slow", "second")
            )
            t = self.state[params[0]]["step"]
            beta1, beta2, beta3 = group["betas"]
            alpha, slow_beta = scheduled(t, group["warmup"], group["alpha"], beta1, beta3)
            torch._foreach_lerp_(fast, grads, 1 - beta1)
            torch._foreach_lerp_(slow, grads, 1 - slow_beta)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            roots = torch._foreach_sqrt(second)
            torch._foreach_div_(roots, (1 - beta2**t) ** 0.5)
            torch._foreach_add_(roots, group["eps"])
            moves = torch._foreach_div(fast, 1 - beta1**t)
            torch._foreach_add_(moves, slow, alpha=alpha)
            torch._foreach_div_(moves, roots)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, moves, alpha=-group["lr"])


def scheduled(t: int, warmup: int, alpha: float, beta1: float, beta3: float) -> tuple[float, float]:
    """AdEMAMix's alpha and slow decay at step ``t``: both at their end after ``warmup`` steps."""
    share = min(1.0, t / warmup) if warmup else 1.0

    def half_life(beta: float) -> float:
        return float(torch.tensor(0.5).log() / torch.tensor(beta).log() - 1)

    steps = share * half_life(beta3) + (1 - share) * half_life(beta1)
    return alpha * share, max(beta1, 0.5 ** (1 / (steps + 1)))


class StaleM3(M3):
    """M3 whose slow part is the fast update of the last chunk's end: old, but no second momentum.

    What a slow momentum is worth beyond an update that is merely late shows against this.
    """

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        super()._update(group, params, grads)
        if group["algorithm"] != "m3" or not group["alpha"]:
            return
        for p, grad in zip(params, grads):
            state = self.state[p]
            if int(state["slow_count"]) != 0:
                continue
            form, momentum = matrix_form(group), state["momentum_buffer"]
            ahead = grad.lerp(momentum, group["betas"][0]) if group["nesterov"] else momentum
            parts = orthogonalize(
                form.split(ahead),
                rules.ns_schedule(group["ns_coefficients"], group["ns_steps"]),
                eps=group["eps"],
                dtype=ns_dtype(p, group),
            )
            state["slow_update"].copy_(form.join(parts, p.shape))


def flat_muon(params: list[nn.Parameter], **options: Any) -> Optimizer:
    """torch's Muon, which takes only matrices, on parameters flattened to (outputs, the rest).

    Its parameters share their memory with ``params``, whose gradients it takes and clears.
    """
    flat = [nn.Parameter(p.detach().view(len(p), -1)) for p in params]
    muon = torch.optim.Muon(flat, **options)

    def take(*_: Any) -> None:
        for matrix, p in zip(flat, params):
            matrix.grad = None if p.grad is None else p.grad.reshape(matrix.shape)

    def clear(*_: Any) -> None:
        for p in params:
            p.grad = None

    muon.register_step_pre_hook(take)
    muon.register_step_post_hook(clear)
    return muon
