"""Hugging Face's Trainer: our optimizers in it, meta updates, the loss of a step, metrics.

::

    trainer = NestedTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        optimizer_cls_and_kwargs=(
            NestedFactory,
            {"optimizer": "nested", "rules": [{"match": "embed", "frequency": 10}]},
        ),
    )

:class:`NestedFactory` alone works in any Trainer. :class:`NestedTrainer`, or
:class:`NestedTrainerMixin` before a Trainer of another kind, also tells the optimizer each step's
loss, and brings its metrics to everything that the Trainer logs to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from .batches import held_out_batch, to_device
from .build import build_optimizer, refuse_flattened
from .hf_memory import WeightMemoryCallback
from .optimizers import logged_metrics, observe_loss, unwrap_optimizer
from .random_state import random_state_kept

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "this module needs transformers and Accelerate: pip install 'nested_optim[hf]'"
    ) from error

__all__ = [
    "NestedCallback",
    "NestedFactory",
    "NestedTrainer",
    "NestedTrainerMixin",
    "WeightMemoryCallback",
]

#: Those whose betas and eps are AdamW's, which TrainingArguments have too.
_ADAM = ("nested", "deep_nested", "adam", "adamw")


class NestedFactory:
    """Builds an optimizer for the Trainer, from the model that the Trainer is about to train.

    Pass the class: ``Trainer(optimizer_cls_and_kwargs=(NestedFactory, {...}))``. The dict holds
    what :func:`~nested_optim.integrations.build.build_optimizer` takes, all of it optional:

    - ``optimizer``: ``"nested"`` (default), ``"m3"``, ``"muon"``, ``"dgd"``, ``"delta"``,
      ``"deep_momentum"``, ``"deep_nested"``, ``"adam"``, ``"adamw"``;
    - ``rules``: of :func:`~nested_optim.build_param_groups`; ``no_decay_1d`` (default: True);
    - ``lr`` and ``weight_decay``: by default ``learning_rate`` and ``weight_decay`` of the
      Trainer's TrainingArguments as they are when training begins, so that a search over these
      works. Of optimizers with AdamW's moments also ``betas`` and ``eps``;
    - ``args``: TrainingArguments to take these from, where no Trainer calls;
    - any option of the optimizer.

    The dict is not changed. With ``model_init`` or in a search every model gets an optimizer of its
    own.

    Raises:
        TypeError: an instance was passed instead of the class.
        ValueError: an unknown name or option; an option given here that the running search also
            varies; no learning rate; DeepSpeed, where the optimizer or the rules need parameters'
            names or shapes.
    """

    def __call__(self, model: nn.Module | None = None, **kwargs: Any) -> Optimizer:
        if model is None:  # the Trainer calls what it is given once more
            raise TypeError(
                "pass the class, optimizer_cls_and_kwargs=(NestedFactory, {...}), and no instance"
            )
        options = dict(kwargs)
        name = options.pop("optimizer", "nested")
        args = options.pop("args", None)
        trainer = _calling_trainer()
        if args is None and trainer is not None:
            args = trainer.args
        if args is not None:
            if _uses_deepspeed(args, trainer):
                refuse_flattened(name, options.get("rules"), "DeepSpeed")
            searched = _searched(trainer)
            for key, arguments in _from_arguments(name).items():
                values = tuple(getattr(args, argument) for argument in arguments)
                if options.get(key) is None:
                    options[key] = values if len(values) > 1 else values[0]
                elif both := searched.intersection(arguments):
                    raise ValueError(
                        f"the search varies {' and '.join(sorted(both))}, but NestedFactory's "
                        f"{key}={options[key]} goes before it: leave {key} out"
                    )
        if options.get("lr") is None:
            raise ValueError(
                "no learning rate: NestedFactory was not called by a Trainer, so give lr=, or "
                "args=TrainingArguments(...)"
            )
        return build_optimizer(model, name, **options)


def _from_arguments(name: str) -> dict[str, tuple[str, ...]]:
    """Options of this optimizer that TrainingArguments have, with their names there."""
    found: dict[str, tuple[str, ...]] = {
        "lr": ("learning_rate",),
        "weight_decay": ("weight_decay",),
    }
    if name in _ADAM:
        found |= {"betas": ("adam_beta1", "adam_beta2"), "eps": ("adam_epsilon",)}
    return found


def _calling_trainer() -> Trainer | None:
    """The Trainer that is making its optimizer. It tells a factory nothing but the model."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _uses_deepspeed(args: Any, trainer: Trainer | None) -> bool:
    if trainer is not None and getattr(trainer, "is_deepspeed_enabled", False):
        return True
    return bool(getattr(args, "deepspeed", None) or getattr(args, "hf_deepspeed_config", None))


def _searched(trainer: Trainer | None) -> set[str]:
    """The arguments that a running hyper-parameter search varies."""
    trial = getattr(trainer, "_trial", None)
    if trial is None or getattr(trainer, "hp_search_backend", None) is None:
        return set()
    return set(trial if isinstance(trial, Mapping) else getattr(trial, "params", {}))


class NestedCallback(TrainerCallback):  # type: ignore[misc]
    """Calls ``optimizer.meta_update`` between steps, for optimizers that have it.

    The held-out batch, and the training batches of the unroll, are drawn at random from their
    datasets, by ``seed`` and the number of the step alone: so a resumed run sees the batches that
    it would have seen, all ranks see the same, and the training run's own random numbers stay as
    they are. With ``meta_lr=0`` training is, to the last bit, what it is without this callback.

    Args:
        val_dataset: map-style, of samples like the training set's. Default: the ``eval_dataset`` of
            the :class:`NestedTrainer` (or of :class:`NestedTrainerMixin`) that this runs in; other
            Trainers do not show theirs to callbacks.
        every: optimizer steps between two meta updates. Default: the optimizer's
            ``meta_update_freq``, or 100.
        batch_size: samples per batch. Default: ``per_device_train_batch_size``.
        loss_fn: ``loss_fn(model, batch)``. Default: ``compute_loss`` of the ``NestedTrainer``;
            elsewhere the optimizer's own, or the ``loss`` in the model's output.
        seed: of the choice of batches, and of dropout within the unroll.

    Raises:
        TypeError: when training begins: the optimizer has no ``meta_update``; a dataset that cannot
            be indexed.
        ValueError: when training begins: no held-out data.
    """

    def __init__(
        self,
        val_dataset: Any = None,
        every: int | None = None,
        *,
        batch_size: int | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("every", every), ("batch_size", batch_size)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is a number of them, an integer >= 1, but is {value!r}")
        self.val_dataset, self.every, self.batch_size = val_dataset, every, batch_size
        self.loss_fn, self.seed = loss_fn, seed
        self._trainer: Any = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check that meta updates can be made."""
        base: Any = unwrap_optimizer(optimizer)
        if not hasattr(base, "meta_update"):
            raise TypeError(
                f"{type(base).__name__} has no method meta_update(): NestedCallback is for "
                "{'optimizer': 'deep_nested', 'mode': 'explicit'}"
            )
        if base.param_groups[0].get("mode") == "simple":
            raise TypeError(
                "NestedCallback calls meta_update(), which is for mode='explicit'; an optimizer in "
                "mode='simple' learns in its steps: leave the callback out, or change the mode"
            )
        held_out = self._held_out()
        if held_out is None:
            raise ValueError(
                "NestedCallback needs held-out data: give it val_dataset=, or use NestedTrainer "
                "with one eval_dataset"
            )
        for name, dataset in (
            ("val_dataset", held_out),
            ("the training set", _data(train_dataloader)),
        ):
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
                raise TypeError(
                    f"meta updates choose samples by number, which {name}, a "
                    f"{type(dataset).__name__}, does not allow: give a map-style dataset"
                )
            if not len(dataset):
                raise ValueError(f"{name} is empty")

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make a meta update, if it is due and the step was not skipped."""
        base: Any = unwrap_optimizer(optimizer)
        first = base.param_groups[0]
        every = self.every or first.get("meta_update_freq", 100)
        if state.global_step % every or getattr(optimizer, "step_was_skipped", False):
            return
        size = self.batch_size or args.per_device_train_batch_size
        collate = train_dataloader.collate_fn
        training = _data(train_dataloader)
        unrolled = first.get("k_unroll", 1)
        at = state.global_step * unrolled
        with random_state_kept(seed=self.seed + state.global_step):
            known = DataLoader(training, batch_size=size, collate_fn=collate)
            like = _Collate(collate, _keys(training[0]))
            held_out = DataLoader(self._held_out(), batch_size=size, collate_fn=like)
            train_batches = [held_out_batch(known, at + i, self.seed) for i in range(unrolled)]
            val_batch = held_out_batch(held_out, state.global_step, self.seed + 1)
            val_batch, *train_batches = (
                to_device(_plain(batch), args.device) for batch in (val_batch, *train_batches)
            )
            base.meta_update(val_batch, train_batches, self._loss_fn())

    def _held_out(self) -> Any:
        if self.val_dataset is not None or self._trainer is None:
            return self.val_dataset
        found = self._trainer.eval_dataset
        return None if isinstance(found, Mapping) else found

    def _loss_fn(self) -> Callable[[nn.Module, Any], Tensor] | None:
        if self.loss_fn is not None or self._trainer is None:
            return self.loss_fn
        trainer = self._trainer

        def compute_loss(model: nn.Module, batch: Any) -> Tensor:
            with trainer.compute_loss_context_manager():
                loss: Tensor = trainer.compute_loss(model, dict(batch))
            return loss

        return compute_loss


class _Collate:
    """A collator that sees of held-out samples what training samples have."""

    def __init__(self, collate: Callable[[Any], Any], keys: Sequence[str] | None) -> None:
        self.collate, self.keys = collate, keys

    def __call__(self, samples: list[Any]) -> Any:
        if self.keys is not None:
            samples = [{k: s[k] for k in self.keys if k in s} for s in samples]
        return self.collate(samples)


def _keys(sample: Any) -> list[str] | None:
    return list(sample) if isinstance(sample, Mapping) else None


def _data(loader: Any) -> Any:
    return getattr(loader, "dataset", None)


def _plain(batch: Any) -> Any:
    """A collator's mapping (``BatchEncoding`` and the like) as a dict."""
    return dict(batch) if isinstance(batch, Mapping) or hasattr(batch, "keys") else batch


class NestedTrainerMixin:
    """What a Trainer must do for optimizers that learn from the loss, and for their metrics.

    Put it before the Trainer: ``class MyTrainer(NestedTrainerMixin, SFTTrainer): ...``. Then

    - an optimizer with a method ``observe_loss`` is told, before each of its steps, the loss of
      that whole step: over the accumulated batches, as the Trainer weights them, and over ranks;
    - logs of the training loss also hold the optimizer's ``metrics()`` as ``nested/...``, and the
      learning rate of each named group as ``nested/lr_<name>``;
    - a :class:`NestedCallback` may use this Trainer's ``eval_dataset`` and ``compute_loss``;
    - a :class:`~.hf_memory.WeightMemoryCallback` may have it evaluate on slow weights.

    With any other optimizer the Trainer is as it was, but for the learning rates.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        for callback in self.callback_handler.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (NestedCallback, WeightMemoryCallback)):
                callback._trainer = self
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._read_out():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._read_out():
            return super().predict(*args, **kwargs)  # type: ignore[misc]

    def _read_out(self) -> AbstractContextManager[Any]:
        for callback in self.callback_handler.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightMemoryCallback):
                return callback.read_out(getattr(self, "optimizer", None))
        return nullcontext()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._step_losses: list[Tensor] = []  # the batches of a new step
        optimizer = self.optimizer  # type: ignore[attr-defined]
        if getattr(optimizer, "step_was_skipped", False):
            observe_loss(optimizer, None, required=False)  # which no step has used
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        # Each is its batch's share of the step's loss already.
        losses = self._step_losses = [*self.__dict__.get("_step_losses", ()), loss.detach()]
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            self._step_losses = []
            # Before the scheduler moves them, like the rate that the Trainer logs.
            self._step_rates = _learning_rates(self.optimizer)  # type: ignore[attr-defined]
            total = torch.stack([one.reshape(()) for one in losses]).sum()
            observe_loss(self.optimizer, total, required=False)  # type: ignore[attr-defined]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        optimizer = getattr(self, "optimizer", None)
        if "loss" in logs and optimizer is not None:
            rates = {k: float(v) for k, v in self.__dict__.get("_step_rates", {}).items()}
            logs = {**logs, **rates, **logged_metrics(optimizer)}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _learning_rates(optimizer: Any) -> dict[str, Any]:
    """Of each named group, as they are now; the Trainer itself logs the first group's only."""
    groups = unwrap_optimizer(optimizer).param_groups
    rates = {f"nested/lr_{g['name']}": g["lr"] for g in groups if g.get("name")}
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in rates.items()}


class NestedTrainer(NestedTrainerMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with :class:`NestedTrainerMixin`."""
