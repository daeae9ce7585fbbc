"""Matrices divided by their norms, in a narrower dtype, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aligned, on
from .launcher import Launcher

CHUNK = 2048
NUM_WARPS = 4


@triton.jit
def divide_kernel(x, norms, out, numel, EVEN: tl.constexpr, CHUNK: tl.constexpr):
    matrix = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    norm = tl.load(norms + matrix)
    at = matrix * numel + places
    if EVEN:
        value = tl.load(x + at)
        tl.store(out + at, (value.to(tl.float32) / norm).to(out.dtype.element_ty))
    else:
        inside = places < numel
        value = tl.load(x + at, mask=inside, other=0.0)
        tl.store(out + at, (value.to(tl.float32) / norm).to(out.dtype.element_ty), mask=inside)


def divided(x: Tensor, norms: Tensor, dtype: torch.dtype) -> Tensor:
    """``x / norms`` for a contiguous (matrices, ...) tensor and float32 norms, one per matrix."""
    out = torch.empty_like(x, dtype=dtype)
    if not out.numel():
        return out
    count, numel = len(x), out[0].numel()
    constants = numel % CHUNK == 0, CHUNK
    kind = x.device, x.dtype, dtype, numel, constants, aligned(x), aligned(norms)
    with on(x.device):
        grid = triton.cdiv(numel, CHUNK), count, 1
        _launch(kind, grid, (x, norms, out, numel, *constants))
    return out


_launch = Launcher(divide_kernel, num_warps=NUM_WARPS)
