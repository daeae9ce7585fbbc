import io
import sys

import pytest
import rich.console
import torch
from torch import nn

from nested_optim import NestedOptimizer, describe


def trained(steps=25):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = NestedOptimizer(
        [
            {"params": model[0].parameters(), "frequency": 10, "lr": 0.25},
            {"params": [model[2].weight], "name": "head"},
        ]
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).sum().backward()
        optimizer.step()
    return model, optimizer


def test_rows_say_where_each_group_stands():
    _, optimizer = trained()
    slow, head = describe(optimizer)
    assert slow == {
        "name": "group 0",
        "frequency": 10,
        "phase": (5, 5),
        "updates": (2, 2),
        "expected_updates": 2,
        "tensors": 2,
        "parameters": 35,
        "parameter_bytes": 140,
        "state_bytes": 3 * 140 + 2 * 8,  # two moments and a window; two counters each
        "effective_lr": 0.25,
    }
    assert (head["name"], head["updates"], head["expected_updates"]) == ("head", (25, 25), 25)


def test_a_parameter_that_missed_gradients_lags_behind_what_is_expected():
    model, optimizer = trained(10)
    for _ in range(10):
        optimizer.zero_grad()
        model[2](torch.randn(3, 5)).sum().backward()  # the first layer is out of this graph
        optimizer.step()
    slow, head = describe(optimizer)
    assert (slow["updates"], slow["expected_updates"]) == ((1, 1), 2)
    assert (head["updates"], head["expected_updates"]) == ((20, 20), 20)


def test_a_model_names_groups_and_shows_what_is_in_none():
    model, optimizer = trained()
    first, _, left = describe(optimizer, model)
    assert first["name"] == "0"
    assert (left["name"], left["tensors"], left["parameters"]) == ("(in no group)", 1, 2)
    model[2].bias.requires_grad_(False)
    assert len(describe(optimizer, model)) == 2


def test_before_the_first_step_and_for_other_optimizers():
    model = nn.Linear(2, 2)
    (row,) = describe(NestedOptimizer(model.parameters(), frequency=4))
    assert (row["updates"], row["phase"], row["state_bytes"]) == ((0, 0), (0, 0), 0)
    (row,) = describe(torch.optim.SGD(model.parameters(), lr=0.1))
    assert (row["frequency"], row["effective_lr"]) == (1, 0.1)
    (row,) = describe(NestedOptimizer([{"params": []}]))
    assert (row["tensors"], row["updates"]) == (0, (0, 0))


def test_the_table_shows_every_group():
    model, optimizer = trained()
    text = str(describe(optimizer, model))
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(describe(optimizer, model))
    for word in ("head", "(in no group)", "frequency", "0.25", "25"):
        assert word in text and word in console.file.getvalue()


def test_without_rich_the_rows_remain(monkeypatch):
    _, optimizer = trained(1)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    table = describe(optimizer)
    assert table[1]["name"] == "head"
    with pytest.raises(ImportError, match="pip install rich"):
        str(table)
