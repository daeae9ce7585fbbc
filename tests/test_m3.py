"""M3: Algorithm 1 by hand, the usable form against Muon and against itself, shapes, resuming."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from nested_optim import M3, NestedOptimizer, rules

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

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
QUINTIC = rules.ns_schedule("quintic", 5)


def trained(params, seeds, **options):
    optimizer = M3(params, **options)
    train(optimizer, params, seeds)
    return optimizer


# ---------------------------------------------------------------------------- Algorithm 1

PAPER = {"mode": "paper", "ns_steps": 0, "eps": 0.0, "weight_decay": 0.0}


def test_the_papers_algorithm_by_hand():
    """Two numbers, chunks of two: first and second step, boundary, the slow term in the next."""
    p = Parameter(torch.tensor([1.0, -2.0], dtype=F64))
    b1, b2, b3, alpha, lr = 0.5, 0.25, 2.0, 3.0, 0.1
    options = {**PAPER, "betas": (b1, b2, b3), "alpha": alpha, "slow_frequency": 2, "lr": lr}
    optimizer = M3([p], **options)
    grads = torch.tensor([[2.0, 1.0], [-1.0, 4.0], [3.0, 2.0], [1.0, 1.0], [5.0, -6.0]], dtype=F64)
    expected = p.detach().clone()
    sums, squares = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
    slow = torch.zeros(2, dtype=F64)
    by_hand = []
    for t, grad in enumerate(grads, start=1):
        sums, squares = sums + grad, squares + grad**2
        expected = expected - lr * (b1 * sums + alpha * slow) / (b2 * squares).sqrt()
        if t % 2 == 0:
            slow = b3 * sums
        by_hand.append(expected)
        step_with(optimizer, [p], [grad])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=0)
    # The first two in full: nothing of the slow term is in them.
    torch.testing.assert_close(by_hand[0], torch.tensor([1.0 - 0.1, -2.0 - 0.1], dtype=F64))
    second = [0.9 - 0.1 * 0.5 / (0.25 * 5) ** 0.5, -2.1 - 0.1 * 2.5 / (0.25 * 17) ** 0.5]
    torch.testing.assert_close(by_hand[1], torch.tensor(second, dtype=F64))
    third = second[0] - 0.1 * (0.5 * 4 + 3 * 2 * 1) / (0.25 * 14) ** 0.5
    assert by_hand[2][0].item() == pytest.approx(third)
    state = optimizer.state[p]
    torch.testing.assert_close(state["momentum_buffer"], b1 * sums)
    torch.testing.assert_close(state["slow_momentum_buffer"], b3 * grads.sum(0))
    torch.testing.assert_close(state["slow_update"], b3 * grads[:4].sum(0))
    assert (state["step"].item(), state["slow_count"].item()) == (5, 1)


class LiteralAlgorithm1:
    """The algorithm as it is printed, with the chunk's gradients in a list."""

    def __init__(self, theta, lr, betas, alpha, frequency, eps, steps):
        self.theta, self.lr, self.betas, self.alpha = theta.clone(), lr, betas, alpha
        self.frequency, self.eps, self.schedule = frequency, eps, rules.ns_schedule("cubic", steps)
        self.m1, self.m2, self.v, self.o2 = (torch.zeros_like(theta) for _ in range(4))
        self.t, self.chunk = 0, []

    def step(self, grad):
        b1, b2, b3 = self.betas
        if self.t and self.t % self.frequency == 0:
            self.m2 = self.m2 + b3 * torch.stack(self.chunk).sum(0)
            self.o2 = rules.newton_schulz(self.m2, self.schedule, self.eps)
            self.chunk = []
        self.m1 = self.m1 + b1 * grad
        self.v = self.v + b2 * grad * grad
        o1 = rules.newton_schulz(self.m1, self.schedule, self.eps)
        self.theta = self.theta - self.lr * (o1 + self.alpha * self.o2) / (self.v.sqrt() + self.eps)
        self.chunk.append(grad)
        self.t += 1


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)], ids=str)
def test_the_papers_algorithm_on_matrices_is_the_printed_one(shape):
    [p] = make_params(shape, dtype=F64)
    options = {"lr": 0.1, "betas": (0.7, 0.3, 0.9), "alpha": 0.6, "eps": 1e-6}
    literal = LiteralAlgorithm1(p.detach(), frequency=3, steps=3, **options)
    optimizer = M3(
        [p],
        mode="paper",
        ns_coefficients="cubic",
        ns_steps=3,
        slow_frequency=3,
        weight_decay=0.0,
        **options,
    )
    for seed in range(11):
        [grad] = random_grads([p], seed)
        literal.step(grad)
        step_with(optimizer, [p], [grad])
        torch.testing.assert_close(p.detach(), literal.theta, rtol=1e-12, atol=1e-12)


def test_the_papers_first_step_grows_as_gradients_shrink():
    sizes = []
    for scale in (1.0, 1e-2, 1e-4):
        [p] = make_params((64, 64), dtype=F64)
        start = p.detach().clone()
        optimizer = M3([p], lr=1.0, mode="paper", weight_decay=0.0, eps=1e-12)
        step_with(optimizer, [p], [scale * g for g in random_grads([p], 0)])
        sizes.append((p.detach() - start).abs().median().item())
    assert sizes[1] / sizes[0] == pytest.approx(1e2, rel=1e-6)
    assert sizes[2] / sizes[0] == pytest.approx(1e4, rel=1e-6)


def test_the_papers_slow_term_is_a_stale_copy_of_the_fast_one():
    params = make_params((8, 12), dtype=F64)
    optimizer = M3(params, mode="paper", slow_frequency=4, betas=(0.3, 1.0, 5.0))
    train(optimizer, params, range(4))
    state = optimizer.state[params[0]]
    fast = rules.newton_schulz(state["momentum_buffer"], QUINTIC, 1e-8)
    torch.testing.assert_close(state["slow_update"], fast)


def test_paper_mode_has_its_own_defaults_and_refuses_what_it_has_no_place_for():
    [p] = make_params((3, 4))
    group = M3([p], mode="paper").param_groups[0]
    assert group["betas"] == (1.0, 1.0, 1.0)
    assert (group["second_moment"], group["adjust_lr"], group["nesterov"]) == (
        "element",
        None,
        False,
    )
    for wrong in ({"second_moment": "row"}, {"adjust_lr": "spectral"}, {"nesterov": True}):
        with pytest.raises(ValueError, match="has no place in mode='paper'"):
            M3([{"params": [p], "mode": "paper", **wrong}])
    with pytest.raises(ValueError, match="tensor by tensor"):
        M3([p], mode="paper", foreach=True)
    mixed = M3([{"params": [p], "mode": "paper"}, {"params": make_params((2, 2))}])
    assert [g["betas"] for g in mixed.param_groups] == [(1.0, 1.0, 1.0), (0.95, 0.95, 0.9)]


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
    ours = M3(
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
    optimizer = M3(params, slow_frequency=4, betas=(0.9, 0.9, 0.7), alpha=0.5)
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
    slow = M3(params, slow_frequency=3, alpha=0.5, foreach=foreach)
    none = M3(twins, alpha=0.0, foreach=foreach)
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
    optimizer = M3(
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
        optimizer = M3(params, slow_frequency=3, foreach=foreach, **options)
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
        optimizer = M3(params, lr=0.01, slow_frequency=3, ns_dtype=BF16)
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
    optimizer = M3(
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
    optimizer = M3(params)
    train(optimizer, params, range(3))
    before = params[0].detach().clone()
    step_with(optimizer, params, [torch.zeros(6, 8)])
    assert not torch.equal(params[0], before) and torch.isfinite(params[0]).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_fits_a_linear_map(options):
    torch.manual_seed(0)
    wanted, inputs = torch.randn(12, 20), torch.randn(64, 20)
    weight = Parameter(torch.zeros(12, 20))
    optimizer = M3([weight], lr=0.3, weight_decay=0.0, **options)
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


# ---------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("second_moment", [None, "row", "element"])
@pytest.mark.parametrize("foreach", [False, True])
class TestShapes:
    def pair(self, shape, group, parts, foreach, second_moment, read, rounding=1e-5):
        """One parameter that is read as several, against these as parameters of their own."""
        options = {"lr": 0.05, "slow_frequency": 2, "alpha": 0.5, "foreach": foreach}
        options["second_moment"] = second_moment
        [p] = make_params(shape)
        apart = [Parameter(part.detach().clone()) for part in read(p)]
        assert [tuple(q.shape) for q in apart] == parts
        whole = M3([{"params": [p], **group}], **options)
        single = M3(apart, **options)
        for seed in range(6):
            [grad] = random_grads([p], seed)
            step_with(whole, [p], [grad])
            step_with(single, apart, list(read(grad)))
            for part, q in zip(read(p.detach()), apart, strict=True):
                torch.testing.assert_close(part, q.detach(), rtol=rounding, atol=rounding)
        return whole, p

    def test_projections_are_matrices_of_their_own(self, foreach, second_moment):
        parts = [(4, 9), (2, 9), (2, 9)]
        self.pair(
            (8, 9),
            {"split_sizes": (4, 2, 2)},
            parts,
            foreach,
            second_moment,
            lambda t: t.split([4, 2, 2]),
        )

    def test_heads_are_matrices_of_their_own(self, foreach, second_moment):
        self.pair(
            (8, 9),
            {"split_sizes": (4, 4), "num_heads": (2, 1)},
            [(2, 9), (2, 9), (4, 9)],
            foreach,
            second_moment,
            lambda t: t.split([2, 2, 4]),
        )

    def test_transposed_weights_are_read_by_columns(self, foreach, second_moment):
        # A transposed weight moves as the weight itself does.
        options = {"lr": 0.05, "slow_frequency": 2, "foreach": foreach, "adjust_lr": "spectral"}
        options["second_moment"] = second_moment
        [weight] = make_params((8, 9))
        turned = Parameter(weight.detach().T.contiguous())
        plain = M3([weight], split_sizes=(4, 4), num_heads=2, **options)
        conv1d = M3([turned], split_sizes=(4, 4), num_heads=2, out_dim=1, **options)
        for seed in range(6):
            [grad] = random_grads([weight], seed)
            step_with(plain, [weight], [grad])
            step_with(conv1d, [turned], [grad.T.contiguous()])
        torch.testing.assert_close(turned.detach().T, weight.detach(), rtol=1e-5, atol=1e-5)

    def test_experts_are_a_batch(self, foreach, second_moment):
        self.pair(
            (3, 6, 9),
            {"flatten": False},
            [(6, 9)] * 3,
            foreach,
            second_moment,
            lambda t: t.unbind(),
        )

    @pytest.mark.parametrize("shape, flatten", [((6, 2, 3, 3), None), ((6, 4, 3), True)])
    def test_convolutions_are_flattened(self, shape, flatten, foreach, second_moment):
        columns = math.prod(shape[1:])
        self.pair(
            shape,
            {"flatten": flatten},
            [(6, columns)],
            foreach,
            second_moment,
            lambda t: [t.reshape(6, columns)],
        )

    def test_a_convolution_in_channels_last_moves_as_any_other(self, foreach, second_moment):
        options = {"lr": 0.05, "slow_frequency": 2, "foreach": foreach}
        options["second_moment"] = second_moment
        [plain] = make_params((6, 2, 3, 3))
        last = Parameter(plain.detach().clone(memory_format=torch.channels_last))
        optimizers = M3([plain], **options), M3([last], **options)
        for seed in range(5):
            grads = random_grads([plain], seed)
            step_with(optimizers[0], [plain], grads)
            grads[0] = grads[0].to(memory_format=torch.channels_last)
            step_with(optimizers[1], [last], grads)
        torch.testing.assert_close(plain.detach(), last.detach(), rtol=1e-5, atol=1e-5)
        assert last.is_contiguous(memory_format=torch.channels_last)


def test_state_of_another_memory_format_goes_on_as_it_was():
    options = {"lr": 0.05, "slow_frequency": 2, "second_moment": "element", "foreach": True}
    [plain] = make_params((6, 2, 3, 3))
    last = Parameter(plain.detach().clone(memory_format=torch.channels_last))
    optimizer = M3([last], **options)
    grads = [random_grads([plain], seed) for seed in range(8)]
    for seed in range(3):
        step_with(optimizer, [last], grads[seed])
    with torch.no_grad():
        plain.copy_(last)
    resumed = M3([plain], **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not resumed.state[plain]["slow_update"].is_contiguous()
    for seed in range(3, 8):
        step_with(optimizer, [last], grads[seed])
        step_with(resumed, [plain], grads[seed])
    torch.testing.assert_close(plain.detach(), last.detach(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- levels, phases


def test_chunks_count_the_groups_own_updates():
    params = make_params((6, 9), dtype=F64)
    optimizer = M3(params, frequency=3, slow_frequency=2, betas=(0.9, 0.9, 0.0))
    grads = [random_grads(params, seed)[0] for seed in range(6)]
    for t, grad in enumerate(grads, start=1):
        step_with(optimizer, params, [grad])
        if t == 3:
            assert optimizer.state[params[0]]["slow_count"].item() == 1
    state = optimizer.state[params[0]]
    means = torch.stack([torch.stack(grads[:3]).mean(0), torch.stack(grads[3:]).mean(0)])
    torch.testing.assert_close(state["slow_momentum_buffer"], means.mean(0))
    assert (state["step"].item(), state["slow_count"].item()) == (2, 0)


def test_a_parameter_without_a_gradient_keeps_its_chunk():
    first, second = make_params((4, 5), (4, 5))
    optimizer = M3([first, second], slow_frequency=4)
    for seed in range(6):
        grads = random_grads([first, second], seed)
        step_with(optimizer, [first, second], [grads[0], grads[1] if seed % 2 else None])
    counts = [optimizer.state[p]["slow_count"].item() for p in (first, second)]
    assert counts == [2, 3]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("second_moment", [None, "row", "element"])
@pytest.mark.parametrize("done", [1, 5, 8])
def test_resuming_within_a_window_and_a_chunk_is_never_having_stopped(done, second_moment, foreach):
    def build(params):
        matrices = {"params": params[:2], "frequency": 2, "slow_frequency": 3}
        matrices |= {"second_moment": second_moment, "alpha": 0.5}
        rest = {"params": params[2:], "algorithm": "adamw", "frequency": 3}
        return M3([matrices, rest], foreach=foreach)

    params = make_params((6, 9), (9, 6), (5,), (3, 4))
    optimizer = build(params)
    train(optimizer, params, range(done))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = clone_params(params)
    resumed = build(twins)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(done, done + 15):
        for one, its in ((optimizer, params), (resumed, twins)):
            train(one, its, [seed])
        assert_same_tensors(params, twins)
    assert_same_state(optimizer, resumed)


def test_a_slow_momentum_may_begin_and_end_in_mid_run():
    params, twins = (make_params((6, 9)) for _ in range(2))
    optimizer = trained(params, range(3), alpha=0.0, slow_frequency=2)
    assert "slow_momentum_buffer" not in optimizer.state[params[0]]
    optimizer.param_groups[0]["alpha"] = 0.5
    train(optimizer, params, range(3, 5))
    assert optimizer.state[params[0]]["slow_update"].any()
    optimizer.param_groups[0]["alpha"] = 0.0
    before = optimizer.state[params[0]]["slow_update"].clone()
    train(optimizer, params, range(5, 9))
    assert torch.equal(optimizer.state[params[0]]["slow_update"], before)
    del twins


def test_a_step_that_only_makes_state_leaves_chunks_as_they_are():
    [p] = make_params((4, 6))
    optimizer = M3([p], lr=0.0, slow_frequency=3)
    start = p.detach().clone()
    step_with(optimizer, [p], [torch.zeros(4, 6)])
    state = optimizer.state[p]
    assert set(state) == {
        "step", "window_count", "momentum_buffer", "slow_momentum_buffer", "slow_update",
        "slow_count",
    }  # fmt: skip
    assert (state["step"].item(), state["slow_count"].item()) == (1, 0)
    assert torch.equal(p.detach(), start)


def test_counting_on_the_device_is_counting_on_the_host():
    params = make_params((6, 9), (6, 9), (9, 4))
    twins = clone_params(params)
    options = {"slow_frequency": 3, "alpha": 0.5, "frequency": 2, "second_moment": "row"}
    on_host = M3(params, **options)
    on_device = M3(twins, capturable=True, foreach=True, **options)
    loop_params = clone_params(params)
    loop = M3(loop_params, capturable=True, foreach=False, **options)
    for seed in range(20):
        for optimizer, its in ((on_host, params), (on_device, twins), (loop, loop_params)):
            train(optimizer, its, [seed])
        torch.testing.assert_close(twins, params, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loop_params, params, rtol=1e-5, atol=1e-6)
    for optimizer, its in ((on_device, twins), (loop, loop_params)):
        for key in ("step", "window_count", "slow_count"):
            assert optimizer.state[its[0]][key] == on_host.state[params[0]][key], key


def test_a_compiled_training_step_does_what_the_plain_one_does():
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    twin = copy.deepcopy(model)
    inputs = torch.randn(8, 6)
    optimizers = [M3(m.parameters(), slow_frequency=3, frequency=2) for m in (model, twin)]

    def training_step(m, optimizer):
        m(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(training_step, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=2):
        for _ in range(14):
            training_step(model, optimizers[0])
            compiled(twin, optimizers[1])
            torch.testing.assert_close(model.weight, twin.weight)


# ---------------------------------------------------------------------------- with AdamW's groups


def test_groups_of_adamw_are_nested_optimizers():
    matrices, rest = make_params((6, 9), seed=1), make_params((5,), (3, 4), (), seed=2)
    alone, muon_alone = clone_params(rest), clone_params(matrices)
    options = {"lr": 0.01, "weight_decay": 0.1}
    joint = M3(
        [
            {"params": matrices},
            {"params": rest, "algorithm": "adamw", "frequency": 2, "betas": (0.8, 0.9)},
        ],
        **options,
    )
    nested = NestedOptimizer(alone, frequency=2, betas=(0.8, 0.9), **options)
    single = M3(muon_alone, **options)
    for seed in range(7):
        train(joint, [*matrices, *rest], [seed])
        grads = random_grads([*matrices, *rest], seed)
        step_with(single, muon_alone, grads[:1])
        step_with(nested, alone, grads[1:])
        assert_same_tensors(rest, alone)
        assert_same_tensors(matrices, muon_alone)
    for p, q in zip(rest, alone):
        assert joint.state[p].keys() == nested.state[q].keys()


def test_betas_are_a_pair_for_adamw_and_three_for_m3():
    params = make_params((3, 4), (5,))
    groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}]
    optimizer = M3(groups)
    assert [g["betas"] for g in optimizer.param_groups] == [(0.95, 0.95, 0.9), (0.9, 0.999)]
    assert "betas" not in groups[1]
    adamw = M3(params, algorithm="adamw")
    assert adamw.param_groups[0]["betas"] == (0.9, 0.999)
    with pytest.raises(ValueError, match="M3 takes three"):
        M3(params[:1], betas=(0.9, 0.99))
    with pytest.raises(ValueError, match=r"Invalid betas.*Give two"):
        M3([{**groups[1], "betas": (0.9, 0.9, 0.9)}])
    optimizer.param_groups[1]["betas"] = (0.9, 0.9, 0.9)
    set_grads(params, random_grads(params, 0))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"param group 1.*betas of two numbers"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_one_schedule_moves_both_kinds_of_groups():
    params = make_params((3, 4), (5,))
    groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw", "lr": 0.1}]
    optimizer = M3(groups, lr=0.2)
    schedule = OneCycleLR(optimizer, max_lr=[0.2, 0.1], total_steps=10)
    for seed in range(9):
        train(optimizer, params, [seed])
        schedule.step()
    assert [len(g["betas"]) for g in optimizer.param_groups] == [3, 2]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * optimizer.param_groups[1]["lr"])
    assert optimizer.param_groups[0]["betas"][1:] == (0.95, 0.9)


# ---------------------------------------------------------------------------- precision


def test_kahan_summation_keeps_small_updates_of_bfloat16_matrices():
    def distance(kahan_sum):
        p = Parameter(torch.full((8, 8), 1.0, dtype=BF16))
        optimizer = M3([p], lr=1e-4, weight_decay=0.0, kahan_sum=kahan_sum)
        torch.manual_seed(0)
        grad = torch.randn(8, 8).to(BF16)
        for _ in range(400):
            p.grad = grad
            optimizer.step()
        kept = optimizer.state[p].get("kahan_comp", torch.zeros(8, 8))
        return (p.detach().float() + kept.float() - 1).abs().max().item()

    assert distance(False) == 0.0
    exact = Parameter(torch.full((8, 8), 1.0))
    optimizer = M3([exact], lr=1e-4, weight_decay=0.0)
    torch.manual_seed(0)
    grad = torch.randn(8, 8).to(BF16).float()
    for _ in range(400):
        exact.grad = grad
        optimizer.step()
    assert distance(True) == pytest.approx((exact.detach() - 1).abs().max().item(), rel=0.1)


def test_state_dtype_keeps_the_momentum_of_bfloat16_matrices_in_float32():
    params = make_params((6, 9), dtype=BF16)
    optimizer = trained(params, range(3), state_dtype=F32, slow_frequency=2)
    state = optimizer.state[params[0]]
    assert state["momentum_buffer"].dtype == F32
    assert state["slow_momentum_buffer"].dtype == F32
    twins = clone_params(params)
    resumed = M3(twins, state_dtype=F32, slow_frequency=2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(optimizer, resumed)
    # Rounded once: equal to a float32 run of the same values.
    wide = [Parameter(p.detach().float()) for p in params]
    reference = M3(wide, slow_frequency=2)
    reference.load_state_dict(
        {
            **copy.deepcopy(optimizer.state_dict()),
            "param_groups": reference.state_dict()["param_groups"],
        }
    )
    grads = random_grads(params, 9)
    step_with(resumed, twins, grads)
    step_with(reference, wide, [g.float() for g in grads])
    assert_same_tensors(twins, [p.detach().bfloat16() for p in wide])


@pytest.mark.parametrize("name, dtype", [(None, F32), ("bfloat16", BF16), (F64, F64)], ids=str)
def test_the_slow_update_is_kept_as_it_comes_out_of_newton_schulz(name, dtype):
    params = make_params((6, 9))
    optimizer = trained(params, range(2), ns_dtype=name, slow_frequency=2)
    assert optimizer.state[params[0]]["slow_update"].dtype == dtype
    fresh = M3(clone_params(params), ns_dtype=name, slow_frequency=2)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(optimizer, fresh)


# ---------------------------------------------------------------------------- others' checkpoints


def test_a_checkpoint_of_torchs_muon_goes_on_as_it_was():
    params = make_params((6, 9), (9, 9))
    muon = Muon(params, lr=0.02, momentum=0.9, weight_decay=0.2, ns_steps=4)
    train(muon, params, range(4))
    twins = clone_params(params)
    ours = M3(twins, alpha=0.0, ns_dtype=BF16)
    with pytest.warns(UserWarning, match="options replace the optimizer's"):
        ours.load_state_dict(copy.deepcopy(muon.state_dict()))
    group = ours.param_groups[0]
    assert (group["betas"][0], group["adjust_lr"], group["ns_steps"]) == (0.9, "original", 4)
    assert "momentum" not in group and "adjust_lr_fn" not in group
    for seed in range(4, 8):
        train(muon, params, [seed])
        train(ours, twins, [seed])
        assert_same_tensors(params, twins)


def test_a_checkpoint_of_torchs_adamw_loads_into_groups_of_adamw():
    params = make_params((5,), (3, 4))
    adamw = AdamW(params, lr=0.02)
    train(adamw, params, range(3))
    twins = clone_params(params)
    ours = M3([{"params": twins, "algorithm": "adamw"}], lr=0.02, weight_decay=1e-2)
    ours.load_state_dict(copy.deepcopy(adamw.state_dict()))
    for seed in range(3, 6):
        train(adamw, params, [seed])
        train(ours, twins, [seed])
        assert_same_tensors(params, twins)


def test_a_checkpoint_whose_state_has_other_shapes_is_refused():
    params = make_params((6, 9))
    saved = trained(params, range(2), second_moment="row", slow_frequency=2).state_dict()
    other = M3(make_params((6, 8)), second_moment="row")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"'momentum_buffer'.*\(6, 9\).*needs \(6, 8\)"):
        other.load_state_dict(copy.deepcopy(saved))
    assert_unchanged(other, before)
    broken = copy.deepcopy(saved)
    broken["state"][0]["second_moment"] = torch.zeros(6, 9)
    same = M3(clone_params(params), second_moment="row")
    with pytest.raises(ValueError, match=r"'second_moment'.*\(6, 9\).*needs \(6, 1\)"):
        same.load_state_dict(broken)


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
        ({"fused": True}, "fused=True has no kernel for M3's rule"),
        ({"betas": (0.9, 0.9, 1.0)}, "Invalid beta parameter at index 2"),
        ({"betas": (torch.tensor(0.9), 0.9, 0.9)}, r"betas\[0\] as a Tensor is not supported"),
    ],
    ids=str,
)
def test_an_option_that_is_wrong_is_refused_with_what_would_be_right(options, message):
    with pytest.raises(ValueError, match=message):
        M3(make_params((4, 6)), **options)
    with pytest.raises(ValueError, match=f"param group 1.*{message}"):
        first, second = make_params((2, 2), (4, 6))
        M3([{"params": [first]}, {"params": [second], **options}])


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
        M3([("layer.x", p)])
    optimizer = M3(make_params((2, 2)))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [p]})
    assert_unchanged(optimizer, before)


def test_complex_matrices_are_refused():
    with pytest.raises(ValueError, match="is complex, which M3 does not support"):
        M3(make_params((3, 4), dtype=torch.complex64))


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


def test_p_squared_in_a_matrix_descends_as_sgd_would():
    """The sign is right: from the same point both go down."""
    p, q = Parameter(torch.full((2, 3), 4.0)), Parameter(torch.full((2, 3), 4.0))
    for optimizer, x in ((M3([p], lr=0.5), p), (SGD([q], lr=0.1), q)):
        for _ in range(10):
            x.grad = 2 * x.detach()
            optimizer.step()
    assert (p < 4).all() and (q < 4).all()
