"""Delta Momentum's three passes over any number of tensors, each as one Triton launch.

The first sums the squares of gradients, of which a small launch makes norms and factors. The second
writes what the products take: gradients divided by their norms, and buffers, in the products'
dtype. The third takes the products' results into buffers and parameters. Before it lie the
products, which are not this module's. What is called gradient here has its sign, and SGD's penalty
where there is one: each pass adds it anew, so that no gradient is copied.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aligned, on
from .launcher import Launcher
from .tables import AddressRing

#: Elements and warps per program: two 16-byte accesses of float32 per thread and tensor.
CHUNK = 1024
NUM_WARPS = 4
#: Elements per program of the first pass, which leaves one sum: a program adds up a tensor's.
SPAN = 8 * CHUNK
#: Sums of squares that one step of the second summation takes.
SUMS = 1024

#: Of parameters, buffers, gradients and products.
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}

_COLUMNS: tl.constexpr = tl.constexpr(9)
_KEEP: tl.constexpr = tl.constexpr(-1)
#: The range of normal float32 numbers.
_TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)
_LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _load(at, lanes, mask, FULL: tl.constexpr):
    values = tl.load(at + lanes) if FULL else tl.load(at + lanes, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _store(at, lanes, values, mask, FULL: tl.constexpr):
    if FULL:
        tl.store(at + lanes, values.to(at.dtype.element_ty))
    else:
        tl.store(at + lanes, values.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _at_address(address, start, KIND: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        # What is rounded here is a multiple of 16 already; the compiler learns it.
        at = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(KIND)), 16) + start
    else:
        at = address.to(tl.pointer_type(KIND)) + start
    return at


@triton.jit
def _gradient(
    row,
    grad,
    start,
    lanes,
    mask,
    sign,
    penalty,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    PENALTY: tl.constexpr,
    FULL: tl.constexpr,
):
    """``sign gradient + penalty parameter``."""
    g = sign * _load(_at_address(grad, start, GRAD, FULL), lanes, mask, FULL)
    if PENALTY:
        p_at = _at_address(tl.load(row), start, PARAM, FULL)
        g += penalty * _load(p_at, lanes, mask, FULL)
    return g


@triton.jit
def squares_kernel(
    spans,
    rows,
    grads,
    sums,
    sign,
    penalty,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    PENALTY: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The sum of one span's squares, in float64, which holds every square of float32."""
    pid = tl.program_id(0)
    which = tl.load(spans + pid).to(tl.int64)
    row = rows + which * _COLUMNS
    start = (pid - tl.load(row + 8)) * SPAN
    left = tl.load(row + 2) - start
    grad = tl.load(grads + which)
    lanes = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.float64)
    addresses = grad
    if PENALTY:
        addresses |= tl.load(row)
    if (left >= SPAN) & ((addresses & 15) == 0):
        for at in tl.static_range(0, SPAN, CHUNK):
            g = _gradient(
                row, grad, start + at, lanes, None, sign, penalty, PARAM, GRAD, PENALTY, True
            ).to(tl.float64)
            total += g * g
    else:
        for at in range(0, tl.minimum(left, SPAN), CHUNK):
            mask = at + lanes < left
            g = _gradient(
                row, grad, start + at, lanes, mask, sign, penalty, PARAM, GRAD, PENALTY, False
            ).to(tl.float64)
            total += g * g
    tl.store(sums + pid, tl.sum(total, 0))


@triton.jit(do_not_specialize=["momentum", "rate"])
def numbers_kernel(
    rows,
    sums,
    norms,
    factors,
    momentum,
    rate,
    NORMALIZED: tl.constexpr,
    SPAN: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Of one tensor: by what its gradient is divided, and the factor of its term then.

    ``momentum`` and ``rate`` are the bits of float64 numbers, which as such would come as float32.
    """
    which = tl.program_id(0).to(tl.int64)
    row = rows + which * _COLUMNS
    first = tl.load(row + 8)
    count = tl.cdiv(tl.load(row + 2), SPAN)
    lanes = tl.arange(0, SUMS)
    total = tl.zeros((SUMS,), tl.float64)
    for start in range(0, count, SUMS):
        total += tl.load(sums + first + start + lanes, mask=start + lanes < count, other=0.0)
    square = tl.sum(total, 0)
    alpha = momentum.to(tl.int64).to(tl.float64, bitcast=True)
    r = rate.to(tl.int64).to(tl.float64, bitcast=True)
    # Of the term of unit gradients: rho |g|^2, which of a gradient of zeros is 0.
    factor = alpha * (r / (1 + r)) if NORMALIZED else 1 / (1 / square / r + 1 / alpha)
    norm = tl.sqrt(square)
    # Written so that no norm is none.
    norm = tl.where(norm < _TINY, _TINY, tl.where(norm > _LARGEST, _LARGEST, norm))
    tl.store(norms + which, norm.to(tl.float32))
    tl.store(factors + which, factor.to(tl.float32))


@triton.jit
def _prepare_chunk(
    row,
    grad,
    norm,
    space,
    start,
    lanes,
    mask,
    sign,
    penalty,
    PARAM: tl.constexpr,
    BUFFER: tl.constexpr,
    GRAD: tl.constexpr,
    PRODUCT: tl.constexpr,
    SIZE: tl.constexpr,
    PENALTY: tl.constexpr,
    FULL: tl.constexpr,
):
    g = _gradient(row, grad, start, lanes, mask, sign, penalty, PARAM, GRAD, PENALTY, FULL)
    _store(
        _at_address(space + SIZE * tl.load(row + 4), start, PRODUCT, FULL),
        lanes,
        g / norm,
        mask,
        FULL,
    )
    copied = tl.load(row + 5)
    if copied != _KEEP:
        b = _load(_at_address(tl.load(row + 1), start, BUFFER, FULL), lanes, mask, FULL)
        _store(_at_address(space + SIZE * copied, start, PRODUCT, FULL), lanes, b, mask, FULL)


@triton.jit(do_not_specialize=["first"])
def prepare_kernel(
    chunks,
    rows,
    grads,
    norms,
    space,
    first,
    sign,
    penalty,
    PARAM: tl.constexpr,
    BUFFER: tl.constexpr,
    GRAD: tl.constexpr,
    PRODUCT: tl.constexpr,
    SIZE: tl.constexpr,
    PENALTY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one tensor: ``space <- gradient / norm``, and the buffer where that is asked."""
    pid = first + tl.program_id(0)
    which = tl.load(chunks + pid).to(tl.int64)
    row = rows + which * _COLUMNS
    start = (pid - tl.load(row + 3)) * CHUNK
    left = tl.load(row + 2) - start
    grad = tl.load(grads + which)
    norm = tl.load(norms + which)
    space_at = space.to(tl.int64)
    lanes = tl.arange(0, CHUNK)
    if (left >= CHUNK) & (((tl.load(row + 7) | grad) & 15) == 0):
        _prepare_chunk(
            row, grad, norm, space_at, start, lanes, None, sign, penalty,
            PARAM, BUFFER, GRAD, PRODUCT, SIZE, PENALTY, True,
        )  # fmt: skip
    else:
        _prepare_chunk(
            row, grad, norm, space_at, start, lanes, lanes < left, sign, penalty,
            PARAM, BUFFER, GRAD, PRODUCT, SIZE, PENALTY, False,
        )  # fmt: skip


@triton.jit
def _update_chunk(
    row,
    grad,
    factor,
    space,
    start,
    lanes,
    mask,
    momentum,
    sign,
    penalty,
    lr,
    keep,
    PARAM: tl.constexpr,
    BUFFER: tl.constexpr,
    GRAD: tl.constexpr,
    PRODUCT: tl.constexpr,
    SIZE: tl.constexpr,
    PENALTY: tl.constexpr,
    FULL: tl.constexpr,
):
    p_at = _at_address(tl.load(row), start, PARAM, FULL)
    b_at = _at_address(tl.load(row + 1), start, BUFFER, FULL)
    p = _load(p_at, lanes, mask, FULL)
    g = sign * _load(_at_address(grad, start, GRAD, FULL), lanes, mask, FULL)
    if PENALTY:
        g += penalty * p
    term = _load(
        _at_address(space + SIZE * tl.load(row + 6), start, PRODUCT, FULL), lanes, mask, FULL
    )
    b = _load(b_at, lanes, mask, FULL) * momentum + g - factor * term
    _store(b_at, lanes, b, mask, FULL)
    _store(p_at, lanes, p * keep - lr * b, mask, FULL)


@triton.jit(do_not_specialize=["first"])
def update_kernel(
    chunks,
    rows,
    grads,
    factors,
    space,
    lr_at,
    first,
    lr,
    keep,
    weight_decay,
    momentum,
    sign,
    penalty,
    PARAM: tl.constexpr,
    BUFFER: tl.constexpr,
    GRAD: tl.constexpr,
    PRODUCT: tl.constexpr,
    SIZE: tl.constexpr,
    PENALTY: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk: ``b <- momentum b + gradient - factor term``, ``p <- keep p - lr b``."""
    pid = first + tl.program_id(0)
    which = tl.load(chunks + pid).to(tl.int64)
    row = rows + which * _COLUMNS
    start = (pid - tl.load(row + 3)) * CHUNK
    left = tl.load(row + 2) - start
    grad = tl.load(grads + which)
    factor = tl.load(factors + which)
    space_at = space.to(tl.int64)
    if LR_ON_DEVICE:
        lr = tl.load(lr_at).to(tl.float32)
        keep = 1 - lr * weight_decay
    lanes = tl.arange(0, CHUNK)
    if (left >= CHUNK) & (((tl.load(row + 7) | grad) & 15) == 0):
        _update_chunk(
            row, grad, factor, space_at, start, lanes, None, momentum, sign, penalty, lr, keep,
            PARAM, BUFFER, GRAD, PRODUCT, SIZE, PENALTY, True,
        )  # fmt: skip
    else:
        _update_chunk(
            row, grad, factor, space_at, start, lanes, lanes < left, momentum, sign, penalty, lr,
            keep, PARAM, BUFFER, GRAD, PRODUCT, SIZE, PENALTY, False,
        )  # fmt: skip


class Entry(NamedTuple):
    """A parameter and its buffer, laid out alike and dense, and offsets in the working space."""

    param: Tensor
    buffer: Tensor
    unit: int  # of the gradient divided by its norm
    copied: int | None  # of the buffer's copy; None where the products read the buffer itself
    term: int  # of the products' result; may be where one of the others was


class DeltaTable:
    """Tensors of one device and one dtype each, with gradients of another.

    In device memory, for T tensors: ``chunks`` and ``spans``, int32, the tensor of each program of
    the passes, and of the first; ``rows``, int64 ``(T, 9)``: addresses of parameter and buffer,
    number of elements, first chunk, offsets of unit, copy (-1: none) and term, all of these
    addresses and offsets or-ed, and first span; the low bits of the one before the last tell
    whether the tensor is aligned, for offsets are in elements. What a step computes of its
    gradients as a whole is kept here too: ``norms`` and ``factors``, float32 ``(T,)``.

    Args:
        entries: at least one, none of them empty; the table keeps their tensors alive.
        grad_dtype: of all gradients.
        parts: how many of them, in order, the second and third pass take at a time; None: all.
    """

    def __init__(
        self, entries: Sequence[Entry], grad_dtype: torch.dtype, parts: Sequence[int] | None = None
    ) -> None:
        one = entries[0]
        self.entries = list(entries)
        self.device = one.param.device
        self.parts = [len(entries)] if parts is None else list(parts)
        self._kinds = tuple(DTYPES[d] for d in (one.param.dtype, one.buffer.dtype, grad_dtype))
        rows, chunks, spans = array("q"), array("i"), array("i")
        for i, e in enumerate(entries):
            addresses = [e.param.data_ptr(), e.buffer.data_ptr()]
            merged = addresses[0] | addresses[1] | e.unit | (e.copied or 0) | e.term
            copied = -1 if e.copied is None else e.copied
            numel = e.param.numel()
            rows.extend([*addresses, numel, len(chunks), e.unit, copied, e.term, merged])
            rows.append(len(spans))
            chunks.extend(array("i", [i]) * (-(-numel // CHUNK)))
            spans.extend(array("i", [i]) * (-(-numel // SPAN)))
        starts = [*rows[3 :: _COLUMNS.value], len(chunks)]
        bounds = pairwise(starts[at] for at in accumulate(self.parts, initial=0))
        #: Of each part, the first chunk and how many there are.
        self._chunks_of = [(begin, end - begin) for begin, end in bounds]
        self._ring = AddressRing(len(entries), self.device)
        self._grads = torch.zeros(len(entries), dtype=torch.int64, device=self.device)
        self._tables = self._upload(chunks), self._upload(rows), self._grads
        self._spans = self._upload(spans)
        self._sums = torch.empty(len(spans), dtype=torch.float64, device=self.device)
        self.norms, self.factors = (
            torch.empty(len(entries), dtype=torch.float32, device=self.device) for _ in range(2)
        )
        kept = *self._tables, self._spans, self._sums, self.norms, self.factors
        dtypes = one.param.dtype, one.buffer.dtype, grad_dtype  # quicker to look up than Triton's
        self._kind = self.device, *dtypes, *map(aligned, kept)

    def _upload(self, values: array[int]) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64 if values.typecode == "q" else torch.int32)
        if self.device.type == "cuda":  # so that the copy waits for nothing
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def measure(
        self,
        addresses: list[int],
        *,
        momentum: float,
        rate: float,
        normalized: bool,
        sign: float = 1.0,
        penalty: float = 0.0,
        captured: bool = False,
    ) -> None:
        """Compute norms and factors; nothing else is written, and only gradients are read.

        With a penalty parameters are read, too.

        Args:
            addresses: of gradients that are laid out as the parameters.
            momentum, rate: not 0.
            normalized: the rate is in units of ``momentum / |g|^2``.
            sign: of the gradients.
            penalty: parameters times this are added to the gradients.
            captured: this is being captured in a CUDA graph.
        """
        slot = self._ring.give(addresses) if captured else self._ring.write(addresses)
        self._grads.copy_(slot, non_blocking=True)
        _, rows, grads = self._tables
        param, _, grad = self._kinds
        with on(self.device):
            _launch_squares(
                (self._kind, penalty != 0),
                (len(self._spans), 1, 1),
                (
                    *(self._spans, rows, grads, self._sums, sign, penalty),
                    *(param, grad, penalty != 0, CHUNK, SPAN),
                ),
            )
            bits = struct.unpack("2q", struct.pack("2d", momentum, rate))
            outputs = self.norms, self.factors
            numbers = rows, self._sums, *outputs, *bits, normalized, SPAN, SUMS
            _launch_numbers((self._kind, normalized), (len(self.entries), 1, 1), numbers)

    def prepare(self, part: int, space: Tensor, *, sign: float = 1.0, penalty: float = 0.0) -> None:
        """Write a part's units and copies to ``space``, of the products' dtype.

        Of the gradients that :meth:`measure` was given, with the same ``sign`` and ``penalty``.
        """
        first, count = self._chunks_of[part]
        constants = *self._kinds, DTYPES[space.dtype], space.itemsize, penalty != 0, CHUNK
        args = *self._tables, self.norms, space, first, sign, penalty, *constants
        with on(self.device):
            kind = self._kind, space.dtype, aligned(space), penalty != 0
            _launch_prepare(kind, (count, 1, 1), args)

    def update(
        self,
        part: int,
        space: Tensor,
        *,
        lr: float | Tensor,
        weight_decay: float,
        momentum: float,
        sign: float = 1.0,
        penalty: float = 0.0,
    ) -> None:
        """Update a part's buffers and parameters with the gradients that were measured.

        Args:
            part: which.
            space: which holds the terms now.
            lr: a number, or a tensor of one element on the device.
            weight_decay: parameters shrink by ``lr * weight_decay``.
            momentum: the buffers' decay.
            sign, penalty: as :meth:`measure` had them.
        """
        on_device = isinstance(lr, Tensor)
        numbers = (0.0, 0.0) if on_device else (lr, 1 - lr * weight_decay)
        first, count = self._chunks_of[part]
        constants = (
            *self._kinds, DTYPES[space.dtype], space.itemsize, penalty != 0, on_device, CHUNK
        )  # fmt: skip
        args = (
            *self._tables,
            self.factors,
            space,
            lr if on_device else None,
            first,
            *map(float, (*numbers, weight_decay, momentum, sign, penalty)),
            *constants,
        )
        alike = (lr.dtype, aligned(lr)) if isinstance(lr, Tensor) else None
        with on(self.device):
            kind = self._kind, space.dtype, aligned(space), penalty != 0, alike
            _launch_update(kind, (count, 1, 1), args)


_launch_squares = Launcher(squares_kernel, num_warps=NUM_WARPS)
_launch_numbers = Launcher(numbers_kernel, num_warps=NUM_WARPS)
_launch_prepare = Launcher(prepare_kernel, num_warps=NUM_WARPS)
_launch_update = Launcher(update_kernel, num_warps=NUM_WARPS)
