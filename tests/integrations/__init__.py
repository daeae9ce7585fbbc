"""Tests of ``nested_optim.integrations`` against the real trainers.

An installed package has the integrations inside it. From a bare checkout they lie beside it, and
are put in their place here, for the processes of distributed tests too.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("nested_optim.integrations") is None:
    folder = Path(__file__).parents[2] / "integrations"
    spec = importlib.util.spec_from_file_location(
        "nested_optim.integrations",
        folder / "__init__.py",
        submodule_search_locations=[str(folder)],
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
