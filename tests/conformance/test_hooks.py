"""Hooks run where torch runs them, in torch's order, with the arguments torch gives them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .checks import TRAINABLE, Case, assert_same, copies, each_class, state_of, train


def trained(case: Case) -> tuple[Optimizer, list[Parameter]]:
    params = case.params()
    optimizer = case.build(params)
    train(optimizer, params, range(3))
    return optimizer, params


@each_class(*TRAINABLE)
def test_step_hooks_run_around_the_update(case: Case) -> None:
    optimizer, params = trained(case)
    start = [p.detach().clone() for p in params]
    seen: list[Any] = []

    def closure() -> Tensor:
        seen.append("closure")
        return torch.tensor(1.0)

    def before(opt: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert opt is optimizer
        assert args == (optimizer, closure) and kwargs == {}
        assert_same([p.detach() for p in params], start)
        seen.append("before")

    def after(opt: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert opt is optimizer
        assert args == (optimizer, closure) and kwargs == {}
        assert not torch.equal(params[0].detach(), start[0])
        seen.append("after")

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(closure)
    assert seen == ["before", "closure", "after"]
    for handle in handles:
        handle.remove()
    optimizer.step(closure)
    assert seen == ["before", "closure", "after", "closure"]


@each_class()
def test_a_step_pre_hook_may_replace_the_arguments(case: Case) -> None:
    optimizer, _ = trained(case)

    def replace(opt: Optimizer, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return args[:1], {"closure": lambda: torch.tensor(7.0)}

    handle = optimizer.register_step_pre_hook(replace)
    assert optimizer.step(lambda: torch.tensor(1.0)) == 7.0
    handle.remove()
    assert optimizer.step(lambda: torch.tensor(1.0)) == 1.0
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: "nonsense")  # type: ignore
    with pytest.raises(RuntimeError, match="new_args, new_kwargs"):
        optimizer.step()


@each_class()
def test_global_step_hooks_enclose_the_optimizers_own(case: Case) -> None:
    optimizer, _ = trained(case)
    other, _ = trained(case)
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append("global before")),
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before 1")),
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before 2")),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("after 1")),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("after 2")),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append("global after")),
    ]
    try:
        optimizer.step()
        assert seen == [
            "global before",
            "before 1",
            "before 2",
            "after 1",
            "after 2",
            "global after",
        ]
        other.step()
        assert seen[6:] == ["global before", "global after"]
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert len(seen) == 8


@each_class()
def test_a_state_dict_pre_hook_runs_before_anything_is_gathered(case: Case) -> None:
    optimizer, params = trained(case)
    seen: list[str] = []

    def mark(opt: Optimizer) -> None:
        assert opt is optimizer
        opt.state[params[0]]["mark"] = torch.tensor(3.0)
        opt.param_groups[0]["lr"] = 0.5
        seen.append("marks")

    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("second"))
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("first"), prepend=True)
    handle = optimizer.register_state_dict_pre_hook(mark)
    saved = optimizer.state_dict()
    assert seen == ["first", "second", "marks"]
    assert saved["state"][0]["mark"] == 3.0
    assert saved["param_groups"][0]["lr"] == 0.5
    handle.remove()
    optimizer.state_dict()
    assert seen == ["first", "second", "marks", "first", "second"]


@each_class()
def test_state_dict_post_hooks_change_what_the_caller_gets(case: Case) -> None:
    optimizer, _ = trained(case)
    plain = optimizer.state_dict()
    seen: list[str] = []

    def in_place(opt: Optimizer, saved: dict[str, Any]) -> None:
        assert opt is optimizer
        assert_same(saved, plain, "what the hook sees")
        saved["note"] = "kept"
        saved["state"].pop(1)
        saved["param_groups"][0]["lr"] = 0.5
        seen.append("in place")

    handle = optimizer.register_state_dict_post_hook(in_place)
    optimizer.register_state_dict_post_hook(lambda opt, saved: seen.append("first"), prepend=True)
    saved = optimizer.state_dict()
    assert seen == ["first", "in place"]
    assert saved["note"] == "kept"
    assert 1 not in saved["state"] and 0 in saved["state"]
    assert saved["param_groups"][0]["lr"] == 0.5
    assert optimizer.param_groups[0]["lr"] != 0.5
    handle.remove()
    assert_same(optimizer.state_dict(), plain)


@pytest.mark.parametrize("prepend", [False, True], ids=["appended", "prepended"])
@each_class()
def test_a_state_dict_post_hook_may_return_a_dict_of_any_form(case: Case, prepend: bool) -> None:
    optimizer, _ = trained(case)
    plain = optimizer.state_dict()
    flat: dict[str, Any] = {"flat": [1.0, 2.0]}
    handle = optimizer.register_state_dict_post_hook(lambda opt, saved: flat, prepend)
    assert optimizer.state_dict() is flat
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "more": 1})
    assert optimizer.state_dict() == {"flat": [1.0, 2.0], "more": 1}
    handle.remove()
    assert_same(optimizer.state_dict(), {**plain, "more": 1})


@each_class()
def test_a_load_pre_hook_may_change_the_checkpoint_in_place(case: Case) -> None:
    optimizer, params = trained(case)
    saved = deepcopy(optimizer.state_dict())
    foreign = {"weights": saved["state"], "param_groups": saved["param_groups"]}
    twin_params = copies(params)
    twin = case.build(twin_params)

    def rename(opt: Optimizer, given: dict[str, Any]) -> None:
        assert opt is twin
        assert not any(state_of(twin, twin_params))
        given["state"] = given.pop("weights")

    twin.register_load_state_dict_pre_hook(rename)
    twin.load_state_dict(foreign)
    assert_same(twin.state_dict(), optimizer.state_dict())
    assert list(foreign) == ["weights", "param_groups"]


@each_class()
def test_a_load_pre_hook_may_return_another_checkpoint(case: Case) -> None:
    optimizer, params = trained(case)
    saved = deepcopy(optimizer.state_dict())
    twin = case.build(copies(params))
    seen: list[str] = []

    def unpack(opt: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        seen.append("unpack")
        return dict(given["packed"])

    def check(opt: Optimizer, given: dict[str, Any]) -> None:
        assert "state" in given
        seen.append("check")

    twin.register_load_state_dict_pre_hook(check)
    handle = twin.register_load_state_dict_pre_hook(unpack, prepend=True)
    twin.load_state_dict({"packed": saved})
    assert seen == ["unpack", "check"]
    assert_same(twin.state_dict(), optimizer.state_dict())
    handle.remove()
    twin.load_state_dict(deepcopy(saved))
    assert seen == ["unpack", "check", "check"]


@each_class()
def test_load_post_hooks_see_the_loaded_optimizer(case: Case) -> None:
    optimizer, params = trained(case)
    twin_params = copies(params)
    twin = case.build(twin_params)
    seen: list[str] = []

    def loaded(opt: Optimizer) -> None:
        assert opt is twin
        assert_same(state_of(twin, twin_params), state_of(optimizer, params))
        opt.param_groups[0]["lr"] = 0.5
        seen.append("loaded")

    handle = twin.register_load_state_dict_post_hook(loaded)
    twin.register_load_state_dict_post_hook(lambda opt: seen.append("first"), prepend=True)
    twin.load_state_dict(deepcopy(optimizer.state_dict()))
    assert seen == ["first", "loaded"]
    assert twin.param_groups[0]["lr"] == 0.5
    handle.remove()
    twin.load_state_dict(deepcopy(optimizer.state_dict()))
    assert seen == ["first", "loaded", "first"]
    assert twin.param_groups[0]["lr"] != 0.5


@each_class()
def test_hooks_survive_loading_but_do_not_follow_copies(case: Case) -> None:
    optimizer, _ = trained(case)
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("step"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: seen.append("state_dict"))
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert seen == ["state_dict", "step"]
    twin = deepcopy(optimizer)
    twin.step()
    twin.state_dict()
    assert seen == ["state_dict", "step"]
