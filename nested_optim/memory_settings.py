"""A weight memory's settings in an optimizer's groups."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from .exchanges import Settings, check_settings
from .memory_levels import MEMORY_OPTIONS, dtype_name, group_label


class GroupSettings:
    """Each group's own options come before the defaults; what is found is written to the groups.

    Args:
        defaults: of each of ``MEMORY_OPTIONS``, checked.
    """

    def __init__(self, optimizer: Optimizer, defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self._optimizer = optimizer
        self._checked: dict[tuple[Any, ...], Settings] = {}
        self._given: list[set[str]] = []  # options that each group had of its own

    def of(self, at: int, group: dict[str, Any]) -> Settings:
        """A group's settings in canonical form, checked; changes nothing."""
        raw = tuple(group.get(key, default) for key, default in self.defaults.items())
        try:
            if raw in self._checked:
                return self._checked[raw]
        except TypeError:  # lists are not hashable
            pass
        where = f"{group_label(at, group)}: "
        frequencies, write, pull, dtype = raw
        settings = check_settings(frequencies, write, pull, where)
        if dtype is not None:
            dtype_name(dtype, where)
        self._checked[(*settings, dtype)] = settings
        return settings

    def all(self) -> list[tuple[dict[str, Any], Settings]]:
        """The groups with their settings."""
        return [(group, self.of(i, group)) for i, group in enumerate(self._optimizer.param_groups)]

    def raw(self) -> list[list[Any]]:
        """The options as they stand in the groups."""
        return [
            [group.get(key) for key in MEMORY_OPTIONS] for group in self._optimizer.param_groups
        ]

    def write(self, groups: list[tuple[dict[str, Any], Settings]]) -> None:
        """Put the settings in the groups, all of them in canonical form."""
        for group, _ in groups[len(self._given) :]:
            self._given.append(set(group) & set(MEMORY_OPTIONS))
        for group, settings in groups:
            group["memory_frequencies"] = settings.frequencies
            if settings.levels:  # the rates of a group that is switched off are kept for later
                group["memory_write"], group["memory_pull"] = settings.write, settings.pull
            for key, default in self.defaults.items():
                group.setdefault(key, default)
            if group["memory_dtype"] is not None:
                group["memory_dtype"] = dtype_name(group["memory_dtype"])

    def remove(self) -> None:
        """Take from the groups what they did not have of their own."""
        for at, group in enumerate(self._optimizer.param_groups):
            given = self._given[at] if at < len(self._given) else set(group)
            for key in set(MEMORY_OPTIONS) - given:
                group.pop(key, None)
