"""DGD on a CUDA device: the CPU's numbers, samples and all, and no waiting for the device."""

import copy

import pytest
import torch
from torch import nn

from nested_optim import DGD, descent, rules
from nested_optim.capture import Layout
from nested_optim.inputs import Inputs

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


def twins(dtype=torch.float64):
    """Layers of one shape, whose products are taken together."""

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, padding=1, dtype=dtype), nn.Flatten(), nn.Linear(60, 8, dtype=dtype),
        nn.Tanh(), nn.Linear(8, 8, dtype=dtype), nn.Tanh(), nn.Linear(8, 8, dtype=dtype),
        nn.Tanh(), nn.Linear(8, 8, dtype=dtype), nn.Linear(8, 50, dtype=dtype),
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"base": "adamw", "weight_decay": 0.1},
        {"frequency": 3, "window": "sum"},
        {"base": "adamw", "frequency": 2, "reduction": "sum"},
        {"lr": torch.tensor(0.01, dtype=torch.float64), "foreach": False},
    ],
    ids=str,
)
def test_products_of_one_shape_are_taken_together_and_are_the_cpu_s(options, monkeypatch):
    together = []
    terms = descent._terms

    def counted(weights, *args):
        together.append(len(weights))
        return terms(weights, *args)

    monkeypatch.setattr(descent, "_terms", counted)
    on_cpu, on_cuda = twins(), twins().cuda()
    few = {"lr": 0.01, "max_tokens": 5, "window_samples": 7, **options}
    for model in (on_cpu, on_cuda):
        run(model, DGD(model, **few), range(7))
    for p, q in zip(on_cpu.parameters(), on_cuda.parameters()):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-10, atol=1e-10)
    assert ("foreach" in options and not together) or max(together) == 3


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_batches_of_larger_weights_are_the_rule(dtype, input_dtype, transposed):
    torch.manual_seed(0)
    shapes = [(192, 64)] * 3 + [(64, 256)] * 2 + [(3000, 64)]
    weights = [torch.randn(s, dtype=dtype, device="cuda") for s in shapes]
    grads = [torch.randn_like(w) for w in weights]
    layout = Layout(transposed)
    rows = [torch.randn(128, layout.features(w), device="cuda") for w in weights]
    count = torch.tensor(100.0, device="cuda")
    taken = [Inputs(layout, x.to(input_dtype), count, 1.0) for x in rows]
    group = {"lr": 0.03, "decay": 0.1, "batch": "mean", "weight_decay": 0.1, "maximize": False}
    want = [
        rules.dgd(
            *(layout.matrix(t.double()) for t in (w, g)), x.rows.double(), count=count, **group
        )
        for w, g, x in zip(weights, grads, taken)
    ]  # fmt: skip
    old = [w.double() for w in weights]
    steps = [torch.tensor(0.0) for _ in weights]
    descent._multi_tensor_dgd(weights, grads, taken, steps, {**group, "differentiable": False})
    for w, before, new in zip(weights, old, want):
        exact = layout.unmatrix(new, w)
        share = 2e-2 if input_dtype == torch.bfloat16 else 1e-5
        bound = share * float((exact - before).abs().max())
        bound += torch.finfo(dtype).eps * float(exact.abs().max())
        assert float((w.double() - exact).abs().max()) <= bound


@pytest.mark.parametrize(
    "options",
    [{}, {"base": "adamw"}, {"frequency": 3}, {"base": "adamw", "frequency": 2, "window": "sum"}],
    ids=str,
)
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
