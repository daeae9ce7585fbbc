"""``training meta`` on a CUDA device: runs by a captured graph against runs without one."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks.training import data, meta, meta_tasks, run
from benchmarks.training.meta_tasks import TASKS, Setting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LARGE = [name for name, task in TASKS.items() if task.kind]
STEPS = 6


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """What saves a task's data, for models of a few units."""
    monkeypatch.setattr(meta_tasks, "LARGE", "test")
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randint(256, (n,), generator=generator).byte() for n in (4000, 400, 400)]
    parts = [
        (torch.randint(256, (n, 3, 32, 32), generator=generator).byte(), torch.arange(n) % 5)
        for n in (60, 20, 20)
    ]

    def save(task):
        made = data.Images("noise", 5, *parts, (0.5,) * 3, (0.25,) * 3)
        path = str(tmp_path / f"{task}.pt")
        torch.save(data.Text("noise", *pieces) if task == "lm-large" else made, path)
        return Setting("cuda:0", path)

    return save


def trained(task, method, setting, monkeypatch, graph):
    """Losses, parameters and buffers of a run of a few steps."""
    with monkeypatch.context() as patch:
        if not graph:
            inner = meta_tasks.Gradients

            def without(*args, **options):
                found = inner(*args, **options)
                found.captures = False
                return found

            patch.setattr(meta_tasks, "Gradients", without)
        trial = TASKS[task].begin(3, setting)
    chosen = meta.METHODS[method].choices[0]
    learner = meta.METHODS[method].build(trial, meta.Start(3e-3, 1e-3, STEPS), **chosen)
    losses, addresses = [], set()
    for _ in range(STEPS):
        loss = trial.next_gradient()
        losses.append(loss.clone())
        addresses.add(tuple(p.grad.data_ptr() for p in trial.model.parameters()))
        learner.step(loss)
    assert not graph or len(addresses) == 1  # optimizers see the same gradients
    values = [torch.stack(losses), *trial.model.parameters(), *trial.model.buffers()]
    return [v.detach().float() for v in values], trial.figures()


@pytest.mark.parametrize("method", ["adamw", "hypergradient", "deep_default"])
@pytest.mark.parametrize("task", LARGE)
def test_a_run_by_a_graph_is_the_run_without(task, method, setting, monkeypatch):
    at = setting(task)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    plain, graphed = (trained(task, method, at, monkeypatch, graph) for graph in (False, True))
    assert graphed[0][0].unique().numel() == STEPS  # a batch of its own each time
    for one, other in zip(plain[0], graphed[0]):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)
    for key, value in plain[1].items():
        assert graphed[1][key] == pytest.approx(value, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("task", LARGE)
def test_batches_on_the_device_are_those_of_the_host(task, setting):
    at = setting(task)
    kind = TASKS[task].kind
    job = run.Job(kind, "test", "", "adamw", 0.0, 0.0, 5)
    on_host = run.Task(job, run.load(at.saved), torch.device("cpu"))
    on_device = run.Task(job, run.load(at.saved, at.device), torch.device(at.device))
    for drawn, _ in zip(on_device.drawn(), range(run.AHEAD + 2)):
        assert torch.equal(drawn.cpu(), on_host.draw())
    if kind != "lm":
        chosen = drawn.cpu()
        host, device = (
            task._prepare(task.parts[0][0][d[:, 0]], d[:, 1:])
            for task, d in ((on_host, chosen), (on_device, drawn))
        )
        torch.testing.assert_close(host, device.cpu())


@pytest.mark.parametrize("method", sorted(meta.METHODS))
@pytest.mark.parametrize("task", LARGE)
def test_every_method_runs_and_says_where(task, method, setting):
    row = meta.METHODS[method]
    options = tuple(sorted(row.choices[0].items()))
    job = meta.Job(task, method, options, row.lr or 1e-3, 1e-3, 0, STEPS, "noise")
    found = meta.work(job, setting(task))
    assert found["device"] == torch.cuda.get_device_name(0)
    assert 0 < found["validation loss"] < 100 and len(found["multipliers"]) == STEPS
    if method.startswith(("deep", "hyper")):
        assert found["multipliers"][0][0] == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["adamw", "cosine", "recovered", "hypergradient", "deep_lr"])
def test_steps_do_not_wait_for_the_device(method, setting):
    trial = TASKS["resnet"].begin(0, setting("resnet"))
    chosen = meta.METHODS[method].choices[0]
    learner = meta.METHODS[method].build(trial, meta.Start(3e-3, 1e-3, 9), **chosen)
    for _ in range(3):  # the graph is captured, state is made, kernels are compiled
        learner.step(trial.next_gradient())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            learner.step(trial.next_gradient())
            learner.multipliers(3e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("task", LARGE)
def test_runs_that_take_turns_on_streams_of_their_own_come_to_about_the_same(task, setting):
    jobs = [
        meta.Job(task, method, (), 1e-3, 0.0, seed, STEPS, "noise")
        for method in ("adamw", "deep_default")
        for seed in (0, 1)
    ]
    for job, found in zip(jobs, meta.work_together(jobs, setting(task))):
        alone = meta.work(job, setting(task))
        assert found["validation loss"] == pytest.approx(alone["validation loss"], rel=2e-2)
