"""What a learned update is doing, in numbers for people and loggers."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from ..rules.deep_nested import Inputs
from .features import norm
from .options import SLOW_KEYS


class Report:
    """The part of ``DeepNestedOptimizer`` that tells what it does. It changes nothing."""

    param_groups: list[dict[str, Any]]
    state: Any
    _inputs: dict[int, Inputs]  # of each group's last update
    #: Of the last meta update, 0-d tensors; None before one.
    last_meta_loss: Tensor | None
    controller_grad_norm: Tensor | None

    def group_names(self) -> list[str]:
        """A name for each group: its own, or ``group<i>``."""
        names: list[str] = []
        for i, group in enumerate(self.param_groups):
            name = str(group.get("name", f"group{i}"))
            names.append(name if name not in names else f"{name}_{i}")
        return names

    def get_lr_multipliers(self) -> Tensor:
        """``(groups,)``: what each group's learning rate was multiplied by in its last update.

        1 for a group without an update in this process, and where ``learn_lr`` is off.
        """
        home = self.param_groups[0]["params"][0].device
        found = []
        for i in range(len(self.param_groups)):
            inputs = self._inputs.get(i)
            row = None if inputs is None else inputs.multiplier
            found.append(torch.ones((), device=home) if row is None else row[0].float())
        return torch.stack(found)

    def get_effective_lrs(self) -> list[float]:
        """Each group's learning rate times its multiplier."""
        multipliers = self.get_lr_multipliers().tolist()
        return [float(g["lr"]) * m for g, m in zip(self.param_groups, multipliers)]

    def get_momentum_stats(self) -> dict[str, float]:
        """What the momenta are like, in numbers; reading it waits for the device.

        ``momentum_total_norm`` and ``momentum_avg_norm`` are sum and mean of the tensors' norms of
        all momenta; ``scale``, ``shift`` and ``damping`` means over the tensors of the last update,
        and ``mixing0``, ``mixing1``, ... the weights of the momenta. What is off is left out.
        """
        keys = ("exp_avg", *SLOW_KEYS)
        norms = [float(norm(s[k])) for s in self.state.values() for k in keys if k in s]
        found = {"momentum_total_norm": sum(norms)}
        found["momentum_avg_norm"] = sum(norms) / max(1, len(norms))
        for key in ("scale", "shift", "damping"):
            rows = [getattr(inputs, key) for inputs in self._inputs.values()]
            rows = [row for row in rows if row is not None]
            if rows:
                found[key] = float(torch.cat(rows).mean())
        mixing = next((inputs.mixing for inputs in self._inputs.values()), None)
        if mixing is not None:
            found.update((f"mixing{i}", float(w)) for i, w in enumerate(mixing))
        return found

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger; reading them waits for the device.

        ``lr_multiplier/<group>`` and ``effective_lr/<group>``; ``momentum_avg_norm``;
        ``saturated``, the share of groups whose multiplier is near a bound (in its logarithm,
        beyond 95 % of the way); and after a meta update ``controller_grad_norm`` and, where the
        loss was told or measured, ``meta_loss``.
        """
        names = self.group_names()
        multipliers = self.get_lr_multipliers()
        first = self.param_groups[0]
        bounds = torch.tensor([first["min_lr_mult"], first["max_lr_mult"]]).log()
        logs = multipliers.cpu().log()
        far = (logs / torch.where(logs < 0, bounds[0], bounds[1])) > 0.95
        found = {f"lr_multiplier/{n}": m for n, m in zip(names, multipliers.tolist())}
        found.update((f"effective_lr/{n}", lr) for n, lr in zip(names, self.get_effective_lrs()))
        found["momentum_avg_norm"] = self.get_momentum_stats()["momentum_avg_norm"]
        found["saturated"] = float(far.float().mean())
        for key, value in (
            ("meta_loss", self.last_meta_loss),
            ("controller_grad_norm", self.controller_grad_norm),
        ):
            if value is not None:
                found[key] = float(value)
        return found


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
