"""The exchange of a pair of weight levels for any number of tensors, as one Triton launch.

Each program reads a chunk of both levels and writes both: 16 bytes per float32 parameter, where two
passes of torch take 20. Given a counter on the device, programs of a step that is not due end right
away, so the host need not know the count.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements and warps per program: two 16-byte accesses of float32 per thread and tensor.
CHUNK = 1024
NUM_WARPS = 4

_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _exchange_chunk(
    row,
    start,
    lanes,
    mask,
    write,
    rate,
    FASTER: tl.constexpr,
    SLOWER: tl.constexpr,
    COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):
    u_address = tl.load(row)
    v_address = tl.load(row + 1)
    if FULL:
        # What is rounded here is a multiple of 16 already; the compiler learns it.
        u_at = tl.multiple_of((u_address // 16 * 16).to(tl.pointer_type(FASTER)), 16) + start
        v_at = tl.multiple_of((v_address // 16 * 16).to(tl.pointer_type(SLOWER)), 16) + start
        u = tl.load(u_at + lanes).to(COMPUTE)
        v = tl.load(v_at + lanes).to(COMPUTE)
    else:
        u_at = u_address.to(tl.pointer_type(FASTER)) + start
        v_at = v_address.to(tl.pointer_type(SLOWER)) + start
        u = tl.load(u_at + lanes, mask=mask, other=0.0).to(COMPUTE)
        v = tl.load(v_at + lanes, mask=mask, other=0.0).to(COMPUTE)
    # The two forms of a lerp: exact at either end, and where both are equal.
    change = u - v
    v = tl.where(write < 0.5, v + write * change, u - change * (1 - write))
    change = v - u
    u = tl.where(rate < 0.5, u + rate * change, v - change * (1 - rate))
    if FULL:
        tl.store(u_at + lanes, u.to(FASTER))
        tl.store(v_at + lanes, v.to(SLOWER))
    else:
        tl.store(u_at + lanes, u.to(FASTER), mask=mask)
        tl.store(v_at + lanes, v.to(SLOWER), mask=mask)


@triton.jit
def exchange_kernel(
    chunks,
    rows,
    rates,
    count,
    found_inf,
    FASTER: tl.constexpr,
    SLOWER: tl.constexpr,
    COMPUTE: tl.constexpr,
    GATED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one pair; ``rates`` holds write, pull after the write, and the frequency."""
    due = True
    if GATED:
        frequency = tl.load(rates + 2).to(tl.int64)
        due = (tl.load(count) % frequency == 0) & (tl.load(found_inf) == 0)
    if due:
        pid = tl.program_id(0)
        row = rows + tl.load(chunks + pid).to(tl.int64) * 8
        start = (pid - tl.load(row + 3)) * CHUNK
        left = tl.load(row + 2) - start
        write = tl.load(rates).to(COMPUTE)
        rate = tl.load(rates + 1).to(COMPUTE)
        lanes = tl.arange(0, CHUNK)
        if (left >= CHUNK) & ((tl.load(row + 4) & 15) == 0):
            _exchange_chunk(
                row, start, lanes, None, write, rate, FASTER, SLOWER, COMPUTE, True
            )  # fmt: skip
        else:
            _exchange_chunk(
                row, start, lanes, lanes < left, write, rate, FASTER, SLOWER, COMPUTE, False
            )  # fmt: skip


class ExchangeTable:
    """Pairs of tensors of one device and one pair of dtypes, each pair laid out alike and dense.

    Args:
        faster, slower: at least one pair; the table holds their addresses and keeps none alive.
        write: how far ``slower`` goes to ``faster``.
        rate: how far ``faster`` then goes to the new ``slower``.
        frequency: of the exchange, for :meth:`launch` with a count.
    """

    def __init__(
        self,
        faster: Sequence[Tensor],
        slower: Sequence[Tensor],
        write: float,
        rate: float,
        frequency: int,
    ) -> None:
        self.n_pairs = len(faster)
        self.device = faster[0].device
        dtypes = faster[0].dtype, slower[0].dtype
        wide = torch.promote_types(torch.promote_types(*dtypes), torch.float32)
        self._kinds = [_DTYPES[dtype] for dtype in (*dtypes, wide)]
        rows, chunks = array("q"), array("i")
        for i, (u, v) in enumerate(zip(faster, slower)):
            addresses = [u.data_ptr(), v.data_ptr()]
            numel = u.numel()
            rows.extend([*addresses, numel, len(chunks), addresses[0] | addresses[1], 0, 0, 0])
            chunks.extend(array("i", [i]) * (-(-numel // CHUNK)))
        self._n_chunks = len(chunks)
        self._rows = self._upload(torch.tensor(rows, dtype=torch.int64))
        self._chunks = self._upload(torch.tensor(chunks, dtype=torch.int32))
        values = torch.tensor([write, rate, frequency], dtype=torch.float64)
        self._rates = self._upload(values)

    def _upload(self, host: Tensor) -> Tensor:
        if self.device.type == "cuda":  # so that the copy waits for nothing
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def launch(self, count: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Exchange every pair.

        Args:
            count: int64, one element, on the device; then only if it is a multiple of the
                frequency and ``found_inf`` (likewise, optional) is 0.
        """
        if not self._n_chunks:
            return
        gated = count is not None
        if gated and found_inf is None:
            found_inf = torch.zeros((), device=self.device)
        launch: Any = exchange_kernel[(self._n_chunks,)]
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            launch(
                self._chunks,
                self._rows,
                self._rates,
                count,
                found_inf,
                *self._kinds,
                gated,
                CHUNK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
