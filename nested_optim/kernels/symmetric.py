"""Batched matrix products whose result is symmetric, of which half the tiles are computed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tile of the result, depth of one step of the product, warps and pipeline stages: fixed, because
#: what follows must not depend on a search.
TILE = 128
DEPTH = 64
NUM_WARPS = 8
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
    b_batch,
    b_row,
    alpha,
    beta,
    diagonal,
    PLUS: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile on or below the diagonal of ``alpha a b^T + beta plus + diagonal I``, stored twice.

    ``a`` and ``b`` are (batch, size, depth), contiguous along depth; ``plus`` and ``result`` are
    (batch, size, size), contiguous.
    """
    batch = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    # Tiles are counted row by row of the lower triangle: tile = i (i + 1) / 2 + j with j <= i.
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2

    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    # Rows past the end read valid ones again; what they give is not stored.
    a_rows = rows % size
    b_rows = columns % size
    inner = tl.arange(0, DEPTH)
    a_at = a + batch * a_batch + a_rows[:, None].to(tl.int64) * a_row + inner[None, :]
    b_at = b + batch * b_batch + b_rows[:, None].to(tl.int64) * b_row + inner[None, :]
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
        a_at += DEPTH
        b_at += DEPTH

    total = total * alpha
    inside = (rows[:, None] < size) & (columns[None, :] < size)
    offsets = batch * size * size + rows[:, None].to(tl.int64) * size + columns[None, :]
    if PLUS:
        total += beta * tl.load(plus + offsets, mask=inside, other=0.0).to(tl.float32)
    total += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
    kind = result.dtype.element_ty
    tl.store(result + offsets, total.to(kind), mask=inside)
    if i != j:
        mirrored = batch * size * size + columns[:, None].to(tl.int64) * size + rows[None, :]
        inside = (columns[:, None] < size) & (rows[None, :] < size)
        tl.store(result + mirrored, tl.trans(total).to(kind), mask=inside)


def symmetric_product(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    plus: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """``alpha a b^T + beta plus + diagonal I`` for each of a batch, given that it is symmetric.

    So it is for ``b = a``, and for ``a`` and ``b`` that are polynomials of one symmetric matrix.
    Sums are float32; a result's lower triangle is computed and its upper one copied from it.

    Args:
        a, b: shape (batch, size, depth), float16 or float32, of one dtype.
        alpha, beta, diagonal: numbers.
        plus: symmetric, shape (batch, size, size), contiguous, of the same dtype; or None.

    Returns:
        Shape (batch, size, size), contiguous, of the dtype of ``a``.
    """
    batch, size, depth = a.shape
    a, b = (x if x.stride(2) == 1 else x.contiguous() for x in (a, b))
    result = torch.empty((batch, size, size), dtype=a.dtype, device=a.device)
    if not result.numel():
        return result
    tile, step, stages = _blocks(a.dtype, size, depth)
    across = triton.cdiv(size, tile)
    launcher: Any = product_kernel[(across * (across + 1) // 2, batch)]
    with torch.cuda.device(a.device) if a.is_cuda else torch.no_grad():
        launcher(
            a,
            b,
            plus if plus is not None else a,
            result,
            size,
            depth,
            a.stride(0),
            a.stride(1),
            b.stride(0),
            b.stride(1),
            float(alpha),
            float(beta),
            float(diagonal),
            PLUS=plus is not None,
            EVEN=depth % step == 0,
            TILE=tile,
            DEPTH=step,
            num_warps=NUM_WARPS if tile == TILE else 4,
            num_stages=stages,
        )
    return result


def _blocks(dtype: torch.dtype, size: int, depth: int) -> tuple[int, int, int]:
    tile = TILE if size > 64 else max(16, triton.next_power_of_2(size))
    step = min(DEPTH, max(16, triton.next_power_of_2(depth)))
    if dtype == torch.float32:  # the shared memory of float32 tiles is twice as large
        return min(tile, 64), min(step, 32), 2
    return tile, step, NUM_STAGES
