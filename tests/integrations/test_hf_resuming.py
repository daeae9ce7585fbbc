"""Meta updates in the real Hugging Face Trainer, and resuming that is exact."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch.utils.data import IterableDataset
from transformers import Trainer

import nested_optim
from nested_optim.integrations.hf import NestedCallback, NestedFactory, NestedTrainer
from nested_optim.integrations.optimizers import unwrap_optimizer

from .hf_tiny import arguments, difference, make_model, samples, weights

RULES = [{"match": "wte|wpe", "frequency": 4, "name": "embeddings"}]
PLAIN: dict[str, Any] = {"optimizer": "nested", "rules": RULES}
LEARNED: dict[str, Any] = {
    "optimizer": "deep_nested",
    "rules": RULES,
    "mode": "explicit",
    "meta_update_freq": 2,
    "meta_lr": 1e-2,
    "k_unroll": 2,
    "cms_frequencies": (1, 3),
    "momentum_hidden_dim": 4,
    "controller_hidden_dim": 4,
}
SIMPLE = {**LEARNED, "mode": "simple"}


def make_trainer(
    folder: Path,
    kwargs: dict[str, Any],
    *,
    cls: type[Trainer] = NestedTrainer,
    callback: NestedCallback | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Trainer:
    return cls(
        model=make_model().to(dtype),
        args=arguments(folder, **{"gradient_accumulation_steps": 2, **options}),
        train_dataset=samples(),
        eval_dataset=samples(8, seed=2),
        callbacks=[callback] if callback is not None else [],
        optimizer_cls_and_kwargs=(NestedFactory, kwargs),
    )


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, optimizer state and what is learned, by name."""
    optimizer = unwrap_optimizer(trainer.optimizer)
    found = weights(trainer.model)
    for name, param in list(trainer.model.named_parameters()):
        for key, value in optimizer.state[param].items():
            found[f"{name} {key}"] = value.clone()
    for key, value in optimizer.param_groups[0].items():
        if isinstance(value, Tensor):
            found[f"group {key}"] = value.clone()
    return found


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 autocast": {"bf16": True},
    "bf16 weights": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param(PLAIN, id="nested"),
        pytest.param({**PLAIN, "state_dtype": "float32"}, id="float32 state"),
        pytest.param({**PLAIN, "optimizer": "m3"}, id="m3"),
        pytest.param({**PLAIN, "memory": {"frequencies": (2,), "write": 0.5}}, id="memory"),
        pytest.param(SIMPLE, id="simple"),
        pytest.param(LEARNED, id="explicit"),
    ],
)
def test_resuming_at_an_odd_step_inside_a_window_is_exact(kwargs, precision, tmp_path):
    options = PRECISIONS[precision]

    def run(name: str, resume: Path | None = None, **more: Any) -> Trainer:
        callback = NestedCallback() if kwargs is LEARNED else None
        trainer = make_trainer(
            tmp_path / name, kwargs, callback=callback, max_steps=7, **options, **more
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    whole = run("whole")
    run("cut", save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {float(s["window_count"]) for s in saved["state"].values()} == {0, 3}
    torch.manual_seed(12345)  # another process has other random numbers
    resumed = run("resumed", checkpoint)

    assert difference(state(resumed), state(whole)) == 0.0
    begun = weights(make_model().to(options.get("dtype")))
    assert difference(weights(whole.model), begun) > 0
    if kwargs is LEARNED:
        assert unwrap_optimizer(resumed.optimizer).param_groups[0]["meta_updates"] == 3


@pytest.mark.parametrize("cls", [Trainer, NestedTrainer])
def test_the_callback_learns_at_every_nth_step(cls, tmp_path):
    callback = NestedCallback(samples(8, seed=2), every=3)
    trainer = make_trainer(tmp_path, LEARNED, cls=cls, callback=callback, max_steps=7)
    trainer.train()
    optimizer = unwrap_optimizer(trainer.optimizer)
    first = optimizer.param_groups[0]
    assert first["meta_updates"] == 2
    assert torch.isfinite(optimizer.last_meta_loss) and optimizer.controller_grad_norm > 0
    fresh = make_trainer(tmp_path, {**LEARNED, "meta_lr": 0.0}, max_steps=1)
    fresh.train()
    begun = unwrap_optimizer(fresh.optimizer).param_groups[0]
    for key in ("controller_weights", "momentum_weights", "mixing_weights"):
        assert not torch.equal(first[key], begun[key]), key


@pytest.mark.parametrize("kwargs", [SIMPLE, LEARNED], ids=["simple", "explicit"])
def test_what_is_learned_is_logged(kwargs, tmp_path):
    callback = NestedCallback() if kwargs is LEARNED else None
    trainer = make_trainer(tmp_path, kwargs, callback=callback, max_steps=6)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = entries[3]  # after two meta updates, and before the rate is 0
    for name in ("lr_multiplier_embeddings", "lr_multiplier_default"):
        assert last[f"nested/{name}"] > 0
    assert last["nested/controller_grad_norm"] > 0 and last["nested/momentum_avg_norm"] > 0
    if kwargs is SIMPLE:  # the loss of the step that learned
        assert last["nested/meta_loss"] == pytest.approx(last["loss"], abs=1e-4)
    else:
        assert last["nested/meta_loss"] != pytest.approx(last["loss"], abs=1e-4)
        assert last["nested/lr_multiplier_embeddings"] != 1


def test_with_meta_lr_0_training_is_bit_identical_to_no_meta_updates(tmp_path):
    kwargs = {**LEARNED, "meta_lr": 0.0}
    updated = make_trainer(tmp_path, kwargs, callback=NestedCallback(every=1), max_steps=5)
    updated.train()
    without = make_trainer(tmp_path, kwargs, max_steps=5)
    without.train()
    plain = make_trainer(tmp_path, {**PLAIN, "betas": (0.9, 0.999)}, max_steps=5)
    plain.train()
    assert unwrap_optimizer(updated.optimizer).param_groups[0]["meta_updates"] > 0
    assert difference(weights(updated.model), weights(without.model)) == 0.0
    assert difference(weights(updated.model), weights(plain.model)) == 0.0


class Drawing(list):
    """Samples that draw from all generators when they are looked at."""

    def __getitem__(self, index: Any) -> Any:
        sample = super().__getitem__(index)
        random.random(), numpy.random.rand(), torch.rand(())
        return sample


def recording(seen: list[Any]) -> Any:
    """A factory of optimizers whose meta update notes its batches and draws random numbers."""

    class Recording(nested_optim.NestedOptimizer):
        def meta_update(self, val_batch: Any, train_batches: Any, loss_fn: Any) -> None:
            torch.rand(3), random.random(), numpy.random.rand()
            seen.append([b["input_ids"].tolist() for b in (val_batch, *train_batches)])

    class Factory:
        def __call__(self, model: nn.Module, **kwargs: Any) -> Any:
            return Recording(model.parameters(), lr=1e-2)

    return Factory


def test_meta_updates_consume_no_random_numbers_of_the_run(tmp_path):
    runs = []
    for callback in (None, NestedCallback(Drawing(samples(8, seed=2)), every=1)):
        trainer = make_trainer(tmp_path, {}, callback=callback, max_steps=5)
        trainer.train_dataset = Drawing(samples())
        trainer.optimizer_cls_and_kwargs = (recording([]), {})
        random.seed(0)
        trainer.train()
        runs.append((weights(trainer.model), random.random(), numpy.random.rand(), torch.rand(())))
    assert difference(runs[0][0], runs[1][0]) == 0.0
    assert runs[0][1:] == runs[1][1:]


def test_batches_are_chosen_by_seed_and_step_alone(tmp_path):
    def batches(chosen_by: int, **options: Any) -> list[Any]:
        seen: list[Any] = []
        callback = NestedCallback(every=2, seed=chosen_by, batch_size=3)
        trainer = make_trainer(tmp_path, {}, callback=callback, **{"max_steps": 6, **options})
        trainer.optimizer_cls_and_kwargs = (recording(seen), {})
        trainer.train()
        return seen

    found = batches(0)
    assert len(found) == 3 and all(len(batch) == 3 for update in found for batch in update)
    assert found[0] != found[1]
    held_out = [sample["input_ids"].tolist() for sample in samples(8, seed=2)]
    known = [sample["input_ids"].tolist() for sample in samples()]
    for val_batch, *train_batches in found:
        assert all(row in held_out for row in val_batch)
        assert all(row in known for batch in train_batches for row in batch)
    assert batches(0, seed=99, max_steps=4) == found[:2]
    assert batches(1) != found


def test_no_meta_update_follows_a_skipped_step(tmp_path):
    seen: list[Any] = []
    callback = NestedCallback(every=1)
    trainer = make_trainer(tmp_path, {}, callback=callback, max_steps=1)
    trainer.optimizer_cls_and_kwargs = (recording(seen), {})
    trainer.train()
    options = {
        "optimizer": trainer.optimizer,
        "train_dataloader": trainer.callback_handler.train_dataloader,
    }
    for skipped, count in ((True, 1), (False, 2)):
        trainer.optimizer._is_overflow = skipped  # as Accelerate notes it
        callback.on_step_end(trainer.args, trainer.state, trainer.control, **options)
        assert len(seen) == count


def test_held_out_samples_are_collated_with_the_training_samples_keys(tmp_path):
    with_text = [{**sample, "text": "not a tensor"} for sample in samples(8, seed=2)]

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    seen: list[Any] = []
    callback = NestedCallback(with_text, every=1)
    trainer = make_trainer(tmp_path, {}, cls=Trainer, callback=callback, max_steps=1)
    trainer.data_collator = collate
    trainer.optimizer_cls_and_kwargs = (recording(seen), {})
    trainer.train()
    assert len(seen) == 1


def test_the_meta_loss_is_the_trainer_s_own(tmp_path):
    seen: list[tuple[float, float]] = []

    class Scaled(NestedTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return 10 * super().compute_loss(model, inputs, *args, **kwargs)

    class Comparing(nested_optim.NestedOptimizer):
        def meta_update(self, val_batch: Any, train_batches: Any, loss_fn: Any) -> None:
            torch.manual_seed(0)
            loss = loss_fn(trainer.model, val_batch)
            torch.manual_seed(0)
            seen.append((loss.item(), trainer.model(**val_batch).loss.item()))
            assert "labels" in val_batch

    class Factory:
        def __call__(self, model: nn.Module) -> Any:
            return Comparing(model.parameters())

    trainer = make_trainer(tmp_path, {}, cls=Scaled, callback=NestedCallback(every=1), max_steps=1)
    trainer.optimizer_cls_and_kwargs = (Factory, {})
    trainer.train()
    ((scaled, plain),) = seen
    assert scaled == pytest.approx(10 * plain)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(samples())


def test_what_meta_updates_cannot_do_is_refused_before_training(tmp_path):
    def fails(error: type[Exception], match: str, kwargs: Any, callback: Any, **more: Any) -> None:
        cls = more.pop("cls", NestedTrainer)
        trainer = make_trainer(tmp_path, kwargs, cls=cls, callback=callback)
        for key, value in more.items():
            setattr(trainer, key, value)
        before = weights(trainer.model)
        with pytest.raises(error, match=match):
            trainer.train()
        assert difference(weights(trainer.model), before) == 0.0

    fails(TypeError, "has no method meta_update", PLAIN, NestedCallback())
    explicit = {"optimizer_cls_and_kwargs": (recording([]), {})}
    fails(ValueError, "needs held-out data", {}, NestedCallback(), cls=Trainer, **explicit)
    fails(ValueError, "needs held-out data", {}, NestedCallback(), eval_dataset=None, **explicit)
    fails(ValueError, "val_dataset is empty", {}, NestedCallback([]), **explicit)
    fails(TypeError, "map-style", {}, NestedCallback(Stream()), **explicit)
    fails(TypeError, "map-style", {}, NestedCallback(), train_dataset=Stream(), **explicit)
    fails(TypeError, "mode='simple' learns in its steps", SIMPLE, NestedCallback())
    with pytest.raises(ValueError, match="every is a number"):
        NestedCallback(every=0)
