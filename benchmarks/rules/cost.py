"""What the rules cost: DGD beside a forward and backward pass, momentum methods beside SGD, and
what learns beside what it begins as.

The methods of a part are timed in turn, so that what else the machine does hits all alike; medians.
On CUDA times are the device's, between events. What DGD adds is measured on whole iterations,
several in a row with no wait in between, as a training loop runs them: the host then has the
device's time to launch in. The passes and the step alone, each from an idle device, are there for
information.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from nested_optim import (
    DGD,
    DeepMomentum,
    DeepNestedOptimizer,
    DeltaMomentum,
    NestedOptimizer,
    kernels,
)

from ..where import where

#: Iterations between two events.
ITERATIONS = 5
#: Steps between two events where one of them is a meta update.
PERIOD = 100
#: By the method whose iterations a method's are compared with; else SGD's.
_BASES = {"DGD, adamw": "AdamW", "DeepNestedOptimizer": "NestedOptimizer"}


class Times(NamedTuple):
    """Seconds of one iteration, of its passes, and of its step."""

    whole: float
    passes: float
    step: float


class Preset(NamedTuple):
    layers: int
    width: int
    vocabulary: int
    batch: int
    length: int


PRESETS = {
    "tiny": Preset(1, 32, 64, 2, 16),
    "small": Preset(4, 256, 512, 4, 1024),
    "gpt2": Preset(12, 768, 50304, 8, 1024),
}


class Block(nn.Module):
    """A pre-norm transformer block with the four matrices of GPT-2's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return out


class Model(nn.Module):
    """A decoder with an untied head."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.embedding = nn.Embedding(preset.vocabulary, preset.width)
        self.blocks = nn.Sequential(*(Block(preset.width) for _ in range(preset.layers)))
        self.head = nn.Linear(preset.width, preset.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embedding(tokens)))
        return out


def _model(sizes: Preset, device: str) -> Model:
    """Each time the same."""
    torch.manual_seed(0)
    with torch.device(device):  # which initialises faster than the host
        return Model(sizes)


class Clock:
    """Seconds that a call takes: the device's on CUDA."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def __call__(self, work: Callable[[], Any]) -> float:
        if not self.cuda:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
        work()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3


def measure(preset: str, device: str, seconds: float, period: int = PERIOD) -> dict[str, Any]:
    """All parts; ``seconds`` of measuring for each, and ``period`` steps per meta update."""
    sizes = PRESETS[preset]
    return {
        "preset": {"name": preset, **sizes._asdict()},
        "device": device,
        "training": _training(sizes, device, seconds),
        "steps": _steps(sizes, device, seconds),
        "period": period,
        "learned": _learned(sizes, device, seconds, period),
    }


def _training(sizes: Preset, device: str, seconds: float) -> dict[str, Any]:
    """A whole training step with DGD and without, and its parts."""
    tokens = torch.randint(sizes.vocabulary, (sizes.batch, sizes.length + 1), device=device)
    clock, on = Clock(device), torch.device(device)
    members: dict[str, tuple[Model, Optimizer]] = {}
    for name, build in _TRAINING.items():
        model = _model(sizes, device)
        members[name] = (model, build(model))

    def loss_backward(model: Model) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=clock.cuda):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()

    def iterations(model: Model, optimizer: Optimizer) -> None:
        for _ in range(ITERATIONS):
            loss_backward(model)
            optimizer.step()
            optimizer.zero_grad()

    def once(model: Model, optimizer: Optimizer) -> Times:
        passes, step = clock(lambda: loss_backward(model)), clock(optimizer.step)
        optimizer.zero_grad()
        return Times(clock(lambda: iterations(model, optimizer)) / ITERATIONS, passes, step)

    times: dict[str, list[Times]] = _in_turn(
        {n: lambda m=m: once(*m) for n, m in members.items()},  # type: ignore[misc]
        seconds,
    )
    passes = statistics.median(t.passes for t in times["SGD"])
    rows = {}
    for name, of_method in times.items():
        base = times[_BASES.get(name, "SGD")]
        whole = statistics.median(t.whole for t in of_method)
        rows[name] = {
            "whole_ms": 1e3 * whole,
            "extra_share": (whole - statistics.median(t.whole for t in base)) / passes,
            "passes_ms": 1e3 * statistics.median(t.passes for t in of_method),
            "step_ms": 1e3 * statistics.median(t.step for t in of_method),
            "where_ms": where(lambda m=members[name]: iterations(*m), on, ITERATIONS),  # type: ignore[misc]
        }
    return rows


_TRAINING: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda m: SGD(m.parameters(), lr=1e-4),
    "AdamW": lambda m: AdamW(m.parameters(), lr=1e-4),
    "DGD": lambda m: DGD(m, lr=1e-4),
    "DGD, adamw": lambda m: DGD(m, lr=1e-4, base="adamw"),
    "DGD, 256 inputs": lambda m: DGD(m, lr=1e-4, max_tokens=256),
    "DGD, all inputs": lambda m: DGD(m, lr=1e-4, max_tokens=2**24),
    "NestedOptimizer": lambda m: NestedOptimizer(m.parameters(), lr=1e-4),
    "DeepNestedOptimizer": lambda m: DeepNestedOptimizer(
        m.parameters(), lr=1e-4, fused=kernels.available(next(m.parameters()).device) or None
    ),
}


def _steps(sizes: Preset, device: str, seconds: float) -> dict[str, Any]:
    """Steps of the momentum methods on the same gradients."""
    clock = Clock(device)
    fused = {"fused": True} if clock.cuda else {}
    builds: dict[str, Callable[[Any], Optimizer]] = {
        "SGD, momentum": lambda p: SGD(p, lr=1e-4, momentum=0.9, **fused),
        "DeltaMomentum": lambda p: DeltaMomentum(p, lr=1e-4),
        "DeltaMomentum, float32 products": lambda p: DeltaMomentum(
            p, lr=1e-4, product_dtype="float32"
        ),
        "DeepMomentum": lambda p: DeepMomentum(p, lr=1e-4),
    }
    members = {}
    for name, build in builds.items():
        params = list(_model(sizes, device).parameters())
        for p in params:
            p.grad = torch.randn_like(p)
        members[name] = build(params)
    times = _in_turn({n: lambda o=o: clock(o.step) for n, o in members.items()}, seconds)  # type: ignore[misc]
    reference = statistics.median(times["SGD, momentum"])
    return {
        name: {
            "step_ms": 1e3 * statistics.median(values),
            "ratio": statistics.median(values) / reference,
            "where_ms": where(members[name].step, torch.device(device), 1),
        }
        for name, values in times.items()
    }


def _learned(sizes: Preset, device: str, seconds: float, period: int) -> dict[str, Any]:
    """Steps of what learns, the last of them with a meta update, and its state."""
    clock = Clock(device)
    builds: dict[str, Callable[[Any], Optimizer]] = {
        "NestedOptimizer": lambda p: NestedOptimizer(p, lr=1e-4)
    }
    # By foreach operations a step on CUDA takes so long that a tenth of the steps must do.
    fused = kernels.available(torch.device(device))
    paths: dict[str, tuple[dict[str, Any], int]] = {
        **({"one pass": ({"fused": True}, period)} if fused else {}),
        "foreach": ({"foreach": True}, max(1, period // 10) if fused else period),
    }
    steps = {"NestedOptimizer": period}
    for path, (how, every) in paths.items():
        for momenta, frequencies in (("one momentum", (1,)), ("three momenta", (1, 10, 100))):
            name = f"DeepNestedOptimizer, {momenta}, {path}"
            steps[name] = every
            builds[name] = partial(
                DeepNestedOptimizer,
                lr=1e-4,
                cms_frequencies=frequencies,
                meta_update_freq=every,
                **how,
            )
    rows: dict[str, dict[str, Any]] = {}
    works: dict[str, Callable[[], float]] = {}
    gc.collect()  # what was measured before: the collector would look at it again and again
    for name, build in builds.items():
        model = _model(sizes, device)
        # Without the head, which a model of this size has in common with the embedding.
        params = [p for p in model.parameters() if p is not model.head.weight]
        for p in params:
            p.grad = 1e-3 * torch.randn_like(p)
        optimizer = build(params)
        optimizer.step()
        held = [t for state in optimizer.state.values() for t in state.values()]
        count = sum(p.numel() for p in params)
        rows[name] = {
            "parameters": count,
            "steps": steps[name],
            "state_bytes_per_parameter": sum(t.nbytes for t in held) / count,
        }
        if "foreach" not in name:  # whose operations are too many to list
            few = min(period, 10)
            rows[name]["where_ms"] = where(
                lambda o=optimizer, n=few: _repeat(o.step, n),  # type: ignore[misc]
                torch.device(device),
                few,
            )
        works[name] = lambda o=optimizer, n=steps[name]: clock(lambda: _repeat(o.step, n)) / n  # type: ignore[misc]
    times = _in_turn(works, seconds)
    reference = statistics.median(times["NestedOptimizer"])
    for name, values in times.items():
        step = statistics.median(values)
        rows[name].update(step_ms=1e3 * step, ratio=step / reference)
    return rows


def _repeat(work: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        work()


def _in_turn(works: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[Any]]:
    """Each work's results, one of each in turn, at least three, after one that does not count."""
    for work in works.values():
        work()
    results: dict[str, list[Any]] = {name: [] for name in works}
    started = time.perf_counter()
    while len(results[next(iter(works))]) < 3 or time.perf_counter() - started < seconds:
        for name, work in works.items():
            results[name].append(work())
    return results


def tables(document: dict[str, Any]) -> list[Table]:
    preset, device = document["preset"], document["device"]
    size = f"{preset['layers']} layers of {preset['width']}, {preset['batch']} x {preset['length']}"
    training = Table(title=f"one training step, {size}, {device}")
    titles = "optimizer", "iteration", "extra, share of the passes", "passes alone", "step alone"
    for title in titles:
        training.add_column(title, justify="left" if title == "optimizer" else "right")
    for name, row in document["training"].items():
        training.add_row(
            name,
            f"{row['whole_ms']:.1f} ms",
            f"{100 * row['extra_share']:.0f} %",
            f"{row['passes_ms']:.1f} ms",
            f"{row['step_ms']:.1f} ms",
        )
    steps = Table(title=f"a step of the momentum methods on the same tensors, {device}")
    for title in ("optimizer", "step", "ratio to SGD"):
        steps.add_column(title, justify="left" if title == "optimizer" else "right")
    for name, row in document["steps"].items():
        steps.add_row(name, f"{row['step_ms']:.1f} ms", f"{row['ratio']:.2f}")
    count = document["learned"]["NestedOptimizer"]["parameters"] / 1e6
    learned = Table(title=f"a mean step of what learns, {count:.4g} million parameters, {device}")
    titles = "optimizer", "steps", "step", "ratio to NestedOptimizer", "state, bytes per parameter"
    for title in titles:
        learned.add_column(title, justify="left" if title == "optimizer" else "right")
    for name, row in document["learned"].items():
        state = f"{row['state_bytes_per_parameter']:.1f}"
        step = f"{row['step_ms']:.2f} ms"
        learned.add_row(name, str(row["steps"]), step, f"{row['ratio']:.2f}", state)
    return [training, steps, learned]
