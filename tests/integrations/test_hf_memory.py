"""A weight memory in Hugging Face's Trainer: what is evaluated, saved, and left alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, Trainer

from nested_optim.integrations.hf import (
    NestedFactory,
    NestedTrainer,
    WeightMemoryCallback,
)

from .hf_tiny import VOCABULARY, arguments, difference, make_model, samples, weights

MEMORY = {"frequencies": (1, 2), "write": 0.2, "pull": 0.1}


def build(folder, *callbacks, cls=NestedTrainer, memory=MEMORY, **options):
    return cls(
        model=make_model(),
        args=arguments(folder, **options),
        train_dataset=samples(),
        eval_dataset=samples(8, seed=2),
        optimizer_cls_and_kwargs=(NestedFactory, {"optimizer": "nested", "memory": memory}),
        callbacks=list(callbacks),
    )


def memory_of(trainer):
    return trainer.optimizer.optimizer.weight_memory


@pytest.mark.parametrize("level", [-1, "mean", None])
def test_evaluation_is_of_the_read_out_and_training_goes_on_with_the_live_weights(level, tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 1}
    plain = build(tmp_path / "plain", **often)
    plain.train()
    trainer = build(tmp_path / "read", WeightMemoryCallback(level, save_as=None), **often)
    trainer.train()
    assert difference(weights(plain.model), weights(trainer.model)) == 0.0
    with memory_of(plain).read_out(level):
        wanted = plain.evaluate()["eval_loss"]
        predicted = plain.predict(plain.eval_dataset).predictions
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] == wanted == trainer.evaluate()["eval_loss"]
    assert (trainer.predict(trainer.eval_dataset).predictions == predicted).all()
    assert wanted != plain.evaluate()["eval_loss"]


def test_the_read_out_is_saved_as_a_model_of_its_own_and_live_weights_resume(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    trainer = build(tmp_path / "a", WeightMemoryCallback(-1), **saving)
    trainer.train()
    folder = tmp_path / "a" / "checkpoint-3"
    again = build(tmp_path / "b", WeightMemoryCallback(-1), **saving)
    again.train(resume_from_checkpoint=str(folder))
    assert difference(weights(trainer.model), weights(again.model)) == 0.0
    slow = memory_of(trainer).model_state_dict(trainer.model, -1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(slow.values(), memory_of(again).model_state_dict(again.model, -1).values())
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-5" / "read_out")
    last = {n: slow[n] for n in weights(saved)}
    assert difference(weights(saved), last) == 0.0
    assert difference(weights(saved), weights(trainer.model)) > 0


class Bigram(torch.nn.Module):
    """A model that is none of Hugging Face's."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids, labels):
        logits = self.table(input_ids)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def test_a_model_without_save_pretrained_is_saved_as_a_state_dict(tmp_path):
    trainer = NestedTrainer(
        model=Bigram(),
        args=arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=3),
        train_dataset=samples(),
        optimizer_cls_and_kwargs=(NestedFactory, {"memory": MEMORY}),
        callbacks=[WeightMemoryCallback("mean", save_as="slow", evaluate=False)],
    )
    trainer.train()
    wanted = memory_of(trainer).model_state_dict(trainer.model, "mean")
    saved = torch.load(tmp_path / "checkpoint-3" / "slow" / "pytorch_model.bin", weights_only=True)
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[key], value) for key, value in wanted.items())
    assert not torch.equal(saved["table.weight"], trainer.model.table.weight)


def test_what_cannot_be_done_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="has no WeightMemory"):
        build(tmp_path, WeightMemoryCallback(), memory=None).train()
    with pytest.raises(ValueError, match="plain Trainer cannot evaluate"):
        build(tmp_path, WeightMemoryCallback(), cls=Trainer).train()
    trainer = build(tmp_path, WeightMemoryCallback(evaluate=False), cls=Trainer)
    trainer.train()  # a plain Trainer can save
