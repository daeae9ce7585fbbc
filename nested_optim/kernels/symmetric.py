"""Batched matrix products whose result is symmetric, of which half the tiles are computed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aligned, on
from .launcher import Launcher

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

#: Tile of the result, depth of one step of the product, warps and pipeline stages: fixed, because
#: what follows must not depend on a search. The best of 128 to 256, 64 and 128, 4 and 8, 2 to 4 on
#: an H200, where neither persistent programs nor stores by the copy engine gained anything.
TILE = 128
DEPTH = 64
NUM_WARPS = 4
NUM_STAGES = 3


@triton.jit(do_not_specialize=["depth"])
def product_kernel(
    a,
    b,
    plus,
    result,
    size,
    depth,
    a_batch,
    a_row,
    a_column,
    b_batch,
    b_row,
    b_column,
    alpha,
    beta,
    diagonal,
    PLUS: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile on or below the diagonal of ``alpha a b^T + beta plus + diagonal I``, stored twice.

    ``a`` and ``b`` are (batch, size, depth); ``plus`` and ``result`` are (batch, size, size),
    contiguous.
    """
    batch = tl.program_id(1).to(tl.int64)
    i, j = _place(tl.program_id(0))
    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    # Rows past the end read valid ones again; what they give is not stored.
    a_rows = rows % size
    b_rows = columns % size
    inner = tl.arange(0, DEPTH)
    a_at = a + batch * a_batch + a_rows[:, None].to(tl.int64) * a_row + inner[None, :] * a_column
    b_at = b + batch * b_batch + b_rows[:, None].to(tl.int64) * b_row + inner[None, :] * b_column
    total = tl.full((TILE, TILE), 0.0, tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            part_a = tl.load(a_at)
            part_b = tl.load(b_at)
        else:
            left = depth - start
            part_a = tl.load(a_at, mask=inner[None, :] < left, other=0.0)
            part_b = tl.load(b_at, mask=inner[None, :] < left, other=0.0)
        total = tl.dot(part_a, tl.trans(part_b), total)
        a_at += DEPTH * a_column
        b_at += DEPTH * b_column
    _finish(total, plus, result, batch, i, j, size, alpha, beta, diagonal, PLUS, WHOLE, TILE)


@triton.jit(do_not_specialize=["depth"])
def described_kernel(
    a,
    b,
    plus,
    result,
    size,
    depth,
    alpha,
    beta,
    diagonal,
    PLUS: tl.constexpr,
    A_ALONG: tl.constexpr,
    B_ALONG: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The same with ``a`` and ``b`` as tensor descriptors, which Hopper's copy engine reads.

    A descriptor is of (batch, size, depth) if its matrices are contiguous along depth (``ALONG``),
    else of (batch, depth, size). What it reads outside of them is zero.
    """
    batch = tl.program_id(1)
    i, j = _place(tl.program_id(0))
    total = tl.full((TILE, TILE), 0.0, tl.float32)
    for start in range(0, depth, DEPTH):
        if A_ALONG:
            part_a = a.load([batch, i * TILE, start]).reshape(TILE, DEPTH)
        else:
            part_a = a.load([batch, start, i * TILE]).reshape(DEPTH, TILE).T
        if B_ALONG:
            part_b = b.load([batch, j * TILE, start]).reshape(TILE, DEPTH).T
        else:
            part_b = b.load([batch, start, j * TILE]).reshape(DEPTH, TILE)
        total = tl.dot(part_a, part_b, total)
    _finish(
        total, plus, result, batch.to(tl.int64), i, j, size, alpha, beta, diagonal,
        PLUS, WHOLE, TILE,
    )  # fmt: skip


@triton.jit
def _place(tile):
    """Row and column of a tile, counted row by row of the lower triangle: i (i + 1) / 2 + j."""
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    return i, tile - i * (i + 1) // 2


@triton.jit
def _finish(
    total,
    plus,
    result,
    batch,
    i,
    j,
    size,
    alpha,
    beta,
    diagonal,
    PLUS: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store a tile's sums, and off the diagonal their mirror image."""
    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    total = total * alpha
    begin = batch * size * size
    offsets = begin + rows[:, None] * size + columns[None, :]
    mirrored = begin + columns[:, None] * size + rows[None, :]
    kind = result.dtype.element_ty
    if WHOLE:
        if PLUS:
            total += beta * tl.load(plus + offsets).to(tl.float32)
        total += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
        x = total.to(kind)
        tl.store(result + offsets, x)
        if i != j:
            tl.store(result + mirrored, tl.trans(x))
    else:
        inside = (rows[:, None] < size) & (columns[None, :] < size)
        if PLUS:
            total += beta * tl.load(plus + offsets, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
        x = total.to(kind)
        tl.store(result + offsets, x, mask=inside)
        if i != j:
            inside = (columns[:, None] < size) & (rows[None, :] < size)
            tl.store(result + mirrored, tl.trans(x), mask=inside)


def symmetric_product(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    plus: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """``alpha a b^T + beta plus + diagonal I`` for each of a batch, given that it is symmetric.

    So it is for ``b = a``, and for ``a`` and ``b`` that are polynomials of one symmetric matrix.
    Sums are float32; a result's lower triangle is computed and its upper one copied from it.

    Args:
        a, b: shape (batch, size, depth), float16 or float32, of one dtype; any strides.
        alpha, beta, diagonal: numbers.
        plus: symmetric, shape (batch, size, size), contiguous, of the same dtype; or None.
        out: where to put the result, contiguous; or None.

    Returns:
        Shape (batch, size, size), contiguous, of the dtype of ``a``.
    """
    batch, size, depth = a.shape
    if out is None:
        out = torch.empty((batch, size, size), dtype=a.dtype, device=a.device)
    if not out.numel():
        return out
    tile, step, stages = _blocks(a.dtype, size, depth)
    across = triton.cdiv(size, tile)
    grid = (across * (across + 1) // 2, batch, 1)
    numbers = size, depth, float(alpha), float(beta), float(diagonal)
    added = out if plus is None else plus
    options = {"num_warps": NUM_WARPS if tile == TILE else 4, "num_stages": stages}
    kind: tuple[Any, ...] = a.device, a.dtype, size, plus is None, aligned(added), aligned(out)
    with on(a.device):
        if tile == TILE and described(a) and described(b):
            along = a.stride(2) == 1, b.stride(2) == 1
            read = (_descriptor(x, by_row, tile, step) for x, by_row in zip((a, b), along))
            args = (
                *read,
                added,
                out,
                *numbers,
                plus is not None,
                *along,
                size % tile == 0,
                tile,
                step,
            )
            _launch_described((*kind, along, step), grid, args, **options)
        else:
            strides = *a.stride(), *b.stride()
            args = a, b, added, out, *numbers[:2], *strides, *numbers[2:]
            args = *args, plus is not None, depth % step == 0, size % tile == 0, tile, step
            _launch_product((*kind, depth, strides, aligned(a), aligned(b)), grid, args, **options)
    return out


_launch_described = Launcher(described_kernel)
_launch_product = Launcher(product_kernel)


def described(x: Tensor) -> bool:
    """Whether a tensor can be read through a descriptor, and gains by it."""
    if TensorDescriptor is None or x.dtype != torch.float16:
        return False
    if x.is_cuda and not _has_copy_engine(x.device):
        return False
    batch, row, column = x.stride()
    if column != 1:
        row, column = column, row
    return column == 1 and (batch | row) % 8 == 0 and x.data_ptr() % 16 == 0


@cache
def _has_copy_engine(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def _descriptor(x: Tensor, along: bool, tile: int, step: int) -> Any:
    view = x if along else x.mT
    return TensorDescriptor.from_tensor(view, [1, tile, step] if along else [1, step, tile])


def _blocks(dtype: torch.dtype, size: int, depth: int) -> tuple[int, int, int]:
    tile = TILE if size > 64 else max(16, triton.next_power_of_2(size))
    step = min(DEPTH, max(16, triton.next_power_of_2(depth)))
    if dtype == torch.float32:  # the shared memory of float32 tiles is twice as large
        return min(tile, 64), min(step, 32), 2
    return tile, step, NUM_STAGES
