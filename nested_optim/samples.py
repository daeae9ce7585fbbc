"""Uniform samples, of bounded size, of the rows that a stream brings.

Each row of a stream has a pseudo-random key, a hash of its place and the stream's seed. A sample of
size ``n`` is the rows with the ``n`` smallest keys: uniform, without replacement, the same however
the stream was cut into pieces, and owing nothing to a random number generator.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

#: The key of a place that holds no row.
EMPTY = torch.iinfo(torch.int64).max

_MASK = 2**64 - 1
# Odd constants with well-mixed bits: the golden ratio's, and those of a common 64-bit finalizer.
_STEP, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Sample(NamedTuple):
    """Rows ``(k, features)`` with their keys ``(k,)``, out of ``total`` that the stream brought.

    ``total`` is a number, or a 0-d tensor where only the device knows it. Places without a row
    have the key :data:`EMPTY` and zeros.
    """

    rows: Tensor
    keys: Tensor
    total: Any


@lru_cache(maxsize=64)  # a step's streams mostly have one
def stream_seed(*numbers: int) -> int:
    """A seed from integers that say which stream it is."""
    seed = 0
    for number in numbers:
        seed = ((seed ^ (number & _MASK)) * _MIX1 + _STEP) & _MASK
        seed ^= seed >> 31
    return _signed(seed)


def stream_keys(seed: int, start: int, count: int, device: torch.device) -> Tensor:
    """The keys of the rows ``start`` to ``start + count`` of the stream with this seed."""
    # int64 products wrap, as they do in the hash this is made after; its shifts were unsigned,
    # these are not, which costs one bit of the 64.
    keys = torch.arange(start, start + count, device=device)
    keys.mul_(_signed(_STEP)).add_(seed)
    keys.bitwise_xor_(keys >> 30).mul_(_signed(_MIX1))
    keys.bitwise_xor_(keys >> 27).mul_(_signed(_MIX2))
    return keys.bitwise_xor_(keys >> 31)


def smallest(keys: Tensor, size: int) -> Tensor:
    """Where the ``size`` smallest keys are, in the stream's order."""
    return torch.topk(keys, size, largest=False, sorted=False).indices.sort().values


def thinned(sample: Sample, size: int) -> Sample:
    """A sample of at most ``size`` places."""
    if len(sample.rows) <= size:
        return sample
    chosen = smallest(sample.keys, size)
    rows, keys = (t.index_select(0, chosen) for t in sample[:2])
    return Sample(rows, keys, sample.total)


def padded(sample: Sample, size: int) -> Sample:
    """A sample of exactly ``size`` places."""
    rows, keys, total = thinned(sample, size)
    missing = size - len(rows)
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
        keys = torch.cat([keys, keys.new_full((missing,), EMPTY)])
    return Sample(rows, keys, total)


def across_ranks(samples: list[Sample], size: int, group: Any) -> list[Sample]:
    """For each stream, the sample of ``size`` places of what all ranks of a group brought.

    Every rank gives the same streams in the same order, their rows in the same dtypes, and gets the
    same bits. Sent are all keys, and the rows of the result: as much as it takes to sum ``size``
    rows over the ranks, however many ranks there are. Totals are tensors on the rows' device, where
    nothing waits for them.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    own = [padded(sample, size) for sample in samples]
    totals = [s.keys.new_full((1,), s.total) for s in own]
    message = torch.cat([*(s.keys for s in own), *totals])
    everywhere = message.new_empty(ranks, len(message))
    dist.all_gather(list(everywhere), message, group=group)
    keys = everywhere[:, : -len(own)].reshape(ranks, len(own), size)
    total = everywhere[:, -len(own) :].sum(0)

    results, sums = [], []
    for i, sample in enumerate(own):
        offered = keys[:, i].reshape(-1)
        chosen = smallest(offered, size)
        place = chosen - rank * size
        mine = (place >= 0) & (place < size)
        rows = sample.rows[place.clamp(0, size - 1)]
        # Zeros from all ranks but one: the sum is that one's row, to the last bit.
        rows = torch.where(mine.unsqueeze(1), rows, 0)
        sums.append(dist.all_reduce(rows, group=group, async_op=True))
        results.append(Sample(rows, offered[chosen], total[i]))
    for work in sums:
        work.wait()
    return results


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
