"""Descent with a term: parameters of one shape, each with a step size of its own, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

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

#: Of parameters, gradients and terms.
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


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
    """One chunk of one tensor: ``p <- p - e (sign g + weight_decay p) - term``."""
    which = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * CHUNK
    lanes = tl.arange(0, CHUNK)
    param = tl.load(addresses + which)
    grad = tl.load(addresses + tl.num_programs(1) + which)
    if ALIGNED:
        # What is rounded here is a multiple of 16 already; the compiler learns it.
        p_at = tl.multiple_of((param // 16 * 16).to(tl.pointer_type(PARAM)), 16) + start + lanes
        g_at = tl.multiple_of((grad // 16 * 16).to(tl.pointer_type(GRAD)), 16) + start + lanes
    else:
        p_at = param.to(tl.pointer_type(PARAM)) + start + lanes
        g_at = grad.to(tl.pointer_type(GRAD)) + start + lanes
    t_at = terms + which * numel + start + lanes
    inside = start + lanes < numel
    p = (tl.load(p_at) if EVEN else tl.load(p_at, mask=inside, other=0.0)).to(tl.float32)
    t = (tl.load(t_at) if EVEN else tl.load(t_at, mask=inside, other=0.0)).to(tl.float32)
    g = (tl.load(g_at) if EVEN else tl.load(g_at, mask=inside, other=0.0)).to(tl.float32)
    p = (p - (tl.load(sizes + which) * (sign * g + weight_decay * p) + t)).to(PARAM)
    if EVEN:
        tl.store(p_at, p)
    else:
        tl.store(p_at, p, mask=inside)


class Descend:
    """Launches, and the memory through which the addresses of their tensors travel."""

    def __init__(self) -> None:
        self._rings: dict[tuple[torch.device, int], AddressRing] = {}

    @staticmethod
    def serves(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        terms: Tensor,
        sizes: Tensor,
        weight_decay: float | Tensor,
    ) -> bool:
        """Whether these can be read: contiguous, of one dtype each, none wider than float32."""
        if isinstance(weight_decay, Tensor) or sizes.dtype is not torch.float32:
            return False
        if terms.dtype not in DTYPES or not terms.is_contiguous() or not terms.numel():
            return False
        for tensors in (params, grads):
            dtypes = {t.dtype for t in tensors}
            if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
                return False
            if not all(map(Tensor.is_contiguous, tensors)):
                return False
        return True

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        terms: Tensor,
        sizes: Tensor,
        weight_decay: float,
        sign: float,
    ) -> None:
        """``p <- p - e (sign g + weight_decay p) - term``, as :meth:`serves` allows.

        Args:
            params, grads: all of one number of elements, on one device.
            terms: one for each, stacked.
            sizes: ``e`` of each.
        """
        count, device, numel = len(params), terms.device, terms[0].numel()
        ring = self._rings.get((device, count))
        if ring is None:
            ring = self._rings[device, count] = AddressRing(2 * count, device)
        addresses = [t.data_ptr() for tensors in (params, grads) for t in tensors]
        # Copied, for the ring's memory may be written again before the launch reads it.
        where = ring.write(addresses).to(device, copy=True, non_blocking=True)
        whole = not reduce(or_, addresses) & 15 and aligned(terms)
        constants = (
            DTYPES[params[0].dtype],
            DTYPES[grads[0].dtype],
            whole and numel * terms.itemsize % 16 == 0,
            numel % CHUNK == 0,
            CHUNK,
        )
        tensors = where, terms, sizes
        kind = device, terms.dtype, numel, constants, *map(aligned, tensors)
        grid = triton.cdiv(numel, CHUNK), count, 1
        args = *tensors, numel, float(weight_decay), float(sign), *constants
        with on(device):
            _launch(kind, grid, args)


_launch = Launcher(descend_kernel, num_warps=NUM_WARPS)
