"""Pointer tables: where the kernels find the tensors of a step, and what to do with them."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Elements per program of the update kernel.
CHUNK = 512

#: Columns of the tables that the kernels index by number.
ROW, ORDER, SETTINGS, COUNTERS = 16, 16, 16, 4


class Entry(NamedTuple):
    """One parameter with its state. All tensors of its shape share one dense layout in memory."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    kahan_comp: Tensor | None
    window_sum: Tensor | None
    step: Tensor  # float32, one element, on the device
    window_count: Tensor  # likewise
    group: int  # row of the settings


class LevelTable:
    """The tensors of one launch: one device, one set of dtypes, any number of groups.

    In device memory, for T tensors and G groups:

    - ``chunks``, int32: the tensor that each program of the update works on;
    - ``rows``, int64 ``(T, 16)``: addresses of gradient (written by the kernel), parameter, first,
      second and largest second moment, compensation and window; number of elements, first chunk,
      and all of these addresses or-ed, whose low bits tell whether the tensor is aligned; of a
      weight memory's first copy (:meth:`join`) the address, or 0, and the exchange's frequency;
    - ``counters``, int64 ``(T, 4)``: addresses of ``step`` and ``window_count``, and the group;
    - ``settings``, float64 ``(G, 16)``: lr, weight decay, beta1, beta2, their logarithms, eps,
      frequency, mean or sum, decoupled or not, sign of the gradient;
    - ``orders``, ``(T, 16)`` in the dtype of the computation: written by the first kernel; but
      for the last two columns, an exchange's rates.

    Args:
        entries: at least one; the table keeps their tensors alive.
        grad_dtype: of all gradients.
        n_groups: rows of ``settings``.
    """

    def __init__(self, entries: Sequence[Entry], grad_dtype: torch.dtype, n_groups: int) -> None:
        one = entries[0]
        self.entries = list(entries)
        self.device = one.param.device
        self.n_tensors = len(entries)
        self.n_groups = n_groups
        self.amsgrad = one.max_exp_avg_sq is not None
        self.kahan = one.kahan_comp is not None
        self.windows = any(e.window_sum is not None for e in entries)
        moment = one.exp_avg.dtype
        wide = torch.promote_types(torch.promote_types(one.param.dtype, moment), torch.float32)
        #: parameter, gradient, moments, computation and windows
        self.dtypes = (one.param.dtype, grad_dtype, moment, wide)

        rows, counters, chunks = array("q"), array("q"), array("i")
        for i, e in enumerate(entries):
            tensors = [t for t in e[:6] if t is not None]
            addresses = [0 if t is None else t.data_ptr() for t in e[:6]]
            merged = 0
            for t in tensors:
                merged |= t.data_ptr()
            numel = e.param.numel()
            row = [0, *addresses, numel, len(chunks), merged]
            rows.extend(row + [0] * (ROW - len(row)))
            counters.extend([e.step.data_ptr(), e.window_count.data_ptr(), e.group, 0])
            # An empty tensor has counters too, and they are moved by `advance` alone.
            chunks.extend(array("i", [i]) * (-(-numel // CHUNK)))
        self.n_chunks = len(chunks)
        self.rows = self._upload(rows).view(-1, ROW)
        self.counters = self._upload(counters).view(-1, COUNTERS)
        self.chunks = self._upload(chunks)
        self.orders = torch.zeros(self.n_tensors, ORDER, dtype=wide, device=self.device)
        self.settings = torch.zeros(n_groups, SETTINGS, dtype=torch.float64, device=self.device)
        #: Launches an ordinary step once more, given where the gradients' addresses are; set by
        #: the first one.
        self.launch: Callable[[int], None] | None = None
        self.addresses = AddressRing(self.n_tensors, self.device)
        self._values: array[float] | None = None
        self._joined: list[tuple[int, int, float, float]] = []

    def join(self, copies: list[tuple[int, int, float, float]]) -> None:
        """Note for each tensor a copy to exchange with: address (0: none), frequency and rates."""
        if copies == self._joined:
            return
        columns = list(zip(*copies))
        where = torch.tensor(columns[:2], dtype=torch.int64).T.contiguous()
        rates = torch.tensor(columns[2:], dtype=self.orders.dtype).T.contiguous()
        if self.device.type == "cuda":
            where, rates = where.pin_memory(), rates.pin_memory()
        self.rows[:, 10:12].copy_(where, non_blocking=True)
        self.orders[:, 14:16].copy_(rates, non_blocking=True)
        self._joined = list(copies)

    def _upload(self, values: array[int]) -> Tensor:
        dtype = torch.int64 if values.typecode == "q" else torch.int32
        if not values:
            return torch.zeros(0, dtype=dtype, device=self.device)
        host = torch.frombuffer(values, dtype=dtype).clone()
        if self.device.type == "cuda":  # so that the copy waits for nothing
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def settings_differ(self, values: array[float]) -> bool:
        """Whether the device holds other settings than these."""
        return values is not self._values and values != self._values

    def upload(self, values: array[float]) -> None:
        """Bring the settings to the device, if they have changed."""
        if self.settings_differ(values):
            host = torch.frombuffer(values, dtype=torch.float64).view(-1, SETTINGS).clone()
            if self.device.type == "cuda":
                host = host.pin_memory()
            self.settings.copy_(host, non_blocking=True)
            self._values = values


# Memory of rings that are gone, with the events behind the last steps that may read it.
_RETIRED: list[tuple[list[torch.cuda.Event], Tensor]] = []
# What CUDA graphs read for as long as they live, and nobody knows how long that is.
_CAPTURED: list[Tensor] = []


def _retire(memory: Tensor, device: torch.device) -> None:
    if torch.cuda.is_current_stream_capturing():  # when events can neither be recorded nor read
        _CAPTURED.append(memory)
        return
    streams = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    events = [stream.record_event() for stream in dict.fromkeys(streams)]
    _RETIRED[:] = [entry for entry in _RETIRED if not all(e.query() for e in entry[0])]
    _RETIRED.append((events, memory))


class AddressRing:
    """Host memory for the addresses of gradients, which the device reads where it lies.

    A slot is written again when the steps that read it are over; only a host that is half the ring
    ahead of the device has to wait for that. torch cannot know what reads here, so the memory is
    given back only when the device is done with it.
    """

    SLOTS = 128
    SPARE = 8  # for CUDA graphs: written once

    def __init__(self, length: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        # An even length keeps every slot at a multiple of 16 bytes.
        size = (self.SLOTS + self.SPARE, length + length % 2)
        memory = torch.empty(size, dtype=torch.int64, pin_memory=on_gpu)
        if on_gpu:
            weakref.finalize(self, _retire, memory, device).atexit = False
        slots = [slot[:length] for slot in memory.unbind()]
        pairs = [(s, (ctypes.c_int64 * length).from_address(s.data_ptr())) for s in slots]
        self._slots, self._spare = pairs[: self.SLOTS], pairs[self.SLOTS :]
        self._events = [torch.cuda.Event(), torch.cuda.Event()] if on_gpu else []
        self._at = -1
        self._written: list[int] | None = None

    def write(self, addresses: list[int]) -> Tensor:
        """A slot that holds ``addresses``: int64, shape ``(length,)``."""
        if addresses != self._written:
            self._at = (self._at + 1) % self.SLOTS
            entered, within = divmod(self._at, self.SLOTS // 2)
            if within == 0 and self._events:
                self._events[1 - entered].record()  # behind the last step that reads that half
                self._events[entered].synchronize()
            self._slots[self._at][1][:] = addresses  # type: ignore[assignment]
            self._written = addresses
        return self._slots[self._at][0]

    def give(self, addresses: list[int]) -> Tensor:
        """The same in a slot that is never written again."""
        if not self._spare:
            raise RuntimeError(
                f"a step has been captured {self.SPARE} times with the same tables, and there is "
                "no memory left for another graph: make a new optimizer from its state_dict()"
            )
        slot, view = self._spare.pop()
        _CAPTURED.append(slot)
        view[:] = addresses  # type: ignore[assignment]
        return slot
