"""Delta Momentum on its kernels: what they serve, the products between them, kept tables.

The working space of a step is bounded: tensors are taken in parts, each with two launches for the
norms of its gradients, one that writes gradients and buffers as the products take them, the
products of one shape at a time, and a launch that updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .momentum import foreach_decay
from .tensors import capturing, is_dtensor, to_scalar

#: Bytes of units, and of copies, that a part's products work on; a larger tensor is a part alone.
_PART_BYTES = 2**27

#: Plans that are kept at once: one per group, and for each set of its windows that closes.
_MAX_PLANS = 64

_KINDS = (torch.float16, torch.bfloat16, torch.float32)
#: Dtypes of products whose range is that of a float32 buffer.
_PRODUCTS = (torch.bfloat16, torch.float32)

#: Elements at whose multiples a batch begins, for aligned loads and products.
_ALIGNED = 64

#: What must stay as it was for a plan to fit.
_LAYOUT: tuple[Any, ...] = (
    type,
    attrgetter("dtype"),
    attrgetter("device"),
    Tensor.size,
    Tensor.stride,
)


class _Batch(NamedTuple):
    """Matrices of one shape, side by side in the working space."""

    number: int
    rows: int
    columns: int
    unit: int
    copy: int
    direct: Tensor | None  # the buffer itself, where the products read it


class _Part(NamedTuple):
    members: list[int]
    table: Any
    batches: list[_Batch]
    space: int
    device: torch.device


class DeltaSteps:
    """The plans of one optimizer; made from its tensors, and verified at each step."""

    def __init__(self) -> None:
        self._plans: dict[Any, _Plan] = {}
        self._captured: list[_Plan] = []  # what CUDA graphs read

    def forget(self) -> None:
        """Drop the plans: the optimizer's state has been replaced. Captured graphs keep theirs."""
        self._plans.clear()

    def __call__(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        bufs: list[Tensor],
        grads: list[Tensor],
        product_dtype: torch.dtype | None,
    ) -> list[int] | None:
        """Update what the kernels serve, in place; which they leave, None for all."""
        lr, weight_decay = to_scalar(group["lr"]), to_scalar(group["weight_decay"])
        if isinstance(weight_decay, Tensor) or (isinstance(lr, Tensor) and lr.requires_grad):
            return None
        if product_dtype is not None and product_dtype not in _PRODUCTS:
            return None
        coupled = weight_decay != 0 and not group["decoupled"]
        captured = capturing()
        key = (product_dtype, coupled, *map(id, chain(params, bufs)))
        plan = self._plans.get(key)
        if plan is None or not plan.fits(grads):
            if captured:  # tables are made outside
                return None
            plan = _Plan(params, bufs, grads, product_dtype, coupled)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        if captured:
            self._captured.append(plan)

        sign = -1.0 if group["maximize"] else 1.0
        if isinstance(lr, Tensor) and lr.is_cpu:
            lr = float(lr)
        for part in plan.parts:
            theirs = [grads[i] for i in part.members]
            if coupled:
                theirs = foreach_decay(group, [params[i] for i in part.members], theirs)
                sign = 1.0
            _update(group, part, theirs, plan.dtypes[part.members[0]], lr, sign, captured)
        return plan.left


def _update(
    group: dict[str, Any],
    part: _Part,
    grads: list[Tensor],
    dtype: torch.dtype,
    lr: float | Tensor,
    sign: float,
    captured: bool,
) -> None:
    space = torch.empty(part.space, dtype=dtype, device=part.device)
    factors = part.table.prepare(
        grads,
        space,
        momentum=group["momentum"],
        rate=group["delta_rate"],
        normalized=group["normalized"],
        captured=captured,
    )
    for batch in part.batches:
        _multiply(batch, space)
    part.table.update(
        factors,
        space,
        lr=lr.to(part.device, non_blocking=True) if isinstance(lr, Tensor) else lr,
        weight_decay=group["weight_decay"] if group["decoupled"] else 0.0,
        momentum=group["momentum"],
        sign=sign,
    )


def _multiply(batch: _Batch, space: Tensor) -> None:
    """``b u^H u``, over ``b``'s copy or, where that is read to the end, over ``u``."""
    shape = (batch.number, batch.rows, batch.columns)
    strides = (batch.rows * batch.columns, batch.columns, 1)
    unit, copy = (space.as_strided(shape, strides, at) for at in (batch.unit, batch.copy))
    left = copy if batch.direct is None else batch.direct.view(shape)
    if batch.number == 1:
        unit, copy, left = unit[0], copy[0], left[0]
    multiply: Any = torch.mm if batch.number == 1 else torch.bmm
    if batch.rows <= batch.columns:
        multiply(multiply(left, unit.mT), unit, out=copy)
    else:
        multiply(left, multiply(unit.mT, unit), out=unit)


class _Plan:
    """Which tensors the kernels serve, and in which parts."""

    def __init__(
        self,
        params: list[Tensor],
        bufs: list[Tensor],
        grads: list[Tensor],
        product_dtype: torch.dtype | None,
        coupled: bool,
    ) -> None:
        self._members = [*params, *bufs]  # kept, for their identities are the plan's name
        #: DTensors are never served, and are not asked for their memory.
        self._plain = not any(map(is_dtensor, self._members))
        self.left: list[int] = []
        self.parts: list[_Part] = []
        if not self._plain:
            self.left.extend(range(len(params)))
            return
        self._memory = _memory(self._members)
        self._grads = _layouts(grads)
        self.dtypes = [_product_dtype(buf, product_dtype) for buf in bufs]
        buckets: dict[Any, list[int]] = {}
        for i, (p, buf, grad) in enumerate(zip(params, bufs, grads)):
            dtypes = (p.dtype, buf.dtype, grad.dtype)
            # The penalty is added by torch's operations, in one dtype.
            if _serves(p, buf, grad) and not (coupled and len(set(dtypes)) > 1):
                buckets.setdefault((p.device, *dtypes), []).append(i)
            else:
                self.left.append(i)
        for (_, _, _, grad_dtype), members in buckets.items():
            dtype = self.dtypes[members[0]]
            for runs in _in_parts(members, bufs, _PART_BYTES // dtype.itemsize):
                self.parts.append(_part(runs, params, bufs, grad_dtype, dtype))

    def fits(self, grads: list[Tensor]) -> bool:
        """Whether all tensors lie as they did, gradients anywhere."""
        if not self._plain:
            return True
        return _layouts(grads) == self._grads and _memory(self._members) == self._memory


def _layouts(tensors: Sequence[Tensor]) -> list[list[Any]]:
    return [list(map(read, tensors)) for read in _LAYOUT]


def _memory(tensors: Sequence[Tensor]) -> list[list[Any]]:
    return [list(map(Tensor.data_ptr, tensors)), *_layouts(tensors)]


def _product_dtype(buf: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    if wanted is None:
        return torch.float32 if buf.dtype == torch.float16 else buf.dtype  # as the rule has it
    return wanted


def _serves(param: Tensor, buf: Tensor, grad: Tensor) -> bool:
    """Whether all are walked through memory in one order, in which rows come one after another."""
    if type(param) not in (Tensor, torch.nn.Parameter) or {type(buf), type(grad)} != {Tensor}:
        return False
    if len({param.device, buf.device, grad.device}) > 1 or not kernels.available(param.device):
        return False
    if not {param.dtype, buf.dtype, grad.dtype} <= set(_KINDS) or param.numel() == 0:
        return False
    tensors = (param, buf, grad)
    if all(t.is_contiguous() for t in tensors):
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    format = formats.get(param.ndim)
    # Columns in another order are the same rule: it multiplies from the right.
    return format is not None and all(t.is_contiguous(memory_format=format) for t in tensors)


def _matrix_shape(tensor: Tensor) -> tuple[int, int]:
    rows = tensor.shape[0] if tensor.dim() > 1 else 1
    return rows, tensor.numel() // rows


def _in_parts(members: list[int], bufs: list[Tensor], limit: int) -> list[list[list[int]]]:
    """Parts of at most ``limit`` elements, as lists of runs of one matrix shape."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for i in members:
        shapes.setdefault(_matrix_shape(bufs[i]), []).append(i)
    parts: list[list[list[int]]] = [[]]
    room = limit
    for (rows, columns), same in shapes.items():
        start = 0
        while start < len(same):
            if room < rows * columns and parts[-1]:
                parts.append([])
                room = limit
            fits = max(1, room // (rows * columns))
            run = same[start : start + fits]
            parts[-1].append(run)
            room -= len(run) * rows * columns
            start += len(run)
    return parts


def _part(
    runs: list[list[int]],
    params: list[Tensor],
    bufs: list[Tensor],
    grad_dtype: torch.dtype,
    dtype: torch.dtype,
) -> _Part:
    from .kernels.delta import DeltaTable, Entry  # Triton is there

    entries, batches, at = [], [], 0
    for run in runs:
        rows, columns = _matrix_shape(bufs[run[0]])
        numel = rows * columns
        size = -(-len(run) * numel // _ALIGNED) * _ALIGNED
        unit, copy = at, at + size
        at += 2 * size
        direct = bufs[run[0]] if len(run) == 1 and bufs[run[0]].dtype == dtype else None
        if direct is not None:  # in the order of memory
            direct = direct.detach().as_strided((rows, columns), (columns, 1))
        batches.append(_Batch(len(run), rows, columns, unit, copy, direct))
        for k, i in enumerate(run):
            here = unit + k * numel, copy + k * numel
            copied = None if direct is not None else here[1]
            term = here[1] if rows <= columns else here[0]
            entries.append(Entry(params[i].detach(), bufs[i], here[0], copied, term))
    members = [i for run in runs for i in run]
    table = DeltaTable(entries, grad_dtype)
    return _Part(members, table, batches, at, bufs[members[0]].device)
