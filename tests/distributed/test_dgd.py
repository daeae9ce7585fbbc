"""DGD on several ranks: each has inputs of its own, and all must take the same step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nested_optim import DGD

from .launch import Net, Ranks, assert_near, assert_same, levels, sharded, snapshot, started

LR = 0.05
STEPS = 5


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with started() as ranks:
        yield ranks


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = (torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (5, 1))
    return x, y


def backward(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean") -> None:
    losses = (model(x) - y) ** 2
    (losses.sum() if reduction == "sum" else losses.mean()).backward()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_replicas_agree(model: nn.Module, optimizer: DGD, what: str) -> None:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, snapshot(model, optimizer))
    for other in everywhere:
        assert_same(other, everywhere[0], what)


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "exact": {"batch": "exact"},
    "adamw": {"base": "adamw"},
    "sum": {"reduction": "sum", "lr": 0.01},
    "windows": {"levels": True, "window_samples": 64},
    "windows of a sum": {"levels": True, "window": "sum", "lr": 0.01, "batch": "exact"},
    "sampled": {"max_tokens": 3},
    "sampled windows": {"levels": True, "window_samples": 5},
}


def build(model: Net, options: dict[str, Any]) -> DGD:
    options = {"lr": LR, **options}
    groups = levels(model) if options.pop("levels", False) else model.named_parameters()
    return DGD(groups, model=model, **options)


def _trains_as_the_whole_batch(name: str, optimizer_first: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    options = OPTIONS[name]
    model = Net(torch.float64, seed=0 if optimizer_first else rank)  # DDP broadcasts rank 0's
    optimizer = build(model, options) if optimizer_first else None
    replica = DistributedDataParallel(model)
    if optimizer is None:
        optimizer = build(model, options)
    alone = Net(torch.float64)
    reference = build(alone, options)
    assert reference._capture is not None and optimizer._capture is not None
    for step in range(STEPS):
        x, y = batch(step)
        backward(replica, x[rank::size], y[rank::size], options.get("reduction", "mean"))
        optimizer.step()
        optimizer.zero_grad()
        backward(alone, x, y, options.get("reduction", "mean"))
        if "reduction" in options:  # DDP averages over ranks what each has summed
            for p in alone.parameters():
                assert p.grad is not None
                p.grad /= size
            reference.param_groups[0]["decay"] = 1.0 / size
        reference.step()
        reference.zero_grad()
        assert_replicas_agree(model, optimizer, f"replicas after step {step + 1}")
    assert optimizer._capture.ranks() == size and reference._capture.ranks() == 1
    if not name.startswith("sampled"):
        assert_near(weights(model), weights(alone), "the whole batch", tolerance=1e-10)
    else:
        difference = weights(model)["middle.weight"] - weights(alone)["middle.weight"]
        assert difference.norm() < 0.1
        assert difference.any()


@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_ddp_replicas_take_the_step_of_the_whole_batch(
    ranks: Ranks, name: str, optimizer_first: bool
) -> None:
    ranks.run(_trains_as_the_whole_batch, name, optimizer_first)


def _the_wrapped_model_may_be_given() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model, alone = Net(torch.float64), Net(torch.float64)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer, reference = DGD(replica, LR), DGD(alone, LR)
    assert optimizer._capture is not None and optimizer._capture.ranks() == size
    names = [group["param_names"] for group in (*optimizer.param_groups, *reference.param_groups)]
    assert names[0] == names[1]
    for step in range(STEPS):
        # Two micro-batches, of which the first is not averaged yet.
        x, y = batch(step)
        for part in range(2):
            chosen = slice(4 * part + 2 * rank, 4 * part + 2 * rank + 2)
            with replica.no_sync() if part == 0 else nullcontext():
                (((replica(x[chosen]) - y[chosen]) ** 2).mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        backward(alone, x, y)
        reference.step()
        reference.zero_grad()
    assert_replicas_agree(model, optimizer, "replicas")
    assert_near(weights(model), weights(alone), "accumulated over ranks", tolerance=1e-10)


def test_the_wrapped_model_and_micro_batches_without_sync_train_as_one_batch(
    ranks: Ranks,
) -> None:
    ranks.run(_the_wrapped_model_may_be_given)


class Routed(nn.Module):
    """Two experts; a rank uses the one that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(5, 1, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        y: Tensor = self.experts[expert](x)
        return y


def _a_rank_may_have_no_inputs() -> None:
    rank = dist.get_rank()
    model, alone = Routed(), Routed()
    replica = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, reference = DGD(model, LR), DGD(alone, LR)
    for step in range(3):
        x, y = batch(step)
        experts = (0, 1) if step == 0 else (1, 1)
        rows = [slice(0, 4), slice(4, 8)]
        ((replica(x[rows[rank]], experts[rank]) - y[rows[rank]]) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for part, expert in zip(rows, experts):
            (((alone(x[part], expert) - y[part]) ** 2).mean() / 2).backward()
        reference.step()
        reference.zero_grad()
        assert_replicas_agree(model, optimizer, f"replicas after step {step + 1}")
    assert_near(weights(model), weights(alone), "one process", tolerance=1e-10)


def test_a_layer_may_have_its_inputs_on_another_rank(ranks: Ranks) -> None:
    ranks.run(_a_rank_may_have_no_inputs)


def _a_group_of_ranks_may_be_named() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model, alone = Net(torch.float64), Net(torch.float64)
    optimizer = DGD(model, LR, process_group=dist.group.WORLD)
    reference = DGD(alone, LR)
    for step in range(STEPS):
        x, y = batch(step)
        backward(model, x[rank::size], y[rank::size])
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= size
        optimizer.step()
        optimizer.zero_grad()
        backward(alone, x, y)
        reference.step()
        reference.zero_grad()
    assert_replicas_agree(model, optimizer, "replicas")
    assert_near(weights(model), weights(alone), "the whole batch", tolerance=1e-10)


def test_gradients_that_are_averaged_by_hand_name_their_ranks(ranks: Ranks) -> None:
    ranks.run(_a_group_of_ranks_may_be_named)


def _ranks_that_train_models_of_their_own_do_not_meet() -> None:
    model = Net(torch.float64, seed=dist.get_rank())
    optimizer = DGD(model, LR)
    if dist.get_rank() == 0:  # no other rank would answer
        backward(model, *batch(0))
        optimizer.step()
    dist.barrier()


def test_without_data_parallelism_ranks_are_left_alone(ranks: Ranks) -> None:
    ranks.run(_ranks_that_train_models_of_their_own_do_not_meet)


def _a_resumed_run_goes_on_alike() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = Net(torch.float64)
    options = OPTIONS["sampled windows"]
    replica, optimizer = DistributedDataParallel(model), build(model, options)

    def run(replica: nn.Module, optimizer: DGD, steps: range) -> None:
        for step in steps:
            x, y = batch(step)
            backward(replica, x[rank::size], y[rank::size])
            optimizer.step()
            optimizer.zero_grad()

    run(replica, optimizer, range(4))
    # Rank 0's checkpoint serves all.
    saved: list[Any] = [{"model": model.state_dict(), "optimizer": optimizer.state_dict()}]
    saved = deepcopy(saved)
    dist.broadcast_object_list(saved)
    run(replica, optimizer, range(4, 9))
    resumed = Net(torch.float64, seed=1)
    resumed.load_state_dict(saved[0]["model"])
    twin = build(resumed, options)
    twin.load_state_dict(saved[0]["optimizer"])
    run(DistributedDataParallel(resumed), twin, range(4, 9))
    assert_same(snapshot(resumed, twin), snapshot(model, optimizer), "resumed")


def test_one_rank_s_checkpoint_inside_a_window_resumes_all_of_them(ranks: Ranks) -> None:
    ranks.run(_a_resumed_run_goes_on_alike)


def _sharded_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sharded \(FSDP.*decay=0"):
        DGD(sharded(Net()), LR)
    DGD(sharded(Net()), LR, decay=0.0)
    model = Net()
    optimizer = DGD(model, LR)
    sharded(model)  # its parameters are other objects now
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match=r"'first.weight'.*sharded \(FSDP"):
        optimizer.step()


def test_sharded_parameters_are_refused_with_the_way_out(ranks: Ranks) -> None:
    ranks.run(_sharded_models_are_refused)
