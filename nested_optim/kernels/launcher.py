"""Launches of a kernel without Triton's look at every argument, which takes longer than they do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import triton

# Before 3.3 a compiled kernel is not given the constants that it was compiled for.
_CONSTANTS_ARE_GIVEN = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


def repeatable(compiled: Any) -> bool:
    """Whether what a launch returned can be launched again with all arguments, constants too."""
    return _CONSTANTS_ARE_GIVEN and hasattr(compiled, "run")  # the interpreter returns None


class Launcher:
    """A kernel, and what it has been compiled to for each kind of arguments.

    Args:
        kernel: of ``triton.jit``.
        options: of all launches, such as ``num_warps``.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self._kernel, self._options = kernel, options
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self, kind: Hashable, grid: tuple[int, int, int], args: Sequence[Any], **options: Any
    ) -> None:
        """Launch with all of the kernel's arguments, in its order.

        Args:
            kind: whatever the kernel is compiled for: device, dtypes, constants, options, and of
                numbers and addresses which are 1 or multiples of 16.
            grid: three numbers.
            args: numbers of one type at every launch.
        """
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[grid](*args)
            return
        compiled = self._kernel[grid](*args, **self._options, **options)
        if repeatable(compiled):
            self._compiled[kind] = compiled
