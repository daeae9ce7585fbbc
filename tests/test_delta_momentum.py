"""DeltaMomentum: its rule by hand, SGD at rate 0, and a buffer that no gradient blows up."""

import copy
import io
import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

import nested_optim.delta_momentum
from nested_optim import DeltaMomentum, rules
from nested_optim.delta_steps import default_product_dtype

from .helpers import (
    assert_same_state,
    assert_same_tensors,
    assert_unchanged,
    clone_params,
    make_params,
    random_grads,
    set_grads,
    snapshot,
    step_with,
    train,
)

SHAPES = (6, 4), (4, 6), (7,), (), (3, 2, 4), (0, 3)


def oracle(buf, grad, rate, momentum, normalized):
    """The rule as written, in float64: an in x in matrix, multiplied from the right."""
    b, g = (t.double().reshape(t.shape[0] if t.dim() > 1 else 1, -1) for t in (buf, grad))
    square = g.square().sum()
    if normalized:
        rho = rate / (1 + rate) * momentum / square
    else:
        rho = rate / (1 + rate * square / momentum)
    decay = momentum * torch.eye(g.shape[1], dtype=torch.float64) - rho * g.T @ g
    return (b @ decay + g).reshape(buf.shape)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s], ids=str)
def test_the_buffer_is_multiplied_from_the_right_and_the_gradient_added(shape, normalized):
    torch.manual_seed(0)
    param, grad, buf = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    new = rules.delta_momentum(
        param, grad, buf, lr=0.1, momentum=0.9, delta_rate=0.7, normalized=normalized
    )
    expected = oracle(buf, grad, 0.7, 0.9, normalized)
    torch.testing.assert_close(new.momentum_buffer, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new.param, param - 0.1 * expected, rtol=1e-12, atol=1e-12)


def test_the_second_update_of_a_vector_by_hand():
    """buf (1, 0), gradient (3, 4), rate 1: |g|^2 = 25, <buf, g> = 3."""
    (param,) = params = [nn.Parameter(torch.zeros(2))]
    optimizer = DeltaMomentum(params, lr=1.0, momentum=0.5)
    step_with(optimizer, params, [torch.tensor([1.0, 0.0])])
    assert optimizer.state[param]["momentum_buffer"].tolist() == [1.0, 0.0]  # first step: buf = g
    step_with(optimizer, params, [torch.tensor([3.0, 4.0])])
    rho = 1 / (1 + 25 / 0.5)
    expected = torch.tensor([0.5 - rho * 3 * 3 + 3, 0.0 - rho * 3 * 4 + 4])
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], expected)


def test_a_high_rate_keeps_nothing_of_the_buffer_along_the_gradient():
    buf, grad = torch.tensor([3.0, 2.0]), torch.tensor([4.0, 0.0])
    new = rules.delta_momentum(buf, grad, buf, lr=0.1, momentum=0.5, delta_rate=1e9)
    torch.testing.assert_close(new.momentum_buffer, torch.tensor([4.0, 1.0]))


def test_normalized_rates_mean_the_same_at_every_scale_of_the_gradient():
    torch.manual_seed(0)
    grads = torch.randn(5, 4, 3, dtype=torch.float64)
    found = []
    for scale in (1e-6, 1.0, 1e6):
        params = [nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))]
        optimizer = DeltaMomentum(params, lr=1 / scale, delta_rate=1.0, normalized=True)
        for grad in grads:
            step_with(optimizer, params, [scale * grad])
        found.append(params[0].detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[2], found[1], rtol=1e-10, atol=1e-12)


def test_complex_matrices_use_the_conjugate_transpose():
    """A complex matrix trains as the real one [[Re, -Im], [Im, Re]], which multiplies as it does.

    Its Frobenius norm is sqrt(2) times the complex one's: twice the rate makes up for that in the
    normalized form, where only rate / (1 + rate) / |g|^2 enters.
    """

    def as_real(z):
        return torch.cat([torch.cat([z.real, -z.imag], 1), torch.cat([z.imag, z.real], 1)])

    torch.manual_seed(0)
    for shape in ((3, 5), (5, 3)):
        buf, grad = (torch.randn(shape, dtype=torch.complex128) for _ in range(2))
        rate = 0.25
        doubled = 2 * rate / (1 - rate)  # x / (1 + x) = 2 rate / (1 + rate)
        term = rules.delta_term(buf, grad, rate=rate, momentum=0.9, normalized=True)
        real = rules.delta_term(
            as_real(buf), as_real(grad), rate=doubled, momentum=0.9, normalized=True
        )
        torch.testing.assert_close(as_real(term), real, rtol=1e-12, atol=1e-12)
        assert term.imag.abs().max() > 0.01


def test_large_matrices_never_need_the_larger_product():
    """A 2 x 300000 gradient: 300000 x 300000 numbers would not fit anywhere."""
    for shape in ((2, 300_000), (300_000, 2)):
        params = [nn.Parameter(torch.zeros(shape))]
        optimizer = DeltaMomentum(params)
        for seed in range(2):
            step_with(optimizer, params, random_grads(params, seed))
        assert torch.isfinite(params[0]).all()


# ---------------------------------------------------------------------- torch.optim.SGD

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["forloop", "foreach", "differentiable"])
def test_rate_zero_is_sgd_with_momentum_to_the_last_bit(path, dtype):
    lrs = [0.02] if path == "foreach" else [0.02, torch.tensor(0.02)]
    for lr, weight_decay, maximize in itertools.product(lrs, (0.0, 0.1), (False, True)):
        ours = make_params(*SHAPES, dtype=dtype)
        theirs = clone_params(ours)
        for p in [*ours, *theirs]:
            p.requires_grad_(path != "differentiable")
        options = {
            "lr": lr,
            "momentum": 0.9,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "differentiable": path == "differentiable",
        }
        optimizer = DeltaMomentum(ours, delta_rate=0.0, foreach=path == "foreach", **options)
        # SGD's own foreach rounds 0.9 to bfloat16 on a CPU; its default there is the for-loop.
        foreach = path == "foreach" and dtype != torch.bfloat16
        reference = SGD(theirs, foreach=foreach, **options)
        for seed in range(12):
            grads = random_grads(ours, seed)
            if seed in (0, 4):
                grads[seed % 3] = None
            for params, optim in ((ours, optimizer), (theirs, reference)):
                step_with(optim, params, grads)
            assert_same_tensors(ours, theirs)
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(
                optimizer.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"]
            )


def test_decoupled_decay_shrinks_by_lr_times_weight_decay():
    (param,) = params = make_params((4, 3))
    before = param.detach().clone()
    optimizer = DeltaMomentum(params, lr=0.1, weight_decay=0.5, decoupled=True)
    step_with(optimizer, params, [torch.zeros(4, 3)])
    torch.testing.assert_close(param.detach(), before * (1 - 0.1 * 0.5))
    assert not optimizer.state[param]["momentum_buffer"].any()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_checkpoint_of_sgd_loads_and_training_goes_on_as_sgd_would(momentum):
    params = make_params(*SHAPES)
    theirs = SGD(params, lr=0.01, momentum=momentum, weight_decay=0.1, foreach=False)
    train(theirs, params, range(3))
    our_params = clone_params(params)
    ours = DeltaMomentum(our_params, lr=0.01, momentum=momentum, delta_rate=0.0, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert "dampening" not in ours.param_groups[0]
    train(theirs, params, range(3, 6))
    train(ours, our_params, range(3, 6))
    assert_same_tensors(our_params, params)
    assert ours.state[our_params[0]]["step"] == 3  # updates counted here


def test_a_checkpoint_of_sgd_s_fused_kernel_loads():
    params = make_params((3, 2))
    saved = SGD(params, lr=0.01, momentum=0.9, fused=True).state_dict()
    ours = DeltaMomentum(clone_params(params), lr=0.01)
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["fused"] is None


@pytest.mark.parametrize("option", [{"dampening": 0.1}, {"nesterov": True}])
def test_a_checkpoint_of_sgd_with_what_is_not_offered_is_refused(option):
    params = make_params((3,))
    saved = SGD(params, lr=0.1, momentum=0.9, **option).state_dict()
    ours = DeltaMomentum(clone_params(params))
    before = snapshot(ours)
    with pytest.raises(ValueError, match=f"no {next(iter(option))}, but"):
        ours.load_state_dict(saved)
    assert_unchanged(ours, before)


def test_sgd_goes_on_from_our_checkpoint():
    params = make_params(*SHAPES)
    ours = DeltaMomentum(params, lr=0.01, delta_rate=0.0, foreach=False)
    train(ours, params, range(3))
    their_params = clone_params(params)
    theirs = SGD(their_params, lr=0.5, foreach=False)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(ours, params, range(3, 6))
    train(theirs, their_params, range(3, 6))
    assert_same_tensors(their_params, params)


# ---------------------------------------------------------------------- stability

shapes = st.one_of(
    st.tuples(),
    st.tuples(st.integers(1, 9)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=shapes,
    exponents=st.lists(st.integers(-20, 20), min_size=2, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    momentum=st.sampled_from([0.5, 0.9, 0.99]),
    rate=st.sampled_from([1e-6, 1.0, 1e6, 1e30]),
    normalized=st.booleans(),
    rank_one=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_gradient_makes_the_buffer_longer_than_plain_momentum_could(
    shape, exponents, dtype, momentum, rate, normalized, rank_one, seed
):
    """|buf| <= alpha |buf| + |g| at each step, in the Frobenius norm, at scales 1e-20 to 1e20."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype))]
    optimizer = DeltaMomentum(
        params, lr=1e-9, momentum=momentum, delta_rate=rate, normalized=normalized
    )
    bound = 0.0
    rounding = 1 + 4 * torch.finfo(dtype).eps
    for exponent in exponents:
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        if rank_one and len(shape) == 2:  # where the Frobenius norm is the spectral norm
            grad = grad[:, :1] * grad[:1]
        grad = (grad * 10.0**exponent).to(dtype)
        step_with(optimizer, params, [grad])
        buf = optimizer.state[params[0]]["momentum_buffer"].double()
        assert torch.isfinite(buf).all() and torch.isfinite(params[0]).all()
        bound = (momentum * bound + float(grad.double().norm())) * rounding
        assert float(buf.norm()) <= bound


#: Of a dtype's largest number, the elements of a gradient; its norm then leaves the range.
LARGEST = {torch.float32: 1.5e38, torch.float64: 5e306, torch.bfloat16: 1.5e38}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(40, 30), (30, 40), (6, 4), (1, 300), (300, 1)]),
    dtype=st.sampled_from(list(LARGEST)),
    product=st.sampled_from([None, torch.bfloat16, torch.float32, torch.float64]),
    buf_exponent=st.integers(-40, 0),
    grad_exponent=st.integers(-40, 0),
    rate=st.sampled_from([1e-6, 1.0, 1e6]),
    normalized=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_terms_of_the_largest_numbers_are_those_of_small_ones(
    shape, dtype, product, buf_exponent, grad_exponent, rate, normalized, seed
):
    """The term is linear in the buffer, and where rate |g|^2 is large has no unit of gradients."""
    generator = torch.Generator().manual_seed(seed)
    buf, grad = (
        (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1).to(dtype)
        for _ in range(2)
    )
    options = {"rate": rate, "momentum": 0.9, "product_dtype": product}
    expected = rules.delta_term(
        buf.double(),
        grad.double() * 1e30,
        normalized=normalized,
        **{**options, "product_dtype": None},
    )
    scales = [2.0 ** int(math.log2(LARGEST[dtype]) + e) for e in (buf_exponent, grad_exponent)]
    term = rules.delta_term(buf * scales[0], grad * scales[1], normalized=normalized, **options)
    rounding = 0.02 if torch.bfloat16 in (dtype, product) else 1e-5
    assert (term.double() / scales[0] - expected).norm() <= rounding * expected.norm()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(4, 3), (3, 4), (5,), ()]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    options=st.sampled_from([{}, {"normalized": True}, {"product_dtype": "bfloat16"}]),
    foreach=st.booleans(),
    rank_one=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_buffers_stay_in_range_up_to_the_dtype_s_largest_numbers(
    shape, dtype, options, foreach, rank_one, seed
):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype))]
    optimizer = DeltaMomentum(params, lr=1e-300, momentum=0.5, foreach=foreach, **options)
    for _ in range(8):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        if rank_one and len(shape) == 2:
            grad = grad[:, :1] * grad[:1]
        # Plain momentum's buffer would reach 1 / (1 - 0.5) of it.
        grad = 0.49 * torch.finfo(dtype).max * (grad / grad.norm())
        step_with(optimizer, params, [grad.to(dtype)])
        assert torch.isfinite(optimizer.state[params[0]]["momentum_buffer"]).all()
        assert torch.isfinite(params[0]).all()


def test_without_the_bound_the_paper_s_rule_would_blow_up_where_this_one_does_not():
    grad = torch.tensor([3.0, 0.0])
    unbounded = torch.zeros(2)
    params = [nn.Parameter(torch.zeros(2))]
    optimizer = DeltaMomentum(params, momentum=0.9, delta_rate=1.0)
    for _ in range(30):
        unbounded = 0.9 * unbounded - (unbounded @ grad) * grad + grad
        step_with(optimizer, params, [grad])
    assert unbounded.norm() > 1e20
    assert optimizer.state[params[0]]["momentum_buffer"].norm() < 3 / (1 - 0.9)


@pytest.mark.parametrize("rate", [0.0, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("normalized", [False, True])
def test_p_squared_descends_from_four(rate, normalized):
    p = nn.Parameter(torch.tensor([4.0]))
    optimizer = DeltaMomentum([p], lr=0.1, delta_rate=rate, normalized=normalized)
    trace = []
    for _ in range(200):
        p.grad = 2 * p.detach()
        optimizer.step()
        trace.append(abs(p.item()))
    assert trace[0] < 4 and trace[1] < trace[0] and trace[-1] < 0.01


def test_zero_gradients_decay_the_buffer_and_make_no_nan():
    params = make_params(*SHAPES)
    optimizer = DeltaMomentum(params, momentum=0.5)
    step_with(optimizer, params, [torch.ones_like(p) for p in params])
    step_with(optimizer, params, [torch.zeros_like(p) for p in params])
    for p in params:
        buf = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(buf, torch.full_like(buf, 0.5))


# ---------------------------------------------------------------------- narrower products

PRODUCTS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 300), (7,), ()], ids=str)
def test_narrower_products_round_the_term_and_stay_in_range(product, scale, normalized, shape):
    torch.manual_seed(0)
    buf, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    buf, grad = map(rules.as_matrix, (scale * buf, scale * grad))
    options = {"rate": 0.7, "momentum": 0.9, "normalized": normalized}
    exact = rules.delta_term(buf, grad, **options)
    term = rules.delta_term(buf, grad, **options, product_dtype=getattr(torch, product))
    assert term.dtype == buf.dtype
    assert (term - exact).norm() <= PRODUCTS[product] * exact.norm()
    if scale == 1.0:  # float32 buffers, whose squares leave their range above
        term = rules.delta_term(
            buf.float(), grad.float(), **options, product_dtype=getattr(torch, product)
        )
        assert (term - exact).norm() <= max(PRODUCTS[product], 1e-5) * exact.norm()
        assert term.dtype == torch.float32


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_of_a_gradient_with_one_element_stay_in_range(product):
    """The largest elements that a norm of 1 leaves room for."""
    buf, grad = torch.zeros(40, 1000), torch.zeros(40, 1000)
    buf[3, 5], grad[3, 5] = 7.0, 1e10
    term = rules.delta_term(
        buf, grad, rate=1.0, momentum=0.9, product_dtype=getattr(torch, product)
    )
    assert term[3, 5].item() == pytest.approx(0.9 * 7.0, rel=max(PRODUCTS[product], 1e-6))
    assert int((term != 0).sum()) == 1


@pytest.mark.parametrize("name", ["bfloat16", "torch"])
def test_the_products_dtype_is_kept_by_its_name(name):
    params = make_params((4, 3))
    dtype = torch.bfloat16 if name == "torch" else name
    optimizer = DeltaMomentum(params, product_dtype=dtype)
    assert optimizer.param_groups[0]["product_dtype"] == "bfloat16"
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    twins = clone_params(params)
    other = DeltaMomentum(twins)
    with pytest.warns(UserWarning, match="product_dtype"):
        other.load_state_dict(state)
    train(optimizer, params, range(2, 4))
    train(other, twins, range(2, 4))
    assert_same_tensors(twins, params)


@pytest.mark.parametrize(
    "device, dtype, expected",
    [
        ("cuda", torch.float32, torch.bfloat16),
        ("cuda:1", torch.bfloat16, torch.bfloat16),
        ("cuda", torch.float16, torch.bfloat16),
        ("cuda", torch.float64, None),
        ("cuda", torch.complex64, None),
        ("cpu", torch.float32, None),
        ("cpu", torch.bfloat16, None),
    ],
)
def test_products_are_in_bfloat16_on_cuda_by_default(device, dtype, expected):
    buf = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert default_product_dtype(buf) == expected


@pytest.mark.parametrize("foreach", [False, True])
def test_on_a_cpu_products_are_in_the_buffer_s_dtype_by_default(foreach):
    results = []
    for product_dtype in (None, torch.bfloat16):
        params = make_params((6, 5), (5, 6), dtype=torch.float64)
        train(DeltaMomentum(params, foreach=foreach, product_dtype=product_dtype), params, range(3))
        results.append([p.detach() for p in params])
    params = make_params((6, 5), (5, 6), dtype=torch.float64)
    bufs = [torch.zeros_like(p) for p in params]
    kept = [p.detach() for p in params]
    for seed in range(3):
        for i, g in enumerate(random_grads(params, seed)):
            kept[i], bufs[i] = rules.delta_momentum(
                kept[i], g, bufs[i], lr=1e-3, momentum=0.9, delta_rate=1.0
            )
    torch.testing.assert_close(results[0], kept, rtol=1e-12, atol=1e-12)
    assert not torch.equal(results[1][0], kept[0])


def test_every_path_takes_the_products_dtype():
    results = []
    for options in (
        {"foreach": True},
        {"foreach": False},
        {"foreach": False, "product_dtype": None},
    ):
        params = make_params(*SHAPES)
        optimizer = DeltaMomentum(params, lr=0.1, **{"product_dtype": "bfloat16", **options})
        train(optimizer, params, range(4))
        results.append([p.detach() for p in params])
    assert_same_tensors(results[0], results[1])
    assert not torch.equal(results[1][0], results[2][0])
    torch.testing.assert_close(results[1], results[2], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("edit", ["bfloat16", "int32", "float8_e5m2"])
def test_products_that_a_step_cannot_take_are_refused_before_anything_changes(edit):
    params = make_params((3, 2), dtype=torch.complex64)
    optimizer = DeltaMomentum(params, product_dtype="float64")
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["product_dtype"] = edit
    set_grads(params, random_grads(params, 2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"is complex|Invalid product_dtype"):
        optimizer.step()
    assert_unchanged(optimizer, before)


# ---------------------------------------------------------------------- paths, windows, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("batch_elements", [1, 48, 10_000])
def test_batched_products_are_the_rule_s(batch_elements, dtype):
    """What an accelerator runs: stacks of one shape, split where they would be too large."""
    params = make_params((6, 4), (6, 4), (4, 6), (6, 4), (4, 6), (3, 2, 4), (7,), (7,), (0, 3), ())
    grads = [g.to(dtype) for g in random_grads(params, 0)]
    bufs = [b.to(dtype) for b in random_grads(params, 1)]
    group = {"delta_rate": 0.5, "momentum": 0.9, "normalized": False, "product_dtype": None}
    found = nested_optim.delta_momentum._delta_terms(bufs, grads, group, batch_elements)
    for buf, grad, term in zip(bufs, grads, found, strict=True):
        alone = rules.delta_term(
            rules.as_matrix(buf), rules.as_matrix(grad), rate=0.5, momentum=0.9
        ).reshape(buf.shape)
        assert term.shape == buf.shape
        tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(term, alone, **tolerance)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (4,), ()], ids=str)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("product_dtype", [None, torch.float64])
def test_gradients_through_the_rule_agree_with_finite_differences(shape, normalized, product_dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def update(param, grad, buf, lr):
        options = {"momentum": 0.9, "delta_rate": 0.8, "normalized": normalized}
        options["product_dtype"] = product_dtype
        return tuple(rules.delta_momentum(param, grad, buf, lr=lr, weight_decay=0.1, **options))

    assert torch.autograd.gradcheck(update, (*tensors, lr))


@pytest.mark.parametrize("decoupled", [False, True])
def test_nothing_given_to_the_rule_is_written_to(decoupled):
    tensors = [torch.randn(4, 3) for _ in range(3)]
    before = [t.clone() for t in tensors]
    rules.delta_momentum(
        *tensors,
        lr=0.1,
        momentum=0.9,
        delta_rate=1.0,
        weight_decay=0.1,
        maximize=True,
        decoupled=decoupled,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))


def test_a_window_is_one_update_on_its_mean():
    params, reference = make_params(*SHAPES), make_params(*SHAPES)
    windowed = DeltaMomentum(params, lr=0.1, frequency=3)
    plain = DeltaMomentum(reference, lr=0.1)
    for start in range(0, 9, 3):
        grads = [random_grads(params, seed) for seed in range(start, start + 3)]
        for given_grads in grads:
            step_with(windowed, params, given_grads)
        mean = [(a + b + c) / 3 for a, b, c in zip(*grads)]
        step_with(plain, reference, mean)
    assert_same_tensors(params, reference)


@pytest.mark.parametrize("stop", [1, 2, 4])
@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.float32, {"capturable": True}),
        (torch.bfloat16, {"state_dtype": torch.float32}),
        (torch.complex64, {"normalized": True}),
    ],
    ids=str,
)
def test_resuming_inside_a_window_is_never_having_stopped(dtype, options, stop):
    params = make_params(*SHAPES, dtype=dtype)
    optimizer = DeltaMomentum(params, lr=0.05, frequency=3, **options)
    train(optimizer, params, range(stop))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_params = clone_params(params)
    resumed = DeltaMomentum(resumed_params, lr=0.05, frequency=3, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, params, range(stop, 10))
    train(resumed, resumed_params, range(stop, 10))
    assert_same_tensors(resumed_params, params)
    assert_same_state(resumed, optimizer)


def test_capturable_windows_close_as_the_others_do():
    params, reference = make_params(*SHAPES), make_params(*SHAPES)
    optimizer = DeltaMomentum(params, lr=0.1, frequency=2, capturable=True)
    plain = DeltaMomentum(reference, lr=0.1, frequency=2)
    for seed in range(6):
        for ps, optim in ((params, optimizer), (reference, plain)):
            step_with(optim, ps, random_grads(ps, seed))
    for p, q in zip(params, reference):
        torch.testing.assert_close(p, q)
        assert optimizer.state[p]["step"] == plain.state[q]["step"] == 3


def test_float32_state_of_bfloat16_parameters_is_rounded_once():
    (param,) = params = make_params((8, 8), dtype=torch.bfloat16)
    start = param.detach().float()
    optimizer = DeltaMomentum(params, lr=0.1, state_dtype=torch.float32)
    wide = rules.delta_momentum(
        start, random_grads(params, 0)[0].float(), torch.zeros(8, 8), lr=0.1, momentum=0.9,
        delta_rate=1.0,
    )  # fmt: skip
    train(optimizer, params, [0])
    assert torch.equal(param.detach(), wide.param.bfloat16())
    assert torch.equal(optimizer.state[param]["momentum_buffer"], wide.momentum_buffer)


def test_state_has_one_buffer_and_the_keys_of_the_first_step():
    params = make_params(*SHAPES)
    optimizer = DeltaMomentum(params)
    train(optimizer, params, range(1))
    keys = {"step", "window_count", "momentum_buffer"}
    assert all(set(optimizer.state[p]) == keys for p in params)
    train(optimizer, params, range(1, 4))
    assert all(set(optimizer.state[p]) == keys for p in params)


@pytest.mark.parametrize("edit", [{"fused": True}, {"foreach": True, "lr": torch.tensor(0.1)}])
def test_edits_that_a_step_cannot_follow_are_refused_before_anything_changes(edit):
    params = make_params((3, 2))
    optimizer = DeltaMomentum(params)
    train(optimizer, params, range(2))
    optimizer.param_groups[0].update(edit)
    set_grads(params, random_grads(params, 2))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"leave (`fused`|foreach) at None"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_equals_the_eager_one():
    torch._dynamo.reset()
    params, compiled_params = make_params((4, 3), (5,)), make_params((4, 3), (5,))
    optimizer = DeltaMomentum(params, lr=0.05, frequency=2)
    compiled = DeltaMomentum(compiled_params, lr=0.05, frequency=2)
    step = torch.compile(compiled.step, backend="eager")
    for seed in range(7):
        train(optimizer, params, [seed])
        set_grads(compiled_params, random_grads(compiled_params, seed))
        step()
    for p, q in zip(params, compiled_params):
        torch.testing.assert_close(p, q)


def test_a_small_model_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    inputs, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 3
    optimizer = DeltaMomentum(model.parameters(), lr=0.1, normalized=True)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
