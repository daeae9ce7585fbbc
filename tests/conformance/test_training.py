"""Steps go where they should: direction, schedulers, learning rates, groups, no-ops, closures."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from .checks import (
    EVERY,
    TRAINABLE,
    Case,
    assert_same,
    assert_trains_alike,
    cases,
    copies,
    each_case,
    each_class,
    everything,
    seeded,
    set_gradients,
    state_of,
    train,
)

Schedulers = tuple[Any, ...]


def regression(
    case: Case, contiguous: bool = True
) -> tuple[list[Parameter], Callable[[Optimizer], Tensor]]:
    """A weight and a bias, and the closure that fits them to send one input to zero."""
    if contiguous:
        weight = Parameter(seeded((10, 5), 0, torch.float32, case.device))
        bias = Parameter(seeded(case.info.vector(10), 1, torch.float32, case.device))
    else:
        weight = Parameter(seeded((10, 5, 2), 0, torch.float32, case.device)[..., 0])
        shape = case.info.vector(10)
        bias = Parameter(seeded((*shape, 2), 1, torch.float32, case.device)[..., 0])
    assert weight.is_contiguous() == bias.is_contiguous() == contiguous
    given = seeded((5,), 2, torch.float32, case.device)

    def closure(optimizer: Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(given) + bias.flatten()).square().sum()
        loss.backward()
        return loss

    return [weight, bias], closure


def advance(schedulers: list[Any], loss: float) -> None:
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        else:
            scheduler.step()


def assert_right_direction(
    case: Case, params: list[Any], closure: Callable[..., Tensor], makers: Schedulers = ()
) -> None:
    optimizer = case.build(params)
    schedulers = [make(optimizer) for make in makers]
    initial = closure(optimizer).item()
    for _ in range(20):
        loss = optimizer.step(lambda: closure(optimizer))
        advance(schedulers, loss.item())
    final = closure(optimizer).item()
    assert final > initial if case.kwargs.get("maximize") else final < initial


@each_case(*TRAINABLE)
def test_the_loss_goes_the_right_way(case: Case) -> None:
    assert_right_direction(case, *regression(case))


@each_case(*TRAINABLE, where=lambda case: case.path in case.info.strided)
def test_the_loss_goes_the_right_way_on_strided_parameters(case: Case) -> None:
    assert_right_direction(case, *regression(case, contiguous=False))


def each_schedule(where: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Run the test for each class's scheduler inputs, with each case that `where` lets through."""
    chosen = [
        pytest.param(case, makers, id=f"{case}-schedule{i}")
        for case in cases("forloop")
        if where(case)
        for i, makers in enumerate(case.info.scheduler_inputs)
    ]
    return pytest.mark.parametrize(("case", "makers"), chosen)


@each_schedule()
def test_the_loss_goes_the_right_way_under_schedulers(case: Case, makers: Schedulers) -> None:
    (weight, bias), closure = regression(case)
    groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
    assert_right_direction(case, groups, closure, makers)


@each_schedule(lambda case: case.desc == "default" or case.frequency > 1)
def test_a_scheduler_does_what_writing_the_rate_by_hand_does(
    case: Case, makers: Schedulers
) -> None:
    params = case.params()
    optimizer = case.build(params)
    schedulers = [make(optimizer) for make in makers]
    by_hand_params = case.params()
    by_hand = case.build(by_hand_params)
    # A scheduler driven without any optimizer at work: nobody else may have written lr.
    clock = SGD([Parameter(torch.zeros(1))], lr=float(optimizer.defaults["lr"]))
    clock_schedulers = [make(clock) for make in makers]
    seen = []
    for step in range(25):
        rate = clock.param_groups[0]["lr"]
        seen.append(rate)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(rate, rel=1e-6)
        by_hand.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        assert_trains_alike((optimizer, params), (by_hand, by_hand_params), [step])
        clock.step()
        advance(schedulers, 1.0)
        advance(clock_schedulers, 1.0)
    assert len(set(seen)) > 1


@each_case(*EVERY)
def test_nothing_moves_once_a_scheduler_reaches_zero(case: Case) -> None:
    params = case.params()
    optimizer = case.build(params)
    active = 4 * case.frequency
    scheduler = LambdaLR(optimizer, lambda epoch: 1.0 if epoch < active else 0.0)
    start = [p.detach().clone() for p in params]
    for step in range(active):
        train(optimizer, params, [step])
        scheduler.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, start, strict=True) if p.numel())
    stopped = [p.detach().clone() for p in params]
    for step in range(active, 2 * active):
        train(optimizer, params, [step])
        scheduler.step()
    assert_same([p.detach() for p in params], stopped)


@each_case(*EVERY)
def test_lr_zero_moves_nothing(case: Case) -> None:
    params = case.params()
    lr = torch.tensor(0.0) if isinstance(case.kwargs.get("lr"), Tensor) else 0.0
    optimizer = case.build(params, lr=lr)
    start = [p.detach().clone() for p in params]
    train(optimizer, params, range(3 * case.frequency))
    assert_same([p.detach() for p in params], start)
    assert all(optimizer.state[p] for p in params)


def takes_tensor_lr(case: Case) -> bool:
    return case.path != "foreach" or bool(case.kwargs.get("capturable"))


@pytest.mark.parametrize("dims", [0, 1])
@each_case(*EVERY, where=takes_tensor_lr)
def test_a_tensor_lr_does_what_a_number_does(case: Case, dims: int) -> None:
    # Exact in float32 too, but for the schedule's own products.
    numbers, tensors = case.params(), case.params()
    lr = 2.0**-7
    with_number = case.build(numbers, lr=lr)
    with_tensor = case.build(tensors, lr=torch.full((1,) * dims, lr))
    schedulers = [
        make(o) for o in (with_number, with_tensor) for make in case.info.scheduler_inputs[2]
    ]
    for step in range(8):
        train(with_number, numbers, [step])
        train(with_tensor, tensors, [step])
        advance(schedulers, 1.0)
        torch.testing.assert_close(tensors, numbers)
    assert isinstance(with_tensor.param_groups[0]["lr"], Tensor)
    assert float(with_tensor.param_groups[0]["lr"]) < lr


@each_case(*EVERY, where=lambda case: not case.info.learned)
def test_groups_train_as_separate_optimizers_with_their_own_options(case: Case) -> None:
    flags = {flag: case.kwargs[flag] for flag in case.info.supported_impls}
    own = {k: v for k, v in case.kwargs.items() if k not in flags}
    own = {"lr": 0.02, **own}
    together = [*case.params(seed=1), *case.params(seed=2)]
    half = len(together) // 2
    joint = case.info.optim_cls(
        [{"params": together[:half], **own}, {"params": together[half:]}],
        **flags,
        lr=0.005,
        weight_decay=0.03,
    )
    apart = copies(together)
    first = case.info.optim_cls(apart[:half], **flags, **own)
    second = case.info.optim_cls(apart[half:], **flags, lr=0.005, weight_decay=0.03)
    for step in range(6):
        set_gradients(together, step)
        set_gradients(apart, step)
        joint.step()
        first.step()
        second.step()
        assert_same([p.detach() for p in together], [p.detach() for p in apart], f"step {step}")
    separate = [*state_of(first, apart[:half]), *state_of(second, apart[half:])]
    assert_same(state_of(joint, together), separate)
    assert not torch.equal(joint.param_groups[0]["params"][0], case.params(seed=1)[0])


def assert_shrunk(case: Case, now: Tensor, before: Tensor) -> None:
    """Every number is nearer to 0; where a rule mixes them, the tensor is as a whole."""
    if case.info.elementwise or not now.numel():
        assert torch.all(now.abs() < before.abs())
    else:
        assert now.norm() < before.norm()


@each_case(*EVERY)
def test_weight_decay_of_one_group_leaves_the_other_alone(case: Case) -> None:
    decayed, kept = case.params(seed=1), case.params(seed=2)
    optimizer = case.build(
        [{"params": decayed, "weight_decay": 0.5}, {"params": kept, "weight_decay": 0.0}]
    )
    start = [p.detach().clone() for p in [*decayed, *kept]]
    for _ in range(3 * case.frequency):
        for p in [*decayed, *kept]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    half = len(decayed)
    for p, before in zip(decayed, start[:half], strict=True):
        assert_shrunk(case, p.detach(), before)
    assert_same([p.detach() for p in kept], start[half:])


@each_case(*EVERY, where=lambda case: not case.info.learned)
def test_a_group_added_in_mid_run_trains_as_an_optimizer_of_its_own(case: Case) -> None:
    early, late = case.params(seed=1), case.params(seed=2)
    early_alone, late_alone = copies(early), copies(late)
    joint, alone = case.build(early), case.build(early_alone)
    for step in range(3):
        train(joint, early, [step])
        train(alone, early_alone, [step])
    joint.add_param_group({"params": late, "lr": 0.05})
    late_optimizer = case.build(late_alone, lr=0.05)
    for key, value in joint.defaults.items():
        if key != "lr":
            assert_same(joint.param_groups[1][key], value, key)
    for step in range(3, 9):
        for params in (early, late, early_alone, late_alone):
            set_gradients(params, step)
        for optimizer in (joint, alone, late_optimizer):
            optimizer.step()
        assert_same(
            [p.detach() for p in [*early, *late]],
            [p.detach() for p in [*early_alone, *late_alone]],
            f"step {step}",
        )
    assert_same(
        state_of(joint, [*early, *late]),
        [*state_of(alone, early_alone), *state_of(late_optimizer, late_alone)],
    )


@each_case(*EVERY)
def test_a_step_without_gradients_changes_nothing(case: Case) -> None:
    params = case.params()
    optimizer = case.build(params)
    fresh = everything(optimizer, params)
    optimizer.step()
    assert_same(everything(optimizer, params), fresh)
    assert not any(optimizer.state.get(p) for p in params)
    train(optimizer, params, range(3))
    trained = everything(optimizer, params)
    assert all(p.grad is None for p in params)
    optimizer.step()
    assert_same(everything(optimizer, params), trained)


@each_case(*EVERY)
def test_a_parameter_without_a_gradient_is_passed_over(case: Case) -> None:
    params, others = case.params(), case.params()
    skipped = params.pop(0)
    before = skipped.detach().clone()
    beside, without = case.build([skipped, *params]), case.build(others[1:])
    assert_trains_alike((beside, params), (without, others[1:]))
    assert_same(skipped.detach(), before)
    assert not beside.state.get(skipped)


@each_case(*EVERY)
def test_zero_gradients_move_nothing_but_by_weight_decay(case: Case) -> None:
    params = case.params()
    optimizer = case.build(params)
    start = [p.detach().clone() for p in params]
    for _ in range(2 * case.frequency):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    if case.kwargs["weight_decay"] == 0:
        assert_same([p.detach() for p in params], start)
    else:
        for p, before in zip(params, start, strict=True):
            assert_shrunk(case, p.detach(), before)


@each_case(*EVERY)
def test_a_step_leaves_gradients_as_they_are(case: Case) -> None:
    params = case.params()
    optimizer = case.build(params)
    for step in range(2 * case.frequency + 1):
        set_gradients(params, step)
        grads = [p.grad for p in params]
        values = [grad.clone() for grad in grads if grad is not None]
        optimizer.step()
        assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
        assert_same(grads, values)


@each_case(*EVERY)
def test_the_closure_runs_once_under_grad_and_its_loss_is_returned(case: Case) -> None:
    params, plain = case.params(), case.params()
    optimizer, without = case.build(params), case.build(plain)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        set_gradients(params, len(calls))
        return torch.tensor(float(len(calls)))

    for count in range(1, 2 * case.frequency + 1):
        with torch.set_grad_enabled(count % 2 == 0):
            loss = optimizer.step(closure)
            after = torch.is_grad_enabled()
        assert calls == [True] * count
        assert after == (count % 2 == 0)
        assert loss.item() == count
        set_gradients(plain, count)
        assert without.step() is None
        assert_same([p.detach() for p in params], [p.detach() for p in plain])


@each_class(*EVERY)
def test_zero_grad_drops_gradients_or_fills_them_with_zeros(case: Case) -> None:
    params = case.params()
    optimizer = case.build(params)
    set_gradients(params, 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    set_gradients(params, 1)
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    for p, grad in zip(params, grads, strict=True):
        assert p.grad is grad
        assert grad is not None and not grad.any()


@each_case(*EVERY)
def test_p_squared_descends_from_four(case: Case) -> None:
    start = torch.full(case.info.vector(1), 4.0, device=case.device)
    p = Parameter(start, requires_grad=False)
    optimizer = case.build([p], lr=0.1)
    sign = -1.0 if case.kwargs.get("maximize") else 1.0  # of the gradient of p**2, uphill
    trace = []
    for _ in range(case.info.updates_from_four):
        for _ in range(case.frequency):
            p.grad = sign * 2 * p.detach()
            optimizer.step()
        trace.append(p.item())
    down = [4.0, *trace[: case.info.monotonic_updates]]
    assert all(later < earlier for earlier, later in pairwise(down))
    assert abs(trace[-1]) < 1.0
