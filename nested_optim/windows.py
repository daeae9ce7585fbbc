"""Windows of gradients on tensors: filling them, closing them, what they came to.

The fused kernels do this themselves; here is how every other path does it. Parameters' tensors are
found in ``optimizer.state``, and the rule is the optimizer's own ``_update``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types, _get_value

from .levels import divisor, window_closes
from .tensors import local, placements

if TYPE_CHECKING:
    from .optimizer import LevelOptimizer

KEYS = ("window_count", "window_sum")


def advance(
    optimizer: LevelOptimizer,
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    probes: set[Tensor],
) -> None:
    """Add one gradient to each window and run the rule on the windows that close.

    ``probes`` only get state and a step count.
    """
    frequency = group["frequency"]
    direct: list[tuple[Tensor, Tensor]] = []  # a window of one gradient needs no sum
    windowed: list[tuple[Tensor, Tensor]] = []
    on_host, state_of = not group["capturable"], optimizer.state
    for p, grad in zip(params, grads):
        state = state_of[p]
        counter = state.get("window_count")
        if counter is None or counter.is_cpu != on_host or frequency > 1:
            state = optimizer._begin(p, group)
        if probes and p in probes:
            # Whatever a rule counts beside its updates must not count this one.
            state["step"] += 1
        elif "window_sum" not in state:
            direct.append((p, grad))
        else:
            windowed.append((p, grad))
    optimizer._on_gradients(group, [p for p, _ in (*direct, *windowed)])

    if windowed and (group["capturable"] or torch.compiler.is_compiling()):
        _advance_on_device(optimizer, group, windowed)
        windowed = []

    opening: list[tuple[Tensor, Tensor]] = []
    adding: list[tuple[Tensor, Tensor]] = []
    closing: list[Tensor] = []
    for p, grad in windowed:
        state = optimizer.state[p]
        count = _get_value(state["window_count"]) + 1
        if count == 1 and frequency == 1:
            direct.append((p, grad))
            continue
        (opening if count == 1 else adding).append((state["window_sum"], grad))
        state["window_count"].fill_(count)
        if window_closes(count, frequency):
            closing.append(p)

    foreach = optimizer._uses_foreach(group, params)
    _apply(torch._foreach_copy_, Tensor.copy_, opening, foreach)
    _apply(torch._foreach_add_, Tensor.add_, adding, foreach)
    due = [p for p, _ in direct] + closing
    if due:
        due_grads = [grad for _, grad in direct] + close(optimizer, group, closing)
        optimizer._update(group, due, due_grads)


def close(optimizer: LevelOptimizer, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
    """What these windows come to; their counts return to 0."""
    states = [optimizer.state[p] for p in params]
    sums = [state["window_sum"] for state in states]
    counts = [float(_get_value(state["window_count"])) for state in states]
    for state in states:
        state["window_count"].zero_()
    divisors = [divisor(count, group["window"]) for count in counts]
    if group["differentiable"]:
        return [total / n if n != 1 else total.clone() for total, n in zip(sums, divisors)]
    # In place: the sum is spent, and the next window opens by overwriting it.
    buckets: dict[Any, tuple[list[Tensor], list[float]]] = {}
    for total, n in zip(sums, divisors):
        if n == 1:
            continue
        bucket = buckets.setdefault((type(total), total.device, total.dtype), ([], []))
        bucket[0].append(total)
        bucket[1].append(n)
    for (kind, _, _), (totals, numbers) in buckets.items():
        if kind in _foreach_supported_types:
            # On CUDA this divides; div_ by a number would multiply by its reciprocal.
            torch._foreach_div_(totals, numbers)
        else:
            for total, n in zip(totals, numbers):
                total.div_(n)
    return sums


def _advance_on_device(
    optimizer: LevelOptimizer, group: dict[str, Any], windowed: list[tuple[Tensor, Tensor]]
) -> None:
    """The same where the host must not look at a counter: CUDA graphs and ``torch.compile``.

    The rule runs on every window, and what it did is kept where the window closed.
    """
    params, means, closes, before = [], [], [], []
    for p, grad in windowed:
        state = optimizer.state[p]
        for key in ("step", "window_count"):
            if state[key].device != p.device:
                state[key] = state[key].to(p.device)
        total, count = state["window_sum"], state["window_count"]
        count.add_(1)
        local(total).copy_(
            torch.where(count == 1, local(grad).to(total.dtype), local(total + grad))
        )
        params.append(p)
        means.append(total / count if group["window"] == "mean" else total.clone())
        closes.append(count >= group["frequency"])
        kept = [p, *(t for k, t in sorted(state.items()) if k not in KEYS)]
        before.append([(local(t), local(t).clone()) for t in kept])
    optimizer._update(group, params, means)
    for (p, _), closed, pairs in zip(windowed, closes, before):
        for tensor, old in pairs:
            tensor.copy_(torch.where(closed, tensor, old))
        optimizer.state[p]["window_count"].masked_fill_(closed, 0)


def _apply(
    multi: Callable[..., Any],
    single: Callable[..., Any],
    pairs: list[tuple[Tensor, Tensor]],
    foreach: bool,
) -> None:
    """In place, ``target <- op(target, source)`` for each pair."""
    if not pairs:
        return
    # DTensors have no _foreach_copy_.
    if foreach and not (single is Tensor.copy_ and any(map(placements, pairs[0]))):
        targets, sources = map(list, zip(*pairs))
        multi(targets, sources)
    else:
        for target, source in pairs:
            single(target, source)
