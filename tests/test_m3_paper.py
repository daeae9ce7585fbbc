"""Algorithm 1 to the letter: by hand, on matrices, and why not to train with it."""

import pytest
import torch
from torch.nn import Parameter

from nested_optim import M3, rules

from .helpers import (
    make_params,
    random_grads,
    step_with,
    train,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
QUINTIC = rules.ns_schedule("quintic", 5)


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
    assert group["betas"] == (1.0, 1.0, 1.0) and group["alpha"] == 0.25
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


def test_the_slow_momentum_is_off_by_default_but_in_paper_mode():
    def alphas(options, *groups):
        params = make_params(*[(2, 3)] * len(groups))
        made = M3([{"params": [p], **group} for p, group in zip(params, groups)], **options)
        return [group["alpha"] for group in made.param_groups]

    paper, ema, adamw = {"mode": "paper"}, {"mode": "ema"}, {"algorithm": "adamw"}
    assert alphas({}, {}, paper, adamw, {"alpha": 0.5}) == [0.0, 0.25, 0.0, 0.5]
    chosen = {"second_moment": None, "nesterov": True}
    assert alphas({"mode": "paper"}, {}, {**ema, **chosen}, {**paper, "alpha": 0}) == [0.25, 0.0, 0]
    assert alphas({"alpha": 0.5}, {}, paper) == [0.5, 0.5]  # chosen for all
    [p] = make_params((2, 3))
    optimizer = M3([p])
    optimizer.param_groups[0]["alpha"] = None
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="Invalid alpha value: None"):
        optimizer.step()
    assert not optimizer.state
