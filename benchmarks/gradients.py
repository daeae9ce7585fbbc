"""A batch's gradient, on CUDA by replay of a captured graph: what small models are trained with.

Forward and backward pass of a small model are hundreds of kernels of a few microseconds each, and
a GPU would mostly wait for the host to launch them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Gradients:
    """Puts a batch's gradient into ``.grad``; on CUDA by a captured graph for full batches.

    Args:
        model: whose parameters; its buffers (statistics of batches) see each batch once.
        loss: of a batch, given as one tensor, whose first dimension counts samples. On CUDA it
            must not wait for the device, nor keep casts of weights from one call to the next.
        full: samples of a batch that is captured; batches of any other size are not.
        device: the model's.
        adds: whether batches add up until :meth:`clear`; otherwise each one's gradient takes the
            place of the one before.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor], Tensor],
        full: int,
        device: torch.device,
        adds: bool = True,
    ) -> None:
        self.loss, self.full, self.device, self.adds = loss, full, device, adds
        self.model, self.params = model, list(model.parameters())
        self.captures = device.type == "cuda"
        self.replay: Callable[[], None] | None = None
        self.grads: list[Tensor] = []  # what a graph writes to

    def add(self, batch: Tensor) -> Tensor:
        """Returns the loss, in a tensor that the next batch may write over."""
        if not self.captures or len(batch) != self.full:
            if not self.adds:
                self.clear()
            return self._pass(batch)
        if self.replay is None:
            self._capture(batch)
        self.static.copy_(batch)
        self.replay()  # type: ignore[misc]
        return self.found

    def clear(self) -> None:
        if self.captures and (self.adds or self.grads):
            torch._foreach_zero_([p.grad for p in self.params if p.grad is not None])
        else:
            self._forget()

    def _forget(self) -> None:
        for p in self.params:
            p.grad = None

    def _pass(self, batch: Tensor) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def _capture(self, batch: Tensor) -> None:
        self.static = batch.clone()
        changed = list(self.model.buffers())
        if self.adds:
            for p in self.params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            changed += [p.grad for p in self.params]
        else:
            self._forget()
        saved = [tensor.clone() for tensor in changed]
        warm_up(lambda: self._pass(self.static), self.device)
        if not self.adds:
            # Where there is none, backward makes a gradient instead of adding to it: in a graph the
            # same tensor at every replay, which is neither cleared nor added to.
            self._forget()
        self.replay, self.found = capture(lambda: self._pass(self.static), self.device)
        self.grads = [p.grad for p in self.params if p.grad is not None]
        for tensor, value in zip(changed, saved):  # as if there had been no warming up
            tensor.copy_(value)


def warm_up(work: Callable[[], Any], device: torch.device) -> None:
    """What libraries do at a first call only, and must not do in a graph; on a stream aside."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)


def capture(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """What repeats ``work`` on the same memory, and the tensor that it returns."""
    graph = torch.cuda.CUDAGraph()
    # On a stream of its own: libraries keep a workspace per stream, and graphs that were captured
    # on the same one would share it when they are replayed side by side.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        found = work()
    return graph.replay, found
