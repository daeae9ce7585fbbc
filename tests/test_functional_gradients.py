"""Gradients through several updates of the transformations, against finite differences."""

import math

import pytest
import torch
import torchopt

from nested_optim import NestedOptimizer, functional, rules

STEPS = 5
DTYPE = torch.float64
RULES = {
    "adamw": lambda lr, weight: functional.adamw(lr=lr, weight_decay=0.1),
    "adamw, windows": lambda lr, weight: functional.adamw(
        lr=lr, betas=(0.8, 0.95), frequency={"a": 2, "b": 1}
    ),
    "adam, amsgrad": lambda lr, weight: functional.adamw(
        lr=lr, weight_decay=0.1, decoupled=False, amsgrad=True
    ),
    "adamw, schedule": lambda lr, weight: functional.adamw(lr=lambda count: lr * 0.8**count),
    "momentum": lambda lr, weight: functional.momentum(lr=lr, frequency={"a": 1, "b": 2}),
    "delta": lambda lr, weight: functional.delta_momentum(lr=lr, weight_decay=0.1),
    "m3": lambda lr, weight: functional.m3(
        lr=lr, slow_frequency=2, algorithm={"a": "m3", "b": "adamw"}
    ),
    "m3, moments": lambda lr, weight: functional.m3(
        lr=lr,
        slow_frequency=2,
        second_moment="row",
        frequency={"a": 2, "b": 1},
        algorithm={"a": "m3", "b": "adamw"},
    ),
}


def problem():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(STEPS + 1, 6, 3, generator=generator, dtype=DTYPE)
    targets = torch.randn(STEPS + 1, 6, 4, generator=generator, dtype=DTYPE)
    params = {
        "a": torch.randn(4, 3, generator=generator, dtype=DTYPE),
        "b": torch.randn(4, generator=generator, dtype=DTYPE),
    }
    return params, inputs, targets


def loss_of(params, inputs, targets):
    return (torch.tanh(inputs @ params["a"].T + params["b"]) - targets).square().mean()


def unrolled(make, lr, a, b, weight, chain=lambda rule: rule):
    """The loss after ``STEPS`` updates on a loss whose penalty has this weight."""
    _, inputs, targets = problem()
    params, rule = {"a": a, "b": b}, chain(make(lr, weight))
    state = rule.init(params)
    for x, y in zip(inputs[:STEPS], targets):
        loss = loss_of(params, x, y) + weight * (a.numel() / 7) * params["a"].pow(4).mean()
        grads = torch.autograd.grad(loss, [params["a"], params["b"]], create_graph=True)
        updates, state = rule.update(dict(zip(params, grads)), state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return loss_of(params, inputs[STEPS], targets[STEPS])


def differences(function, inputs, step=2e-4):
    """Central differences of the fourth order, element by element."""
    results = []
    for i, value in enumerate(inputs):
        slopes = torch.zeros_like(value)
        for j in range(value.numel()):

            def at(shift, i=i, j=j):
                moved = [v.detach().clone().requires_grad_() for v in inputs]
                with torch.no_grad():
                    moved[i].view(-1)[j] += shift
                return function(*moved).item()

            slope = 8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))
            slopes.view(-1)[j] = slope / (12 * step)
        results.append(slopes)
    return results


def assert_gradients_agree(function, inputs, tolerance=1e-6):
    inputs = [v.detach().clone().requires_grad_() for v in inputs]
    found = torch.autograd.grad(function(*inputs), inputs)
    for ours, true in zip(found, differences(function, inputs)):
        assert true.abs().max() > 1e-6  # it has a say
        error = (ours - true).norm() / true.norm()
        assert error <= tolerance, error


def start():
    params, _, _ = problem()
    lr, weight = (torch.tensor(v, dtype=DTYPE) for v in (0.05, 0.1))
    return [lr, params["a"], params["b"], weight]


@pytest.mark.parametrize("name", RULES)
def test_meta_gradients_through_five_updates_agree_with_finite_differences(name):
    make = RULES[name]
    assert_gradients_agree(lambda *inputs: unrolled(make, *inputs), start())


def test_decay_rates_and_weight_decay_have_gradients_too():
    _, a, b, weight = start()
    given = [torch.tensor(v, dtype=DTYPE) for v in (0.05, 0.8, 0.95, 0.1)]

    def adamw(lr, beta1, beta2, decay):
        made = functional.adamw(lr=lr, betas=(beta1, beta2), weight_decay=decay)
        return unrolled(lambda *_: made, lr, a.requires_grad_(), b.requires_grad_(), weight)

    assert_gradients_agree(adamw, given)

    def momentum(lr, rate, decay):
        made = functional.momentum(lr=lr, momentum=rate, weight_decay=decay)
        return unrolled(lambda *_: made, lr, a, b, weight)

    assert_gradients_agree(momentum, [given[0], given[1], given[3]])


def test_gradients_pass_through_a_chain_while_nothing_is_clipped():
    def chain(rule):
        return torchopt.chain(
            torchopt.clip.clip_grad_norm(1e6),
            rule,
            torchopt.transform.scale_by_schedule(lambda count: 0.9 ** count.item()),
        )

    make = RULES["adamw, windows"]
    assert_gradients_agree(lambda *inputs: unrolled(make, *inputs, chain=chain), start())


def test_func_optimizer_gives_the_same_meta_gradient():
    lr, a, b, weight = (v.requires_grad_() for v in start())
    make = RULES["adamw, windows"]
    expected = torch.autograd.grad(unrolled(make, lr, a, b, weight), lr)
    _, inputs, targets = problem()

    rule = functional.adamw(lr=lr, betas=(0.8, 0.95), frequency=(2, 1))
    optimizer, params = torchopt.FuncOptimizer(rule), (a, b)
    for x, y in zip(inputs[:STEPS], targets):
        penalty = weight * (a.numel() / 7) * params[0].pow(4).mean()
        loss = loss_of(dict(zip("ab", params)), x, y) + penalty
        params = optimizer.step(loss, params)
    last = loss_of(dict(zip("ab", params)), inputs[STEPS], targets[STEPS])
    torch.testing.assert_close(torch.autograd.grad(last, lr), expected, rtol=1e-12, atol=0)


def test_step_and_update_have_one_gradient_and_torch_func_finds_it_too():
    params, inputs, targets = problem()

    def final(lr, through_step):
        rule = functional.adamw(lr=lr, frequency={"a": 2, "b": 1})
        values, state = params, rule.init(params)
        for x, y in zip(inputs[:STEPS], targets):
            grads = torch.func.grad(loss_of)(values, x, y)
            if through_step:
                values, state = rule.step(grads, state, values)
            else:
                moves, state = rule.update(grads, state, params=values, inplace=False)
                values = torchopt.apply_updates(values, moves, inplace=False)
        return loss_of(values, inputs[STEPS], targets[STEPS])

    lr = torch.tensor(0.05, dtype=DTYPE)
    slopes = [torch.func.grad(final)(lr, flag) for flag in (True, False)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=0)
    true = (final(lr + 1e-5, True) - final(lr - 1e-5, True)) / 2e-5
    assert slopes[0].item() == pytest.approx(true.item(), rel=1e-6)


def test_windows_carry_the_gradients_of_the_losses_that_filled_them():
    # Plain descent on a window's mean: d p / d w is the mean of what w weighed, step by step.
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=DTYPE, requires_grad=True)
    rule = functional.momentum(lr=0.5, momentum=0.0, frequency=3)
    params = (torch.tensor(1.0, dtype=DTYPE),)
    state = rule.init(params)
    for k, factor in enumerate((1.0, 10.0, 100.0)):
        params, state = rule.step((weights[k] * factor,), state, params)
    slopes = torch.autograd.grad(params[0], weights)[0]
    expected = -0.5 * torch.tensor([1.0, 10.0, 100.0], dtype=DTYPE) / 3
    torch.testing.assert_close(slopes, expected, rtol=1e-14, atol=0)
    assert not state.leaves[0]["window_sum"].requires_grad


@pytest.mark.parametrize("name", ["adamw", "adam, amsgrad", "m3, moments"])
def test_elements_without_a_gradient_leave_meta_gradients_finite_and_right(name):
    # A unit that is cut off: its gradient is exactly zero at every step.
    make = RULES[name]

    def masked(lr, a, b, weight):
        keep = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=DTYPE)
        _, inputs, targets = problem()
        params, rule = {"a": a, "b": b}, make(lr, weight)
        state = rule.init(params)
        for x, y in zip(inputs[:STEPS], targets):
            loss = (torch.tanh(x @ params["a"].T + params["b"]) * keep - y).square().mean()
            loss = loss + weight * (params["a"].pow(4).mean(1) * keep).sum()
            grads = torch.autograd.grad(loss, [params["a"], params["b"]], create_graph=True)
            params, state = rule.step(dict(zip(params, grads)), state, params)
        last = torch.tanh(inputs[STEPS] @ params["a"].T + params["b"]) * keep
        return (last - targets[STEPS]).square().mean()

    assert_gradients_agree(masked, start())


def test_the_derivative_in_the_learning_rate_is_right_at_zero_as_well():
    grad = torch.tensor([0.3, -2.0, 0.0], dtype=DTYPE)
    lr = torch.tensor(0.0, dtype=DTYPE, requires_grad=True)
    rule = functional.adamw(lr=lr, weight_decay=0.1)
    params = (torch.ones(3, dtype=DTYPE),)
    new, _ = rule.step((grad,), rule.init(params), params)
    assert torch.equal(new[0].detach(), params[0])  # lr 0 moves nothing
    slopes = [torch.autograd.grad(x, lr, retain_graph=True)[0].item() for x in new[0]]
    assert slopes == pytest.approx([-1.1, 0.9, -0.1], rel=1e-6)


def test_the_derivative_of_an_update_at_gradient_zero_is_one_over_eps():
    grad = torch.zeros(1, dtype=DTYPE, requires_grad=True)
    zeros = torch.zeros(2, 1, dtype=DTYPE)
    new = rules.adamw(
        zeros[0], grad, *zeros, step=1, lr=1.0, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0
    )
    (slope,) = torch.autograd.grad(new.param, grad)
    assert slope.item() == pytest.approx(-1e3)
    assert math.isfinite(new.exp_avg_sq.item())


def test_a_tensor_learning_rate_takes_the_differentiable_optimizer_s_steps():
    torch.manual_seed(0)
    lr = torch.tensor(0.1)
    start = torch.randn(5)
    rule = functional.adamw(lr=lr, frequency=2)
    params = (start.clone(),)
    state = rule.init(params)
    held = start.clone()
    optimizer = NestedOptimizer([held], lr=lr, frequency=2, differentiable=True)
    for _ in range(6):
        grad = torch.randn(5)
        params, state = rule.step((grad,), state, params)
        held.grad = grad
        optimizer.step()
        assert torch.equal(params[0], held)


def test_an_ensemble_runs_under_vmap_members_and_learning_rates_alike():
    params, inputs, targets = problem()

    def run(a, lr):
        rule = functional.adamw(lr=lr, frequency={"a": 2, "b": 1})
        values = {"a": a, "b": params["b"]}
        state = rule.init(values)
        for x, y in zip(inputs[:STEPS], targets):
            values, state = rule.step(torch.func.grad(loss_of)(values, x, y), state, values)
        return values["a"]

    members = torch.stack([params["a"], 2 * params["a"], -params["a"]])
    lrs = torch.tensor([0.01, 0.1, 0.3], dtype=DTYPE)
    found = torch.vmap(run)(members, lrs)
    expected = torch.stack([run(*pair) for pair in zip(members, lrs)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
