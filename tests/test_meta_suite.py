"""``python -m benchmarks training meta``: its rivals' arithmetic, and the command as a whole."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from torch.nn import Parameter

from benchmarks.training import meta, meta_cli, meta_tasks
from benchmarks.training.cli import training
from benchmarks.training.data import Images, Text
from benchmarks.training.meta_tasks import DEFAULTS, TASKS, Setting
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


def a_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def trained(model, learner, steps=12):
    """Steps on a rough loss; what the learner's rate was multiplied by after each."""
    x = torch.randn(steps, 4, 6, generator=torch.Generator().manual_seed(1))
    readings = []
    for batch in x:
        model.zero_grad()
        loss = model(batch).square().sum()
        loss.backward()
        learner.step(loss)
        readings.append(learner.multipliers(0.03))
    return readings


def test_joined_parameters_are_the_model_s_own():
    model = a_model()
    before = [p.detach().clone() for p in model.parameters()]
    joined = meta.Joined(model.parameters())
    for p, value in zip(model.parameters(), before):
        assert torch.equal(p, value) and p.is_contiguous()
    with torch.no_grad():
        joined.whole += 1
    for p, value in zip(model.parameters(), before):
        assert torch.equal(p, value + 1)
    model(torch.ones(1, 6)).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.equal(joined.gather(), expected) and joined.whole.grad is joined.grad


def test_the_hypergradient_rival_for_devices_is_the_other_one():
    found = []
    for kind in (meta.Hypergradient, meta.HypergradientOnDevice):
        model = a_model()
        readings = trained(model, kind(model.parameters(), 0.03, 0.25))
        found.append((torch.tensor([list(r) for r in readings]), *model.parameters()))
    assert found[0][0][-1] != 1
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_prodigy_on_joined_parameters_is_prodigy():
    prodigyopt = pytest.importorskip("prodigyopt")
    model, other = a_model(), a_model()
    learner = meta.Adapted(model.parameters(), 1.0)
    readings = trained(model, learner, steps=60)
    plain = meta.Plain(prodigyopt.Prodigy(other.parameters()))
    trained(other, plain, steps=60)
    assert readings[0] == [1e-6] and readings[-1][0] > 1e-4
    assert readings[-1][0] == pytest.approx(plain.optimizer.param_groups[0]["d"], rel=1e-3)
    for one, two in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("task", DEFAULTS)
def test_runs_depend_on_their_job_alone(task):
    one, two = (meta.work(job(task=task)) for _ in range(2))
    measured = [*TASKS[task].measures, "multipliers"]
    assert [one[m] for m in measured] == [two[m] for m in measured]
    for change in ({"seed": 1}, {"lr": 2e-3}, {"steps": 7}):
        other = meta.work(job(task=task, **change))
        assert other[measured[0]] != one[measured[0]], change


def test_runs_that_take_turns_come_to_the_same():
    jobs = [job(lr=lr, method=m) for lr in (1e-3, 1e-2) for m in ("adamw", "deep_default")]
    jobs.append(job(steps=3))
    for its, found in zip(jobs, meta.work_together(jobs, Setting())):
        alone = meta.work(its)
        for key in (*TASKS[its.task].measures, "multipliers"):
            assert found[key] == alone[key]


@pytest.mark.parametrize("task", DEFAULTS)
def test_a_task_s_layers_are_its_model_s_parameters(task):
    trial = TASKS[task].begin(0, Setting())
    assert len(trial.layers) == 3
    found = [id(p) for layer in trial.layers for p in layer]
    assert sorted(found) == sorted(id(p) for p in trial.model.parameters())


@pytest.mark.parametrize("method", sorted(meta.METHODS.keys() - {"adamw", "prodigy"}))
def test_every_method_but_prodigy_begins_with_adamw_s_step(method):
    losses = {}
    for name in ("adamw", method):
        trial = TASKS["digits"].begin(3, Setting())
        chosen = meta.METHODS[name].choices[0]
        learner = meta.METHODS[name].build(trial, meta.Start(1e-3, 1e-3, 10), **chosen)
        seen = []
        for _ in range(2):
            loss = trial.next_gradient()
            learner.step(loss)
            seen.append(loss.item())
        losses[name] = seen
    assert losses[method] == losses["adamw"]


def test_the_learned_rows_are_the_optimizer_s_own_defaults():
    trial = TASKS["digits"].begin(0, Setting())
    learner = meta.METHODS["deep_default"].build(trial, meta.Start(1e-3, 1e-3, 10))
    own = DeepNestedOptimizer([Parameter(torch.zeros(1))], lr=1e-3).param_groups[0]
    found = learner.optimizer.param_groups[0]
    for key in ("meta_lr", "meta_update_freq", "meta_rule", "mode", "learn_momentum"):
        assert found[key] == own[key], key


def test_what_the_default_has_beside_multipliers_is_there_one_at_a_time():
    trial = TASKS["digits"].begin(0, Setting())
    switches = {}
    for name in ("deep_default", "deep_momentum", "deep_mixing", "deep_lr"):
        method = meta.METHODS[name]
        assert len(method.choices) == 1
        learner = method.build(trial, meta.Start(1e-3, 1e-3, 10), **method.choices[0])
        group = learner.optimizer.param_groups[0]
        keys = ("learn_lr", "learn_momentum", "learn_mixing")
        switches[name] = tuple(group[key] for key in keys)
    assert switches == {
        "deep_default": (True, True, True),
        "deep_momentum": (True, True, False),
        "deep_mixing": (True, False, True),
        "deep_lr": (True, False, False),
    }


def test_every_method_has_a_colour_of_its_own():
    assert len(set(meta_cli.COLOURS)) == len(meta_cli.COLOURS) >= len(meta.METHODS)


def test_the_command_writes_what_it_measured(tmp_path):
    folder = tmp_path / "work"
    arguments = ["meta", "--quick", "--out", str(tmp_path), "--work", str(folder)]
    result = CliRunner().invoke(training, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "training-meta-quick.json").read_text())
    written = document["results"]
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
    # Their time is told all the same.
    again = json.loads((tmp_path / "training-meta-quick.json").read_text())
    assert again["runs_done_now"] == 0 < again["runs"]
    results = [json.loads(line)["result"] for line in lines.splitlines()]
    spent = sum(30 * result["ms_per_step"] / 1e3 for result in results)
    assert again["runs_seconds"] == pytest.approx(spent, rel=1e-4)
    assert again["runs_seconds"] == document["runs_seconds"]
    assert document["command"] == "python -m benchmarks training meta --quick"


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """What the tasks for a GPU read, on models of a few units."""
    monkeypatch.setattr(meta_tasks, "LARGE", "test")
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randint(256, (n,), generator=generator).byte() for n in (400, 200, 200)]
    parts = [
        (torch.randint(256, (n, 3, 32, 32), generator=generator).byte(), torch.arange(n) % 5)
        for n in (30, 10, 10)
    ]
    shades = (0.5, 0.5, 0.5)
    paths = {}
    for kind, contents in {
        "lm": Text("noise", *pieces),
        "images": Images("noise", 5, *parts, shades, shades),
    }.items():
        paths[kind] = str(tmp_path / f"{kind}.pt")
        torch.save(contents, paths[kind])
    return paths


@pytest.mark.parametrize("task", [name for name in TASKS if name not in DEFAULTS])
def test_tasks_for_a_gpu_train_the_models_of_the_comparison(task, saved):
    kind = TASKS[task].kind
    setting = Setting("cpu", saved["lm" if kind == "lm" else "images"])
    given = {"task": task, "steps": 4, "data": "noise"}
    one, two = (meta.work(job(**given), setting) for _ in range(2))
    assert one["validation loss"] == two["validation loss"]
    assert ("accuracy" in one) == (kind != "lm") and len(one["multipliers"]) == 4
    other = meta.work(job(**given, lr=3e-2), setting)
    assert other["validation loss"] != one["validation loss"]
    trial = TASKS[task].begin(0, setting)
    found = [id(p) for layer in trial.layers for p in layer]
    assert sorted(found) == sorted(id(p) for p in trial.model.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_explicit_mode_learns_from_batches_that_no_step_takes(task, saved, monkeypatch):
    monkeypatch.setattr(meta.Unrolled, "EVERY", 3)
    kind = TASKS[task].kind
    setting = Setting("cpu", saved["lm" if kind == "lm" else "images"]) if kind else Setting()
    losses, batches, real = {}, [], DeepNestedOptimizer.meta_update
    monkeypatch.setattr(
        DeepNestedOptimizer,
        "meta_update",
        lambda self, val, train, loss_fn: (
            batches.append([val, *train]),
            real(self, val, train, loss_fn),
        ),
    )
    for name in ("adamw", "explicit_5"):
        trial = TASKS[task].begin(3, setting)
        options = meta.METHODS[name].choices[-1]
        learner = meta.METHODS[name].build(trial, meta.Start(1e-3, 1e-3, 10), **options)
        losses[name] = []
        for _ in range(5):
            loss = trial.next_gradient()
            losses[name].append(loss.item())
            learner.step(loss)
    # The fourth step is the first that a meta update can have changed.
    assert losses["adamw"][:4] == losses["explicit_5"][:4]
    assert losses["adamw"][4] != losses["explicit_5"][4]
    assert learner.multipliers(1e-3) != 1 and len(batches) == 1
    assert len({str(batch) for batch in batches[0]}) == 1 + options["k_unroll"]


def test_a_job_s_data_is_part_of_what_it_is_where_it_is_not_the_task_s_own():
    assert "data" not in job().identity()
    assert job(data="a").identity() != job(data="b").identity()


def test_a_rate_that_is_not_used_is_not_varied():
    """Prodigy's three starts are one run each seed, and so are AdamW's and the control's at 1."""
    done = []

    class Kept(dict):
        def __missing__(self, key):
            self[key] = {"training loss": 0.5, "test loss": 0.5, "accuracy": 1.0}
            self[key] |= {"ms_per_step": 1.0, "multipliers": []}
            return self[key]

    names = [name for name in ("adamw", "recovered", "prodigy") if name in meta.METHODS]
    arguments = "digits", range(3), range(1000, 1001), 10, names, (1e-3,), Kept(), done.extend
    found = meta.measure(*arguments)
    by_method = {name: {j for j in done if j.method == name} for name in names}
    assert {j.lr for j in by_method["recovered"]} == {1e-4, 1e-2}
    assert len(by_method["recovered"]) == 2 * 3
    if "prodigy" in names:
        assert {j.lr for j in by_method["prodigy"]} == {1.0} and len(by_method["prodigy"]) == 3
    assert found["runs"] == len(set(done))
    assert found["runs_on"]["device"] == {"not written down": found["runs"]}


@pytest.mark.parametrize("task", [name for name in TASKS if name not in DEFAULTS])
def test_a_task_for_a_gpu_can_be_measured_in_several_calls(task, saved, tmp_path, monkeypatch):
    kind = TASKS[task].kind
    contents = torch.load(saved["lm" if kind == "lm" else "images"], weights_only=False)
    monkeypatch.setattr(meta_cli.data, "text" if kind == "lm" else "images", lambda path: contents)
    folder = tmp_path / "work"
    general = ["meta", "--task", task, "--data", "noise", "--device", "cpu", "--workers", "1"]
    general += ["--seeds", "1", "--selection", "1", "--steps", "5"]
    general += ["--out", str(tmp_path), "--work", str(folder)]

    def call(*methods):
        chosen = [word for method in methods for word in ("--method", method)]
        result = CliRunner().invoke(training, [*general, *chosen])
        assert result.exit_code == 0, result.output
        name = f"training-meta-{task}-5-steps-1-seeds-1-selection-some-methods"
        return json.loads((tmp_path / f"{name}.json").read_text())

    def runs():
        return len((folder / "runs.jsonl").read_text().splitlines())

    first = call("deep_default")
    assert first["config"]["steps"] == {task: 5} != first["config"]["default_steps"]
    assert first["runs_done_now"] == first["runs"] == runs() == len(TASKS[task].lrs) + 3 + 3
    second = call("deep_default", "hypergradient")
    assert second["runs_done_now"] == runs() - first["runs"] == 12 + 3
    third = call("hypergradient", "deep_default")
    assert third["runs_done_now"] == 0 and third["runs"] == second["runs"]
    assert third["results"][task]["rows"] == second["results"][task]["rows"]
    # As if they had been measured by one call, but for where they ran, which is asked of each run.
    folder_text = (folder / "runs.jsonl").read_text()
    on = third["device"][0]
    renamed = folder_text.replace(json.dumps(on), '"another"', 2)
    (folder / "runs.jsonl").write_text(renamed)
    fourth = call("hypergradient", "deep_default")
    assert fourth["device"] == sorted(["another", on])
    assert fourth["results"][task]["runs_on"]["device"]["another"] == 2
    data = "" if kind == "lm" else " --data noise"
    assert fourth["command"].endswith(
        f" meta --task {task}{data} --seeds 1 --selection 1 --steps 5 "
        "--method adamw --method hypergradient --method deep_default"
    )


def test_plots_of_a_task_for_a_gpu_show_multipliers(tmp_path):
    entry = {"loss": 1.0, "loss, factor": 2.0, "multipliers": [[1.0], [2.0]]}
    rows = {
        name: {"label": name, "by_factor": {f: entry for f in ("0.1", "1", "10")}}
        for name in ("adamw", "deep_default", "hypergradient")
    }
    result = {"label": "task", "measures": ["loss"], "steps": 4, "rows": rows}
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_cli.Figure, "savefig", lambda self, *_, **__: figures.append(self))
        meta_cli.draw({"lm-large": result, "resnet": result}, tmp_path / "it.png")
    drawn = [len(axes.lines) for axes in figures[0].axes]
    assert drawn == [3, 6, 3, 6]  # the rival's multipliers as well
    assert list(figures[0].axes[1].lines[0].get_ydata()) == [1.0, 2.0]
    labels = [line.get_label() for line in figures[0].axes[1].lines]
    assert "hypergradient, set to x 10" in labels
    # Bars from the loss divided by its factor to the loss times it, for each method's three starts.
    bars = [segment for bar in figures[0].axes[0].collections for segment in bar.get_segments()]
    assert len(bars) == 3 * 3
    assert all(list(segment[:, 1]) == [0.5, 2.0] for segment in bars)


def call(tasks=DEFAULTS, methods=tuple(meta.METHODS), **changes):
    return meta_cli.Call(tasks, methods, **changes)


def test_only_what_is_published_has_the_published_file_s_name():
    assert call().file_name() == call(DEFAULTS[::-1]).file_name() == "training-meta"
    assert call(steps=TASKS["digits"].steps).file_name() == "training-meta-500-steps"
    names = {
        "training-meta-digits": call(("digits",), steps=500),
        "training-meta-1-seeds": call(seeds=1),
        "training-meta-1-selection": call(selection=1),
        "training-meta-some-methods": call(methods=("adamw",)),
        "training-meta-resnet": call(("resnet",), steps=1000),
        "training-meta-digits-lm-resnet": call((*DEFAULTS, "resnet")),
        "training-meta-resnet-500-steps-1-seeds": call(("resnet",), steps=500, seeds=1),
        "training-meta-quick": call(("digits",), seeds=1, steps=30, quick=True),
    }
    assert {name: its.file_name() for name, its in names.items()} == {name: name for name in names}


def test_the_command_that_is_written_down_is_whole():
    plain = "python -m benchmarks training meta"
    assert call().command() == plain
    asked = call(("vit",), ("adamw", "deep_lr"), steps=9, seeds=1, selection=3, data="cifar100.tar")
    assert asked.command() == (
        f"{plain} --task vit --data cifar100.tar --seeds 1 --selection 3 --steps 9 "
        "--method adamw --method deep_lr"
    )
    quick = {"seeds": 1, "selection": 1, "quick": True}
    usual = call(("digits",), meta_cli.QUICK_METHODS, steps=30, **quick)
    assert usual.command() == f"{plain} --quick"
    other = call(("lm",), ("adamw",), steps=5, **quick)
    assert other.command() == f"{plain} --quick --task lm --steps 5 --method adamw"


def test_images_need_a_path(tmp_path):
    arguments = ["meta", "--task", "vit", "--out", str(tmp_path)]
    result = CliRunner().invoke(training, arguments)
    assert result.exit_code != 0 and "give --data PATH" in result.output
    result = CliRunner().invoke(training, [*arguments, "--data", str(tmp_path / "none")])
    assert result.exit_code != 0 and "there is nothing at" in result.output
