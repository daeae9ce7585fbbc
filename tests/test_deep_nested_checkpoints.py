"""What DeepNestedOptimizer has learned goes where it goes: files, copies, other processes."""

import copy
import io
import pickle
import subprocess
import sys
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
from torch.optim import AdamW

from nested_optim import DeepNestedOptimizer
from nested_optim.meta import learned

from .helpers import (
    assert_same_state,
    assert_same_tensors,
    assert_unchanged,
    clone_params,
    make_params,
    random_grads,
    set_grads,
    snapshot,
    train,
)

SHAPES = (6, 4), (7,), (), (3, 2, 4), (0, 3)
FAST = {"lr": 0.05, "meta_lr": 0.05, "meta_update_freq": 4, "cms_frequencies": (1, 3, 7)}


def learned_by(optimizer):
    return {key: optimizer.param_groups[0][key] for key in learned.KEYS}


def assert_learned_alike(left, right):
    a, b = learned_by(left), learned_by(right)
    for key in a:
        if torch.is_tensor(a[key]):
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
        else:
            assert a[key] == b[key], key


def train_told(optimizer, params, seeds):
    for seed in seeds:
        set_grads(params, random_grads(params, seed))
        optimizer.step(1.0 / (1 + seed))
        optimizer.zero_grad()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [1, 2, 6, 8])
@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.float32, {"foreach": False, "weight_decay": 0.1, "max_grad_norm": 1.0}),
        (torch.float32, {"learn_momentum": False, "amsgrad": True}),
        (torch.bfloat16, {"state_dtype": torch.float32}),
        (torch.float64, {"normalize": False}),
        (torch.complex64, {}),
    ],
    ids=str,
)
def test_resuming_inside_windows_and_meta_periods_is_never_having_stopped(dtype, options, stop):
    def build(params):
        groups = [{"params": params[:2], "frequency": 3, "name": "slow"}, {"params": params[2:]}]
        return DeepNestedOptimizer(groups, **FAST, **options)

    params = make_params(*SHAPES, dtype=dtype)
    optimizer = build(params)
    train_told(optimizer, params, range(stop))
    saved = through_a_file(optimizer.state_dict())
    resumed_params = clone_params(params)
    train_told(optimizer, params, range(stop, 14))
    resumed = build(resumed_params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was learned is no option that differs
        resumed.load_state_dict(saved)
    train_told(resumed, resumed_params, range(stop, 14))
    assert_same_tensors(resumed_params, params)
    assert_same_state(resumed, optimizer)
    assert_learned_alike(resumed, optimizer)
    assert optimizer.param_groups[0]["meta_updates"] == 3
    assert torch.equal(resumed.get_lr_multipliers(), optimizer.get_lr_multipliers())
    assert (optimizer.get_lr_multipliers() != 1).all()


RESUME = """
import sys, torch
from tests.helpers import make_params
from tests.test_deep_nested_checkpoints import FAST, SHAPES, train_told
from nested_optim import DeepNestedOptimizer
saved = torch.load(sys.argv[1], weights_only=True)
params = make_params(*SHAPES)
optimizer = DeepNestedOptimizer(params, frequency=2, **FAST)
optimizer.load_state_dict(saved["optimizer"])
for p, value in zip(params, saved["params"]):
    p.data.copy_(value)
train_told(optimizer, params, range(5, 12))
torch.save([p.detach() for p in params], sys.argv[2])
"""


def test_a_new_process_goes_on_bit_for_bit(tmp_path):
    params = make_params(*SHAPES)
    optimizer = DeepNestedOptimizer(params, frequency=2, **FAST)
    train_told(optimizer, params, range(5))
    saved = {"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}
    torch.save(saved, tmp_path / "saved")
    train_told(optimizer, params, range(5, 12))
    run = subprocess.run(
        [sys.executable, "-c", RESUME, tmp_path / "saved", tmp_path / "result"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert_same_tensors(torch.load(tmp_path / "result"), [p.detach() for p in params])


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_take_along_what_was_learned_and_share_nothing(copying):
    model = nn.Linear(4, 3)
    params = list(model.parameters())
    optimizer = DeepNestedOptimizer(model, **FAST)
    train_told(optimizer, params, range(5))
    twin = copying(optimizer)
    kept = copying(twin)
    twin_params = twin.param_groups[0]["params"]
    train_told(optimizer, params, range(5, 12))
    assert_learned_alike(twin, kept)
    train_told(twin, twin_params, range(5, 12))
    assert_same_tensors(twin_params, params)
    assert_learned_alike(twin, optimizer)
    assert twin.model is None and optimizer.model is model


def test_training_on_does_not_write_to_a_checkpoint_that_was_loaded():
    params = make_params((6, 4))
    options = {"meta_rule": "adam", **FAST}  # which uses all tensors
    optimizer = DeepNestedOptimizer(params, **options)
    train(optimizer, params, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved["param_groups"])
    fresh_params = clone_params(params)
    fresh = DeepNestedOptimizer(fresh_params, **options)
    fresh.load_state_dict(saved)
    train(fresh, fresh_params, range(5, 10))
    for key in set(learned.KEYS[:-2]) - {"long_run"}:
        assert torch.equal(saved["param_groups"][0][key], kept[0][key])
        assert not torch.equal(fresh.param_groups[0][key], kept[0][key])


def test_a_fresh_checkpoint_starts_learning_anew():
    params = make_params((6, 4))
    fresh = copy.deepcopy(DeepNestedOptimizer(params, **FAST).state_dict())
    optimizer = DeepNestedOptimizer(params, **FAST)
    train(optimizer, params, range(5))
    optimizer.load_state_dict(fresh)
    assert set(learned_by(optimizer).values()) == {None, 0}
    train(optimizer, params, [0])
    assert torch.equal(optimizer.get_lr_multipliers(), torch.ones(1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mixing_weights": torch.zeros(8)}, r"mixing_weights must be a tensor of 3 .* is \(8,\)"),
        ({"controller_grad": None}, "controller_grad must be a tensor of 1313 numbers.*None"),
        ({"momentum_hidden_dim": 4}, "momentum_weights must be a tensor of 55 numbers"),
        ({"cms_frequencies": (2, 3)}, "The first is 1"),
    ],
)
def test_what_was_learned_by_other_networks_is_refused_and_changes_nothing(change, message):
    params = make_params((6, 4))
    optimizer = DeepNestedOptimizer(params, **FAST)
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(change)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def test_a_trace_of_another_size_is_refused():
    params = make_params((6, 4))
    optimizer = DeepNestedOptimizer(params, **FAST)
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["update_trace"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'update_trace' has shape \(3,\)"):
        optimizer.load_state_dict(saved)


def test_a_checkpoint_of_adamw_loads_and_learning_begins():
    params = make_params(*SHAPES)
    theirs = AdamW(params, lr=0.05, weight_decay=0.0)
    train(theirs, params, range(5))
    our_params = clone_params(params)
    ours = DeepNestedOptimizer(our_params, **FAST)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for seed in range(5, 8):
        train(theirs, params, [seed])
        train(ours, our_params, [seed])
        assert_same_tensors(our_params, params)
    train(ours, our_params, range(8, 14))
    assert (ours.get_lr_multipliers() != 1).all()
    assert all(torch.isfinite(p).all() for p in our_params)


def test_an_unroll_goes_on_after_loading_a_checkpoint_of_adamw():
    model = nn.Linear(4, 1)
    adamw = AdamW(model.parameters(), lr=0.05)
    train(adamw, list(model.parameters()), range(3))
    optimizer = DeepNestedOptimizer(
        model, mode="explicit", loss_fn=lambda m, x: m(x).square().mean()
    )
    saved = copy.deepcopy(adamw.state_dict())
    saved["param_groups"][0].pop("param_names", None)
    with pytest.warns(UserWarning, match="weight_decay"):
        optimizer.load_state_dict(saved)
    x = torch.ones(2, 4)
    assert torch.isfinite(optimizer.meta_update(x, [x, x]))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("options", [{}, {"learn_momentum": False}], ids=["all", "some"])
def test_torch_distributed_checkpoint_saves_and_loads_what_was_learned(tmp_path, options):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
        return model, DeepNestedOptimizer(model, frequency=2, **FAST, **options)

    model, optimizer = build()
    params = list(model.parameters())
    train(optimizer, params, range(7))
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint")

    resumed_model, resumed = build()
    state = {"optimizer": get_optimizer_state_dict(resumed_model, resumed)}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    set_optimizer_state_dict(resumed_model, resumed, state["optimizer"])
    resumed_model.load_state_dict(model.state_dict())
    assert_learned_alike(resumed, optimizer)
    resumed_params = list(resumed_model.parameters())
    train(optimizer, params, range(7, 15))
    train(resumed, resumed_params, range(7, 15))
    assert_same_tensors(resumed_params, params)
    assert_learned_alike(resumed, optimizer)


def test_flattened_state_dicts_carry_what_was_learned():
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model = nn.Linear(5, 4)
    optimizer = DeepNestedOptimizer(model, **FAST)
    train(optimizer, list(model.parameters()), range(6))
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    twin_model = copy.deepcopy(model)
    twin = DeepNestedOptimizer(twin_model, **FAST)
    set_optimizer_state_dict(twin_model, twin, copy.deepcopy(state), options=flat)
    assert_learned_alike(twin, optimizer)
    train(optimizer, list(model.parameters()), range(6, 10))
    train(twin, list(twin_model.parameters()), range(6, 10))
    assert_same_tensors(list(twin_model.parameters()), list(model.parameters()))


def test_the_first_step_makes_every_key_and_each_module_is_flat_float32():
    params = make_params(*SHAPES, dtype=torch.bfloat16)
    optimizer = DeepNestedOptimizer(params, controller_hidden_dim=8)
    train(optimizer, params, [0])
    keys = {key for p in params for key in optimizer.state[p]}
    for key in learned.KEYS[:-2]:
        tensor = optimizer.param_groups[0][key]
        assert tensor.dim() == 1 and tensor.dtype == torch.float32
    assert type(optimizer.param_groups[0]["global_step"]) is int
    for p in params:
        assert optimizer.state[p]["exp_avg_slow1"].dtype == torch.float32
        assert optimizer.state[p]["previous_grad"].dtype == torch.bfloat16
    train(optimizer, params, range(1, 5))
    assert {key for p in params for key in optimizer.state[p]} == keys
