"""Every optimizer on every model: first checked, then timed."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import accounting
from .contestants import ADAMW, BASELINE, BY_KEY, Contestant, field
from .correctness import check, timed_step
from .shapes import MODELS, NamedShape, elements, equal
from .timing import CudaClock, Sampling, copy_bandwidth, measure_in_turns, plan_turns
from .workload import DTYPES, Runner, Workload, lacking_memory

Stage = Callable[[str, int], Callable[[], None]]

SCALED = ("nested", BASELINE, "torch-foreach")
TENSORS = 100  # on the curve over parameters
SLOW_STEP = 5.0  # seconds: an optimizer that takes longer is not timed


@dataclass(frozen=True)
class Settings:
    device: torch.device
    models: tuple[str, ...]
    peers: tuple[str, ...]
    dtype: str
    sampling: Sampling
    scaling: bool = False
    quick: bool = False
    patience: float = 45.0  # seconds for building and checking a peer

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def copy_size(self) -> int:
        """Far beyond any cache, but on a quick look."""
        if self.quick:
            return 1 << 26
        return 1 << (31 if self.on_cuda else 28)

    @property
    def parameter_points(self) -> tuple[int, ...]:
        if self.quick:
            return (50_000, 200_000)
        low = (1, 4, 16, 64)
        high = (256, 1024, 4096) if self.on_cuda else ()
        return tuple(n * 10**6 for n in (*low, *high))

    @property
    def tensor_points(self) -> tuple[int, ...]:
        return (10, 100) if self.quick else (10, 30, 100, 300, 1000, 3000, 10_000)

    @property
    def constant_parameters(self) -> int:
        return 200_000 if self.quick else 40_000_000

    def shapes(self, model: str) -> list[NamedShape]:
        return MODELS[model].quick() if self.quick else MODELS[model].full()


class TookTooLong(Exception):
    pass


class _Alarm(BaseException):
    """Not an Exception, which a compiler that tries many things may swallow."""


def silent(description: str, total: int) -> Callable[[], None]:
    """A stage that nobody is shown."""
    return lambda: None


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TookTooLong in the body after this long, where the system can (main thread of Unix)."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    rang = False

    def ring(number: int, frame: Any) -> None:
        nonlocal rang
        rang = True
        raise _Alarm

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except BaseException:
        # It may come back wrapped in an error of who was interrupted.
        if not rang:
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if rang:
        raise TookTooLong(f"building and checking it took more than {seconds:g} s")


def measure(settings: Settings, stage: Stage) -> dict[str, Any]:
    """All that this suite measures, as plain numbers."""
    advance = stage("copy bandwidth", 1)
    copy = copy_bandwidth(settings.device, settings.copy_size)
    _free(settings.device)
    advance()
    bandwidth = copy["bytes_per_second"]["median"]
    suite = Suite(settings, bandwidth)
    contestants = field(settings.device, settings.peers)
    missing = {c.key: c.missing() for c in contestants}
    present = [c for c in contestants if missing[c.key] is None]
    models = {}
    for name in settings.models:
        shapes = settings.shapes(name)
        entry: dict[str, Any] = {
            "summary": f"{name} in small" if settings.quick else MODELS[name].summary,
            "parameters": elements(shapes),
            "tensors": len(shapes),
        }
        models[name] = entry
        short = suite.lacking_memory(shapes, len(present), gradient_sets=2)
        if short is not None:
            entry["skipped"] = short
            continue
        results = suite.run(name, shapes, present, stage)
        entry["copy_limit_seconds"] = {
            rule: results[key]["bytes_per_step"] / bandwidth
            for rule, key in (("every_step", BASELINE), ("mix", "nested-mix"))
            if "bytes_per_step" in results[key]
        }
        entry["results"] = {
            c.key: results.get(c.key, {"status": missing[c.key]}) for c in contestants
        }
    result: dict[str, Any] = {
        "copy_bandwidth": copy,
        "missing": {key: reason for key, reason in missing.items() if reason is not None},
        "models": models,
    }
    if settings.scaling:
        result["scaling"] = suite.scaling(stage)
    return result


class Suite:
    def __init__(self, settings: Settings, bandwidth: float) -> None:
        self.settings = settings
        self.bandwidth = bandwidth
        self.dtype = DTYPES[settings.dtype]
        self.clock = CudaClock(settings.device) if settings.on_cuda else None

    def lacking_memory(
        self, shapes: Sequence[NamedShape], contestants: int, gradient_sets: int
    ) -> str | None:
        _free(self.settings.device)  # of the workload before
        # On CUDA one optimizer lives at a time; on the CPU they take turns.
        alive = 1 if self.clock else contestants
        return lacking_memory(shapes, self.dtype, self.settings.device, gradient_sets, alive)

    def run(
        self,
        name: str,
        shapes: Sequence[NamedShape],
        contestants: Sequence[Contestant],
        stage: Stage,
        gradient_sets: int = 2,
        sampling: Sampling | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Results by the contestants' keys."""
        sampling = sampling or self.settings.sampling
        workload = Workload(shapes, self.dtype, self.settings.device, gradient_sets)
        results: dict[str, dict[str, Any]] = {}
        alive: dict[str, Runner] = {}
        estimates: dict[str, float] = {}
        advance = stage(name if self.clock else f"{name}: checks", len(contestants))
        for contestant in contestants:
            result = results[contestant.key] = {"status": "failed"}
            runner = None
            begin = time.perf_counter()
            try:
                runner, estimates[contestant.key] = self._check(contestant, workload, result)
                if runner is not None and self.clock is not None:
                    result |= self.clock.measure(runner, sampling)
                    result["status"] = "timed"
                elif runner is not None:
                    alive[contestant.key] = runner
            except Exception as error:  # is this contestant's result; the others go on
                result["status"] = _explain(error)
            result["seconds_spent"] = time.perf_counter() - begin
            del runner
            if self.clock is not None:
                _free(self.settings.device)
            advance()
        if self.clock is not None and results[BASELINE]["status"] == "timed":
            # Timed twice, first and last: less than they differ by is noise.
            runner = Runner(BY_KEY[BASELINE], workload, ADAMW)
            results[BASELINE]["time_again"] = self.clock.measure(runner, sampling)["time"]
        if BASELINE in alive:
            rounds, joins = plan_turns(alive, estimates, BASELINE, sampling)
            advance = stage(f"{name}: rounds", rounds)
            for key, times in measure_in_turns(alive, joins, rounds, BASELINE, advance).items():
                results[key] |= {"status": "timed", **times}
        for key in alive:
            if results[key]["status"] != "timed":
                results[key]["status"] = f"not timed: {BASELINE} was not"
        self._complete(results)
        return results

    def _check(
        self, contestant: Contestant, workload: Workload, result: dict[str, Any]
    ) -> tuple[Runner | None, float]:
        """The optimizer, if it may be timed (if not, the result says why), and a step's seconds."""
        unfit = contestant.unfit(workload.shapes)
        if unfit is not None:
            result["status"] = unfit
            return None, 0.0
        # What a peer compiles may take minutes.
        patience = contextlib.nullcontext() if contestant.own else self._patience()
        with patience:
            runner = Runner(contestant, workload, ADAMW)
            if contestant.is_adamw:
                seen = check(runner)
                seconds = seen.seconds_per_step
            else:  # nothing to compare it with; its first step allocates
                seen = None
                runner.use_gradients(0)
                seconds = [timed_step(runner) for _ in range(2)][-1]
        result |= {
            "parameters": sum(p.numel() for p in runner.params),
            "check": seen and {**asdict(seen), "passed": seen.passed},
            "bytes_per_step": accounting.mean_step_bytes(runner),
            "state_bytes": accounting.state_bytes(runner),
        }
        if seen is not None and not seen.passed:
            result["status"] = f"wrong: error {seen.error:.1e}, more than {seen.tolerance:g}"
        elif seconds > SLOW_STEP:
            result["status"] = f"not timed: a step takes {seconds:.1f} s"
        else:
            return runner, seconds
        return None, seconds

    def _patience(self) -> contextlib.AbstractContextManager[None]:
        return time_limit(self.settings.patience)

    def _complete(self, results: dict[str, dict[str, Any]]) -> None:
        """What follows from the times."""
        base = results[BASELINE].get("time")
        for result in results.values():
            if result["status"] != "timed":
                continue
            seconds = result["time"]["median"]
            result["share_of_copy_bandwidth"] = result["bytes_per_step"] / seconds / self.bandwidth
            if base is not None and "ratio_to_baseline" not in result:
                # Timed one after the other: a ratio of medians has no spread.
                ratio = {"median": seconds / base["median"], "p10": None, "p90": None}
                result["ratio_to_baseline"] = {**ratio, "samples": 1}

    def scaling(self, stage: Stage) -> dict[str, Any]:
        """Time against the number of parameters, and against the number of tensors."""
        settings = self.settings
        total = settings.constant_parameters
        curves = {
            "parameters": [(n, min(TENSORS, n)) for n in settings.parameter_points],
            "tensors": [(total, n) for n in settings.tensor_points],
        }
        contestants = [BY_KEY[key] for key in SCALED]
        # Half the time per point: a curve has many.
        full = settings.sampling
        sampling = Sampling(full.seconds / 2, full.fewest, full.most, full.periods)
        result: dict[str, Any] = {}
        for name, points in curves.items():
            advance = stage(f"scaling: {name}", len(points))
            result[name] = []
            for parameters, tensors in points:
                shapes = equal(parameters, tensors)
                point: dict[str, Any] = {"parameters": elements(shapes), "tensors": tensors}
                short = self.lacking_memory(shapes, len(contestants), gradient_sets=1)
                if short is not None:
                    point["skipped"] = short
                else:
                    point["results"] = self.run(
                        name, shapes, contestants, silent, gradient_sets=1, sampling=sampling
                    )
                result[name].append(point)
                advance()
        return result


def _explain(error: Exception) -> str:
    if isinstance(error, TookTooLong):
        _end_compilers()
        return f"not timed: {error}"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:200]}"


def _end_compilers() -> None:
    """torch.compile's helpers would go on working while others are timed."""
    with contextlib.suppress(Exception):
        from torch._inductor.async_compile import shutdown_compile_workers

        shutdown_compile_workers()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def own_failures(results: dict[str, Any]) -> list[str]:
    """Which of NestedOptimizer's paths were wrong or failed, and where."""
    found = []
    for name, model in results["models"].items():
        for key, result in model.get("results", {}).items():
            bad = str(result["status"]).startswith(("wrong", "failed"))
            if bad and BY_KEY[key].own:
                found.append(f"{BY_KEY[key].label} on {name}: {result['status']}")
    return found
