"""torch.distributed.checkpoint on FSDP2: what is saved in the middle of a window goes on from
there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nested_optim import NestedOptimizer

from .launch import (
    FREQUENCIES,
    Net,
    Ranks,
    assert_fresh_state_dict_is_no_gradient,
    assert_near,
    assert_same,
    levels,
    sharded,
    snapshot,
    started,
    take_steps,
)

LR = 1e-2
SAVED, END = 4, 9  # after 4 gradients "middle" has 1 of 3 in its window; 9 close both windows' last

FULL = StateDictOptions(full_state_dict=True)
RANK0 = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

#: How a state dict is made, and how it is loaded.
WAYS: dict[str, tuple[StateDictOptions, StateDictOptions]] = {
    "sharded": (StateDictOptions(), StateDictOptions()),
    "sharded on the CPU": (StateDictOptions(cpu_offload=True), StateDictOptions()),
    "flattened": (FLAT, FLAT),
    "full": (FULL, FULL),
    "full from rank 0": (RANK0, FROM_RANK0),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with started() as ranks:
        yield ranks


def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Net, NestedOptimizer]:
    """A sharded model and its optimizer; bfloat16 parameters with float32 state."""
    model = sharded(Net(dtype, seed))
    return model, NestedOptimizer(levels(model), lr=LR, state_dtype=torch.float32)


def interrupted(
    dtype: torch.dtype = torch.float32,
) -> tuple[Net, NestedOptimizer, dict[str, Tensor]]:
    """A run that has come to where it is saved, and what it holds there."""
    model, optimizer = make(dtype)
    take_steps(model, optimizer, range(SAVED))
    at_save = snapshot(model, optimizer)
    assert at_save["middle.weight window_count"] == 1
    assert at_save["middle.weight window_sum"].any()
    return model, optimizer, at_save


def assert_goes_on(
    resumed: tuple[nn.Module, NestedOptimizer],
    original: tuple[nn.Module, NestedOptimizer],
    at_save: dict[str, Tensor],
) -> None:
    """The resumed run is where the original was saved, and ends where the original ends."""
    assert_same(snapshot(*resumed), at_save, "right after loading")
    assert [g["frequency"] for g in resumed[1].param_groups] == list(FREQUENCIES.values())
    take_steps(*original, range(SAVED, END))
    take_steps(*resumed, range(SAVED, END))
    assert_same(snapshot(*resumed), snapshot(*original), "after going on")


def _resumes_from_state_dicts(way: str, dtype: torch.dtype) -> None:
    getting, setting = WAYS[way]
    model, optimizer, at_save = interrupted(dtype)
    # A sharded state dict shares its tensors with the optimizer.
    model_state = copy.deepcopy(get_model_state_dict(model, options=getting))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=getting))
    if getting is RANK0:
        assert bool(state) == (dist.get_rank() == 0)
    resumed = make(dtype, seed=1)
    set_model_state_dict(resumed[0], model_state, options=setting)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the checkpoint's options")
        set_optimizer_state_dict(*resumed, state, options=setting)
    assert_goes_on(resumed, (model, optimizer), at_save)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_state_dicts_taken_inside_a_window_resume_bit_for_bit(
    ranks: Ranks, way: str, dtype: torch.dtype
) -> None:
    ranks.run(_resumes_from_state_dicts, way, dtype)


def save(folder: str, model: nn.Module, optimizer: NestedOptimizer, flat: bool) -> None:
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT if flat else None),
    }
    dcp.save(state, checkpoint_id=folder)


def load(folder: str, model: nn.Module, optimizer: NestedOptimizer, flat: bool) -> None:
    options = FLAT if flat else None
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def _resumes_from_a_folder(folder: str, flat: bool) -> None:
    model, optimizer, at_save = interrupted()
    save(folder, model, optimizer, flat)
    resumed = make(seed=1)
    load(folder, *resumed, flat)
    assert_goes_on(resumed, (model, optimizer), at_save)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_a_folder_saved_inside_a_window_resumes_bit_for_bit(
    ranks: Ranks, tmp_path: Path, flat: bool
) -> None:
    ranks.run(_resumes_from_a_folder, str(tmp_path / "checkpoint"), flat)


def _taking_a_fresh_state_dict_is_no_gradient(tensor_lr: bool) -> None:
    model = sharded(Net())
    lr = torch.tensor(LR) if tensor_lr else LR
    optimizer = NestedOptimizer(levels(model), lr=lr, weight_decay=0.5)
    assert_fresh_state_dict_is_no_gradient(model, optimizer)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
def test_a_state_dict_of_a_fresh_sharded_optimizer_leaves_its_windows_alone(
    ranks: Ranks, tensor_lr: bool
) -> None:
    ranks.run(_taking_a_fresh_state_dict_is_no_gradient, tensor_lr)


def _saves_for_one_process(folder: str) -> None:
    model, optimizer, _ = interrupted()
    full = {
        "model": get_model_state_dict(model, options=RANK0),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=RANK0),
    }
    save(f"{folder}/sharded", model, optimizer, flat=False)
    if dist.get_rank() == 0:
        torch.save(full, f"{folder}/full.pt")


def one_process(seed: int = 0) -> tuple[Net, NestedOptimizer]:
    model = Net(seed=seed)
    return model, NestedOptimizer(levels(model), lr=LR, state_dtype=torch.float32)


@pytest.mark.parametrize("how", ["set_optimizer_state_dict", "load_state_dict", "folder"])
def test_what_two_ranks_save_inside_a_window_one_process_goes_on_from(
    ranks: Ranks, tmp_path: Path, how: str
) -> None:
    ranks.run(_saves_for_one_process, str(tmp_path))
    model, optimizer = one_process(seed=1)
    if how == "folder":
        with warnings.catch_warnings():  # dcp says that there is one process only
            warnings.simplefilter("ignore", UserWarning)
            load(str(tmp_path / "sharded"), model, optimizer, flat=False)
    else:
        full = torch.load(tmp_path / "full.pt", weights_only=True)
        model.load_state_dict(full["model"])
        if how == "set_optimizer_state_dict":
            set_optimizer_state_dict(model, optimizer, full["optimizer"], options=FULL)
        else:
            optimizer.load_state_dict(full["optimizer"])
    expected = one_process()
    take_steps(*expected, range(SAVED))
    assert_near(snapshot(model, optimizer), snapshot(*expected), "right after loading")
    take_steps(model, optimizer, range(SAVED, END))
    take_steps(*expected, range(SAVED, END))
    assert_near(snapshot(model, optimizer), snapshot(*expected), "after going on")


def _loads_from_one_process(file: str, how: str) -> None:
    full = torch.load(file, weights_only=True)
    resumed = make(seed=1)
    set_model_state_dict(resumed[0], full["model"], options=FULL)
    if how == "set_optimizer_state_dict":
        set_optimizer_state_dict(*resumed, full["optimizer"], options=FULL)
    else:
        resumed[1].load_state_dict(full["optimizer"])
    expected = one_process()
    take_steps(*expected, range(SAVED))
    assert_near(snapshot(*resumed), snapshot(*expected), "right after loading")
    assert all(
        isinstance(resumed[1].state[param][key], DTensor)
        for param in resumed[0].parameters()
        for key in ("exp_avg", "exp_avg_sq", "window_sum")
        if key in resumed[1].state[param]
    )
    take_steps(*resumed, range(SAVED, END))
    take_steps(*expected, range(SAVED, END))
    assert_near(snapshot(*resumed), snapshot(*expected), "after going on")


@pytest.mark.parametrize("how", ["set_optimizer_state_dict", "load_state_dict"])
def test_what_one_process_saves_inside_a_window_two_ranks_go_on_from(
    ranks: Ranks, tmp_path: Path, how: str
) -> None:
    model, optimizer = one_process()
    take_steps(model, optimizer, range(SAVED))
    full = {
        "model": get_model_state_dict(model, options=FULL),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FULL),
    }
    torch.save(full, tmp_path / "full.pt")
    ranks.run(_loads_from_one_process, str(tmp_path / "full.pt"), how)


def _ddp_loads_what_fsdp2_saved() -> None:
    model, optimizer, at_save = interrupted()
    state = get_optimizer_state_dict(model, optimizer, options=FULL)
    weights = get_model_state_dict(model, options=FULL)
    bare = Net(seed=1)
    replica = DistributedDataParallel(bare)
    resumed = NestedOptimizer(levels(bare), lr=LR, state_dtype=torch.float32)
    set_model_state_dict(replica, weights, options=FULL)
    set_optimizer_state_dict(replica, resumed, state, options=FULL)
    assert_same(snapshot(bare, resumed), at_save, "right after loading")
    back = get_optimizer_state_dict(replica, resumed, options=FULL)
    assert back["state"].keys() == state["state"].keys()


def test_ddp_loads_what_fully_shard_saved_inside_a_window(ranks: Ranks) -> None:
    ranks.run(_ddp_loads_what_fsdp2_saved)


def _adamw_checkpoint_keeps_frequencies(way: str, one_group: bool) -> None:
    getting, setting = WAYS[way]
    old = sharded(Net())
    plain = [{"params": group["params"]} for group in levels(old)]
    adamw = torch.optim.AdamW(old.parameters() if one_group else plain, lr=LR, weight_decay=0.3)
    take_steps(old, adamw, range(SAVED))
    state = copy.deepcopy(get_optimizer_state_dict(old, adamw, options=getting))
    before = snapshot(old, adamw)

    model = sharded(Net(seed=1))
    optimizer = NestedOptimizer(levels(model), lr=LR, weight_decay=0.3)
    set_model_state_dict(model, copy.deepcopy(get_model_state_dict(old)))
    set_optimizer_state_dict(model, optimizer, state, options=setting)
    assert [g["frequency"] for g in optimizer.param_groups] == list(FREQUENCIES.values())
    after = snapshot(model, optimizer)
    assert_same({name: after[name] for name in before}, before, "what AdamW had")
    assert not any(after[name].any() for name in after.keys() - before.keys())

    take_steps(model, optimizer, range(SAVED, SAVED + 2))
    take_steps(old, adamw, range(SAVED, SAVED + 2))
    now, expected = snapshot(model, optimizer), snapshot(old, adamw)
    fast = [name for name in expected if name.startswith("first.")]
    assert_same({n: now[n] for n in fast}, {n: expected[n] for n in fast}, "frequency 1")
    assert torch.equal(now["middle.weight"], before["middle.weight"])
    assert not torch.equal(now["last.weight"], before["last.weight"])


@pytest.mark.parametrize("one_group", [False, True], ids=["same groups", "one group"])
@pytest.mark.parametrize("way", ["sharded", "full", "full from rank 0"])
def test_a_sharded_adamw_checkpoint_loads_and_frequencies_stay(
    ranks: Ranks, way: str, one_group: bool
) -> None:
    ranks.run(_adamw_checkpoint_keeps_frequencies, way, one_group)


def _loads_windows_that_the_live_groups_have_not_opened(way: str) -> None:
    getting, setting = WAYS[way]
    model, optimizer, at_save = interrupted()
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=getting))
    weights = copy.deepcopy(get_model_state_dict(model))
    other = sharded(Net(seed=1))
    every_step = levels(other, dict.fromkeys(FREQUENCIES, 1))
    resumed = NestedOptimizer(every_step, lr=LR, state_dtype=torch.float32)
    set_model_state_dict(other, weights)
    with pytest.warns(UserWarning, match=r"frequency \(group 1: 1 -> 3\)"):
        set_optimizer_state_dict(other, resumed, state, options=setting)
    assert_goes_on((other, resumed), (model, optimizer), at_save)


@pytest.mark.parametrize("way", ["sharded", "full"])
def test_windows_load_into_groups_that_were_made_without(ranks: Ranks, way: str) -> None:
    ranks.run(_loads_windows_that_the_live_groups_have_not_opened, way)
