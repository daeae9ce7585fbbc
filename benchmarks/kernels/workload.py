"""The tensors of a model on a device, shared by the optimizers that are timed on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .contestants import Contestant, Options
from .shapes import NamedShape, elements

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What the caching allocator, kernels and the rest of the process take.
HEADROOM_BYTES = 1 << 30


class Workload:
    """Random parameters and gradients.

    There are two sets of gradients, so that a step can find each at another address than the step
    before, as in training that clears gradients by setting them to None.
    """

    def __init__(
        self,
        shapes: Sequence[NamedShape],
        dtype: torch.dtype,
        device: torch.device,
        gradient_sets: int = 2,
    ) -> None:
        self.shapes = [size for _, size in shapes]
        self.dtype = dtype
        self.device = device
        generator = torch.Generator(device).manual_seed(0)

        def random_tensors() -> list[Tensor]:
            return [
                torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)
                for size in self.shapes
            ]

        self.storage = random_tensors()
        self.gradients = [random_tensors() for _ in range(gradient_sets)]

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.storage)


class Runner:
    """One optimizer on a workload. Its parameters share their memory with all others'."""

    def __init__(self, contestant: Contestant, workload: Workload, options: Options) -> None:
        self.contestant = contestant
        self.device = workload.device
        at = contestant.select(workload.shapes)
        self.params = [Parameter(workload.storage[i]) for i in at]
        self.gradients = [[grads[i] for i in at] for grads in workload.gradients]
        #: How many gradients each parameter gathers per update.
        self.frequencies = contestant.frequencies(self.params)
        self.period = math.lcm(*self.frequencies)
        self.optimizer = contestant.make(self.params, self.frequencies, options)

    def use_gradients(self, turn: int) -> None:
        for p, grad in zip(self.params, self.gradients[turn % len(self.gradients)]):
            p.grad = grad

    def state_tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor of the state, once, with its parameter."""
        seen: set[int] = set()
        for p in self.params:
            for tensor in _tensors(self.optimizer.state.get(p, {})):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield p, tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def available_bytes(device: torch.device) -> float:
    """Memory that a workload may take; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] - HEADROOM_BYTES)
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024 - HEADROOM_BYTES
    return math.inf


def lacking_memory(
    shapes: Sequence[NamedShape],
    dtype: torch.dtype,
    device: torch.device,
    gradient_sets: int,
    optimizers: int,
) -> str | None:
    """Why these tensors do not fit, or None.

    Counted: parameters, gradients, and for each optimizer alive at once two moments (of float32 in
    the worst case) and a window for a third; once more the parameters for what a step takes.
    """
    count = elements(shapes)
    need = count * (dtype.itemsize * (2 + gradient_sets) + optimizers * 4 * (2 + 2 / 3))
    free = available_bytes(device)
    if need <= free:
        return None
    return f"needs {need / 1e9:.1f} GB, {max(free, 0) / 1e9:.1f} GB are free"
