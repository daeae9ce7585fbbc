"""The suite of M3's costs: what it measures, what it refuses to measure, what it writes."""

import json

import click
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("rich")

from benchmarks import matrices as suite
from nested_optim import M3

CPU = torch.device("cpu")


def test_the_models_matrices_are_those_of_the_kernels_suite_less_token_embeddings():
    gpt2, llama = (suite.matrix_shapes(name, False) for name in ("gpt2", "llama"))
    assert (len(gpt2), len(llama)) == (49, 112)
    assert sum(a * b for a, b in gpt2) == 12 * 12 * 768**2 + 1024 * 768
    assert sum(a * b for a, b in llama) == 16 * (2 * 2048**2 + 2 * 512 * 2048 + 3 * 2048 * 8192)


def test_every_contestant_is_near_the_rule_and_a_wrong_one_is_refused(monkeypatch):
    found = suite.check(CPU)
    assert set(found) == set(suite.contestants(CPU)) - {"torch Muon"}
    assert all(error < 0.1 for error in found.values())

    class Uphill(M3):
        def _update(self, group, params, grads):
            super()._update(group, params, [-grad for grad in grads])

    wrong = {**suite.contestants(CPU), "M3": lambda p: Uphill(p, ns_dtype="bfloat16")}
    monkeypatch.setattr(suite, "contestants", lambda device: wrong)
    with pytest.raises(click.ClickException, match=r"M3 is .* of its movement away from"):
        suite.check(CPU)


def test_where_there_are_kernels_each_of_ours_runs_on_them_too(monkeypatch):
    without = list(suite.contestants(CPU))
    monkeypatch.setattr(suite.kernels, "available", lambda device: True)
    found = suite.contestants(CPU)
    assert [name for name in found if not name.endswith(", fused")] == without
    for name, build in found.items():
        if name != "torch Muon":
            group = build([torch.nn.Parameter(torch.ones(2, 2))]).param_groups[0]
            assert group["fused"] == name.endswith(", fused")
    assert len(found) == 2 * len(without) - 1


def test_works_take_turns_and_the_first_round_does_not_count():
    order = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    times = suite.in_turn(works, CPU, 0.0)
    assert order == list("ab") * 4
    assert [len(samples) for samples in times.values()] == [3, 3]
    assert all(0 <= host <= whole for samples in times.values() for host, whole in samples)


def test_the_command_writes_ratios_and_accuracies(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "check", lambda device: {"M3": 0.01})  # a test of its own does it
    arguments = ["--quick", "--device", "cpu", "--model", "gpt2", "--out", str(tmp_path)]
    result = CliRunner().invoke(suite.matrices, arguments)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "matrices-quick.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["largest_error_of_steps"] == {"M3": 0.01}
    model = json.loads(text)["models"]["gpt2"]
    assert model["matrices"] == 9
    steps = model["steps"]
    assert steps["torch Muon"]["ratio"] == 1.0
    for row in steps.values():
        assert row["ratio"] == pytest.approx(row["ms"] / steps["torch Muon"]["ms"], rel=1e-6)
    # float32 momentum; beside it slow momentum in float32 and slow update in bfloat16.
    assert steps["M3, alpha 0"]["state_bytes_per_parameter"] == pytest.approx(4, abs=0.1)
    assert steps["M3, alpha .25"]["state_bytes_per_parameter"] == pytest.approx(10, abs=0.1)
    assert model["forms"]["bmm"]["times_faster"] == 1.0
    for kinds in model["accuracy"].values():
        for row in kinds["gaussian"].values():
            assert (
                row["error"] < 0.05 and 0 <= row["least"] <= row["median"] <= row["largest"] < 1.5
            )
    assert "Newton-Schulz alone" in result.output


def test_small_matrices_have_a_file_of_their_own(tmp_path, monkeypatch):
    """What is measured of them is in the test before."""
    found = []
    monkeypatch.setattr(suite, "check", lambda device: {})
    monkeypatch.setattr(suite, "spectra", lambda size, device: {})
    for name in ("measure_forms", "measure_steps"):
        monkeypatch.setattr(suite, name, lambda shapes, *_: found.append(shapes) or {})
    monkeypatch.setattr(suite, "tables", lambda models: [])
    arguments = ["--small", "--seconds", "0", "--device", "cpu", "--model", "gpt2"]
    result = CliRunner().invoke(suite.matrices, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    [written] = tmp_path.iterdir()
    assert written.name.startswith("matrices-") and written.name.endswith("-small.json")
    assert json.loads(written.read_text())["models"]["gpt2"]["matrices"] == 9
    assert found == 2 * [suite.matrix_shapes("gpt2", True)]


def test_a_device_that_is_not_there_is_refused():
    result = CliRunner().invoke(suite.matrices, ["--device", "tpu"])
    assert result.exit_code == 2 and "is no device" in result.output
