"""DGD's kernels, interpreted on the CPU: the rule, whatever they are given."""

import pytest
import torch
from torch import nn

from nested_optim import DGD, descent, descent_fused
from nested_optim.capture import Layout
from nested_optim.inputs import Inputs

from .interpreter import interpreted

pytest.importorskip("triton")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """The kernel's module, interpreted; afterwards as it was."""
    with interpreted() as modules:
        yield modules["descend"]


@pytest.fixture
def launched(kernel, monkeypatch):
    """How many tensors each launch had; batches as on a GPU, by these kernels."""
    sizes = []

    def counted(batch, *args):
        sizes.append(len(batch.params))
        kernel.descend(batch, *args)

    for name in ("Addresses", "prepare", "Batch"):
        monkeypatch.setattr(descent_fused, name, getattr(kernel, name))
    monkeypatch.setattr(descent_fused, "descend", counted)
    monkeypatch.setattr(descent, "_in_batches", lambda param: True)
    return sizes


def assert_near(params, want):
    for p, w in zip(params, want, strict=True):
        rounding = 2e-3 if p.dtype == F16 else 1e-6
        torch.testing.assert_close(p, w.to(p.dtype), rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("param, term", [(F32, F32), (F32, F16), (F16, F16), (F16, F32)])
@pytest.mark.parametrize("grad", [F32, F16])
@pytest.mark.parametrize("shape", [(8, 128), (3, 5), (1,), (2, 3, 4), (3000,)])
def test_descent_is_the_formula(kernel, shape, param, grad, term):
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=param) for _ in range(3)]
    grads = [torch.randn(shape, dtype=grad) for _ in range(3)]
    terms = torch.randn(3, *shape, dtype=term)
    sizes = torch.tensor([[0.5, 0.1, 0.0], [0.3, 0.2, 0.1]])
    batch = kernel.Batch(params, grads, grads, term, term)
    for weight_decay, sign in ((0.0, 1.0), (0.3, -1.0)):
        want = [
            p.double() - e * (sign * g.double() + weight_decay * p.double()) - f * t.double()
            for p, g, e, f, t in zip(params, grads, *sizes.double(), terms)
        ]
        (where,) = kernel.Addresses().send([batch])
        kernel.descend(batch, where, terms, sizes, weight_decay, sign)
        assert_near(params, want)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("features", [5, 64, 4500])  # 4500: sums of more than a span
@pytest.mark.parametrize(
    "param, row, seen, product", [(F32, F32, F32, F32), (F32, F32, F16, F32), (F16, F16, F16, F32)]
)
@pytest.mark.parametrize("tensors", [False, True])
def test_what_products_take_is_prepared(
    kernel, number, features, param, row, seen, product, tensors
):
    torch.manual_seed(0)
    params = [torch.randn(4, features, dtype=param) for _ in range(number)]
    rows = [torch.randn(6, features, dtype=row) for _ in range(number)]
    count, scale = (torch.arange(number) + 4.0, torch.rand(number)) if tensors else (5, 2.0)
    other = kernel.Batch(params[:1], params[:1], rows[:1], seen, product)
    batch = kernel.Batch(params, params, rows, seen, product)
    where = kernel.Addresses().send([other, batch])[1]
    stacks = kernel.prepare(batch, where, 0.1, 0.7, count, scale)
    multiplied = torch.stack(rows).to(seen)
    assert torch.equal(stacks.weights, torch.stack(params).to(product))
    assert torch.equal(stacks.rows, multiplied.to(product))
    strengths = 0.7 * scale / count * torch.ones(number, dtype=torch.float64)
    squares = multiplied.double().square().sum((1, 2))
    sizes = 0.1 / (1 + 0.1 * strengths * squares)
    want = torch.cat([sizes, sizes * strengths]).to(F32)
    torch.testing.assert_close(stacks.sizes.flatten(), want, rtol=1e-5, atol=0)
    if number == 1 and param == row == product:
        assert stacks.weights.data_ptr() == params[0].data_ptr()  # nothing is copied
        assert (stacks.rows.data_ptr() == rows[0].data_ptr()) == (seen == row)


def test_memory_for_addresses_grows_and_is_kept(kernel):
    def batch(number):
        tensors = [torch.randn(2) for _ in range(number)]
        return kernel.Batch(tensors, tensors[::-1], tensors, F32, F32)

    addresses = kernel.Addresses()
    for numbers in ([1], [3, 1], [1], [3, 3]):
        batches = [batch(n) for n in numbers]
        for one, (table, merged) in zip(batches, addresses.send(batches), strict=True):
            own = [t.data_ptr() for tensors in one[:3] for t in tensors]
            assert table[: len(own)].tolist() == own
            assert table.data_ptr() % 16 == 0
            assert all(merged & a == a for a in own)
    assert len(addresses._rings) == 1


def test_what_the_kernels_cannot_read_is_left_to_others(launched):
    fused = descent_fused.FusedDescent()
    group = {"lr": 0.1, "decay": 1.0, "weight_decay": 0.1, "maximize": False}
    p, x = torch.randn(4, 6), torch.randn(3, 6)
    for param, grad, rows, served in (
        (p, p.clone(), x, True),
        (p.t().contiguous().t(), p, x, False),
        (p, torch.randn(6, 4).t(), x, False),
        (p, p.clone(), torch.randn(6, 3).t(), False),
        (p.double(), p.double(), x, False),
        (p, p.clone(), x.double(), False),
        (torch.empty(0, 6), torch.empty(0, 6), x, False),
    ):
        given = Inputs(Layout(), rows, 3, 1.0)
        assert fused([param], [grad], [given], group) == ([] if served else [0])
        assert fused([param], [grad], [given], {**group, "lr": torch.tensor(0.1)}) == [0]
    assert launched == [1]


def net(kind):
    torch.manual_seed(1)
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.3, "maximize": True},
        {"max_tokens": 3},
        {"frequency": 2},
        {"state_dtype": F32},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_steps_are_those_of_torch_s_operations(kind, options, launched):
    models = [net(kind) for _ in range(2)]
    ours, plain = (
        DGD(m, **{"lr": 0.1, **options, "foreach": foreach})
        for m, foreach in zip(models, (None, True))
    )
    shape = (5, 3, 8, 8) if kind == "conv" else (9, 6)
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(shape)
        for model, optimizer in zip(models, (ours, plain)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert launched
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_narrow_weights_are_rounded_once(launched, monkeypatch):
    monkeypatch.setattr(DGD, "_uses_foreach", lambda self, group, params: True)  # as on a GPU
    model, twin = net("linear").to(F16), net("linear").to(F16)
    optimizer, plain = DGD(model, 0.1), DGD(twin, 0.1, foreach=True)
    x = torch.randn(9, 6, dtype=F16)
    for m, o in ((model, optimizer), (twin, plain)):
        m(x).float().square().mean().backward()
        o.step()
    assert launched
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-3)
