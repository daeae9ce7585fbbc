"""M3 on sharded matrices: what several ranks train is what one would."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from nested_optim import M3

from ..helpers import slow_m3
from .launch import Net, Ranks, assert_near, assert_same, give_gradients, sharded, snapshot, started

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no slow momentum": {"alpha": 0.0},
    "row": {"second_moment": "row"},
    "element": {"second_moment": "element"},
    "capturable": {"capturable": True},
    "projections": {"split_sizes": (3, 4)},
    "paper": {"mode": "paper"},
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with started() as ranks:
        yield ranks


def make(model: nn.Module, **options: Any) -> M3:
    """Hidden weights (of seven rows, which two ranks split unevenly) by M3, the rest by AdamW."""
    named = list(model.named_parameters())
    matrices = [(n, p) for n, p in named if n in ("first.weight", "middle.weight")]
    rest = [(n, p) for n, p in named if n not in ("first.weight", "middle.weight")]
    return slow_m3(
        [
            {"params": matrices, "frequency": 2, "slow_frequency": 2, **options},
            {"params": rest, "algorithm": "adamw", "frequency": 3},
        ],
        lr=0.05,
    )


def _trains_as_one_process(name: str) -> None:
    model, alone = sharded(Net(torch.float64)), Net(torch.float64)
    optimizers = make(model, **OPTIONS[name]), make(alone, **OPTIONS[name])
    for step in range(11):
        for net, optimizer in zip((model, alone), optimizers):
            give_gradients(net, step)
            optimizer.step()
    assert all(isinstance(param, DTensor) for param in optimizers[0].state)
    assert_near(snapshot(model, optimizers[0]), snapshot(alone, optimizers[1]), name, 1e-9)


@pytest.mark.parametrize("name", OPTIONS)
def test_sharded_matrices_train_as_whole_ones(ranks: Ranks, name: str) -> None:
    ranks.run(_trains_as_one_process, name)


def _resumes(name: str) -> None:
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model = sharded(Net())
    optimizer = make(model, **OPTIONS[name])
    for step in range(5):
        give_gradients(model, step)
        optimizer.step()
    # Copied: loading shares the counters, which are tensors on the CPU here as there.
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=full))
    weights = {n: p.full_tensor() for n, p in model.named_parameters()}  # type: ignore[operator]
    twin = Net()
    twin.load_state_dict(weights)
    sharded(twin)
    resumed = make(twin, **OPTIONS[name])
    set_optimizer_state_dict(twin, resumed, saved if dist.get_rank() == 0 else {}, options=full)
    assert_same(snapshot(twin, resumed), snapshot(model, optimizer), "what was loaded")
    for step in range(5, 12):
        for net, its in ((model, optimizer), (twin, resumed)):
            give_gradients(net, step)
            its.step()
    assert_same(snapshot(twin, resumed), snapshot(model, optimizer), "seven steps later")


@pytest.mark.parametrize("name", ["defaults", "row", "element"])
def test_a_distributed_checkpoint_resumes_within_windows_and_chunks(
    ranks: Ranks, name: str
) -> None:
    ranks.run(_resumes, name)
