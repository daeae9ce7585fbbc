"""Matrices divided by their norms, in a narrower dtype, in one pass."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    launcher: Any = divide_kernel[(triton.cdiv(numel, CHUNK), count)]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        launcher(x, norms, out, numel, numel % CHUNK == 0, CHUNK, num_warps=NUM_WARPS)
    return out
