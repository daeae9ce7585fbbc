"""What DeepNestedOptimizer tells of itself: names, numbers, what reading them costs."""

import copy

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nested_optim import DeepNestedOptimizer

from .helpers import make_params
from .meta_helpers import Net, batch, loss_of, step_on, two_groups


def test_groups_names_in_metrics_differ_whatever_they_are_called():
    given = ("a", "a_2", "a", "a", "a_2")
    groups = [{"params": make_params((2,)), "name": name} for name in given]
    optimizer = DeepNestedOptimizer(groups)
    assert optimizer.group_names() == ["a", "a_2", "a_3", "a_4", "a_2_4"]
    assert len([key for key in optimizer.metrics() if key.startswith("lr_multiplier/")]) == 5


class Reads(TorchFunctionMode):
    """Counts what would wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__ in ("__float__", "__bool__", "item", "tolist", "cpu")
        return func(*args, **(kwargs or {}))


def test_numbers_for_a_logger_are_read_at_once():
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(two_groups(model), lr=0.01, meta_lr=0.05, meta_update_freq=2)
    for i in range(4):
        step_on(optimizer, model, batch(i, torch.float32), told=True)
    for read in (optimizer.metrics, optimizer.get_momentum_stats, optimizer.get_effective_lrs):
        with Reads() as reads:
            read()
        assert reads.count == 1, read


def test_what_is_logged_is_there_before_a_meta_update_too():
    optimizer = DeepNestedOptimizer(nn.Linear(2, 2))
    assert float(optimizer.controller_grad_norm.item()) == 0.0
    assert (optimizer.last_meta_loss or 0.0) == 0.0
    assert optimizer.metrics()["controller_grad_norm"] == 0.0
    assert optimizer.step(1.0)["controller_grad_norm"] == 0.0
    assert float(copy.deepcopy(optimizer).controller_grad_norm) == 0.0


def test_a_loss_that_was_told_is_kept_as_it_was():
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(model, meta_update_freq=1)
    total = torch.tensor(2.0)
    optimizer.observe_loss(total)
    total.add_(1.0)
    optimizer.zero_grad()
    loss_of(model, batch(0, torch.float32)).backward()
    optimizer.step()
    assert float(optimizer.last_meta_loss) == 2.0
    result = optimizer.step(total)
    total.zero_()
    assert float(optimizer.last_meta_loss) == float(result["meta_loss"]) == 3.0
