"""A step within an autocast region is the step outside of it; the closure is the caller's."""

from functools import partial

import pytest
import torch
from torch import nn

from nested_optim import (
    DGD,
    M3,
    DeepMomentum,
    DeepNestedOptimizer,
    DeltaMomentum,
    NestedOptimizer,
)

#: Each class with the products that autocast would take in bfloat16.
MAKERS = {
    "NestedOptimizer": lambda m: NestedOptimizer(m.parameters(), lr=0.1, frequency=2),
    "M3": lambda m: M3([m.weight], lr=0.1),
    "DeltaMomentum": lambda m: DeltaMomentum(m.parameters(), lr=0.1, frequency=2),
    "DeltaMomentum of float32 products": lambda m: DeltaMomentum(
        m.parameters(), lr=0.1, product_dtype="float32", foreach=False
    ),
    "DeepMomentum": lambda m: DeepMomentum(m.parameters(), lr=0.1, memory_lr=0.05, frequency=2),
    "DeepMomentum, for-loop": lambda m: DeepMomentum(
        m.parameters(), lr=0.1, memory_lr=0.05, foreach=False
    ),
    "DGD": lambda m: DGD(m, lr=0.1),
    "DGD, windows": lambda m: DGD(m, lr=0.1, frequency=2),
    "DGD, for-loop": lambda m: DGD(m, lr=0.1, foreach=False),
    "DGD, exact": lambda m: DGD(m, lr=0.1, batch="exact"),
    "DGD, exact, few": lambda m: DGD(m, lr=0.1, batch="exact", max_tokens=3),
    "DGD, adamw": lambda m: DGD(m, lr=0.1, base="adamw"),
    "DeepNestedOptimizer": lambda m: DeepNestedOptimizer(
        m.parameters(), lr=0.1, meta_update_freq=2
    ),
}


def trained(maker, inside, flush=False):
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = maker(model)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=inside)
    for _ in range(5):
        model(torch.randn(20, 6) * 3).square().mean().backward()
        with autocast():
            optimizer.step()
        optimizer.zero_grad()
    if flush:
        with autocast():
            assert optimizer.flush()
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    learned = [v for v in optimizer.param_groups[0].values() if isinstance(v, torch.Tensor)]
    return [*model.parameters(), *tensors, *learned]


@pytest.mark.parametrize("name", MAKERS)
def test_autocast_does_not_reach_a_step(name):
    for here, expected in zip(trained(MAKERS[name], True), trained(MAKERS[name], False)):
        assert torch.equal(here, expected)


@pytest.mark.parametrize(
    "name", ["NestedOptimizer", "DeltaMomentum", "DeepMomentum", "DGD, windows"]
)
def test_autocast_does_not_reach_a_flush(name):
    runs = [trained(MAKERS[name], inside, flush=True) for inside in (True, False)]
    for here, expected in zip(*runs):
        assert torch.equal(here, expected)


@pytest.mark.parametrize("name", MAKERS)
def test_a_closure_runs_as_its_caller_would_run_it(name):
    model = nn.Linear(6, 5)
    optimizer = MAKERS[name](model)
    x, seen = torch.randn(20, 6), []

    def closure():
        optimizer.zero_grad()
        y = model(x)
        seen.append(y.dtype)
        loss = y.float().square().mean()
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
        assert (x @ x.T).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        optimizer.step(closure=closure)
    optimizer.step(closure)
    assert seen == [torch.bfloat16, torch.float16, torch.float32]


def test_autocast_is_back_after_a_step_that_fails():
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = NestedOptimizer([param])
    param.grad = torch.ones(2, 2).to_sparse()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
        assert (param @ param).dtype == torch.bfloat16


def test_a_meta_update_hook_is_part_of_the_step():
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = NestedOptimizer([param])
    param.grad = torch.ones(2, 2)
    seen = []
    optimizer.register_meta_update_hook(lambda _: seen.append((param @ param).dtype))
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step()
    assert seen == [torch.float32]


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_outside_too():
    runs = []
    for inside in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(4, 3))
        optimizer = DeltaMomentum([param], lr=0.1, foreach=True)
        step = torch.compile(optimizer.step, backend="aot_eager")
        for _ in range(3):
            param.grad = torch.randn(4, 3)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                step()
        runs.append(param.detach())
    assert torch.equal(*runs)
