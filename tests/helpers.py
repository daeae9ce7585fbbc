"""Small pieces that several test files share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from nested_optim import M3


def make_params(
    *shapes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(tuple(s), generator=generator, dtype=dtype)) for s in shapes]


def slow_m3(params: Any, **options: Any) -> M3:
    """M3 with its slow momentum, which is off by default."""
    return M3(params, **{"alpha": 0.25, **options})


def clone_params(params: Sequence[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def random_grads(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for p, grad in zip(params, grads):
        p.grad = None if grad is None else grad.clone()


def step_with(optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Any]) -> None:
    """One step on these gradients, which are cleared afterwards as trainers do."""
    set_grads(params, grads)
    optimizer.step()
    optimizer.zero_grad()


def train(optimizer: Optimizer, params: Sequence[Tensor], seeds: Sequence[int]) -> None:
    for seed in seeds:
        step_with(optimizer, params, random_grads(params, seed))


def assert_same_tensors(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), f"tensor {i} differs by {(a - b).abs().max()}"


def assert_same_state(left: Optimizer, right: Optimizer) -> None:
    """Both optimizers hold the same state for their parameters, in order, to the last bit."""
    for group_a, group_b in zip(left.param_groups, right.param_groups, strict=True):
        for p, q in zip(group_a["params"], group_b["params"], strict=True):
            a, b = left.state[p], right.state[q]
            assert a.keys() == b.keys()
            for key in a:
                assert a[key].dtype == b[key].dtype, key
                assert torch.equal(a[key], b[key]), key


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Everything an optimizer holds, copied: to show that a refused call changed nothing."""
    groups = [
        {
            k: [(id(p), p.detach().clone()) for p in v] if k == "params" else v
            for k, v in group.items()
        }
        for group in optimizer.param_groups
    ]
    state = {
        id(p): {k: v.clone() if isinstance(v, Tensor) else v for k, v in entries.items()}
        for p, entries in optimizer.state.items()
    }
    return {"groups": groups, "state": state}


def assert_unchanged(optimizer: Optimizer, before: dict[str, Any]) -> None:
    new, new_spec = tree_flatten(snapshot(optimizer))
    old, old_spec = tree_flatten(before)
    assert new_spec == old_spec
    for a, b in zip(new, old):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b
