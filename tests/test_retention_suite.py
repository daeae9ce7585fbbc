"""The retention suite: its metrics, baselines, sweep and jobs, and the whole of it in small."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks import __main__ as suites
from benchmarks.demo.run import one_thread
from benchmarks.jobs import Pool, Store
from benchmarks.retention import aggregate, data, methods, models, sweep, training
from benchmarks.retention.baselines import EWC, Lookahead
from benchmarks.retention.stream import make_stream
from nested_optim import WeightMemory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these small tensors do."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.digits()


def make_job(method: str = "adamw", **changes: Any) -> training.Job:
    values: dict[str, Any] = {
        "stream": "digits",
        "method": method,
        "settings": methods.get(method).settings,
        "lr": 1e-3,
        "seed": 0,
        "replay": 0,
        "epochs": 1,
        "batch": 10,
        "purpose": "report",
    }
    return training.Job(**{**values, **changes})


# Metrics

R = [[0.9, None, None], [0.95, 0.8, None], [0.5, 0.7, 0.96]]


def test_metrics_of_a_run_by_hand():
    result = {"read_outs": {"live": {"task_il": R, "class_il": R}}}
    assert aggregate.run_metrics(result, "live")["task_il"] == pytest.approx(
        {
            "learning_accuracy": (0.9 + 0.8 + 0.96) / 3,
            "final_accuracy": (0.5 + 0.7 + 0.96) / 3,
            "average_incremental_accuracy": (0.9 + (0.95 + 0.8) / 2 + (0.5 + 0.7 + 0.96) / 3) / 3,
            "backward_transfer": ((0.5 - 0.9) + (0.7 - 0.8)) / 2,
            "forgetting": ((0.95 - 0.5) + (0.8 - 0.7)) / 2,
        }
    )


def test_what_a_run_did_not_measure_is_missing_and_not_zero():
    record = [[0.9, None, None], [None, 0.8, None], [0.5, 0.7, 0.96]]
    selecting = {"read_outs": {"live": {"task_il": record, "class_il": record}}}
    found = aggregate.run_metrics(selecting, "live")["class_il"]
    assert set(found) == {"final_accuracy", "learning_accuracy", "backward_transfer"}
    last = [[None] * 3, [None] * 3, [0.5, 0.7, 0.96]]
    joint = {"read_outs": {"live": {"task_il": last, "class_il": last}}}
    assert aggregate.run_metrics(joint, "live", joint=True)["task_il"] == {
        "final_accuracy": pytest.approx(0.72)
    }


def test_stability_gap_and_lowest_accuracy_by_hand():
    curve = [[0.5], [0.9], [0.3, 0.4], [0.6, 0.9], [0.5, 0.5, 0.1], [0.4, 0.8, 0.9]]
    result = {"changes": [0, 10, 20], "curve_steps": [5, 10, 15, 20, 25, 30]}
    found = aggregate.gaps(curve, result)
    assert found["stability_gap"] == pytest.approx(((0.6 - 0.3) + (0.6 - 0.5)) / 2)
    assert found["min_accuracy"] == pytest.approx((0.3 + 0.5) / 2)


class Fixed(nn.Module):
    """Answers with the inputs themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_both_readings_from_the_same_logits():
    # Labels 0, 1 | 2, 3. The second sample's own task would get it right, all classes not.
    logits = [[1, 0, 0, 0], [0, 1, 5, 0], [0, 9, 2, 1], [0, 0, 4, 3]]
    images = torch.tensor(logits, dtype=torch.float32)
    labels = torch.tensor([0, 1, 2, 3])
    samples = (images, labels)
    tiny = data.Dataset("t", "mlp", 4, 2, 1, samples, None, samples, ((0, 1), (2, 3)))
    seed = next(s for s in range(20) if make_stream(tiny, s).classes == ((0, 1), (2, 3)))
    evaluate = training.Evaluator(tiny, make_stream(tiny, seed), torch.Tensor.float, CPU)
    assert evaluate(Fixed(), 0, 0).tolist() == [[1.0, 1.0]]  # classes 2 and 3 are not seen yet
    assert evaluate(Fixed(), 0, 1).tolist() == [[1.0, 0.5], [0.5, 0.0]]
    assert evaluate(Fixed(), 1, 1).tolist() == [[0.5, 0.0]]
    images.fill_(torch.nan)  # a network that has diverged
    evaluate = training.Evaluator(tiny, make_stream(tiny, seed), torch.Tensor.float, CPU)
    assert evaluate(Fixed(), 0, 1).tolist() == [[0.0, 0.0], [0.0, 0.0]]


# Baselines


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def test_ewc_gradient_is_that_of_the_penalty_over_all_tasks():
    model = small_model()
    ewc = EWC(model, strength=7.0, samples=20)
    centres, fishers = [], []
    for task in range(2):
        inputs = torch.randn(20, 4, dtype=torch.float64)
        before = copy.deepcopy(ewc.fisher)
        ewc.end_task(inputs)
        fishers.append([a - b for a, b in zip(ewc.fisher, before)])
        centres.append([p.detach().clone() for p in model.parameters()])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p) * (task + 1))
    penalty = sum(
        (7.0 / 2 * f * (p - c).square()).sum()
        for of_centre, of_fisher in zip(centres, fishers)
        for p, c, f in zip(model.parameters(), of_centre, of_fisher)
    )
    expected = torch.autograd.grad(penalty, list(model.parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    ewc.add_gradient()
    for p, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad - 1, gradient, rtol=1e-9, atol=1e-11)


def test_ewc_fisher_is_the_mean_of_squared_gradients_of_single_samples():
    model = small_model()
    inputs = torch.randn(40, 4, dtype=torch.float64)
    found = EWC(model, 1.0, seed=3).estimate(inputs)
    shares = model(inputs).softmax(1).detach()
    drawn = torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(3))[:, 0]
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in zip(inputs, drawn):
        loss = F.cross_entropy(model(x[None]), y[None])
        for total, g in zip(expected, torch.autograd.grad(loss, list(model.parameters()))):
            total += g.square() / len(inputs)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_ewc_does_nothing_during_the_first_task():
    model = small_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    EWC(model, 1e6).add_gradient()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def train_a_little(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, after=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after()


def test_lookahead_is_a_weight_memory_of_one_level():
    models_, read = [small_model(), small_model()], []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in models_]
    lookahead = Lookahead(optimizers[0], every=3, alpha=0.25)
    memory = WeightMemory(optimizers[1], frequencies=(3,), write=0.25, pull=0.75)
    for model, optimizer in zip(models_, optimizers):
        train_a_little(model, optimizer, 10)
    for a, b in zip(*(m.parameters() for m in models_)):
        torch.testing.assert_close(a, b)
    for context, model in zip((lookahead.read_out(), memory.read_out(1)), models_):
        live = [p.detach().clone() for p in model.parameters()]
        with context:
            read.append([p.detach().clone() for p in model.parameters()])
        assert all(map(torch.equal, live, model.parameters()))
        assert not all(map(torch.equal, live, read[-1]))
    for a, b in zip(*read):
        torch.testing.assert_close(a, b)


def test_averages_are_those_of_torch():
    model = models.build("mlp", 10, 0)
    learner = methods.get("adamw").build(model, "mlp", 1e-3)
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for step in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.full_like(p, 0.1 * step))
        for act in learner.after_step:
            act()
        expected.update_parameters(model)
    found = learner.averages["EMA 0.99"]
    assert all(map(torch.equal, found.module.parameters(), expected.module.parameters()))


@pytest.mark.parametrize("kind", ["mlp", "conv", "text"])
def test_learning_rates_are_divided_by_depth_shallow_most(kind):
    model = models.build(kind, 10, 0)
    for key in ("adamw_lrf", "sgd_lrf"):
        groups = methods.get(key).build(model, kind, 0.6).optimizer.param_groups
        divisors = models.LEVELS[models.DEPTHS[kind]]
        assert [g["lr"] for g in groups] == [0.6 / d for d in divisors]
        order = [p for g in groups for p in g["params"]]
        assert all(a is b for a, b in zip(order, model.parameters(), strict=True))


def test_a_start_depends_on_the_seed_alone():
    before = torch.get_rng_state()
    a, b, c = (models.build("conv", 50, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))


# Runs


#: A rate at which each method learns the digits in four passes, and passes where others are needed.
LEARNS = {
    "sgd_momentum": (0.01, 4),
    "accumulation": (0.01, 12),
    "windows": (0.03, 4),
    "m3": (0.01, 1),
    "lookahead_lrf": (0.01, 4),
    "continual_lrf": (0.01, 4),
    "adamw:10/50:0.5:0.5": (0.003, 8),
    "adamw_lrf:10/50:0.5:0.5": (0.01, 4),
    "sgd_lrf": (1.0, 4),
    "sgd_lrf:10/50:0.5:0.5": (1.0, 4),
    "sgd": (0.1, 4),
}


@pytest.mark.parametrize("key", list(methods.METHODS))
def test_every_method_learns(key, digits):
    lr, epochs = LEARNS.get(key, (3e-3, 4))
    job = make_job(key, lr=lr, purpose="select", epochs=epochs, seed=1000)
    result = training.run(job, digits, CPU)
    measured = "final_accuracy" if key == "joint" else "learning_accuracy"
    for name in result["read_outs"]:
        found = aggregate.run_metrics(result, name, joint=key == "joint")["task_il"]
        assert found[measured] > (0.65 if name == "live" else 0.45)  # copies lag behind


def test_a_run_is_the_same_each_time_and_another_with_another_seed(digits):
    first, again, other = (
        training.run(make_job(seed=seed, replay=50), digits, CPU) for seed in (0, 0, 1)
    )
    first.pop("seconds"), again.pop("seconds")
    assert first == again
    assert first["read_outs"] != other["read_outs"]


def test_report_runs_measure_all_learnt_tasks_and_select_runs_what_selection_takes(digits):
    report = training.run(make_job(), digits, CPU)
    select = training.run(make_job(purpose="select"), digits, CPU)
    for i, j in itertools.product(range(5), range(5)):
        assert (report["read_outs"]["live"]["class_il"][i][j] is not None) == (j <= i)
        measured = select["read_outs"]["live"]["class_il"][i][j] is not None
        assert measured == (j == i or i == 4)
    assert "curves" not in select
    curve = report["curves"]["live"]["task_il"]
    assert len(curve) == len(report["curve_steps"])
    assert [len(p) for p in curve] == [
        1 + max(i for i, c in enumerate(report["changes"]) if c < step)
        for step in report["curve_steps"]
    ]
    assert report["curve_steps"][-1] == report["steps"]


def test_accumulation_steps_on_the_mean_gradient_of_four_batches(digits):
    learner = methods.get("accumulation").build(models.build("mlp", 10, 0), "mlp", 1e-3)
    assert learner.accumulate == 4
    result = training.run(make_job("accumulation"), digits, CPU)
    assert result["steps"] == training.run(make_job(), digits, CPU)["steps"]


def test_a_memory_is_read_by_its_settings():
    method = methods.get("adamw:1/10:0.01/0.1:0")
    learner = method.build(models.build("mlp", 10, 0), "mlp", 1e-3)
    group = learner.optimizer.param_groups[0]
    assert group["memory_frequencies"] == (1, 10)
    assert tuple(group["memory_write"]) == (0.01, 0.1) and tuple(group["memory_pull"]) == (0, 0)
    assert list(learner.read_outs) == ["live", "level 1", "level 2", "mean"]
    for text in ("adamw:10", "sgdx:1:0.5:0.5", "adamw:a:0.5:0.5", "adamw:10:0.9:0.9"):
        with pytest.raises(ValueError):
            methods.get(text)
    with pytest.raises(ValueError, match="choose among adamw"):
        methods.get("adamv")


@pytest.mark.parametrize("key", ["continual", "replay"])
def test_a_preset_is_read_out_as_it_says_itself(key, digits):
    model = models.build("mlp", 10, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = WeightMemory(optimizer, preset=key)
    for _ in range(60):  # past an exchange of the slowest level
        model(digits.train[0][:10]).square().mean().backward()
        optimizer.step()
    with memory.read_out():
        read = [p.detach().clone() for p in model.parameters()]
    learner = methods.get(key).build(model, "mlp", 1e-3)
    name = learner.aliases[methods.PRESET_READ_OUT]
    levels = {methods.LIVE: 0, "mean": "mean", "level 1": 1, "level 2": 2}
    with memory.read_out(levels[name]):
        assert all(map(torch.equal, read, model.parameters()))
    others = [other for other in levels.values() if other != levels[name]]
    for other in others:
        with memory.read_out(other):
            assert not all(map(torch.equal, read, model.parameters()))
    result = training.run(make_job(key, purpose="select"), digits, CPU)
    assert result["read_outs"][methods.PRESET_READ_OUT] == result["read_outs"][name]


# The sweep


class Peak:
    """A store whose score has its peak at one rate; runs are made up."""

    def __init__(self, best: float) -> None:
        self.best, self.asked = best, []

    def __getitem__(self, job: training.Job) -> dict[str, Any]:
        distance = abs(sweep.step_of(job.lr) - sweep.step_of(self.best))
        record = [[0.9 - 0.05 * distance]]
        return {"read_outs": {"live": {"task_il": record, "class_il": record}}}

    def __call__(self, jobs: Any) -> None:
        self.asked = sorted({job.lr for job in jobs})


@pytest.mark.parametrize("best", [1e-6, 1e-3, 0.3])
def test_the_grid_grows_until_the_best_rate_is_inside(best, digits):
    method = methods.get("lookahead")
    peak: Any = Peak(best)
    found = sweep.select(digits, [method], sweep.Settings(selection_seeds=1), peak, peak)
    points = found["lookahead"]["live"]
    assert sweep.best_of(points)["lr"] == best
    assert points[0]["lr"] < best < points[-1]["lr"]
    places = [sweep.step_of(point["lr"]) for point in points]
    assert places == list(range(places[0], places[-1] + 1))
    assert set(method.lrs) <= {point["lr"] for point in points}


def test_a_grid_that_may_not_grow_further_says_that_its_best_is_at_the_edge(digits):
    peak: Any = Peak(30.0)
    settings = sweep.Settings(selection_seeds=1, seeds=1, growth=2)
    [row] = sweep.measure(digits, [methods.get("accumulation")], settings, peak, peak)
    assert (row.lr, row.at_edge) == (0.1, True)


def test_rates_are_on_a_ladder_of_half_decades():
    assert [sweep.rate_at(p) for p in (-9, -8, -1, 0, 1)] == [3e-5, 1e-4, 0.3, 1.0, 3.0]
    assert [sweep.step_of(sweep.rate_at(p)) for p in range(-20, 5)] == list(range(-20, 5))
    with pytest.raises(ValueError, match="2e-05"):
        sweep.step_of(2e-5)
    sizes = {len(method.lrs) for method in methods.METHODS.values()}
    assert len(sizes) == 1  # the same budget for all


def test_reported_seeds_and_selection_seeds_are_different(digits):
    settings = sweep.Settings(replay=50)
    method = methods.get("adamw")
    purposes = {
        seed: sweep.make_job(digits, method, settings, 1e-3, seed).purpose for seed in (0, 4, 1000)
    }
    assert purposes == {0: "report", 4: "report", 1000: "select"}
    joint = sweep.make_job(digits, methods.get("joint"), settings, 1e-3, 0)
    assert joint.replay == 0


# Jobs


def worker(folder: Path) -> Any:
    """What does a job, with the data set that was saved in ``folder``."""
    return functools.partial(training.work, data=folder / "d.pt", device=CPU)


def test_finished_runs_are_kept_and_not_done_again(digits, tmp_path):
    digits.save(tmp_path / "d.pt")
    path = tmp_path / "runs.jsonl"
    jobs = [make_job(seed=seed) for seed in (0, 1)]
    done: list[int] = []
    with Pool(worker(tmp_path), Store(path), 1) as pool:
        pool(jobs[:1], lambda: done.append(0))
        pool([*jobs, jobs[1]], lambda: done.append(1))
    assert done == [0, 1]
    kept = [Store(path)[job] for job in jobs]
    whole = path.read_text()
    path.write_text(whole[:-40])  # as a kill would leave it
    torn = Store(path)
    assert jobs[0] in torn and jobs[1] not in torn
    with Pool(worker(tmp_path), torn, 1) as pool:
        pool(jobs)
    again = [Store(path)[job] for job in jobs]
    for a, b in zip(kept, again):
        assert a["read_outs"] == b["read_outs"]
    assert jobs[0] not in Store(path, protocol=-1)


def test_a_job_with_other_settings_is_another_job(tmp_path):
    store = Store(tmp_path / "runs.jsonl")
    store.add(make_job(), {})
    assert make_job() in store
    for change in ({"lr": 3e-3}, {"epochs": 2}, {"settings": (1,)}, {"replay": 5}, {"batch": 5}):
        assert make_job(**change) not in store


def test_a_run_that_fails_is_named_and_what_was_done_before_stays(digits, tmp_path):
    digits.save(tmp_path / "d.pt")
    store = Store(tmp_path / "runs.jsonl")
    with (
        pytest.raises(RuntimeError, match=r"'lr': -1.0, 'seed': 1.*Invalid learning rate"),
        Pool(worker(tmp_path), store, 1) as pool,
    ):
        pool([make_job(), make_job(seed=1, lr=-1.0)])
    assert make_job() in Store(tmp_path / "runs.jsonl")


def invoke(tmp_path: Path, *arguments: str) -> str:
    options = ["retention", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(suites.main, [*options, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_worker_processes_come_to_the_same(digits, tmp_path):
    digits.save(tmp_path / "d.pt")
    jobs = [make_job("lookahead", seed=seed, purpose="select") for seed in (0, 1)]
    stores = [Store(tmp_path / f"{workers}.jsonl") for workers in (1, 2)]
    for store, workers in zip(stores, (1, 2)):
        with Pool(worker(tmp_path), store, workers) as pool:
            pool(jobs)
    for job in jobs:
        assert stores[0][job]["read_outs"] == stores[1][job]["read_outs"]


def test_runs_that_take_turns_come_to_the_same(digits, tmp_path):
    digits.save(tmp_path / "d.pt")
    jobs = [make_job("lookahead", seed=seed, purpose="select") for seed in (0, 1, 2)]
    jobs.append(make_job("ewc_1000", purpose="select", replay=50))
    stores = [Store(tmp_path / f"{name}.jsonl") for name in ("alone", "turns")]
    with Pool(worker(tmp_path), stores[0], 1) as pool:
        pool(jobs)
    in_turns = functools.partial(training.work_together, data=tmp_path / "d.pt", device=CPU)
    done: list[int] = []
    with Pool(in_turns, stores[1], 1, together=3) as pool:
        pool(jobs, lambda: done.append(0))
    assert len(done) == len(jobs)
    for job in jobs:
        assert stores[0][job]["read_outs"] == stores[1][job]["read_outs"]


def test_of_runs_that_take_turns_the_one_that_fails_is_named(digits, tmp_path):
    digits.save(tmp_path / "d.pt")
    in_turns = functools.partial(training.work_together, data=tmp_path / "d.pt", device=CPU)
    with (
        pytest.raises(RuntimeError, match=r"'lr': -1.0, 'seed': 1.*Invalid learning rate"),
        Pool(in_turns, Store(tmp_path / "runs.jsonl"), 1, together=2) as pool,
    ):
        pool([make_job(), make_job(seed=1, lr=-1.0)])


@pytest.mark.parametrize(
    "workers, together, sizes", [(1, None, [1] * 5), (1, 2, [2, 2, 1]), (4, 3, [2, 2, 1])]
)
def test_jobs_are_shared_out_so_that_every_process_has_some(workers, together, sizes, tmp_path):
    pool = Pool(lambda jobs: jobs, Store(tmp_path / "runs.jsonl"), workers, together)
    given = pool._shared_out([make_job(seed=seed) for seed in range(5)])
    assert [len(jobs) if together else 1 for jobs in given] == sizes


def test_the_whole_suite_in_small(tmp_path):
    few = ("--quick", "--methods", "adamw,continual,joint", "--workers", "1")
    few = (*few, "--epochs", "1", "--seeds", "2")
    first = invoke(tmp_path, *few, "--replay", "0", "--replay", "50")
    again = invoke(tmp_path, *few, "--replay", "0")
    assert " 0 runs" in again and " 0 runs" not in first
    for name, criterion in (("", "task_il"), ("-replay50", "class_il")):
        path = tmp_path / "out" / f"retention-digits{name}-quick"
        assert path.with_suffix(".png").stat().st_size > 10_000
        results = json.loads(path.with_suffix(".json").read_text())
        assert criterion in results["config"]["criterion"]
        assert str(tmp_path) not in path.with_suffix(".json").read_text()
        rows = {(row["method"], row["read_out"]): row for row in results["rows"]}
        assert {"live", "EMA 0.99", "EMA 0.995"} == {r for m, r in rows if m == "adamw"}
        assert {"live", "level 1", "level 2", "mean", "preset's"} == {
            r for m, r in rows if m == "continual"
        }
        assert [m for m, r in rows if rows[m, r]["headline"]] == ["adamw", "continual", "joint"]
        kept = rows["adamw", "live"]["figures"]["class_il"]
        assert len(kept["final_accuracy"]["values"]) == 2
        assert kept["final_accuracy"]["mean"] == pytest.approx(
            statistics.fmean(kept["final_accuracy"]["values"]), abs=1e-4
        )
        assert set(kept) == {*aggregate.METRICS, "stability_gap", "min_accuracy"}
        assert rows["adamw", "live"]["curve"]["changes"][0] == 0
        [comparison] = results["comparisons"]
        assert comparison["memory"].startswith("memory 'continual'")
        assert comparison["reading"] == criterion
    assert "forgetting" in first and "LA" in first and "R[T][j]" in first


def test_mistakes_on_the_command_line_are_refused(tmp_path):
    for wrong in (
        ["--methods", "adamx"],
        ["--memory", "adamw:10:0.9:0.9"],
        ["--data", str(tmp_path / "no.tar")],
        ["--classes", "0-49"],
        ["--classes", "all"],
    ):
        options = ["retention", "--work", str(tmp_path), "--out", str(tmp_path), *wrong]
        result = CliRunner().invoke(suites.main, options)
        assert result.exit_code == 2 and "Error" in result.output
