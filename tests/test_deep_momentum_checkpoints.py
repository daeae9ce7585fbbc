"""The memory of DeepMomentum goes where its optimizer goes: files, copies, other processes."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD

from nested_optim import DeepMomentum, rules

from .helpers import (
    assert_same_state,
    assert_same_tensors,
    assert_unchanged,
    clone_params,
    make_params,
    snapshot,
    train,
)

SHAPES = (6, 4), (7,), (), (3, 2, 4), (0, 3)
TENSORS = ("memory_weights", "memory_exp_avg", "memory_exp_avg_sq")


def memory_of(optimizer):
    return [optimizer.param_groups[0][key] for key in TENSORS]


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.float32, {"objective": "dot", "foreach": False}),
        (torch.bfloat16, {"state_dtype": torch.float32}),
        (torch.float64, {}),
        (torch.complex64, {}),
    ],
    ids=str,
)
def test_resuming_inside_a_window_is_never_having_stopped(dtype, options, stop):
    def build(params):
        groups = [{"params": params[:2], "frequency": 3}, {"params": params[2:]}]
        return DeepMomentum(groups, lr=0.05, memory_lr=0.05, memory_samples=20, **options)

    params = make_params(*SHAPES, dtype=dtype)
    optimizer = build(params)
    train(optimizer, params, range(stop))
    saved = through_a_file(optimizer.state_dict())
    resumed_params = clone_params(params)
    train(optimizer, params, range(stop, 11))
    resumed = build(resumed_params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the memory is no option that differs
        resumed.load_state_dict(saved)
    train(resumed, resumed_params, range(stop, 11))
    assert_same_tensors(resumed_params, params)
    assert_same_state(resumed, optimizer)
    assert_same_tensors(memory_of(resumed), memory_of(optimizer))


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_take_the_memory_along_and_share_nothing(copying):
    params = make_params(*SHAPES)
    optimizer = DeepMomentum(params, memory_lr=0.05)
    train(optimizer, params, range(4))
    twin = copying(optimizer)
    kept = copying(twin)
    twin_params = twin.param_groups[0]["params"]
    train(optimizer, params, range(4, 9))
    assert_same_tensors(memory_of(twin), memory_of(kept))
    assert twin.metrics() == {}
    train(twin, twin_params, range(4, 9))
    assert_same_tensors(twin_params, params)
    assert_same_tensors(memory_of(twin), memory_of(optimizer))
    assert set(twin.metrics()) == {"memory_loss", "momentum_loss"}


def test_a_loaded_memory_is_not_the_checkpoint_s_own_tensor():
    params = make_params((6, 4))
    optimizer = DeepMomentum(params, memory_lr=0.1)
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved["param_groups"])
    fresh_params = clone_params(params)
    fresh = DeepMomentum(fresh_params, memory_lr=0.1)
    fresh.load_state_dict(saved)
    train(fresh, fresh_params, range(3, 6))
    for key in TENSORS:
        assert torch.equal(saved["param_groups"][0][key], kept[0][key])
        assert not torch.equal(fresh.param_groups[0][key], kept[0][key])


def test_a_fresh_checkpoint_starts_the_memory_anew():
    params = make_params((6, 4))
    fresh = copy.deepcopy(DeepMomentum(params, memory_lr=0.1).state_dict())
    optimizer = DeepMomentum(params, memory_lr=0.1)
    train(optimizer, params, range(3))
    optimizer.load_state_dict(fresh)
    assert memory_of(optimizer) == [None, None, None]
    train(optimizer, params, [0])
    initial = rules.initial_memory(16, 0)
    assert torch.equal(optimizer.param_groups[0]["memory_weights"], initial)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"memory_weights": torch.zeros(8)}, r"memory_weights must be a tensor of 64 .* is \(8,\)"),
        ({"memory_exp_avg": None}, "memory_exp_avg must be a tensor of 64 numbers.*None"),
        ({"hidden": 4}, "must be a tensor of 16 numbers for hidden=4"),
        ({"memory_decays": (0.5,)}, "Invalid memory_decays"),
    ],
)
def test_a_memory_of_another_shape_is_refused_and_changes_nothing(change, message):
    params = make_params((6, 4))
    optimizer = DeepMomentum(params, memory_lr=0.1)
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(change)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def test_a_checkpoint_s_own_sizes_replace_the_live_ones():
    params = make_params((6, 4))
    optimizer = DeepMomentum(params, memory_lr=0.1, hidden=4)
    train(optimizer, params, range(3))
    other_params = clone_params(params)
    other = DeepMomentum(other_params, memory_lr=0.1)
    train(other, other_params, range(2))
    other_params[0].data.copy_(params[0])
    with pytest.warns(UserWarning, match=r"hidden \(group 0: 16 -> 4\)"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, range(3, 6))
    train(other, other_params, range(3, 6))
    assert_same_tensors(params, other_params)
    other.add_param_group({"params": make_params((2,))})
    assert other.param_groups[1]["hidden"] == 4


def test_a_checkpoint_of_sgd_brings_its_momentum_as_a_full_buffer():
    params = make_params(*SHAPES)
    theirs = SGD(params, lr=0.01, momentum=0.9)
    train(theirs, params, range(5))
    our_params = clone_params(params)
    ours = DeepMomentum(our_params, lr=0.01)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(theirs, params, [5])
    train(ours, our_params, [5])
    assert_same_tensors(our_params, params)
    for p in our_params:
        assert ours.state[p]["scales"][2].item() == pytest.approx(10.0)
    train(ours, our_params, range(6, 9))
    assert all(torch.isfinite(p).all() for p in our_params)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_saves_and_loads_the_memory(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
        return model, DeepMomentum(model.parameters(), lr=0.05, memory_lr=0.05, frequency=2)

    model, optimizer = build()
    params = list(model.parameters())
    train(optimizer, params, range(5))
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint")

    resumed_model, resumed = build()
    state = {"optimizer": get_optimizer_state_dict(resumed_model, resumed)}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    set_optimizer_state_dict(resumed_model, resumed, state["optimizer"])
    resumed_model.load_state_dict(model.state_dict())
    assert_same_tensors(memory_of(resumed), memory_of(optimizer))
    resumed_params = list(resumed_model.parameters())
    train(optimizer, params, range(5, 9))
    train(resumed, resumed_params, range(5, 9))
    assert_same_tensors(resumed_params, params)
    assert_same_tensors(memory_of(resumed), memory_of(optimizer))


def test_flattened_state_dicts_carry_the_memory():
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model = nn.Linear(5, 4)
    optimizer = DeepMomentum(model.parameters(), memory_lr=0.05)
    train(optimizer, list(model.parameters()), range(4))
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    twin_model = copy.deepcopy(model)
    twin = DeepMomentum(twin_model.parameters(), memory_lr=0.05)
    set_optimizer_state_dict(twin_model, twin, copy.deepcopy(state), options=flat)
    assert_same_tensors(memory_of(twin), memory_of(optimizer))
    train(optimizer, list(model.parameters()), range(4, 7))
    train(twin, list(twin_model.parameters()), range(4, 7))
    assert_same_tensors(list(twin_model.parameters()), list(model.parameters()))


def test_the_first_step_makes_every_key_and_the_memory_is_flat_float32():
    params = make_params(*SHAPES, dtype=torch.bfloat16)
    optimizer = DeepMomentum(params, hidden=8)
    train(optimizer, params, [0])
    keys = {
        "step", "window_count", "momentum_buffer", "exp_avg_fast", "exp_avg_slow", "scales",
    }  # fmt: skip
    assert all(set(optimizer.state[p]) == keys for p in params)
    for tensor in memory_of(optimizer):
        assert tensor.shape == (32,) and tensor.dtype == torch.float32
    assert type(optimizer.param_groups[0]["memory_step"]) is int
