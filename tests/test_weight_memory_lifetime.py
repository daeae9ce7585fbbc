"""What a weight memory keeps alive, and what becomes of it when somebody empties the state."""

import copy
import gc
import weakref

import pytest
import torch

from nested_optim import NestedOptimizer, WeightMemory

from .helpers import make_params, train
from .interpreter import interpreted

OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "NestedOptimizer": lambda params: NestedOptimizer(params, lr=0.1),
    "NestedOptimizer on the kernels": lambda params: NestedOptimizer(params, lr=0.1, fused=True),
}


@pytest.fixture(params=OPTIMIZERS)
def build(request):
    """An optimizer's class; the kernels are interpreted where Triton is there."""
    if "kernels" in request.param:
        pytest.importorskip("triton")
        with interpreted():
            yield OPTIMIZERS[request.param]
    else:
        yield OPTIMIZERS[request.param]


def stepped(build, *shapes, frequencies=(1, 2)):
    params = make_params(*(shapes or ((50,), (7, 5))))
    optimizer = build(params)
    memory = WeightMemory(optimizer, frequencies, 0.3, 0.2)
    train(optimizer, params, range(4))
    return params, optimizer, memory


def references(params, optimizer):
    copies = [optimizer.state[p][key] for p in params for key in ("memory_1", "memory_2")]
    return [weakref.ref(t) for t in copies]


def alive(refs):
    gc.collect()
    return [ref() is not None for ref in refs].count(True)


def test_copies_that_loading_replaces_are_freed(build):
    params, optimizer, memory = stepped(build)
    refs = []
    for _ in range(3):
        refs += references(params, optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert alive(refs) == 0
        train(optimizer, params, range(4))
    assert len(memory._run._plans) <= 2


def test_copies_of_a_memory_that_is_switched_off_are_freed(build):
    params, optimizer, _ = stepped(build)
    refs = references(params, optimizer)
    optimizer.param_groups[0]["memory_frequencies"] = ()
    train(optimizer, params, range(2))
    assert alive(refs) == 0


def test_copies_of_a_memory_that_is_detached_are_freed(build):
    params, optimizer, memory = stepped(build)
    refs = references(params, optimizer)
    memory.detach()
    assert alive(refs) == 0


def looks(memory):
    """Steps at which the memory looked at everything again."""
    found = []
    real = memory._look_again
    memory._look_again = lambda *args: (found.append(1), real(*args))[1]
    return found


@pytest.mark.parametrize("how", ["clear", "pop", "pop memory"])
def test_a_state_that_is_emptied_begins_anew(how, build):
    """Between tasks, as for a parameter that joins late."""
    params, optimizer, memory = stepped(build)
    refs = references(params[:1], optimizer)
    if how == "clear":
        optimizer.state.clear()
    elif how == "pop":
        optimizer.state.pop(params[0])
    else:
        for key in ("memory_1", "memory_2", "memory_count"):
            del optimizer.state[params[0]][key]
    if getattr(optimizer, "_fused", None) is None:
        assert alive(refs) == 0
    optimizer.param_groups[0]["memory_frequencies"] = (2, 4)
    before = [p.detach().clone() for p in params]
    other = None if how == "clear" else memory.weights(1)[1].clone()
    train(optimizer, params, range(4, 5))
    torch.testing.assert_close(memory.weights(1)[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(memory.weights(2)[0], before[0], rtol=0, atol=0)
    if other is not None:
        assert torch.equal(memory.weights(1)[1], other)  # step 5 is not due
    assert memory.weights(1)[0] is not params[0]
    train(optimizer, params, range(5, 10))
    wanted = 6 if how == "clear" else 10
    assert all(optimizer.state[p]["memory_count"] == wanted for p in params)
    assert not torch.equal(memory.weights(1)[0], before[0])
    assert alive(refs) == 0


def test_a_state_that_is_emptied_after_a_plain_step_begins_anew(build):
    """Without an edit of the settings, which makes the memory look in any case."""
    params, optimizer, memory = stepped(build, frequencies=(3, 6))
    optimizer.state.clear()
    before = [p.detach().clone() for p in params]
    train(optimizer, params, range(2))
    torch.testing.assert_close(memory.weights(1), before, rtol=0, atol=0)


@pytest.mark.parametrize("closure", [False, True])
def test_a_parameter_without_gradients_slows_nothing_down(closure, build):
    params = make_params((50,), (7, 5))
    params[1].requires_grad_(closure)  # with a closure, it might get one in the step
    optimizer = build(params)
    memory = WeightMemory(optimizer, (2, 4), 0.3, 0.2)
    found = looks(memory)

    def step(seed, *given):
        def gradients():
            for p in given:
                p.grad = torch.full_like(p, 1.0 + seed)
            return 0.0

        if closure:
            optimizer.zero_grad()
            optimizer.step(gradients)
        else:
            gradients()
            optimizer.step()

    joined = []
    for seed in range(6):
        step(seed, params[0])
        joined.append(memory._joined is not None and params[0] in memory._joined.done)
    assert len(found) == 1
    assert params[1] not in optimizer.state
    if getattr(optimizer, "_fused", None) is not None and not closure:
        assert joined == [False, True] * 3
    before = params[1].detach().clone()
    params[1].requires_grad_(True)
    step(6, *params)
    assert torch.equal(memory.weights(1)[1], before)
    assert optimizer.state[params[1]]["memory_count"] == 7
    step(7, *params)
    assert not torch.equal(memory.weights(1)[1], before)
    assert len(found) == 1


def test_an_exchange_is_not_done_later_where_its_step_failed(build):
    params, optimizer, memory = stepped(build, frequencies=(5,))

    def closure():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    optimizer.add_param_group({"params": make_params((3,))})
    slow = memory.weights(1)[0].clone()
    optimizer.param_groups[0]["memory_frequencies"] = (100,)
    train(optimizer, params, range(4, 5))
    assert torch.equal(memory.weights(1)[0], slow)


@pytest.mark.parametrize("change", ["clear", "settings", "joins", "moves"])
def test_steps_counted_on_the_device_follow_what_changes(change, build, monkeypatch):
    """They go on with the tensors of the last step, which they have to notice to be others."""
    monkeypatch.setattr("nested_optim.weight_memory.ask", lambda *args: None)
    results = []
    for on_device in (True, False):
        params = make_params((50,), (7, 5), (4,))
        optimizer = build(params)
        memory = WeightMemory(optimizer, (2, 3), 0.3, 0.2)
        if on_device:

            def exchange(count, memory=memory):
                with torch.no_grad():
                    memory._count -= 1
                    memory._exchange_on_device(torch.zeros(1))

            memory._exchange = exchange
        group = optimizer.param_groups[0]
        own = params[:2] if change == "joins" else params
        train(optimizer, own, range(4))
        if change == "clear":
            optimizer.state.clear()
        elif change == "settings":
            group.update(memory_frequencies=(1,), memory_write=(0.5,), memory_pull=(0.1,))
        elif change == "moves":
            params[0].data = params[0].detach().clone()
        train(optimizer, params, range(4, 9))
        levels = len(group["memory_frequencies"])
        results.append([t.clone() for k in range(levels + 1) for t in memory.weights(k)])
    torch.testing.assert_close(*results)
