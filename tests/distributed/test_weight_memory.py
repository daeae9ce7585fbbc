"""A weight memory on two ranks: sharded copies exchange and come back as whole ones do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from nested_optim import NestedOptimizer, WeightMemory

from .launch import (
    Net,
    Ranks,
    assert_same,
    sharded,
    snapshot,
    started,
    take_steps,
)

CLASSES: dict[str, Any] = {"torch AdamW": torch.optim.AdamW, "NestedOptimizer": NestedOptimizer}
FULL = StateDictOptions(full_state_dict=True)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with started() as ranks:
        yield ranks


def attached(model: nn.Module, name: str) -> tuple[torch.optim.Optimizer, WeightMemory]:
    optimizer = CLASSES[name](model.parameters(), lr=1e-2)
    return optimizer, WeightMemory(optimizer, (2, 3), (0.3, 0.4), (0.2, 0.6))


def _shards_exchange_as_the_whole_does(name: str, dtype: torch.dtype) -> None:
    model, single = sharded(Net(dtype)), Net(dtype)
    runs = [(m, *attached(m, name)) for m in (model, single)]
    for m, optimizer, _ in runs:
        take_steps(m, optimizer, range(7))
    for p in model.parameters():
        assert isinstance(runs[0][1].state[p]["memory_1"], DTensor)
    assert_same(snapshot(model, runs[0][1]), snapshot(single, runs[1][1]), "after 7 steps")
    for level in (-1, "mean"):
        with runs[0][2].read_out(level), runs[1][2].read_out(level):
            assert_same(snapshot(model, runs[0][1]), snapshot(single, runs[1][1]), f"{level}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CLASSES)
def test_shards_exchange_as_the_whole_does(ranks: Ranks, name: str, dtype: torch.dtype) -> None:
    ranks.run(_shards_exchange_as_the_whole_does, name, dtype)


def _resumes(name: str, dtype: torch.dtype, folder: str | None) -> None:
    model = sharded(Net(dtype))
    optimizer, _ = attached(model, name)
    take_steps(model, optimizer, range(5))
    at_save = snapshot(model, optimizer)
    options = None if folder else FULL
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    weights = copy.deepcopy(model.state_dict())
    if folder:
        dcp.save({"optimizer": state}, checkpoint_id=folder)

    other = sharded(Net(dtype, seed=1))
    other.load_state_dict(weights)
    resumed, _ = attached(other, name)
    if folder:
        state = get_optimizer_state_dict(other, resumed)
        dcp.load({"optimizer": state}, checkpoint_id=folder)
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert_same(snapshot(other, resumed), at_save, "right after loading")
    for m, opt in ((model, optimizer), (other, resumed)):
        take_steps(m, opt, range(5, 11))
    assert_same(snapshot(other, resumed), snapshot(model, optimizer), "after going on")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["full", "folder"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_sharded_memory_resumes_bit_for_bit(
    ranks: Ranks, tmp_path: Path, name: str, way: str, dtype: torch.dtype
) -> None:
    """Also where torch's own loading would round the copies to the parameters' dtype."""
    ranks.run(_resumes, name, dtype, str(tmp_path / "saved") if way == "folder" else None)
