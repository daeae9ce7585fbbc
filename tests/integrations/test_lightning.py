"""Our optimizers under Lightning's Trainer: closures, losses, meta updates, logs, resuming."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from nested_optim import DeepNestedOptimizer, NestedOptimizer  # noqa: E402
from nested_optim.integrations.lightning import (  # noqa: E402
    NestedLightningCallback,
    WeightMemoryLightningCallback,
)
from nested_optim.integrations.loop import observe_loss, unwrap_optimizer  # noqa: E402

from .tiny import LossAware, Net, held_out, largest_difference, levels, loader, loss_fn  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    def __init__(self, optimizer: str = "loss aware", seed: int = 0, **options: Any) -> None:
        super().__init__()
        self.net = Net(seed)
        self.kind, self.given = optimizer, options
        self.losses: list[float] = []
        self.calls = 0
        self.val_weights: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        loss = loss_fn(self, batch)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_weights.append(self.net.head.weight.detach().clone())
        self.log("val_loss", loss_fn(self, batch))

    def configure_optimizers(self) -> Any:
        groups = levels(self.net)
        if self.kind == "loss aware":
            optimizer: Any = LossAware(groups, model=self, **self.given)
        elif self.kind == "nested":
            optimizer = NestedOptimizer(groups, lr=1e-2, **self.given)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, **self.given)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Recorder(Logger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    name = version = "recorder"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((int(step or 0), metrics))

    def values(self, key: str) -> list[tuple[int, float]]:
        return [(step, metrics[key]) for step, metrics in self.logged if key in metrics]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        yield


def _fit(
    module: Any,
    callbacks: Any = (),
    *,
    data: Any = None,
    val: Any = None,
    ckpt_path: Any = None,
    seed: int = 5,
    **options: Any,
) -> Any:
    given = {"max_epochs": 2, "logger": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    trainer = pl.Trainer(
        **{**given, **options},
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
    )
    torch.manual_seed(seed)
    trainer.fit(module, loader(26) if data is None else data, val, ckpt_path=ckpt_path)
    return trainer


def _optimizer(trainer: Any) -> Any:
    return unwrap_optimizer(trainer.optimizers[0])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_step_is_told_its_own_loss(precision: str, accumulate: int) -> None:
    """7 batches: with 3 to a step, the third step has one. float16 brings no closure and skips."""
    module = Module()
    plugins: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # with a scale that overflows at first
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, backoff_factor=2.0**-6)
        plugins = {"plugins": [MixedPrecision(precision, "cpu", scaler)]}
    trainer = _fit(
        module,
        [NestedLightningCallback()],
        **plugins,
        accumulate_grad_batches=accumulate,
        max_epochs=1,
    )
    assert module.calls == len(module.losses) == 7  # the closure runs once
    parts = [module.losses[i : i + accumulate] for i in range(0, 7, accumulate)]
    expected = [sum(part) / len(part) for part in parts]
    used = _optimizer(trainer).used
    assert None not in used
    assert used == pytest.approx(expected[-len(used) :], rel=1e-6)
    assert len(used) == len(parts) if precision != "16-mixed" else len(used) < len(parts)
    assert _optimizer(trainer)._loss is None  # that of a skipped step is withdrawn


def test_without_the_callback_no_loss_is_known() -> None:
    trainer = _fit(Module(), max_epochs=1)
    assert set(_optimizer(trainer).used) == {None}


@pytest.mark.parametrize("kind", ["nested", "adamw"])
def test_the_trainer_trains_as_a_plain_loop_does(kind: str) -> None:
    module = Module(kind)
    _fit(module, [NestedLightningCallback()])
    torch.manual_seed(5)
    expected = Module(kind)
    (optimizer,), (scheduler,) = expected.configure_optimizers()
    for _ in range(2):
        for batch in loader(26):
            optimizer.zero_grad()
            loss_fn(expected, batch).backward()
            optimizer.step()
            scheduler["scheduler"].step()
    assert largest_difference(module, expected) == 0.0


def test_methods_are_reached_behind_the_wrapper() -> None:
    found = []

    class Flushing(Module):
        def on_train_epoch_end(self) -> None:
            wrapped = self.optimizers()
            found.append((type(wrapped).__name__, unwrap_optimizer(wrapped).flush()))
            observe_loss(wrapped, 1.5)
            found.append(unwrap_optimizer(wrapped)._loss)
            observe_loss(wrapped, None)

    module = Flushing()
    trainer = _fit(module, max_epochs=1)
    body = len(list(module.net.body.parameters()))
    assert found[0] == ("LightningLossAware", body)  # 7 steps: a gradient was left in the windows
    assert unwrap_optimizer(trainer.optimizers[0]) is trainer.optimizers[0]
    assert float(found[1]) == 1.5


def test_metrics_reach_the_logger_and_callbacks_under_group_names() -> None:
    recorder = Recorder()
    trainer = _fit(
        Module(),
        [NestedLightningCallback(held_out(), every=2, loss_fn=loss_fn), LearningRateMonitor()],
        logger=recorder,
        log_every_n_steps=3,
    )
    multipliers = recorder.values("nested/lr_multiplier_body")
    assert [step for step, _ in multipliers] == [3, 6, 9, 12]
    assert len({value for _, value in multipliers}) == 4
    last = recorder.values("nested/meta_loss")[-1][1]
    assert trainer.callback_metrics["nested/meta_loss"].item() == pytest.approx(last)
    rates = {key for _, metrics in recorder.logged for key in metrics if key.startswith("lr-")}
    assert rates == {"lr-LossAware/body", "lr-LossAware/head"}


def test_meta_updates_without_a_rate_leave_training_alone() -> None:
    module, plain = Module(meta_lr=0.0), Module(meta_lr=0.0)
    meta = NestedLightningCallback(held_out(), every=2, loss_fn=loss_fn)
    trainer = _fit(module, [meta])
    _fit(plain, [NestedLightningCallback()])
    assert _optimizer(trainer).unrolled == [2, 2, 2, 1, 2, 2, 2]  # step 8 is the first of its epoch
    assert largest_difference(module, plain) == 0.0


class Replaying:
    """A loader that can be resumed: it draws its epoch anew and passes over what was given out."""

    def __init__(self) -> None:
        self.loader = loader(26)
        self.given, self.start, self.pending = 0, None, None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        skip = 0
        if self.pending is not None:
            skip, self.start = self.pending["given"], self.pending["start"]
            self.pending = None
            torch.set_rng_state(self.start)
        else:
            self.start = torch.get_rng_state()
        self.given = skip
        batches = iter(self.loader)
        for _ in range(skip):
            next(batches)
        return self._rest(batches)

    def _rest(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending = state


def _callbacks(kind: str) -> list[Any]:
    meta: dict[str, Any] = {"val_loader": held_out(), "every": 3, "loss_fn": loss_fn}
    return [
        NestedLightningCallback(**(meta if kind == "loss aware" else {})),
        WeightMemoryLightningCallback(frequencies=(2, 4), validate_from=-1),
    ]


def _resume_exactly(tmp_path: Any, checkpoint: dict[str, Any], data: Any, **options: Any) -> None:
    """A run, and one that goes on from the first checkpoint of a run that ended early."""
    options = {"max_epochs": 3, **options}
    kind = options.pop("kind", "loss aware")
    saver = {"dirpath": tmp_path, "save_top_k": -1, "filename": "{step}", **checkpoint}
    expected = Module(kind)
    trainer = _fit(expected, [*_callbacks(kind), ModelCheckpoint(**saver)], data=data(), **options)
    first, *_ = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    states = torch.load(first, weights_only=True)["optimizer_states"][0]["state"].values()
    if kind != "adamw":
        assert 0 < max(float(state["window_count"]) for state in states) < 3
    assert all("memory_2" in state for state in states)

    module = Module(kind, seed=77)
    resumed = _fit(module, _callbacks(kind), data=data(), ckpt_path=first, seed=77, **options)
    assert resumed.global_step == trainer.global_step
    assert largest_difference(module, expected) == 0.0
    assert largest_difference(module, Module(kind)) > 1e-3
    optimizers = _optimizer(resumed), _optimizer(trainer)
    for ours, theirs in zip(*(one.state_dict()["state"].values() for one in optimizers)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    if kind == "loss aware":
        learned, wanted = (one.param_groups[0]["log_multiplier"] for one in optimizers)
        assert torch.equal(learned, wanted) and learned != 0


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_model_checkpoints_of_an_epochs_end_resume_exactly(
    precision: str, validate: bool, tmp_path: Any
) -> None:
    """4 steps an epoch, so windows of 3 are open; shuffled batches, noise and dropout go on."""
    monitored = {"monitor": "val_loss"} if validate else {}
    val = held_out() if validate else None
    options = {"accumulate_grad_batches": 2, "precision": precision, "val": val}
    _resume_exactly(tmp_path, monitored, lambda: loader(26), **options)


@pytest.mark.parametrize("kind", ["loss aware", "adamw"])
def test_model_checkpoints_in_mid_epoch_resume_exactly_on_a_resumable_loader(
    kind: str, tmp_path: Any
) -> None:
    _resume_exactly(tmp_path, {"every_n_train_steps": 5}, Replaying, kind=kind, val=held_out())


def test_validation_reads_out_and_live_weights_are_saved(tmp_path: Any) -> None:
    module = Module("nested")
    memory = WeightMemoryLightningCallback(frequencies=(1,), write=0.1, pull=0.0, validate_from=1)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    live = []

    module.on_validation_end = lambda: live.append(module.net.head.weight.detach().clone())
    _fit(module, [memory, checkpoint], val=held_out(), max_epochs=1)
    slow = memory.memory.weights(1)
    head = [
        p is module.net.head.weight
        for g in memory.memory.optimizer.param_groups
        for p in g["params"]
    ]
    copy = slow[head.index(True)]
    assert torch.equal(module.val_weights[0], copy)
    assert not torch.equal(module.net.head.weight, copy)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(saved["net.head.weight"], module.net.head.weight)
    assert torch.equal(live[0], module.net.head.weight)

    module.val_weights.clear()
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    with memory.memory.read_out(1):
        trainer.validate(module, held_out(), verbose=False)
    assert torch.equal(module.val_weights[0], copy)


def test_checkpoints_hold_a_read_out_beside_the_live_weights(tmp_path: Any) -> None:
    module = Module("nested")
    memory = WeightMemoryLightningCallback(
        frequencies=(1,), write=0.1, pull=0.0, validate_from=1, save_from=1, save_as="slow"
    )
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    _fit(module, [memory, checkpoint], val=held_out(), max_epochs=1)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert memory.memory is not None
    wanted = memory.memory.model_state_dict(module, 1)
    assert saved["slow"].keys() == wanted.keys()
    assert all(torch.equal(saved["slow"][key], value) for key, value in wanted.items())
    assert torch.equal(saved["slow"]["net.head.weight"], module.val_weights[0])
    assert not torch.equal(saved["state_dict"]["net.head.weight"], wanted["net.head.weight"])
    Module("nested", seed=5).load_state_dict(saved["slow"])


def test_options_for_a_memory_of_others_are_refused() -> None:
    module = Module("nested", memory=(2,))
    with pytest.raises(ValueError, match="frequencies, average_buffers would not change"):
        callback = WeightMemoryLightningCallback(frequencies=(5,), average_buffers=True)
        _fit(module, [callback])
    callback = WeightMemoryLightningCallback(validate_from=-1)
    trainer = _fit(module, [callback], max_epochs=1)
    assert callback.memory is _optimizer(trainer).weight_memory


def test_live_weights_come_back_when_validation_fails() -> None:
    class Failing(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            raise ArithmeticError("no validation today")

    module = Failing("nested")
    memory = WeightMemoryLightningCallback(frequencies=(1,), write=0.1, pull=0.0, validate_from=1)
    with pytest.raises(ArithmeticError, match="today"):
        _fit(module, [memory], val=held_out())
    assert not torch.equal(module.net.head.weight, module.val_weights[0])
    memory.memory.optimizer.state_dict()  # which is refused inside a read-out


def test_without_lightning_the_error_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "nested_optim.integrations.lightning")
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module("nested_optim.integrations.lightning")


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="val_loader"):
        NestedLightningCallback(every=2)
    with pytest.raises(ValueError, match="every is a number"):
        NestedLightningCallback(held_out(), every=0)
    with pytest.raises(TypeError, match=r"none of AdamW has a method meta_update"):
        _fit(Module("adamw"), [NestedLightningCallback(held_out(), every=2)])
    with pytest.raises(ValueError, match="optimizer=1, but the module has 1"):
        _fit(Module("adamw"), [WeightMemoryLightningCallback(optimizer=1)])


class Learning(Module):
    def configure_optimizers(self) -> Any:
        return DeepNestedOptimizer(
            levels(self.net), lr=1e-2, model=self, loss_fn=loss_fn, **self.given
        )


@pytest.mark.parametrize("mode", ["simple", "explicit"])
def test_the_learned_optimizer_learns_and_logs(mode: str) -> None:
    recorder = Recorder()
    every = {"val_loader": held_out(), "every": 2} if mode == "explicit" else {}
    module = Learning(mode=mode, meta_lr=1e-2, k_unroll=2, meta_update_freq=2)
    _fit(module, [NestedLightningCallback(**every)], logger=recorder, log_every_n_steps=1)
    for key in ("lr_multiplier_body", "meta_loss", "controller_grad_norm", "momentum_avg_norm"):
        values = [value for _, value in recorder.values(f"nested/{key}")]
        assert len(set(values)) > 1, key


def test_modules_with_manual_optimization_step_as_they_like() -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            loss = loss_fn(self, batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.losses.append(float(loss.detach()))
            optimizer.step()

    module = Manual()
    trainer = _fit(module, [NestedLightningCallback()], max_epochs=1)
    assert _optimizer(trainer).used == pytest.approx(module.losses)
    assert nn.utils.parameters_to_vector(module.parameters()).isfinite().all()
