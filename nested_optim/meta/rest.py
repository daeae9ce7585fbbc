"""When nothing has been learned and nothing will be: updates are then NestedOptimizer's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import learned
from .options import SLOW_KEYS

#: What learned updates leave for later ones.
_LEFT = ("previous_grad", "update_trace", *SLOW_KEYS)


class Rest:
    """Belongs to one optimizer, and holds nothing that a checkpoint needs."""

    def __init__(self) -> None:
        # Of each module: the weights that were compared, their version then, and what came out.
        self._known: dict[str, tuple[Tensor, int, bool]] = {}
        self._settled = False

    def holds(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether ``meta_lr`` is 0 and all learned weights are those of the start.

        Weights that have been written to are compared, for which a device is waited for.
        """
        first = groups[0]
        if not first["normalize"] or any(group["meta_lr"] != 0 for group in groups):
            return False
        return all(self._at_start(first, module) for module in learned.modules(first))

    def _at_start(self, first: Mapping[str, Any], module: str) -> bool:
        flat = first[f"{module}_weights"]
        if flat is None:
            return True
        known = self._known.get(module)
        if known is None or known[0] is not flat or known[1] != flat._version:
            start = learned.start(first, module, flat)
            known = self._known[module] = flat, flat._version, torch.equal(flat, start)
        return known[2]

    def settle(self, state: Mapping[Tensor, dict[str, Any]], resting: bool) -> None:
        """Before updates that leave nothing behind, forget what earlier ones did."""
        if resting and not self._settled:
            for entries in state.values():
                for key in entries.keys() & _LEFT:
                    entries[key] = torch.zeros_like(entries[key])
        self._settled = resting
