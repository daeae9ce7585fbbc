"""The paper's toy problem (arXiv 2512.24695, Eq. 53): a curved valley, and how fast it is crossed.

``psi(r, t) = r^2 + k (r - t + a sin(w r))^2`` from (-3.5, 2). The paper prints one picture and no
constants, so many are tried here. Every method gets the same number of configurations, drawn from
the same ranges; Delta Momentum has one number more to choose with them. A configuration
*arrives* at the first step from which psi stays below 1e-3 until the end.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from nested_optim import DeltaMomentum

START = (-3.5, 2.0)
ARRIVED = 1e-3
#: A user's number of tries; "expected" figures are the best of so many random configurations.
TRIES = 16
#: Logarithmic: learning rate, 1 - momentum, delta rate.
RANGES = {"lr": (1e-5, 1.0), "one_minus_momentum": (3e-3, 1.0), "delta_rate": (1e-5, 1e3)}
#: k, a, w: how steep the valley is, how far it swings, how often.
_SWINGS = ((0.0, 1.0), (1.0, 1.0), (1.0, 3.0), (2.0, 2.0))
LANDSCAPES = [(k, a, w) for a, w in _SWINGS for k in (1.0, 10.0, 100.0)]


class Method(NamedTuple):
    label: str
    momentum: bool
    delta: bool
    normalized: bool
    colour: str


METHODS = {
    "gradient": Method("gradient descent", False, False, False, "#999999"),
    "momentum": Method("momentum", True, False, False, "#D55E00"),
    "delta": Method("Delta Momentum", True, True, False, "#0072B2"),
    "normalized": Method("Delta Momentum, normalized", True, True, True, "#009E73"),
}


class Configs(NamedTuple):
    """One entry per configuration."""

    lr: Tensor
    momentum: Tensor
    delta_rate: Tensor


def psi(point: Tensor, landscape: tuple[float, float, float]) -> Tensor:
    """The value at points ``(..., 2)``."""
    k, a, w = landscape
    r, t = point.unbind(-1)
    return r**2 + k * (r - t + a * torch.sin(w * r)) ** 2


def gradient(point: Tensor, landscape: tuple[float, float, float]) -> Tensor:
    """The gradient at points ``(..., 2)``."""
    k, a, w = landscape
    r, t = point.unbind(-1)
    off = 2 * k * (r - t + a * torch.sin(w * r))
    return torch.stack([2 * r + off * (1 + a * w * torch.cos(w * r)), -off], -1)


def draw(method: Method, count: int, seed: int) -> Configs:
    """Configurations spread evenly (a Sobol sequence) over what the method has to choose."""
    dims = 1 + method.momentum + method.delta
    spread = torch.quasirandom.SobolEngine(dims, scramble=True, seed=seed).draw(count).double()

    def between(column: Tensor, key: str) -> Tensor:
        low, high = map(math.log, RANGES[key])
        return torch.exp(low + (high - low) * column)

    zeros = torch.zeros(count, dtype=torch.float64)
    momentum = 1 - between(spread[:, 1], "one_minus_momentum") if method.momentum else zeros
    rate = between(spread[:, 2], "delta_rate") if method.delta else zeros
    return Configs(between(spread[:, 0], "lr"), momentum, rate)


def simulate(
    configs: Configs, normalized: bool, landscape: tuple[float, float, float], steps: int
) -> Tensor:
    """Steps until each configuration arrives; infinite where it does not.

    The rule of ``DeltaMomentum`` on a vector, for all configurations at once, in float64.
    """
    lr, momentum, rate = (values[:, None] for values in configs)
    point = torch.tensor(START, dtype=torch.float64).repeat(len(lr), 1)
    buf = torch.zeros_like(point)
    last_outside = torch.zeros(len(lr), dtype=torch.float64)
    for step in range(1, steps + 1):
        grad = gradient(point, landscape)
        square = (grad**2).sum(-1, keepdim=True)
        bounded = rate / (1 + rate) / square if normalized else rate / (momentum + rate * square)
        # 0 / 0 where there is no gradient or neither momentum nor rate: nothing to forget.
        forget = torch.nan_to_num(momentum * bounded, nan=0.0, posinf=0.0)
        buf = momentum * buf - forget * (buf * grad).sum(-1, keepdim=True) * grad + grad
        point = point - lr * buf
        inside = psi(point, landscape) < ARRIVED  # false for NaN
        last_outside[~inside] = step
    return torch.where(last_outside < steps, last_outside + 1, math.inf)


def run_optimizer(
    options: dict[str, Any], landscape: tuple[float, float, float], steps: int
) -> tuple[Tensor, Tensor]:
    """``DeltaMomentum`` itself: the points ``(steps + 1, 2)`` and psi at each."""
    point = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = DeltaMomentum([point], **options)
    path = [point.detach().clone()]
    for _ in range(steps):
        point.grad = gradient(point.detach(), landscape)
        optimizer.step()
        path.append(point.detach().clone())
    points = torch.stack(path)
    return points, psi(points, landscape)


def arrival(values: Tensor) -> float:
    """The first step from which all values are below the threshold; infinite if the last is not."""
    outside = (~(values < ARRIVED)).nonzero()
    first = int(outside[-1]) + 1 if len(outside) else 0
    return float(first) if first < len(values) else math.inf


def expected_best(steps: Tensor, tries: int, never: float) -> float:
    """The mean of the smallest of ``tries`` random entries (with replacement)."""
    ordered = steps.clamp(max=never).sort().values
    left = torch.arange(len(ordered), -1, -1, dtype=torch.float64) / len(ordered)
    chance = left[:-1] ** tries - left[1:] ** tries  # that the i-th is the smallest drawn
    return float((chance * ordered).sum())


def measure(
    count: int, steps: int, seeds: int, console: Console
) -> dict[str, dict[str, dict[str, Any]]]:
    """``results[landscape][method]``: medians over the draws, each draw's figures, the best run."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for landscape in track(LANDSCAPES, description="landscapes", console=console):
        of_methods = results[", ".join(f"{x:g}" for x in landscape)] = {}
        for key, method in METHODS.items():
            draws = []
            for seed in range(seeds):
                configs = draw(method, count, seed)
                found = simulate(configs, method.normalized, landscape, steps)
                at = int(found.argmin())
                options = {name: float(values[at]) for name, values in configs._asdict().items()}
                draws.append(
                    {
                        "best": float(found[at]),
                        "expected": expected_best(found, TRIES, steps),
                        "share": float(torch.isfinite(found).double().mean()),
                        "best_options": {**options, "normalized": method.normalized},
                    }
                )
            first = min(draws, key=lambda figures: figures["best"])["best_options"]
            of_methods[key] = {
                **{
                    name: statistics.median(figures[name] for figures in draws)
                    for name in ("best", "expected", "share")
                },
                "draws": draws,
                "best_options": first,
                # The same by the optimizer: roundings differ, so a chaotic path may too.
                "best_by_optimizer": arrival(run_optimizer(first, landscape, steps)[1]),
            }
    return results


def verdict(results: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """On how many landscapes each form of Delta Momentum does better, equal or worse."""
    found: dict[str, Any] = {"landscapes": len(results)}
    for key in ("delta", "normalized"):
        found[key] = {}
        for figure, more_is_better in (("best", False), ("expected", False), ("share", True)):
            pairs = [(r[key][figure], r["momentum"][figure]) for r in results.values()]
            better = sum((d > m) if more_is_better else (d < m) for d, m in pairs)
            worse = sum((d < m) if more_is_better else (d > m) for d, m in pairs)
            found[key][figure] = {"better": better, "worse": worse}
    return found


def sentence(verdict: dict[str, Any]) -> str:
    """The verdict in words."""
    lines = []
    for key in ("delta", "normalized"):
        counts = ", ".join(
            f"{name} {verdict[key][figure]['better']} ({verdict[key][figure]['worse']} worse)"
            for figure, name in (
                ("best", "best configuration"),
                ("expected", f"best of {TRIES} tries"),
                ("share", "share that arrives"),
            )
        )
        label = METHODS[key].label
        lines.append(
            f"{label} is better than momentum, of {verdict['landscapes']} landscapes: {counts}"
        )
    return "\n".join(lines)
