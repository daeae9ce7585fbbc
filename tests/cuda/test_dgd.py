"""DGD on a CUDA device: the CPU's numbers, samples and all, and no waiting for the device."""

import copy

import pytest
import torch
from torch import nn

from nested_optim import DGD

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, padding=1, dtype=dtype),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(60, 8, dtype=dtype),
        nn.Tanh(),
        nn.Linear(8, 2, dtype=dtype),
    )


def run(model, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(step))
        p = next(model.parameters())
        model(x.to(p)).square().sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "options", [{}, {"batch": "exact"}, {"base": "adamw"}, {"frequency": 3}], ids=str
)
def test_it_does_what_it_does_on_the_cpu(options):
    on_cpu, on_cuda = make(), make().cuda()
    few = {"max_tokens": 5, "window_samples": 7}
    for model in (on_cpu, on_cuda):
        run(model, DGD(model, 0.01, **few, **options), range(7))
    for p, q in zip(on_cpu.parameters(), on_cuda.parameters()):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"base": "adamw"}, {"frequency": 3}], ids=str)
def test_neither_backward_pass_nor_step_waits_for_the_device(options):
    model = make(torch.float32).cuda()
    optimizer = DGD(model, 0.01, max_tokens=5, window_samples=7, **options)
    x = torch.randn(4, 3, 10, device="cuda")
    for step in range(7):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(x).square().sum(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_checkpoint_inside_a_window_goes_on_on_the_device():
    model = make(torch.float32).cuda()
    optimizer = DGD(model, 0.01, frequency=4, window_samples=5)
    run(model, optimizer, range(6))
    saved, twin = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    run(model, optimizer, range(6, 9))
    resumed = DGD(twin, 0.01, frequency=4, window_samples=5)
    resumed.load_state_dict(saved)
    assert resumed.state[twin[0].weight]["sample_count"].is_cuda
    run(twin, resumed, range(6, 9))
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q)
