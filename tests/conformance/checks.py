"""What the conformance tests share: cases, parameters, gradients and exact comparison."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing._internal.common_utils import TestCase

from .infos import INFOS, Info

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

needs_cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device")

#: Implementations that train parameters which require a gradient.
TRAINABLE = ("forloop", "foreach", "fused")
EVERY = (*TRAINABLE, "differentiable")

#: For the torch helpers that assert through a test case.
torch_case = TestCase()


@dataclass(frozen=True)
class Case:
    """A class with options and an implementation, on a device."""

    info: Info
    device: str
    path: str
    desc: str
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.info.name}-{self.device}-{self.path}-{self.desc}"

    @property
    def frequency(self) -> int:
        """Steps per update."""
        return int(self.kwargs.get("frequency", 1))

    def build(self, params: Iterable[Any], **overrides: Any) -> Optimizer:
        """The optimizer, with options of its own (a tensor lr is not shared)."""
        return self.info.optim_cls(params, **{**deepcopy(self.kwargs), **overrides})

    def params(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
        """One parameter per shape; equal seeds give equal values on every device.

        A differentiable optimizer writes to its parameters under autograd, so there they are
        constants whose gradients the checks assign.
        """
        params = make_params(self.info, self.device, dtype, seed)
        for p in params:
            p.requires_grad_(self.path != "differentiable")
        return params


def _flags(info: Info, device: str, path: str) -> dict[str, bool] | None:
    """The implementation flags that ask for `path`; None where the class has no such path."""
    flags = {flag: flag == path for flag in info.supported_impls}
    if path == "fused" and device not in info.supports_fused_on:
        return None
    return flags if path == "forloop" or path in flags else None


def cases(*paths: str, dtype: torch.dtype | None = None) -> list[Case]:
    """Every input of every class on every device, with each of these implementations."""
    found = []
    for info in INFOS:
        for device in DEVICES:
            for path in paths:
                flags = _flags(info, device, path)
                if flags is None:
                    continue
                for entry in info.optim_inputs_func(device, dtype):
                    kwargs = {**entry.kwargs, **flags}
                    found.append(Case(info, device, path, entry.desc or "default", kwargs))
    return found


def each_case(
    *paths: str,
    where: Callable[[Case], bool] = lambda case: True,
    dtype: torch.dtype | None = None,
) -> pytest.MarkDecorator:
    """Run the test for each case of these implementations that `where` lets through."""
    chosen = [case for case in cases(*paths, dtype=dtype) if where(case)]
    return pytest.mark.parametrize("case", chosen, ids=str)


def each_class(*paths: str) -> pytest.MarkDecorator:
    """Run the test for each class's first input, per implementation (default: the for-loop)."""
    chosen: dict[tuple[str, str, str], Case] = {}
    for case in cases(*(paths or ("forloop",))):
        chosen.setdefault((case.info.name, case.device, case.path), case)
    return pytest.mark.parametrize("case", list(chosen.values()), ids=str)


@functools.cache
def _normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def seeded(shape: Sequence[int], seed: int, dtype: torch.dtype, device: Any) -> Tensor:
    """Normal values that depend on the seed alone, not on the device."""
    return _normal(tuple(shape), seed, dtype).clone().to(device)


def make_params(
    info: Info, device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Parameter]:
    return [
        Parameter(seeded(shape, 1000 * seed + i, dtype, device))
        for i, shape in enumerate(info.shapes)
    ]


def set_gradients(params: Iterable[Tensor], step: int) -> None:
    """Give each parameter the gradient of this step, a fresh tensor."""
    for i, p in enumerate(params):
        p.grad = seeded(p.shape, 7919 * (step + 1) + i, p.dtype, p.device)


def train(optimizer: Optimizer, params: Sequence[Tensor], steps: Iterable[int] = range(6)) -> None:
    """Steps on each step's own gradients, which are cleared in between."""
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()


def copies(params: Iterable[Tensor]) -> list[Parameter]:
    """Parameters of equal values."""
    return [Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]


def state_of(optimizer: Optimizer, params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The state of each parameter, in the order of `params`."""
    return [dict(optimizer.state.get(p, {})) for p in params]


def everything(optimizer: Optimizer, params: Sequence[Tensor]) -> dict[str, Any]:
    """A copy of all that a step may change."""
    return {
        "params": [p.detach().clone() for p in params],
        "state": deepcopy(state_of(optimizer, params)),
        "param_groups": deepcopy(optimizer.state_dict()["param_groups"]),
    }


def assert_same(actual: Any, expected: Any, where: str = "", exact: bool = True) -> None:
    """Equal to the last bit: tensors by dtype, device and value, containers entry by entry.

    With ``exact=False``, tensors may differ by rounding.
    """
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{where}: {actual!r} is no tensor"
        assert actual.dtype == expected.dtype, f"{where}: {actual.dtype}, not {expected.dtype}"
        assert actual.device == expected.device, f"{where}: on {actual.device}"
        if exact:
            assert torch.equal(actual, expected), f"{where}:\n{actual}\nis not\n{expected}"
        else:
            torch.testing.assert_close(actual, expected)
    elif isinstance(expected, Mapping):
        assert list(actual.keys()) == list(expected.keys()), f"{where}: {list(actual)}"
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]", exact)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{where}: {len(actual)} for {len(expected)}"
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, f"{where}[{i}]", exact)
    else:
        assert type(actual) is type(expected), f"{where}: {actual!r} for {expected!r}"
        assert actual == expected, f"{where}: {actual!r} for {expected!r}"


def assert_trains_alike(
    first: tuple[Optimizer, Sequence[Tensor]],
    second: tuple[Optimizer, Sequence[Tensor]],
    steps: Iterable[int] = range(6),
    exact: bool = True,
) -> None:
    """Two optimizers that get equal gradients keep equal parameters and state, to the last bit."""
    for step in steps:
        for optimizer, params in (first, second):
            train(optimizer, params, [step])
        values = ([p.detach() for p in params] for _, params in (first, second))
        assert_same(*values, f"step {step}: params", exact)
        assert_same(state_of(*first), state_of(*second), f"step {step}: state", exact)
    assert all(bool(torch.isfinite(p).all()) for p in first[1])
