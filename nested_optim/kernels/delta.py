"""Delta Momentum's three passes over any number of tensors, each as one Triton launch.

The first sums the squares of gradients, of which a small launch makes norms and factors. The second
writes what the products take: gradients divided by their norms, and buffers, in the products'
dtype. The third takes the products' results into buffers and parameters. Before it lie the
products, which are not this module's.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
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
#: Sums of squares that one step of the second summation takes.
SUMS = 1024

#: Of parameters, buffers, gradients and products.
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}

_COLUMNS: tl.constexpr = tl.constexpr(8)
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
def squares_kernel(chunks, rows, grads, sums, GRAD: tl.constexpr, CHUNK: tl.constexpr):
    """The sum of one chunk's squares, in float64, which holds every square of float32."""
    pid = tl.program_id(0)
    which = tl.load(chunks + pid).to(tl.int64)
    row = rows + which * _COLUMNS
    start = (pid - tl.load(row + 3)) * CHUNK
    left = tl.load(row + 2) - start
    grad = tl.load(grads + which)
    lanes = tl.arange(0, CHUNK)
    if (left >= CHUNK) & ((grad & 15) == 0):
        g = _load(_at_address(grad, start, GRAD, True), lanes, None, True).to(tl.float64)
    else:
        at = _at_address(grad, start, GRAD, False)
        g = _load(at, lanes, lanes < left, False).to(tl.float64)
    tl.store(sums + pid, tl.sum(g * g, 0))


@triton.jit(do_not_specialize=["momentum", "rate"])
def numbers_kernel(
    rows,
    sums,
    norms,
    factors,
    momentum,
    rate,
    NORMALIZED: tl.constexpr,
    CHUNK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Of one tensor: by what its gradient is divided, and the factor of its term then.

    ``momentum`` and ``rate`` are the bits of float64 numbers, which as such would come as float32.
    """
    which = tl.program_id(0).to(tl.int64)
    row = rows + which * _COLUMNS
    first = tl.load(row + 3)
    count = tl.cdiv(tl.load(row + 2), CHUNK)
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
    BUFFER: tl.constexpr,
    GRAD: tl.constexpr,
    PRODUCT: tl.constexpr,
    SIZE: tl.constexpr,
    FULL: tl.constexpr,
):
    g = _load(_at_address(grad, start, GRAD, FULL), lanes, mask, FULL)
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


@triton.jit
def prepare_kernel(
    chunks,
    rows,
    grads,
    norms,
    space,
    BUFFER: tl.constexpr,
    GRAD: tl.constexpr,
    PRODUCT: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one tensor: ``space <- gradient / norm``, and the buffer where that is asked."""
    pid = tl.program_id(0)
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
            row, grad, norm, space_at, start, lanes, None, BUFFER, GRAD, PRODUCT, SIZE, True
        )
    else:
        mask = lanes < left
        _prepare_chunk(
            row, grad, norm, space_at, start, lanes, mask, BUFFER, GRAD, PRODUCT, SIZE, False
        )


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
    lr,
    keep,
    PARAM: tl.constexpr,
    BUFFER: tl.constexpr,
    GRAD: tl.constexpr,
    PRODUCT: tl.constexpr,
    SIZE: tl.constexpr,
    FULL: tl.constexpr,
):
    p_at = _at_address(tl.load(row), start, PARAM, FULL)
    b_at = _at_address(tl.load(row + 1), start, BUFFER, FULL)
    g = _load(_at_address(grad, start, GRAD, FULL), lanes, mask, FULL)
    term = _load(
        _at_address(space + SIZE * tl.load(row + 6), start, PRODUCT, FULL), lanes, mask, FULL
    )
    b = _load(b_at, lanes, mask, FULL) * momentum + sign * g - factor * term
    p = _load(p_at, lanes, mask, FULL) * keep - lr * b
    _store(b_at, lanes, b, mask, FULL)
    _store(p_at, lanes, p, mask, FULL)


@triton.jit
def update_kernel(
    chunks,
    rows,
    grads,
    factors,
    space,
    lr_at,
    lr,
    keep,
    weight_decay,
    momentum,
    sign,
    PARAM: tl.constexpr,
    BUFFER: tl.constexpr,
    GRAD: tl.constexpr,
    PRODUCT: tl.constexpr,
    SIZE: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk: ``b <- momentum b + sign g - factor term``, ``p <- keep p - lr b``."""
    pid = tl.program_id(0)
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
            row, grad, factor, space_at, start, lanes, None,
            momentum, sign, lr, keep, PARAM, BUFFER, GRAD, PRODUCT, SIZE, True,
        )  # fmt: skip
    else:
        _update_chunk(
            row, grad, factor, space_at, start, lanes, lanes < left,
            momentum, sign, lr, keep, PARAM, BUFFER, GRAD, PRODUCT, SIZE, False,
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

    In device memory, for T tensors: ``chunks``, int32, the tensor of each program; ``rows``, int64
    ``(T, 8)``: addresses of parameter and buffer, number of elements, first chunk, offsets of unit,
    copy (-1: none) and term, and all of these addresses and offsets or-ed; the low bits of the last
    tell whether the tensor is aligned, for offsets are in elements.

    Args:
        entries: at least one, none of them empty; the table keeps their tensors alive.
        grad_dtype: of all gradients.
    """

    def __init__(self, entries: Sequence[Entry], grad_dtype: torch.dtype) -> None:
        one = entries[0]
        self.entries = list(entries)
        self.device = one.param.device
        self._kinds = [DTYPES[d] for d in (one.param.dtype, one.buffer.dtype, grad_dtype)]
        rows, chunks = array("q"), array("i")
        for i, e in enumerate(entries):
            addresses = [e.param.data_ptr(), e.buffer.data_ptr()]
            merged = addresses[0] | addresses[1] | e.unit | (e.copied or 0) | e.term
            copied = -1 if e.copied is None else e.copied
            numel = e.param.numel()
            rows.extend([*addresses, numel, len(chunks), e.unit, copied, e.term, merged])
            chunks.extend(array("i", [i]) * (-(-numel // CHUNK)))
        self._n_chunks = len(chunks)
        self._rows = self._upload(torch.tensor(rows, dtype=torch.int64))
        self._chunks = self._upload(torch.tensor(chunks, dtype=torch.int32))
        self._ring = AddressRing(len(entries), self.device)
        self._grads = torch.zeros(len(entries), dtype=torch.int64, device=self.device)

    def _upload(self, host: Tensor) -> Tensor:
        if self.device.type == "cuda":  # so that the copy waits for nothing
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def prepare(
        self,
        grads: Sequence[Tensor],
        space: Tensor,
        *,
        momentum: float,
        rate: float,
        normalized: bool,
        captured: bool = False,
    ) -> Tensor:
        """Write units and copies to ``space``, of the products' dtype.

        Args:
            grads: laid out as the parameters.
            momentum, rate: not 0.
            normalized: the rate is in units of ``momentum / |g|^2``.
            captured: this is being captured in a CUDA graph.

        Returns:
            The factors of the products' results, float32 ``(T,)``.
        """
        addresses = list(map(Tensor.data_ptr, grads))
        slot = self._ring.give(addresses) if captured else self._ring.write(addresses)
        self._grads.copy_(slot, non_blocking=True)
        tables = self._chunks, self._rows, self._grads
        sums = torch.empty(self._n_chunks, dtype=torch.float64, device=self.device)
        norms, factors = torch.empty(2, len(self.entries), device=self.device).unbind()
        where = self.device, *map(aligned, tables), aligned(norms), aligned(factors)
        bits = struct.unpack("2q", struct.pack("2d", momentum, rate))
        grad = self._kinds[2]
        with on(self.device):
            grid = self._n_chunks, 1, 1
            _launch_squares((*where, grad), grid, (*tables, sums, grad, CHUNK))
            numbers = self._rows, sums, norms, factors, *bits, normalized, CHUNK, SUMS
            _launch_numbers((*where, normalized), (len(self.entries), 1, 1), numbers)
            constants = *self._kinds[1:], DTYPES[space.dtype], space.itemsize, CHUNK
            kind = *where, constants, aligned(space)
            _launch_prepare(kind, grid, (*tables, norms, space, *constants))
        return factors

    def update(
        self,
        factors: Tensor,
        space: Tensor,
        *,
        lr: float | Tensor,
        weight_decay: float,
        momentum: float,
        sign: float,
    ) -> None:
        """Update buffers and parameters with the gradients that :meth:`prepare` was given.

        Args:
            factors: of the terms, float32 ``(T,)``.
            space: which holds the terms now.
            lr: a number, or a tensor of one element on the device.
            weight_decay: parameters shrink by ``lr * weight_decay``.
            sign: of the gradients.
        """
        on_device = isinstance(lr, Tensor)
        numbers = (0.0, 0.0) if on_device else (lr, 1 - lr * weight_decay)
        tensors = self._chunks, self._rows, self._grads, factors, space
        args = (
            *tensors,
            lr if on_device else None,
            *map(float, numbers),
            float(weight_decay),
            float(momentum),
            float(sign),
        )
        constants = *self._kinds, DTYPES[space.dtype], space.itemsize, on_device, CHUNK
        alike = (lr.dtype, aligned(lr)) if isinstance(lr, Tensor) else None
        kind = self.device, constants, alike, *map(aligned, tensors)
        with on(self.device):
            _launch_update(kind, (self._n_chunks, 1, 1), (*args, *constants))


_launch_squares = Launcher(squares_kernel, num_warps=NUM_WARPS)
_launch_numbers = Launcher(numbers_kernel, num_warps=NUM_WARPS)
_launch_prepare = Launcher(prepare_kernel, num_warps=NUM_WARPS)
_launch_update = Launcher(update_kernel, num_warps=NUM_WARPS)
