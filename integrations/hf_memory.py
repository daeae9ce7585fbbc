"""Hugging Face's Trainer: evaluating and saving the slow weights of a ``WeightMemory``.

::

    trainer = NestedTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=held_out,
        optimizer_cls_and_kwargs=(NestedFactory, {"memory": (10, 50)}),
        callbacks=[WeightMemoryCallback(level=-1)],
    )
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nested_optim import WeightMemory
from nested_optim.tensors import is_dtensor
from nested_optim.weight_memory import memory_of

from .optimizers import unwrap_optimizer

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "this module needs transformers and Accelerate: pip install 'nested_optim[hf]'"
    ) from error


class WeightMemoryCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluates on a read-out of the optimizer's weight memory, and saves it beside checkpoints.

    The memory itself belongs to the optimizer, so that it is there when a checkpoint is loaded:
    ``NestedFactory`` takes ``memory=``; attach one to any other optimizer where it is made.

    Args:
        level: what :meth:`~nested_optim.WeightMemory.read_out` takes: -1 for the slowest copy,
            ``"mean"``, or a mixture. Default: the memory's own choice.
        evaluate: ``evaluate()`` and ``predict()`` of a :class:`~.hf.NestedTrainer` (or of a Trainer
            with its mixin) run on the read-out. The live weights come back before anything is
            saved; a best checkpoint, chosen by what was evaluated, holds live weights.
        save_as: folder within each checkpoint for a plain model of the read-out, as
            ``save_pretrained`` writes it (a state_dict in ``pytorch_model.bin`` for other models).
            None saves none. Trials of a hyper-parameter search save none either.

    Raises:
        ValueError: when training begins, if the optimizer has no memory, the Trainer cannot
            evaluate on a read-out, or parameters are sharded and a read-out was to be saved.
    """

    def __init__(
        self,
        level: int | str | Sequence[float] | None = None,
        *,
        evaluate: bool = True,
        save_as: str | None = "read_out",
    ) -> None:
        self.level, self.evaluate, self.save_as = level, evaluate, save_as
        self._trainer: Any = None  # one with the mixin says who it is

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if _memory(kwargs["optimizer"]) is None:
            raise ValueError(
                "the optimizer has no WeightMemory: give NestedFactory memory=(10, 50), or attach "
                "one where the optimizer is made, so that it is there when a checkpoint is loaded"
            )
        if self.evaluate and self._trainer is None:
            raise ValueError(
                "a plain Trainer cannot evaluate on a read-out: use NestedTrainer or its mixin, or "
                "WeightMemoryCallback(evaluate=False)"
            )
        if self.save_as is not None and any(map(is_dtensor, kwargs["model"].parameters())):
            raise ValueError(
                "the model's parameters are sharded, so no rank has a whole read-out to save: give "
                "WeightMemoryCallback save_as=None"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        memory = _memory(kwargs["optimizer"])
        if self.save_as is None or memory is None or state.is_hyper_param_search:
            return
        if not state.is_world_process_zero:
            return
        model: nn.Module = kwargs["model"]
        weights = memory.model_state_dict(model, self.level)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.save_as
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        else:
            torch.save(weights, folder / "pytorch_model.bin")

    def read_out(self, optimizer: Any) -> AbstractContextManager[Any]:
        """The context in which the model holds the weights to be evaluated."""
        memory = _memory(optimizer) if self.evaluate and optimizer is not None else None
        return nullcontext() if memory is None else memory.read_out(self.level)


def _memory(optimizer: Any) -> WeightMemory | None:
    return memory_of(unwrap_optimizer(optimizer))
