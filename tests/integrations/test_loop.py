"""``fit`` is the loop one would write by hand, to the last bit, and so is a resumed run."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset

from nested_optim import DeepNestedOptimizer, NestedOptimizer
from nested_optim.integrations.loop import Checkpoint, Run, fit

from .tiny import LossAware, Net, Noisy, held_out, largest_difference, levels, loader, loss_fn


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def _nested(model: nn.Module) -> NestedOptimizer:
    return NestedOptimizer(levels(model), lr=1e-2)


def _loss_aware(model: nn.Module) -> LossAware:
    return LossAware(levels(model), model=model)


def _train_by_hand(
    model: nn.Module, optimizer: Any, scheduler: Any, *, accumulate: int, clip: float, amp: str
) -> None:
    """Two epochs of the loop that a user would have written."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    scaler = torch.amp.GradScaler("cpu", enabled=amp == "fp16")
    for _ in range(2):
        batches = list(loader(22))
        for start in range(0, len(batches), accumulate):
            group = batches[start : start + accumulate]
            for batch in group:
                with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    loss = loss_fn(model, batch)
                scaler.scale(loss / len(group)).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:  # not skipped
                scheduler.step()
            optimizer.zero_grad()


class Quiet(Net):
    """Draws no random numbers of its own, so that batches may be loaded before they are needed."""

    def __init__(self) -> None:
        super().__init__()
        self.body[3] = nn.Identity()


@pytest.mark.parametrize("make", [_adamw, _nested])
@pytest.mark.parametrize(
    "accumulate, clip, amp",
    [(1, 0.0, ""), (4, 0.0, ""), (1, 0.3, ""), (4, 0.3, "bf16"), (4, 0.3, "fp16"), (1, 0, "fp16")],
)
def test_fit_is_the_loop_written_by_hand(
    make: Callable[[nn.Module], Any], accumulate: int, clip: float, amp: str
) -> None:
    models = []
    for by_hand in (True, False):
        torch.manual_seed(5)
        model = Quiet()
        optimizer = make(model)
        scheduler = OneCycleLR(optimizer, 0.1, total_steps=20)
        if by_hand:
            _train_by_hand(model, optimizer, scheduler, accumulate=accumulate, clip=clip, amp=amp)
        else:
            run = fit(
                model,
                loader(22),
                optimizer,
                loss_fn,
                scheduler=scheduler,
                epochs=2,
                accumulate=accumulate,
                clip=clip or None,
                amp=amp or None,
                progress=False,
            )
            assert (run.epoch, run.step) == (2, 2 * (6 if accumulate == 1 else 2))
        models.append(model)
    assert largest_difference(*models) == 0.0
    assert largest_difference(models[0], Quiet()) > 1e-3


def test_fit_draws_random_numbers_as_a_plain_loop_does() -> None:
    """With dropout and augmentation, batch by batch."""
    torch.manual_seed(5)
    expected = Net()
    optimizer = _nested(expected)
    for _ in range(2):
        for batch in loader():
            optimizer.zero_grad()
            loss_fn(expected, batch).backward()
            optimizer.step()
    after = torch.rand(1)
    torch.manual_seed(5)
    model = Net()
    fit(model, loader(), _nested(model), loss_fn, epochs=2, progress=False)
    assert largest_difference(model, expected) == 0.0
    assert torch.equal(torch.rand(1), after)


def test_the_last_step_of_an_epoch_divides_by_the_batches_it_has() -> None:
    """Of three batches two by two, the second step is the third batch's alone."""
    batches = [(torch.full((1, 1), float(x)), torch.zeros(1, 1)) for x in (1, 2, 3)]
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    losses = []
    fit(
        model,
        batches,
        torch.optim.SGD(model.parameters(), lr=0.01),
        loss_fn,
        epochs=1,
        accumulate=2,
        callbacks=[lambda run: losses.append(float(run.loss))],
        progress=False,
    )
    # d/dw of (w x)^2 is 2 w x^2
    w = 1 - 0.01 * (2 * 1 + 2 * 4) / 2
    assert losses[:2] == pytest.approx([(1 + 4) / 2, (3 * w) ** 2], rel=1e-6)
    assert model.weight.item() == pytest.approx(w - 0.01 * 2 * w * 9, rel=1e-6)


class Killed(Exception):
    pass


def _kill_at(step: int) -> Callable[[Run], None]:
    def callback(run: Run) -> None:
        if run.step == step and run.event == "step":
            raise Killed

    return callback


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda _: None,
    "step": lambda optimizer: StepLR(optimizer, 4, 0.5),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.05, total_steps=60),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
}


def _start(checkpoint: Any = None, *, seed: int = 5, callbacks: Any = (), **changed: Any) -> Any:
    """A run of which every part has a state that must be kept; its model, and its optimizer."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = Net(seed)
    make = changed.pop("make", _loss_aware)
    optimizer = make(model)
    scheduler = SCHEDULERS[changed.pop("scheduler", "step")](optimizer)
    own = changed.pop("generator", None)
    options = {"epochs": 3, "accumulate": 2, "clip": 1.0, "val_loader": held_out(), **changed}
    if hasattr(optimizer, "meta_update") and optimizer.param_groups[0].get("mode") != "simple":
        options["meta_every"] = 3
    fit(
        model,
        loader(26, generator=None if own is None else torch.Generator().manual_seed(own + seed)),
        optimizer,
        loss_fn,
        scheduler=scheduler,
        callbacks=callbacks,
        checkpoint=checkpoint,
        progress=False,
        **options,
    )
    return model, optimizer


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
@pytest.mark.parametrize("killed", [5, 8], ids=["step 5", "an epoch's end"])
def test_resuming_inside_a_window_is_as_if_never_stopped(
    amp: str | None, killed: int, tmp_path: Any
) -> None:
    """7 batches an epoch, 4 steps, the last of one batch; dropout, noise, meta updates."""
    model, optimizer = _start(amp=amp)
    place = Checkpoint(tmp_path / "run.pt", every=1)
    with pytest.raises(Killed):
        # The save of step `killed` comes after callbacks: the one before it is what is left.
        _start(place, amp=amp, callbacks=[_kill_at(killed + 1)])
    states = torch.load(place.path, weights_only=True)["optimizer"]["state"].values()
    assert 0 < max(float(state["window_count"]) for state in states) < 3
    resumed, resumed_optimizer = _start(place, amp=amp, seed=77)
    assert largest_difference(resumed, model) == 0.0
    assert optimizer.used[-len(resumed_optimizer.used) :] == resumed_optimizer.used
    assert len(resumed_optimizer.used) == 12 - killed and None not in optimizer.used
    learned = optimizer.param_groups[0]["log_multiplier"]
    assert torch.equal(learned, resumed_optimizer.param_groups[0]["log_multiplier"])
    assert learned != 0
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["progress"] == {"step": 12, "epoch": 3, "position": 0}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("make", [_adamw, _nested])
def test_schedulers_resume(make: Any, scheduler: str, tmp_path: Any) -> None:
    options = {"make": make, "scheduler": scheduler}
    expected, _ = _start(**options)
    place = Checkpoint(tmp_path / "run.pt", every=2)
    with pytest.raises(Killed):
        _start(place, callbacks=[_kill_at(8)], **options)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["progress"]["step"] == 6
    resumed, _ = _start(place, seed=77, **options)
    assert largest_difference(resumed, expected) == 0.0


def _deep(mode: str) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        options: dict[str, Any] = {"meta_lr": 1e-2, "k_unroll": 2, "meta_update_freq": 2}
        return DeepNestedOptimizer(levels(model), lr=1e-2, model=model, mode=mode, **options)

    return make


@pytest.mark.parametrize("mode", ["simple", "explicit"])
def test_the_learned_optimizer_resumes(mode: str, tmp_path: Any) -> None:
    expected, optimizer = _start(make=_deep(mode))
    multipliers = optimizer.get_lr_multipliers()
    assert (multipliers != 1).all()
    place = Checkpoint(tmp_path / "run.pt", every=1)
    with pytest.raises(Killed):
        _start(place, make=_deep(mode), callbacks=[_kill_at(6)])
    resumed, optimizer = _start(place, make=_deep(mode), seed=77)
    assert largest_difference(resumed, expected) == 0.0
    assert torch.equal(optimizer.get_lr_multipliers(), multipliers)


@pytest.mark.parametrize("killed", [3, 4, 6])
def test_a_loader_with_a_generator_of_its_own_resumes(killed: int, tmp_path: Any) -> None:
    expected, _ = _start(generator=3)
    place = Checkpoint(tmp_path / "run.pt", every=1)
    with pytest.raises(Killed):
        _start(place, generator=3, callbacks=[_kill_at(killed + 1)])
    resumed, _ = _start(place, seed=77, generator=3)
    assert largest_difference(resumed, expected) == 0.0


def test_a_run_in_parts_is_a_run_in_one(tmp_path: Any) -> None:
    """A path is enough where runs end by themselves, at 5, 8 (an epoch's end) and 12 steps."""
    expected, _ = _start(steps=12, epochs=None)
    for seed, steps in ((5, 5), (78, 8), (79, 12)):
        model, _ = _start(tmp_path / "run.pt", seed=seed, steps=steps, epochs=None)
    assert largest_difference(model, expected) == 0.0
    again, _ = _start(tmp_path / "run.pt", seed=80, steps=12, epochs=None)
    assert largest_difference(again, expected) == 0.0  # nothing is left to do


def test_workers_resume(tmp_path: Any) -> None:
    models = []
    for stops in ((7,), (4, 7)):
        torch.manual_seed(0)
        for steps in stops:
            model = Net(steps)
            if steps == stops[0]:
                model = Net()
            options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork"}
            fit(
                model,
                loader(20, **options),
                _nested(model),
                loss_fn,
                steps=steps,
                checkpoint=tmp_path / f"{len(stops)}.pt",
                progress=False,
            )
        models.append(model)
    assert largest_difference(*models) == 0.0


def test_validation_and_meta_updates_without_a_rate_leave_training_alone() -> None:
    models = []
    for options in ({}, {"val_loader": held_out()}, {"val_loader": held_out(), "meta_every": 2}):
        torch.manual_seed(5)
        model = Net()
        optimizer = LossAware(levels(model), model=model, meta_lr=0.0)
        run = fit(model, loader(), optimizer, loss_fn, epochs=2, progress=False, **options)
        assert (run.val_loss is None) == (not options)
        assert model.training
        models.append(model)
    assert optimizer.unrolled == [2] * 6
    assert largest_difference(models[0], models[1]) == 0.0
    assert largest_difference(models[0], models[2]) == 0.0


def test_meta_updates_get_the_last_batches_of_the_epoch() -> None:
    """Three steps an epoch and one batch each: the fourth step has one batch behind it."""
    seen = []

    class Watching(LossAware):
        def meta_update(self, val_batch: Any, train_batches: Any, loss_fn: Any) -> Any:
            seen.append((val_batch, train_batches))
            return super().meta_update(val_batch, train_batches, loss_fn)

    batches = [(torch.full((4, 4), float(i)), torch.zeros(4, 1)) for i in range(3)]
    held = [(torch.full((4, 4), 10.0 + i), torch.zeros(4, 1)) for i in range(2)]
    model = Net()
    optimizer = Watching(levels(model), model=model)
    fit(model, batches, optimizer, loss_fn, steps=5, val_loader=held, meta_every=1, progress=False)
    trained = [[float(x[0, 0]) for x, _ in train] for _, train in seen]
    assert trained == [[0], [0, 1], [1, 2], [0], [0, 1]]
    assert [float(val[0][0, 0]) for val, _ in seen] == [11, 10, 11, 10, 11]


class Overflowing(Net):
    """Its third training step overflows float16."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * (1e38 if self.calls == 3 else 1.0)


def test_a_skipped_step_moves_nothing_and_its_loss_serves_no_other_step() -> None:
    model = Overflowing()
    optimizer = _loss_aware(model)
    scheduler = StepLR(optimizer, 1, 0.5)
    seen = []

    def watch(run: Run) -> None:
        if run.event == "step":
            seen.append((run.skipped, optimizer._loss, float(optimizer.param_groups[0]["lr"])))

    fit(
        model,
        loader(),
        optimizer,
        loss_fn,
        epochs=1,
        amp="fp16",
        scheduler=scheduler,
        callbacks=[watch],
        progress=False,
    )
    taken = np.cumsum([not skipped for skipped, *_ in seen])
    assert seen[2][0] and 3 <= taken[-1] < 6
    assert all(loss is None for _, loss, _ in seen)
    assert [lr for *_, lr in seen] == [0.01 * 0.5**n for n in taken]
    assert len(optimizer.used) == taken[-1] and all(np.isfinite(optimizer.used))


def test_callbacks_see_steps_and_epochs_and_may_stop() -> None:
    events = []

    def watch(run: Run) -> None:
        events.append((run.event, run.step, run.epoch, run.val_loss is None))
        run.stop = run.step == 8

    model = Net()
    run = fit(
        model,
        loader(),
        _adamw(model),
        loss_fn,
        epochs=5,
        val_loader=held_out(),
        callbacks=[watch],
        progress=False,
    )
    assert events == [
        *(("step", n, 0, True) for n in range(1, 7)),
        ("epoch", 6, 1, False),
        ("step", 7, 1, False),
        ("step", 8, 1, False),
    ]
    assert (run.step, run.epoch, run.position) == (8, 1, 2)


def test_the_bar_counts_steps(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    model = Net()
    fit(model, loader(), _adamw(model), loss_fn, epochs=2, accumulate=4)
    assert "4/4" in capsys.readouterr().err
    fit(model, loader(), _adamw(model), loss_fn, steps=2, progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        fit(model, loader(), _adamw(model), loss_fn, steps=2)


def test_the_samplers_epoch_is_set() -> None:
    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    epochs: list[int] = []
    data = Noisy()
    model = Net()
    batches = DataLoader(data, batch_size=12, sampler=Sampler(data))
    fit(model, batches, _adamw(model), loss_fn, epochs=3, progress=False)
    assert epochs == [0, 1, 2]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(4), torch.zeros(1))] * 4)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, TypeError, "either epochs= or steps="),
        ({"epochs": 1, "steps": 1}, TypeError, "either epochs= or steps="),
        ({"epochs": 0}, ValueError, "epochs is a number"),
        ({"steps": 1, "accumulate": 0}, ValueError, "accumulate is a number"),
        ({"steps": 1, "accumulate": True}, ValueError, "accumulate is a number"),
        ({"steps": 1, "amp": "fp8"}, ValueError, "'bf16' or 'fp16'"),
        ({"steps": 1, "clip": 0.0}, ValueError, "norm above 0"),
        ({"steps": 1, "clip": float("nan")}, ValueError, "norm above 0"),
        ({"steps": 1, "meta_every": 2}, TypeError, "meta_update"),
        ({"steps": 1, "checkpoint": Checkpoint("x", every=0)}, ValueError, "every"),
    ],
)
def test_wrong_arguments_are_refused(options: Any, error: Any, message: str) -> None:
    model = Net()
    with pytest.raises(error, match=message):
        fit(model, loader(), _adamw(model), loss_fn, progress=False, **options)
    assert largest_difference(model, Net()) == 0.0


def test_meta_updates_need_held_out_batches_that_can_be_chosen() -> None:
    model = Net()
    options: dict[str, Any] = {"steps": 1, "meta_every": 1, "progress": False}
    with pytest.raises(ValueError, match="val_loader"):
        fit(model, loader(), _loss_aware(model), loss_fn, **options)
    stream = DataLoader(Stream(), batch_size=2)
    with pytest.raises(TypeError, match="no length"):
        fit(model, loader(), _loss_aware(model), loss_fn, val_loader=stream, **options)
    with pytest.raises(ValueError, match="no batch"):
        fit(model, loader(), _loss_aware(model), loss_fn, val_loader=[], **options)


def test_plateau_schedulers_need_a_validation_loss_and_loaders_a_batch() -> None:
    model = Net()
    optimizer = _adamw(model)
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        plateau = ReduceLROnPlateau(optimizer)
        fit(model, loader(), optimizer, loss_fn, steps=1, scheduler=plateau, progress=False)
    with pytest.raises(ValueError, match="gave no batch"):
        fit(model, iter(list(loader())), optimizer, loss_fn, epochs=2, progress=False)


def test_another_runs_checkpoint_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "run.pt"
    _start(path, make=_nested, steps=3, epochs=None)
    with pytest.raises(ValueError, match="steps of 2 batches"):
        _start(path, make=_nested, accumulate=1)
    with pytest.raises(ValueError, match="with a scheduler, and this run has none"):
        _start(path, make=_nested, scheduler="none")
    with pytest.raises(ValueError, match="without a scaler, and this run has one"):
        _start(path, make=_nested, amp="fp16")
    with pytest.raises(ValueError, match="0 generators"):
        _start(path, make=_nested, generator=1)
    model = Net()
    optimizer = _nested(model)
    with pytest.raises(ValueError, match="3 steps into an epoch, and the loader has fewer"):
        fit(
            model,
            loader(8),
            optimizer,
            loss_fn,
            epochs=3,
            accumulate=2,
            scheduler=StepLR(optimizer, 4, 0.5),
            checkpoint=path,
            progress=False,
        )
