"""How M3's rule is carried out on lists of parameters: tensor by tensor, or matrices of one shape
together.

Each path takes parameters (of the dtype that the rule works in), their gradients and states and
updates parameters and states in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_value

from . import rules
from .orthogonalize import ns_dtype_for, orthogonal_batches
from .rules import MatrixForm
from .tensors import is_dtensor, laid_out_like, resolve_dtype, to_scalar, whole


def matrix_form(group: dict[str, Any]) -> MatrixForm:
    """How the group's parameters are read as matrices."""
    return MatrixForm(group["flatten"], group["out_dim"], group["split_sizes"], group["num_heads"])


def ns_dtype(param: Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype of the parameter's orthogonalised momenta."""
    name = group["ns_dtype"]
    if group["mode"] == "paper" and name is None:
        return torch.promote_types(param.dtype, torch.float32)
    return ns_dtype_for(param, resolve_dtype(name) if name is not None else None)


def reads_in_place(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> bool:
    """Whether matrices of the parameter, and of its state, are views of their own memory here."""
    if is_dtensor(param):
        return False
    if param.ndim == 2 or group["flatten"] is False:
        return True
    # A checkpoint may bring state of another memory format.
    written = (param, state.get("slow_update"), state.get("second_moment"))
    return all(t.is_contiguous() for t in written if t is not None)


_OPTIONS = ("betas", "alpha", "slow_frequency", "eps", "weight_decay", "maximize")


@dataclass(frozen=True)
class _Gathered(MatrixForm):
    """The form of a sharded parameter: every rank puts its matrices together and does all of it."""

    like: Any = None

    def split(self, tensor: Tensor) -> list[Tensor]:
        return super().split(whole(tensor))

    def join(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        joined = super().join(parts, shape)
        return laid_out_like(joined, self.like) if joined.shape == self.like.shape else joined


def _single_tensor_m3(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    """The rule itself, tensor by tensor."""
    schedule = rules.ns_schedule(group["ns_coefficients"], group["ns_steps"])
    for param, grad, state in zip(params, grads, states):
        form = matrix_form(group)
        if is_dtensor(param):
            form = _Gathered(**asdict(form), like=param)
        keys = ["momentum_buffer", "slow_momentum_buffer", "slow_update", "second_moment"]
        slow = bool(group["alpha"]) or group["mode"] == "paper"
        used = [True, slow, slow, group["second_moment"] is not None]
        kept: list[Any] = [param]
        kept += [state[key] if use else None for key, use in zip(keys, used)]
        # Autograd must find the old values unharmed when it comes back.
        old = [t.clone() if t is not None and group["differentiable"] else t for t in kept]
        old[1] = old[1].to(param.dtype)
        options: dict[str, Any] = {key: group[key] for key in _OPTIONS}
        options |= {"lr": to_scalar(group["lr"]), "schedule": schedule, "form": form}
        options["ns_dtype"] = ns_dtype(param, group)
        position: Any = 0
        if slow:
            count = state["slow_count"]
            position = count.clone() if group["capturable"] else int(_get_value(count))
            _advance_chunk(state, group)
        if group["mode"] == "paper":
            new: Any = rules.m3_paper(old[0], grad, *old[1:], position=position, **options)
        else:
            options |= {key: group[key] for key in ("adjust_lr", "nesterov")}
            new = rules.m3(old[0], grad, *old[1:], position=position, **options)
        for tensor, result in zip(kept, new):
            if tensor is not None and result is not tensor:
                tensor.copy_(laid_out_like(result, tensor) if is_dtensor(tensor) else whole(result))


def _advance_chunk(state: dict[str, Any], group: dict[str, Any]) -> Any:
    """Count one update in the running chunk; whether that ends it (a tensor with capturable)."""
    count = state["slow_count"]
    if group["capturable"]:
        count.add_(1)
        ends = count >= group["slow_frequency"]
        count.masked_fill_(ends, 0)
        return ends
    value = int(_get_value(count)) + 1
    ends = value >= group["slow_frequency"]
    count.fill_(0 if ends else value)
    return ends


def advance_chunks(
    counts: list[Tensor], frequency: int, on_device: bool
) -> list[bool] | list[Tensor]:
    """Count one update in each running chunk; which of them it ends (tensors on the device)."""
    if on_device:
        moved = torch.stack(counts) + 1
        ends = moved >= frequency
        torch._foreach_copy_(counts, list(moved.masked_fill(ends, 0).unbind()))
        return list(ends.unbind())
    values = [count.item() + 1 for count in counts]
    ended = [value >= frequency for value in values]
    if not any(ended):
        torch._foreach_add_(counts, _ONE, alpha=1.0)
    elif all(ended):
        torch._foreach_zero_(counts)
    else:
        for count, value, end in zip(counts, values, ended):
            count.fill_(0 if end else value)
    return ended


# Wrapped once: a Python number would be wrapped anew for each CPU tensor.
_ONE = torch.tensor(1.0)


def _multi_tensor_m3(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    """The rule on lists of tensors, matrices of one shape together."""
    lr, weight_decay = to_scalar(group["lr"]), group["weight_decay"]
    beta1, beta2, beta3 = group["betas"]
    alpha, form = group["alpha"], matrix_form(group)
    for (_, dtype), (bucket, grads_, order) in _split(params, grads).items():
        held = [states[i] for i in order]
        momenta = [state["momentum_buffer"] for state in held]
        if group["maximize"]:
            grads_ = list(torch._foreach_neg(grads_))
        if isinstance(weight_decay, Tensor) or weight_decay != 0:
            decay = 1 - lr * weight_decay
            if bucket[0].is_cpu:  # a number would be rounded to the tensors' dtype
                decay = torch.as_tensor(decay, dtype=torch.float64)
            torch._foreach_mul_(bucket, decay)
        wide = momenta
        if any(m.dtype != dtype for m in momenta):
            wide = [m.to(dtype) for m in momenta]
        torch._foreach_lerp_(wide, grads_, 1 - beta1)
        if wide is not momenta:
            torch._foreach_copy_(momenta, wide)
        ahead = list(torch._foreach_lerp(grads_, wide, beta1)) if group["nesterov"] else wide

        ends: list[Any] = [False] * len(bucket)
        if alpha:
            slow = [state["slow_momentum_buffer"] for state in held]
            counts = [state["slow_count"] for state in held]
            if group["capturable"]:
                opens = torch.stack(counts) == 0
                scales = torch.where(opens, beta3, 1.0).to(slow[0])
                torch._foreach_mul_(slow, list(scales.unbind()))
            elif opening := [m for m, count in zip(slow, counts) if count.item() == 0]:
                torch._foreach_mul_(opening, beta3)
            share = (1 - beta3) / group["slow_frequency"]
            torch._foreach_add_(slow, [g.to(slow[0].dtype) for g in grads_], alpha=share)
            ends = list(advance_chunks(counts, group["slow_frequency"], group["capturable"]))

        matrices: list[Tensor] = []
        places: list[tuple[int, int, bool]] = []  # parameter, which of its matrices, of M2
        for k, tensor in enumerate(ahead):
            matrices += form.split(tensor)
            places += [(k, j, False) for j in range(len(matrices) - len(places))]
        for k, end in enumerate(ends):
            if isinstance(end, Tensor) or end:
                matrices += form.split(slow[k])
                places += [(k, j, True) for j in range(len(matrices) - len(places))]
        work = torch.promote_types(dtype, torch.float32)

        # Views of what is read and written, made once for all batches.
        second = group["second_moment"] is not None
        seconds_of = [form.split(s["second_moment"]) for s in held] if second else []
        slows_of = [form.split(s["slow_update"]) for s in held] if alpha else []
        targets_of = list(map(form.split, bucket))

        for batch in orthogonal_batches(
            matrices,
            rules.ns_schedule(group["ns_coefficients"], group["ns_steps"]),
            eps=group["eps"],
            dtype=ns_dtype(bucket[0], group),
            max_batch_bytes=group["max_batch_bytes"],
        ):
            of = [places[i] for i in batch.indices]
            parts = list(batch.result.split(batch.counts))
            n_fast = sum(not is_slow for _, _, is_slow in of)
            if n_fast:
                here = of[:n_fast]
                fast = batch.result[: sum(batch.counts[:n_fast])]
                seconds = [seconds_of[k][j] for k, j, _ in here] if second else []
                slows = [slows_of[k][j] for k, j, _ in here] if alpha else []
                direction, ratio, moment = rules.m3_direction(
                    fast.to(work) if alpha or seconds else fast,
                    torch.cat(slows).to(work) if slows else None,
                    torch.cat(seconds) if seconds else None,
                    alpha=alpha,
                    beta2=beta2,
                    eps=group["eps"],
                )
                size = lr * rules.lr_factor(
                    group["adjust_lr"], fast.size(1), fast.size(2), form.out_dim
                )
                counts = batch.counts[:n_fast]
                targets = [targets_of[k][j] for k, j, _ in here]
                if ratio is None and not isinstance(size, Tensor):
                    torch._foreach_add_(targets, list(direction.split(counts)), alpha=-size)
                else:
                    factor = size if ratio is None else size * ratio
                    moves = (factor * direction.to(work)).to(dtype)
                    torch._foreach_sub_(targets, list(moves.split(counts)))
                if moment is not None:
                    torch._foreach_copy_(seconds, list(moment.split(counts)))
            # Only now: this update still takes what the chunk before has left.
            for (k, j, _), fresh in zip(of[n_fast:], parts[n_fast:]):
                target = slows_of[k][j]
                end = ends[k]
                kept = torch.where(end, fresh, target) if isinstance(end, Tensor) else fresh
                target.copy_(kept)


def _split(
    params: list[Tensor], grads: list[Tensor]
) -> dict[Any, tuple[list[Tensor], list[Tensor], list[int]]]:
    """Parameters, gradients and their indices, by device and dtype."""
    split: dict[Any, tuple[list[Tensor], list[Tensor], list[int]]] = {}
    for i, (param, grad) in enumerate(zip(params, grads)):
        bucket = split.setdefault((param.device, param.dtype), ([], [], []))
        bucket[0].append(param)
        bucket[1].append(grad)
        bucket[2].append(i)
    return split
