"""Our optimizers behind Accelerate's wrapper, in one process."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from nested_optim import NestedOptimizer, WeightMemory  # noqa: E402
from nested_optim.integrations.accelerate import ExposedOptimizer, StepLoss, expose  # noqa: E402
from nested_optim.integrations.loop import fit, observe_loss, unwrap_optimizer  # noqa: E402

from .tiny import LossAware, Net, largest_difference, levels, loader, loss_fn  # noqa: E402


@pytest.fixture(autouse=True)
def _forget_accelerators() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _accelerator(accumulate: int = 1) -> Any:
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)


def _loss_aware(model: Net) -> LossAware:
    return LossAware(levels(model), model=model)


def _train(accelerator: Any, model: Any, optimizer: Any, batches: Any, tell: Any = None) -> None:
    for batch in batches:
        with accelerator.accumulate(model):
            loss = loss_fn(model, batch)
            accelerator.backward(loss)
            if tell is not None:
                tell(loss)
            optimizer.step()
            optimizer.zero_grad()


def test_preparing_in_the_middle_of_a_window_changes_nothing() -> None:
    """The wrapper sends the state through load_state_dict."""
    models = []
    for prepared in (False, True):
        torch.manual_seed(5)
        model = Net()
        optimizer: Any = NestedOptimizer(levels(model), lr=1e-2, state_dtype=torch.float64)
        WeightMemory(optimizer, frequencies=(2,))
        accelerator = _accelerator()
        for epoch in range(2):
            if prepared and epoch == 1:
                assert any(s["window_count"] == 1 for s in optimizer.state.values())
                optimizer = accelerator.prepare(optimizer)
                assert type(optimizer) is not NestedOptimizer
            _train(accelerator, model, optimizer, loader(28))
        assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float64}
        assert all(s["memory_count"] == 14 for s in optimizer.state.values())
        models.append(model)
    assert largest_difference(*models) == 0.0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_step_is_told_its_own_loss(accumulate: int) -> None:
    """7 batches: with 3 to a step, the third step has one."""
    accelerator = _accelerator(accumulate)
    model = Net()
    model, optimizer, batches = accelerator.prepare(model, _loss_aware(model), loader(28))
    losses: list[float] = []
    step_loss = StepLoss(accelerator, optimizer)

    def tell(loss: Any) -> None:
        losses.append(float(loss.detach()))
        step_loss(loss)

    _train(accelerator, model, optimizer, batches, tell)
    parts = [losses[i : i + accumulate] for i in range(0, 7, accumulate)]
    expected = [sum(part) / len(part) for part in parts]
    assert unwrap_optimizer(optimizer).used == pytest.approx(expected)
    assert unwrap_optimizer(optimizer)._loss is None


def test_methods_work_through_the_wrapper_once_exposed() -> None:
    accelerator = _accelerator()
    model = Net()
    base = _loss_aware(model)
    model, optimizer, batches = accelerator.prepare(model, base, loader(28))
    with pytest.raises(AttributeError, match="flush"):
        optimizer.flush()
    assert expose(optimizer) is optimizer and expose(optimizer) is optimizer
    assert accelerator._optimizers == [optimizer]
    hooked: list[int] = []
    optimizer.register_meta_update_hook(lambda _: hooked.append(1))
    optimizer.register_step_post_hook(lambda *_: hooked.append(2))
    _train(accelerator, model, optimizer, batches)
    assert hooked == [1, 2] * 7
    assert optimizer.flush() == len(list(model.body.parameters()))
    assert optimizer.metrics() == base.metrics()
    assert optimizer.state_dict()["state"].keys() == base.state_dict()["state"].keys()
    with pytest.raises(AttributeError, match="no_such_method"):
        _ = optimizer.no_such_method
    assert unwrap_optimizer(optimizer) is base


def test_exposed_wrappers_can_be_pickled() -> None:
    model = Net()
    optimizer = expose(_accelerator().prepare(torch.optim.SGD(model.parameters(), lr=0.1)))
    assert type(pickle.loads(pickle.dumps(optimizer))) is ExposedOptimizer


def test_saved_states_resume_exactly_inside_a_window(tmp_path: Any) -> None:
    def start(seed: int) -> Any:
        torch.manual_seed(seed)
        accelerator = _accelerator()
        model = Net(seed)
        model, optimizer = accelerator.prepare(model, _loss_aware(model))
        return accelerator, model, optimizer, StepLoss(accelerator, optimizer)

    accelerator, model, optimizer, tell = start(0)
    _train(accelerator, model, optimizer, loader(28), tell)
    accelerator.save_state(str(tmp_path))
    _train(accelerator, model, optimizer, loader(28), tell)
    AcceleratorState._reset_state(reset_partial_state=True)

    accelerator, resumed, optimizer, tell = start(77)
    accelerator.load_state(str(tmp_path))
    assert {int(s["window_count"]) for s in optimizer.state.values()} == {0, 1}
    _train(accelerator, resumed, optimizer, loader(28), tell)
    assert largest_difference(resumed, model) == 0.0


def test_losses_go_to_those_that_take_them() -> None:
    accelerator = _accelerator()
    model = Net()
    plain = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"SGD does not take a loss.*required=False"):
        observe_loss(plain, 1.0)
    assert observe_loss(plain, 1.0, required=False) is False
    with pytest.raises(TypeError, match="does not take a loss"):
        StepLoss(accelerator, plain)
    _train(accelerator, model, plain, loader(8), StepLoss(accelerator, plain, required=False))

    taking = _loss_aware(model)
    for loss in (1.5, torch.tensor([1.5]), torch.tensor(1.5, dtype=torch.bfloat16)):
        assert observe_loss(taking, loss) is True
        assert taking._loss.dtype == torch.float32 and taking._loss.shape == ()
        assert float(taking._loss) == 1.5
    observe_loss(taking, None)
    assert taking._loss is None
    for wrong in ("1.5", True, torch.ones(2), torch.tensor(1j)):
        with pytest.raises(TypeError, match="loss"):
            observe_loss(taking, wrong)  # type: ignore[arg-type]


def test_a_loss_is_a_copy() -> None:
    """The caller's tensor may be changed in place before the step."""
    model = Net()
    optimizer = _loss_aware(model)
    loss = torch.tensor(2.0)
    observe_loss(optimizer, loss)
    loss.zero_()
    assert float(optimizer._loss) == 2.0


def test_what_cannot_be_unwrapped_or_exposed_is_refused() -> None:
    model = Net()
    accelerator = _accelerator()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    assert unwrap_optimizer(plain) is plain
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        unwrap_optimizer(model)
    with pytest.raises(TypeError, match=r"accelerator\.prepare\(\)"):
        expose(plain)
    with pytest.raises(TypeError, match="fit takes the optimizer itself"):
        fit(model, loader(), accelerator.prepare(plain), loss_fn, steps=1, progress=False)


def test_deepspeed_is_refused_with_the_reason() -> None:
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    wrapper = object.__new__(DeepSpeedOptimizerWrapper)  # making one needs a GPU
    with pytest.raises(TypeError, match=r"flattens parameters.*FSDP2"):
        expose(wrapper)


def test_optimizers_that_wrap_another_are_left_as_they_are() -> None:
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer
            super().__init__(optimizer.param_groups, {})

    own = Lookahead(torch.optim.SGD(Net().parameters(), lr=0.1))
    assert unwrap_optimizer(own) is own
