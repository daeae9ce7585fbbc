"""``fit``: a plain training loop, short enough to read and to copy."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .batches import check_held_out, held_out_batch, of_first_rank, to_device
from .optimizers import mean_over_ranks, observe_loss, unwrap_optimizer
from .random_state import (
    is_first_rank,
    of_all_ranks,
    of_this_rank,
    random_state,
    random_state_kept,
    set_random_state,
)

__all__ = ["Checkpoint", "Run", "fit", "observe_loss", "unwrap_optimizer"]

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Checkpoint:
    """Where :func:`fit` keeps a run, and after how many steps; the end of an epoch always counts.

    Args:
        path: the file, replaced as a whole by each save.
        every: optimizer steps between two saves. Default: at the ends of epochs only.
    """

    path: str | Path
    every: int | None = None


@dataclass
class Run:
    """Where a run stands; what :func:`fit` returns and hands to callbacks."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any = None
    step: int = 0  #: optimizer steps so far, those that ``GradScaler`` skipped among them
    epoch: int = 0  #: epochs finished
    position: int = 0  #: steps so far in the running epoch
    event: str = ""  #: what a callback is called after: "step" or "epoch"
    loss: Tensor | None = None  #: of the last step on this rank, 0-d, a mean over micro-batches
    val_loss: float | None = None  #: of the last validation
    skipped: bool = False  #: whether ``GradScaler`` skipped the last step
    stop: bool = False  #: a callback sets it to end the run
    _epoch_start: dict[str, Any] | None = field(default=None, repr=False)


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    optimizer: Optimizer,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    scheduler: Any = None,
    epochs: int | None = None,
    steps: int | None = None,
    accumulate: int = 1,
    amp: str | None = None,
    clip: float | None = None,
    val_loader: Any = None,
    meta_every: int | None = None,
    callbacks: Iterable[Callable[[Run], Any]] = (),
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
) -> Run:
    """Train a model, as the loop that one would write by hand does, to the last bit.

    Per optimizer step ``accumulate`` batches are taken, and the mean of their losses is descended.
    The last step of an epoch takes what is left, and divides by how many batches that is. An
    optimizer that has a method ``observe_loss`` is told each step's loss
    (:func:`~nested_optim.integrations.optimizers.observe_loss`).

    Args:
        model: on its device, in the mode to train it in; a ``DistributedDataParallel`` too.
        loader: gives an epoch's batches each time it is iterated over. Tensors are moved to the
            device of the model's first parameter. A sampler with ``set_epoch`` is told the epoch.
        optimizer: any ``torch.optim.Optimizer`` over the model's parameters.
        loss_fn: ``loss_fn(model, batch)``, the mean loss over the batch, a tensor of one element.
        scheduler: stepped after every step that was not skipped; a ``ReduceLROnPlateau`` after
            every epoch, with the validation loss.
        epochs, steps: when the run ends, in passes over the loader or in optimizer steps. Exactly
            one of them.
        accumulate: batches per optimizer step. Default 1.
        amp: ``"bf16"`` or ``"fp16"``: autocast, the latter with a ``GradScaler``. Default: none.
        clip: the largest norm of all gradients together. Default: gradients are not clipped.
        val_loader: batches of held-out data. The mean of their losses is taken after each epoch, in
            eval mode and without changing what training draws at random.
        meta_every: steps between two calls of ``optimizer.meta_update(val_batch, train_batches,
            loss_fn)``, for optimizers that have it. Held-out batches are chosen by the step's
            number; the training batches are the last of each of this epoch's last ``k_unroll``
            steps (of rank 0 on every rank), or as many as there are. Needs ``val_loader``.
        callbacks: each is called with the :class:`Run` after every step and every epoch.
        checkpoint: a path, or a :class:`Checkpoint`. A file that is there is resumed from, so the
            same call starts a run and goes on with it: model, optimizer, scheduler, scaler, random
            numbers and the position in the epoch, whose batches so far are loaded and passed over.
            The run then ends as if it had never stopped, bit for bit, if the batches depend on
            torch's, Python's and NumPy's generators only.
        progress: show a bar (on rank 0); needs tqdm.

    Returns:
        The :class:`Run`. ``run.model`` and ``run.optimizer`` are what was given.

    Raises:
        TypeError, ValueError: arguments that do not go together. Nothing has changed.
        ValueError: the checkpoint is of another run (micro-batches per step, ranks, shapes), or
            the loader gives no batch.

    Example::

        >>> run = fit(model, loader, optimizer, loss_fn, epochs=3, checkpoint="run.pt")
    """
    _check(
        model, optimizer, scheduler, epochs, steps, accumulate, amp, clip, val_loader, meta_every
    )
    place = Checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    if place is not None:
        _check_place(place, model)
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type) if amp == "fp16" else None
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    run = Run(model, optimizer, scheduler)
    recent: deque[Any] = deque(maxlen=optimizer.param_groups[0].get("k_unroll", 1))
    batches = _resume(run, place, scaler, loader, accumulate, recent) if place else None
    bar = _bar(run, loader, epochs, steps, accumulate) if progress else None

    def compute_loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(device.type, _AMP[amp]) if amp else nullcontext():
            return loss_fn(model, to_device(batch, device))

    def done() -> bool:
        return run.stop or (run.step >= steps if steps is not None else run.epoch >= (epochs or 0))

    while not done():
        for group in batches or _epoch(run, loader, accumulate):
            losses = []
            for i, batch in enumerate(group):
                with _without_sync(model, i + 1 < len(group)):
                    loss = compute_loss(model, batch) / len(group)
                    (scaler.scale(loss) if scaler else loss).backward()
                losses.append(loss.detach())
            run.loss = torch.stack(losses).sum()
            observe_loss(optimizer, run.loss, required=False)

            if scaler and clip is not None:
                scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(_params(optimizer), clip)
            if scaler:
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                run.skipped = scaler.get_scale() < scale
            else:
                optimizer.step()
            if run.skipped:
                observe_loss(optimizer, None, required=False)
            elif scheduler is not None and not plateau:
                scheduler.step()
            optimizer.zero_grad()

            run.step, run.position = run.step + 1, run.position + 1
            recent.append(group[-1])
            if meta_every and run.step % meta_every == 0 and not run.skipped:
                _meta_update(optimizer, val_loader, run.step, recent, compute_loss, device)
            _report(run, "step", callbacks, bar)
            if place and place.every and run.step % place.every == 0:
                _save(run, place, scaler, loader, accumulate)
            if done():
                break
        else:
            batches, run._epoch_start = None, None
            run.epoch, run.position = run.epoch + 1, 0
            recent.clear()
            if val_loader is not None:
                run.val_loss = _validate(model, val_loader, compute_loss)
            if plateau:
                scheduler.step(run.val_loss)
            _report(run, "epoch", callbacks, bar)
            if place:
                _save(run, place, scaler, loader, accumulate)

    if run.position:  # the run ends inside an epoch
        if val_loader is not None:
            run.val_loss = _validate(model, val_loader, compute_loss)
        if place:
            _save(run, place, scaler, loader, accumulate)
    if bar is not None:
        bar.close()
    return run


# ---------------------------------------------------------------------- batches, losses, reports


def _check(
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    epochs: int | None,
    steps: int | None,
    accumulate: int,
    amp: str | None,
    clip: float | None,
    val_loader: Any,
    meta_every: int | None,
) -> None:
    if unwrap_optimizer(optimizer) is not optimizer:
        raise TypeError(
            f"fit takes the optimizer itself, but got a {type(optimizer).__name__}, whose library "
            "has a loop of its own: pass unwrap_optimizer(optimizer) and an unprepared model"
        )
    if (epochs is None) == (steps is None):
        raise TypeError("give either epochs= or steps=")
    counts = {"epochs": epochs, "steps": steps, "accumulate": accumulate, "meta_every": meta_every}
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is a number of them, an integer >= 1, but is {value!r}")
    if amp is not None and amp not in _AMP:
        raise ValueError(f"amp is None, 'bf16' or 'fp16', but is {amp!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is a norm above 0, or None, but is {clip!r}")
    if next(iter(model.parameters()), None) is None:
        raise ValueError("the model has no parameters")
    if isinstance(scheduler, ReduceLROnPlateau) and val_loader is None:
        raise ValueError("ReduceLROnPlateau looks at the validation loss: give a val_loader")
    if meta_every is not None:
        if not hasattr(optimizer, "meta_update"):
            raise TypeError(
                f"meta_every is for optimizers that have a method meta_update(), which "
                f"{type(optimizer).__name__} does not"
            )
        if val_loader is None:
            raise ValueError("meta updates need held-out batches: give a val_loader")
        check_held_out(val_loader)


def _epoch(run: Run, loader: Any, accumulate: int) -> Iterator[list[Any]]:
    """An epoch's micro-batches, as many at a time as a step takes."""
    set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(run.epoch)
    run._epoch_start = _random_states(loader)
    batches = iter(loader)  # draws the epoch's seed
    group = list(islice(batches, accumulate))
    if not group:
        raise ValueError(
            "the loader gave no batch: it is empty, or an iterator that is used up (fit needs one "
            "that starts anew for each epoch)"
        )
    while group:
        yield group
        group = list(islice(batches, accumulate))


def _without_sync(model: nn.Module, more: bool) -> AbstractContextManager[Any]:
    """Reduce gradients over ranks in the last backward pass of a step only."""
    if more and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _meta_update(
    optimizer: Any,
    val_loader: Any,
    step: int,
    recent: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    device: torch.device,
) -> None:
    """A meta update that every rank computes alike, and that training's random numbers survive."""
    batches = of_first_rank([held_out_batch(val_loader, step), *recent])
    val_batch, *train_batches = [to_device(batch, device) for batch in batches]
    with random_state_kept(seed=step):
        optimizer.meta_update(val_batch, train_batches, loss_fn)


def _validate(
    model: nn.Module, loader: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor]
) -> float:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), random_state_kept():
            losses = [loss_fn(model, batch).detach().float() for batch in loader]
    finally:
        for module, training in modes.items():
            module.training = training
    if not losses:
        raise ValueError("val_loader gave no batch")
    mean = torch.stack(losses).mean()
    return float(mean_over_ranks(mean, mean.device))


def _report(run: Run, event: str, callbacks: Iterable[Callable[[Run], Any]], bar: Any) -> None:
    run.event = event
    for callback in callbacks:
        callback(run)
    # The loss is read, which waits for the device, only when the bar is drawn.
    if event == "step" and bar is not None and bar.update():
        loss = f"{float(run.loss):.4g}" if run.loss is not None else "-"
        bar.set_postfix(epoch=run.epoch, loss=loss, refresh=False)


def _bar(run: Run, loader: Any, epochs: int | None, steps: int | None, accumulate: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "fit draws its progress with tqdm: `pip install tqdm`, or pass progress=False"
        ) from error
    total = steps
    if epochs is not None and hasattr(loader, "__len__"):
        total = epochs * ceil(len(loader) / accumulate)
    return tqdm(total=total, initial=run.step, unit="step", disable=not is_first_rank())


# ---------------------------------------------------------------------- checkpoints


def _check_place(place: Checkpoint, model: nn.Module) -> None:
    every = place.every
    if every is not None and (type(every) is not int or every < 1):
        raise ValueError(f"Checkpoint(every=) is a number of steps, but is {every!r}")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise RuntimeError(
            "the model is sharded (its parameters are DTensors), and fit writes one file from rank "
            "0: leave checkpoint= out and save with torch.distributed.checkpoint in a callback"
        )


def _save(run: Run, place: Checkpoint, scaler: Any, loader: Any, accumulate: int) -> None:
    saved = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict() if run.scheduler is not None else None,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "progress": {"step": run.step, "epoch": run.epoch, "position": run.position},
        "accumulate": accumulate,
        "val_loss": run.val_loss,
        "ranks": of_all_ranks({"now": _random_states(loader), "epoch_start": run._epoch_start}),
    }
    if is_first_rank():
        path = Path(place.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        torch.save(saved, unfinished)
        os.replace(unfinished, path)


def _resume(
    run: Run, place: Checkpoint, scaler: Any, loader: Any, accumulate: int, recent: deque[Any]
) -> Iterator[list[Any]] | None:
    """Load the checkpoint, if there is one; the rest of the epoch in which it was written."""
    if not Path(place.path).exists():
        return None
    saved = torch.load(place.path, map_location="cpu", weights_only=True)
    if saved["accumulate"] != accumulate:
        raise ValueError(
            f"{place.path} counts steps of {saved['accumulate']} batches, and this run has "
            f"accumulate={accumulate}"
        )
    for name, part in (("scheduler", run.scheduler), ("scaler", scaler)):
        if (saved[name] is None) != (part is None):
            there, here = ("without", "one") if saved[name] is None else ("with", "none")
            raise ValueError(f"{place.path} was written {there} a {name}, and this run has {here}")
    own = of_this_rank(saved["ranks"])

    run.optimizer.load_state_dict(saved["optimizer"])
    run.model.load_state_dict(saved["model"])
    if scaler is not None:
        scaler.load_state_dict(saved["scaler"])
    if run.scheduler is not None:
        run.scheduler.load_state_dict(saved["scheduler"])
    run.step, run.epoch, run.position = (
        saved["progress"][k] for k in ("step", "epoch", "position")
    )
    run.val_loss = saved["val_loss"]
    if not run.position:
        _set_random_states(loader, own["now"])
        return None

    # Draw the epoch anew from its start, pass over what has been trained on, and go on from there.
    _set_random_states(loader, own["epoch_start"])
    batches = _epoch(run, loader, accumulate)
    for _ in range(run.position):
        group = next(batches, None)
        if group is None:
            raise ValueError(
                f"{place.path} is {run.position} steps into an epoch, and the loader has fewer: "
                "it is not the loader of that run"
            )
        recent.append(group[-1])
    set_random_state(own["now"]["random"])
    return batches


def _random_states(loader: Any) -> dict[str, Any]:
    own = [generator.get_state() for generator in _generators(loader)]
    return {"random": random_state(), "loader": own}


def _set_random_states(loader: Any, states: dict[str, Any]) -> None:
    generators = _generators(loader)
    if len(generators) != len(states["loader"]):
        raise ValueError(
            f"the checkpoint's loader has {len(states['loader'])} generators of its own, and this "
            f"one {len(generators)}: it is not the loader of that run"
        )
    set_random_state(states["random"])
    for generator, state in zip(generators, states["loader"]):
        generator.set_state(state)


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators of its own that a ``DataLoader`` draws from."""
    samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    samplers.append(getattr(samplers[1], "sampler", None))
    found = [getattr(one, "generator", None) for one in (loader, *samplers)]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())
