"""``memory=`` of our optimizers."""

import copy
import pickle

import pytest
import torch
from torch import nn

from nested_optim import (
    DGD,
    M3,
    DeepMomentum,
    DeepNestedOptimizer,
    DeltaMomentum,
    NestedOptimizer,
    WeightMemory,
)
from nested_optim.memory_levels import PRESETS

from .helpers import assert_same_state, assert_same_tensors

BUILDS = {
    "NestedOptimizer": lambda model, **o: NestedOptimizer(model.parameters(), **o),
    "M3": lambda model, **o: M3([model.weight], **o),
    "DGD": lambda model, **o: DGD(model, **o),
    "DeltaMomentum": lambda model, **o: DeltaMomentum(model.parameters(), **o),
    "DeepNestedOptimizer": lambda model, **o: DeepNestedOptimizer(model, **o),
}


def make():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def train(model, optimizer, steps):
    for seed in range(steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", BUILDS)
def test_it_is_a_weight_memory_attached_by_hand(name):
    model, twin = make(), make()
    options = {"frequencies": (2, 3), "write": 0.3, "pull": (0.2, 0.1), "dtype": torch.bfloat16}
    optimizer = BUILDS[name](model, lr=0.1, memory=options)
    by_hand = BUILDS[name](twin, lr=0.1)
    assert by_hand.weight_memory is None
    memory = WeightMemory(by_hand, **options)
    assert by_hand.weight_memory is memory
    train(model, optimizer, 7)
    train(twin, by_hand, 7)
    assert_same_tensors(list(model.parameters()), list(twin.parameters()))
    assert_same_state(optimizer, by_hand)
    assert_same_tensors(optimizer.weight_memory.weights(-1), memory.weights(-1))


@pytest.mark.parametrize("name", PRESETS)
def test_a_name_is_a_preset_and_a_tuple_frequencies(name):
    preset = NestedOptimizer(make().parameters(), memory=name)
    assert preset.param_groups[0]["memory_frequencies"] == PRESETS[name].frequencies
    plain = NestedOptimizer(make().parameters(), memory=(3, 30))
    assert plain.param_groups[0]["memory_frequencies"] == (3, 30)


@pytest.mark.parametrize("given", [(10, 50), {"frequencies": (2,)}, "continual"], ids=str)
def test_deep_momentums_own_memory_is_another(given):
    model = make()
    with pytest.raises(ValueError, match=r"WeightMemory\(optimizer, \.\.\.\)"):
        DeepMomentum(model.parameters(), lr=0.1, memory=given)
    optimizer = DeepMomentum(model.parameters(), lr=0.1)
    memory = WeightMemory(optimizer, (2,))
    assert optimizer.weight_memory is memory
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 3)
    assert optimizer.param_groups[0]["memory"] == "mlp"
    assert not torch.equal(memory.weights(1)[0], before[0])
    assert optimizer.param_groups[0]["memory_step"] > 0  # and it has learned


def test_copies_have_none():
    optimizer = NestedOptimizer(make().parameters(), memory=(2,))
    assert copy.deepcopy(optimizer).weight_memory is None
    assert pickle.loads(pickle.dumps(optimizer)).weight_memory is None


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (3, TypeError, "takes a preset's name, frequencies"),
        ("forever", ValueError, "continual"),
        ({"frequency": 3}, TypeError, "frequency"),
        ((0,), ValueError, r"memory frequencies\[0\]"),
        ({"frequencies": (2,), "write": 0.8, "pull": 0.7}, ValueError, "exceeds 1"),
    ],
)
def test_what_is_no_memory_is_refused(wrong, error, message):
    model = make()
    with pytest.raises(error, match=message):
        DGD(model, memory=wrong)
    assert not model._forward_hooks  # nothing is left of the attempt
