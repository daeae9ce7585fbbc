"""The Hugging Face Trainer on two ranks: replicas stay the same, whatever their own losses are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import nested_optim

from ..distributed import launch


@pytest.fixture(scope="module")
def ranks() -> Iterator[launch.Ranks]:
    with launch.started() as ranks:
        yield ranks


def _of_ranks(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return found


def _train(folder: str, kwargs: dict[str, Any], callbacks: list[Any], **options: Any) -> Any:
    """A run on this rank's share of the data, with dropout that differs by rank."""
    from accelerate.state import AcceleratorState, GradientState

    from nested_optim.integrations.hf import NestedFactory, NestedTrainer

    from .hf_tiny import arguments, make_model, samples

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # read, and not used
    options = {"gradient_accumulation_steps": 2, "max_steps": 5, "ddp_backend": "gloo", **options}
    trainer = NestedTrainer(
        model=make_model(),
        args=arguments(folder, **options),
        train_dataset=samples(36),
        eval_dataset=samples(8, seed=2),
        optimizer_cls_and_kwargs=(NestedFactory, kwargs),
        callbacks=callbacks,
    )
    torch.manual_seed(100 + dist.get_rank())
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    return trainer


def _assert_same_on_ranks(trainer: Any) -> None:
    optimizer = trainer.optimizer.optimizer
    tensors = [p.detach() for p in trainer.model.parameters()]
    tensors += [v for v in optimizer.param_groups[0].values() if isinstance(v, Tensor)]
    for state in optimizer.state.values():
        tensors += [v for v in state.values() if isinstance(v, Tensor)]
    for tensor in tensors:
        assert torch.equal(*_of_ranks(tensor))


def _loss_dependent_steps(folder: str, mode: str) -> None:
    from nested_optim.integrations.hf import NestedCallback

    kwargs = {
        "optimizer": "deep_nested",
        "rules": [{"match": "wte", "frequency": 3}],
        "mode": mode,
        "meta_lr": 1e-2,
        "meta_update_freq": 2,
        "k_unroll": 2,
        "cms_frequencies": (1, 2),
        "momentum_hidden_dim": 4,
        "controller_hidden_dim": 4,
    }
    callbacks = [NestedCallback()] if mode == "explicit" else []
    trainer = _train(folder, kwargs, callbacks)
    assert trainer.optimizer.optimizer.param_groups[0]["meta_updates"] == 2
    _assert_same_on_ranks(trainer)


@pytest.mark.parametrize("mode", ["simple", "explicit"])
def test_replicas_of_the_trainer_learn_the_same(mode: str, ranks: launch.Ranks, tmp_path: Any):
    ranks.run(_loss_dependent_steps, str(tmp_path), mode, timeout=120)


def _told_losses(folder: str) -> None:
    from nested_optim.integrations import hf

    told: list[float] = []

    class LossAware(nested_optim.NestedOptimizer):
        def observe_loss(self, loss: Tensor | None) -> None:
            if loss is not None:
                told.append(float(loss))

    build = hf.build_optimizer
    hf.build_optimizer = lambda model, name, lr, **_: LossAware(model.parameters(), lr=lr)
    try:
        trainer = _train(folder, {}, [])
    finally:
        hf.build_optimizer = build
    assert torch.equal(*_of_ranks(torch.tensor(told)))
    # The Trainer's log averages over the ranks, too.
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert told == pytest.approx(logged, abs=1e-4) and len(told) == 5
    _assert_same_on_ranks(trainer)


def test_the_told_loss_is_that_of_all_ranks(ranks: launch.Ranks, tmp_path: Any) -> None:
    ranks.run(_told_losses, str(tmp_path), timeout=120)
