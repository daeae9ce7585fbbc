"""What all suites write alike: JSON that can be read and compared, and figures of one style."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

#: For ``matplotlib.rc_context``.
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def write_json(results: dict[str, Any], path: Path, digits: int = 9) -> None:
    """Write numbers with so many significant digits; nine hold a float32 exactly."""
    text = json.dumps(_plain(results, digits), indent=1, ensure_ascii=False, allow_nan=False)
    # Innermost lists on one line.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text)
    path.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any, digits: int) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, digits) for item in value]
    if isinstance(value, float):  # JSON has no infinity
        return float(f"{value:.{digits}g}") if math.isfinite(value) else str(value)
    return value
