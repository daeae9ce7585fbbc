"""Many runs side by side, each kept as soon as it is done, so that a suite can be resumed."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch


class Job(Protocol):
    """What one run is; hashable."""

    def identity(self) -> dict[str, Any]:
        """Everything that its result depends on, as plain values."""
        ...


class Store:
    """Results by job, one JSON line each; a line that was cut off by a kill is done again.

    Args:
        path: the file, which need not be there.
        protocol: a number that changes when a job's result does, so that old ones are not reused.
    """

    def __init__(self, path: Path, protocol: int = 1) -> None:
        self.path, self.protocol = path, protocol
        self._found: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._found[_key(entry["job"])] = entry["result"]
        if text and not text.endswith("\n"):  # or the next line would join the broken one
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, job: Job) -> bool:
        return _key(self._identity(job)) in self._found

    def __getitem__(self, job: Job) -> dict[str, Any]:
        return self._found[_key(self._identity(job))]

    def add(self, job: Job, result: dict[str, Any]) -> None:
        identity = self._identity(job)
        self._found[_key(identity)] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"job": identity, "result": result}) + "\n")

    def _identity(self, job: Job) -> dict[str, Any]:
        return {**job.identity(), "protocol": self.protocol}


def _key(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)  # tuples and lists are alike here


#: A run, which stops after each of its steps and returns its result.
Run = Generator[None, None, dict[str, Any]]


def finish(run: Run) -> dict[str, Any]:
    """A run's result, all of its steps in a row."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            result: dict[str, Any] = end.value
            return result


def interleave(
    jobs: Sequence[Any], begin: Callable[[Any], Run], device: torch.device
) -> list[dict[str, Any]]:
    """The results of runs that take turns, step by step.

    On CUDA each has a stream of its own: kernels of small models leave most of a GPU idle, and
    those of several streams of one process share it, while processes are given it in turn.

    Raises:
        RuntimeError: a run failed; it is named. All are lost.
    """
    streams = [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in jobs]
    runs = {i: begin(job) for i, job in enumerate(jobs)}
    results: list[dict[str, Any]] = [{} for _ in jobs]
    while runs:
        for i, run in list(runs.items()):
            try:
                with torch.cuda.stream(streams[i]):
                    next(run)
            except StopIteration as end:
                results[i] = end.value
                del runs[i]
            except Exception as error:
                raise RuntimeError(_failure(jobs[i], error)) from error
    return results


def _failure(job: Job, error: Exception) -> str:
    return f"the run {job.identity()} failed: {type(error).__name__}: {error}"


class Pool:
    """Runs jobs in ``workers`` processes, or in this one if that is 1; one thread each.

    Args:
        work: a module's function (or a partial of one) that makes a job's result; with ``together``
            one that makes a list of results of a list of jobs.
        store: where results go.
        workers: processes side by side.
        together: how many jobs a process is given at once, None for one by one.
    """

    def __init__(
        self,
        work: Callable[[Any], Any],
        store: Store,
        workers: int,
        together: int | None = None,
    ) -> None:
        self.work, self.store, self.workers, self.together = work, store, workers, together
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            # After a failure what has not begun is not begun any more.
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def __call__(self, jobs: Iterable[Any], advance: Callable[[], Any] = lambda: None) -> None:
        """Do what is not done yet; ``advance`` is called once for each such job.

        Raises:
            RuntimeError: a job failed. What was done before is kept.
        """
        pending = [job for job in dict.fromkeys(jobs) if job not in self.store]
        if self.workers <= 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                for given in self._shared_out(pending):
                    self._keep(given, lambda given=given: self.work(given), advance)  # type: ignore[misc]
            finally:
                torch.set_num_threads(threads)
            return
        if self._pool is None:
            # Spawned, not forked: a forked child inherits torch's threads in an undefined state.
            self._pool = ProcessPoolExecutor(
                self.workers,
                multiprocessing.get_context("spawn"),
                initializer=torch.set_num_threads,
                initargs=(1,),
            )
        futures = {
            self._pool.submit(self.work, given): given for given in self._shared_out(pending)
        }
        for future in as_completed(futures):
            self._keep(futures[future], future.result, advance)

    def _shared_out(self, pending: list[Any]) -> list[Any]:
        """What a process is given at once: a job, or as many as leave work for the others."""
        if self.together is None:
            return pending
        size = max(1, min(self.together, -(-len(pending) // max(1, self.workers))))
        return [pending[at : at + size] for at in range(0, len(pending), size)]

    def _keep(self, given: Any, result: Callable[[], Any], advance: Callable[[], Any]) -> None:
        jobs = [given] if self.together is None else given
        try:
            done = result()
        except Exception as error:
            if self.together is not None:  # which of them, the error says
                raise RuntimeError(str(error)) from error
            raise RuntimeError(_failure(given, error)) from error
        for job, its in zip(jobs, [done] if self.together is None else done):
            self.store.add(job, its)
            advance()
