"""Window arithmetic: frequency, phase and window, as pure functions of plain numbers.

A group of frequency ``f`` updates once every ``f`` gradients. The ``f`` gradients between two
updates are its *window*; how many of them have been seen is its *phase*. A window closes when its
count *reaches* the frequency, so with a constant frequency a group updates at gradients ``f, 2f,
3f, ...``, and a frequency lowered below a running window's count closes that window with the next
gradient. These are the disjoint chunks of Nested Learning's Eq. 71 (arXiv 2512.24695); the
equation's printed index range holds one gradient too many.
"""

from __future__ import annotations

import operator
from typing import Any

WINDOWS = ("mean", "sum")

# Counters are float32 tensors, as torch's `step` is: they count exactly up to here.
MAX_FREQUENCY = 2**24


def check_frequency(value: Any, where: str = "") -> int:
    """Return ``value`` as an int, or say why it is no frequency.

    Args:
        value: a candidate: an integer >= 1 (numpy's integers count; booleans and floats do not).
        where: prefix of the error, e.g. ``"param group 1: "``.

    Raises:
        ValueError: ``value`` is not an integer in ``[1, 2**24]``.
    """
    try:
        frequency = operator.index(value)
    except TypeError:
        frequency = 0
    if isinstance(value, bool) or not 1 <= frequency <= MAX_FREQUENCY:
        raise ValueError(
            f"{where}Invalid frequency: {value!r}. It is the number of gradients per update: "
            f"an integer from 1 (update at every step) to {MAX_FREQUENCY}"
        )
    return frequency


def check_window(value: Any, where: str = "") -> str:
    """Return ``value`` if it names a window reduction, or raise a ValueError that lists them."""
    if value not in WINDOWS:
        raise ValueError(f"{where}Invalid window: {value!r}. Choose one of {', '.join(WINDOWS)}")
    return str(value)


def window_closes(count: float, frequency: int) -> bool:
    """Whether a window that holds ``count`` gradients is complete."""
    return count >= frequency


def divisor(count: float, window: str) -> float:
    """What a window's sum is divided by: its own count for ``"mean"``, 1 for ``"sum"``."""
    return count if window == "mean" else 1


def gradients_seen(updates: float, count: float, frequency: int) -> int:
    """Gradients a parameter has seen, if its frequency has always been ``frequency``."""
    return int(updates) * frequency + int(count)


def updates_expected(gradients: int, frequency: int) -> int:
    """Updates that ``gradients`` gradients make at a constant ``frequency``."""
    return gradients // frequency
