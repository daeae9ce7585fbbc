"""DGD on a CUDA device: the CPU's numbers, samples and all, and no waiting for the device."""

import copy

import pytest
import torch
from torch import nn

from nested_optim import DGD, descent, rules
from nested_optim.capture import Layout
from nested_optim.descent_fused import FusedDescent
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


BY_KERNELS = "kernels"
BY_TORCH = "torch's operations"


def assert_batches_are_the_rule(dtype, input_dtype, seen, transposed, how, counted, **options):
    """Weights of several shapes in batches, and the rule in float64."""
    torch.manual_seed(0)
    shapes = [(192, 64)] * 3 + [(64, 256)] * 2 + [(3000, 64), (50, 30), (50, 30), (7, 5)]
    weights = [torch.randn(s, dtype=dtype, device="cuda") for s in shapes]
    grads = [torch.randn_like(w) for w in weights]
    layout = Layout(transposed)
    rows = [torch.randn(128, layout.features(w), device="cuda") for w in weights]
    count = torch.tensor(100.0, device="cuda") if counted else 100
    taken = [Inputs(layout, x.to(input_dtype), count, 1.0, seen) for x in rows]
    group = {"lr": 0.03, "decay": 0.1, "batch": "mean", "weight_decay": 0.0, "maximize": False}
    group.update(options)
    want = [
        rules.dgd(
            *(layout.matrix(t.double()) for t in (w, g)),
            (x.rows if seen is None else x.rows.to(seen)).double(),
            count=count,
            **group,
        )
        for w, g, x in zip(weights, grads, taken)
    ]
    old = [w.double() for w in weights]
    steps = [torch.tensor(0.0) for _ in weights]
    served = []

    def by_kernels(params, *args):
        left = FusedDescent()(params, *args)
        served.append(len(params) - len(left))
        return left

    descent._multi_tensor_dgd(
        weights,
        grads,
        taken,
        steps,
        {**group, "differentiable": False},
        by_kernels if how == BY_KERNELS else None,
    )
    assert served == ([len(weights)] if how == BY_KERNELS else [])
    for w, before, new in zip(weights, old, want):
        exact = layout.unmatrix(new, w)
        share = 2e-2 if torch.bfloat16 in (seen, input_dtype) else 1e-5
        bound = share * float((exact - before).abs().max())
        bound += torch.finfo(dtype).eps * float(exact.abs().max())
        assert float((w.double() - exact).abs().max()) <= bound


@pytest.mark.parametrize("how", [BY_KERNELS, BY_TORCH])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_batches_of_larger_weights_are_the_rule(
    dtype, input_dtype, transposed, counted, options, how
):
    assert_batches_are_the_rule(dtype, input_dtype, None, transposed, how, counted, **options)


@pytest.mark.parametrize("how", [BY_KERNELS, BY_TORCH])
@pytest.mark.parametrize("transposed", [False, True])
def test_inputs_are_cast_as_autocast_has_cast_them(transposed, how):
    types = torch.float32, torch.float32, torch.bfloat16
    assert_batches_are_the_rule(*types, transposed, how, False)


class Conv1D(nn.Module):
    """Hugging Face's: a linear layer whose weight is transposed."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.nf)


@pytest.mark.parametrize(
    "options", [{}, {"max_tokens": 24}, {"weight_decay": 0.1, "maximize": True}], ids=str
)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_by_the_kernels_is_training_by_torch_s_operations(
    dtype, autocast, options, monkeypatch
):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.LayerNorm(64), Conv1D(64, 64)]
    model = nn.Sequential(*layers, Conv1D(64, 64), nn.Linear(64, 1000)).to("cuda", dtype)
    twin = copy.deepcopy(model)
    moved = []
    call = FusedDescent.__call__

    def noted(self, params, *args):
        left = call(self, params, *args)
        moved.append(len(params) - len(left))
        return left

    monkeypatch.setattr(FusedDescent, "__call__", noted)
    pairs = [(m, DGD(m, 1e-2, foreach=how, **options)) for m, how in ((model, None), (twin, True))]
    start = [p.detach().clone() for p in model.parameters()]
    for step in range(5):
        x = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(step)).to("cuda", dtype)
        for m, optimizer in pairs:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = m(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert moved == [5] * 5
    for p, q, before in zip(model.parameters(), twin.parameters(), start):
        change = float((q - before).float().norm())
        rounding = float(q.float().norm()) * torch.finfo(dtype).eps * 5
        assert float((p - q).float().norm()) <= 0.02 * change + rounding


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
