"""Optimizer state survives being saved, loaded, copied and exchanged with torch's optimizers."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch.optim import Adam, AdamW

from nested_optim import NestedOptimizer

from .helpers import (
    assert_same_state,
    assert_same_tensors,
    assert_unchanged,
    clone_params,
    make_params,
    random_grads,
    snapshot,
    step_with,
    train,
)

SHAPES = (7, 5), (11,), ()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def build(params, **options):
    options = {"lr": 0.01, **options}
    return NestedOptimizer(
        [
            {"params": params[:1], "frequency": 3, "name": "slow"},
            {"params": params[1:], "frequency": 1, "name": "fast"},
        ],
        **options,
    )


RESUME_OPTIONS = [
    (torch.float32, {}),
    (torch.float32, {"amsgrad": True, "decoupled": False, "window": "sum"}),
    (torch.float32, {"foreach": False, "lr": torch.tensor(0.01)}),
    (torch.float32, {"fused": True}),
    (torch.float32, {"capturable": True}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"state_dtype": torch.float32}),
    (torch.float64, {"state_dtype": torch.float32}),
    (torch.complex64, {}),
]


@pytest.mark.parametrize("dtype, options", RESUME_OPTIONS, ids=str)
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resuming_inside_a_window_is_never_having_stopped(dtype, options, stop):
    params = make_params(*SHAPES, dtype=dtype)
    optimizer = build(params, **options)
    train(optimizer, params, range(stop))
    saved = through_a_file(optimizer.state_dict())
    resumed_params = clone_params(params)
    train(optimizer, params, range(stop, 10))

    resumed = build(resumed_params, **options)
    resumed.load_state_dict(saved)
    train(resumed, resumed_params, range(stop, 10))
    assert_same_tensors(resumed_params, params)
    assert_same_state(resumed, optimizer)


RESUME_IN_A_NEW_PROCESS = """
import sys, torch
from nested_optim import NestedOptimizer
saved = torch.load(sys.argv[1], weights_only=True)
params = [torch.nn.Parameter(p) for p in saved["params"]]
optimizer = NestedOptimizer(params, lr=0.01, frequency=3, **saved["options"])
optimizer.load_state_dict(saved["optimizer"])
for grads in saved["grads"]:
    for p, g in zip(params, grads):
        p.grad = g
    optimizer.step()
torch.save([p.detach() for p in params], sys.argv[2])
"""


@pytest.mark.parametrize(
    "dtype, options",
    [(torch.float32, {}), (torch.bfloat16, {"state_dtype": "float32"})],
    ids=str,
)
def test_resuming_in_a_new_process_is_bit_identical(dtype, options, tmp_path):
    params = make_params(*SHAPES, dtype=dtype)
    optimizer = NestedOptimizer(params, lr=0.01, frequency=3, **options)
    train(optimizer, params, range(4))
    torch.save(
        {
            "params": [p.detach() for p in params],
            "optimizer": optimizer.state_dict(),
            "options": options,
            "grads": [random_grads(params, seed) for seed in range(4, 11)],
        },
        tmp_path / "saved.pt",
    )
    train(optimizer, params, range(4, 11))
    command = [sys.executable, "-c", RESUME_IN_A_NEW_PROCESS]
    subprocess.run(
        [*command, tmp_path / "saved.pt", tmp_path / "resumed.pt"], check=True, timeout=120
    )
    assert_same_tensors(torch.load(tmp_path / "resumed.pt"), params)


@pytest.mark.parametrize("torch_class", [Adam, AdamW])
def test_a_torch_checkpoint_loads_and_training_goes_on_as_torch_would(torch_class):
    params = make_params(*SHAPES)
    theirs = torch_class(params, lr=0.01, weight_decay=0.1, foreach=False)
    train(theirs, params, range(3))
    our_params = clone_params(params)
    # Since torch 2.7 a checkpoint says which of the two it is; of an older one the user must know.
    says_so = "decoupled_weight_decay" in theirs.state_dict()["param_groups"][0]
    known = {} if says_so else {"decoupled": torch_class is AdamW}
    ours = NestedOptimizer(our_params, weight_decay=0.1, foreach=False, **known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["decoupled"] is (torch_class is AdamW)
    train(theirs, params, range(3, 6))
    train(ours, our_params, range(3, 6))
    assert_same_tensors(our_params, params)


@pytest.mark.parametrize("torch_class", [Adam, AdamW])
def test_a_torch_checkpoint_does_not_wipe_what_torch_does_not_know(torch_class):
    params = make_params(*SHAPES)
    theirs = torch_class(params)
    train(theirs, params, range(2))
    ours = NestedOptimizer(
        clone_params(params), frequency=4, window="sum", state_dtype=torch.float64
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    assert (group["frequency"], group["window"], group["state_dtype"]) == (4, "sum", "float64")
    state = ours.state[group["params"][0]]
    assert state["exp_avg"].dtype == torch.float64
    train(ours, group["params"], range(3))
    assert state["step"] == 2 and ours.state[group["params"][0]]["window_count"] == 3


@pytest.mark.parametrize("torch_class, decoupled", [(Adam, False), (AdamW, True)])
def test_a_frequency_one_checkpoint_loads_into_torch(torch_class, decoupled):
    params = make_params(*SHAPES)
    options = {"lr": 0.01, "weight_decay": 0.1, "foreach": False}
    ours = NestedOptimizer(params, decoupled=decoupled, **options)
    train(ours, params, range(3))
    their_params = clone_params(params)
    theirs = torch_class(their_params, **options)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(ours, params, range(3, 6))
    train(theirs, their_params, range(3, 6))
    assert_same_tensors(their_params, params)


def test_checkpoints_hold_plain_values_and_tensors_under_string_keys():
    params = make_params(*SHAPES)
    optimizer = build(params, state_dtype=torch.float32)
    handle = optimizer.register_meta_update_hook(lambda _: None, every=2)
    train(optimizer, params, range(4))
    handle.remove()
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    scalar = (int, float, str, bool, type(None))
    for group in saved["param_groups"]:
        for key, value in group.items():
            values = value if isinstance(value, (tuple, list)) else (value,)
            assert all(type(v) in scalar for v in values), key
    for entries in saved["state"].values():
        assert all(isinstance(v, torch.Tensor) for v in entries.values())
    slow, fast = (saved["state"][i].keys() for i in (0, 1))
    assert slow == {"step", "window_count", "window_sum", "exp_avg", "exp_avg_sq"}
    assert fast == {"step", "window_count", "exp_avg", "exp_avg_sq"}


def test_no_extra_state_where_it_is_not_needed():
    (param,) = params = make_params((100,))
    optimizer = NestedOptimizer(params)
    train(optimizer, params, range(3))
    arrays = [t for t in optimizer.state[param].values() if t.numel() > 1]
    assert len(arrays) == 2  # AdamW's own moments


def test_state_keys_are_complete_after_the_first_step():
    params = make_params(*SHAPES)
    optimizer = build(params, amsgrad=True)
    train(optimizer, params, [0])
    keys = {i: set(s) for i, s in optimizer.state_dict()["state"].items()}
    train(optimizer, params, range(1, 8))
    assert {i: set(s) for i, s in optimizer.state_dict()["state"].items()} == keys


def test_float32_state_of_bfloat16_parameters_stays_float32_and_counts_past_256():
    (param,) = params = make_params((4,), dtype=torch.bfloat16)
    optimizer = NestedOptimizer(params, frequency=400, state_dtype=torch.float32)
    train(optimizer, params, range(257))
    fresh = NestedOptimizer(clone_params(params), frequency=400, state_dtype=torch.float32)
    fresh.load_state_dict(optimizer.state_dict())
    state = fresh.state[fresh.param_groups[0]["params"][0]]
    assert {k: v.dtype for k, v in state.items()} == dict.fromkeys(state, torch.float32)
    assert state["window_count"] == 257
    assert torch.equal(state["window_sum"], optimizer.state[param]["window_sum"])


def test_where_both_differ_the_checkpoint_wins_with_one_warning_that_names_the_keys():
    params = make_params(*SHAPES)
    saved = build(params, betas=(0.8, 0.9), lr=0.5).state_dict()
    live = build(clone_params(params))
    live.param_groups[0]["frequency"] = 7
    with pytest.warns(UserWarning) as caught:
        live.load_state_dict(saved)
    (warning,) = caught
    assert "betas (group 0: (0.9, 0.999) -> (0.8, 0.9))" in str(warning.message)
    assert "frequency (group 0: 7 -> 3)" in str(warning.message)
    assert "lr (group" not in str(warning.message)  # schedulers move it
    assert warning.filename == __file__
    group = live.param_groups[0]
    assert (group["betas"], group["frequency"], group["lr"]) == ((0.8, 0.9), 3, 0.5)


def test_loading_one_s_own_checkpoint_warns_of_nothing():
    params = make_params(*SHAPES)
    optimizer = build(params, lr=torch.tensor(0.01), foreach=False)
    train(optimizer, params, range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(clone_params(params), lr=torch.tensor(0.02), foreach=False).load_state_dict(
            copy.deepcopy(optimizer.state_dict())
        )


def named(params, names):
    return list(zip(names, params))


@pytest.mark.parametrize("cycled", [True, False])
def test_betas_that_a_schedule_moves_are_no_surprise_and_others_are(cycled):
    def build(betas=(0.9, 0.999)):
        params = make_params((3, 2))
        optimizer = NestedOptimizer(params, lr=0.1, betas=betas)
        if cycled:
            options = {"max_lr": 0.1, "total_steps": 20, "cycle_momentum": True}
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, **options)
        else:
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        return params, optimizer, schedule

    params, optimizer, schedule = build()
    for seed in range(3):
        train(optimizer, params, [seed])
        schedule.step()
    saved = copy.deepcopy(optimizer.state_dict())
    # A fresh schedule has moved the betas to where it starts; without one they are what was given.
    _, fresh, _ = build() if cycled else build((0.8, 0.99))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fresh.load_state_dict(saved)
    assert [("betas" in str(w.message)) for w in found] == ([] if cycled else [True])
    assert fresh.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]


def test_names_are_checked_and_a_mismatch_names_the_parameters():
    params = make_params((2,), (2,))
    saved = NestedOptimizer(named(params, ["a.weight", "b.weight"])).state_dict()
    live = NestedOptimizer(named(clone_params(params), ["b.weight", "a.weight"]), frequency=2)
    train(live, live.param_groups[0]["params"], [0])
    before = snapshot(live)
    with pytest.raises(
        ValueError, match=r"position 0: 'b\.weight' here, 'a\.weight' in the checkpoint; 1: 'a"
    ):
        live.load_state_dict(saved)
    assert_unchanged(live, before)


def test_wrappers_of_the_module_do_not_make_names_differ():
    params = make_params((2,), (2,))
    saved = NestedOptimizer(named(params, ["module._orig_mod.a", "module._orig_mod.b"]))
    live = NestedOptimizer(named(clone_params(params), ["a", "b"]))
    live.load_state_dict(saved.state_dict())
    assert live.param_groups[0]["param_names"] == ["a", "b"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s["param_groups"].pop(), "different number of parameter groups: 1 in the"),
        (lambda s: s["param_groups"][1]["params"].pop(), "group 1 has 1 parameters in the check"),
        (lambda s: s["param_groups"][0].update(frequency=0), "'slow'.*Invalid frequency: 0"),
        (lambda s: s["param_groups"][0].update(name="fast"), "called 'slow' here and 'fast'"),
        (
            lambda s: s["state"][0].update(exp_avg=torch.zeros(3)),
            "'exp_avg' of parameter 0 .*shape",
        ),
        (lambda s: s["state"][0].update(window_sum=torch.zeros(3)), "'window_sum' of parameter 0"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    params = make_params(*SHAPES)
    optimizer = build(params)
    train(optimizer, params, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_train_on_as_the_original(copying):
    params = make_params(*SHAPES)
    optimizer = build(params)
    train(optimizer, params, range(4))
    twin = copying(optimizer)
    twin_params = [p for group in twin.param_groups for p in group["params"]]
    assert not any(p is q for p, q in zip(params, twin_params))
    train(optimizer, params, range(4, 9))
    train(twin, twin_params, range(4, 9))
    assert_same_tensors(twin_params, params)
    assert_same_state(twin, optimizer)
    twin.register_meta_update_hook(lambda _: None)  # what a copy must still be able to do
    step_with(twin, twin_params, random_grads(twin_params, 9))


def test_a_step_with_lr_zero_and_zero_gradients_makes_state_and_leaves_the_phase():
    """What torch.distributed.checkpoint does to a fresh optimizer before it reads its state."""
    for lr in (0.0, torch.tensor(0.0)):
        params = make_params(*SHAPES)
        before = clone_params(params)
        optimizer = build(params, lr=lr, amsgrad=True)
        calls = []
        optimizer.register_meta_update_hook(calls.append)
        step_with(optimizer, params, [torch.zeros_like(p) for p in params])
        assert_same_tensors(params, before)
        slow = optimizer.state[params[0]]
        assert slow["window_count"] == 0 and "window_sum" in slow
        assert all(optimizer.state[p]["step"] == 1 for p in params)  # as torch's
        assert calls == [] and optimizer.param_groups[0]["meta_step"] == 0
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        train(optimizer, params, range(2))
        assert torch.equal(params[0], before[0])
        train(optimizer, params, [2])
        assert not torch.equal(params[0], before[0])


def test_a_real_first_gradient_at_lr_zero_counts():
    (param,) = params = make_params((4,))
    optimizer = NestedOptimizer(params, lr=0.0, frequency=3)  # a warm-up may begin at 0
    train(optimizer, params, [0])
    assert optimizer.state[param]["window_count"] == 1
    step_with(optimizer, params, [torch.zeros(4)])  # zero gradients count once state exists
    assert optimizer.state[param]["window_count"] == 2


def test_parameters_may_be_replaced_before_the_first_step():
    params = make_params(*SHAPES)
    optimizer = build(params)
    replaced = [torch.nn.Parameter(p.detach().double()) for p in params]
    optimizer.param_groups[0]["params"] = replaced[:1]
    optimizer.param_groups[1]["params"] = replaced[1:]
    train(optimizer, replaced, range(3))
    assert set(optimizer.state) == set(replaced)
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float64 for p in replaced)


def test_load_hooks_run_and_may_replace_the_checkpoint():
    params = make_params(*SHAPES)
    saved = build(params, lr=0.5).state_dict()
    live = build(clone_params(params))
    calls = []

    def halve(optimizer, state_dict):
        calls.append("pre")
        state_dict["param_groups"] = copy.deepcopy(state_dict["param_groups"])
        state_dict["param_groups"][0]["lr"] = 0.25
        return state_dict

    live.register_load_state_dict_pre_hook(halve)
    live.register_load_state_dict_post_hook(lambda optimizer: calls.append("post"))
    live.load_state_dict(saved)
    assert calls == ["pre", "post"]
    assert [g["lr"] for g in live.param_groups] == [0.25, 0.5]
    assert saved["param_groups"][0]["lr"] == 0.5
