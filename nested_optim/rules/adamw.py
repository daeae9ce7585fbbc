"""AdamW and Adam (Kingma and Ba 2015; Loshchilov and Hutter 2019) as one pure function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .root import moment_root


class AdamWState(NamedTuple):
    """What one update returns: new tensors, none of them an argument."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None


def bias_corrections(step: float | Tensor, betas: tuple[Any, Any]) -> tuple[Any, Any]:
    """``(1 - beta1**step, 1 - beta2**step)``: numbers for a number, tensors for a tensor."""
    return 1 - betas[0] ** step, 1 - betas[1] ** step


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    step: float | Tensor,
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    weight_decay: float | Tensor,
    decoupled: bool = True,
    maximize: bool = False,
) -> AdamWState:
    r"""One AdamW update.

    .. math::
        \theta &\leftarrow (1 - \eta\lambda)\,\theta \quad\text{(decoupled)}, \qquad
        g \leftarrow g + \lambda\theta \quad\text{(coupled, Adam's)} \\
        m &\leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        \theta &\leftarrow \theta - \frac{\eta}{1-\beta_1^t}\,
            \frac{m}{\sqrt{v} / \sqrt{1-\beta_2^t} + \epsilon}

    The operations and their order are those of ``torch.optim.AdamW``'s for-loop, so equal inputs
    give equal bits. A complex tensor is updated as the real tensor of its parts.

    Args:
        param: the parameter, any shape.
        grad: its gradient, same shape and dtype.
        exp_avg: first moment ``m``, same shape.
        exp_avg_sq: second moment ``v``, same shape.
        max_exp_avg_sq: largest second moment so far (AMSGrad: it replaces ``v`` below), or None.
        step: how many updates there will have been with this one, ``t >= 1``. A tensor keeps the
            whole computation on the tensor's device and differentiable in it (torch's
            ``capturable`` form).
        lr: learning rate ``eta``, a number or a tensor of one element.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: ``lambda``.
        decoupled: shrink the parameter (AdamW) instead of adding to the gradient (Adam).
        maximize: ascend.

    Returns:
        The new parameter and moments.
    """
    beta1, beta2 = betas
    is_complex = param.is_complex()
    # Products are rounded back below: a 0-d parameter and a 0-d tensor lr or beta would promote.
    if maximize:
        grad = -grad
    if not isinstance(weight_decay, (int, float)) or weight_decay != 0:
        if decoupled:
            param = (param * (1 - lr * weight_decay)).to(param.dtype)
        elif isinstance(weight_decay, Tensor):
            grad = torch.addcmul(grad, param, weight_decay)
        else:
            grad = torch.add(grad, param, alpha=weight_decay)
    if is_complex:
        param, grad, exp_avg, exp_avg_sq = map(
            torch.view_as_real, (param, grad, exp_avg, exp_avg_sq)
        )
        if max_exp_avg_sq is not None:
            max_exp_avg_sq = torch.view_as_real(max_exp_avg_sq)

    # A tensor beta takes part as a tensor of the parameter's dtype, a number as a number.
    weight1: Any = 1 - beta1
    if isinstance(beta1, Tensor):
        weight1 = 1 - beta1.to(device=param.device, dtype=param.dtype, non_blocking=True)
    exp_avg = torch.lerp(exp_avg, grad, weight1)
    if isinstance(beta2, Tensor) and beta2.requires_grad:
        exp_avg_sq = torch.lerp(exp_avg_sq, torch.square(grad), 1 - beta2)
    else:
        value: Any = 1 - beta2
        exp_avg_sq = torch.addcmul((exp_avg_sq * beta2).to(grad.dtype), grad, grad, value=value)

    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
        second = max_exp_avg_sq

    correction1, correction2 = bias_corrections(step, betas)
    root = moment_root(second)
    if isinstance(step, Tensor) and isinstance(lr, Tensor) and lr.requires_grad:
        # Below, at lr 0, the derivative in it would be that of 0 / 0.
        direction = exp_avg / (root / correction2.sqrt() + eps)
        param = (param - (lr / correction1) * direction).to(param.dtype)
    elif isinstance(step, Tensor):
        # The step size is folded into the denominator: addcdiv takes no tensor as its factor.
        negative_step_size = (lr / correction1).neg()
        denominator = root / (correction2.sqrt() * negative_step_size)
        moved = torch.addcdiv(param, exp_avg, denominator + eps / negative_step_size)
        # At lr 0 the denominator of a zero second moment is 0 / 0.
        if isinstance(lr, Tensor):
            param = torch.where(negative_step_size == 0, param, moved)
        elif lr != 0:
            param = moved
    else:
        denominator = (root / correction2**0.5).add_(eps)
        param = torch.addcdiv(param, exp_avg, denominator, value=-(lr / correction1))

    if is_complex:
        param, exp_avg, exp_avg_sq = map(torch.view_as_complex, (param, exp_avg, exp_avg_sq))
        if max_exp_avg_sq is not None:
            max_exp_avg_sq = torch.view_as_complex(max_exp_avg_sq)
    return AdamWState(param, exp_avg, exp_avg_sq, max_exp_avg_sq)
