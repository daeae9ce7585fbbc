"""The exchange of a pair of weight levels for any number of tensors, as one Triton launch.

Each program reads a chunk of both levels and writes both: 16 bytes per float32 parameter, where two
passes of torch take 20. Where only the device knows the count, a launch serves all pairs of levels
at once: it looks at the counter, ends where nothing is due, and has few programs, each of which
goes from chunk to chunk, so that a step with nothing due costs little more than a launch.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aligned, on
from .launcher import Launcher

#: Elements and warps per program: two 16-byte accesses of float32 per thread and tensor.
CHUNK = 1024
NUM_WARPS = 4
#: Programs of a launch that looks at the counter, per multiprocessor: as many as run at once.
RESIDENT = 16

_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def exchanged(u, v, write, rate, SLOWER: tl.constexpr):
    """``rules.exchange`` of faster and slower weights, of which these are stored as ``SLOWER``."""
    # The two forms of a lerp: exact at either end, and where both are equal.
    change = u - v
    new_v = tl.where(write < 0.5, v + write * change, u - change * (1 - write))
    change = new_v - u
    new_u = tl.where(rate < 0.5, u + rate * change, new_v - change * (1 - rate))
    if SLOWER != u.dtype:  # what rounds to its copy stays, though it is not the same number
        new_u = tl.where(u.to(SLOWER).to(u.dtype) == v, u, new_u)
    return new_u, new_v


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
    u, v = exchanged(u, v, write, rate, SLOWER)
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
    FASTER: tl.constexpr,
    SLOWER: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one pair; ``rates`` holds write and pull after the write."""
    pid = tl.program_id(0)
    row = rows + tl.load(chunks + pid).to(tl.int64) * 5
    start = (pid - tl.load(row + 1)) * CHUNK
    left = tl.load(row) - start
    write = tl.load(rates).to(COMPUTE)
    rate = tl.load(rates + 1).to(COMPUTE)
    lanes = tl.arange(0, CHUNK)
    if (left >= CHUNK) & ((tl.load(row + 2) & 15) == 0):
        _exchange_chunk(
            row + 3, start, lanes, None, write, rate, FASTER, SLOWER, COMPUTE, True
        )  # fmt: skip
    else:
        _exchange_chunk(
            row + 3, start, lanes, lanes < left, write, rate, FASTER, SLOWER, COMPUTE, False
        )  # fmt: skip


@triton.jit
def _place(address, start, lanes, DTYPE: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16) + start + lanes
    else:
        return address.to(tl.pointer_type(DTYPE)) + start + lanes


@triton.jit
def _load_if(needed, at, mask, DTYPE: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr):
    value = tl.zeros([CHUNK], DTYPE)
    if needed:
        if FULL:  # noqa: SIM108
            value = tl.load(at)
        else:
            value = tl.load(at, mask=mask, other=0.0)
    return value


@triton.jit
def _store_if(needed, at, value, mask, DTYPE: tl.constexpr, FULL: tl.constexpr):
    if needed:
        if FULL:
            tl.store(at, value.to(DTYPE))
        else:
            tl.store(at, value.to(DTYPE), mask=mask)


@triton.jit
def _chain_chunk(
    levels,
    rates,
    now,
    start,
    lanes,
    mask,
    FASTER: tl.constexpr,
    SLOWER: tl.constexpr,
    COMPUTE: tl.constexpr,
    DEEP: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
):
    """The exchanges of a chunk that are due at ``now``: each level is read and written once."""
    due = now % tl.load(rates + 2).to(tl.int64) == 0
    moved = due  # whether the faster level of a pair takes part in anything
    u_at = _place(tl.load(levels), start, lanes, FASTER, FULL)
    u = _load_if(moved, u_at, mask, FASTER, CHUNK, FULL).to(COMPUTE)
    for k in tl.static_range(PAIRS):
        needed = due
        if k + 1 < PAIRS:
            after = now % tl.load(rates + 3 * k + 5).to(tl.int64) == 0
            needed = due | after
        v_at = _place(tl.load(levels + k + 1), start, lanes, SLOWER, FULL)
        v = _load_if(needed, v_at, mask, SLOWER, CHUNK, FULL).to(u.dtype)
        write = tl.load(rates + 3 * k).to(u.dtype)
        rate = tl.load(rates + 3 * k + 1).to(u.dtype)
        new_u, new_v = exchanged(u, v, write, rate, SLOWER)
        u = tl.where(due, new_u, u)
        if k == 0:
            _store_if(moved, u_at, u, mask, FASTER, FULL)
        else:
            _store_if(moved, u_at, u, mask, SLOWER, FULL)
        # The next pair goes on with what is stored.
        u = tl.where(due, new_v, v).to(SLOWER).to(DEEP)
        u_at = v_at
        moved = needed
        if k + 1 < PAIRS:
            due = after
    _store_if(moved, u_at, u, mask, SLOWER, FULL)


@triton.jit(do_not_specialize=["n_chunks"])
def chain_kernel(
    chunks,
    rows,
    rates,
    count,
    found_inf,
    n_chunks,
    FASTER: tl.constexpr,
    SLOWER: tl.constexpr,
    COMPUTE: tl.constexpr,
    DEEP: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What is due at ``count`` of all pairs, fastest first, if ``found_inf`` is 0.

    ``rates`` holds write, pull after the write and the frequency of each pair.
    """
    now = tl.load(count)
    any_due = now % tl.load(rates + 2).to(tl.int64) == 0
    for k in tl.static_range(1, PAIRS):
        any_due = any_due | (now % tl.load(rates + 3 * k + 2).to(tl.int64) == 0)
    if any_due & (tl.load(found_inf) == 0):
        lanes = tl.arange(0, CHUNK)
        for at in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
            row = rows + tl.load(chunks + at).to(tl.int64) * (PAIRS + 4)
            start = (at - tl.load(row + 1)) * CHUNK
            left = tl.load(row) - start
            if (left >= CHUNK) & ((tl.load(row + 2) & 15) == 0):
                _chain_chunk(
                    row + 3, rates, now, start, lanes, None,
                    FASTER, SLOWER, COMPUTE, DEEP, PAIRS, CHUNK, True,
                )  # fmt: skip
            else:
                _chain_chunk(
                    row + 3, rates, now, start, lanes, lanes < left,
                    FASTER, SLOWER, COMPUTE, DEEP, PAIRS, CHUNK, False,
                )  # fmt: skip


_launch_pairs = Launcher(exchange_kernel, num_warps=NUM_WARPS, enable_fp_fusion=True)
_launch_chains = Launcher(chain_kernel, num_warps=NUM_WARPS, enable_fp_fusion=True)


@cache
def _resident(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count * RESIDENT


class ExchangeTable:
    """Levels of tensors on one device, each tensor's laid out alike and dense.

    Args:
        levels: the faster tensors, and one or more lists of slower ones, which have one dtype; the
            table holds their addresses and keeps none alive.
        numbers: of each pair how far the slower tensor goes to the faster, how far this then goes
            to the new slower one, and the frequency.
    """

    def __init__(
        self,
        levels: Sequence[Sequence[Tensor]],
        numbers: Sequence[tuple[float, float, int]],
    ) -> None:
        self.n_tensors, self.n_pairs = len(levels[0]), len(numbers)
        self.device = levels[0][0].device
        faster, slower = levels[0][0].dtype, levels[1][0].dtype
        deep = torch.promote_types(slower, torch.float32)
        wide = torch.promote_types(faster, deep)
        self._kinds = [_DTYPES[dtype] for dtype in (faster, slower, wide, deep)]
        rows, chunks = array("q"), array("i")
        for i, tensors in enumerate(zip(*levels)):
            addresses = [t.data_ptr() for t in tensors]
            merged, numel = 0, tensors[0].numel()
            for address in addresses:
                merged |= address
            rows.extend([numel, len(chunks), merged, *addresses])
            chunks.extend(array("i", [i]) * (-(-numel // CHUNK)))
        self._n_chunks = len(chunks)
        self._rows = self._upload(torch.tensor(rows, dtype=torch.int64))
        self._chunks = self._upload(torch.tensor(chunks, dtype=torch.int32))
        self._rates = self._upload(torch.tensor(numbers, dtype=torch.float64))
        self._never = torch.zeros((), device=self.device)

    def _upload(self, host: Tensor) -> Tensor:
        if self.device.type == "cuda":  # so that the copy waits for nothing
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def launch(self) -> None:
        """Exchange every tensor with its slower one; for a table with one pair of levels."""
        if not self._n_chunks:
            return
        constants = *self._kinds[:3], CHUNK
        args = self._chunks, self._rows, self._rates, *constants
        with on(self.device):
            _launch_pairs((self.device, constants), (self._n_chunks, 1, 1), args)

    def launch_due(self, count: Tensor, found_inf: Tensor | None = None) -> None:
        """The exchanges of all pairs that are due, which the host need not know.

        Args:
            count: int64, one element, on the device: pairs are due at multiples of their frequency.
            found_inf: likewise (optional): then only if it is 0.
        """
        if not self._n_chunks:
            return
        found_inf = self._never if found_inf is None else found_inf
        constants = *self._kinds, self.n_pairs, CHUNK
        args = self._chunks, self._rows, self._rates, count, found_inf, self._n_chunks, *constants
        kind = self.device, constants, found_inf.dtype, aligned(count), aligned(found_inf)
        programs = min(self._n_chunks, _resident(self.device))
        with on(self.device):
            _launch_chains(kind, (programs, 1, 1), args)
