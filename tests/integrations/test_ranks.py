"""Losses, meta updates and resuming on two ranks, and Accelerate's DDP and FSDP2 there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from nested_optim import NestedOptimizer
from nested_optim.integrations.loop import Checkpoint, Run, fit, observe_loss, unwrap_optimizer

from ..distributed import launch
from .tiny import LossAware, Noisy, held_out, levels, loss_fn


@pytest.fixture(scope="module")
def ranks() -> Iterator[launch.Ranks]:
    with launch.started() as ranks:
        yield ranks


class Net(nn.Module):
    """Without buffers, which DDP would have to synchronise."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 7))
            self.head = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(x)))
        return y


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([launch.whole(p).flatten() for p in model.parameters()])


def _of_ranks(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return found


def _loader() -> DataLoader[Any]:
    data = Noisy(26)
    return DataLoader(data, batch_size=2, sampler=DistributedSampler(data))


# ---------------------------------------------------------------------- fit


def _fit(seed: int = 5, **options: Any) -> Any:
    torch.manual_seed(seed + dist.get_rank())  # dropout and noise differ by rank
    model = Net(seed)
    optimizer = LossAware(levels(model), model=model)
    options = {"accumulate": 2, "epochs": 3, "meta_every": 3, "progress": False, **options}
    fit(
        DistributedDataParallel(model),
        _loader(),
        optimizer,
        loss_fn,
        val_loader=held_out(),
        **options,
    )
    return model, optimizer


def _fit_keeps_ranks_together() -> None:
    model, optimizer = _fit()
    first, second = _of_ranks(_weights(model))
    assert torch.equal(first, second)
    assert len(set(optimizer.used)) == len(optimizer.used) == 12
    used = _of_ranks(torch.tensor(optimizer.used))
    assert torch.equal(*used)
    learned = optimizer.param_groups[0]["log_multiplier"]
    assert torch.equal(*_of_ranks(learned)) and learned != 0


def test_replicas_stay_the_same_with_steps_that_depend_on_the_loss(ranks: launch.Ranks) -> None:
    ranks.run(_fit_keeps_ranks_together)


def _own_losses_make_replicas_drift() -> None:
    torch.manual_seed(dist.get_rank())
    model = Net()
    optimizer = LossAware(levels(model), model=model)
    replica = DistributedDataParallel(model)
    for averaged in (True, False):
        for batch in _loader():
            loss = loss_fn(replica, batch)
            loss.backward()
            if averaged:
                observe_loss(optimizer, loss)
            else:
                optimizer.observe_loss(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        first, second = _of_ranks(_weights(model))
        assert torch.equal(first, second) == averaged
    assert (first - second).abs().max() > 1e-4


def test_a_loss_that_is_not_averaged_would_part_them(ranks: launch.Ranks) -> None:
    ranks.run(_own_losses_make_replicas_drift)


def _resumes_exactly(path: str) -> None:
    expected, _ = _fit()

    def kill(run: Run) -> None:
        if run.step == 6:
            raise InterruptedError

    place = Checkpoint(path, every=1)
    with pytest.raises(InterruptedError):
        _fit(checkpoint=place, callbacks=[kill])
    dist.barrier()
    saved = torch.load(path, weights_only=True)
    assert saved["progress"] == {"step": 5, "epoch": 1, "position": 1}
    assert len(saved["ranks"]) == 2
    model, _ = _fit(seed=77, checkpoint=place)
    assert torch.equal(_weights(model), _weights(expected))


def test_each_rank_resumes_with_its_own_random_numbers(ranks: launch.Ranks, tmp_path: Any) -> None:
    ranks.run(_resumes_exactly, str(tmp_path / "run.pt"))


def _needs_as_many_ranks(path: str) -> None:
    model = Net()
    optimizer = NestedOptimizer(levels(model))
    with pytest.raises(ValueError, match="written on 1 ranks, and this run has 2"):
        fit(
            DistributedDataParallel(model),
            _loader(),
            optimizer,
            loss_fn,
            steps=4,
            checkpoint=path,
            progress=False,
        )
    sharded = Net()
    fully_shard(sharded)
    with pytest.raises(RuntimeError, match=r"sharded.*torch\.distributed\.checkpoint"):
        optimizer = NestedOptimizer(sharded.parameters())
        fit(sharded, _loader(), optimizer, loss_fn, steps=1, checkpoint=path, progress=False)


def test_checkpoints_of_fit_say_what_they_cannot_do(ranks: launch.Ranks, tmp_path: Any) -> None:
    model = Net()
    path = str(tmp_path / "run.pt")
    options: dict[str, Any] = {"steps": 2, "checkpoint": path, "progress": False}
    data = DataLoader(Noisy(), batch_size=2)
    fit(model, data, NestedOptimizer(levels(model)), loss_fn, **options)
    ranks.run(_needs_as_many_ranks, path)


# ---------------------------------------------------------------------- Accelerate


def _accelerator(**options: Any) -> Any:
    import accelerate
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # read, and not used
    return accelerate.Accelerator(cpu=True, **options)


def _accelerate_ddp() -> None:
    from nested_optim.integrations.accelerate import StepLoss

    accelerator = _accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(dist.get_rank())
    model = Net()
    model, optimizer, batches = accelerator.prepare(
        model, LossAware(levels(model), model=model), DataLoader(Noisy(28), batch_size=2)
    )
    assert isinstance(model, DistributedDataParallel)
    step_loss = StepLoss(accelerator, optimizer)
    losses: list[float] = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = loss_fn(model, batch)
            losses.append(float(loss.detach()))
            accelerator.backward(loss)
            step_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert len(losses) == 7
    assert torch.equal(*_of_ranks(_weights(model)))
    used = unwrap_optimizer(optimizer).used
    parts = [losses[i : i + 2] for i in range(0, 7, 2)]
    own = torch.tensor([sum(part) / len(part) for part in parts])
    assert used == pytest.approx(torch.stack(_of_ranks(own)).mean(0).tolist(), rel=1e-6)


@pytest.mark.skipif(not find_spec("accelerate"), reason="needs accelerate")
def test_accelerates_replicas_stay_the_same(ranks: launch.Ranks) -> None:
    ranks.run(_accelerate_ddp)


def _accelerate_fsdp2(by_hand: bool) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator = _accelerator(fsdp_plugin=plugin)
    # Accelerate takes the plugin on accelerators only.
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    if by_hand:
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    model = Net().eval()
    optimizer = NestedOptimizer(levels(model), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, FSDPModule if by_hand else DistributedDataParallel)

    expected = Net().eval()
    reference = NestedOptimizer(levels(expected), lr=1e-2)
    generator = torch.Generator().manual_seed(3)
    rank = dist.get_rank()
    for _ in range(7):  # two windows of 3, and one gradient more
        x = torch.randn(4, 4, generator=generator)
        batch = x, x.sum(1, keepdim=True)
        accelerator.backward(loss_fn(model, tuple(t.chunk(2)[rank] for t in batch)))
        optimizer.step()
        optimizer.zero_grad()
        loss_fn(expected, batch).backward()
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(_weights(model), _weights(expected), rtol=1e-4, atol=1e-6)
    counts = {
        (group["name"], int(optimizer.state[p]["window_count"]))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert counts == {("body", 1), ("head", 0)}
    assert unwrap_optimizer(optimizer).flush() == 4
    reference.flush()
    torch.testing.assert_close(_weights(model), _weights(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not find_spec("accelerate"), reason="needs accelerate")
def test_accelerate_ignores_its_fsdp_plugin_on_a_cpu(ranks: launch.Ranks) -> None:
    """And trains with DDP: why the next test chooses FSDP2 by hand."""
    ranks.run(_accelerate_fsdp2, False)


@pytest.mark.skipif(not find_spec("accelerate"), reason="needs accelerate")
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="fully_shard's forward needs an accelerator in this torch",
)
def test_frequencies_under_accelerates_fsdp2(ranks: launch.Ranks) -> None:
    """Accelerate's own preparation: parameters become DTensors, and the optimizer gets them."""
    ranks.run(_accelerate_fsdp2, True)
