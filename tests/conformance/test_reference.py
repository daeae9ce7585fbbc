"""A class that stands in for a torch optimizer is that optimizer, to the last bit."""

from __future__ import annotations

import inspect
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import Optimizer

from .checks import DEVICES, assert_same, make_params, set_gradients, state_of
from .infos import INFOS, Info, Reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)

#: lr before and after the change in mid-run, as a number or in a tensor.
RATES = (0.02, 0.005)


class Flags(NamedTuple):
    path: str
    lr: str
    dtype: torch.dtype
    weight_decay: float
    maximize: bool
    amsgrad: bool

    def __str__(self) -> str:
        words = [self.path, self.lr, str(self.dtype).removeprefix("torch.")]
        words += ["decay"] if self.weight_decay else []
        return "-".join([*words, *(key for key in ("maximize", "amsgrad") if getattr(self, key))])

    def kwargs(self, device: str, optim_cls: type[Optimizer]) -> dict[str, Any]:
        """Those of the options that torch's class has."""
        kwargs: dict[str, Any] = {
            "lr": self.rate(RATES[0]),
            "weight_decay": self.weight_decay,
            "maximize": self.maximize,
            "amsgrad": self.amsgrad,
            "eps": 1e-6,
            "foreach": self.path == "foreach",
            "differentiable": self.path == "differentiable",
            "capturable": device == "cuda" and self.lr != "number",
        }
        if self.lr == "tensor betas":
            kwargs["betas"] = (torch.tensor(0.85), torch.tensor(0.99))
        known = inspect.signature(optim_cls).parameters
        return {key: value for key, value in kwargs.items() if key in known}

    def suits(self, optim_cls: type[Optimizer]) -> bool:
        """Whether torch's class has all that these flags are about."""
        known = inspect.signature(optim_cls).parameters
        return not (self.amsgrad and "amsgrad" not in known) and not (
            self.lr == "tensor betas" and "betas" not in known
        )

    def rate(self, value: float) -> Any:
        return value if self.lr == "number" else torch.tensor(value)


def every_flag(device: str) -> list[Flags]:
    combinations = itertools.product(
        ("forloop", "foreach", "differentiable"),
        ("number", "tensor", "tensor betas"),
        DTYPES,
        (0.0, 0.1),
        (False, True),
        (False, True),
    )
    found = [Flags(*combination) for combination in combinations]
    # Foreach takes tensors as hyperparameters if capturable, and nothing on the CPU is.
    found = [f for f in found if device == "cuda" or f.path != "foreach" or f.lr == "number"]
    return [f for f in found if f.lr != "tensor betas" or not f.maximize]


def matrix() -> list[Any]:
    return [
        pytest.param(
            info,
            reference,
            device,
            flags,
            id=f"{info.name}-{reference.optim_cls.__name__}-{device}-{flags}",
        )
        for info in INFOS
        for reference in info.references
        for device in DEVICES
        for flags in every_flag(device)
        if flags.suits(reference.optim_cls)
    ]


@pytest.mark.parametrize(("info", "reference", "device", "flags"), matrix())
def test_parameters_and_state_equal_the_reference_to_the_last_bit(
    info: Info, reference: Reference, device: str, flags: Flags
) -> None:
    kwargs = flags.kwargs(device, reference.optim_cls)
    ours = make_params(info, device, flags.dtype)
    theirs = make_params(info, device, flags.dtype)
    for p in [*ours, *theirs]:
        p.requires_grad_(flags.path != "differentiable")
    optimizer = info.optim_cls(ours, **kwargs, **reference.options)
    torch_optimizer = reference.optim_cls(theirs, **kwargs)
    for step in range(12):
        if step == 6:
            for group in (*optimizer.param_groups, *torch_optimizer.param_groups):
                group["lr"] = flags.rate(RATES[1])
        for params in (ours, theirs):
            set_gradients(params, step)
            if step in (4, 8):
                params[step // 4].grad = None
        optimizer.step()
        torch_optimizer.step()
        assert_same([p.detach() for p in ours], [p.detach() for p in theirs], f"step {step}")
    keys: set[str] = set()
    if "betas" in torch_optimizer.defaults:
        keys = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if flags.amsgrad else set())
    for own, state in zip(
        state_of(optimizer, ours), state_of(torch_optimizer, theirs), strict=True
    ):
        expected = {key: value for key, value in state.items() if value is not None}
        assert expected.keys() == keys
        assert_same({key: own[key] for key in expected}, expected)
    assert all(bool(torch.isfinite(p).all()) for p in ours)
