"""What an optimizer accepts and refuses, how it prints, and how it is copied."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerErrorEnum

from .checks import (
    DEVICES,
    EVERY,
    TRAINABLE,
    Case,
    assert_same,
    assert_trains_alike,
    each_case,
    each_class,
    everything,
    make_params,
    seeded,
    set_gradients,
    train,
)
from .infos import INFOS, Info


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_inputs_leave_implementations_to_the_tests_and_weight_decay_to_nobody(info: Info) -> None:
    inputs = info.optim_inputs_func("cpu")
    assert len({entry.desc for entry in inputs}) == len(inputs)
    for entry in inputs:
        assert not {"foreach", "fused", "differentiable"} & entry.kwargs.keys()
        assert "weight_decay" in entry.kwargs


@each_case(*EVERY)
def test_an_optimizer_prints_its_name_and_every_option_of_every_group(case: Case) -> None:
    first, second = case.params(seed=1), case.params(seed=2)
    optimizer = case.build([{"params": first}, {"params": second, "lr": 0.125}])
    text = repr(optimizer)
    assert text.startswith(f"{case.info.name} (")
    assert "Parameter Group 0" in text and "Parameter Group 1" in text
    for group in optimizer.param_groups:
        for key, value in group.items():
            assert (f"{key}: {value}\n" in text) == (key != "params")
    assert "lr: 0.125\n" in text
    if not case.info.learned:
        train(optimizer, [*first, *second], range(2))
        assert repr(optimizer) == text


def error_inputs() -> list[Any]:
    return [
        pytest.param(info, device, entry, id=f"{info.name}-{device}-{i}-{description(entry)}")
        for info in INFOS
        for device in DEVICES
        for i, entry in enumerate(info.optim_error_inputs_func(device, torch.float32))
    ]


def description(entry: ErrorOptimizerInput) -> str:
    return str(entry.optimizer_error_input.desc)


@pytest.mark.parametrize(("info", "device", "entry"), error_inputs())
def test_wrong_input_is_refused_with_its_reason(
    info: Info, device: str, entry: ErrorOptimizerInput
) -> None:
    given = entry.optimizer_error_input
    params = given.params if given.params is not None else make_params(info, device)

    if entry.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
        if issubclass(entry.error_type, Warning):
            with pytest.warns(entry.error_type, match=entry.error_regex):
                info.optim_cls(params, **given.kwargs)
        else:
            with pytest.raises(entry.error_type, match=entry.error_regex):
                info.optim_cls(params, **given.kwargs)
        return

    optimizer = info.optim_cls(params, **given.kwargs)
    before = everything(optimizer, params)
    with pytest.raises(entry.error_type, match=entry.error_regex):
        optimizer.step()
    assert_same(everything(optimizer, params), before)


@each_class()
def test_parameters_that_torch_refuses_are_refused(case: Case) -> None:
    p = Parameter(torch.ones(2, 2, device=case.device))
    with pytest.raises(ValueError, match="empty parameter list"):
        case.build([])
    with pytest.raises(ValueError, match="empty parameter list"):
        case.build(iter([]))
    with pytest.raises(TypeError, match=r"can only optimize Tensors.*int"):
        case.build([p, 3])
    with pytest.raises(ValueError, match="non-leaf"):
        case.build([p * 2])
    with pytest.raises(TypeError, match="ordered collections"):
        case.build([{"params": {p}}])
    optimizer = case.build([p])
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([p])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(1, 1)), p]})
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [("q", Parameter(torch.ones(1, 1)))]})
    assert [group["params"] for group in optimizer.param_groups] == [[p]]


def named(params: list[Parameter]) -> list[tuple[str, Parameter]]:
    return [(f"p{i}", p) for i, p in enumerate(params)]


SHAPES_OF_PARAMS: dict[str, Callable[[list[Parameter]], Any]] = {
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda params: (p for p in params),
    "module": lambda params: nn.ParameterList(params).parameters(),
    "dict values": lambda params: OrderedDict(named(params)).values(),
    "names": named,
    "iterator of names": lambda params: iter(named(params)),
    "module with names": lambda params: nn.ParameterList(params).named_parameters(),
    "group": lambda params: [{"params": params}],
    "group of an iterator": lambda params: [{"params": iter(params)}],
    "group of names": lambda params: [{"params": iter(named(params))}],
    "generator of groups": lambda params: (group for group in [{"params": params}]),
}


@pytest.mark.parametrize("form", SHAPES_OF_PARAMS)
@each_class()
def test_parameters_may_come_in_any_form(case: Case, form: str) -> None:
    params, plain = case.params(), case.params()
    optimizer = case.build(SHAPES_OF_PARAMS[form](params))
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [
        id(p) for p in params
    ]
    assert ("param_names" in optimizer.param_groups[0]) == ("name" in form)
    assert_trains_alike((optimizer, params), (case.build(plain), plain))


@each_class()
def test_groups_of_one_tensor_or_of_names_keep_their_parameters(case: Case) -> None:
    params, plain = case.params(), case.params()
    names = [{"params": [pair]} for pair in named(params)]
    optimizer = case.build(names)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        [name] for name, _ in named(params)
    ]
    bare = case.build([{"params": p} for p in plain])
    assert [group["params"] for group in bare.param_groups] == [[p] for p in plain]
    assert_trains_alike((optimizer, params), (bare, plain))


@each_class()
def test_a_parameter_listed_twice_warns(case: Case) -> None:
    p = Parameter(torch.ones(2, 2, device=case.device))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        case.build([{"params": [p, p]}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.build([p])


@each_case(*EVERY)
def test_defaults_hold_every_option_and_groups_start_from_them(case: Case) -> None:
    optimizer = case.build(case.params())
    (group,) = optimizer.param_groups
    assert group.keys() - {"params"} == optimizer.defaults.keys()
    for key, value in optimizer.defaults.items():
        assert_same(group[key], value, key)
    assert case.kwargs.keys() <= optimizer.defaults.keys()


def public(thing: object) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}


def by_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("copier", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
@each_case(*EVERY)
def test_a_copy_has_every_public_attribute_and_goes_on_identically(
    case: Case, copier: Callable[[Any], Any]
) -> None:
    params = case.params()
    optimizer = case.build([{"params": params[:2]}, {"params": params[2:], "lr": 0.01}])
    train(optimizer, params, range(3))
    twin_params, twin = copier((params, optimizer))
    assert type(twin) is type(optimizer)
    assert public(twin) == public(optimizer)
    assert_same(twin.defaults, optimizer.defaults)
    assert_same(everything(twin, twin_params), everything(optimizer, params))
    assert repr(twin) == repr(optimizer)
    assert_trains_alike((optimizer, params), (twin, twin_params), range(3, 9))


@each_case(*TRAINABLE)
def test_a_copy_shares_no_memory_with_its_original(case: Case) -> None:
    params = case.params()
    optimizer = case.build(params)
    train(optimizer, params, range(3))
    _, twin = copy.deepcopy((params, optimizer))
    before = copy.deepcopy(twin.state_dict())
    train(optimizer, params, range(3, 6))
    assert_same(twin.state_dict(), before)


@pytest.mark.parametrize("layout", ["parameters", "gradients", "both"])
@each_case(*TRAINABLE, where=lambda case: case.path in case.info.strided)
def test_strided_memory_trains_as_contiguous_memory(case: Case, layout: str) -> None:
    plain = Parameter(seeded((6, 4), 0, torch.float32, case.device))
    if layout == "gradients":
        strided = Parameter(plain.detach().clone())
    else:
        strided = Parameter(plain.detach().clone().repeat_interleave(2, dim=1)[:, ::2].detach())
    assert strided.is_contiguous() == (layout == "gradients")
    first, second = case.build([strided]), case.build([plain])
    for step in range(2 * case.frequency):
        set_gradients([plain], step)
        assert plain.grad is not None
        strided.grad = plain.grad.clone()
        if layout != "parameters":
            strided.grad = plain.grad.t().contiguous().t()
            assert not strided.grad.is_contiguous()
        first.step()
        second.step()
    assert_same(strided.detach(), plain.detach())
