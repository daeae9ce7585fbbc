"""Averages of a model's buffers (BatchNorm's statistics) beside a weight memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
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

    They are no parameters and have no state, so they lie in the optimizer's first group. Their
    settings are those of the first group that has a memory.
    """

    def __init__(self, model: nn.Module | None, optimizer: Optimizer) -> None:
        self.model, self.settings = model, Settings((), (), ())
        self._optimizer = optimizer

    def follow(self, groups: Iterable[Settings]) -> None:
        """Go by the settings of the groups."""
        self.settings = _first(groups)

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
        """Begin at the live buffers where there are no averages; keep no more than are needed."""
        group, levels = self._optimizer.param_groups[0], self.settings.levels
        if not (buffers := self.live()):
            return
        known = 0 if self.rows is None else len(self.rows)
        if not levels:
            group.pop(BUFFERS, None)
        elif known != levels:
            kept = () if self.rows is None else self.rows[:levels]
            begun = flat(buffers).expand(max(0, levels - known), -1)
            group[BUFFERS] = torch.cat([*(row[None] for row in kept), begun])

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
        buffers, rows, levels = self.live(), self.rows, self.settings.levels
        if not buffers or rows is None or not levels or len(rows) < levels:
            return []
        mixed = mix([flat(buffers), *rows[:levels]], mixture(level, levels, "the buffers"))
        parts = mixed.split([b.numel() for b in buffers])
        return [(b, part.view_as(b)) for b, part in zip(buffers, parts)]

    def named(self, level: Any) -> OrderedDict[str, Tensor]:
        """What the buffers are in a read-out, by their names."""
        assert self.model is not None
        shares = mixture(level, self.settings.levels, "the buffers")
        read = dict(zip(map(id, self.live()), self.read(shares)))
        named = self.model.named_buffers()
        return OrderedDict(
            (name, (read[id(b)][1] if id(b) in read else b).clone().to(b.dtype))
            for name, b in named
            if b.is_floating_point()
        )

    def check(self, rows: Tensor | None, groups: Iterable[Settings]) -> None:
        """Refuse averages of a checkpoint, with its groups' settings, if they are of others."""
        if rows is None or not (buffers := self.live()):
            return
        wanted = (_first(groups).levels, sum(b.numel() for b in buffers))
        if tuple(rows.shape) != wanted:
            raise ValueError(
                f"checkpoint's averages of buffers have shape {tuple(rows.shape)}, where "
                f"this model and these frequencies need {wanted}"
            )

    def settle(self, loaded: bool) -> None:
        """Bring what a checkpoint held to the buffers' device and dtype; forget what it did not."""
        if not loaded and self.model is not None:
            self._optimizer.param_groups[0].pop(BUFFERS, None)
        if (rows := self.rows) is not None and (buffers := self.live()):
            rows = rows.to(device=buffers[0].device, dtype=flat(buffers).dtype)
            self._optimizer.param_groups[0][BUFFERS] = rows


def _first(groups: Iterable[Settings]) -> Settings:
    return next((settings for settings in groups if settings.levels), Settings((), (), ()))
