"""What stands around a captured graph, where there is no graph: a recording that is run again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import gradients
from benchmarks.gradients import Gradients

DEVICE = torch.device("cpu")


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def made(model, adds):
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))

    def loss(indices):
        return F.cross_entropy(model(inputs[indices]), indices % 3)

    return Gradients(model, loss, 4, DEVICE, adds=adds)


@pytest.fixture
def recorded(monkeypatch):
    """Stands for CUDA's graphs: what was captured is run again, into the same tensors."""

    def warm_up(work, device):
        for _ in range(3):
            work()

    monkeypatch.setattr(gradients, "warm_up", warm_up)

    def start(found):
        found.captures = True

        def capture(work, device):
            loss = work()  # a real one makes the tensors, too, but computes nothing

            def replay():
                if not found.adds:
                    torch._foreach_zero_([p.grad for p in found.params])
                loss.copy_(work())

            return replay, loss

        monkeypatch.setattr(gradients, "capture", capture)
        return found

    return start


@pytest.mark.parametrize("adds", [True, False])
def test_batches_give_the_same_by_a_recording(adds, recorded):
    models = [a_model(), a_model()]
    plain, other = made(models[0], adds), recorded(made(models[1], adds))
    batches = [torch.arange(n, n + size) for n, size in ((0, 4), (7, 3), (10, 4), (20, 2), (30, 4))]
    held = None
    for step, batch in enumerate(batches):
        losses = [found.add(batch).clone() for found in (plain, other)]
        torch.testing.assert_close(*losses)
        assert not losses[1].requires_grad
        for p, q in zip(*(m.parameters() for m in models)):
            torch.testing.assert_close(p.grad, q.grad)
        for one, two in zip(*(m.buffers() for m in models)):  # one batch each, warming up or not
            torch.testing.assert_close(one, two)
        if adds and step == 2:
            plain.clear()
            other.clear()
            assert all(p.grad is None for p in models[0].parameters())
            assert not any(p.grad.any() for p in models[1].parameters())
        grads = [p.grad for p in models[1].parameters()]
        assert held is None or all(a is b for a, b in zip(held, grads))
        held = grads


def test_a_batch_that_is_not_full_comes_first(recorded):
    for adds in (True, False):
        models = [a_model(), a_model()]
        plain, other = made(models[0], adds), recorded(made(models[1], adds))
        for batch in (torch.arange(3), torch.arange(5, 9)):
            for found in (plain, other):
                found.add(batch)
        for p, q in zip(*(m.parameters() for m in models)):
            torch.testing.assert_close(p.grad, q.grad)
