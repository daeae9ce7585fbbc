"""The paths of ``DeepNestedOptimizer``'s learned step: for-loop, foreach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _get_value

from . import rules
from .meta import learned, long_run, simple
from .meta.features import features, measure
from .meta.simple import Due
from .momentum import foreach_scale
from .nested import _count
from .rules.deep_nested import Inputs, coefficients, deep_nested, factor_for
from .tensors import to_scalar

if TYPE_CHECKING:
    from .deep_nested import DeepNestedOptimizer


class Lists(NamedTuple):
    """Lists of tensors, one entry per parameter; a list that is not needed is empty.

    The first five share their dtype per parameter. Slow momenta have their own, a list of them for
    each parameter.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    slow: list[list[Tensor]]
    last_grads: list[Tensor]  # where to keep the gradients as the moments saw them


def apply(optimizer: DeepNestedOptimizer, due: Due, flats: dict[str, Tensor]) -> None:
    """Update parameters of a group, as the weights of the networks say."""
    group, params, grads = due
    states = [optimizer.state[p] for p in params]
    slow_keys = optimizer._slow_keys(group)
    needed = {"exp_avg", *slow_keys}
    needed |= {"exp_avg_sq"} if group["normalize"] else set()
    needed |= {"max_exp_avg_sq"} if group["normalize"] and group["amsgrad"] else set()
    needed |= {"update_trace"} if optimizer._traces(group) else set()
    needed |= {"initial_param"} if long_run.is_on(group) else set()
    for p, state in zip(params, states):
        if not needed <= state.keys():  # switched on in mid-run
            optimizer._init_state(p, group, state)
    _count([state["step"] for state in states])
    steps = [_get_value(state["step"]) for state in states]

    at, place = optimizer._place(group)
    home = optimizer.param_groups[0]["params"][0].device
    momenta = [state["exp_avg"] for state in states] if "momentum" in flats else []
    sizes = measure(params, grads, momenta, maximize=group["maximize"], home=home)
    seen = simple.last_sizes(states, home) if optimizer._traces(group) else sizes
    of_group, of_tensors = features(
        flats, params, seen, place=place, step=max(steps), loss=optimizer._loss
    )
    inputs = learned.inputs_of(group, flats, group["betas"][0], of_group, of_tensors)
    optimizer._inputs[at] = inputs
    if optimizer._traces(group):
        simple.remember(group, states, of_group, of_tensors, sizes)

    dtypes = [torch.promote_types(p.dtype, s["exp_avg"].dtype) for p, s in zip(params, states)]
    kept = [params, [s["exp_avg"] for s in states], [], []]
    if group["normalize"]:
        kept[2] = [s["exp_avg_sq"] for s in states]
        if group["amsgrad"]:
            kept[3] = [s["max_exp_avg_sq"] for s in states]
    work = [[t.to(dtype) for t, dtype in zip(column, dtypes)] for column in kept]
    lists = Lists(
        work[0],
        [grad.to(dtype) for grad, dtype in zip(grads, dtypes)],
        work[1],
        work[2],
        work[3],
        [[s[key] for key in slow_keys] for s in states],
        [s["previous_grad"] for s in states] if optimizer._traces(group) else [],
    )
    if optimizer._uses_foreach(group, params):
        _multi_tensor_deepnestedoptimizer(lists, steps, inputs, group)
    else:
        _single_tensor_deepnestedoptimizer(lists, steps, inputs, group)
    for original, result in zip(chain(*kept), chain(*work)):
        if result is not original:
            original.copy_(result)


def each(inputs: Inputs, i: int, device: torch.device) -> Inputs:
    """The inputs of one tensor, on its device. ``(1,)`` holds for all tensors."""
    return _taken(inputs, lambda row: row[i if len(row) > 1 else 0], device)


def _rows(members: list[int], row: Tensor) -> Tensor:
    if len(row) == 1 or len(row) == len(members):
        return row
    return torch.stack([row[i] for i in members])  # an index would be copied to the device


def _taken(inputs: Inputs, take: Callable[[Tensor], Tensor], device: torch.device) -> Inputs:
    multiplier, scale, shift, damping = (
        None if row is None else take(row).to(device) for row in inputs[:4]
    )
    mixing = None if inputs.mixing is None else inputs.mixing.to(device)
    return Inputs(multiplier, scale, shift, damping, mixing)


def _single_tensor_deepnestedoptimizer(
    lists: Lists, steps: Sequence[float], inputs: Inputs, group: dict[str, Any]
) -> None:
    """The rule itself, tensor by tensor."""
    for i, param in enumerate(lists.params):
        new = deep_nested(
            param,
            lists.grads[i],
            lists.exp_avgs[i],
            lists.exp_avg_sqs[i] if lists.exp_avg_sqs else None,
            lists.max_exp_avg_sqs[i] if lists.max_exp_avg_sqs else None,
            lists.slow[i],
            inputs=each(inputs, i, param.device),
            **rule_options(group, steps[i], len(lists.slow[i])),
        )
        kept = [param, lists.exp_avgs[i]]
        results: list[Any] = [new.param, new.exp_avg]
        for column, result in (
            (lists.exp_avg_sqs, new.exp_avg_sq),
            (lists.max_exp_avg_sqs, new.max_exp_avg_sq),
            (lists.last_grads, new.grad),
        ):
            if column:
                kept.append(column[i])
                results.append(result)
        for tensor, result in zip([*kept, *lists.slow[i]], [*results, *new.slow]):
            tensor.copy_(result)


def rule_options(group: dict[str, Any], step: float, slow: int) -> dict[str, Any]:
    """What the rule takes of a group's options."""
    return {
        "step": step,
        "lr": to_scalar(group["lr"]),
        "betas": group["betas"],
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "decoupled": group["decoupled"],
        "maximize": group["maximize"],
        "frequencies": group["cms_frequencies"][: slow + 1],
    }


def _multi_tensor_deepnestedoptimizer(
    lists: Lists, steps: Sequence[float], inputs: Inputs, group: dict[str, Any]
) -> None:
    """The rule on lists of tensors."""
    kinds: dict[Any, list[int]] = {}
    for i, p in enumerate(lists.params):
        kinds.setdefault((p.device, p.dtype, steps[i]), []).append(i)
    for (device, _, step), members in kinds.items():
        columns: Any = ([column[i] for i in members] if column else [] for column in lists)
        theirs = _taken(inputs, partial(_rows, members), device)
        _multi_tensor_of_a_kind(Lists(*columns), step, theirs, group)


def _multi_tensor_of_a_kind(
    lists: Lists, step: float, inputs: Inputs, group: dict[str, Any]
) -> None:
    """Tensors of one device, dtype and step; inputs ``(tensors,)`` or ``(1,)``."""
    lr, weight_decay, eps = to_scalar(group["lr"]), group["weight_decay"], group["eps"]
    beta1, beta2 = group["betas"]
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, slow, last_grads = lists
    count = len(params)
    if params[0].is_complex():  # before all else, as torch's: complex products round differently
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, last_grads = (
            list(map(torch.view_as_real, column))
            for column in (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, last_grads)
        )
        slow = [list(map(torch.view_as_real, momenta)) for momenta in slow]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        if group["decoupled"]:
            rate: Any = lr * weight_decay
            if inputs.multiplier is not None:
                rate = rate * inputs.multiplier[0]
            if isinstance(rate, Tensor):
                _scale(params, 1 - rate)
            else:
                torch._foreach_mul_(params, 1 - rate)
        else:
            if isinstance(weight_decay, Tensor):
                penalties = torch._foreach_mul(params, weight_decay)
                grads = list(torch._foreach_add(grads, penalties))
            else:
                grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    if last_grads:
        torch._foreach_copy_(last_grads, grads)

    if inputs.damping is not None:
        _scale(exp_avgs, 1 - inputs.damping)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    frequencies = group["cms_frequencies"][: len(slow[0]) + 1]
    fast, now, others = coefficients(inputs, step, beta1, frequencies)
    numerators = exp_avgs
    if fast is not None or now is not None or others:
        numerators = [m.clone() for m in exp_avgs]
    if fast is not None:
        _scale(numerators, fast)
    if now is not None:
        _add(numerators, grads, now)
    for momenta, weight, frequency in zip(zip(*slow), others, frequencies[1:]):
        _advance_slow(list(momenta), grads, step, frequency, beta1)
        _add(numerators, list(momenta), weight)

    first, second = rules.bias_corrections(step, (beta1, beta2))
    size: Any = -(lr / first)
    if not exp_avg_sqs:
        torch._foreach_add_(params, numerators, alpha=size)
        return
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    if max_exp_avg_sqs:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
    denominators = torch._foreach_sqrt(max_exp_avg_sqs or exp_avg_sqs)
    torch._foreach_div_(denominators, [second**0.5] * count)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, numerators, denominators, [size] * count)


def _scale(tensors: list[Tensor], weights: Tensor) -> None:
    """In place; one 0-d weight for each tensor, while ``(1,)`` and 0-d hold for all."""
    each_weight = weights.expand(len(tensors)).unbind(0)
    torch._foreach_mul_(tensors, [factor_for(t, w) for t, w in zip(tensors, each_weight)])


def _add(totals: list[Tensor], tensors: list[Tensor], weights: Tensor) -> None:
    # In place on copies: a 0-d tensor times a 0-d weight would be of the weight's dtype.
    scaled = [t.clone() for t in tensors]
    _scale(scaled, weights)
    torch._foreach_add_(totals, [t.to(total.dtype) for t, total in zip(scaled, totals)])


def _advance_slow(
    momenta: list[Tensor], grads: list[Tensor], step: float, frequency: int, beta: float
) -> None:
    """``rules.deep_nested.slow_momentum`` on lists, in place."""
    if (step - 1) % frequency == 0:
        foreach_scale(momenta, beta)
    wide = [grad.to(m.dtype) for grad, m in zip(grads, momenta)]
    torch._foreach_add_(momenta, wide, alpha=(1 - beta) / frequency)
