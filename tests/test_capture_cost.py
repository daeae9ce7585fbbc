"""What capturing costs, and how inputs are held between forward and backward pass."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nested_optim import DGD, descent

from .test_capture import assert_captured, assert_nothing_captured, captured, randn


class Operations(TorchDispatchMode):
    """Counts the operations that reach a backend: on a GPU each costs the host its launch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


def operations_of(depth, autocast, max_tokens=3):
    """What the hooks add to the second step's passes, and what its step takes."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(depth)))
    optimizer = DGD(model, 0.01, max_tokens=max_tokens)
    x = randn(2, 4, 4, dtype=torch.float32)

    def passes():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
        out.float().sum().backward()

    passes()
    optimizer.step()
    optimizer.zero_grad()
    with Operations() as watched:
        passes()
    with Operations() as step:
        optimizer.step()
    optimizer.zero_grad()
    optimizer.remove_hooks()
    with Operations() as plain:
        passes()
    return len(watched.names) - len(plain.names), len(step.names)


@pytest.mark.parametrize("max_tokens", [3, 100])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_further_layer_costs_the_host_few_operations(autocast, max_tokens, monkeypatch):
    monkeypatch.setattr(descent, "_in_batches", lambda param: True)
    few, many = (operations_of(depth, autocast, max_tokens) for depth in (4, 12))
    # Take hold of the input, read the step's count, view rows, choose some. Under autocast only
    # the first layer's input still has to be cast, as the layer itself does.
    assert (many[0] - few[0]) / 8 <= 4
    assert many[1] == few[1]  # the step's lists grow, not their number


def test_an_input_that_is_changed_before_the_backward_pass_is_noticed():
    layer = nn.Linear(4, 3)
    optimizer = DGD(layer, 0.1)
    x = torch.ones(5, 4)
    with torch.autocast("cpu", torch.bfloat16):  # the layer itself keeps a cast copy
        loss = layer(x).float().sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(5, 4\), has been modified by an inplace"):
        loss.backward()
    assert captured(optimizer, layer.weight) is None


def test_an_inplace_residual_whose_backward_pass_never_comes_is_freed():
    layer = nn.Linear(4, 4)
    optimizer = DGD(layer, 0.1)
    x = torch.ones(2, 4, requires_grad=True).clone()
    storage = weakref.ref(x.untyped_storage())
    with torch.autocast("cpu", torch.bfloat16):
        x.add_(layer(x).float())
    del x
    gc.collect()
    assert storage() is None
    assert_nothing_captured(optimizer)


def test_inputs_are_captured_through_hooks_on_saved_tensors():
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = DGD(layer, 0.1)
    x, packed = randn(5, 4), []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.numpy(force=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        loss = layer(x).sum()
    assert packed.count(x.shape) == 2  # the layer's and the optimizer's
    loss.backward()
    assert_captured(optimizer, layer.weight, x)
