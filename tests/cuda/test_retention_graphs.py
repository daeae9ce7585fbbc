"""The retention suite's captured gradients on a CUDA device against those without a graph."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn")

from benchmarks.gradients import Gradients
from benchmarks.retention import data, methods, models, training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_captured_gradients_are_those_of_the_batch_and_add_up(kind):
    device = torch.device("cuda")
    model = models.build(kind, 10, 0).to(device)
    shape = (64,) if kind == "mlp" else (3, 32, 32)
    inputs, labels = torch.randn(60, *shape, device=device), torch.arange(60, device=device) % 10

    def loss(indices):
        return F.cross_entropy(model(inputs[indices]), labels[indices])

    gradients = Gradients(model, loss, 10, device)
    batches = [torch.arange(n, n + 10, device=device) for n in (0, 10, 20)]
    batches.insert(1, torch.arange(50, 55, device=device))  # not of full size: without the graph
    params = list(model.parameters())
    for _ in range(2):
        expected = [torch.zeros_like(p) for p in params]
        for batch in batches:
            gradients.add(batch)
            torch._foreach_add_(expected, torch.autograd.grad(loss(batch), params))
            for p, gradient in zip(params, expected):
                torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)
        gradients.clear()
        assert all(not p.grad.any() for p in params)


@pytest.mark.parametrize("key", ["adamw", "sgd_lrf", "windows", "m3", "ewc_1000", "continual_lrf"])
def test_a_run_on_the_device_comes_to_about_the_same(key):
    digits = data.digits()
    method = methods.get(key)
    job = training.Job("digits", key, method.settings, 3e-3, 0, 50, 2, 10, "select")
    found = [training.run(job, digits, torch.device(kind)) for kind in ("cpu", "cuda")]
    for name in found[0]["read_outs"]:
        learnt = [sum(r["read_outs"][name]["task_il"][t][t] for t in range(5)) / 5 for r in found]
        assert learnt[0] == pytest.approx(learnt[1], abs=0.1)


def test_runs_that_take_turns_on_streams_of_their_own_come_to_about_the_same(tmp_path):
    data.digits().save(tmp_path / "d.pt")
    jobs = [
        training.Job("digits", key, methods.get(key).settings, 3e-3, seed, 50, 2, 10, "select")
        for key in ("adamw", "continual_lrf")
        for seed in (0, 1)
    ]
    device = torch.device("cuda")
    for job, found in zip(jobs, training.work_together(jobs, tmp_path / "d.pt", device)):
        alone = training.work(job, tmp_path / "d.pt", device)
        for name, of_name in alone["read_outs"].items():
            one, other = (
                sum(matrix[t][t] for t in range(5)) / 5
                for matrix in (of_name["task_il"], found["read_outs"][name]["task_il"])
            )
            assert one == pytest.approx(other, abs=0.05)
