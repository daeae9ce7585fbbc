"""Small models, and views of param groups, for the tests of matrix_groups."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from nested_optim import matrix_groups

OWN = ("algorithm", "flatten", "out_dim", "split_sizes")
WHOLE = ("matrices", {})  # what layouts() gives for a plain matrix
CONV = {"flatten": True}


def names_by_group(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def options(group):
    return {key: value for key, value in group.items() if key not in ("params", "name", *OWN)}


def layouts(groups):
    """For each matrix the group's name, and the options that say how it is one."""
    return {
        name: (group["name"], {key: group[key] for key in OWN[1:] if key in group})
        for group in groups
        for name, _ in group["params"]
        if group["algorithm"] == "m3"
    }


def matrices(model, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no trainable parameter is a hidden matrix")
        return list(layouts(matrix_groups(model, **kwargs)))


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def with_head(**children):
    """Modules under their names, and a head, so that the last of them is not taken for it."""
    return nn.ModuleDict({**children, "head": nn.Linear(8, 2)})


class Holder(nn.Module):
    """A module with the given parameters, children and attributes."""

    def __init__(self, **members):
        super().__init__()
        for name, member in members.items():
            shape = isinstance(member, tuple) and all(isinstance(n, int) for n in member)
            setattr(self, name, nn.Parameter(torch.randn(member)) if shape else member)


class Conv1D(Holder):
    """As Hugging Face's: found by the names of the class and of this attribute."""

    def __init__(self, nf, nx):
        super().__init__(weight=(nx, nf), bias=(nf,), nf=nf)
