"""First-order hypergradients: what a gradient says about the update before it.

The loss at a gradient depends on the update before it through the parameters only, so its
derivative by that update's inputs is a product of the gradient with the update's parts. These are
made again from what is in memory anyway: momenta and second moment are as the update left them,
and the state keeps the gradient that it used, its rates and what the networks saw. The derivative
is exact, less what the update did to momenta and so to later updates, and less rounding: beside
float32 moments the gradient is kept in bfloat16. ``eps``, bounds of multipliers and frequencies are
taken as they are now.

Weights of networks change between the use of one gradient for learning and its use for an update,
not in between: so at frequency 1 an update and what is learned from it belong to the same weights.
Where a meta update lies between the two (in a slow group's window), the networks are
differentiated at the present weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _get_value

from ..rules.deep_nested import alignments, next_loss, product
from . import learned
from .features import GROUP_FEATURES, SIZES, TENSOR_FEATURES, beside
from .networks import wide_dtype

#: learning rate and decoupled weight decay of the last update, what the networks saw, what it
#: measured, which they see next, and 1 - beta for both betas, 0 where they are not known
_PARTS = (2, GROUP_FEATURES, TENSOR_FEATURES, SIZES, 2)
TRACE = sum(_PARTS)
#: Before betas were in it.
_SHORT = TRACE - 2


class Due(NamedTuple):
    """Parameters of a group whose windows have closed, and what these came to."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]


def empty_trace(param: Tensor) -> Tensor:
    """The trace of a parameter that has not been updated: nothing is learned from it."""
    dtype = param.real.dtype if param.is_complex() else param.dtype
    return torch.zeros(TRACE, dtype=torch.promote_types(dtype, torch.float32), device=param.device)


def longer(trace: Tensor, betas: tuple[float, float]) -> Tensor:
    """A trace of an older checkpoint, as if its update had these betas; others as they are."""
    if trace.shape != (_SHORT,):
        return trace
    return torch.cat([trace, trace.new_tensor([1 - beta for beta in betas])])


def remember(
    group: dict[str, Any],
    states: Sequence[dict[str, Any]],
    of_group: Tensor | None,
    of_tensors: Tensor | None,
    sizes: Tensor,
) -> None:
    """Keep with each tensor what its update had that is not in the state anyway."""
    rates = [group["lr"], group["weight_decay"] if group["decoupled"] else 0.0]
    seen = of_group if of_group is not None else of_tensors
    like = states[0]["update_trace"] if seen is None else seen
    known = torch.stack(
        [
            rate.to(like).reshape(()) if isinstance(rate, Tensor) else like.new_full((), rate)
            for rate in rates
        ]
    )
    if of_group is None:
        of_group = like.new_zeros(GROUP_FEATURES)
    if of_tensors is None:
        of_tensors = like.new_zeros(len(states), TENSOR_FEATURES)
    shared = torch.cat([known, of_group]).expand(len(states), -1)
    decays = beside(like, [1 - beta for beta in group["betas"]]).expand(len(states), -1)
    rows = torch.cat([shared, of_tensors, sizes.to(like), decays], dim=1)
    traces = [state["update_trace"] for state in states]
    for trace, row in zip(traces, rows.unbind(0)):
        trace.copy_(row)


def last_sizes(states: Sequence[dict[str, Any]], home: torch.device) -> Tensor:
    """``(tensors, SIZES)``: what was measured in the tensors' last updates, 0 before the first.

    So nothing has to be known of a gradient before the pass over memory that uses it.
    """
    measured = slice(_SHORT - SIZES, _SHORT)
    rows = [state["update_trace"][measured].to(home, wide_dtype(home)) for state in states]
    return torch.stack(rows)


def seen_of_group(trace: Tensor) -> Tensor:
    """``(GROUP_FEATURES,)`` of a trace: what the controller saw at the tensor's last update."""
    return trace[_PARTS[0] : _PARTS[0] + GROUP_FEATURES]


def _last_betas(trace: Tensor, betas: tuple[float, float]) -> Sequence[Any]:
    """The betas of a tensor's last update: numbers from the host's memory, 0-d tensors from a
    device's, which is not waited for. ``betas`` are taken where they are not known."""
    decays = trace[_SHORT:].to(wide_dtype(trace.device))
    if trace.is_cpu:
        return [1 - decay if decay > 0 else beta for decay, beta in zip(decays.tolist(), betas)]
    return torch.where(decays > 0, 1 - decays, beside(decays, betas)).unbind()


def second_moment(group: dict[str, Any], state: dict[str, Any]) -> Tensor | None:
    """What an update of this group divides by, before its root; None for nothing."""
    if not group["normalize"]:
        return None
    found: Tensor = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    return found


def hypergradients(
    first: dict[str, Any], state: Any, dues: Iterable[Due], slow_keys: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The derivative of the loss behind these gradients by every learned weight.

    Args:
        first: the group that holds the weights.
        state: the optimizer's.
        dues: gradients that have come, before anything is updated with them.
        slow_keys: where a parameter's state keeps its slow momenta.

    Returns:
        For each module a tensor of its weights' shape, and the product of the lengths of the
        gradients and of what their parameters' last updates moved, over all tensors: of the
        momentum's part of these, as the learned parts scale it. Empty and None where nothing was
        updated before.
    """
    with torch.enable_grad():
        flats = learned.weights(first, requires_grad=True)
        found = [_next_losses(first, flats, state, due, slow_keys) for due in dues]
        known = [pair for pair in found if pair is not None]
        if not known or not flats:
            return {}, None
        total = torch.stack([loss for loss, _ in known]).sum()
        grads = torch.autograd.grad(total, list(flats.values()), allow_unused=True)
    squares = torch.stack([lengths for _, lengths in known]).sum(0)
    by_module = {m: torch.zeros_like(flats[m]) if g is None else g for m, g in zip(flats, grads)}
    return by_module, squares.sqrt().prod()


def _next_losses(
    first: dict[str, Any],
    flats: dict[str, Tensor],
    state: Any,
    due: Due,
    slow_keys: Sequence[str],
) -> tuple[Tensor, Tensor] | None:
    group = due.group
    rows, lengths, traces, steps = [], [], [], []
    for p, grad in zip(due.params, due.grads):
        kept = state[p]
        step = _get_value(kept["step"])
        if step < 1 or not kept.keys() >= {"previous_grad", *slow_keys}:
            continue  # not updated yet, or not with what has been switched on since
        row, length = alignments(
            grad,
            p.detach(),
            kept["previous_grad"],
            kept["exp_avg"],
            second_moment(group, kept),
            [kept[key] for key in slow_keys],
            step=step,
            betas=_last_betas(kept["update_trace"], group["betas"]),
            eps=group["eps"],
            frequencies=group["cms_frequencies"][: len(slow_keys) + 1],
        )
        rows.append(row)
        lengths.append(length)
        traces.append(kept["update_trace"])
        steps.append(step)
    if not rows:
        return None
    like = next(iter(flats.values()))
    products = torch.stack([row.to(like) for row in rows])
    if group["maximize"]:
        products = -products
    trace = torch.stack([t.to(like) for t in traces])
    rates, of_group, of_tensors, _, decays = trace.split(_PARTS, dim=1)
    lr, weight_decay = rates.unbind(1)
    beta = 1 - torch.where(decays[:, 0] > 0, decays[:, 0], 1 - group["betas"][0])
    inputs = learned.inputs(group, flats, beta, of_group, of_tensors)
    loss = next_loss(
        products,
        inputs,
        lr=lr,
        weight_decay=weight_decay,
        beta=beta,
        correction=1 - beta ** beside(like, steps),
    ).sum()
    with torch.no_grad():
        squares = torch.stack([length.to(like) for length in lengths])
        first_weight = None if inputs.mixing is None else inputs.mixing[0]
        size = product(lr, inputs.multiplier, inputs.scale, first_weight)
        assert size is not None
        moved = torch.stack([squares[:, 0], size.square() * squares[:, 1]]).sum(1)
    return loss, moved
