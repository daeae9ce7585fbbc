"""The AdamW rule against arithmetic by hand, torch, TorchOpt and finite differences."""

import itertools
import math

import pytest
import torch
import torchopt

from nested_optim import rules

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}


def scalar(value):
    return torch.tensor([value], dtype=torch.float64)


def zeros():
    return scalar(0.0), scalar(0.0)


def test_the_first_update_is_lr_times_the_gradients_sign():
    new = rules.adamw(scalar(1.0), scalar(-3.0), *zeros(), step=1, **{**OPTIONS, "eps": 0.0})
    assert new.param.item() == pytest.approx(1.1, rel=1e-15)
    assert new.exp_avg.item() == pytest.approx(-0.3, rel=1e-15)
    assert new.exp_avg_sq.item() == pytest.approx(0.09, rel=1e-14)


def test_the_second_update_by_hand():
    new = rules.adamw(scalar(1.0), scalar(2.0), scalar(0.1), scalar(0.04), step=2, **OPTIONS)
    first = 0.9 * 0.1 + 0.1 * 2.0
    second = 0.99 * 0.04 + 0.01 * 4.0
    size = 0.1 / (1 - 0.9**2)
    expected = 1.0 - size * first / (math.sqrt(second / (1 - 0.99**2)) + 1e-8)
    assert new.param.item() == pytest.approx(expected, rel=1e-14)


def test_decoupled_decay_shrinks_the_parameter_and_coupled_decay_adds_to_the_gradient():
    options = {**OPTIONS, "weight_decay": 0.5, "eps": 0.0}
    decoupled = rules.adamw(scalar(2.0), scalar(1.0), *zeros(), step=1, **options)
    assert decoupled.param.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-14)
    coupled = rules.adamw(scalar(2.0), scalar(1.0), *zeros(), step=1, decoupled=False, **options)
    assert coupled.exp_avg.item() == pytest.approx(0.1 * (1.0 + 0.5 * 2.0), rel=1e-14)


def test_amsgrad_divides_by_the_largest_second_moment():
    largest = scalar(4.0)
    new = rules.adamw(scalar(0.0), scalar(1.0), *zeros(), largest, step=1, **OPTIONS)
    assert new.max_exp_avg_sq.item() == 4.0
    expected = -0.1 / 0.1 * 0.1 / (math.sqrt(4.0 / 0.01) + 1e-8)
    assert new.param.item() == pytest.approx(expected, rel=1e-14)


def test_nothing_given_to_the_rule_is_written_to():
    given = [torch.randn(3, 4, dtype=torch.complex64) for _ in range(2)]
    moments = [torch.zeros(3, 4, dtype=torch.complex64) for _ in range(3)]
    before = [t.clone() for t in given + moments]
    for maximize, decoupled in itertools.product([True, False], repeat=2):
        rules.adamw(
            *given,
            *moments,
            step=1,
            maximize=maximize,
            decoupled=decoupled,
            **{**OPTIONS, "weight_decay": 0.1},
        )
    assert all(torch.equal(a, b) for a, b in zip(before, given + moments))


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.usefixtures("float64_by_default")  # TorchOpt's bias corrections have this dtype
def test_the_rule_agrees_with_torchopt(weight_decay):
    torch.manual_seed(0)
    theirs = torch.randn(6, 5, dtype=torch.float64)
    param, (exp_avg, exp_avg_sq) = theirs.clone(), (torch.zeros_like(theirs) for _ in range(2))
    optimizer = torchopt.adamw(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)
    state = optimizer.init((theirs,))
    for step in range(1, 51):
        grad = torch.randn_like(param)
        updates, state = optimizer.update((grad,), state, params=(theirs,), inplace=False)
        (theirs,) = torchopt.apply_updates((theirs,), updates, inplace=False)
        param, exp_avg, exp_avg_sq, _ = rules.adamw(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            step=step,
            **{**OPTIONS, "lr": 0.01, "weight_decay": weight_decay},
        )
    torch.testing.assert_close(param, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_gradients_through_the_rule_agree_with_finite_differences(decoupled, amsgrad):
    torch.manual_seed(0)
    tensors = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    second = [torch.rand(4, dtype=torch.float64) + 0.5 for _ in range(1 + amsgrad)]
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def update(param, grad, exp_avg, lr, *second):
        new = rules.adamw(
            param,
            grad,
            exp_avg,
            *second,
            step=torch.tensor(3.0, dtype=torch.float64),
            decoupled=decoupled,
            **{**OPTIONS, "lr": lr, "weight_decay": 0.1},
        )
        return new[: 3 + amsgrad]

    inputs = (*tensors, lr, *(v.requires_grad_() for v in second))
    assert torch.autograd.gradcheck(update, inputs)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_lr_zero_moves_nothing_with_a_tensor_step_and_a_zero_second_moment(lr):
    param = torch.tensor([1.0, -2.0])
    moments = torch.zeros(2), torch.zeros(2)
    options = {**OPTIONS, "lr": lr, "weight_decay": 0.1}
    new = rules.adamw(param, torch.zeros(2), *moments, step=torch.tensor(1.0), **options)
    assert torch.equal(new.param, param)
