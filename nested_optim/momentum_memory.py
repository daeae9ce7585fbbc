"""The memory that ``DeepMomentum`` learns: its tensors in a param group, its training, its reading.

What it computes is in ``rules/momentum_memory.py``; here it meets lists of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rules
from .group_options import flat_option
from .rules.momentum import decay

#: Where the first param group holds the memory: flat float32 tensors.
TENSORS = ("memory_weights", "memory_exp_avg", "memory_exp_avg_sq")

_BETAS, _EPS = (0.9, 0.99), 1e-8
#: Strides through the sampled positions: the golden ratio visits them evenly.
_GOLDEN = 0.6180339887498949


class Sample(NamedTuple):
    """Coordinates of some tensors: what was known of them, and the gradient that then came.

    In float32. ``features`` is ``(3, n)``, the others ``(n,)``; ``valid`` is 0 where nothing was
    known yet.
    """

    features: Tensor
    target: Tensor
    valid: Tensor


def ensure(first: dict[str, Any], device: torch.device) -> Tensor:
    """The weights of the first group's memory, which is made on this device if there is none."""
    if first["memory_weights"] is None:
        weights = rules.initial_memory(first["hidden"], first["memory_seed"]).to(device)
        first["memory_weights"] = weights
        for key in TENSORS[1:]:
            first[key] = torch.zeros_like(weights)
        first["memory_step"] = 0
    found: Tensor = first["memory_weights"]
    return found


def empty_scales(param: Tensor) -> Tensor:
    """The ``scales`` of a parameter that has seen no gradient."""
    dtype = param.real.dtype if param.is_complex() else param.dtype
    dtype = torch.promote_types(dtype, torch.float32)
    return torch.zeros(rules.MEMORY_SCALES, dtype=dtype, device=param.device)


def checked(options: dict[str, Any], where: str) -> dict[str, Any]:
    """The memory's tensors as a group keeps them: all or none, in float32, beside its parameters.

    Raises:
        ValueError: one is missing or of another size.
    """
    found = {key: options[key] for key in TENSORS}
    if all(value is None for value in found.values()):
        return {}
    size, of = rules.memory_size(options["hidden"]), f"hidden={options['hidden']}"
    return {key: flat_option(options, key, size, of, where) for key in found}


def as_real(tensors: list[Tensor]) -> list[Tensor]:
    """Complex tensors as the real ones of their parts, which share their memory."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def by_kind(tensors: list[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """The lists split by device and dtype of the first, whatever the dtypes of the others."""
    kinds: dict[Any, list[int]] = {}
    for i, p in enumerate(tensors[0]):
        kinds.setdefault((p.device, p.dtype), []).append(i)
    for members in kinds.values():
        yield [[column[i] for i in members] for column in tensors]


def _expand(values: Tensor, sizes: list[int]) -> Tensor:
    """``(tensors, ...)`` to ``(..., coordinates)``: a tensor's values for all its coordinates."""
    return torch.cat(
        [value.unsqueeze(-1).expand(*value.shape, size) for value, size in zip(values, sizes)], -1
    )


def take_samples(
    first: dict[str, Any], total: int, tensors: list[list[Tensor]], group: dict[str, Any]
) -> list[Sample]:
    """From tensors that are about to be updated, a sample per device and dtype.

    Every stride-th coordinate, so that ``total`` coordinates would give ``memory_samples``,
    beginning at a place that the memory's own count decides.

    Args:
        first: the group that holds the memory.
        total: elements of all parameters.
        tensors: parameters, gradients, buffers, fast and slow averages, scales.
        group: the parameters' own.
    """
    stride = max(1, -(-total // first["memory_samples"]))
    offset = int(stride * (first["memory_step"] * _GOLDEN % 1.0))
    penalty = 0.0 if group["decoupled"] else group["weight_decay"]
    samples = []
    at = 0
    for *shaped, scales in by_kind(tensors):
        columns: list[list[Tensor]] = [[] for _ in shaped]
        members: list[Tensor] = []
        for scale, *same in zip(scales, *map(as_real, shaped)):
            start = (offset - at) % stride
            at += same[0].numel()
            if start < same[0].numel():
                members.append(scale)
                for column, tensor in zip(columns, same):
                    column.append(tensor.reshape(-1)[start::stride])
        if not members:
            continue
        sizes = [len(part) for part in columns[0]]
        params, grads, *state = map(torch.cat, columns)
        _, grads = decay(params, grads, lr=0.0, weight_decay=penalty, maximize=group["maximize"])
        units = _expand(rules.memory_units(torch.stack(members)), sizes)
        features = torch.stack([t.to(units.dtype) * u for t, u in zip(state, units)])
        samples.append(
            Sample(
                features.float(),
                (grads.to(units.dtype) * units[-1]).float(),
                (units[-1] > 0).float(),
            )
        )
    return samples


def train(first: dict[str, Any], samples: list[Sample]) -> dict[str, Tensor]:
    """One Adam step of the memory of this group, in place; the losses before it."""
    weights, exp_avg, exp_avg_sq = (first[key] for key in TENSORS)
    features, target, valid = (
        torch.cat([part.to(weights.device) for part in column], -1) for column in zip(*samples)
    )
    objective = first["objective"]
    with torch.enable_grad():
        trained = weights.detach().requires_grad_()
        loss = rules.memory_loss(trained, features, target, valid, objective)
        (grad,) = torch.autograd.grad(loss, trained)
    without = rules.prediction_loss(features[0], torch.zeros_like(target), target, valid, objective)
    first["memory_step"] += 1
    new = rules.adamw(
        weights,
        grad,
        exp_avg,
        exp_avg_sq,
        step=first["memory_step"],
        lr=first["memory_lr"],
        betas=_BETAS,
        eps=_EPS,
        weight_decay=0.0,
    )
    finite = torch.isfinite(grad).all()  # or the memory would never recover
    for tensor, result in zip((weights, exp_avg, exp_avg_sq), new):
        tensor.copy_(torch.where(finite, result, tensor))  # type: ignore[arg-type]
    return {"memory_loss": loss.detach(), "momentum_loss": without}


def directions(
    weights: Tensor,
    state: list[list[Tensor]],
    units: Tensor,
    trust: float,
    pack_elements: int,
) -> list[Tensor]:
    """What each tensor descends along; up to so many elements go through the memory at once.

    Args:
        weights: of the memory.
        state: buffers, fast and slow averages, real, of one device and dtype.
        units: ``(tensors, 5)``.
        trust: see ``rules.trusted_direction``.
        pack_elements: tensors are packed up to this many elements.
    """
    bufs = state[0]
    packs: list[list[int]] = []
    room = 0
    for i, buf in enumerate(bufs):
        room -= buf.numel()
        if not packs or room < 0:
            packs.append([])
            room = pack_elements - buf.numel()
        packs[-1].append(i)
    outputs: list[Tensor] = []
    for pack in packs:
        columns = [[column[i] for i in pack] for column in state]
        if len(pack) == 1:
            alone = [column[0] for column in columns]
            outputs.append(rules.memory_output(weights, alone, units[pack[0]]))
            continue
        sizes = [buf.numel() for buf in columns[0]]
        flat = [torch.cat([t.reshape(-1) for t in column]) for column in columns]
        of_each = _expand(units[pack[0] : pack[-1] + 1], sizes)
        parts = rules.memory_output(weights, flat, of_each).split(sizes)
        outputs += [part.view(buf.shape) for part, buf in zip(parts, columns[0])]
    if not pack_elements:
        return [rules.trusted_direction(b, output, trust) for b, output in zip(bufs, outputs)]

    # rules.trusted_direction in few launches.
    dtype = outputs[0].dtype
    allowed, wanted = (torch.stack(torch._foreach_norm(ts, 2, dtype)) for ts in (bufs, outputs))
    allowed = trust * allowed
    ratios = torch.where(wanted > allowed, allowed / wanted, torch.ones_like(wanted))
    added = torch._foreach_mul(outputs, list(ratios.unbind(0)))
    return [total.to(bufs[0].dtype) for total in torch._foreach_add(added, bufs)]


def mean_squares(grads: list[Tensor]) -> Tensor:
    """``rules.mean_square`` of each real tensor, ``(tensors,)``."""
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    norms = torch._foreach_norm(grads, 2, wide)
    squares = torch._foreach_mul(norms, norms)
    torch._foreach_div_(squares, [float(max(1, grad.numel())) for grad in grads])
    return torch.stack(squares)
