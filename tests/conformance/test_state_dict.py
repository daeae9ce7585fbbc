"""State dicts: deterministic, loadable across names, versions, dtypes, devices and files."""

from __future__ import annotations

import io
import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from .checks import (
    EVERY,
    Case,
    assert_same,
    assert_trains_alike,
    copies,
    each_case,
    each_class,
    everything,
    needs_cuda,
    state_of,
    train,
)

with_and_without_names = pytest.mark.parametrize("names", [False, True], ids=["plain", "named"])


def given(params: list[Parameter], names: bool) -> list[Any]:
    return [(f"p{i}", p) for i, p in enumerate(params)] if names else params


def trained(
    case: Case, names: bool = False, steps: int = 5, **overrides: Any
) -> tuple[Optimizer, list[Parameter]]:
    """An optimizer that stands in the middle of a run (and, if it has windows, of a window)."""
    params = case.params()
    optimizer = case.build(given(params, names), **overrides)
    train(optimizer, params, range(steps))
    return optimizer, params


@each_case(*EVERY)
def test_every_parameter_that_had_a_gradient_has_state(case: Case) -> None:
    optimizer, params = trained(case, steps=1)
    assert optimizer.state.keys() == set(params)
    for state in state_of(optimizer, params):
        assert state
        assert all(isinstance(key, str) for key in state)


@with_and_without_names
@each_case(*EVERY)
def test_a_loaded_optimizer_is_the_saved_one(case: Case, names: bool) -> None:
    optimizer, params = trained(case, names)
    twin_params = copies(params)
    twin = case.build(given(twin_params, names))
    saved = deepcopy(optimizer.state_dict())
    untouched = deepcopy(saved)
    twin.load_state_dict(saved)
    assert_same(saved, untouched)
    assert_same(twin.state_dict(), untouched)
    assert_trains_alike((optimizer, params), (twin, twin_params), range(5, 11))
    assert_same(twin.state_dict(), optimizer.state_dict())


@with_and_without_names
@each_class(*EVERY)
def test_parameters_are_numbered_by_their_place(case: Case, names: bool) -> None:
    params = case.params()
    groups = [{"params": given(params, names)[:2]}, {"params": given(params, names)[2:]}]
    optimizer = case.build(groups)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    assert list(saved) == ["state", "param_groups"]
    assert [group["params"] for group in saved["param_groups"]] == [
        [0, 1],
        list(range(2, len(params))),
    ]
    assert [group.get("param_names") for group in saved["param_groups"]] == (
        [["p0", "p1"], [f"p{i}" for i in range(2, len(params))]] if names else [None, None]
    )
    assert list(saved["state"]) == list(range(len(params)))
    assert_same(list(saved["state"].values()), state_of(optimizer, params))


@each_class(*EVERY)
def test_a_repeated_group_is_written_the_same_again(case: Case) -> None:
    optimizer, _ = trained(case)
    once = optimizer.state_dict()["param_groups"]
    optimizer.param_groups.extend(optimizer.param_groups)
    assert_same(optimizer.state_dict()["param_groups"], [*once, *once])


@pytest.mark.parametrize("names_first", [True, False], ids=["from named", "to named"])
@each_case(*EVERY)
def test_names_are_no_obstacle_to_loading(case: Case, names_first: bool) -> None:
    optimizer, params = trained(case, names_first)
    twin_params = copies(params)
    twin = case.build(given(twin_params, not names_first))
    twin.load_state_dict(deepcopy(optimizer.state_dict()))
    assert twin.param_groups[0]["param_names"] == [f"p{i}" for i in range(len(params))]
    assert_trains_alike((optimizer, params), (twin, twin_params), range(5, 11))


@each_case(*EVERY)
def test_a_checkpoint_from_before_an_option_existed_loads(case: Case) -> None:
    keeps = case.info.keeps_absent_options
    optimizer, params = trained(case)
    saved, start = deepcopy(optimizer.state_dict()), copies(params)
    (group,) = saved["param_groups"]
    train(optimizer, params, range(5, 7))
    absent = optimizer.defaults if keeps else case.info.not_og_supported_flags
    absent = [key for key in absent if key not in case.info.learned]
    assert absent

    def load(keys: list[str]) -> tuple[Optimizer, list[Parameter]]:
        older = {**saved, "param_groups": [{k: v for k, v in group.items() if k not in keys}]}
        twin_params = copies(start)
        twin = case.build(twin_params)
        twin.load_state_dict(deepcopy(older))
        return twin, twin_params

    whole, _ = load([])
    for keys in [[key] for key in absent] + ([absent] if keeps else []):
        twin, twin_params = load(keys)
        if keeps:
            assert_same(twin.state_dict(), whole.state_dict())
        for key in keys:
            if keeps:
                assert_same(twin.param_groups[0][key], group[key], key)
            else:
                assert not twin.param_groups[0][key]
        # Optimizers that hold the same train the same: once is enough.
        if not keeps or len(keys) == len(absent):
            train(twin, twin_params, range(5, 7))
            if keeps or not any(group[key] for key in keys):
                torch.testing.assert_close(twin_params, params)


@each_case(*EVERY)
def test_a_file_read_with_weights_only_holds_the_whole_state(case: Case) -> None:
    optimizer, params = trained(case)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same(loaded, optimizer.state_dict())
    twin_params = copies(params)
    twin = case.build(twin_params)
    twin.load_state_dict(loaded)
    assert_same(twin.state_dict(), optimizer.state_dict())
    assert_trains_alike((optimizer, params), (twin, twin_params), range(5, 11))


@each_case(*EVERY)
def test_a_checkpoint_whose_step_is_a_plain_number_loads(case: Case) -> None:
    optimizer, params = trained(case)
    saved = deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        assert isinstance(state["step"], Tensor)
        state["step"] = state["step"].item()
    twin_params = copies(params)
    twin = case.build(twin_params)
    twin.load_state_dict(saved)
    assert_trains_alike((optimizer, params), (twin, twin_params), range(5, 9))


@each_case(*EVERY)
def test_an_empty_checkpoint_starts_the_run_anew(case: Case) -> None:
    params = case.params()
    fresh = case.build(params).state_dict()
    optimizer, twin_params = trained(case)
    optimizer.load_state_dict(fresh)
    assert not any(state_of(optimizer, twin_params))
    with torch.no_grad():
        for p, q in zip(twin_params, params, strict=True):
            p.copy_(q)
    assert_trains_alike((case.build(params), params), (optimizer, twin_params))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_case(*EVERY)
def test_loaded_state_takes_the_dtype_of_its_parameter(case: Case, dtype: torch.dtype) -> None:
    optimizer, params = trained(case)
    cast = [Parameter(p.detach().to(dtype), requires_grad=p.requires_grad) for p in params]
    twin = case.build(cast)
    twin.load_state_dict(deepcopy(optimizer.state_dict()))
    for p, state, loaded in zip(
        cast, state_of(optimizer, params), state_of(twin, cast), strict=True
    ):
        assert state.keys() == loaded.keys()
        for key in state:
            if key in case.info.counters:
                expected = state[key]
            elif key in case.info.wide_state:
                expected = state[key].to(torch.promote_types(dtype, torch.float32))
            else:
                kept = case.kwargs.get("state_dtype")
                kept = dtype if kept is None else kept
                if key in case.info.narrow_state and kept == torch.float32:
                    kept = torch.bfloat16
                expected = state[key].to(kept)
            assert_same(loaded[key], expected, key)
        assert p.dtype == dtype
    train(twin, cast, range(5, 8))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str
)
@each_class("forloop", "foreach", "fused")
def test_state_has_the_dtype_of_its_parameter(case: Case, dtype: torch.dtype) -> None:
    if dtype.is_complex and (case.path == "fused" or not case.info.serves(dtype)):
        dtype = torch.float32  # these serve real parameters only
    params = case.params(dtype)
    optimizer = case.build(params, **case.info.narrow_options)
    train(optimizer, params, range(2))
    for p, state in zip(params, state_of(optimizer, params), strict=True):
        for key, value in state.items():
            if key in case.info.counters:
                assert value.dtype == torch.float32 and value.dim() == 0
            elif key in case.info.narrow_state and p.dtype == torch.float32:
                assert value.dtype == torch.bfloat16 and value.shape == p.shape
            elif key not in case.info.wide_state:
                assert value.dtype == p.dtype and value.shape == p.shape


@each_class(*EVERY)
def test_a_checkpoint_of_another_layout_is_refused_and_changes_nothing(case: Case) -> None:
    optimizer, params = trained(case)
    before = everything(optimizer, params)
    fewer = case.build(case.params()[:-1])
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(fewer.state_dict())
    halves = case.params()
    two = case.build([{"params": halves[:1]}, {"params": halves[1:]}])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two.state_dict())
    assert_same(everything(optimizer, params), before)


@each_class(*EVERY)
def test_a_checkpoint_brings_its_hyperparameters(case: Case) -> None:
    optimizer, params = trained(case, lr=0.25)
    optimizer.param_groups[0]["eps"] = 1e-3
    twin_params = copies(params)
    twin = case.build(twin_params, lr=0.5)
    with_its_own = twin.param_groups[0]
    saved = deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():  # options that differ may be reported
        warnings.simplefilter("ignore")
        twin.load_state_dict(saved)
    assert twin.param_groups[0] is not with_its_own
    assert twin.param_groups[0]["lr"] == 0.25
    assert twin.param_groups[0]["eps"] == 1e-3
    assert twin.defaults["lr"] == 0.5
    assert_trains_alike((optimizer, params), (twin, twin_params), range(5, 8))


@needs_cuda
@each_case(*EVERY, where=lambda case: case.device == "cuda" and not case.info.learned)
def test_a_checkpoint_of_the_cpu_loads_on_cuda_and_back(case: Case) -> None:
    flags = {flag: False for flag in case.info.supported_impls}
    options = {**flags, "capturable": False} if case.info.has_capturable_arg else flags
    on_cpu_params = [Parameter(p.detach().cpu()) for p in case.params()]
    on_cpu = case.build(on_cpu_params, **options)
    train(on_cpu, on_cpu_params, range(5))
    params = [
        Parameter(p.detach().cuda(), requires_grad=case.path != "differentiable")
        for p in on_cpu_params
    ]
    optimizer = case.build(params)
    kept = deepcopy(optimizer.state_dict()["param_groups"])
    # Copied: loading shares the tensors that need no conversion, such as counters on the CPU.
    optimizer.load_state_dict({**deepcopy(on_cpu.state_dict()), "param_groups": kept})
    on_device = case.path == "fused" or bool(case.kwargs.get("capturable"))
    for state in state_of(optimizer, params):
        assert state["step"].is_cuda == on_device
        moments = [v for k, v in state.items() if k not in case.info.counters]
        assert moments and all(v.is_cuda for v in moments)
    for step in range(5, 11):
        train(on_cpu, on_cpu_params, [step])
        train(optimizer, params, [step])
        torch.testing.assert_close(
            [p.detach().cpu() for p in params], [p.detach() for p in on_cpu_params]
        )
    back_params = copies(on_cpu_params)
    back = case.build(back_params, **options)
    cpu_groups = deepcopy(back.state_dict()["param_groups"])
    back.load_state_dict({**deepcopy(optimizer.state_dict()), "param_groups": cpu_groups})
    for state in state_of(back, back_params):
        assert all(v.is_cpu for k, v in state.items() if k not in case.info.counters)
    train(back, back_params, range(11, 13))
