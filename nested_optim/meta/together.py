"""A learned update of a group's tensors as a pure function, for the unroll and for TorchOpt.

What ``DeepNestedOptimizer.step`` does in place where windows have closed: measure, look, update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..deep_nested_steps import each, rule_options
from ..rules.deep_nested import Inputs, deep_nested
from . import learned
from .features import features, measure

#: A parameter with its optimizer state, by the state's keys, and the parameter as ``"param"``.
Slot = dict[str, Tensor]


class Due(NamedTuple):
    """A tensor whose update is due.

    Attributes:
        slot: its parameter and state.
        grad: what its window came to.
        step: how many updates there will have been with this one.
        own: options that are not the group's (``lr``, ``weight_decay``).
    """

    slot: Slot
    grad: Tensor
    step: float
    own: Mapping[str, Any] = {}


def update(
    due: Sequence[Due],
    options: Mapping[str, Any],
    flats: dict[str, Tensor],
    slow_keys: Sequence[str],
    *,
    place: float,
    home: torch.device,
    loss: Tensor | None,
    last: Tensor | None = None,
    root: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[Slot], Tensor]:
    """New slots of tensors of one group.

    Args:
        due: the tensors, at least one.
        options: the group's.
        flats: the learned modules' weights.
        slow_keys: where a slot keeps its slow momenta.
        place: of the group among the groups, from 0 to 1.
        home: where the networks are.
        loss: this step's, 0-d; None where the step was not told.
        last: ``(tensors, SIZES)`` for the networks to see; None shows them what is measured now.
        root: see :func:`nested_optim.rules.deep_nested.deep_nested`.

    Returns:
        The slots, and ``(tensors, SIZES)``, what was measured.
    """
    params = [one.slot["param"] for one in due]
    grads = [one.grad for one in due]
    momenta = [one.slot["exp_avg"] for one in due] if "momentum" in flats else []
    sizes = measure(params, grads, momenta, maximize=options["maximize"], home=home)
    seen = sizes if last is None else last
    of_group, of_tensors = features(
        flats, params, seen, place=place, step=max(one.step for one in due), loss=loss
    )
    inputs = learned.inputs_of(dict(options), flats, options["betas"][0], of_group, of_tensors)
    slots = [
        _updated(one, {**options, **one.own}, each(inputs, row, param.device), slow_keys, root)
        for row, (one, param) in enumerate(zip(due, params))
    ]
    return slots, sizes


def _updated(
    due: Due,
    options: dict[str, Any],
    inputs: Inputs,
    slow_keys: Sequence[str],
    root: Callable[[Tensor], Tensor] | None,
) -> Slot:
    slot = due.slot
    param, exp_avg = slot["param"], slot["exp_avg"]
    dtype = torch.promote_types(param.dtype, exp_avg.dtype)
    second, largest = (
        slot[key].to(dtype) if key in slot else None for key in ("exp_avg_sq", "max_exp_avg_sq")
    )
    new = deep_nested(
        param.to(dtype),
        due.grad.to(dtype),
        exp_avg.to(dtype),
        second,
        largest,
        [slot[key] for key in slow_keys],
        inputs=inputs,
        root=root,
        **rule_options(options, due.step, len(slow_keys)),
    )
    result = {**slot, "param": new.param.to(param.dtype)}
    for key, value in (
        ("exp_avg", new.exp_avg),
        ("exp_avg_sq", new.exp_avg_sq),
        ("max_exp_avg_sq", new.max_exp_avg_sq),
        *zip(slow_keys, new.slow),
    ):
        if value is not None:
            result[key] = value.to(slot[key].dtype)
    return result
