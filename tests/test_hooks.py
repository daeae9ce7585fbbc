"""register_meta_update_hook: a hook after every Nth step that happened."""

import copy

import pytest
import torch

from nested_optim import NestedOptimizer

from .helpers import assert_same_tensors, make_params, random_grads, set_grads, step_with, train


def test_a_hook_runs_after_every_nth_step_with_the_optimizer_and_gradients_enabled():
    params = make_params((3,))
    optimizer = NestedOptimizer(params, frequency=2)
    seen = []

    def hook(given):
        assert given is optimizer and torch.is_grad_enabled()
        seen.append((given.param_groups[0]["meta_step"], given.state[params[0]]["step"].item()))

    optimizer.register_meta_update_hook(hook, every=3)
    train(optimizer, params, range(9))
    assert seen == [(3, 1), (6, 3), (9, 4)]


def test_hooks_can_be_removed_and_several_keep_their_own_period():
    params = make_params((3,))
    optimizer = NestedOptimizer(params)
    calls = []
    first = optimizer.register_meta_update_hook(lambda _: calls.append("a"), every=2)
    optimizer.register_meta_update_hook(lambda _: calls.append("b"), every=3)
    train(optimizer, params, range(6))
    assert calls == ["a", "b", "a", "a", "b"]
    first.remove()
    train(optimizer, params, range(6))
    assert calls[5:] == ["b", "b"]


def test_the_count_resumes_from_a_checkpoint():
    params = make_params((3,))
    optimizer = NestedOptimizer(params)
    optimizer.register_meta_update_hook(lambda _: None, every=4)
    train(optimizer, params, range(3))
    resumed_params = make_params((3,))
    resumed = NestedOptimizer(resumed_params)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    calls = []
    resumed.register_meta_update_hook(calls.append, every=4)
    train(resumed, resumed_params, [3])
    assert calls == [resumed]


def test_a_hook_that_does_nothing_changes_no_bit():
    runs = []
    for hooked in (False, True):
        params = make_params((3, 4))
        optimizer = NestedOptimizer(params, frequency=2)
        if hooked:
            optimizer.register_meta_update_hook(lambda _: None)
        train(optimizer, params, range(5))
        runs.append(params)
    assert_same_tensors(*runs)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("frequency", [1, 3])
def test_a_step_that_the_grad_scaler_skips_counts_for_nothing(fused, frequency):
    params = make_params((3,))
    optimizer = NestedOptimizer(params, frequency=frequency, fused=fused)
    calls = []
    optimizer.register_meta_update_hook(calls.append)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, overflow in enumerate([False, True, False]):
        loss = scaler.scale((params[0] * random_grads(params, step)[0]).sum())
        optimizer.zero_grad()
        loss.backward()
        if overflow:
            params[0].grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    assert len(calls) == 2
    state = optimizer.state[params[0]]
    assert (state["step"] * frequency + state["window_count"]).item() == 2
    assert torch.isfinite(params[0]).all()


def test_unscaled_windows_equal_windows_of_unscaled_gradients():
    runs = []
    for scale in (None, 1024.0):
        params = make_params((3,))
        optimizer = NestedOptimizer(params, frequency=2, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale((params[0] * random_grads(params, step)[0]).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(params)
    assert_same_tensors(*runs)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_a_period_is_a_positive_integer(every):
    optimizer = NestedOptimizer(make_params((3,)))
    with pytest.raises(ValueError, match="Invalid every"):
        optimizer.register_meta_update_hook(lambda _: None, every=every)


def test_a_hook_must_be_callable():
    with pytest.raises(TypeError, match="called as hook\\(optimizer\\)"):
        NestedOptimizer(make_params((3,))).register_meta_update_hook("hook")


def test_hooks_are_refused_while_a_cuda_graph_is_captured(monkeypatch):
    params = make_params((3,))
    optimizer = NestedOptimizer(params)
    optimizer.register_meta_update_hook(lambda _: None)
    monkeypatch.setattr("nested_optim.optimizer.capturing", lambda: True)
    set_grads(params, random_grads(params, 0))
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        optimizer.step()
    assert not optimizer.state


def test_trainers_find_no_train_or_eval_to_call():
    optimizer = NestedOptimizer(make_params((3,)))
    assert not hasattr(optimizer, "train") and not hasattr(optimizer, "eval")


def test_the_scheduler_s_lr_is_used_and_never_overwritten():
    params = make_params((3,))
    optimizer = NestedOptimizer(params, lr=0.1, frequency=2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for step in range(4):
        assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**step
        step_with(optimizer, params, random_grads(params, step))
        assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**step
        scheduler.step()
