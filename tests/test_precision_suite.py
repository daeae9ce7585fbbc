"""The precision suite: what it measures, and what it writes."""

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("sklearn")

from benchmarks.precision import LRS, METHODS, precision, run


def test_small_updates_move_bfloat16_weights_only_with_kahan_sums():
    moved = {key: run(METHODS[key], 1e-5, seed=0, steps=20)["moved"] for key in METHODS}
    assert moved["float32"] > 99
    assert moved["plain"] < 10
    assert moved["kahan"] > 2 * moved["plain"]


def test_the_command_writes_every_run_and_a_picture(tmp_path):
    arguments = ["--seeds", "2", "--steps", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(precision, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads((tmp_path / "precision.json").read_text())
    for key in METHODS:
        for lr in LRS:
            loss = document["results"][key][f"{lr:g}"]["loss"]
            assert len(loss["values"]) == 2
            assert loss["sd"] > 0
    assert (tmp_path / "precision.png").stat().st_size > 10_000
