"""Bad input is refused with an error that names the place and the fix, before anything changes."""

import pytest
import torch

from nested_optim import (
    DGD,
    M3,
    DeepMomentum,
    DeepNestedOptimizer,
    DeltaMomentum,
    NestedOptimizer,
)

from .helpers import assert_unchanged, make_params, set_grads, snapshot, train


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
        ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),
        ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1"),
        ({"betas": (0.9, 0.99, 0.999)}, ValueError, "Invalid betas: .* Give two"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1"),
        ({"frequency": 0}, ValueError, "Invalid frequency: 0"),
        ({"frequency": -1}, ValueError, "Invalid frequency: -1"),
        ({"frequency": 2.5}, ValueError, "Invalid frequency: 2.5"),
        ({"frequency": True}, ValueError, "Invalid frequency: True"),
        ({"window": "max"}, ValueError, "Invalid window: 'max'. Choose one of mean, sum"),
        ({"state_dtype": torch.int32}, ValueError, "Invalid state_dtype: torch.int32"),
        ({"state_dtype": "float33"}, ValueError, "Invalid state_dtype: 'float33'"),
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True`"),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `diff"),
        (
            {"foreach": True, "differentiable": True},
            RuntimeError,
            "`foreach` does not support `differentiable`",
        ),
        (
            {"lr": torch.tensor(0.1), "foreach": True},
            ValueError,
            "lr as a Tensor is not supported for capturable=False and foreach=True",
        ),
    ],
    ids=str,
)
def test_an_invalid_option_is_refused_for_all_and_for_one_group(options, error, message):
    params = make_params((2,), (2,))
    with pytest.raises(error, match=f"^{message}"):
        NestedOptimizer(params, **options)
    group = {"params": params[1:], "name": "head", **options}
    with pytest.raises(error, match=rf"param group 1 \('head'\): {message}"):
        NestedOptimizer([{"params": params[:1]}, group])
    optimizer = NestedOptimizer(params[:1])
    train(optimizer, params[:1], [0])
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    "params, error, message",
    [
        ([], ValueError, "optimizer got an empty parameter list"),
        (torch.zeros(2), TypeError, "iterable of Tensors or dicts"),
        (["weight"], TypeError, "can only optimize Tensors"),
        ([torch.zeros(2, requires_grad=True) * 2], ValueError, "non-leaf"),
        ([{"params": {torch.zeros(2)}}], TypeError, "ordered collections"),
        (None, TypeError, "`params` or as `param_groups=`, but got neither"),
    ],
)
def test_parameters_that_no_optimizer_takes_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        NestedOptimizer(params)


def test_parameters_come_once():
    params = make_params((2,))
    with pytest.raises(TypeError, match="but got both"):
        NestedOptimizer(params, param_groups=params)
    assert NestedOptimizer(param_groups=[{"params": params}]).param_groups[0]["params"] == params


def test_a_parameter_in_two_groups_is_named():
    params = make_params((2, 3), (4,))
    groups = [
        {"params": [("a", params[0]), ("b", params[1])]},
        {"params": [("tied", params[0])], "name": "head"},
    ]
    with pytest.raises(
        ValueError,
        match=r"param group 1 \('head'\): some parameters appear in more than one parameter group: "
        "'tied' is already in group 0",
    ):
        NestedOptimizer(groups)
    optimizer = NestedOptimizer(params)
    with pytest.raises(ValueError, match=r"one of shape \(2, 3\) is already in group 0"):
        optimizer.add_param_group({"params": params[0]})
    assert len(optimizer.param_groups) == 1


def test_an_option_that_is_nearly_one_is_a_typo():
    params = make_params((2,))
    with pytest.raises(ValueError, match="unknown option 'frequnecy'; did you mean 'frequency'"):
        NestedOptimizer([{"params": params, "frequnecy": 10}])
    group = NestedOptimizer([{"params": params, "layer": "wte", "lr_scale": 2.0}]).param_groups[0]
    assert group["layer"] == "wte"  # torch lets groups carry what users like


@pytest.mark.parametrize("index", [0, 1])
def test_sparse_gradients_are_refused_before_any_group_has_moved(index):
    params = make_params((2, 3), (2, 3))
    optimizer = NestedOptimizer(
        [{"params": [("first", params[0])]}, {"params": [("second", params[1])], "name": "table"}],
        frequency=2,
    )
    train(optimizer, params, range(3))
    set_grads(params, [torch.ones(2, 3)] * 2)
    params[index].grad = torch.ones(2, 3).to_sparse()
    before = snapshot(optimizer)
    name = ("first", "second")[index]
    with pytest.raises(
        RuntimeError, match=f"sparse gradients, but parameter '{name}' .*sparse=False"
    ):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_fused_refuses_a_complex_parameter_before_any_group_has_moved():
    params = make_params((2,)) + make_params((2,), dtype=torch.complex64)
    optimizer = NestedOptimizer([{"params": [p]} for p in params], fused=True)
    set_grads(params, [torch.ones_like(p) for p in params])
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"floating point Tensors, but parameter 0 of param group 1"
    ):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("frequency", [0, 2.5, True, "2"])
def test_a_frequency_edited_to_nonsense_is_refused_at_the_next_step(frequency):
    params = make_params((2,), (2,))
    optimizer = NestedOptimizer([{"params": [p]} for p in params], frequency=2)
    train(optimizer, params, [0])
    optimizer.param_groups[1]["frequency"] = frequency
    set_grads(params, [torch.ones(2)] * 2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="param group 1: Invalid frequency"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    "edit, error, message",
    [
        ({"window": "max"}, ValueError, "param group 1: Invalid window: 'max'"),
        (
            {"foreach": True, "lr": torch.tensor(0.1)},
            RuntimeError,
            "param group 1: lr or betas as a Tensor is not supported",
        ),
    ],
    ids=str,
)
def test_options_edited_to_what_no_step_can_do_are_refused_first(edit, error, message):
    params = make_params((2,), (2,))
    optimizer = NestedOptimizer([{"params": [p]} for p in params], frequency=2)
    train(optimizer, params, [0])
    optimizer.param_groups[1].update(edit)
    set_grads(params, [torch.ones(2)] * 2)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_the_callers_groups_stay_as_they_are():
    params = make_params((2,), (2,))
    groups = [{"params": params[:1], "frequency": 2}, {"params": iter(params[1:])}]
    keys = [set(g) for g in groups]
    optimizer = NestedOptimizer(groups, lr=0.5)
    added = {"params": make_params((3,)), "decoupled_weight_decay": False}
    optimizer.add_param_group(added)
    assert [set(g) for g in groups] == keys
    assert groups[0]["params"] == params[:1]
    assert added.keys() == {"params", "decoupled_weight_decay"}
    assert optimizer.param_groups[2]["decoupled"] is False


EVERY = [NestedOptimizer, DeepNestedOptimizer, M3, DGD, DeltaMomentum, DeepMomentum]


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("key", ["lr", "weight_decay", "eps", "betas", "momentum"])
def test_a_number_in_quotes_is_refused_by_every_optimizer_with_that_option(cls, key):
    options = {"decay": 0.0} if cls is DGD else {}
    if key not in cls(make_params((2, 2)), **options).defaults:
        pytest.skip("no such option")
    value, name = ("1e-3", key) if key != "betas" else ((0.9, "1e-3", 0.99), r"betas\[1\]")
    message = rf"^{name} must be a number, but is '1e-3' \(YAML reads 1e-4 as a string"
    with pytest.raises(ValueError, match=message):
        cls(make_params((2, 2)), **options, **{key: value})
    with pytest.raises(ValueError, match=r"param group 0: .* must be a number|Invalid betas: None"):
        cls([{"params": make_params((2, 2)), key: None}], **options)


def test_unscaling_on_the_device_is_refused_where_it_cannot_be_done():
    params = make_params((2,))
    optimizer = NestedOptimizer(params, frequency=2, fused=True)
    assert not optimizer._step_supports_amp_scaling
    set_grads(params, [torch.ones(2)])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="taken by fused kernels only"):
        optimizer.step()
    assert_unchanged(optimizer, before)
