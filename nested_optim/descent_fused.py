"""DGD's plain descent on our own kernels: whom they serve, and the launches of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .descent import _kind, products, weights_per_batch
from .inputs import Inputs
from .kernels.descend import DTYPES, Addresses, Batch, descend, prepare
from .tensors import to_scalar


class FusedDescent:
    """``rules.dgd`` with ``batch="mean"``, in place: five launches per batch of one shape.

    Holds the memory through which addresses travel.
    """

    def __init__(self) -> None:
        self._addresses = Addresses()

    def __call__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        taken: list[Inputs],
        group: dict[str, Any],
    ) -> list[int]:
        """Update the weights that the kernels can read; which they cannot."""
        lr, weight_decay = to_scalar(group["lr"]), to_scalar(group["weight_decay"])
        if isinstance(lr, Tensor) or isinstance(weight_decay, Tensor):
            return list(range(len(params)))
        sign, decay = (-1.0 if group["maximize"] else 1.0), group["decay"]
        left, alike = _served(params, grads, taken)
        for of_device in alike.values():
            batches, given = [], []
            for members in of_device.values():
                most, seen, product = _plan(params[members[0]], taken[members[0]])
                for start in range(0, len(members), most):
                    chunk = members[start : start + most]
                    inputs = [taken[i] for i in chunk]
                    rows = [x.rows for x in inputs]
                    ours = [params[i] for i in chunk], [grads[i] for i in chunk]
                    batches.append(Batch(*ours, rows, seen, product))
                    given.append(inputs)
            for batch, inputs, where in zip(batches, given, self._addresses.send(batches)):
                count, scale = (_numbers([getattr(x, k) for x in inputs]) for k in _NUMBERS)
                stacks = prepare(batch, where, lr, decay, count, scale)
                terms = products(stacks.weights, stacks.rows, inputs[0].layout.transposed)
                descend(batch, where, terms, stacks.sizes, weight_decay, sign)
        return left


_NUMBERS = "count", "scale"


def _served(
    params: list[Tensor], grads: list[Tensor], taken: list[Inputs]
) -> tuple[list[int], dict[torch.device, dict[Any, list[int]]]]:
    """Which weights are left to others; by device, the rest, by all that a batch has in common."""
    left: list[int] = []
    alike: dict[torch.device, dict[Any, list[int]]] = {}
    for i, (param, grad, given) in enumerate(zip(params, grads, taken)):
        rows, device = given.rows, param.device
        kinds = param.dtype, grad.dtype, rows.dtype
        if (
            not all(kind in DTYPES for kind in kinds)
            or not (param.is_contiguous() and grad.is_contiguous() and rows.is_contiguous())
            or not param.numel()
        ):
            left.append(i)
            continue
        shapes = param.shape, rows.shape, given.layout.transposed
        key = kinds, given.dtype, shapes, _kind(given.count), _kind(given.scale)
        alike.setdefault(device, {}).setdefault(key, []).append(i)
    return left, alike


def _plan(param: Tensor, given: Inputs) -> tuple[int, torch.dtype, torch.dtype]:
    """How many weights like this one a batch holds; the dtypes of its rows and products."""
    seen = given.rows.dtype if given.dtype is None else given.dtype
    product = seen if seen is torch.bfloat16 else torch.float32
    return weights_per_batch(param, given.rows, product), seen, product


def _numbers(values: Sequence[Any]) -> Any:
    """One number for all, or a vector of them in float32."""
    if not isinstance(values[0], Tensor):
        return values[0]
    return torch.stack(list(values)).to(torch.float32)
