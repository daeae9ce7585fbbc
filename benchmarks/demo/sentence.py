"""The one sentence at the end, written by the numbers."""

from __future__ import annotations

from typing import Any

from . import methods
from .analysis import CONFIDENCE, LESS_LEARNING, OURS

# Fewer old digits than this, in any method, and none is said to keep them.
NOTHING_KEPT = 0.05


def conclude(results: dict[str, Any]) -> str:
    """What the demo shows, whatever that is."""
    parts = [
        _replacement(results["identity"]),
        _retention(results["equal_learning"]),
        _task_unknown(results["by_lr_rule"]),
        _time(results["timing"]),
    ]
    return "; ".join(parts) + "."


def _replacement(identity: dict[str, Any]) -> str:
    exact = "bit for bit" if identity["bit_identical"] else "but not exactly"
    return f"One line replaces AdamW {exact} over {identity['steps']} steps"


def _retention(equal: dict[str, Any]) -> str:
    said = (
        "at equal learning accuracy and with the task known, near the most that both learn, three "
        f"levels of windows {_compared(equal['near_most_learned'])}"
    )
    less = [each for each in equal["less_learned"] if each["verdict"] != "unknown"]
    if less:
        said += f"; at {LESS_LEARNING:.0%} learned they {_compared(less)}"
    return f"{said} ({CONFIDENCE:.0%} confidence)"


def _compared(comparisons: list[dict[str, Any]]) -> str:
    found: dict[str, list[str]] = {"more": [], "less": [], "equal": [], "unknown": []}
    for comparison in comparisons:
        name = methods.BY_KEY[comparison["control"]].name
        if comparison["verdict"] != "unknown":
            gap, error = comparison["gap"] * 100, comparison["standard_error"] * 100
            name += f" ({gap:+.1f} ± {error:.1f} points)"
        found[comparison["verdict"]].append(name)
    wording = {
        "more": "keep more of the old digits than {}",
        "less": "keep less of the old digits than {}",
        "equal": "cannot be told from {}",
        "unknown": "cannot be compared with {}",
    }
    return _listed([wording[key].format(_listed(names)) for key, names in found.items() if names])


def _task_unknown(by_lr_rule: dict[str, Any]) -> str:
    """The most that any method keeps with the task unknown, at the lrs that the rules chose."""
    kept = [
        (row["unknown"]["old_digits"]["mean"], methods.BY_KEY[key].name)
        for rule in by_lr_rule.values()
        for key, row in rule["methods"].items()
    ]
    most, name = max(kept)
    if most < NOTHING_KEPT:
        return f"with the task unknown every method forgets them (at most {most:.1%} kept)"
    return f"with the task unknown at most {most:.1%} of them are kept (by {name})"


def _time(timing: dict[str, Any]) -> str:
    return (
        f"a step takes {timing['nested']['ratio_to_adamw']:.2f} times AdamW's time at frequency 1, "
        f"{timing[OURS]['ratio_to_adamw']:.2f} times with three levels"
    )


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
