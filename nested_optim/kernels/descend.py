"""Delta Gradient Descent on weights of one shape, around the products of its term: three launches.

``prepare`` lays weights and inputs out for batched products and sums the inputs' squares, ``size``
makes step sizes of the sums, ``descend`` moves the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aligned, on
from .launcher import Launcher
from .tables import AddressRing

#: Elements and warps per program that moves weights: two 16-byte accesses of float32 per thread
#: and tensor.
CHUNK = 1024
NUM_WARPS = 4
#: Elements per program that copies: so many chunks, whose squares are one sum.
CHUNKS = 8
SPAN = CHUNKS * CHUNK
#: Sums that a program adds at a time.
SUMS = 512

#: Of weights, gradients, inputs and terms.
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@triton.jit
def _at(address, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to an address."""
    if ALIGNED:
        # What is rounded here is a multiple of 16 already; the compiler learns it.
        at = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(KIND)), 16)
    else:
        at = address.to(tl.pointer_type(KIND))
    return at


@triton.jit
def _loaded(at, offsets, numel, EVEN: tl.constexpr):
    if EVEN:
        found = tl.load(at + offsets)
    else:
        found = tl.load(at + offsets, mask=offsets < numel, other=0.0)
    return found


@triton.jit
def _stored(at, offsets, numel, values, EVEN: tl.constexpr):
    if EVEN:
        tl.store(at + offsets, values)
    else:
        tl.store(at + offsets, values, mask=offsets < numel)


@triton.jit
def prepare_kernel(
    addresses,
    weights,
    rows,
    sums,
    weight_numel,
    row_numel,
    weight_spans,
    PARAM: tl.constexpr,
    ROW: tl.constexpr,
    SEEN: tl.constexpr,
    COPY_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One span: of a weight, copied, or of a weight's inputs, copied and their squares summed.

    ``SEEN`` is the dtype in which a layer multiplied its inputs.
    """
    which = tl.program_id(1).to(tl.int64)
    span = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    if span < weight_spans:
        start = span.to(tl.int64) * (CHUNKS * CHUNK)
        p_at = _at(tl.load(addresses + which), PARAM, ALIGNED)
        w_at = weights + which * weight_numel
        for i in tl.static_range(CHUNKS):
            where = start + i * CHUNK + lanes
            p = _loaded(p_at, where, weight_numel, EVEN)
            _stored(w_at, where, weight_numel, p.to(weights.dtype.element_ty), EVEN)
    else:
        span -= weight_spans
        start = span.to(tl.int64) * (CHUNKS * CHUNK)
        x_at = _at(tl.load(addresses + 2 * tl.num_programs(1) + which), ROW, ALIGNED)
        r_at = rows + which * row_numel
        squares = tl.zeros([CHUNK], tl.float32)
        for i in tl.static_range(CHUNKS):
            where = start + i * CHUNK + lanes
            x = _loaded(x_at, where, row_numel, EVEN).to(SEEN)
            if COPY_ROWS:
                _stored(r_at, where, row_numel, x.to(rows.dtype.element_ty), EVEN)
            squares += x.to(tl.float32) * x.to(tl.float32)
        per_weight = tl.num_programs(0) - weight_spans
        tl.store(sums + which * per_weight + span, tl.sum(squares))


@triton.jit
def size_kernel(
    sums,
    sizes,
    counts,
    scales,
    per_weight,
    lr,
    decay,
    count,
    scale,
    COUNTED: tl.constexpr,
    SCALED: tl.constexpr,
    SUMS: tl.constexpr,
):
    """``e`` of one weight, and ``e decay scale / count``, by which its term is multiplied."""
    which = tl.program_id(0)
    lanes = tl.arange(0, SUMS)
    added = tl.zeros([SUMS], tl.float32)
    for start in range(0, per_weight, SUMS):
        where = start + lanes
        added += tl.load(sums + which * per_weight + where, mask=where < per_weight, other=0.0)
    if COUNTED:
        count = tl.load(counts + which)
    if SCALED:
        scale = tl.load(scales + which)
    strength = decay * scale / tl.maximum(count, 1.0)
    size = lr / (1.0 + lr * strength * tl.sum(added))
    tl.store(sizes + which, size)
    tl.store(sizes + tl.num_programs(0) + which, size * strength)


@triton.jit
def descend_kernel(
    addresses,
    terms,
    sizes,
    numel,
    weight_decay,
    sign,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one weight: ``p <- p - e (sign g + weight_decay p) - f term``."""
    which = tl.program_id(1).to(tl.int64)
    number = tl.num_programs(1)
    where = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    p_at = _at(tl.load(addresses + which), PARAM, ALIGNED)
    g_at = _at(tl.load(addresses + number + which), GRAD, ALIGNED)
    t_at = terms + which * numel
    p = _loaded(p_at, where, numel, EVEN).to(tl.float32)
    t = _loaded(t_at, where, numel, EVEN).to(tl.float32)
    g = _loaded(g_at, where, numel, EVEN).to(tl.float32)
    change = tl.load(sizes + which) * (sign * g + weight_decay * p)
    change += tl.load(sizes + number + which) * t
    _stored(p_at, where, numel, (p - change).to(PARAM), EVEN)


class Batch(NamedTuple):
    """Weights of one shape and dtype with their gradients and inputs, all contiguous."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    rows: Sequence[Tensor]
    seen: torch.dtype  # in which the layers multiplied the rows, which may have another yet
    product: torch.dtype  # of the products


class Prepared(NamedTuple):
    """What the products of a batch take, stacked, and the step sizes: ``(2, weights)``."""

    weights: Tensor
    rows: Tensor
    sizes: Tensor


class Addresses:
    """The memory through which the addresses of all batches of a step travel, in one copy."""

    def __init__(self) -> None:
        self._rings: dict[torch.device, tuple[int, AddressRing]] = {}

    def send(self, batches: Sequence[Batch]) -> list[tuple[Tensor, int]]:
        """Where the device finds each batch's addresses, and all of them or-ed.

        All batches are on one device.
        """
        found: list[int] = []
        starts, merged = [], []
        for batch in batches:
            own = [t.data_ptr() for tensors in batch[:3] for t in tensors]
            starts.append(len(found))
            merged.append(reduce(or_, own))
            found += own
            found += [0] * (len(found) & 1)  # each batch's begin at a multiple of 16 bytes
        device = batches[0].params[0].device
        length, ring = self._rings.get(device, (0, None))
        if ring is None or length < len(found):
            length = 1 << len(found).bit_length()
            ring = AddressRing(length, device)
            self._rings[device] = length, ring
        slot = ring.write(found + [0] * (length - len(found)))
        # Copied: each program reads some, and the host's memory is far.
        table = slot.to(device, copy=True, non_blocking=True)
        return [(table[start:], bits) for start, bits in zip(starts, merged)]


def prepare(
    batch: Batch,
    where: tuple[Tensor, int],
    lr: float,
    decay: float,
    count: float | Tensor,
    scale: float | Tensor,
) -> Prepared:
    """Stacks of a batch's weights and rows, and its step sizes.

    Args:
        where: what :meth:`Addresses.send` returned for this batch.
        count, scale: numbers, or vectors in float32 of one for each weight.
    """
    one, x, number = batch.params[0], batch.rows[0], len(batch.params)
    device, (table, merged) = one.device, where
    copies_weights = number > 1 or one.dtype is not batch.product
    copies_rows = number > 1 or x.dtype is not batch.seen or x.dtype is not batch.product
    weights, rows = one.unsqueeze(0), x.unsqueeze(0)
    if copies_weights:
        weights = torch.empty((number, *one.shape), dtype=batch.product, device=device)
    if copies_rows:
        rows = torch.empty((number, *x.shape), dtype=batch.product, device=device)
    weight_spans = triton.cdiv(one.numel(), SPAN) if copies_weights else 0
    row_spans = triton.cdiv(x.numel(), SPAN)
    numbers = torch.empty(number * (2 + row_spans), dtype=torch.float32, device=device)
    sizes, sums = numbers[: 2 * number], numbers[2 * number :]
    constants = (
        *(DTYPES[dtype] for dtype in (one.dtype, x.dtype, batch.seen)),
        copies_rows,
        _whole(merged, weights, rows),
        one.numel() % SPAN == 0 and x.numel() % SPAN == 0,
        CHUNKS,
        CHUNK,
    )
    tensors = table, weights, rows, sums
    integers = one.numel(), x.numel(), weight_spans
    kind = device, batch.product, integers, constants, *map(aligned, tensors)
    with on(device):
        grid = weight_spans + row_spans, number, 1
        _prepare(kind, grid, (*tensors, *integers, *constants))
        counts, single = (count, 1.0) if isinstance(count, Tensor) else (sizes, float(count))
        scales, factor = (scale, 1.0) if isinstance(scale, Tensor) else (sizes, float(scale))
        tensors = sums, sizes, counts, scales
        read = counts is count, scales is scale, SUMS
        kind = device, row_spans, read, *map(aligned, tensors)
        floats = float(lr), float(decay), single, factor
        _size(kind, (number, 1, 1), (*tensors, row_spans, *floats, *read))
    return Prepared(weights, rows, sizes)


def descend(
    batch: Batch,
    where: tuple[Tensor, int],
    terms: Tensor,
    sizes: Tensor,
    weight_decay: float,
    sign: float,
) -> None:
    """``p <- p - e (sign g + weight_decay p) - f term`` for each weight.

    Args:
        where: what :meth:`Addresses.send` returned for this batch.
        terms: contiguous, one for each weight.
        sizes: ``(2, weights)``, ``e`` and ``f``.
    """
    one, numel = batch.params[0], batch.params[0].numel()
    device, (table, merged) = one.device, where
    constants = (
        DTYPES[one.dtype],
        DTYPES[batch.grads[0].dtype],
        _whole(merged, terms),
        numel % CHUNK == 0,
        CHUNK,
    )
    tensors = table, terms, sizes
    kind = device, terms.dtype, numel, constants, *map(aligned, tensors)
    grid = triton.cdiv(numel, CHUNK), len(batch.params), 1
    with on(device):
        _descend(kind, grid, (*tensors, numel, float(weight_decay), float(sign), *constants))


def _whole(merged: int, *stacks: Tensor) -> bool:
    """Whether each tensor of a batch, and of stacks for it, begins at a multiple of 16 bytes."""
    return not merged & 15 and all(
        aligned(stack) and stack[0].numel() * stack.itemsize % 16 == 0 for stack in stacks
    )


_prepare = Launcher(prepare_kernel, num_warps=NUM_WARPS)
_size = Launcher(size_kernel, num_warps=NUM_WARPS)
_descend = Launcher(descend_kernel, num_warps=NUM_WARPS)
