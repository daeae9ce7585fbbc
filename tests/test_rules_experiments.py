"""The orthogonal tasks and the costs of the rules suite."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks.rules import cost, orthogonal
from benchmarks.rules.cli import RESULTS, rules

SMALL = orthogonal.Problem(tasks=3, width=4, steps=30, batch=8)


def test_the_subspaces_are_orthogonal_and_fill_the_space():
    bases, truth = orthogonal.make_tasks(SMALL, torch.Generator().manual_seed(0))
    rows = bases.flatten(0, 1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(12), rtol=0, atol=1e-5)
    assert truth.shape == (orthogonal.OUTPUTS, 12)


def test_losses_are_shares_of_the_targets_variance():
    bases, truth = orthogonal.make_tasks(SMALL, torch.Generator().manual_seed(0))
    model = orthogonal.make_model("sgd", 12)
    torch.testing.assert_close(orthogonal.losses(model, bases, truth), torch.ones(3))
    with torch.no_grad():
        model.weight.copy_(truth)
    assert orthogonal.losses(model, bases, truth).max() < 1e-10
    with torch.no_grad():
        model.weight.copy_(truth - truth @ bases[1].T @ bases[1])  # knows nothing of one task
    torch.testing.assert_close(
        orthogonal.losses(model, bases, truth), torch.tensor([0.0, 1.0, 0.0]), rtol=0, atol=1e-5
    )
    # The expectation over inputs is exact: a large sample comes near.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.weight.copy_(truth + 0.1 * torch.randn(truth.shape, generator=generator))
        inputs = torch.randn(20_000, 4, generator=generator) @ bases[0]
        targets = inputs @ truth.T
        sampled = (model(inputs) - targets).square().sum() / targets.square().sum()
    assert orthogonal.losses(model, bases, truth)[0].item() == pytest.approx(
        sampled.item(), rel=0.05
    )


def test_plain_descent_forgets_nothing_and_momentum_carries_over():
    sgd = orthogonal.run("sgd", 1.0, 0, SMALL)
    assert orthogonal.figures(sgd)["forgetting"] == pytest.approx(0, abs=1e-6)
    assert orthogonal.figures(sgd)["learnt"] < 0.9
    momentum = orthogonal.run("momentum", 1.0, 0, SMALL)
    assert abs(orthogonal.figures(momentum)["forgetting"]) > 1e-4


@pytest.mark.parametrize("method", orthogonal.METHODS)
def test_every_method_learns_on_the_same_stream(method):
    lr = {"dgd": 3.0, "dgd-weak": 3.0, "sgd": 1.0, "momentum": 0.3, "delta": 0.3}.get(method, 0.1)
    result = orthogonal.run(method, lr, 0, SMALL, every=10)
    assert len(result["curve"]) == 1 + 3 * 3
    assert result["curve"][0] == pytest.approx([1.0] * 3)
    assert orthogonal.figures(result)["learnt"] < 0.95
    again = orthogonal.run(method, lr, 0, SMALL, every=10)
    assert again == result


def test_the_results_are_of_these_methods_and_no_best_rate_is_at_the_grid_s_edge():
    document = json.loads((RESULTS / "rules-orthogonal.json").read_text())
    labels = {key: row["label"] for key, row in document["results"].items()}
    assert labels == {key: method.label for key, method in orthogonal.METHODS.items()}
    assert document["config"]["lrs"] == list(orthogonal.LRS)
    assert not any(row["at_edge"] for row in document["results"].values())


def test_figures_by_hand_and_a_diverged_run_is_a_large_number():
    result = {"learnt": [0.1, 0.2, 0.3], "final": [0.4, 0.2, 0.3]}
    figures = orthogonal.figures(result)
    assert figures == pytest.approx({"final": 0.3, "learnt": 0.2, "forgetting": 0.15})
    diverged = orthogonal.figures({"learnt": [0.1, math.nan], "final": [math.inf, math.nan]})
    assert diverged["final"] == diverged["learnt"] == 1e6


def test_the_sweep_takes_the_rate_of_the_least_final_loss(monkeypatch):
    finals = {0.1: 0.5, 0.2: 0.1, 0.4: 0.3}
    seen = []

    def run(method, lr, seed, problem, every=0):
        seen.append((lr, seed))
        row = {"learnt": [finals[lr]] * 2, "final": [finals[lr]] * 2, "curve": [[1.0, 1.0]]}
        return row if every else {k: v for k, v in row.items() if k != "curve"}

    monkeypatch.setattr(orthogonal, "run", run)
    ticks = []
    results = orthogonal.sweep(
        ["sgd"], [0.4, 0.1, 0.2], SMALL, range(9, 11), range(3), lambda: ticks.append(1)
    )
    row = results["sgd"]
    assert (row["lr"], row["at_edge"]) == (0.2, False)
    assert row["sweep"] == {"0.1": 0.5, "0.2": 0.1, "0.4": 0.3}
    assert seen == [(lr, s) for lr in (0.1, 0.2, 0.4) for s in (9, 10)] + [
        (0.2, s) for s in range(3)
    ]
    assert len(ticks) == 4 and len(row["final"]["values"]) == 3


def test_the_orthogonal_command_writes_its_numbers_and_picture(tmp_path):
    arguments = ["orthogonal", "--quick", "--method", "sgd", "--method", "momentum"]
    result = CliRunner().invoke(rules, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "rules-orthogonal-quick.json").read_text())
    assert list(document["results"]) == ["sgd", "momentum"]
    assert document["config"]["seeds"] == 2 and str(tmp_path) not in json.dumps(document)
    assert (tmp_path / "rules-orthogonal-quick.png").stat().st_size > 10_000
    assert "SGD, momentum 0.9" in result.output


def test_the_cost_command_measures_all_parts(tmp_path):
    arguments = ["cost", "--quick", "--device", "cpu"]
    result = CliRunner().invoke(rules, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "rules-cost-quick.json").read_text())
    training, steps = document["training"], document["steps"]
    assert set(training) == set(cost._TRAINING) and training["SGD"]["extra_share"] == 0
    parts = ("whole_ms", "passes_ms", "step_ms")
    assert all(row[part] > 0 for row in training.values() for part in parts)
    assert steps["SGD, momentum"]["ratio"] == 1.0
    wide = "DeltaMomentum, float32 products"
    assert set(steps) == {"SGD, momentum", "DeltaMomentum", wide, "DeepMomentum"}
    of_learned = document["learned"]
    state = {name: row["state_bytes_per_parameter"] for name, row in of_learned.items()}
    assert of_learned["NestedOptimizer"]["ratio"] == 1.0
    bare = state["NestedOptimizer"]
    # The last gradient and where a parameter began, and two slow momenta; traces and counters of
    # tiny tensors come to a little.
    assert 4 < state["DeepNestedOptimizer, one momentum, foreach"] - bare < 5
    assert 12 < state["DeepNestedOptimizer, three momenta, foreach"] - bare < 13
    assert all(row["step_ms"] > 0 for row in of_learned.values())


def test_the_extra_share_is_what_a_whole_iteration_takes_longer(monkeypatch):
    whole = {"SGD": 1.2, "AdamW": 1.4, "DGD": 1.4, "DGD, adamw": 1.9}
    whole |= {"NestedOptimizer": 1.3, "DeepNestedOptimizer": 1.4}
    # Parts that were timed from an idle device do not enter, but for the passes of SGD.
    seconds = {n: cost.Times(t, 1.0 if n == "SGD" else 7.0, 5.0) for n, t in whole.items()}
    monkeypatch.setattr(cost, "_TRAINING", {name: cost._TRAINING[name] for name in seconds})
    monkeypatch.setattr(
        cost, "_in_turn", lambda works, _: {name: [seconds[name]] * 3 for name in works}
    )
    rows = cost._training(cost.PRESETS["tiny"], "cpu", 0.0)
    assert rows["DGD"]["extra_share"] == pytest.approx(0.2)
    assert rows["DGD, adamw"]["extra_share"] == pytest.approx(0.5)
    assert rows["DeepNestedOptimizer"]["extra_share"] == pytest.approx(0.1)


def test_an_iteration_is_a_forward_and_backward_pass_and_a_step(monkeypatch):
    monkeypatch.setattr(cost, "_TRAINING", {"SGD": cost._TRAINING["SGD"]})
    steps = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self: steps.append(_has_gradients(self)) or step(self),
    )
    cost._training(cost.PRESETS["tiny"], "cpu", 0.0)
    # Rounds of one step and of some iterations, and at the end iterations under the profiler.
    rounds = len(steps) - cost.ITERATIONS
    assert all(steps) and rounds >= 3 and rounds % (1 + cost.ITERATIONS) == 0


def _has_gradients(optimizer):
    return all(p.grad is not None for group in optimizer.param_groups for p in group["params"])
