"""The pure functions of a learned update, against torch, by hand and by finite differences."""

import pytest
import torch

from nested_optim import rules
from nested_optim.rules.deep_nested import (
    Inputs,
    alignments,
    deep_nested,
    next_loss,
    slow_momentum,
    slow_weight,
)


def exact(values):
    """A tensor of these numbers as Python holds them."""
    return torch.tensor(values, dtype=torch.float64)


OPTIONS = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}


def tensors(count, *shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def neutral(momenta, dtype=torch.float64):
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    return Inputs(one, one, zero, zero, torch.eye(1, momenta, dtype=dtype)[0])


@pytest.mark.parametrize("shape", [(4, 3), (), (0,)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str
)
@pytest.mark.parametrize("decoupled", [True, False])
def test_neutral_inputs_and_none_have_adamw_s_bits(dtype, shape, decoupled):
    param, grad, m, v, top, *slow = tensors(7, *shape, dtype=dtype)
    v = v * v if not dtype.is_complex else torch.complex(v.real**2, v.imag**2)
    top = top * top if not dtype.is_complex else torch.complex(top.real**2, top.imag**2)
    options = {**OPTIONS, "step": 3, "weight_decay": 0.1, "decoupled": decoupled}
    for amsgrad in (None, top):
        expected = rules.adamw(param, grad, m, v, amsgrad, **options)
        plain = deep_nested(param, grad, m, v, amsgrad, **options)
        given = {"inputs": neutral(3), "frequencies": (1, 2, 5)}
        neutrally = deep_nested(param, grad, m, v, amsgrad, slow, **options, **given)
        for new in (plain, neutrally):
            for a, b in zip(new[:4], expected):
                assert (a is None) == (b is None)
                assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


def test_an_update_by_hand():
    param, grad, m, v, slow = exact([[2.0], [1.0], [0.5], [0.04], [0.3]])
    given = [exact(x) for x in (3.0, 2.0, 0.5, 0.25)]
    inputs = Inputs(*given, exact([0.5, 2.0]))
    new = deep_nested(
        param, grad, m, v, None, [slow], step=3, weight_decay=0.1, frequencies=(1, 2),
        inputs=inputs, **OPTIONS,
    )  # fmt: skip
    fast = 0.8 * 0.75 * 0.5 + 0.2 * 1.0  # = 0.5
    # The third update opens the second chunk of two.
    slowly = 0.8 * 0.3 + 0.1 * 1.0
    weight = 0.8 * (1 - 0.8) + 0.2 / 2
    second = 0.9 * 0.04 + 0.1
    numerator = 0.5 * (2.0 * fast / (1 - 0.8**3) + 0.5 * 1.0) + 2.0 * slowly / weight
    denominator = (second / (1 - 0.9**3)) ** 0.5 + 1e-3
    expected = 2.0 * (1 - 0.1 * 3.0 * 0.1) - 0.1 * 3.0 * numerator / denominator
    assert float(new.param) == pytest.approx(expected, rel=1e-12)
    assert float(new.exp_avg) == pytest.approx(fast, rel=1e-12)
    assert float(new.slow[0]) == pytest.approx(slowly, rel=1e-12)
    assert float(new.exp_avg_sq) == pytest.approx(second, rel=1e-12)
    without = deep_nested(param, grad, m, None, step=3, inputs=inputs._replace(mixing=None),
                          weight_decay=0.0, **OPTIONS)  # fmt: skip
    expected = 2.0 - 0.1 * 3.0 * (2.0 * fast / (1 - 0.8**3) + 0.5)
    assert float(without.param) == pytest.approx(expected, rel=1e-12)
    assert without.exp_avg_sq is None


@pytest.mark.parametrize("frequency", [1, 2, 3, 7])
def test_the_weight_of_a_slow_momentum_is_what_its_gradients_add_up_to(frequency):
    momentum = torch.zeros((), dtype=torch.float64)
    for step in range(1, 30):
        momentum = slow_momentum(momentum, torch.ones_like(momentum), step, frequency, 0.8)
        assert float(momentum) == pytest.approx(slow_weight(step, frequency, 0.8), rel=1e-12)
        if frequency == 1:
            assert float(momentum) == pytest.approx(1 - 0.8**step, rel=1e-12)


def test_the_update_is_differentiable_in_everything():
    param, grad, m, slow = tensors(4, 3)
    (v,) = tensors(1, 3, seed=1)
    given = [exact(x) for x in (1.2, 0.8, 0.3, 0.1)]
    mixing = exact([0.9, 0.4])
    inputs = [t.requires_grad_() for t in (param, grad, m, v.square() + 0.1, slow, *given, mixing)]

    def run(param, grad, m, v, slow, *inputs):
        new = deep_nested(
            param, grad, m, v, None, [slow], step=3, weight_decay=0.1, frequencies=(1, 2),
            inputs=Inputs(*inputs), **OPTIONS,
        )  # fmt: skip
        return new.param, new.exp_avg, new.exp_avg_sq, *new.slow

    assert torch.autograd.gradcheck(run, inputs)


def test_gradients_of_exactly_zero_have_finite_derivatives():
    param, grad = torch.ones(3).double(), torch.zeros(3).double().requires_grad_()
    zeros = torch.zeros(3).double()
    new = deep_nested(param, grad, zeros, zeros, step=1, **{**OPTIONS, "eps": 1e-8})
    assert torch.equal(new.param, param)
    (slope,) = torch.autograd.grad(new.param.sum(), grad)
    assert torch.isfinite(slope).all() and slope.all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_the_next_loss_has_the_derivatives_of_the_gradient_s_product_with_the_update(
    dtype, normalize
):
    param, grad, m, slow, later = tensors(5, 4, 2, dtype=dtype)
    (v,) = tensors(1, 4, 2, dtype=dtype, seed=1)
    v = torch.complex(v.real**2, v.imag**2) if dtype.is_complex else v * v
    v = v if normalize else None
    values = [exact(x) for x in (1.2, 0.8, 0.3, 0.1)]
    mixing = exact([0.9, 0.4])
    options = {"step": 3, "frequencies": (1, 2), "weight_decay": 0.3, **OPTIONS}

    def loss(*inputs):
        new = deep_nested(param, grad, m, v, None, [slow], inputs=Inputs(*inputs), **options)
        return torch.sum((later.conj() * new.param).real), new

    inputs = [t.requires_grad_() for t in (*values, mixing)]
    expected_loss, new = loss(*inputs)
    expected = torch.autograd.grad(expected_loss, inputs)
    new = deep_nested(param, grad, m, v, None, [slow], inputs=Inputs(*inputs), **options)
    products, lengths = alignments(
        later,
        new.param.detach(),
        new.grad,
        new.exp_avg.detach(),
        None if v is None else new.exp_avg_sq,
        [t.detach() for t in new.slow],
        step=3,
        betas=OPTIONS["betas"],
        eps=OPTIONS["eps"],
        frequencies=(1, 2),
    )
    direction = new.exp_avg.detach() / (1 - OPTIONS["betas"][0] ** 3)
    if v is not None:
        parts = torch.view_as_real(new.exp_avg_sq) if dtype.is_complex else new.exp_avg_sq
        root = (parts / (1 - OPTIONS["betas"][1] ** 3)).sqrt() + OPTIONS["eps"]
        direction = torch.view_as_real(direction) if dtype.is_complex else direction
        direction = direction / root
    squares = [t.abs().square().sum().item() for t in (later, direction)]
    assert lengths.tolist() == pytest.approx(squares, rel=1e-12)
    rows = [t.detach().reshape(-1).requires_grad_() for t in (*values, mixing)]
    found_loss = next_loss(
        products[None],
        Inputs(*rows),
        lr=exact([0.1]),
        weight_decay=exact([0.3]),
        beta=exact(0.8),
        correction=exact([1 - 0.8**3]),
    )
    torch.testing.assert_close(found_loss[0], expected_loss.detach(), rtol=1e-12, atol=1e-14)
    found = torch.autograd.grad(found_loss.sum(), rows)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-10, atol=1e-12)
