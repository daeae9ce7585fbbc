"""What a user's loop, trainer or model may do to an optimizer that replaced AdamW."""

import inspect

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW

from nested_optim import NestedOptimizer, depth_groups

from .helpers import (
    assert_same_tensors,
    clone_params,
    make_params,
    random_grads,
    set_grads,
    step_with,
    train,
)


def test_the_signature_is_adamw_s_and_more():
    theirs = inspect.signature(AdamW).parameters
    ours = inspect.signature(NestedOptimizer).parameters
    assert [n for n in ours if n in theirs][:6] == list(theirs)[:6]  # positional, in order
    for name, parameter in theirs.items():
        if name != "params":
            assert ours[name].default == parameter.default, name
            assert ours[name].kind == parameter.kind, name


@pytest.mark.parametrize("torch_class, extra", [(AdamW, {}), (Adam, {"decoupled": False})])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_a_model_trains_bit_for_bit_as_with_torch(torch_class, extra, weight_decay, flags):
    losses = []
    for build in (torch_class, lambda *a, **k: NestedOptimizer(*a, **k, **extra)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        optimizer = build(model.parameters(), lr=0.01, weight_decay=weight_decay, **flags)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=40)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 1, 8, 8)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()  # moves lr and the first beta
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
def test_narrow_parameters_train_bit_for_bit_as_with_torch_by_default(dtype, state_dtype):
    # torch's _foreach_mul_ rounds its factor to the tensors' dtype on a CPU: no decay of 0.002.
    params = make_params((40,), (8, 5), dtype=dtype)
    twins = clone_params(params)
    options = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-4}
    ours = NestedOptimizer(params, state_dtype=state_dtype, **options)
    theirs = AdamW(twins, **options)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    reference = AdamW(wide, **options)
    for seed in range(6):
        grads = random_grads(params, seed)
        step_with(ours, params, grads)
        if state_dtype is None:
            step_with(theirs, twins, grads)
            assert_same_tensors(params, twins)
        else:
            step_with(reference, wide, [g.float() for g in grads])
            assert_same_tensors(params, [p.detach().to(dtype) for p in wide])
            with torch.no_grad():
                for p, q in zip(wide, params):
                    p.copy_(q)


def test_the_loop_of_a_trainer_that_never_calls_zero_grad_on_the_optimizer():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    reference = nn.Linear(4, 2)
    reference.load_state_dict(model.state_dict())
    optimizer = NestedOptimizer(model.parameters(), frequency=2)
    expected = AdamW(reference.parameters())
    for _ in range(4):
        batches = [torch.randn(3, 4) for _ in range(2)]
        for batch in batches:
            model(batch).square().mean().backward()
            optimizer.step()
            model.zero_grad()
            (reference(batch).square().mean() / 2).backward()
        expected.step()
        reference.zero_grad()
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_group_added_in_mid_run_takes_the_defaults_and_opens_its_own_windows():
    params = make_params((3,), (4,))
    optimizer = NestedOptimizer(params[:1], frequency=3)
    train(optimizer, params, range(2))
    optimizer.add_param_group({"params": params[1:]})
    assert optimizer.param_groups[1]["frequency"] == 3
    train(optimizer, params, range(2, 4))
    counts = [
        (optimizer.state[p]["step"].item(), optimizer.state[p]["window_count"].item())
        for p in params
    ]
    assert counts == [(1, 1), (0, 2)]


def test_frozen_parameters_are_left_alone_and_may_thaw_in_mid_run():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    before = clone_params(list(model[0].parameters()))
    optimizer = NestedOptimizer(model.parameters(), frequency=2, weight_decay=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()

    for _ in range(4):
        step()
    assert_same_tensors(before, list(model[0].parameters()))
    assert not any(p in optimizer.state for p in model[0].parameters())
    model[0].requires_grad_(True)
    for _ in range(2):
        step()
    assert all(optimizer.state[p]["step"] == 1 for p in model[0].parameters())
    assert all(optimizer.state[p]["step"] == 3 for p in model[1].parameters())


def test_freezing_in_mid_window_keeps_the_window_for_later():
    (param,) = params = [nn.Parameter(torch.zeros(1))]
    optimizer = NestedOptimizer(params, frequency=2, betas=(0.0, 0.5))
    step_with(optimizer, params, [torch.ones(1)])
    for _ in range(3):
        step_with(optimizer, params, [None])
    step_with(optimizer, params, [torch.full((1,), 3.0)])
    assert optimizer.state[param]["exp_avg"] == 2.0


def test_tied_parameters_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    model = Tied()
    optimizer = NestedOptimizer(model.named_parameters(), frequency=2)
    assert optimizer.param_groups[0]["param_names"] == ["embedding.weight"]
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
    assert optimizer.state[model.head.weight]["step"] == 1


@pytest.mark.filterwarnings("error")
def test_empty_groups_and_steps_without_any_gradient_do_nothing():
    params = make_params((2,))
    before = clone_params(params)
    optimizer = NestedOptimizer([{"params": []}, {"params": params, "frequency": 2}])
    optimizer.step()
    assert optimizer.flush() == 0
    assert_same_tensors(params, before)
    assert not optimizer.state
    train(optimizer, params, range(2))
    twin = NestedOptimizer([{"params": []}, {"params": params, "frequency": 2}])
    twin.load_state_dict(optimizer.state_dict())
    assert twin.state[params[0]]["step"] == 1


@pytest.mark.parametrize("flags", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_odd_tensors_train_like_plain_ones(flags):
    """Non-contiguous, misaligned, empty, 0-d and channels-last parameters and gradients."""
    storage = torch.randn(200)
    odd = [
        storage[1:31].view(5, 6).t(),
        storage[40:100:3],
        torch.empty(0, 3),
        torch.tensor(0.5),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ]
    params = [nn.Parameter(t) for t in odd]
    plain = [nn.Parameter(t.detach().clone(memory_format=torch.contiguous_format)) for t in odd]
    optimizers = [NestedOptimizer(ps, frequency=2, **flags) for ps in (params, plain)]
    for seed in range(5):
        grads = random_grads(plain, seed)
        set_grads(plain, grads)
        for i, (p, grad) in enumerate(zip(params, grads)):
            # a gradient need not share its parameter's strides
            p.grad = grad.clone() if i % 2 else grad.mT.contiguous().mT if grad.dim() > 1 else grad
        for optimizer in optimizers:
            optimizer.step()
    assert_same_tensors(params, plain)


def test_state_that_someone_else_attached_does_no_harm():
    params = make_params((3,))
    reference = clone_params(params)
    optimizer, plain = NestedOptimizer(params), NestedOptimizer(reference)
    optimizer.state[params[0]]["theirs"] = torch.zeros(2)
    train(optimizer, params, range(3))
    train(plain, reference, range(3))
    assert_same_tensors(params, reference)
    fresh = NestedOptimizer(make_params((3,)))
    fresh.load_state_dict(optimizer.state_dict())
    assert "theirs" in fresh.state[fresh.param_groups[0]["params"][0]]


def test_switching_amsgrad_or_capturable_on_in_mid_run_works():
    params = make_params((3,))
    optimizer = NestedOptimizer(params, frequency=2)
    train(optimizer, params, range(3))
    optimizer.param_groups[0].update(amsgrad=True, capturable=True)
    train(optimizer, params, range(3, 8))
    state = optimizer.state[params[0]]
    assert (state["step"], state["window_count"]) == (4, 0)
    assert (state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all()


def test_frequencies_are_used_exactly_as_given():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    groups = depth_groups(model, frequencies=(1, 4, 7))
    optimizer = NestedOptimizer(groups)
    assert sorted(g["frequency"] for g in optimizer.param_groups) == [1, 4, 7]


def test_a_closure_is_called_once_under_grad_and_its_loss_is_returned():
    (param,) = params = make_params((3,))
    optimizer = NestedOptimizer(params, frequency=2)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert len(calls) == 1 and loss.item() == param.square().sum().item()
    assert optimizer.step() is None
