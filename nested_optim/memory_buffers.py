"""Averages of a model's buffers (BatchNorm's statistics) beside a weight memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .exchanges import Settings
from .memory_levels import flat, mix, mixture

#: In the first group: one tensor of shape (levels, elements of all buffers).
BUFFERS = "memory_buffers"


class BufferAverages:
    """A level's buffers are written by the faster level's, but nothing is pulled.

    They are no parameters and have no state, so they lie in the optimizer's first group.
    """

    def __init__(self, model: nn.Module | None, optimizer: Optimizer, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self._optimizer = optimizer

    def live(self) -> list[Tensor]:
        """The buffers that are averaged."""
        if self.model is None:
            return []
        return [b for b in self.model.buffers() if b.is_floating_point()]

    @property
    def rows(self) -> Tensor | None:
        """The averages, a row per slow level."""
        return self._optimizer.param_groups[0].get(BUFFERS)

    def make(self) -> None:
        """Begin at the live buffers, if there are no averages."""
        group = self._optimizer.param_groups[0]
        if (buffers := self.live()) and BUFFERS not in group:
            group[BUFFERS] = flat(buffers).expand(self.settings.levels, -1).clone()

    def exchange(self, count: int) -> None:
        """The writes that are due after step ``count``."""
        for k, (frequency, write) in enumerate(zip(*self.settings[:2])):
            if count % frequency == 0:
                self._write(k, write)

    def exchange_on_device(self, count: Tensor, happened: Tensor | None) -> None:
        """The same where the host must not look at the count, nor whether the step happened."""
        if self.model is None:
            return
        for k, (frequency, write) in enumerate(zip(*self.settings[:2])):
            due = count % frequency == 0
            self._write(k, write, due if happened is None else due & happened)

    def _write(self, level: int, write: float, gate: Tensor | None = None) -> None:
        if (buffers := self.live()) and (rows := self.rows) is not None:
            faster = flat(buffers) if level == 0 else rows[level - 1]
            new = rows[level].lerp(faster, write)
            if gate is not None:
                new = torch.where(gate.to(new.device), new, rows[level])
            rows[level].copy_(new)

    def read(self, level: Any) -> list[tuple[Tensor, Tensor]]:
        """The buffers, each with what it is in a read-out."""
        buffers, rows = self.live(), self.rows
        if not buffers or rows is None:
            return []
        mixed = mix([flat(buffers), *rows], mixture(level, self.settings.levels, "the buffers"))
        parts = mixed.split([b.numel() for b in buffers])
        return [(b, part.view_as(b)) for b, part in zip(buffers, parts)]

    def check(self, rows: Tensor | None) -> None:
        """Refuse averages of a checkpoint that are not of these buffers."""
        if rows is None or not (buffers := self.live()):
            return
        wanted = (self.settings.levels, sum(b.numel() for b in buffers))
        if tuple(rows.shape) != wanted:
            raise ValueError(
                f"checkpoint's averages of buffers have shape {tuple(rows.shape)}, where "
                f"this model and these frequencies need {wanted}"
            )

    def settle(self) -> None:
        """Bring what a checkpoint held to the buffers' device and dtype."""
        if (rows := self.rows) is not None and (buffers := self.live()):
            rows = rows.to(device=buffers[0].device, dtype=flat(buffers).dtype)
            self._optimizer.param_groups[0][BUFFERS] = rows
