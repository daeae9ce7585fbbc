"""Windows under FSDP2, DDP and tensor parallelism: what several ranks train is what one would."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    distribute_tensor,
    init_device_mesh,
)
from torch.nn.parallel import DistributedDataParallel

from nested_optim import DeepMomentum, DeltaMomentum, NestedOptimizer

from .launch import (
    FREQUENCIES,
    Net,
    Ranks,
    assert_near,
    assert_same,
    give_gradients,
    levels,
    sharded,
    snapshot,
    started,
    take_steps,
    whole,
)

LR = 1e-2
STEPS = 7  # two windows of 3 or three of 2, and one gradient more

fsdp2_trains_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="fully_shard's forward needs an accelerator in this torch",
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with started() as ranks:
        yield ranks


class WindowedAdamW:
    """What is expected: torch's AdamW, stepped on gradients that are averaged by hand."""

    def __init__(self, model: Net, dtype: torch.dtype, **options: Any) -> None:
        self.model = model
        self.dtype = dtype
        self.options = {"lr": LR, "foreach": False, **options}
        self.copies = {
            name: nn.Parameter(param.detach().to(dtype, copy=True))
            for name, param in model.named_parameters()
        }
        self.optimizers = {
            name: torch.optim.AdamW([copy], **self.options) for name, copy in self.copies.items()
        }
        self.windows: dict[str, list[Tensor]] = {name: [] for name in self.copies}

    @torch.no_grad()
    def step(self) -> None:
        for name, param in self.model.named_parameters():
            assert param.grad is not None
            self.windows[name].append(param.grad.to(self.dtype))
            if len(self.windows[name]) == FREQUENCIES[name.split(".")[0]]:
                self.update(name, param)

    def flush(self) -> None:
        for name, param in self.model.named_parameters():
            if self.windows[name]:
                self.update(name, param)

    @torch.no_grad()
    def update(self, name: str, param: Tensor) -> None:
        window, copy = self.windows[name], self.copies[name]
        copy.copy_(param)
        copy.grad = sum(window[1:], window[0]) / len(window)
        self.optimizers[name].step()
        param.copy_(copy)
        window.clear()

    def expected(self, keys: tuple[str, ...]) -> dict[str, Tensor]:
        tensors = {}
        for name, param in self.model.named_parameters():
            tensors[name] = param.detach().clone()
            for key in keys:
                value: Tensor = self.optimizers[name].state[self.copies[name]][key]
                tensors[f"{name} {key}"] = value.detach().clone()
        return tensors


def only(tensors: dict[str, Tensor], keys: tuple[str, ...]) -> dict[str, Tensor]:
    """The parameters, and of their state these keys."""
    return {name: t for name, t in tensors.items() if " " not in name or name.endswith(keys)}


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = (torch.randn(8, size, generator=generator) for size in (5, 1))
    return x.to(dtype), y.to(dtype)


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    ((model(x) - y) ** 2).mean().backward()


def make_sharded(
    dtype: torch.dtype, options: dict[str, Any], optimizer_first: bool = False
) -> tuple[Net, NestedOptimizer]:
    """A sharded model and its optimizer, in either order of making them."""
    model = Net(dtype)
    options = {"lr": LR, **options}
    if not optimizer_first:
        sharded(model)
        return model, NestedOptimizer(levels(model), **options)
    optimizer = NestedOptimizer(levels(model), **options)
    names = {param: name for name, param in model.named_parameters()}
    sharded(model)
    replaced = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [replaced[names[param]] for param in group["params"]]
    return model, optimizer


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "capturable for-loop": {"capturable": True, "foreach": False},
    "tensor lr": {"lr": torch.tensor(LR)},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.3},
    "float32 state": {"state_dtype": torch.float32},
    "float32 state for-loop": {"state_dtype": torch.float32, "foreach": False},
}

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _options_train_sharded_windows(name: str, dtype: torch.dtype) -> None:
    options = OPTIONS[name]
    model, optimizer = make_sharded(dtype, options)
    shared = {key: options[key] for key in ("amsgrad", "weight_decay") if key in options}
    reference = WindowedAdamW(Net(dtype), torch.float32, **shared)
    for step in range(STEPS):
        for net, optim in ((model, optimizer), (reference.model, reference)):
            give_gradients(net, step)
            optim.step()
    keys = (*MOMENTS, "max_exp_avg_sq") if options.get("amsgrad") else MOMENTS
    got, expected = only(snapshot(model, optimizer), keys), reference.expected(keys)
    if dtype is torch.bfloat16:
        state = [{k: v for k, v in tensors.items() if " " in k} for tensors in (got, expected)]
        assert_near(*state, "float32 state of bfloat16 parameters")
        assert_near(got, expected, "bfloat16 parameters", tolerance=2**-8)
    else:
        assert_near(got, expected, "weights and moments")


@pytest.mark.parametrize("name", [name for name in OPTIONS if "state" not in name])
def test_sharded_windows_equal_adamw_on_averaged_gradients(ranks: Ranks, name: str) -> None:
    ranks.run(_options_train_sharded_windows, name, torch.float32)


@pytest.mark.parametrize("foreach", [True, False])
def test_sharded_bfloat16_parameters_keep_float32_state(ranks: Ranks, foreach: bool) -> None:
    name = "float32 state" if foreach else "float32 state for-loop"
    ranks.run(_options_train_sharded_windows, name, torch.bfloat16)


def _fsdp2_trains_as_one_process(foreach: bool, optimizer_first: bool) -> None:
    model, optimizer = make_sharded(torch.float32, {"foreach": foreach}, optimizer_first)
    reference = WindowedAdamW(Net(), torch.float32)
    for step in range(STEPS):
        backward(model, *batch(step, torch.float32))
        optimizer.step()
        backward(reference.model, *batch(step, torch.float32))
        reference.step()
    assert all(isinstance(param, DTensor) for param in optimizer.state)
    assert_near(
        only(snapshot(model, optimizer), MOMENTS), reference.expected(MOMENTS), "one batch for all"
    )


@fsdp2_trains_on_cpu
@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("foreach", [True, False])
def test_fully_shard_trains_as_one_process_whichever_is_made_first(
    ranks: Ranks, foreach: bool, optimizer_first: bool
) -> None:
    ranks.run(_fsdp2_trains_as_one_process, foreach, optimizer_first)


def _fsdp2_trains_on_split_batches(foreach: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model, optimizer = make_sharded(torch.float64, {"foreach": foreach})
    reference = WindowedAdamW(Net(torch.float64), torch.float64)
    for step in range(STEPS):
        x, y = batch(step, torch.float64)
        backward(model, x[rank::size], y[rank::size])
        optimizer.step()
        backward(reference.model, x, y)
        reference.step()
    weights = only(snapshot(model, optimizer), MOMENTS)
    assert_near(weights, reference.expected(MOMENTS), "the whole batch", tolerance=1e-9)
    assert optimizer.flush() == 4
    reference.flush()
    weights = only(snapshot(model, optimizer), MOMENTS)
    assert_near(weights, reference.expected(MOMENTS), "after flush", tolerance=1e-9)


@fsdp2_trains_on_cpu
@pytest.mark.parametrize("foreach", [True, False])
def test_fully_shard_on_split_batches_trains_and_flushes_as_the_whole_batch(
    ranks: Ranks, foreach: bool
) -> None:
    ranks.run(_fsdp2_trains_on_split_batches, foreach)


def _replicas_agree(foreach: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = Net(torch.float64, seed=rank)  # DDP broadcasts rank 0's
    replica = DistributedDataParallel(model)
    optimizer = NestedOptimizer(levels(model), lr=LR, foreach=foreach)
    reference = WindowedAdamW(Net(torch.float64), torch.float64)
    for step in range(STEPS):
        x, y = batch(step, torch.float64)
        backward(replica, x[rank::size], y[rank::size])
        optimizer.step()
        backward(reference.model, x, y)
        reference.step()
        everywhere: list[Any] = [None] * size
        dist.all_gather_object(everywhere, snapshot(model, optimizer))
        for other in everywhere:
            assert_same(other, everywhere[0], f"replicas after step {step + 1}")
    assert_near(
        only(snapshot(model, optimizer), MOMENTS),
        reference.expected(MOMENTS),
        "the whole batch",
        tolerance=1e-9,
    )


@pytest.mark.parametrize("foreach", [True, False])
def test_ddp_replicas_stay_identical_inside_windows_and_train_as_the_whole_batch(
    ranks: Ranks, foreach: bool
) -> None:
    ranks.run(_replicas_agree, foreach)


DELTA_OPTIONS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "normalized": {"normalized": True},
    "capturable": {"capturable": True},
    # The way of products in another dtype, as they are on CUDA by default.
    "products": {"product_dtype": "float64"},
    "products, for-loop": {"product_dtype": "float64", "foreach": False},
}


def _delta_momentum_of_shards(name: str) -> None:
    """Products of whole matrices, of which each rank has some rows; a bias; no rows at all."""
    options = {"lr": LR, "delta_rate": 0.5, "weight_decay": 0.1, **DELTA_OPTIONS[name]}
    model, whole_model = sharded(Net(torch.float64)), Net(torch.float64)
    optimizer = DeltaMomentum(levels(model), **options)
    reference = DeltaMomentum(levels(whole_model), **options)
    for step in range(STEPS):
        for net, optim in ((model, optimizer), (whole_model, reference)):
            give_gradients(net, step)
            optim.step()
    assert all(isinstance(param, DTensor) for param in optimizer.state)
    got, expected = snapshot(model, optimizer), snapshot(whole_model, reference)
    assert_near(got, expected, "weights and buffers", tolerance=1e-12)
    plain = Net(torch.float64)
    momentum = DeltaMomentum(levels(plain), **{**options, "delta_rate": 0.0})
    take_steps(plain, momentum, range(STEPS))
    assert not torch.allclose(whole(plain.first.weight), got["first.weight"], rtol=1e-4)


@pytest.mark.parametrize("name", DELTA_OPTIONS)
def test_delta_momentum_of_sharded_matrices_is_that_of_whole_ones(ranks: Ranks, name: str) -> None:
    ranks.run(_delta_momentum_of_shards, name)


def _deep_momentum_of_shards() -> None:
    model = sharded(Net())
    before = snapshot(model, DeltaMomentum(levels(model)))
    optimizer = DeepMomentum(levels(model), lr=LR)
    give_gradients(model, 0)
    with pytest.raises(RuntimeError, match=r"'first\.weight'.*sharded.*memory='linear'"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before, "after the error")
    whole_model = Net()
    linear = DeepMomentum(levels(model), lr=LR, memory="linear", objective="dot")
    reference = DeltaMomentum(levels(whole_model), lr=LR, delta_rate=0.0)
    take_steps(model, linear, range(STEPS))
    take_steps(whole_model, reference, range(STEPS))
    assert_near(snapshot(model, linear), snapshot(whole_model, reference), "linear memory")


def test_deep_momentum_refuses_shards_but_for_a_linear_memory(ranks: Ranks) -> None:
    ranks.run(_deep_momentum_of_shards)


def _memories_of_replicas_agree() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = Net(seed=rank)  # DDP broadcasts rank 0's
    replica = DistributedDataParallel(model)
    optimizer = DeepMomentum(levels(model), lr=LR, memory_lr=0.05)
    for step in range(STEPS):
        x, y = batch(step, torch.float32)
        backward(replica, x[rank::size], y[rank::size])
        optimizer.step()
    memory = optimizer.param_groups[0]["memory_weights"]
    assert optimizer.param_groups[0]["memory_step"] == STEPS
    everywhere: list[Any] = [None] * size
    dist.all_gather_object(everywhere, {"memory": memory, **snapshot(model, optimizer)})
    assert_same(everywhere[1], everywhere[0], "replicas and their memories")


def test_ddp_replicas_train_the_same_memory(ranks: Ranks) -> None:
    ranks.run(_memories_of_replicas_agree)


def _partial_gradients_are_summed(name: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    start = torch.arange(4.0)
    param = nn.Parameter(distribute_tensor(start, mesh, [Replicate()]))
    expected = nn.Parameter(start.clone())
    optimizer = NestedOptimizer([param], lr=LR, frequency=3, **OPTIONS[name])
    reference = torch.optim.AdamW([expected], lr=LR)
    window = []
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        shares = torch.randn(size, 4, generator=generator)
        param.grad = DTensor.from_local(shares[rank], mesh, [Partial()])
        optimizer.step()
        window.append(shares.sum(0))
        if step % 3 == 2:
            expected.grad = torch.stack(window).mean(0)
            reference.step()
            window.clear()
        torch.testing.assert_close(whole(param), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["foreach", "for-loop", "fused", "capturable"])
def test_gradients_that_tensor_parallelism_left_unsummed_are_summed_in_the_window(
    ranks: Ranks, name: str
) -> None:
    ranks.run(_partial_gradients_are_summed, name)


def _warmup_counts_on_every_rank() -> None:
    model, optimizer = make_sharded(torch.float32, {"lr": 0.0})
    before = snapshot(model, optimizer)
    for param in model.parameters():
        grad = torch.zeros_like(param)
        if dist.get_rank() == 0:
            grad.to_local()[:1] = 1.0  # type: ignore[attr-defined]
        param.grad = grad
    optimizer.step()
    after = snapshot(model, optimizer)
    assert_same(only(after, ()), before, "weights at lr 0")
    for layer, frequency in FREQUENCIES.items():
        assert after[f"{layer}.weight window_count"] == (1 if frequency > 1 else 0), layer
    assert after["middle.weight window_sum"].sum() == 7, "the gradient of rank 0's first row"


def test_a_gradient_on_one_rank_only_counts_on_all_of_them_when_lr_starts_at_zero(
    ranks: Ranks,
) -> None:
    ranks.run(_warmup_counts_on_every_rank)


def _raises_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise ValueError("told to fail")
    dist.barrier()


def _never_ends() -> None:
    while True:
        pass


def _meets() -> None:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    assert total == 1


def test_a_failing_or_hanging_rank_is_reported_and_the_next_scenario_gets_new_ranks(
    ranks: Ranks,
) -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1.*ValueError: told to fail"):
        ranks.run(_raises_on_one_rank)
    ranks.run(_meets)
    with pytest.raises(AssertionError, match=r"(?s)Timeout .0:00:01.*in _never_ends"):
        ranks.run(_never_ends, timeout=1)


def _aborts_on_one_rank(folder: str, times: int) -> None:
    seen = len(os.listdir(folder))
    dist.barrier()
    if dist.get_rank() == 1 and seen < times:
        (Path(folder) / str(seen)).touch()
        os.abort()
    dist.barrier()


def test_a_rank_that_crashes_in_native_code_is_given_one_more_try_and_a_warning(
    ranks: Ranks, tmp_path: Path
) -> None:
    folders = [tmp_path / "once", tmp_path / "twice"]
    for folder in folders:
        folder.mkdir()
    with pytest.warns(UserWarning, match=r"(?s)exit code -6.*in _aborts_on_one_rank"):
        ranks.run(_aborts_on_one_rank, str(folders[0]), 1)
    with pytest.warns(UserWarning), pytest.raises(AssertionError, match="exit code -6"):
        ranks.run(_aborts_on_one_rank, str(folders[1]), 2)
    assert [len(os.listdir(folder)) for folder in folders] == [1, 2]
    ranks.run(_meets)
