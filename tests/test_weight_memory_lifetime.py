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
