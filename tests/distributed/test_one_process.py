"""torch.distributed.checkpoint where there is one process and no process group."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from nested_optim import NestedOptimizer

from .launch import (
    FREQUENCIES,
    Net,
    assert_fresh_state_dict_is_no_gradient,
    assert_same,
    levels,
    snapshot,
    take_steps,
)

LR = 1e-2
SAVED, END = 4, 9  # after 4 gradients "middle" has 1 of 3 in its window

NESTED = StateDictOptions()
FULL = StateDictOptions(full_state_dict=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

EVERY_STEP = dict.fromkeys(FREQUENCIES, 1)

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)


def make(model: Net, frequencies: dict[str, int] | None = None, **options: Any) -> NestedOptimizer:
    return NestedOptimizer(levels(model, frequencies), **{"lr": LR, **options})


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"foreach": False}, torch.float32),
        ({"fused": True}, torch.float32),
        ({"capturable": True}, torch.float32),
        ({"lr": torch.tensor(LR)}, torch.float32),
        ({"lr": torch.tensor(LR), "capturable": True, "foreach": True}, torch.float32),
        ({"state_dtype": torch.float32}, torch.bfloat16),
        ({"window": "sum", "amsgrad": True, "decoupled": False}, torch.float32),
    ],
    ids=str,
)
def test_a_state_dict_of_a_fresh_optimizer_leaves_its_windows_alone(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = Net(dtype)
    assert_fresh_state_dict_is_no_gradient(model, make(model, weight_decay=0.5, **options))


def interrupted() -> tuple[Net, NestedOptimizer, dict[str, torch.Tensor]]:
    """A run that has come to where it is saved, and what it holds there."""
    model = Net()
    optimizer = make(model)
    take_steps(model, optimizer, range(SAVED))
    return model, optimizer, snapshot(model, optimizer)


@pytest.mark.parametrize("way", [NESTED, FULL, FLAT], ids=["nested", "full", "flattened"])
def test_a_state_dict_taken_inside_a_window_resumes_bit_for_bit(way: StateDictOptions) -> None:
    model, optimizer, at_save = interrupted()
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=way))
    resumed_model = copy.deepcopy(model)
    resumed = make(resumed_model)
    set_optimizer_state_dict(resumed_model, resumed, state, options=way)
    assert_same(snapshot(resumed_model, resumed), at_save, "right after loading")
    for net, optim in ((model, optimizer), (resumed_model, resumed)):
        take_steps(net, optim, range(SAVED, END))
    assert_same(snapshot(resumed_model, resumed), snapshot(model, optimizer), "after going on")


@pytest.mark.parametrize("how", ["state dict", "folder"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_a_torch_checkpoint_loads_and_frequencies_stay(
    kind: type[torch.optim.Adam], how: str, tmp_path: Path
) -> None:
    model = Net()
    theirs = kind([{"params": group["params"]} for group in levels(model)], lr=LR)
    take_steps(model, theirs, range(SAVED))
    before = snapshot(model, theirs)
    ours = make(
        model, weight_decay=theirs.defaults["weight_decay"], decoupled=kind is not torch.optim.Adam
    )
    state = get_optimizer_state_dict(model, theirs)
    if how == "folder":
        dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "checkpoint")
        state = get_optimizer_state_dict(model, ours)
        # Its planner refuses keys that are not in the folder unless told otherwise.
        planner = DefaultLoadPlanner(allow_partial_load=True)
        dcp.load({"optimizer": state}, checkpoint_id=tmp_path / "checkpoint", planner=planner)
    set_optimizer_state_dict(model, ours, copy.deepcopy(state))
    assert [g["frequency"] for g in ours.param_groups] == list(FREQUENCIES.values())
    after = snapshot(model, ours)
    assert_same({name: after[name] for name in before}, before, "what torch's optimizer had")
    assert not any(after[name].any() for name in after.keys() - before.keys())


def test_a_checkpoint_whose_window_sums_came_out_empty_loads_where_windows_are_kept() -> None:
    """From a flattened checkpoint without them, the loader makes an empty dict of each."""
    model = Net()
    every_step = make(model, EVERY_STEP)
    take_steps(model, every_step, range(SAVED))
    state = copy.deepcopy(every_step.state_dict())
    for entries in state["state"].values():
        entries["window_sum"] = {}
    resumed_model = copy.deepcopy(model)
    resumed = make(resumed_model)
    with pytest.warns(UserWarning, match=r"frequency \(group 1: 3 -> 1\)"):
        resumed.load_state_dict(state)
    assert_same(snapshot(resumed_model, resumed), snapshot(model, every_step), "after loading")
    for net, optim in ((model, every_step), (resumed_model, resumed)):
        take_steps(net, optim, range(SAVED, END))
    assert_same(snapshot(resumed_model, resumed), snapshot(model, every_step), "after going on")


def test_a_window_whose_sum_was_not_loaded_is_refused_before_anything_changes() -> None:
    """Built without windows, the optimizer has no sum for the loader to fill."""
    model, optimizer, _ = interrupted()
    state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    resumed_model = copy.deepcopy(model)
    resumed = make(resumed_model, EVERY_STEP)
    get_optimizer_state_dict(resumed_model, resumed)
    before = snapshot(resumed_model, resumed)
    with pytest.raises(
        ValueError, match=r"'middle\.weight'.*window_sum|window_sum.*middle\.weight"
    ):
        set_optimizer_state_dict(resumed_model, resumed, copy.deepcopy(state), options=FLAT)
    assert_same(snapshot(resumed_model, resumed), before, "after the error")
    assert [g["frequency"] for g in resumed.param_groups] == [1, 1, 1]
