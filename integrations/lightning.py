"""Callbacks for Lightning: what our optimizers need of a trainer, and slow weight copies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nested_optim import WeightMemory
from nested_optim.tensors import is_dtensor
from nested_optim.weight_memory import memory_of

from .batches import check_held_out, held_out_batch, of_first_rank, to_device
from .optimizers import logged_metrics, observe_loss, unwrap_optimizer
from .random_state import (
    of_all_ranks,
    of_this_rank,
    random_state,
    random_state_kept,
    set_random_state,
)

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ImportError(
        "this module needs Lightning: `pip install lightning` (or 'nested_optim[lightning]')"
    ) from error

_KEY = "nested_optim"


class NestedLightningCallback(pl.Callback):
    """Gives an optimizer what Lightning keeps from it, and makes resuming exact.

    - **The loss of each step**, for optimizers with a method ``observe_loss``: the mean over the
      accumulated micro-batches (as many as there were, unscaled under ``16-mixed``) and over the
      ranks. It arrives between the closure and the update. A loss whose step is skipped is
      withdrawn.
    - **Meta updates**, ``optimizer.meta_update(val_batch, train_batches, loss_fn)``, every
      ``every`` steps that were taken. They change nothing of what training draws at random.
    - **Metrics**: what ``optimizer.metrics()`` gives, in the trainer's loggers and in
      ``trainer.callback_metrics``, as ``nested/lr_multiplier_<group>`` and so on.
    - **Random numbers** in the checkpoint, so that a run resumed from ``ModelCheckpoint`` goes on
      bit for bit. Lightning saves none. At the end of an epoch any loader is resumed; in
      the middle of one it must have ``state_dict`` and ``load_state_dict``, as Lightning says.

    Call methods of an optimizer that Lightning does not know (``flush``, ``metrics``) on
    ``unwrap_optimizer(self.optimizers())``.

    Args:
        val_loader: held-out batches for meta updates; they are chosen by the step's number.
        every: steps between two meta updates. Default: none are made.
        loss_fn: ``loss_fn(model, batch)`` for meta updates. Default: the optimizer's ``loss_fn``.
        log_every: steps between two readings of the metrics, each of which waits for the device.
            Default: the trainer's ``log_every_n_steps``; 0 leaves them out.
        prefix: of the metrics' names. Default ``"nested"``.
        random_numbers: whether checkpoints hold the generators' states. Default True.

    Raises:
        TypeError, ValueError: ``every`` without a ``val_loader`` of some length, or (when fitting
            starts) without an optimizer that has ``meta_update``.
    """

    def __init__(
        self,
        val_loader: Any = None,
        *,
        every: int | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        log_every: int | None = None,
        prefix: str = "nested",
        random_numbers: bool = True,
    ) -> None:
        for name, value, least in (("every", every, 1), ("log_every", log_every, 0)):
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} is a number of steps >= {least}, but is {value!r}")
        if every is not None:
            if val_loader is None:
                raise ValueError("meta updates need held-out batches: give a val_loader")
            check_held_out(val_loader)
        self.val_loader, self.every, self.loss_fn = val_loader, every, loss_fn
        self.log_every, self.prefix, self.random_numbers = log_every, prefix, random_numbers
        self._recent: deque[Any] = deque(maxlen=1)
        self._handles: list[RemovableHandle] = []
        self._forget()
        self._restored: dict[str, Any] | None = None

    def _forget(self) -> None:
        self._losses: list[Tensor] = []  # of the micro-batches since the last step
        self._told: list[Optimizer] = []  # optimizers with a loss that no step has used
        self._stepped: list[Optimizer] = []  # in this batch

    # ------------------------------------------------------------------ a run

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers = [unwrap_optimizer(optimizer) for optimizer in trainer.optimizers]
        learning = [one for one in optimizers if hasattr(one, "meta_update")]
        if self.every is not None and not learning:
            names = ", ".join(type(one).__name__ for one in optimizers)
            raise TypeError(f"every={self.every}, but none of {names} has a method meta_update()")
        unrolled = [one.param_groups[0].get("k_unroll", 1) for one in learning]
        self._recent = deque(maxlen=max(unrolled, default=1))
        self._remove_hooks()
        self._handles = [one.register_step_post_hook(self._after_step) for one in optimizers]
        self._forget()
        if self._restored is not None:
            self._recent.extend(
                trainer.strategy.batch_to_device(batch) for batch in self._restored["recent"]
            )
            # What follows makes the loader's iterator, which draws the epoch's seed.
            self._restore_random_state(mid_epoch=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # In the middle of an epoch, the seed that was just drawn is one too many.
        self._restore_random_state(mid_epoch=True)
        self._restored = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._recent.clear()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped.append(optimizer)
        self._told = [one for one in self._told if one is not optimizer]

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        loss = loss.detach().clone()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.get_scale()
        # Lightning has divided it by as many batches as a step takes, however many come.
        self._losses.append(loss * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        losses, self._losses = self._losses, []
        if losses and observe_loss(optimizer, torch.stack(losses).mean(), required=False):
            self._told.append(unwrap_optimizer(optimizer))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        for optimizer in self._told:  # the scaler skipped its step
            observe_loss(optimizer, None)
        stepped, self._stepped, self._told = self._stepped, [], []
        if not stepped:
            return
        step = trainer.global_step
        if self.every is not None:
            self._recent.append(batch)
            if step % self.every == 0:
                for optimizer in stepped:
                    self._meta_update(trainer, optimizer, step)
        every = self.log_every
        if every is None:
            every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0:
            self._log(trainer, step)

    def _meta_update(self, trainer: pl.Trainer, optimizer: Any, step: int) -> None:
        if not hasattr(optimizer, "meta_update"):
            return
        batches = of_first_rank([held_out_batch(self.val_loader, step), *self._recent])
        moved = [trainer.strategy.batch_to_device(batch) for batch in batches]
        given = self.loss_fn or getattr(optimizer, "loss_fn", None)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            with trainer.precision_plugin.forward_context():
                return given(model, batch)  # type: ignore[misc]

        with torch.enable_grad(), random_state_kept(seed=step):
            optimizer.meta_update(moved[0], moved[1:], loss_fn if given is not None else None)

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        found: dict[str, float] = {}
        for i, optimizer in enumerate(trainer.optimizers):
            prefix = self.prefix if len(trainer.optimizers) == 1 else f"{self.prefix}/{i}"
            found.update(logged_metrics(optimizer, prefix))
        if not found:
            return
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in found.items()})
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hooks()

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        cpu = torch.device("cpu")
        checkpoint[_KEY] = {
            "recent": [to_device(batch, cpu) for batch in self._recent],
            "mid_epoch": not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch,
            "ranks": of_all_ranks(random_state()) if self.random_numbers else None,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._restored = checkpoint.get(_KEY)
        if self._restored is not None and not self._restored["mid_epoch"]:
            self._restored["recent"] = []

    def _restore_random_state(self, mid_epoch: bool) -> None:
        saved = self._restored if self.random_numbers else None
        if saved and saved["ranks"] is not None and saved["mid_epoch"] == mid_epoch:
            set_random_state(of_this_rank(saved["ranks"]))


class WeightMemoryLightningCallback(pl.Callback):
    """Attaches a :class:`~nested_optim.WeightMemory` to the module's optimizer.

    It is attached before a checkpoint is restored, so the copies, which lie in the optimizer's
    state, resume with it. ``callback.memory`` is the memory; after fitting, ``with
    callback.memory.read_out(level=-1): trainer.validate(module)`` evaluates a copy.

    Args:
        validate_from: what :meth:`~nested_optim.WeightMemory.read_out` takes as its ``level``: the
            validation that is part of fitting runs on these weights, and the live ones come back
            after it, before anything is saved. Default: it runs on the live weights.
        save_from: likewise; each checkpoint then holds the module's plain ``state_dict`` with these
            weights, beside the live ones, under ``save_as``. Default: none is saved.
        save_as: its key in the checkpoint. Default ``"read_out"``.
        optimizer: which of the module's optimizers, where it has several. Default 0.
        average_buffers: whether the module's floating-point buffers (BatchNorm's statistics) are
            averaged too. Default False.
        options: what :class:`~nested_optim.WeightMemory` takes: ``frequencies``, ``write``,
            ``pull``, ``dtype``, ``preset``, ``capturable``. Where a memory is attached already, as
            by ``memory=`` of our optimizers, give none.

    Raises:
        ValueError: when fitting starts, if there is no such optimizer, options are given for a
            memory that others have attached, or a read-out of sharded parameters was to be saved.
    """

    def __init__(
        self,
        *,
        validate_from: Any = None,
        save_from: Any = None,
        save_as: str = "read_out",
        optimizer: int = 0,
        average_buffers: bool = False,
        **options: Any,
    ) -> None:
        self.validate_from, self.optimizer = validate_from, optimizer
        self.save_from, self.save_as = save_from, save_as
        self.average_buffers, self.options = average_buffers, options
        self.memory: WeightMemory | None = None
        self._reading = ExitStack()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.optimizer >= len(trainer.optimizers):
            raise ValueError(
                f"optimizer={self.optimizer}, but the module has {len(trainer.optimizers)}"
            )
        optimizer = unwrap_optimizer(trainer.optimizers[self.optimizer])
        attached, own = memory_of(optimizer), self.memory
        given = [*self.options, *(["average_buffers"] if self.average_buffers else [])]
        if attached is not None and attached is not own and given:
            raise ValueError(
                f"the optimizer has a WeightMemory already, which {', '.join(given)} would not "
                "change: leave these out, or attach none where the optimizer is made"
            )
        if self.save_from is not None and any(map(is_dtensor, pl_module.parameters())):
            raise ValueError(
                "the module's parameters are sharded, so no rank has a whole read-out to save: "
                "leave out save_from"
            )
        self.memory = attached
        if self.memory is None:
            buffers_from = pl_module if self.average_buffers else None
            self.memory = WeightMemory(optimizer, buffers_from=buffers_from, **self.options)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self.validate_from is not None and self.memory is not None and fitting:
            self._reading.enter_context(self.memory.read_out(self.validate_from))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reading.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._reading.close()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.save_from is not None and self.memory is not None:
            checkpoint[self.save_as] = self.memory.model_state_dict(pl_module, self.save_from)
