"""The behaviour-cloning example learns, with the optimizers of its configurations, and logs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("tensorboard")
pytest.importorskip("nested_optim.integrations.config")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example() -> Any:
    path = EXAMPLES / "behaviour_cloning.py"
    spec = importlib.util.spec_from_file_location("behaviour_cloning", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _run(example: Any, kind: str, folder: Path, epochs: int = 5) -> tuple[dict[str, float], Any]:
    name = f"behaviour_cloning_{kind}"
    config = str(EXAMPLES / f"{name}.yaml")
    arguments = [config, "--logdir", str(folder), "--quiet", "--epochs", str(epochs)]
    found = example.main(arguments)
    events = EventAccumulator(str(folder / name))
    events.Reload()
    return found, {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("kind, groups", [("adam", ["default"]), ("nested", ["encoder", "head"])])
def test_the_clone_balances_the_pole(
    example: Any, kind: str, groups: list[str], tmp_path: Path
) -> None:
    found, scalars = _run(example, kind, tmp_path)
    assert found["expert"] == 500
    assert found["before"] < 50 and found["after"] > 150
    assert found["after"] == pytest.approx([e.value for e in scalars["return"]][1], rel=1e-6)
    losses = [event.value for event in scalars["loss/held_out"]]
    assert len(losses) == 5 and losses[-1] < 0.8 * losses[0]
    for group in groups:
        rates = [event.value for event in scalars[f"lr/{group}"]]
        assert max(rates) < 3e-3 and rates == sorted(rates, reverse=True)  # the schedule is kept


def test_what_is_learned_about_learning_is_logged(example: Any, tmp_path: Path) -> None:
    found, scalars = _run(example, "deep_nested", tmp_path)
    assert found["after"] > 150
    for name in (
        "lr_multiplier_encoder",
        "lr_multiplier_head",
        "meta_loss",
        "controller_grad_norm",
        "momentum_avg_norm",
    ):
        assert len({event.value for event in scalars[f"nested/{name}"]}) > 1, name


def test_unknown_settings_are_errors(example: Any) -> None:
    with pytest.raises(ValueError, match="epoch"):
        example.Settings.model_validate({"optimizer": {}, "epoch": 3})
