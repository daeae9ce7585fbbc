"""``python -m benchmarks training meta``: its rival's arithmetic, and the command as a whole."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from torch.nn import Parameter

from benchmarks.training import meta
from benchmarks.training.cli import training


def test_the_hypergradient_rival_turns_its_rate_by_the_angle():
    p = Parameter(torch.tensor([1.0, 0.0]))
    learner = meta.Hypergradient([p], lr=0.1, rate=0.5)
    p.grad = torch.tensor([1.0, 0.0])
    learner.step(torch.tensor(0.0))
    assert learner.multipliers(0.1) == [1.0]  # nothing to compare with yet
    moved = p.detach() - torch.tensor([1.0, 0.0])
    assert moved[0] == pytest.approx(-0.1, rel=1e-4) and moved[1] == 0
    p.grad = torch.tensor([3.0, 4.0])  # at cos = 0.6 to what the update went down
    learner.step(torch.tensor(0.0))
    assert learner.multipliers(0.1)[0] == pytest.approx(1 + 0.5 * 0.6, rel=1e-5)


def test_a_rival_whose_gradient_turns_back_slows_down():
    p = Parameter(torch.tensor([1.0]))
    learner = meta.Hypergradient([p], lr=0.1, rate=0.25)
    for grad in (1.0, -2.0):
        p.grad = torch.tensor([grad])
        learner.step(torch.tensor(0.0))
    assert learner.multipliers(0.1)[0] == pytest.approx(0.75, rel=1e-5)


def test_runs_depend_on_seed_and_rate_alone():
    method = meta.METHODS["deep_default"]
    one, two = (meta.run(method, {}, 1e-3, 0, 6) for _ in range(2))
    assert (one["loss"], one["multipliers"]) == (two["loss"], two["multipliers"])
    assert meta.run(method, {}, 1e-3, 1, 6)["loss"] != one["loss"]


def test_the_command_writes_what_it_measured(tmp_path):
    result = CliRunner().invoke(training, ["meta", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "training-meta-quick.json").read_text())["results"]
    assert (tmp_path / "training-meta-quick.png").stat().st_size > 1000
    assert set(found["rows"]) == {"adamw", "deep_default"}
    by_factor = found["rows"]["adamw"]["by_factor"]
    assert by_factor["1"]["of_tuned_adamw"] == pytest.approx(1.0)
    assert found["lr"] == min(map(float, found["by_lr"]), key=lambda lr: found["by_lr"][f"{lr:g}"])
    for row in found["rows"].values():
        assert set(row["by_factor"]) == {"0.1", "1", "10"}
        for entry in row["by_factor"].values():
            mean = math.exp(sum(map(math.log, entry["losses"])) / len(entry["losses"]))
            assert entry["loss"] == pytest.approx(mean, rel=1e-4)
    # The learned rule's multipliers were recorded, and they start at 1.
    assert found["rows"]["deep_default"]["by_factor"]["1"]["multipliers"][0] == pytest.approx(
        [1.0] * 3, rel=1e-3
    )
