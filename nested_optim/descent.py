"""Descent with and without inputs on lists of tensors: what ``DGD`` does at its updates.

The paths of ``base="sgd"`` take parameters, gradients of their dtypes, the inputs of those that
have any, step counters and the group, and update parameters and counters in place.
:func:`subtracted_terms` is what ``base="adamw"`` adds to AdamW's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import rules
from .inputs import Inputs
from .nested import _buckets, _count
from .pools import cast
from .rules.dgd import forms_second_moment
from .tensors import to_scalar

#: Bytes of the largest tensor of a batch of products; larger weights run alone.
_BATCH_BYTES = 2**27


def _in_batches(param: Tensor) -> bool:
    """Whether weights of one shape share their products.

    On a CPU a batch saves nothing, and one by one the products have the rule's bits.
    """
    return not param.is_cpu


def _single_tensor_dgd(
    params: list[Tensor],
    grads: list[Tensor],
    taken: list[Inputs | None],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    """The rule itself, tensor by tensor."""
    cast(filter(None, taken))
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
    kernels: Any = None,
) -> None:
    """Plain descent on lists of tensors; the rest in batches, or where these gain nothing, alone.

    A weight that no input has reached (a batch was empty) descends plainly. ``kernels`` take the
    batches that they serve (:class:`.descent_fused.FusedDescent`).
    """
    plain: list[int] = []
    batched: list[int] = []
    alone: list[int] = []
    for i, (param, given) in enumerate(zip(params, taken)):
        if given is None:
            plain.append(i)
        elif group["batch"] != "mean" or not _in_batches(param):
            alone.append(i)
        else:
            (batched if given.rows.shape[0] else plain).append(i)
    if alone:
        chosen, theirs, inputs, counters = _at(alone, params, grads, taken, steps)
        _single_tensor_dgd(chosen, theirs, inputs, counters, group)
    if batched:
        chosen, theirs, inputs, counters = _at(batched, params, grads, taken, steps)
        _count(counters)
        if kernels is not None:
            left = kernels(chosen, theirs, inputs, group)
            chosen, theirs, inputs = _at(left, chosen, theirs, inputs)
        cast(inputs)
        _batched_dgd(chosen, theirs, inputs, group)
    if not plain:
        return
    lr, weight_decay = to_scalar(group["lr"]), group["weight_decay"]
    for bucket in _buckets(_at(plain, params, grads, steps)).values():
        chosen, theirs, counters = bucket
        if group["maximize"]:
            theirs = list(torch._foreach_neg(theirs))
        if isinstance(weight_decay, Tensor) or weight_decay != 0:
            theirs = list(torch._foreach_add(theirs, chosen, alpha=weight_decay))
        torch._foreach_add_(chosen, theirs, alpha=-lr)
        _count(counters)


def _at(indices: list[int], *columns: list[Any]) -> list[list[Any]]:
    return [[column[i] for i in indices] for column in columns]


# ---------------------------------------------------------------------- batches


def _batched_dgd(
    params: list[Tensor],
    grads: list[Tensor],
    taken: list[Inputs],
    group: dict[str, Any],
) -> None:
    """``rules.dgd`` with ``batch="mean"``, in place: ``p <- p - e (g + wd p) - e decay p S``."""
    weight_decay = to_scalar(group["weight_decay"])
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    sign = -1.0 if group["maximize"] else 1.0
    for members, sizes, stack in _batches_of_terms(params, taken, group):
        chosen, theirs = _at(members, params, grads)
        terms = stack.unbind(0)
        each, shrinks = sizes.unbind(0), (sizes * weight_decay).unbind(0) if decays else ()
        if chosen[0].dtype == sizes.dtype:
            if decays:
                torch._foreach_addcmul_(chosen, chosen, shrinks, value=-1.0)
            torch._foreach_addcmul_(chosen, theirs, each, value=-sign)
            torch._foreach_sub_(chosen, terms)
            continue
        # A narrow parameter is to be rounded once.
        changes = [term.to(sizes.dtype) for term in terms]
        wide = [p.to(sizes.dtype) for p in chosen] if decays else []
        if decays:
            torch._foreach_addcmul_(changes, wide, shrinks)
        torch._foreach_addcmul_(changes, [g.to(sizes.dtype) for g in theirs], each, value=sign)
        torch._foreach_sub_(chosen, changes)


def subtracted_terms(
    weights: list[Tensor], taken: list[Inputs | None], group: dict[str, Any], foreach: bool
) -> list[tuple[Tensor, Tensor]]:
    """``rules.input_decay`` of each weight that has inputs, with the weight."""
    pairs = [(w, x) for w, x in zip(weights, taken) if x is not None and x.rows.shape[0]]
    found: list[tuple[Tensor, Tensor]] = []
    batched: list[tuple[Tensor, Inputs]] = []
    for weight, given in pairs:
        if foreach and _in_batches(weight):
            batched.append((weight, given))
            continue
        term = rules.input_decay(
            given.layout.matrix(weight),
            given.rows,
            lr=to_scalar(group["lr"]),
            decay=group["decay"],
            count=given.count,
            scale=given.scale,
        )
        found.append((weight, given.layout.unmatrix(term, weight)))
    if batched:
        chosen, inputs = map(list, zip(*batched))
        for members, _, stack in _batches_of_terms(chosen, inputs, group):
            found.extend((chosen[i], term) for i, term in zip(members, stack.unbind(0)))
    return found


def _batches_of_terms(
    weights: list[Tensor], taken: list[Inputs], group: dict[str, Any]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """For weights of one shape at a time: which, their step sizes, their decay's terms stacked."""
    alike: dict[Any, list[int]] = {}
    for i, (weight, given) in enumerate(zip(weights, taken)):
        rows = given.rows
        # What one vector of step sizes can hold, and of it what one batch of products can.
        vector = weight.dtype, weight.device, rows.dtype, _kind(given.count), _kind(given.scale)
        batch = weight.shape, rows.shape, given.layout.transposed
        alike.setdefault((vector, batch), []).append(i)
    kinds: dict[Any, dict[Any, list[int]]] = {}
    for (vector, batch), members in alike.items():
        kinds.setdefault(vector, {})[batch] = members
    for batches in kinds.values():
        every = [i for members in batches.values() for i in members]
        chosen, inputs = _at(every, weights, taken)
        sizes, factors = _step_sizes(chosen, inputs, group)
        done = 0
        for members in batches.values():
            weight, rows = weights[members[0]], taken[members[0]].rows
            most = weights_per_batch(weight, rows, _product_dtype(rows, sizes))
            for start in range(0, len(members), most):
                chunk = members[start : start + most]
                of_chunk = slice(done, done := done + len(chunk))
                chosen, inputs = _at(chunk, weights, taken)
                yield chunk, sizes[of_chunk], _terms(chosen, inputs, factors[of_chunk])


def _kind(number: Any) -> Any:
    """Equal for what one batch can hold: a number is shared, tensors are stacked."""
    return "tensor" if isinstance(number, Tensor) else number


def _step_sizes(
    weights: list[Tensor], taken: list[Inputs], group: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """``e`` of each weight, and ``e decay / B``, in at least float32."""
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    lr: Any = to_scalar(group["lr"])
    lr = lr.to(wide) if isinstance(lr, Tensor) else lr
    count, scale = (_together([getattr(x, key) for x in taken]) for key in ("count", "scale"))
    number = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    strength = group["decay"] * scale / number
    total = torch.stack(torch._foreach_norm([x.rows for x in taken], 2, dtype=wide)).square_()
    sizes = lr / (1 + (lr * strength) * total)
    return sizes, sizes * strength


def _terms(weights: list[Tensor], taken: list[Inputs], factors: Tensor) -> Tensor:
    """``e decay W S`` of weights of one shape, stacked, in the dtype of its products."""
    one = weights[0]
    rows = _stacked([x.rows for x in taken])
    dtype = _product_dtype(rows, factors)
    rows = rows if rows.dtype is dtype else rows.to(dtype)
    if len(weights) == 1:
        stack = (one if one.dtype is dtype else one.to(dtype)).unsqueeze(0)
    else:
        stack = torch.empty((len(weights), *one.shape), dtype=dtype, device=one.device)
        torch._foreach_copy_(list(stack.unbind(0)), weights)
    return products(stack, rows, taken[0].layout.transposed, factors.view(-1, 1, 1))


def products(
    weights: Tensor, rows: Tensor, transposed: bool, factors: Tensor | None = None
) -> Tensor:
    """``W X^T X`` of stacked weights, in their shape, times factors ``(weights, 1, 1)``."""
    # Transposed ones stay so: no product turns them over.
    matrices = weights.flatten(2) if weights.dim() > 3 else weights
    if _forms(weights[0], rows[0]):
        second = _times(torch.bmm(rows.mT, rows), factors)
        terms = torch.bmm(second, matrices) if transposed else torch.bmm(matrices, second)
    elif transposed:
        terms = torch.bmm(rows.mT, _times(torch.bmm(rows, matrices), factors))
    else:
        terms = torch.bmm(_times(torch.bmm(matrices, rows.mT), factors), rows)
    return terms.view(weights.shape) if weights.dim() > 3 else terms


def weights_per_batch(weight: Tensor, rows: Tensor, product: torch.dtype) -> int:
    """How many weights like this one a batch of products holds."""
    count, features = rows.shape
    between = features**2 if _forms(weight, rows) else weight.numel() // max(1, features) * count
    largest = max(1, weight.numel(), rows.numel(), between)
    return max(1, _BATCH_BYTES // (product.itemsize * largest))


def _forms(weight: Tensor, rows: Tensor) -> bool:
    count, features = rows.shape
    return forms_second_moment(count, weight.numel() // max(1, features), features)


def _product_dtype(rows: Tensor, sizes: Tensor) -> torch.dtype:
    """bfloat16 rows are multiplied as the layer multiplied them, others as step sizes are."""
    return rows.dtype if rows.dtype is torch.bfloat16 else sizes.dtype


def _times(product: Tensor, factors: Tensor | None) -> Tensor:
    return product if factors is None else product.mul_(factors)


def _together(numbers: list[Any]) -> Any:
    return torch.stack(numbers) if isinstance(numbers[0], Tensor) else numbers[0]


def _stacked(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)
