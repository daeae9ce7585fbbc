"""Learning on several ranks: replicas stay alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nested_optim import DeepNestedOptimizer
from nested_optim.meta import learned, unroll

from .launch import Ranks, started


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with started() as ranks:
        yield ranks


def _model() -> DistributedDataParallel:
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)))


def _batch(seed: int) -> Tensor:
    """This rank's own."""
    generator = torch.Generator().manual_seed(1000 * dist.get_rank() + seed)
    return torch.randn(8, 4, generator=generator)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - torch.sin(x.sum(-1, keepdim=True))).square().mean()


def _train(optimizer: DeepNestedOptimizer, model: nn.Module, steps: range) -> None:
    for i in steps:
        optimizer.zero_grad()
        loss = _loss(model, _batch(i))
        loss.backward()
        told = loss.detach().clone()
        dist.all_reduce(told)
        optimizer.step(told / dist.get_world_size())


def _assert_alike(optimizer: DeepNestedOptimizer) -> None:
    first = optimizer.param_groups[0]
    tensors = [first[f"{m}_{part}"] for m in learned.modules(first) for part in learned.PARTS]
    for tensor in (*tensors, *first["params"]):
        mine = tensor.detach().clone()
        others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(others, mine)
        assert all(torch.equal(mine, other) for other in others)


def _learns_from_gradients_alike() -> None:
    model = _model()
    optimizer = DeepNestedOptimizer(model, lr=0.05, meta_lr=0.05, meta_update_freq=3)
    _train(optimizer, model, range(10))
    assert optimizer.group_names() == ["core"] and (optimizer.get_lr_multipliers() != 1).all()
    _assert_alike(optimizer)


def _learns_from_unrolls_alike() -> None:
    model = _model()
    options = {"lr": 0.05, "meta_lr": 0.05, "mode": "explicit", "loss_fn": _loss}
    optimizer = DeepNestedOptimizer(model, **options)
    _train(optimizer, model, range(2))
    val, batches = _batch(99), [_batch(10), _batch(11)]
    loss, grads = unroll.meta_gradient(optimizer, val, batches, _loss, "exact")
    optimizer.model = model.module  # without the others
    own_loss, own = unroll.meta_gradient(optimizer, val, batches, _loss, "exact")
    optimizer.model = model
    for module in own:
        mean = own[module].clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(grads[module], mean / dist.get_world_size())
        assert not torch.allclose(grads[module], own[module])
    assert loss != own_loss
    optimizer.meta_update(val, batches)
    _train(optimizer, model, range(2, 5))
    assert (optimizer.get_lr_multipliers() != 1).all()
    _assert_alike(optimizer)


def test_replicas_that_learn_from_their_gradients_stay_alike(ranks: Ranks) -> None:
    ranks.run(_learns_from_gradients_alike)


def test_replicas_that_learn_from_their_own_unrolls_stay_alike(ranks: Ranks) -> None:
    ranks.run(_learns_from_unrolls_alike)
