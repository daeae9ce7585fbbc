"""What a learned update is doing, in numbers for people and loggers."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ..rules.deep_nested import Inputs
from ..tensors import whole
from .features import norm
from .networks import wide_dtype
from .options import SLOW_KEYS


class Report:
    """The part of ``DeepNestedOptimizer`` that tells what it does. It changes nothing."""

    param_groups: list[dict[str, Any]]
    state: Any
    _inputs: dict[int, Inputs]  # of each group's last update
    #: Of the last meta update, 0-d; None before one, and where the loss was not told.
    last_meta_loss: Tensor | None
    #: Of the last meta update, 0-d; 0 before one.
    controller_grad_norm: Tensor

    def group_names(self) -> list[str]:
        """A name for each group: its own, or ``group<i>``."""
        names: list[str] = []
        for i, group in enumerate(self.param_groups):
            own = name = str(group.get("name", f"group{i}"))
            suffix = i
            while name in names:
                name, suffix = f"{own}_{suffix}", suffix + 1
            names.append(name)
        return names

    def get_lr_multipliers(self) -> Tensor:
        """``(groups,)``: what each group's learning rate was multiplied by in its last update.

        1 for a group without an update in this process, and where ``learn_lr`` is off.
        """
        home = self._home
        found = []
        for i in range(len(self.param_groups)):
            inputs = self._inputs.get(i)
            row = None if inputs is None else inputs.multiplier
            found.append(torch.ones((), device=home) if row is None else row[0].float())
        return torch.stack(found)

    def get_effective_lrs(self) -> list[float]:
        """Each group's learning rate times its multiplier."""
        found = self._read({"multipliers": self.get_lr_multipliers(), "lrs": self._lrs()})
        return [lr * m for lr, m in zip(found["lrs"], found["multipliers"])]

    def get_momentum_stats(self) -> dict[str, float]:
        """What the momenta are like, in numbers; reading it waits for the device.

        ``momentum_total_norm`` and ``momentum_avg_norm`` are sum and mean of the tensors' norms of
        all momenta; ``scale``, ``shift`` and ``damping`` means over the tensors of the last update,
        and ``mixing0``, ``mixing1``, ... the weights of the momenta. What is off is left out.
        """
        wanted = {"norms": self._momentum_norms()}
        for key in ("scale", "shift", "damping"):
            rows = [getattr(inputs, key) for inputs in self._inputs.values()]
            rows = [row for row in rows if row is not None]
            if rows:
                wanted[key] = torch.cat(rows).mean().reshape(1)
        mixing = next((inputs.mixing for inputs in self._inputs.values()), None)
        if mixing is not None:
            wanted["mixing"] = mixing
        read = self._read(wanted)
        total, count = sum(read.pop("norms")), len(wanted["norms"])
        weights = read.pop("mixing", [])
        return {
            "momentum_total_norm": total,
            "momentum_avg_norm": total / max(1, count),
            **{key: value for key, (value,) in read.items()},
            **{f"mixing{i}": weight for i, weight in enumerate(weights)},
        }

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger; reading them waits for the device, once.

        ``lr_multiplier/<group>`` and ``effective_lr/<group>``; ``momentum_avg_norm``;
        ``saturated``, the share of groups whose multiplier is near a bound (in its logarithm,
        beyond 95 % of the way); ``controller_grad_norm``, 0 before a meta update; and after one
        ``meta_loss``, where the loss was told or measured.
        """
        wanted = {
            "multipliers": self.get_lr_multipliers(),
            "lrs": self._lrs(),
            "norms": self._momentum_norms(),
            "controller_grad_norm": self.controller_grad_norm.reshape(1),
        }
        if self.last_meta_loss is not None:
            wanted["meta_loss"] = self.last_meta_loss.reshape(1)
        read = self._read(wanted)
        multipliers, lrs, norms = (read.pop(key) for key in ("multipliers", "lrs", "norms"))
        names = self.group_names()
        found = {f"lr_multiplier/{n}": m for n, m in zip(names, multipliers)}
        found.update((f"effective_lr/{n}", lr * m) for n, lr, m in zip(names, lrs, multipliers))
        found["momentum_avg_norm"] = sum(norms) / max(1, len(norms))
        found["saturated"] = sum(map(self._saturated, multipliers)) / len(multipliers)
        found.update((key, value) for key, (value,) in read.items())
        return found

    def _saturated(self, multiplier: float) -> bool:
        first = self.param_groups[0]
        bound = math.log(first["min_lr_mult" if multiplier < 1 else "max_lr_mult"])
        return math.log(multiplier) / bound > 0.95

    @property
    def _home(self) -> torch.device:
        home: torch.device = self.param_groups[0]["params"][0].device
        return home

    def _lrs(self) -> Tensor:
        lrs = [group["lr"] for group in self.param_groups]
        if any(isinstance(lr, Tensor) for lr in lrs):
            wide = wide_dtype(self._home)
            return torch.stack([torch.as_tensor(lr).to(self._home, wide).reshape(()) for lr in lrs])
        return torch.tensor(lrs, dtype=torch.float64)

    def _momentum_norms(self) -> Tensor:
        """Of every momentum of every tensor."""
        keys = ("exp_avg", *SLOW_KEYS)
        found = [whole(norm(s[k])) for s in self.state.values() for k in keys if k in s]
        norms = [one.to(self._home) for one in found]
        return torch.stack(norms) if norms else torch.zeros(0)

    def _read(self, wanted: dict[str, Tensor]) -> dict[str, list[float]]:
        """Vectors as numbers; a device is waited for once."""
        wide = wide_dtype(self._home)
        flat = [
            vector.detach().to(self._home, wide, non_blocking=True) for vector in wanted.values()
        ]
        numbers = iter(torch.cat(flat).tolist())
        return {key: [next(numbers) for _ in range(len(vector))] for key, vector in wanted.items()}


def as_loss(loss: Any) -> Tensor:
    """A told loss as a 0-d tensor, without waiting for a device."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return loss.detach().reshape(())
    if isinstance(loss, numbers.Real) and not isinstance(loss, bool):
        return torch.tensor(float(loss), dtype=torch.float64)
    raise TypeError(
        f"step() takes a closure, or this step's loss as a number or a tensor of one element, but "
        f"got {loss!r}"
    )
