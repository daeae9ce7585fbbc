"""Delta Momentum on its kernels: what they serve, the products between them, kept tables.

All tensors of one device and set of dtypes are measured by two launches, the norms of their
gradients. Then they are taken in parts, so that the working space of a step is bounded: a launch
that writes gradients and buffers as the products take them, the products of one shape at a time,
and a launch that updates.
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .nested import _count
from .repeats import Roster, same_objects
from .tensors import capturing, to_scalar

if TYPE_CHECKING:
    from .fused import Work
    from .kernels.delta import DeltaTable
    from .optimizer import LevelOptimizer

#: Bytes of units, and of copies, that a part's products work on; a larger tensor is a part alone.
#: The space for the largest part is all that a step allocates.
_PART_BYTES = 2**27

#: Plans that are kept at once: one per group, and for each set of its windows that closes.
_MAX_PLANS = 64

_KINDS = (torch.float16, torch.bfloat16, torch.float32)
#: Dtypes of products whose range is that of a float32 buffer.
_PRODUCTS = (torch.bfloat16, torch.float32)

#: Elements at whose multiples a batch begins, for aligned loads and products.
_ALIGNED = 64

_grad, _dtype, _params = attrgetter("grad"), attrgetter("dtype"), itemgetter("params")
#: Options that a step checks, or on which it depends otherwise than on a number.
_structure = itemgetter(
    "foreach", "fused", "capturable", "differentiable", "product_dtype", "decoupled",
    "frequency", "window",
)  # fmt: skip


def takes(group: dict[str, Any]) -> bool:
    """Whether the kernels know these options."""
    lr = group["lr"]
    return bool(
        # Without the term, torch's operations have torch.optim.SGD's bits.
        group["delta_rate"]
        and group["momentum"]
        and group["foreach"] is None
        and not group["differentiable"]
        and not isinstance(group["weight_decay"], Tensor)
        and not (isinstance(lr, Tensor) and lr.requires_grad)
    )


def default_product_dtype(buf: Tensor) -> torch.dtype | None:
    """The dtype of a buffer's products where none is asked for; None where the rule has its own."""
    return torch.bfloat16 if buf.device.type == "cuda" and buf.dtype in _KINDS else None


class _Batch(NamedTuple):
    """Matrices of one shape, side by side in the working space."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    unit: int
    copy: int
    direct: Tensor | None  # the buffer itself, where the products read it


class _Bucket(NamedTuple):
    """Tensors of one device and set of dtypes."""

    members: list[int]  # in the table's order
    table: DeltaTable
    parts: list[list[_Batch]]
    space: int  # elements, of the largest part
    dtype: torch.dtype


class DeltaSteps:
    """The plans of one optimizer; made from its tensors, and verified at each step."""

    def __init__(self) -> None:
        self._plans: dict[Any, _Plan] = {}
        self._captured: list[_Plan] = []  # what CUDA graphs read
        self._used: list[_Plan] = []  # by the present step
        self._last: _Step | None = None

    def forget(self) -> None:
        """Drop the plans: the optimizer's state has been replaced. Captured graphs keep theirs."""
        self._plans.clear()
        self._last = None

    def __call__(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        bufs: list[Tensor],
        grads: list[Tensor],
        product_dtype: torch.dtype | None,
    ) -> list[int] | None:
        """Update what the kernels serve, in place; which they leave, None for all."""
        if product_dtype is not None and product_dtype not in _PRODUCTS:
            return None
        captured = capturing()
        key = (product_dtype, *map(id, chain(params, bufs)))
        plan = self._plans.get(key)
        found = plan.find(grads) if plan is not None else None
        if plan is None or found is None or not plan.lies():
            if captured:  # tables are made outside
                return None
            plan = _Plan(params, bufs, grads, product_dtype)
            found = plan.find(grads)
            assert found is not None  # it is made of these
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        if captured:
            self._captured.append(plan)
        self._used.append(plan)
        plan.measure(group, found, captured)
        plan.update(group)
        return plan.left

    # ------------------------------------------------------------------ steps like the last one

    def remember(self, optimizer: LevelOptimizer, work: Work) -> None:
        """Note a step, if the kernels made all of it and no window was open."""
        used, self._used = self._used, []
        work = [entry for entry in work if entry[1]]
        if (
            len(used) == len(work)
            and all(group["frequency"] == 1 for group, _, _ in work)
            and not any(plan.left for plan in used)
            and all(same_objects(plan.params, params) for plan, (_, params, _) in zip(used, work))
            and not any("window_sum" in optimizer.state[p] for _, ps, _ in work for p in ps)
        ):
            self._last = _Step(optimizer, work, used)

    def repeat(self, optimizer: LevelOptimizer) -> bool:
        """Make a step like the one before, if nothing but numbers differs; whether it was made.

        The device begins with what only reads gradients, and the rest is verified meanwhile.
        """
        last, self._last = self._last, None
        if last is None:
            return False
        found = last.find(optimizer)
        if found is None:
            return False
        for (group, plan), addresses in zip(last.plans, found):
            plan.measure(group, addresses, captured=False)
        if not last.holds(optimizer):
            return False
        for group, plan in last.plans:
            plan.update(group)
        for steps in last.steps:
            _count(steps)
        self._last = last
        return True


class _Step:
    """All that a step depended on, but for numbers.

    What is not noticed: ``tensor.data = ...`` that gives a tensor another shape, of as many
    elements at the same address.
    """

    def __init__(self, optimizer: LevelOptimizer, work: Work, plans: list[_Plan]) -> None:
        self._roster = Roster(optimizer, (p for _, params, _ in work for p in params))
        self._structure = list(map(_structure, optimizer.param_groups))
        self._held = _values(optimizer)
        self.plans = [(group, plan) for (group, _, _), plan in zip(work, plans)]
        self.steps = [[optimizer.state[p]["step"] for p in params] for _, params, _ in work]

    def find(self, optimizer: LevelOptimizer) -> list[list[list[int]]] | None:
        """The gradients' addresses for each plan, if they are such ones of the same groups."""
        groups = optimizer.param_groups
        if not (self._roster.holds(optimizer) and all(map(takes, groups))):
            return None
        if not all(map(same_objects, map(_structure, groups), self._structure)):
            return None
        found = []
        for _, plan in self.plans:
            addresses = plan.find(list(map(_grad, plan.params)))
            if addresses is None:
                return None
            found.append(addresses)
        return found

    def holds(self, optimizer: LevelOptimizer) -> bool:
        """Whether the state consists of the same tensors, and they lie where they did."""
        return same_objects(_values(optimizer), self._held) and all(
            plan.lies() for _, plan in self.plans
        )


def _values(optimizer: LevelOptimizer) -> list[Any]:
    """All that the state holds."""
    return list(chain.from_iterable(map(dict.values, optimizer.state.values())))


class _Plan:
    """Which tensors the kernels serve, and in which parts."""

    def __init__(
        self,
        params: list[Tensor],
        bufs: list[Tensor],
        grads: list[Tensor],
        product_dtype: torch.dtype | None,
    ) -> None:
        self.params, self._bufs = list(params), list(bufs)
        self.left: list[int] = []
        self.buckets: list[_Bucket] = []
        self._types = list(map(type, grads))
        self._layouts = _layouts(grads), _layouts([*params, *bufs])
        self._strided = [i for i, grad in enumerate(grads) if not grad.is_contiguous()]
        self._strides = [grads[i].stride() for i in self._strided]
        dtypes = [_product_dtype(buf, product_dtype) for buf in bufs]
        buckets: dict[Any, list[int]] = {}
        for i, (p, buf, grad) in enumerate(zip(params, bufs, grads)):
            if _serves(p, buf, grad):
                buckets.setdefault((p.device, p.dtype, buf.dtype, grad.dtype), []).append(i)
            else:
                self.left.append(i)
        for (_, _, _, grad_dtype), members in buckets.items():
            self.buckets.append(_bucket(members, params, bufs, grad_dtype, dtypes[members[0]]))
        # What is left to others, which may have no memory of its own, is not asked where it lies.
        served = [i for bucket in self.buckets for i in bucket.members]
        self._served = [params[i] for i in served], [bufs[i] for i in served]
        self._addresses = [list(map(Tensor.data_ptr, tensors)) for tensors in self._served]

    # ------------------------------------------------------------------ is it true?

    def find(self, grads: list[Any]) -> list[list[int]] | None:
        """The gradients' addresses in each bucket, if they are as the plan's were.

        And if the parameters are in place: what only reads both may begin.
        """
        try:
            if list(map(type, grads)) != self._types or _layouts(grads) != self._layouts[0]:
                return None
        except RuntimeError:  # of a layout that has no such thing
            return None
        if self._strided and [grads[i].stride() for i in self._strided] != self._strides:
            return None
        if list(map(Tensor.data_ptr, self._served[0])) != self._addresses[0]:
            return None
        return [[grads[i].data_ptr() for i in bucket.members] for bucket in self.buckets]

    def lies(self) -> bool:
        """Whether parameters, which :meth:`find` has found, and buffers lie as they did."""
        return (
            list(map(Tensor.data_ptr, self._served[1])) == self._addresses[1]
            and _layouts([*self.params, *self._bufs]) == self._layouts[1]
        )

    # ------------------------------------------------------------------ using it

    def measure(self, group: dict[str, Any], found: list[list[int]], captured: bool) -> None:
        """Norms of the gradients, and what follows from them; no tensor of the step is written."""
        for bucket, addresses in zip(self.buckets, found):
            bucket.table.measure(
                addresses,
                momentum=float(group["momentum"]),
                rate=float(group["delta_rate"]),
                normalized=bool(group["normalized"]),
                captured=captured,
                **_gradient(group),
            )

    def update(self, group: dict[str, Any]) -> None:
        """Products and updates, part by part."""
        lr, how = to_scalar(group["lr"]), _gradient(group)
        on_device = isinstance(lr, Tensor) and not lr.is_cpu
        weight_decay = float(group["weight_decay"]) if group["decoupled"] else 0.0
        for bucket in self.buckets:
            table = bucket.table
            space = torch.empty(bucket.space, dtype=bucket.dtype, device=table.device)
            here = lr.to(table.device, non_blocking=True) if on_device else float(lr)
            for at, batches in enumerate(bucket.parts):
                table.prepare(at, space, **how)
                for batch in batches:
                    _multiply(batch, space)
                table.update(
                    at,
                    space,
                    lr=here,
                    weight_decay=weight_decay,
                    momentum=float(group["momentum"]),
                    **how,
                )


def _gradient(group: dict[str, Any]) -> dict[str, float]:
    """What makes of a parameter's gradient what the rule calls so."""
    penalty = 0.0 if group["decoupled"] else float(group["weight_decay"])
    return {"sign": -1.0 if group["maximize"] else 1.0, "penalty": penalty}


def _multiply(batch: _Batch, space: Tensor) -> None:
    """``b u^H u``, over ``b``'s copy or, where that is read to the end, over ``u``."""
    shape, strides = batch.shape, batch.strides
    unit, copy = (space.as_strided(shape, strides, at) for at in (batch.unit, batch.copy))
    left = copy if batch.direct is None else batch.direct
    multiply: Any = torch.mm if len(shape) == 2 else torch.bmm
    if shape[-2] <= shape[-1]:
        multiply(multiply(left, unit.mT), unit, out=copy)
    else:
        multiply(left, multiply(unit.mT, unit), out=unit)


def _layouts(tensors: list[Any]) -> list[list[Any]]:
    return [list(map(read, tensors)) for read in (_dtype, Tensor.is_contiguous, Tensor.numel)]


def _product_dtype(buf: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    dtype = wanted or default_product_dtype(buf) or buf.dtype
    return torch.float32 if dtype == torch.float16 else dtype  # as the rule has it


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


def _bucket(
    members: list[int],
    params: list[Tensor],
    bufs: list[Tensor],
    grad_dtype: torch.dtype,
    dtype: torch.dtype,
) -> _Bucket:
    from .kernels.delta import DeltaTable, Entry  # Triton is there

    entries, order, sizes, space = [], [], [], 0
    parts: list[list[_Batch]] = []
    for runs in _in_parts(members, bufs, _PART_BYTES // dtype.itemsize):
        batches, at = [], 0
        for run in runs:
            rows, columns = _matrix_shape(bufs[run[0]])
            numel = rows * columns
            size = -(-len(run) * numel // _ALIGNED) * _ALIGNED
            unit, copy = at, at + size
            at += 2 * size
            shape: tuple[int, ...] = (rows, columns)
            strides: tuple[int, ...] = (columns, 1)
            direct = None
            if len(run) > 1:
                shape, strides = (len(run), *shape), (numel, *strides)
            elif bufs[run[0]].dtype == dtype:  # in the order of memory
                direct = bufs[run[0]].detach().as_strided(shape, strides)
            batches.append(_Batch(shape, strides, unit, copy, direct))
            for k, i in enumerate(run):
                here = unit + k * numel, copy + k * numel
                copied = None if direct is not None else here[1]
                term = here[1] if rows <= columns else here[0]
                entries.append(Entry(params[i].detach(), bufs[i], here[0], copied, term))
            order += run
        parts.append(batches)
        sizes.append(sum(map(len, runs)))
        space = max(space, at)
    return _Bucket(order, DeltaTable(entries, grad_dtype, sizes), parts, space, dtype)
