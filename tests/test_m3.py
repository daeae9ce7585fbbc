"""M3's usable form: against Muon, in size and scale, on hard gradients; and its errors."""

import math

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Muon
from torch.optim.lr_scheduler import LambdaLR

from nested_optim import rules

from .helpers import (
    assert_same_tensors,
    assert_unchanged,
    clone_params,
    make_params,
    random_grads,
    set_grads,
    slow_m3,
    snapshot,
    step_with,
    train,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
QUINTIC = rules.ns_schedule("quintic", 5)


def trained(params, seeds, **options):
    optimizer = slow_m3(params, **options)
    train(optimizer, params, seeds)
    return optimizer


# ---------------------------------------------------------------------------- the usable form

MUON_SHAPES = ((8, 5), (5, 8), (16, 64), (16, 64), (7, 7), (1, 6), (6, 1))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("adjust_lr, theirs", [("original", None), ("match_rms_adamw",) * 2])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_without_a_slow_momentum_it_is_torchs_muon_to_the_last_bit(
    foreach, dtype, adjust_lr, theirs, nesterov, tensor_lr
):
    if foreach and tensor_lr:
        pytest.skip("as elsewhere, foreach takes a tensor lr with capturable only")
    if dtype == BF16 and not nesterov:
        pytest.skip("torch then normalises the momentum buffer itself, in place")
    if dtype == BF16 and tensor_lr:
        pytest.skip("products are rounded in another order, by an ulp of bfloat16")
    params = make_params(*MUON_SHAPES, dtype=dtype)
    twins = clone_params(params)
    start = [p.detach().clone() for p in params]
    lr = torch.tensor(0.02) if tensor_lr else 0.02
    common = {"lr": lr, "weight_decay": 0.1, "nesterov": nesterov, "eps": 1e-7}
    ours = slow_m3(
        params,
        alpha=0.0,
        betas=(0.9, 0.0, 0.0),
        adjust_lr=adjust_lr,
        ns_dtype=BF16,
        foreach=foreach,
        **common,
    )
    muon = Muon(twins, momentum=0.9, adjust_lr_fn=theirs, **common)
    for seed in range(6):
        grads = random_grads(params, seed)
        step_with(ours, params, grads)
        step_with(muon, twins, grads)
        if tensor_lr:  # torch multiplies as numbers what is here multiplied as tensors
            for p, q, s in zip(params, twins, start):
                assert (p - q).float().norm() <= 1e-5 * (q - s).float().norm()
        else:
            assert_same_tensors(params, twins)
    assert set(ours.state[params[0]]) == {"step", "window_count", "momentum_buffer"}


def test_the_slow_momentum_averages_chunks():
    params = make_params((6, 9), dtype=F64)
    optimizer = slow_m3(params, slow_frequency=4, betas=(0.9, 0.9, 0.7), alpha=0.5)
    expected = torch.zeros(6, 9, dtype=F64)
    seen = []
    for seed in range(12):
        [grad] = random_grads(params, seed)
        seen.append(grad)
        step_with(optimizer, params, [grad])
        if len(seen) % 4 == 0:
            expected = 0.7 * expected + 0.3 * torch.stack(seen[-4:]).mean(0)
            state = optimizer.state[params[0]]
            torch.testing.assert_close(state["slow_momentum_buffer"], expected)
            orthogonal = rules.newton_schulz(expected, QUINTIC, 1e-8)
            torch.testing.assert_close(state["slow_update"], orthogonal)


@pytest.mark.parametrize("foreach", [False, True])
def test_a_fresh_slow_update_serves_from_the_next_update_on(foreach):
    params, twins = (make_params((6, 9), (6, 9)) for _ in range(2))
    slow = slow_m3(params, slow_frequency=3, alpha=0.5, foreach=foreach)
    none = slow_m3(twins, alpha=0.0, foreach=foreach)
    for seed in range(4):
        grads = random_grads(params, seed)
        step_with(slow, params, grads)
        step_with(none, twins, grads)
        if seed < 3:
            torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-8)
            assert bool(slow.state[params[0]]["slow_update"].any()) == (seed == 2)
    assert not torch.allclose(params[0], twins[0], rtol=1e-3)


@pytest.mark.parametrize("second_moment", [None, "row", "element"])
@pytest.mark.parametrize("foreach", [False, True])
def test_the_update_has_the_size_of_muons_whatever_is_added_or_divided(foreach, second_moment):
    params = make_params((8, 20), (20, 8), dtype=F64)
    optimizer = slow_m3(
        params,
        lr=0.1,
        alpha=0.8,
        slow_frequency=2,
        weight_decay=0.0,
        second_moment=second_moment,
        foreach=foreach,
    )
    for seed in range(7):
        grads = random_grads(params, seed)
        before = [p.detach().clone() for p in params]
        momenta = [optimizer.state[p].get("momentum_buffer", 0 * p.detach()) for p in params]
        fasts = [0.05 * g + 0.95 * (0.95 * m + 0.05 * g) for g, m in zip(grads, momenta)]
        step_with(optimizer, params, grads)
        for p, old, fast in zip(params, before, fasts):
            muon = rules.newton_schulz(fast, QUINTIC, 1e-8).norm() * 0.1 * 0.2 * math.sqrt(20)
            torch.testing.assert_close((p.detach() - old).norm(), muon)


def test_the_second_moment_evens_out_rows_or_elements():
    torch.manual_seed(0)
    directions = {}
    fast = rules.newton_schulz(torch.randn(1, 6, 40, dtype=F64), ((1.5, -0.5, 0.0),) * 3)
    for name, shape in (("row", (1, 6, 1)), ("element", (1, 6, 40))):
        second = torch.zeros(shape, dtype=F64)
        direction, ratio, second = rules.m3_direction(
            fast, None, second, alpha=0.0, beta2=0.9, eps=0.0
        )
        directions[name] = ratio * direction
        squares = fast.square().mean(-1, keepdim=True) if name == "row" else fast.square()
        torch.testing.assert_close(second, 0.1 * squares)
    rows = directions["row"].norm(dim=-1)
    torch.testing.assert_close(rows, rows.mean().expand_as(rows))
    sizes = directions["element"].abs()
    torch.testing.assert_close(sizes, sizes.mean().expand_as(sizes))


OPTIONS = [{}, {"second_moment": "row"}, {"second_moment": "element", "nesterov": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_the_scale_of_gradients_does_not_matter(foreach, options):
    def run(scale):
        params = make_params((16, 24), (24, 16), (12, 12))
        optimizer = slow_m3(params, slow_frequency=3, foreach=foreach, **options)
        for seed in range(8):
            step_with(optimizer, params, [scale * g for g in random_grads(params, seed)])
        return params

    plain = run(1.0)
    assert_same_tensors(run(2.0**-20), plain)
    assert_same_tensors(run(2.0**10), plain)
    for scale in (1e-2, 1e-4):
        torch.testing.assert_close(run(scale), plain, rtol=1e-5, atol=1e-6)


def test_the_scale_of_gradients_does_not_matter_in_bfloat16_either():
    def run(scale):
        params = make_params((16, 24), (12, 12), dtype=BF16)
        optimizer = slow_m3(params, lr=0.01, slow_frequency=3, ns_dtype=BF16)
        for seed in range(8):
            step_with(optimizer, params, [scale * g for g in random_grads(params, seed)])
        return params

    plain = run(1.0)
    assert_same_tensors(run(2.0**-20), plain)
    start = make_params((16, 24), (12, 12), dtype=BF16)
    for p, q, s in zip(run(1e-4), plain, start):
        moved = (q - s).float().norm()
        assert (p - q).float().norm() < 0.2 * moved


def ill_conditioned():
    u, _, vh = torch.linalg.svd(torch.randn(20, 30, dtype=F64), full_matrices=False)
    return ((u * torch.logspace(0, -6, 20, dtype=F64)) @ vh).float()


HARD = {
    "zeros": lambda: torch.zeros(20, 30),
    "of rank one": lambda: torch.randn(20, 1) @ torch.randn(1, 30),
    "of condition 1e6": ill_conditioned,
    "all equal": lambda: torch.ones(20, 30),
    "tiny": lambda: 1e-30 * torch.randn(20, 30),
    "huge": lambda: 1e15 * torch.randn(20, 30),
    "a row": lambda: torch.randn(1, 30),
    "a column": lambda: torch.randn(30, 1),
    "one number": lambda: torch.randn(1, 1),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("second_moment", [None, "row", "element"])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", HARD)
def test_hard_gradients_are_survived(kind, foreach, second_moment, dtype):
    torch.manual_seed(0)
    shape = HARD[kind]().shape
    p = Parameter(torch.randn(shape).to(dtype))
    start = p.detach().clone()
    optimizer = slow_m3(
        [p], lr=0.1, slow_frequency=2, second_moment=second_moment, foreach=foreach,
        weight_decay=0.0,
    )  # fmt: skip
    for _ in range(6):
        p.grad = HARD[kind]().to(dtype)
        optimizer.step()
        assert torch.isfinite(p).all()
        assert all(torch.isfinite(v).all() for v in optimizer.state[p].values())
    moved = (p.detach() - start).float().norm()
    # Six updates of at most lr times 0.2 sqrt(max side) times the largest norm of a result.
    assert moved <= 6 * 0.1 * 0.2 * math.sqrt(max(shape)) * 1.3 * math.sqrt(min(shape))
    if kind == "tiny":  # its norm is below eps
        assert moved < 1e-6
    else:
        assert (moved == 0) == (kind == "zeros")


def test_a_zero_gradient_after_others_keeps_moving_along_the_momentum():
    params = make_params((6, 8))
    optimizer = slow_m3(params)
    train(optimizer, params, range(3))
    before = params[0].detach().clone()
    step_with(optimizer, params, [torch.zeros(6, 8)])
    assert not torch.equal(params[0], before) and torch.isfinite(params[0]).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_fits_a_linear_map(options):
    torch.manual_seed(0)
    wanted, inputs = torch.randn(12, 20), torch.randn(64, 20)
    weight = Parameter(torch.zeros(12, 20))
    optimizer = slow_m3([weight], lr=0.3, weight_decay=0.0, **options)
    schedule = LambdaLR(optimizer, lambda t: 1 - t / 150)
    losses = []
    for _ in range(150):
        loss = (inputs @ (weight - wanted).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"algorithm": "muon"}, "Invalid algorithm: 'muon'.*m3, adamw"),
        ({"mode": "exact"}, "Invalid mode: 'exact'.*ema, paper"),
        ({"alpha": -0.1}, "Invalid alpha value: -0.1"),
        ({"alpha": float("nan")}, "Invalid alpha value: nan"),
        ({"slow_frequency": 0}, "slow_frequency: Invalid frequency: 0"),
        ({"ns_steps": 0}, "Invalid ns_steps: 0.*nothing is orthogonalised"),
        ({"ns_steps": 2.5}, "Invalid ns_steps: 2.5"),
        ({"ns_steps": 100}, "Invalid ns_steps: 100"),
        ({"ns_coefficients": "best"}, "Invalid ns_coefficients: 'best'.*quintic"),
        ({"second_moment": "column"}, "Invalid second_moment: 'column'.*row, element"),
        ({"adjust_lr": "muon"}, "Invalid adjust_lr: 'muon'.*match_rms_adamw"),
        ({"out_dim": 2}, "Invalid out_dim: 2"),
        ({"flatten": "yes"}, "Invalid flatten: 'yes'"),
        ({"split_sizes": (2, -1)}, "Invalid split_sizes"),
        ({"split_sizes": (2, 3)}, r"parameter 0 of shape \(4, 6\) has 4 outputs.*add up to 5"),
        ({"num_heads": 0}, "Invalid num_heads: 0"),
        ({"num_heads": 3}, "not divisible in 3 heads"),
        ({"ns_dtype": "int8"}, "Invalid ns_dtype: 'int8'"),
        ({"max_batch_bytes": 0}, "Invalid max_batch_bytes: 0"),
        ({"amsgrad": True}, "amsgrad=True is AdamW's"),
        ({"decoupled": False}, "decoupled=False would orthogonalise"),
        ({"mode": "paper", "fused": True}, "leave foreach, capturable and fused off"),
        ({"betas": (0.9, 0.9, 1.0)}, "Invalid beta parameter at index 2"),
        ({"betas": (torch.tensor(0.9), 0.9, 0.9)}, r"betas\[0\] as a Tensor is not supported"),
    ],
    ids=str,
)
def test_an_option_that_is_wrong_is_refused_with_what_would_be_right(options, message):
    with pytest.raises(ValueError, match=message):
        slow_m3(make_params((4, 6)), **options)
    with pytest.raises(ValueError, match=f"param group 1.*{message}"):
        first, second = make_params((2, 2), (4, 6))
        slow_m3([{"params": [first]}, {"params": [second], **options}])


@pytest.mark.parametrize(
    "shape, message",
    [
        ((5,), "no rows and columns.*algorithm='adamw'.*matrix_groups"),
        ((), "no rows and columns"),
        ((3, 4, 5), "flatten=False or flatten=True"),
    ],
)
def test_what_is_no_matrix_is_refused_by_name_before_anything_has_changed(shape, message):
    [p] = make_params(shape)
    with pytest.raises(ValueError, match=f"param group 0.*parameter 'layer.x' of shape.*{message}"):
        slow_m3([("layer.x", p)])
    optimizer = slow_m3(make_params((2, 2)))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [p]})
    assert_unchanged(optimizer, before)


def test_complex_matrices_are_refused():
    with pytest.raises(ValueError, match="is complex, which M3 does not support"):
        slow_m3(make_params((3, 4), dtype=torch.complex64))


def test_options_edited_to_what_a_step_cannot_do_are_refused_before_it():
    params = make_params((4, 6))
    optimizer = trained(params, range(2), second_moment="row")
    set_grads(params, random_grads(params, 2))
    for key, wrong in (
        ("alpha", -1.0), ("slow_frequency", 0), ("ns_steps", 0), ("second_moment", "columns"),
        ("second_moment", "element"),
    ):  # fmt: skip
        right = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = wrong
        before = snapshot(optimizer)
        with pytest.raises((ValueError, RuntimeError), match=key):
            optimizer.step()
        assert_unchanged(optimizer, before)
        optimizer.param_groups[0][key] = right
    optimizer.step()


def test_edits_are_checked_however_often_the_options_were_right_before():
    params = make_params((4, 6))
    optimizer = trained(params, range(3), ns_coefficients=[(2.0, -1.5, 0.5)] * 5)
    group = optimizer.param_groups[0]
    rates = torch.tensor([0.1]).reshape(())
    for key, right, wrong in (
        ("lr", 0.3, -0.1), ("weight_decay", 0.2, -0.2), ("betas", (0.9, 0.9, 0.9), (1, 2)),
        ("split_sizes", [2, 2], [2, -2]), ("lr", rates, rates.neg()),
    ):  # fmt: skip
        before = group[key]
        for value in (right, right, wrong):
            if isinstance(group[key], list) and isinstance(value, list):
                group[key][:] = value  # the very same object
            elif isinstance(group[key], torch.Tensor) and isinstance(value, torch.Tensor):
                group[key].copy_(value.clone())
            else:
                group[key] = value
            set_grads(params, random_grads(params, 2))
            if value is not wrong:
                optimizer.step()
                continue
            held = snapshot(optimizer)
            with pytest.raises((ValueError, RuntimeError)):
                optimizer.step()
            assert_unchanged(optimizer, held)
        group[key] = before
    optimizer.step()


def test_kernels_that_are_asked_for_where_there_are_none_are_refused_at_the_first_step():
    params = make_params((4, 6))
    optimizer = slow_m3([("layer.weight", params[0])], fused=True)
    set_grads(params, random_grads(params, 0))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"needs Triton and a CUDA device.*'layer.weight'.*cpu"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_p_squared_in_a_matrix_descends_as_sgd_would():
    """The sign is right: from the same point both go down."""
    p, q = Parameter(torch.full((2, 3), 4.0)), Parameter(torch.full((2, 3), 4.0))
    for optimizer, x in ((slow_m3([p], lr=0.5), p), (SGD([q], lr=0.1), q)):
        for _ in range(10):
            x.grad = 2 * x.detach()
            optimizer.step()
    assert (p < 4).all() and (q < 4).all()
