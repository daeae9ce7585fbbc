"""The suite of a weight memory's cost: what it checks, measures and writes."""

import json

import click
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("rich")

from benchmarks import memory as suite
from nested_optim.weight_memory import memory_of

CPU = torch.device("cpu")


def test_a_memory_near_float64_passes_and_a_wrong_one_is_refused(monkeypatch):
    assert suite.check(CPU) < 1e-5
    rough = suite._with(suite._adamw)
    monkeypatch.setattr(suite, "_with", lambda build: lambda ps: _shaken(rough, ps))
    with pytest.raises(click.ClickException, match="away from float64"):
        suite.check(CPU)


def _shaken(build, params):
    optimizer = build(params)
    if params[0].dtype == torch.float32:
        optimizer.register_step_post_hook(
            lambda *_: [memory_of(optimizer).weights(1)[0].add_(1e-3)]
        )
    return optimizer


def test_the_command_writes_what_each_contestant_adds(tmp_path):
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    result = CliRunner().invoke(suite.memory, arguments)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "memory-quick.json").read_text()
    assert str(tmp_path) not in text
    steps = json.loads(text)["models"]["gpt2"]["steps"]
    assert set(steps) == set(suite.CONTESTANTS)
    for name, row in steps.items():
        base = steps[suite.CONTESTANTS[name][0]]["ms"]
        assert row["share_added"] == pytest.approx(row["ms"] / base - 1, abs=1e-6)
        kept = 8 * any(
            word in name for word in ("memory", "copies", "device", "apart", "without gradients")
        )
        kept = 4 if "bfloat16" in name else kept
        assert row["memory_bytes_per_parameter"] == pytest.approx(kept, rel=0.05)
