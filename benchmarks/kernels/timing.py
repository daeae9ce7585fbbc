"""Clocks: what is read, when, and how often.

On CUDA a step has three times. *Device* time is what its kernels take when the host is ahead of
the device; *host* time is what ``step()`` keeps the host busy; *wall* time is what steps in a row
take from the first call to the last kernel. The largest of the first two bounds the third.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .workload import Runner

Advance = Callable[[], None]

LONGEST_SLEEP = 0.1  # seconds; a queue holds about a thousand launches, so more gains nothing
SLEEP_MARGIN = 5e-4


@dataclass(frozen=True)
class Sampling:
    """How often a step is timed."""

    seconds: float  # per measurement, as far as the fewest steps allow
    fewest: int  # steps
    most: int
    periods: int  # at most, of a mix of frequencies


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median and deciles; one sample has no spread."""
    values = np.asarray(samples, dtype=np.float64)
    low, high = np.percentile(values, (10, 90)) if len(values) > 1 else (None, None)
    return {
        "median": float(np.median(values)),
        "p10": None if low is None else float(low),
        "p90": None if high is None else float(high),
        "samples": len(values),
    }


def steps_to_time(estimate: float, period: int, sampling: Sampling) -> int:
    """How many steps fit in the time, in whole periods."""
    affordable = sampling.seconds / max(estimate, 1e-9)
    if period == 1:
        return int(min(max(affordable, sampling.fewest), sampling.most))
    return period * int(min(max(affordable // period, 1), sampling.periods))


def per_period(samples: Sequence[float], period: int) -> list[float]:
    """Means over whole periods: the cheap steps of a window and the dear ones together."""
    means: list[float] = np.reshape(np.asarray(samples), (-1, period)).mean(axis=1).tolist()
    return means


def by_phase(samples: Sequence[float], period: int) -> list[float] | None:
    """The median time of each step within a period, where there is more than one."""
    if period == 1:
        return None
    phases: list[float] = np.median(np.reshape(np.asarray(samples), (-1, period)), axis=0).tolist()
    return phases


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads of torch on the CPU; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# CUDA


class CudaClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cycles_per_second = self._calibrate()

    def _calibrate(self) -> float:
        cycles = 20_000_000
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        start, end = self._events()
        start.record()
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        end.record()
        end.synchronize()
        return cycles / (start.elapsed_time(end) * 1e-3)

    def _events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def host(self, runner: Runner, steps: int, new_gradients: bool) -> list[float]:
        """Seconds within ``step()``, which finds the device idle.

        With ``new_gradients`` each gradient is at another address than in the step before.
        """
        samples = []
        runner.use_gradients(0)
        for turn in range(steps):
            if new_gradients:
                runner.use_gradients(turn)
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            runner.optimizer.step()
            samples.append(time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        return samples

    def on_device(
        self, runner: Runner, steps: int, host_seconds: float
    ) -> tuple[list[float], float]:
        """Seconds between two events around ``step()``, and how often the host was ahead.

        The device first idles in a kernel for longer than the host needs to enqueue the step; so
        what lies between the events holds no wait for the host. Where the first event has passed
        before the step is enqueued (more launches than the queue holds, or the optimizer waits for
        the device) the time is an upper bound.
        """
        idle = min(1.5 * host_seconds + SLEEP_MARGIN, LONGEST_SLEEP)
        cycles = int(idle * self.cycles_per_second)
        samples, ahead = [], 0
        for turn in range(steps):
            runner.use_gradients(turn)
            start, end = self._events()
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            start.record()
            runner.optimizer.step()
            end.record()
            ahead += not start.query()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e-3)
        return samples, ahead / steps

    def from_idle(self, runner: Runner, steps: int) -> list[float]:
        """Seconds between two events around ``step()`` on an idle device; gradients move.

        The first event passes at once, so this holds the host's part and the device's, as far as
        they do not overlap.
        """
        samples = []
        for turn in range(steps):
            runner.use_gradients(turn)
            start, end = self._events()
            torch.cuda.synchronize(self.device)
            start.record()
            runner.optimizer.step()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e-3)
        return samples

    def wall(self, runner: Runner, steps: int) -> list[float]:
        """Seconds per step of steps in a row, with gradients that stay where they are.

        The steps are cut into runs, each of whole periods, so that there is a spread.
        """
        run = runner.period if runner.period > 1 else max(1, steps // 5)
        samples = []
        runner.use_gradients(0)
        for _ in range(steps // run):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(run):
                runner.optimizer.step()
            torch.cuda.synchronize(self.device)
            samples.append((time.perf_counter() - start) / run)
        return samples

    def peak_extra_bytes(self, runner: Runner) -> int:
        """What a step allocates beyond what is kept, at most over a period."""
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(runner.period):
            runner.optimizer.step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def measure(self, runner: Runner, sampling: Sampling) -> dict[str, Any]:
        """All times of an optimizer that has stepped through whole periods before."""
        period = runner.period
        with no_garbage_collection():
            for _ in range(2 if period == 1 else 1):  # the first warms up
                begin = time.perf_counter()
                new = self.host(runner, period, new_gradients=True)
                estimate = (time.perf_counter() - begin) / period
            steps = steps_to_time(estimate, period, sampling)
            same = self.host(runner, steps, new_gradients=False)
            if steps > period:
                new = self.host(runner, steps, new_gradients=True)
            slowest = max(float(np.percentile(same, 98)), float(np.percentile(new, 98)))
            device, ahead = self.on_device(runner, steps, slowest)
            idle = self.from_idle(runner, steps)
            wall = self.wall(runner, steps)
        return {
            "time": spread(per_period(device, period)),
            "host_was_ahead": ahead,
            "time_by_phase": by_phase(device, period),
            "from_idle": spread(per_period(idle, period)),
            "wall": spread(wall),
            "host_new_gradients": spread(per_period(new, period)),
            "host_same_gradients": spread(per_period(same, period)),
            "peak_extra_bytes": self.peak_extra_bytes(runner),
        }


# CPU


def plan_turns(
    runners: dict[str, Runner], estimates: dict[str, float], baseline: str, sampling: Sampling
) -> tuple[int, dict[str, set[int]]]:
    """How many rounds there are, and in which each optimizer takes part.

    Whole periods of the longest mix. The baseline and the mixes take part in every round, the
    others in as many as their time allows, evenly spaced.
    """
    steps = {key: steps_to_time(estimates[key], r.period, sampling) for key, r in runners.items()}
    longest = max(r.period for r in runners.values())
    rounds = longest * max(1, max(steps.values()) // longest)
    joins = {}
    for key, runner in runners.items():
        if key == baseline or runner.period > 1:
            joins[key] = set(range(rounds))
        else:
            spaced = np.linspace(0, rounds - 1, min(steps[key], rounds)).astype(int)
            joins[key] = set(spaced.tolist())
    return rounds, joins


def measure_in_turns(
    runners: dict[str, Runner],
    joins: dict[str, set[int]],
    rounds: int,
    baseline: str,
    advance: Advance,
) -> dict[str, dict[str, Any]]:
    """Time ``step()`` of all, one step each per round, so that a busy machine slows all alike.

    Ratios to the baseline are formed within a round, or within the rounds of one period, before
    their median is taken.
    """
    seconds: dict[str, list[float]] = {key: [] for key in runners}
    relative: dict[str, list[float]] = {key: [] for key in runners}
    keys = list(runners)
    with no_garbage_collection():
        for turn in range(rounds):
            first = turn % len(keys)
            now: dict[str, float] = {}
            for key in keys[first:] + keys[:first]:
                if turn in joins[key]:
                    runner = runners[key]
                    runner.use_gradients(turn)
                    start = time.perf_counter()
                    runner.optimizer.step()
                    now[key] = time.perf_counter() - start
            for key, spent in now.items():
                seconds[key].append(spent)
                relative[key].append(now[baseline])
            advance()
    result = {}
    for key, runner in runners.items():
        period = runner.period
        times, base = (per_period(each[key], period) for each in (seconds, relative))
        result[key] = {
            "time": spread(times),
            "time_by_phase": by_phase(seconds[key], period),
            "ratio_to_baseline": spread([a / b for a, b in zip(times, base)]),
        }
    return result


# Copies


def copy_bandwidth(device: torch.device, size: int, repeats: int = 20) -> dict[str, Any]:
    """Bytes read plus bytes written per second by torch's copy of ``size`` bytes.

    On CUDA with the host ahead, as steps are timed.
    """
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    seconds = []
    for turn in range(repeats + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            spent = start.elapsed_time(end) * 1e-3
        else:
            begin = time.perf_counter()
            target.copy_(source)
            spent = time.perf_counter() - begin
        if turn >= 2:
            seconds.append(spent)
    moved = 2 * source.numel() * source.element_size()
    return {"bytes_copied": size, "bytes_per_second": spread([moved / s for s in seconds])}
