"""DGD's last kernel, interpreted on the CPU: the rule, whatever it is given."""

import pytest
import torch
from torch import nn

from nested_optim import DGD, descent

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
    """How many tensors each launch had; batches as on a GPU."""
    sizes = []
    call = kernel.Descend.__call__

    def counted(self, params, *args):
        sizes.append(len(params))
        call(self, params, *args)

    monkeypatch.setattr(kernel.Descend, "__call__", counted)
    monkeypatch.setattr(descent, "_in_batches", lambda param: True)
    return sizes


def assert_near(params, want):
    for p, w in zip(params, want, strict=True):
        rounding = 2e-3 if p.dtype == F16 else 1e-6
        torch.testing.assert_close(p, w.to(p.dtype), rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("term", [F32, F16])
@pytest.mark.parametrize("param, grad", [(F32, F32), (F32, F16), (F16, F16), (F16, F32)])
@pytest.mark.parametrize("shape", [(8, 128), (3, 5), (1,), (2, 3, 4), (3000,)])
def test_it_is_the_formula(kernel, shape, param, grad, term):
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=param) for _ in range(3)]
    grads = [torch.randn(shape, dtype=grad) for _ in range(3)]
    terms, sizes = torch.randn(3, *shape, dtype=term), torch.tensor([0.5, 0.1, 0.0])
    assert kernel.Descend.serves(params, grads, terms, sizes, 0.3)
    descend = kernel.Descend()
    for weight_decay, sign in ((0.0, 1.0), (0.3, -1.0)):
        want = [
            p.double() - e * (sign * g.double() + weight_decay * p.double()) - t.double()
            for p, g, e, t in zip(params, grads, sizes.double(), terms)
        ]
        descend(params, grads, terms, sizes, weight_decay, sign)
        assert_near(params, want)


def test_what_it_cannot_read_is_refused(kernel):
    p, t, e = torch.randn(4, 6), torch.randn(1, 4, 6), torch.ones(1)
    assert kernel.Descend.serves([p], [p], t, e, 0.1)
    for params, grads, terms, sizes, weight_decay in (
        ([p.t()], [p.t()], torch.randn(1, 6, 4), e, 0.1),
        ([p], [torch.randn(6, 4).t()], t, e, 0.1),
        ([p], [p], torch.randn(1, 6, 4).mT, e, 0.1),
        ([p.double()], [p.double()], t, e, 0.1),
        ([p], [p], t.double(), e, 0.1),
        ([p], [p], t, e.double(), 0.1),
        ([p], [p], t, e, torch.tensor(0.1)),
        ([p, p.half()], [p, p], torch.randn(2, 4, 6), torch.ones(2), 0.1),
        ([torch.empty(0, 6)], [torch.empty(0, 6)], torch.empty(1, 0, 6), e, 0.1),
    ):
        assert not kernel.Descend.serves(params, grads, terms, sizes, weight_decay)


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
