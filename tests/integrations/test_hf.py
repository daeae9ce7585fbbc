"""NestedFactory and NestedTrainer in the real Hugging Face Trainer."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers.hyperparameter_search
from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend

from nested_optim import DGD, M3, DeltaMomentum, NestedOptimizer
from nested_optim.integrations.build import OPTIMIZERS
from nested_optim.integrations.hf import NestedFactory, NestedTrainer, NestedTrainerMixin
from nested_optim.integrations.optimizers import unwrap_optimizer

from .hf_tiny import arguments, difference, make_model, samples, weights

RULES = [
    {"match": "wte|wpe", "frequency": 3, "name": "embeddings"},
    {"match": r"h\.0\.", "frequency": 2, "lr_mult": 0.5},
]


def make_trainer(
    folder: Any, kwargs: dict[str, Any], cls: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    keys = ("model", "model_init", "train_dataset", "eval_dataset", "callbacks")
    given = {"train_dataset": samples()} | {k: options.pop(k) for k in keys if k in options}
    if "model_init" not in given:
        given.setdefault("model", make_model())
    factory = (NestedFactory, kwargs)
    return cls(args=arguments(folder, **options), optimizer_cls_and_kwargs=factory, **given)


def groups(trainer: Trainer) -> dict[str, dict[str, Any]]:
    return {g["name"]: g for g in unwrap_optimizer(trainer.optimizer).param_groups}


# ---------------------------------------------------------------------- the factory


def test_without_rules_training_is_the_trainer_s_adamw_to_the_bit(tmp_path):
    theirs = Trainer(
        model=make_model(),
        args=arguments(tmp_path, optim="adamw_torch", adam_beta2=0.95),
        train_dataset=samples(),
    )
    theirs.train()
    ours = make_trainer(tmp_path, {}, adam_beta2=0.95)
    ours.train()
    assert isinstance(unwrap_optimizer(ours.optimizer), NestedOptimizer)
    assert difference(weights(ours.model), weights(theirs.model)) == 0.0
    assert difference(weights(ours.model), weights(make_model())) > 0


def test_rules_give_frequencies_and_a_group_moves_when_its_window_closes(tmp_path):
    kwargs = {"optimizer": "nested", "rules": RULES}
    moved: dict[str, list[int]] = {"transformer.wte.weight": [], "transformer.h.0.ln_1.bias": []}

    class Watching(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            now = weights(self.model)
            for name, steps in moved.items():
                if not torch.equal(now[name], self.before[name]):
                    steps.append(self.state.global_step)
            self.before = now
            return super().training_step(*args, **kwargs)

    trainer = make_trainer(tmp_path, kwargs, Watching, max_steps=8)
    trainer.before = weights(trainer.model)
    trainer.train()
    found = {name: group["frequency"] for name, group in groups(trainer).items()}
    assert found["embeddings"] == 3 and found["rule1"] == 2 and found["default"] == 1
    # Seen at the beginning of the next step; that the Trainer clears gradients does no harm.
    assert moved == {"transformer.wte.weight": [3, 6], "transformer.h.0.ln_1.bias": [2, 4, 6]}


def test_a_window_under_the_trainer_is_adamw_on_the_mean_gradient(tmp_path):
    # With one frequency for all, f batches in a window are f accumulated batches to AdamW.
    every = [{"match": ".", "frequency": 2}]
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0}
    data = samples(length=8)
    for sample in data:
        sample["labels"] = sample["input_ids"]  # equal counts of tokens: means of means agree
    model = make_model(dropout=0.0)
    ours = make_trainer(
        tmp_path, {"rules": every}, model=model, max_steps=6, train_dataset=data, **options
    )
    ours.train()
    theirs = Trainer(
        model=make_model(dropout=0.0),
        args=arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, **options),
        train_dataset=data,
    )
    theirs.train()
    assert difference(weights(ours.model), weights(theirs.model)) < 1e-5  # a thousandth of a step


def test_the_caller_s_kwargs_are_never_changed(tmp_path):
    kwargs = {"optimizer": "nested", "rules": copy.deepcopy(RULES), "betas": (0.9, 0.95)}
    before = copy.deepcopy(kwargs)
    trainer = make_trainer(tmp_path, kwargs)
    for _ in range(2):
        trainer.train()
        assert kwargs == before


def test_lr_and_weight_decay_come_from_the_arguments_unless_given(tmp_path):
    trainer = make_trainer(tmp_path, {}, learning_rate=3e-3, weight_decay=0.3)
    trainer.create_optimizer()
    found = groups(trainer)
    assert {g["lr"] for g in found.values()} == {3e-3}
    assert found["default"]["weight_decay"] == 0.3
    assert found["default_no_decay"]["weight_decay"] == 0.0

    trainer = make_trainer(tmp_path, {"lr": 7e-4, "weight_decay": 0.0}, learning_rate=3e-3)
    trainer.create_optimizer()
    assert {(g["lr"], g["weight_decay"]) for g in groups(trainer).values()} == {(7e-4, 0.0)}


def test_without_a_trainer_the_factory_takes_arguments_or_says_what_is_missing(tmp_path):
    args = arguments(tmp_path, learning_rate=5e-4)
    optimizer = NestedFactory()(make_model(), optimizer="delta", args=args)
    assert isinstance(optimizer, DeltaMomentum)
    assert {g["lr"] for g in optimizer.param_groups} == {5e-4}
    with pytest.raises(ValueError, match="no learning rate"):
        NestedFactory()(make_model())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(name, tmp_path):
    trainer = make_trainer(tmp_path, {"optimizer": name}, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert 0 < difference(weights(trainer.model), before) < 1


def test_matrices_of_gpt2_are_read_transposed_and_tied_weights_are_listed_once(tmp_path):
    trainer = make_trainer(tmp_path, {"optimizer": "m3"})
    trainer.train()
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert isinstance(optimizer, M3)
    by_name = {n: g for g in optimizer.param_groups for n in g["param_names"]}
    assert by_name["transformer.h.0.mlp.c_fc.weight"]["algorithm"] == "m3"
    assert by_name["transformer.h.0.mlp.c_fc.weight"]["out_dim"] == 1  # Conv1D is (in, out)
    assert by_name["transformer.wte.weight"]["algorithm"] == "adamw"
    assert "lm_head.weight" not in by_name
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(weights(trainer.model))


def test_dgd_sees_each_layer_s_inputs_under_accumulation(tmp_path):
    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.layer(x) - labels).pow(2).mean()}

    torch.manual_seed(0)
    data = [{"x": torch.randn(3), "labels": torch.randn(2)} for _ in range(16)]
    model = Linear()
    plain = copy.deepcopy(model)
    kwargs = {"optimizer": "dgd", "lr": 0.1}
    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "max_grad_norm": 0.0}
    options["lr_scheduler_type"] = "constant"
    trainer = make_trainer(
        tmp_path, kwargs, model=model, train_dataset=data, weight_decay=0.0, **options
    )
    trainer.train()
    by_hand = DGD(plain, lr=0.1)
    seen = batches_of(trainer, data)
    assert len(seen) == 2
    loss = plain(**{k: torch.cat([b[k] for b in seen]) for k in seen[0]})["loss"]
    loss.backward()
    by_hand.step()
    torch.testing.assert_close(model.layer.weight, plain.layer.weight, rtol=1e-5, atol=1e-6)


def batches_of(trainer: Trainer, data: list[Any]) -> list[dict[str, Tensor]]:
    """The two batches of a run's first step, found by running it again."""
    seen: list[dict[str, Tensor]] = []

    class Recording(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
            seen.append({k: v.clone() for k, v in inputs.items()})
            return super().training_step(model, inputs, *args)

    Recording(model=copy.deepcopy(trainer.model), args=trainer.args, train_dataset=data).train()
    return seen


def test_model_init_trains_the_new_model(tmp_path):
    made: list[Any] = []

    def model_init() -> Any:
        made.append(make_model())
        return made[-1]

    trainer = make_trainer(tmp_path, {"rules": RULES}, model_init=model_init)
    for _ in range(2):
        trainer.train()
        owned = {id(p) for g in groups(trainer).values() for p in g["params"]}
        assert owned == {id(p) for p in made[-1].parameters()}
        assert difference(weights(made[-1]), weights(make_model())) > 0
    assert difference(weights(made[-2]), weights(made[-1])) == 0  # the second run is the first


def test_a_second_train_goes_on_with_the_optimizer_and_a_new_schedule(tmp_path):
    trainer = make_trainer(tmp_path, {"rules": RULES}, max_steps=3, learning_rate=1e-2)
    trainer.train()
    optimizer, first = unwrap_optimizer(trainer.optimizer), weights(trainer.model)
    wte = trainer.model.transformer.wte.weight
    assert optimizer.state[wte]["step"] == 1
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer) is optimizer
    assert optimizer.state[wte]["step"] == 2
    assert difference(weights(trainer.model), first) > 0
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[0] == pytest.approx(1e-2)


class Search:
    """A search that tries two learning rates, with what Optuna's backend asks of the Trainer."""

    default_hp_space = None

    @staticmethod
    def ensure_available() -> None:
        pass

    def run(self, trainer: Trainer, n_trials: int, direction: str, **kwargs: Any) -> list[Any]:
        found = []
        for number in range(n_trials):
            trial = SimpleNamespace(number=number, params={"learning_rate": 10.0 ** (-2 - number)})
            trainer.train(trial=trial)
            optimizer = unwrap_optimizer(trainer.optimizer)
            found.append({g["initial_lr"] for g in optimizer.param_groups})
        return found


@pytest.fixture
def search(monkeypatch):
    backends = transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS
    monkeypatch.setitem(backends, HPSearchBackend.OPTUNA, Search)
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)

    def run(trainer: Trainer) -> Any:
        return trainer.hyperparameter_search(
            hp_space=lambda trial: trial.params, n_trials=2, backend="optuna"
        )

    return run


def test_a_search_over_learning_rates_reaches_the_optimizer(tmp_path, search):
    trainer = make_trainer(tmp_path, {}, model_init=lambda: make_model())
    assert search(trainer) == [{1e-2}, {1e-3}]


def test_a_search_over_what_the_factory_fixes_is_refused(tmp_path, search):
    trainer = make_trainer(tmp_path, {"lr": 1e-3}, model_init=lambda: make_model())
    with pytest.raises(ValueError, match=r"the search varies learning_rate.*leave lr out"):
        search(trainer)


def test_unknown_names_are_refused_with_close_matches(tmp_path):
    with pytest.raises(ValueError, match=r"unknown optimizer 'nestde'.*'nested'"):
        make_trainer(tmp_path, {"optimizer": "nestde"}).create_optimizer()
    with pytest.raises(ValueError, match="'frequencyy'"):
        make_trainer(tmp_path, {"frequencyy": 2}).create_optimizer()
    with pytest.raises(ValueError, match="matches no"):
        make_trainer(tmp_path, {"rules": [{"match": "attn_typo"}]}).create_optimizer()


def test_an_instance_in_place_of_the_class_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, {})
    trainer.optimizer_cls_and_kwargs = (NestedFactory(), {})
    with pytest.raises(TypeError, match="pass the class"):
        trainer.train()


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "nested_optim.integrations.hf")
    with pytest.raises(ImportError, match=r"nested_optim\[hf\]"):
        importlib.import_module("nested_optim.integrations.hf")


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"optimizer": "m3"}, "shape"),
        ({"optimizer": "dgd"}, "shape"),
        ({"rules": RULES}, "names"),
    ],
)
def test_deepspeed_is_refused_where_names_or_shapes_are_needed(kwargs, why, tmp_path):
    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match=f"(?s)DeepSpeed.*{why}.*FSDP2"):
        NestedFactory()(make_model(), args=args, **kwargs)
    assert NestedFactory()(make_model(), args=args) is not None


def test_trainers_find_no_train_or_eval_on_our_optimizers():
    for name in OPTIMIZERS:
        optimizer = NestedFactory()(make_model(), optimizer=name, lr=1e-3)
        assert not hasattr(optimizer, "train") and not hasattr(optimizer, "eval")


# ---------------------------------------------------------------------- the loss, the logs


class LossAware(NestedOptimizer):
    """Remembers each step's loss, and whether one was told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.told: list[float] = []
        self.pending: Tensor | None = None
        self.register_step_post_hook(lambda *_: self._use())

    def observe_loss(self, loss: Tensor | None) -> None:
        assert loss is None or self.pending is None, "the last step did not use its loss"
        self.pending = loss

    def _use(self) -> None:
        assert self.pending is not None, "a step without a loss"
        self.told.append(float(self.pending))
        self.pending = None

    def metrics(self) -> dict[str, float]:
        return {"lr_multiplier/body": 1.5, "told": self.told[-1]}


class LossAwareFactory:
    def __call__(self, model: Any, **kwargs: Any) -> Optimizer:
        return LossAware(model.parameters(), **kwargs)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("by_tokens", [True, False])
def test_the_optimizer_is_told_the_loss_of_the_whole_step(accumulate, by_tokens, tmp_path):
    # 8 batches: with 3 per step, the last step of an epoch has two.
    args = arguments(tmp_path, max_steps=7, gradient_accumulation_steps=accumulate)
    trainer = NestedTrainer(
        model=make_model(),
        args=args,
        train_dataset=samples(),
        optimizer_cls_and_kwargs=(LossAwareFactory, {"lr": 1e-3}),
    )
    trainer.model_accepts_loss_kwargs = by_tokens
    trainer.train()
    told = unwrap_optimizer(trainer.optimizer).told
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The Trainer logs the step's loss in its own way: with logging_steps=1 they are the same.
    assert told == pytest.approx(logged, abs=1e-5)
    assert len(told) == 7 and len(set(told)) == 7


def test_the_loss_of_a_skipped_step_is_withdrawn(tmp_path):
    withdrawn: list[int] = []

    class Skipping(NestedTrainer):
        """As under float16, where a GradScaler skips steps whose gradients overflow."""

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 1:
                self.optimizer.step = lambda: setattr(self.optimizer, "_is_overflow", True)
            elif self.state.global_step == 2:
                assert unwrap_optimizer(self.optimizer).pending is not None
                self.optimizer._is_overflow = False
                del self.optimizer.step
            return loss

        def get_batch_samples(self, *args: Any) -> Any:
            samples = super().get_batch_samples(*args)
            if self.optimizer.step_was_skipped:
                assert unwrap_optimizer(self.optimizer).pending is None
                withdrawn.append(self.state.global_step)
            return samples

    trainer = Skipping(
        model=make_model(),
        args=arguments(tmp_path),
        train_dataset=samples(),
        optimizer_cls_and_kwargs=(LossAwareFactory, {"lr": 1e-3}),
    )
    trainer.train()
    assert withdrawn == [2]
    logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    told = unwrap_optimizer(trainer.optimizer).told
    assert told == pytest.approx([logged[0], *logged[2:]], abs=1e-5)


def test_metrics_reach_log_history_and_every_sink(tmp_path):
    seen: list[dict[str, float]] = []

    class Sink(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    trainer = NestedTrainer(
        model=make_model(),
        args=arguments(tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=4),
        train_dataset=samples(),
        eval_dataset=samples(8),
        callbacks=[Sink()],
        optimizer_cls_and_kwargs=(LossAwareFactory, {"lr": 1e-3}),
    )
    trainer.train()
    for entries in (seen, trainer.state.log_history):
        training = [entry for entry in entries if "loss" in entry]
        assert len(training) == 2
        assert all(entry["nested/lr_multiplier_body"] == 1.5 for entry in training)
        assert all("nested/told" in entry for entry in training)
        others = [entry for entry in entries if "loss" not in entry]
        assert others and not any(key.startswith("nested/") for e in others for key in e)


def test_learning_rates_of_all_groups_are_logged(tmp_path):
    trainer = make_trainer(tmp_path, {"rules": RULES}, NestedTrainer)
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert len({entry["learning_rate"] for entry in entries}) == 4
    for entry in entries:
        # What the step was taken with: the schedule has moved on by then.
        assert entry["nested/lr_default"] == entry["learning_rate"]
        assert entry["nested/lr_rule1"] == entry["nested/lr_default"] / 2
    json.dumps(entries)  # as the Trainer's state file has it


def test_tensorboard_gets_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, {"rules": RULES}, NestedTrainer, report_to="tensorboard")
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    assert "train/nested/lr_embeddings" in events.Tags()["scalars"]


class OtherTrainer(Trainer):
    """A Trainer in the way of TRL's: its own arguments, loss, steps and logs."""

    def __init__(self, model: Any = None, args: Any = None, *, scale: float = 1.0, **kwargs: Any):
        super().__init__(model=model, args=args, **kwargs)
        self.scale, self.entropies = scale, []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.entropies.append(outputs["logits"].detach().softmax(-1).std().item())
        return (self.scale * loss, outputs) if return_outputs else self.scale * loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "entropy": sum(self.entropies)}, start_time)


class Combined(NestedTrainerMixin, OtherTrainer):
    pass


def test_the_mixin_works_before_trainers_that_override_loss_steps_and_logs(tmp_path):
    trainer = Combined(
        model=make_model(),
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        scale=3.0,
        train_dataset=samples(),
        optimizer_cls_and_kwargs=(LossAwareFactory, {"lr": 1e-3}),
    )
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert all({"entropy", "nested/told"} <= e.keys() for e in entries)
    told = unwrap_optimizer(trainer.optimizer).told
    assert told == pytest.approx([e["loss"] for e in entries], abs=1e-5)
    assert min(told) > 3  # three times the loss of a model that knows nothing, 2.8


def test_other_optimizers_train_under_the_mixin_as_without_it(tmp_path):
    runs = []
    for cls in (Trainer, NestedTrainer):
        trainer = cls(
            model=make_model(),
            args=arguments(tmp_path, optim="adamw_torch"),
            train_dataset=samples(),
        )
        trainer.train()
        runs.append((weights(trainer.model), [e.keys() for e in trainer.state.log_history]))
    assert difference(runs[0][0], runs[1][0]) == 0.0
    assert runs[0][1] == runs[1][1]
