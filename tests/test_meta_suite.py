"""``python -m benchmarks training meta``: its rivals' arithmetic, and the command as a whole."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from torch.nn import Parameter

from benchmarks.training import meta
from benchmarks.training.cli import training
from benchmarks.training.meta_tasks import TASKS
from nested_optim import DeepNestedOptimizer


def job(**changes):
    given = {
        "task": "digits",
        "method": "deep_default",
        "options": (),
        "lr": 1e-3,
        "tuned": 0.0,
        "seed": 0,
        "steps": 6,
    }
    return meta.Job(**{**given, **changes})


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


def test_the_control_takes_one_step_at_the_wrong_rate():
    p = Parameter(torch.zeros(1))
    learner = meta.Recovered([p], meta.Start(lr=1.0, tuned=0.125, steps=3))
    places = []
    for _ in range(3):
        p.grad = torch.ones(1)
        learner.step(torch.tensor(0.0))
        places.append(p.item())
    assert places == pytest.approx([-1.0, -1.125, -1.25], rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_runs_depend_on_their_job_alone(task):
    one, two = (meta.work(job(task=task)) for _ in range(2))
    measured = [*TASKS[task].measures, "multipliers"]
    assert [one[m] for m in measured] == [two[m] for m in measured]
    for change in ({"seed": 1}, {"lr": 2e-3}, {"steps": 7}):
        other = meta.work(job(task=task, **change))
        assert other[measured[0]] != one[measured[0]], change


@pytest.mark.parametrize("task", TASKS)
def test_a_task_s_layers_are_its_model_s_parameters(task):
    model = TASKS[task].build(0)
    layers = TASKS[task].layers(model)
    assert len(layers) == 3
    found = [id(p) for layer in layers for p in layer]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("method", sorted(meta.METHODS.keys() - {"adamw", "prodigy"}))
def test_every_method_but_prodigy_begins_with_adamw_s_step(method):
    losses = {}
    for name in ("adamw", method):
        task = TASKS["digits"]
        model = task.build(3)
        chosen = meta.METHODS[name].choices[0]
        learner = meta.METHODS[name].build(task, model, meta.Start(1e-3, 1e-3, 10), **chosen)
        seen = []
        for loss, _ in zip(task.losses(model, 3), range(2)):
            learner.zero_grad()
            loss.backward()
            learner.step(loss)
            seen.append(loss.item())
        losses[name] = seen
    assert losses[method] == losses["adamw"]


def test_the_learned_rows_are_the_optimizer_s_own_defaults():
    task = TASKS["digits"]
    learner = meta.METHODS["deep_default"].build(task, task.build(0), meta.Start(1e-3, 1e-3, 10))
    own = DeepNestedOptimizer([Parameter(torch.zeros(1))], lr=1e-3).param_groups[0]
    found = learner.optimizer.param_groups[0]
    for key in ("meta_lr", "meta_update_freq", "meta_rule", "mode", "learn_momentum"):
        assert found[key] == own[key], key


def test_the_command_writes_what_it_measured(tmp_path):
    folder = tmp_path / "work"
    arguments = ["meta", "--quick", "--out", str(tmp_path), "--work", str(folder)]
    result = CliRunner().invoke(training, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "training-meta-quick.json").read_text())["results"]
    assert (tmp_path / "training-meta-quick.png").stat().st_size > 1000
    assert set(written) == {"digits"}
    found = written["digits"]
    assert set(found["rows"]) == {"adamw", "deep_default"}
    of_tuned = found["rows"]["adamw"]["by_factor"]["1"]["of_tuned_adamw"]
    assert of_tuned == {"training loss": 1.0, "test loss": 1.0}
    assert found["lr"] == min(map(float, found["by_lr"]), key=lambda lr: found["by_lr"][f"{lr:g}"])
    for row in found["rows"].values():
        assert set(row["by_factor"]) == {"0.1", "1", "10"}
        for entry in row["by_factor"].values():
            runs = entry["test loss, runs"]
            mean = math.exp(sum(map(math.log, runs)) / len(runs))
            assert entry["test loss"] == pytest.approx(mean, rel=1e-4)
    # The learned rule's multipliers were recorded, and they start at 1.
    assert found["rows"]["deep_default"]["by_factor"]["1"]["multipliers"][0] == [1.0]
    # Runs that are kept are not done again.
    lines = (folder / "runs.jsonl").read_text()
    assert CliRunner().invoke(training, arguments).exit_code == 0
    assert (folder / "runs.jsonl").read_text() == lines
