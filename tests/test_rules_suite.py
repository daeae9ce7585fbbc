"""The rules suite: what its experiments measure, and what they write."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from torch.optim import SGD

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks.rules import toy
from benchmarks.rules.cli import rules

LANDSCAPE = (10.0, 1.0, 1.0)


def test_the_gradient_of_the_valley_is_psi_s():
    torch.manual_seed(0)
    for landscape in toy.LANDSCAPES:
        points = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(toy.psi(points, landscape).sum(), points)
        torch.testing.assert_close(toy.gradient(points.detach(), landscape), expected)
    origin = torch.zeros(2, dtype=torch.float64)
    assert toy.psi(origin, LANDSCAPE) == 0
    assert not toy.gradient(origin, LANDSCAPE).any()


@pytest.mark.parametrize("key", toy.METHODS)
def test_all_configurations_at_once_take_the_steps_of_the_optimizer(key):
    method = toy.METHODS[key]
    configs = toy.draw(method, 64, seed=1)
    easy = (1.0, 1.0, 1.0)
    found = toy.simulate(configs, method.normalized, easy, 200)
    assert torch.isfinite(found).any() and torch.isinf(found).any()
    for i in range(64):
        options = {name: float(values[i]) for name, values in configs._asdict().items()}
        options["normalized"] = method.normalized
        _, values = toy.run_optimizer(options, easy, 200)
        assert toy.arrival(values) == found[i], options


def test_the_momentum_that_it_is_compared_with_is_sgd_s():
    point = torch.nn.Parameter(torch.tensor(toy.START, dtype=torch.float64))
    optimizer = SGD([point], lr=0.01, momentum=0.9)
    for _ in range(30):
        point.grad = toy.gradient(point.detach(), LANDSCAPE)
        optimizer.step()
    options = {"lr": 0.01, "momentum": 0.9, "delta_rate": 0.0}
    points, values = toy.run_optimizer(options, LANDSCAPE, 30)
    assert torch.equal(points[-1], point.detach())
    assert values[0] == toy.psi(torch.tensor(toy.START, dtype=torch.float64), LANDSCAPE)


def test_every_method_draws_within_the_ranges_and_only_what_it_has_to_choose():
    for method in toy.METHODS.values():
        lr, momentum, rate = toy.draw(method, 256, seed=0)
        assert toy.RANGES["lr"][0] <= lr.min() and lr.max() <= toy.RANGES["lr"][1]
        low, high = toy.RANGES["one_minus_momentum"]
        if method.momentum:
            assert low <= (1 - momentum).min() and (1 - momentum).max() <= high
        else:
            assert not momentum.any()
        assert bool(rate.any()) == method.delta


def test_arriving_means_to_stay():
    inside, outside = toy.ARRIVED / 2, toy.ARRIVED * 2
    assert toy.arrival(torch.tensor([outside, inside, outside, inside, inside])) == 3
    assert toy.arrival(torch.tensor([outside, inside, outside])) == math.inf
    assert toy.arrival(torch.tensor([inside, math.nan])) == math.inf


def test_the_expected_best_is_that_of_random_draws():
    steps = torch.tensor([10.0, 20.0, math.inf, 40.0], dtype=torch.float64)
    assert toy.expected_best(steps, 1, never=100) == pytest.approx(42.5)
    picks = torch.randint(4, (200_000, 3), generator=torch.Generator().manual_seed(0))
    simulated = steps.clamp(max=100)[picks].min(1).values.mean()
    assert toy.expected_best(steps, 3, never=100) == pytest.approx(float(simulated), rel=0.01)


def test_the_verdict_counts_both_ways():
    def figures(best, expected, share):
        return {"best": best, "expected": expected, "share": share}

    plain = figures(10, 50.0, 0.5)
    results = {
        "a": {"momentum": plain, "delta": figures(9, 60.0, 0.5), "normalized": plain},
        "b": {"momentum": plain, "delta": figures(11, 40.0, 0.6), "normalized": plain},
    }
    verdict = toy.verdict(results)
    assert verdict["delta"]["best"] == {"better": 1, "worse": 1}
    assert verdict["delta"]["expected"] == {"better": 1, "worse": 1}
    assert verdict["delta"]["share"] == {"better": 1, "worse": 0}
    assert verdict["normalized"]["share"] == {"better": 0, "worse": 0}
    assert "best configuration 1 (1 worse)" in toy.sentence(verdict)


def test_the_command_writes_every_landscape_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "LANDSCAPES", [(10.0, 0.0, 1.0), LANDSCAPE])
    arguments = ["toy", "--configs", "64", "--steps", "150", "--seeds", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(rules, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads((tmp_path / "rules-toy.json").read_text())
    assert list(document["results"]) == ["10, 0, 1", "10, 1, 1"]
    for of_methods in document["results"].values():
        assert list(of_methods) == list(toy.METHODS)
        assert all(len(figures["draws"]) == 2 for figures in of_methods.values())
    quadratic = document["results"]["10, 0, 1"]
    assert quadratic["momentum"]["best"] < quadratic["gradient"]["best"]
    assert quadratic["momentum"]["best_by_optimizer"] == min(
        draw["best"] for draw in quadratic["momentum"]["draws"]
    )
    assert document["verdict"]["landscapes"] == 2
    assert (tmp_path / "rules-toy.png").stat().st_size > 10_000
