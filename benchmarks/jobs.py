"""Many runs side by side, each kept as soon as it is done, so that a suite can be resumed."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable
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


class Pool:
    """Runs jobs in ``workers`` processes, or in this one if that is 1; one thread each.

    Args:
        work: a module's function (or a partial of one) that makes a job's result.
        store: where results go.
        workers: processes side by side.
    """

    def __init__(self, work: Callable[[Any], dict[str, Any]], store: Store, workers: int) -> None:
        self.work, self.store, self.workers = work, store, workers
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
                for job in pending:
                    self._keep(job, lambda job=job: self.work(job))  # type: ignore[misc]
                    advance()
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
        futures = {self._pool.submit(self.work, job): job for job in pending}
        for future in as_completed(futures):
            self._keep(futures[future], future.result)
            advance()

    def _keep(self, job: Job, result: Callable[[], dict[str, Any]]) -> None:
        try:
            done = result()
        except Exception as error:
            raise RuntimeError(
                f"the run {job.identity()} failed: {type(error).__name__}: {error}"
            ) from error
        self.store.add(job, done)
