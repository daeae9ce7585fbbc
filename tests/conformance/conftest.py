from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A warning that torch's optimizers do not give is a failure here."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error"))
            # torch's own reminder, when a capturable optimizer steps outside a CUDA graph.
            item.add_marker(pytest.mark.filterwarnings("ignore:This instance was constructed"))
