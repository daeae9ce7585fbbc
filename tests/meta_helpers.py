"""What the tests of learned updates share: small models, finite differences, float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nested_optim import DeepNestedOptimizer
from nested_optim.meta import learned

SMALL = {"controller_hidden_dim": 1, "momentum_hidden_dim": 1, "cms_frequencies": (1, 2, 3)}


class Net(nn.Module):
    """Two layers, smooth, with a parameter in each of several shapes."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(4, 3, dtype=dtype)
        self.gain = nn.Parameter(torch.ones((), dtype=dtype))
        self.last = nn.Linear(3, 1, dtype=dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.6 * torch.randn(p.shape, generator=generator, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gain * torch.tanh(self.first(x)))


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(100 + seed), dtype=dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - torch.sin(x.sum(-1, keepdim=True))).square().mean()


def step_on(
    optimizer: DeepNestedOptimizer, model: nn.Module, x: Tensor, told: bool = False
) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, x)
    loss.backward()
    optimizer.step(loss.detach()) if told else optimizer.step()
    return loss.detach()


def two_groups(model: Net, **of_last: Any) -> list[dict[str, Any]]:
    early = [*model.first.parameters(), model.gain]
    return [{"params": early}, {"params": list(model.last.parameters()), **of_last}]


def in_float64(optimizer: DeepNestedOptimizer, noise: float = 0.3, seed: int = 0) -> None:
    """Learned weights in float64, away from their start: where finite differences are precise."""
    first = optimizer.param_groups[0]
    learned.ensure(first, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for module in learned.modules(first):
        for part in learned.PARTS:
            first[f"{module}_{part}"] = first[f"{module}_{part}"].double()
        flat = first[f"{module}_weights"]
        flat.add_(noise * torch.randn(flat.shape, generator=generator, dtype=flat.dtype))


def snapshot(optimizer: DeepNestedOptimizer, model: nn.Module) -> Callable[[], None]:
    """A function that puts everything back to where it is now."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    values = copy.deepcopy([p.detach() for p in params])
    state = [copy.deepcopy(optimizer.state.get(p, {})) for p in params]
    first = optimizer.param_groups[0]
    kept = {key: copy.deepcopy(first[key]) for key in learned.KEYS}

    def restore() -> None:
        with torch.no_grad():
            for p, value, entries in zip(params, values, state, strict=True):
                p.copy_(value)
                optimizer.state[p] = copy.deepcopy(entries)
        first.update(copy.deepcopy(kept))

    return restore


def finite_differences(
    optimizer: DeepNestedOptimizer, run: Callable[[Callable[[], None]], Tensor], h: float = 1e-5
) -> dict[str, Tensor]:
    """The derivative of what ``run`` returns by every learned weight.

    ``run`` puts everything back and then perturbs a weight by the function that it is given.
    """
    first = optimizer.param_groups[0]
    found = {}
    for module in learned.modules(first):
        key = f"{module}_weights"
        rows = []
        for i in range(first[key].numel()):
            values = {}
            for k in (-1, 1):

                def perturb(k: int = k, i: int = i, key: str = key) -> None:
                    first[key][i] += k * h

                values[k] = float(run(perturb))
            rows.append((values[1] - values[-1]) / (2 * h))
        found[module] = torch.tensor(rows, dtype=torch.float64)
    return found


def assert_agrees(
    optimizer: DeepNestedOptimizer,
    run: Callable[[Callable[[], None]], Tensor],
    found: dict[str, Tensor],
    bound: float = 1e-6,
    h: float = 1e-5,
) -> None:
    """Gradients against finite differences along themselves and along a random direction.

    Fewer runs than ``finite_differences``, with the same ``run``.
    """
    first = optimizer.param_groups[0]
    assert set(found) == set(learned.modules(first)) and found
    generator = torch.Generator().manual_seed(0)
    for module, gradient in found.items():
        random = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        for direction in (gradient, random):
            unit = direction / direction.norm()
            values = [
                run(lambda s=s, u=unit, m=module: first[f"{m}_weights"].add_(s * h * u))
                for s in (-1, 1)
            ]
            expected = float(values[1] - values[0]) / (2 * h)
            error = abs(float(gradient @ unit) - expected) / float(gradient.norm())
            assert error <= bound, (module, error)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
