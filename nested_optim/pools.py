"""What waits between backward pass and step: rows of the inputs of each weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .samples import Sample, smallest, stream_keys, stream_seed, thinned

if TYPE_CHECKING:
    from .capture import Capture

#: Choices of rows that are kept for other layers: more than any step has kinds of.
_MAX_CHOICES = 64

#: Where nobody asked for keys.
_NO_KEYS = torch.empty(0, dtype=torch.int64)

_current_task: Callable[[], int] = torch._C._current_graph_task_id
_when_task_ends: Callable[[Callable[[], None]], None] = (
    torch.autograd.Variable._execution_engine.queue_callback
)
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Use(Protocol):
    """One call of a layer."""

    dtype: torch.dtype

    def count(self, x: Tensor, features: int) -> int:
        """How many rows this input has."""

    def rows(self, x: Tensor, count: int, features: int, index: Tensor | None) -> Tensor:
        """A copy of the rows at ``index``, or of all ``count``."""


@dataclass(slots=True)
class Part:
    """Rows of one use, which its layer multiplied in ``dtype``.

    Without keys they are all of its rows, from ``start`` on.
    """

    task: int
    start: int
    count: int
    dtype: torch.dtype
    rows: Tensor
    keys: Tensor | None

    def keyed(self, seed: int) -> Tensor:
        if self.keys is None:
            self.keys = stream_keys(seed, self.start, self.count, self.rows.device)
        return self.keys


class Pool:
    """The inputs of one weight."""

    def __init__(self, capture: Capture, weight: Tensor) -> None:
        self.capture, self.weight = capture._self, weight
        self.anchor, self.choices, self.tasks = capture._anchor, capture._choices, capture._tasks
        self.ref = weakref.ref(self)
        self.conv = weight.dim() > 2
        self.layout = capture.layouts[weight]
        self.features = self.measure()
        self.group: dict[str, Any] | None = None  # the weight's, until it may have changed
        self.capacity = 0
        self.seed: int | None = None
        self.total = 0  # committed
        self.kept = 0  # rows of them
        self.arrived = False
        self.parts: list[Part] = []
        # Of all backward passes that are running: one may run within another.
        self.staged: list[Part] = []
        self.coming = 0  # inputs that these stand for
        self.waiting = 0  # rows of them

    def measure(self) -> int:
        """The length of inputs, which is another if a weight's ``data`` has been replaced."""
        self.features = self.layout.features(self.weight)
        return self.features

    def clear(self, staged: bool = True) -> None:
        """Forget what was committed; and what was staged, and by which choice."""
        self.total, self.kept, self.arrived, self.parts = 0, 0, False, []
        if staged:
            self.staged, self.coming, self.waiting, self.seed = [], 0, 0, None

    def stage(self, use: Use, x: Tensor) -> None:
        """Take the rows of a use whose backward pass has begun."""
        seed = self.seed
        if seed is None:
            seed = self._open()
            if seed is None:
                return
        elif self.arrived and self.weight.grad is None:
            self.clear(staged=False)  # the gradient that those inputs belonged to was thrown away
        task, start, features = _current_task(), self.total + self.coming, self.features
        if task not in self.tasks and task >= 0:
            self.tasks.add(task)
            _when_task_ends(partial(_end, self.capture, task))
        keys = index = None
        count = kept = use.count(x, features)
        if count > self.capacity:
            kept = self.capacity
            index, keys = chosen(self.choices, seed, start, count, kept, x)
        rows = use.rows(x, count, features, index)
        self.staged.append(Part(task, start, count, use.dtype, rows, keys))
        self.coming += count
        self.waiting += kept
        if self.waiting > 2 * self.capacity:
            self._thin(task)

    def _thin(self, task: int) -> None:
        """Of what this backward pass has staged keep what will be kept of it in the end."""
        own = [part for part in self.staged if part.task == task]
        if sum(part.rows.shape[0] for part in own) > self.capacity:
            self.staged = [part for part in self.staged if part.task != task]
            self.staged.append(self._merged(own))
            self.waiting = sum(part.rows.shape[0] for part in self.staged)

    def forget(self, task: int) -> None:
        """Drop what this backward pass has staged and not committed."""
        self.staged = [part for part in self.staged if part.task != task]
        self.coming = sum(part.count for part in self.staged)
        self.waiting = sum(part.rows.shape[0] for part in self.staged)

    def _open(self) -> int | None:
        """Learn how many rows to keep and by what choice, for the first input since a step."""
        capture = self.capture()
        owner = None if capture is None else capture._owner()
        group = None if owner is None else self.group or owner._group_of(self.weight)
        if capture is None or owner is None or group is None:
            return None
        ranks = capture.process_group
        self.capacity, step, waiting = owner._sample_plan(self.weight, group)
        self.seed = stream_seed(step, waiting, 0 if ranks is None else dist.get_rank(ranks))
        return self.seed

    def commit(self) -> None:
        """The gradient of what this backward pass has staged has arrived."""
        task = _current_task()
        staged, self.staged = self.staged, []
        for part in staged:
            if part.task != task:
                self.staged.append(part)
                continue
            self.arrived = True
            self.parts.append(part)
            rows = part.rows.shape[0]
            self.total += part.count
            self.kept += rows
            self.coming -= part.count
            self.waiting -= rows
        if self.kept > self.capacity:
            with torch.no_grad():
                self.parts = [self._merged(self.parts)]
            self.kept = self.capacity

    def _merged(self, parts: list[Part]) -> Part:
        """A sample of at most ``capacity`` rows of all that these parts stand for."""
        assert self.seed is not None
        cast(parts)
        rows = _joined([part.rows for part in parts])
        keys = _joined([part.keyed(self.seed) for part in parts])
        rows, keys, count = thinned(Sample(rows, keys, sum(p.count for p in parts)), self.capacity)
        return Part(parts[0].task, 0, count, rows.dtype, rows, keys)

    def sample(self, keyed: bool) -> Sample:
        """All committed rows, as they were multiplied."""
        cast(self.parts)
        return self.joined(keyed)

    def joined(self, keyed: bool) -> Sample:
        """All committed rows, which have been cast."""
        assert self.seed is not None
        rows = _joined([part.rows for part in self.parts])
        keys = [part.keyed(self.seed) for part in self.parts] if keyed else []
        return Sample(rows, _joined(keys) if keys else _NO_KEYS, self.total)


def _end(capture: Callable[[], Capture | None], task: int) -> None:
    found = capture()
    if found is not None:
        found.end_pass(task)


def chosen(
    choices: dict[Any, tuple[Tensor, Tensor]],
    seed: int,
    start: int,
    count: int,
    size: int,
    x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Which ``size`` of ``count`` rows of ``x`` to keep, and their keys.

    Layers of one seed that see as many inputs keep the same places, so most layers of a step share
    one choice. On a device it belongs to the stream that made it.
    """
    device = x.device
    name = seed, start, count, size, device, _stream(device) if x.is_cuda else None
    found = choices.get(name)
    if found is None:
        keys = stream_keys(seed, start, count, device)
        index = smallest(keys, size)
        found = (index, keys.index_select(0, index))
        if len(choices) >= _MAX_CHOICES:
            choices.clear()
        choices[name] = found
    return found


class Typed(Protocol):
    """Rows, and the dtype in which they were multiplied if that is another."""

    rows: Tensor
    dtype: Any


def cast(parts: Iterable[Typed]) -> None:
    """Bring rows to the dtypes in which they were multiplied: of many layers in few launches."""
    kinds: dict[Any, list[Typed]] = {}
    for part in parts:
        if part.dtype is not None and part.rows.dtype is not part.dtype:
            kinds.setdefault((part.rows.device, part.rows.dtype, part.dtype), []).append(part)
    for (_, _, dtype), members in kinds.items():
        before = [part.rows for part in members]
        for part in members:
            part.rows = torch.empty_like(part.rows, dtype=dtype)
        torch._foreach_copy_([part.rows for part in members], before)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Concatenated, in the widest of their dtypes."""
    if len(tensors) == 1:
        return tensors[0]
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.to(dtype) for tensor in tensors])


def _stream(device: torch.device) -> int:
    """The stream that a CUDA device's work goes to, as a number."""
    if _raw_stream is None:
        return torch.cuda.current_stream(device).cuda_stream
    stream: int = _raw_stream(device.index)
    return stream
