"""M3's rule on the kernels: one launch before a group's matrices are orthogonalised, a few after.

A :class:`FusedMatrices` belongs to one optimizer and holds nothing that a checkpoint needs. Its
plans are made from a group's parameters and their state, and every update verifies that they still
describe them: the same tensors, at the same addresses, with the same options.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import kernels, rules
from .m3_steps import advance_chunks, matrix_form, ns_dtype
from .orthogonalize import orthogonal_batches
from .tensors import capturing, to_scalar

if TYPE_CHECKING:
    from .kernels.momenta import Matrix, MomentumTable, MoveTable

#: Plans that are kept at once: one per group, as long as all its parameters have gradients.
_MAX_PLANS = 32

# What a plan is made for, of a group's options.
_structure = itemgetter(
    "mode", "capturable", "kahan_sum", "second_moment", "flatten", "out_dim", "split_sizes",
    "num_heads", "ns_dtype", "max_batch_bytes", "state_dtype",
)  # fmt: skip
_dtype, _shape = attrgetter("dtype"), attrgetter("shape")
_F32 = torch.float32


def wanted(group: dict[str, Any]) -> bool:
    """Whether matrices go by the kernels wherever those can serve: not if a path was asked for."""
    if group["fused"] is not None or group["mode"] == "paper":
        return bool(group["fused"])
    return group["foreach"] is None and not group["differentiable"]


def serves(group: dict[str, Any], param: Tensor, state: dict[str, Any], grad: Tensor) -> bool:
    """Whether the kernels update this matrix: where they know all of it.

    ``state`` is complete. What has no kernel is left to the other paths: sharded parameters,
    float64, compensated sums, and tensors that are not contiguous.
    """
    if not wanted(group) or not kernels.available(param.device):
        return False
    if type(param) not in (Tensor, torch.nn.Parameter) or "kahan_comp" in state:
        return False
    from .kernels.momenta import DTYPES  # Triton is there

    narrow = [param, grad, state["momentum_buffer"]]
    wide = []
    if group["alpha"]:
        narrow.append(state["slow_update"])
        wide.append(state["slow_momentum_buffer"])
    if group["second_moment"] is not None:
        wide.append(state["second_moment"])
    return (
        param.numel() > 0
        and type(grad) is Tensor
        and ns_dtype(param, group) in DTYPES
        and all(t.dtype in DTYPES for t in narrow)
        and all(t.dtype == _F32 for t in wide)
        and all(t.is_contiguous() for t in (param, *narrow[2:], *wide))
        and all(t.device == param.device for t in (grad, *narrow, *wide))
    )


class _Part(NamedTuple):
    """One of the tensors that a parameter is split into, each a batch of matrices."""

    param: int  # which parameter
    place: int  # which of its tensors
    matrices: list[Matrix]


class _Stack(NamedTuple):
    """Parts whose matrices have one shape and are orthogonalised as one tensor."""

    parts: list[_Part]
    start: int  # in the buffer
    shape: tuple[int, int, int]
    move: MoveTable


class _Bucket:
    """Parameters of a plan that have their device and all dtypes in common, and their tables."""

    def __init__(
        self,
        at: list[int],
        params: list[Tensor],
        states: list[dict[str, Any]],
        grad_dtype: torch.dtype,
        group: dict[str, Any],
    ) -> None:
        from .kernels.momenta import MomentumTable, MoveTable
        from .kernels.tables import AddressRing

        self.at, self.params, self.grad_dtype = at, params, grad_dtype
        self.device = params[0].device
        self.dtype = ns_dtype(params[0], group)
        self.form = matrix_form(group)
        slow = bool(group["alpha"])
        momenta = [state["momentum_buffer"] for state in states]
        self.slow = [state["slow_momentum_buffer"] for state in states] if slow else []
        self.slow_updates = [state["slow_update"] for state in states] if slow else []
        self.counts = [state["slow_count"] for state in states] if slow else []
        self.on_device = bool(group["capturable"])
        by_row = group["second_moment"] == "row"
        seconds = [s["second_moment"] for s in states] if group["second_moment"] else []
        self.seconds = seconds if by_row else []

        stacks, self.length = _stacks(self._parts(), group["max_batch_bytes"], self.dtype)
        matrices = [m for parts, _, _ in stacks for part in parts for m in part.matrices]
        offsets = []
        for _, start, (count, rows, columns) in stacks:
            offsets += [start + i * rows * columns for i in range(count)]
        counts = self.counts if self.on_device else []
        self.table: MomentumTable = MomentumTable(
            matrices, offsets, grad_dtype, momenta, self.slow, counts
        )
        self.stacks: list[_Stack] = []
        for parts, start, shape in stacks:
            of = [m for part in parts for m in part.matrices]
            # Means over rows take operations of torch's, and give the whole direction.
            read = ([], []) if by_row else (self.slow_updates, seconds)
            move = MoveTable(of, params, *read)
            self.stacks.append(_Stack(parts, start, shape, move))
        self.ring = AddressRing(len(params), self.device)
        self.addresses = torch.zeros(len(params), dtype=torch.int64, device=self.device)

    def _parts(self) -> list[_Part]:
        from .kernels.momenta import Matrix

        parts = []
        for k, param in enumerate(self.params):
            for j, part in enumerate(self.form.split(param.detach())):
                first = int(part.storage_offset() - param.storage_offset())
                count, rows, columns = part.shape
                step, stride, _ = part.stride()
                of = [Matrix(k, first + b * step, rows, columns, stride) for b in range(count)]
                if of and rows and columns:
                    parts.append(_Part(k, j, of))
        return parts

    def pieces(self, tensors: Sequence[Tensor], parts: Sequence[_Part]) -> list[Tensor]:
        """Of tensors of the parameters' shape, or that of their rows, these parts."""
        split: dict[int, list[Tensor]] = {}
        for part in parts:
            if part.param not in split:
                split[part.param] = self.form.split(tensors[part.param])
        return [split[part.param][part.place] for part in parts]


def _stacks(
    parts: list[_Part], max_bytes: int, dtype: torch.dtype
) -> tuple[list[tuple[list[_Part], int, tuple[int, int, int]]], int]:
    """Parts of one shape, each with its place in a buffer and its shape; the buffer's length.

    As many parts at a time as the memory for one batch allows, or one.
    """
    buckets: dict[tuple[int, int], list[_Part]] = {}
    for part in parts:
        first = part.matrices[0]
        buckets.setdefault((first.rows, first.columns), []).append(part)
    stacks: list[tuple[list[_Part], int, tuple[int, int, int]]] = []
    at = 0
    for (rows, columns), alike in buckets.items():
        short, long = sorted((rows, columns))
        each = dtype.itemsize * (3 * short * long + 5 * short * short)
        runs: list[list[_Part]] = []
        room = 0
        for part in alike:
            room -= len(part.matrices) * each
            if not runs or room < 0:
                runs.append([])
                room = max_bytes - len(part.matrices) * each
            runs[-1].append(part)
        for run in runs:
            count = sum(len(part.matrices) for part in run)
            stacks.append((run, at, (count, rows, columns)))
            at += -(-count * rows * columns // 4) * 4  # the next one is aligned, too
    return stacks, at


class _Plan:
    """What one update of a group does with its parameters, and what it was made for."""

    def __init__(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        states: list[dict[str, Any]],
        grads: list[Tensor],
    ) -> None:
        self.params = list(params)
        self.structure = _structure(group)
        self.keys = _keys(group)
        self.grads = [(type(grad), grad.dtype) for grad in grads]
        self.members = self._gather(states)
        self.memory = _memory(self.params, self.members)
        self.steps = [state["step"] for state in states]
        self.left: list[int] = []
        split: dict[Any, list[int]] = {}
        for i, (param, state, grad) in enumerate(zip(params, states, grads)):
            if serves(group, param, state, grad):
                update = state["slow_update"].dtype if group["alpha"] else None
                momentum = state["momentum_buffer"].dtype
                key = (param.device, param.dtype, grad.dtype, momentum, update)
                split.setdefault(key, []).append(i)
            else:
                self.left.append(i)
        self.buckets = [
            _Bucket(at, [params[i] for i in at], [states[i] for i in at], key[2], group)
            for key, at in split.items()
        ]

    def _gather(self, states: list[dict[str, Any]]) -> list[Any]:
        return [state.get(key) for state in states for key in self.keys]

    def fits(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        states: list[dict[str, Any]],
        grads: list[Tensor],
    ) -> bool:
        """Whether these are the tensors and options that the plan was made for."""
        if len(params) != len(self.params) or _keys(group) != self.keys:
            return False
        members = self._gather(states)
        return (
            all(map(is_, params, self.params))
            and all(map(is_, members, self.members))
            and [(type(grad), grad.dtype) for grad in grads] == self.grads
            and _structure(group) == self.structure
            and _memory(self.params, members) == self.memory
        )


def _keys(group: dict[str, Any]) -> tuple[str, ...]:
    slow = ("slow_momentum_buffer", "slow_update", "slow_count") if group["alpha"] else ()
    second = ("second_moment",) if group["second_moment"] is not None else ()
    kahan = ("kahan_comp",) if group["kahan_sum"] else ()
    return ("step", "momentum_buffer", *slow, *second, *kahan)


def _memory(params: list[Tensor], members: list[Any]) -> tuple[Any, ...]:
    tensors = [t for t in chain(params, members) if t is not None]
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.is_contiguous, tensors)),
        list(map(_dtype, tensors)),
        list(map(_shape, params)),
    )


class FusedMatrices:
    """The plans of one optimizer."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._captured: list[_Plan] = []  # what CUDA graphs read

    def find(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        states: list[dict[str, Any]],
        grads: list[Tensor],
    ) -> _Plan | None:
        """The plan for this update, if there is a true one; changes nothing."""
        plan = self._plans.get(tuple(map(id, params)))
        return plan if plan is not None and plan.fits(group, params, states, grads) else None

    def make(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        states: list[dict[str, Any]],
        grads: list[Tensor],
    ) -> _Plan:
        """A plan for parameters whose state is complete."""
        if capturing():
            raise RuntimeError(
                "a CUDA graph capture needs the tables of an earlier step: run step() on these "
                "parameters, with these options, before the capture"
            )
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        plan = self._plans[tuple(map(id, params))] = _Plan(group, params, states, grads)
        return plan

    def forget(self) -> None:
        """Drop the plans: the optimizer's state has been replaced. Captured graphs keep theirs."""
        self._plans.clear()

    def run(self, plan: _Plan, group: dict[str, Any], grads: list[Tensor]) -> None:
        """One update of the parameters that the plan does not leave to others."""
        captured = capturing()
        if captured:
            self._captured.append(plan)
        for bucket in plan.buckets:
            _update(bucket, group, [grads[i] for i in bucket.at], captured)


def _update(bucket: _Bucket, group: dict[str, Any], grads: list[Tensor], captured: bool) -> None:
    if not all(map(Tensor.is_contiguous, grads)):
        grads = [grad.contiguous() for grad in grads]
    beta1, _, beta3 = group["betas"]
    alpha = group["alpha"]
    addresses = list(map(Tensor.data_ptr, grads))
    ring = bucket.ring
    # Copied, because every program reads one of them, and the host's memory is far away.
    written = ring.give(addresses) if captured else ring.write(addresses)
    bucket.addresses.copy_(written, non_blocking=True)
    buffer = torch.empty(bucket.length, dtype=_F32, device=bucket.device)
    sums = torch.empty(bucket.table.chunks, dtype=_F32, device=bucket.device)
    bucket.table.launch(
        bucket.addresses,
        buffer,
        sums,
        beta1=beta1,
        beta3=beta3,
        opens=_opens(bucket, beta3) if alpha and not bucket.on_device else False,
        share=(1 - beta3) / group["slow_frequency"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )
    ends: list[Any] | None = None
    if alpha:
        ends = advance_chunks(bucket.counts, group["slow_frequency"], bucket.on_device)

    matrices = []
    for _, start, shape, _ in bucket.stacks:
        count, rows, columns = shape
        matrices.append(buffer[start : start + count * rows * columns].view(shape))
    norms: list[Tensor | None] = list(_norms(bucket, sums))
    ending: list[_Part] = []
    if ends is not None:
        ending = [p for s in bucket.stacks for p in s.parts if ends[p.param] is not False]
        matrices += bucket.pieces(bucket.slow, ending)
        norms += [None] * len(ending)

    n_fast = len(bucket.stacks)
    for batch in orthogonal_batches(
        matrices,
        rules.ns_schedule(group["ns_coefficients"], group["ns_steps"]),
        eps=group["eps"],
        dtype=bucket.dtype,
        max_batch_bytes=group["max_batch_bytes"],
        as_computed=True,
        norms=norms,
    ):
        parts = batch.result.split(batch.counts)
        for i, x in zip(batch.indices, parts):
            if i < n_fast:
                _move(bucket, bucket.stacks[i], group, x.contiguous())
        # Only now: this update still takes what the chunk before has left.
        fresh = [(ending[i - n_fast], x) for i, x in zip(batch.indices, parts) if i >= n_fast]
        if fresh and ends is not None:
            targets = bucket.pieces(bucket.slow_updates, [part for part, _ in fresh])
            kept = [x for _, x in fresh]
            if bucket.on_device:
                kept = [
                    torch.where(ends[part.param], x.to(old.dtype), old)
                    for (part, x), old in zip(fresh, targets)
                ]
            torch._foreach_copy_(targets, kept)


def _norms(bucket: _Bucket, sums: Tensor) -> Sequence[Tensor]:
    """Frobenius norms of what is to be orthogonalised, stack by stack."""
    from .kernels.momenta import CHUNK

    counts = [stack.shape[0] for stack in bucket.stacks]
    chunks = [-(-stack.shape[1] * stack.shape[2] // CHUNK) for stack in bucket.stacks]
    found = []
    for part, count in zip(sums.split([n * each for n, each in zip(counts, chunks)]), counts):
        found.append(part.view(count, -1).sum(1))
    norms: Tensor = torch.cat(found).sqrt_().view(-1, 1, 1)
    return list(norms.split(counts))


def _opens(bucket: _Bucket, beta3: float) -> bool:
    """Whether chunks open with this update: all of them, or their momenta have been scaled here."""
    first = [count.item() == 0 for count in bucket.counts]
    if all(first):
        return True
    if any(first):
        torch._foreach_mul_([m for m, opens in zip(bucket.slow, first) if opens], beta3)
    return False


def _move(bucket: _Bucket, stack: _Stack, group: dict[str, Any], x: Tensor) -> None:
    """Move the parameters of a stack along its orthogonalised matrices."""
    form, (_, rows, columns) = bucket.form, stack.shape
    alpha, beta2, eps = group["alpha"], group["betas"][1], group["eps"]
    lr, weight_decay = (_number(group[key]) for key in ("lr", "weight_decay"))
    size = lr * rules.lr_factor(group["adjust_lr"], rows, columns, form.out_dim)
    decay = 1 - lr * weight_decay
    sizes = None
    if isinstance(size, Tensor) or isinstance(decay, Tensor):
        sizes = torch.stack([_on_device(number, bucket.device) for number in (size, decay)])
        size, decay = 0.0, 1.0
    given = None
    if bucket.seconds:
        seconds = bucket.pieces(bucket.seconds, stack.parts)
        slows = bucket.pieces(bucket.slow_updates, stack.parts) if alpha else []
        x, ratio, second = rules.m3_direction(
            x.to(_F32),
            torch.cat(slows).to(_F32) if slows else None,
            torch.cat(seconds),
            alpha=alpha,
            beta2=beta2,
            eps=eps,
        )
        assert ratio is not None and second is not None
        x = x.contiguous()
        counts = [len(part.matrices) for part in stack.parts]
        torch._foreach_copy_(seconds, list(second.split(counts)))
        squares = ratio.reshape(-1).square()
        given = torch.stack([squares, torch.ones_like(squares)], dim=1)
    options = {"alpha": alpha, "beta2": beta2, "eps": eps, "size": size, "decay": decay}
    stack.move.launch(x, sizes=sizes, given=given, **options)


def _on_device(number: Any, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device, _F32)
    return torch.full((), number, dtype=_F32, device=device)  # waits for nothing


def _number(value: Any) -> Any:
    """An option's value; a tensor only where a host would have to wait for it."""
    if isinstance(value, Tensor):
        return value.item() if value.is_cpu else to_scalar(value)
    return value
