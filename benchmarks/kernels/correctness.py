"""Before anything is timed: is it the AdamW that it says it is?

The reference is the rule itself in float64, with windows averaged here by hand. It follows a few
slices of a few tensors (the first, last and largest elements among them): the rule knows no
neighbours, so the optimizer runs on whole models while the reference stays small.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from nested_optim import rules

from .contestants import ADAMW
from .workload import Runner

# Standard deviation of the parameters, and how far the largest difference may be from the largest
# movement. Parameters in bfloat16 are small, or rounding would swallow the updates; in float32
# they are large, or nobody would see the weight decay.
PRECISION = {torch.float32: (0.5, 2e-3), torch.bfloat16: (2e-3, 0.1)}
# Gradients whose means are no larger than this let eps be seen, and thus whether a window was
# averaged or summed: Adam does not tell 2 g from g otherwise.
GRADIENT_SIZE = 1e-6
SLICE = 1024
UPDATES = 10


@dataclass(frozen=True)
class Check:
    error: float
    tolerance: float
    max_abs_difference: float
    steps: int
    seconds_per_step: float  # over the last period

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass
class _Follower:
    """The reference on slices of one parameter."""

    param: Parameter
    frequency: int
    slices: list[slice]
    start: Tensor
    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    window: Tensor
    held: int = 0
    updates: int = 0

    @property
    def finished(self) -> bool:
        return self.updates >= UPDATES

    def read(self, tensor: Tensor) -> Tensor:
        flat = tensor.view(-1)
        return torch.cat([flat[part] for part in self.slices]).double()

    def advance(self, grad: Tensor) -> None:
        self.window = self.window + grad
        self.held += 1
        if self.held < self.frequency:
            return
        self.updates += 1
        state = rules.adamw(
            self.value,
            self.window / self.held,
            self.exp_avg,
            self.exp_avg_sq,
            step=self.updates,
            **ADAMW,
        )
        self.value, self.exp_avg, self.exp_avg_sq = state.param, state.exp_avg, state.exp_avg_sq
        self.window = torch.zeros_like(self.window)
        self.held = 0

    def difference(self) -> tuple[float, float]:
        """Relative to the largest movement so far, and absolute."""
        apart = float((self.read(self.param) - self.value).abs().max())
        moved = float((self.value - self.start).abs().max())
        if moved == 0:  # no update yet: not a bit may have changed
            return (0.0 if apart == 0 else math.inf), apart
        return apart / moved, apart


@torch.no_grad()
def check(runner: Runner) -> Check:
    """Step the optimizer through whole periods, following the reference.

    For frequency 1 these are 10 steps, for a mix one period. The slices that are followed get new
    gradients at each step; the others keep theirs.
    """
    dtype = runner.params[0].dtype
    spread, tolerance = PRECISION[dtype]
    size = GRADIENT_SIZE if runner.contestant.eps_is_added else 1.0
    generator = torch.Generator(runner.device).manual_seed(1)
    followers = {i: _follow(runner, i, spread, generator) for i in _sampled(runner)}
    steps = runner.period * math.ceil(UPDATES / runner.period)
    seconds = []
    error = absolute = 0.0
    for step in range(steps):
        runner.use_gradients(step)
        for i, follower in followers.items():
            grad: Any = runner.params[i].grad
            flat = grad.view(-1)
            for part in follower.slices:
                flat[part].normal_(0.5 * size, size, generator=generator)
            if not follower.finished:
                follower.advance(follower.read(grad))
        seconds.append(timed_step(runner))
        for i, follower in list(followers.items()):
            relative, apart = follower.difference()
            # NaN must not get lost in a maximum.
            error = max(error, math.inf if math.isnan(relative) else relative)
            absolute = max(absolute, math.inf if math.isnan(apart) else apart)
            if follower.finished:
                del followers[i]
    return Check(error, tolerance, absolute, steps, fmean(seconds[-runner.period :]))


def timed_step(runner: Runner) -> float:
    """Take a step and return about how long it took."""
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    begin = time.perf_counter()
    runner.optimizer.step()
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    return time.perf_counter() - begin


def _sampled(runner: Runner) -> list[int]:
    """The first, the last, the largest and the smallest parameter of each frequency."""
    chosen: set[int] = set()
    for frequency in set(runner.frequencies):
        at = [i for i, f in enumerate(runner.frequencies) if f == frequency]
        sizes = [runner.params[i].numel() for i in at]
        chosen |= {at[0], at[-1], at[sizes.index(max(sizes))], at[sizes.index(min(sizes))]}
    return sorted(chosen)


def _follow(runner: Runner, at: int, spread: float, generator: torch.Generator) -> _Follower:
    flat = runner.params[at].detach().view(-1)
    size = flat.numel()
    middle = max(0, size // 2 - SLICE // 2)
    if size <= 3 * SLICE:
        slices = [slice(0, size)]
    else:
        slices = [slice(a, a + SLICE) for a in (0, middle, size - SLICE)]
    for part in slices:
        flat[part].normal_(0, spread, generator=generator)
    start = torch.cat([flat[part] for part in slices]).double()
    zeros = torch.zeros_like(start)  # never written to
    param, frequency = runner.params[at], runner.frequencies[at]
    return _Follower(param, frequency, slices, start, start, zeros, zeros, zeros)
