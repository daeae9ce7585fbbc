"""Descent with and without inputs on lists of tensors: the paths of ``DGD`` with ``base="sgd"``.

Each path takes parameters, gradients of their dtypes, the inputs of those that have any, step
counters and the group, and updates parameters and counters in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import rules
from .inputs import Inputs
from .nested import _buckets, _count
from .tensors import to_scalar


def _single_tensor_dgd(
    params: list[Tensor],
    grads: list[Tensor],
    taken: list[Inputs | None],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    """The rule itself, tensor by tensor."""
    options = {
        "lr": to_scalar(group["lr"]),
        "weight_decay": group["weight_decay"],
        "maximize": group["maximize"],
    }
    for param, grad, given, step in zip(params, grads, taken, steps):
        step += 1
        if given is None:
            # Autograd must find the old value unharmed when it comes back.
            old = param.clone() if group["differentiable"] else param
            param.copy_(rules.sgd(old, grad, **options))
            continue
        new = rules.dgd(
            given.layout.matrix(param),
            given.layout.matrix(grad),
            given.rows,
            decay=group["decay"],
            batch=group["batch"],
            count=given.count,
            scale=given.scale,
            **options,
        )
        param.copy_(given.layout.unmatrix(new, param))


def _multi_tensor_dgd(
    params: list[Tensor],
    grads: list[Tensor],
    taken: list[Inputs | None],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    """Plain descent on lists of tensors; the products of the rest leave nothing to gain by it."""
    with_inputs = [i for i, given in enumerate(taken) if given is not None]
    if with_inputs:
        _single_tensor_dgd(
            [params[i] for i in with_inputs],
            [grads[i] for i in with_inputs],
            [taken[i] for i in with_inputs],
            [steps[i] for i in with_inputs],
            group,
        )
    plain = [i for i, given in enumerate(taken) if given is None]
    if not plain:
        return
    lr, weight_decay = to_scalar(group["lr"]), group["weight_decay"]
    for bucket in _buckets([[x[i] for i in plain] for x in (params, grads, steps)]).values():  # type: ignore[misc]
        chosen, theirs, counters = bucket
        if group["maximize"]:
            theirs = list(torch._foreach_neg(theirs))
        if isinstance(weight_decay, Tensor) or weight_decay != 0:
            theirs = list(torch._foreach_add(theirs, chosen, alpha=weight_decay))
        torch._foreach_add_(chosen, theirs, alpha=-lr)
        _count(counters)
