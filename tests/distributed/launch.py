"""Ranks for the distributed tests, and the small model that they train.

Ranks are processes that meet over loopback and run one scenario at a time. Importing torch takes
longer than most scenarios, so a module's tests share one set of ranks, which are forked from a
process that has imported it where the system can. After a failure they are ended, whatever they are
waiting for, and the next scenario gets new ones.

A rank that a signal ended crashed in native code, torch's or gloo's, as this project has none: seen
once in thousands of scenarios (glibc on a damaged heap), and not again under valgrind or malloc's
checks. Its scenario is run once more, with a warning that holds where every thread was.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nested_optim import NestedOptimizer

START_SECONDS = 120.0
SCENARIO_SECONDS = 60.0
_AFTER_FAILURE_SECONDS = 3.0  # for the other ranks to say what they know
_BACKSTOP_SECONDS = 5.0  # a rank ends itself when its time is up; this much later it is ended

_LOOPBACK = {"darwin": "lo0", "linux": "lo"}


class RankError(AssertionError):
    """A scenario failed, died or hung on some rank; the message holds what each rank said.

    Attributes:
        crashed: whether a signal ended a rank that had not been told to end.
    """

    def __init__(self, message: str, crashed: bool = False) -> None:
        super().__init__(message)
        self.crashed = crashed


class Ranks:
    """``world_size`` processes in one gloo process group, started when first needed."""

    def __init__(self, world_size: int = 2) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: Path | None = None

    def run(
        self, scenario: Callable[..., None], *args: Any, timeout: float = SCENARIO_SECONDS
    ) -> None:
        """Call ``scenario(*args)``, a module's function, on every rank and wait for all of them.

        Raises:
            RankError: a rank raised, ended or was not done after ``timeout`` seconds; the message
                says where. All ranks have been ended.
        """
        try:
            self._run(scenario, args, timeout)
        except RankError as error:
            if not error.crashed:
                raise
            warnings.warn(f"run again after a crash:\n{error}", stacklevel=2)
            self._run(scenario, args, timeout)

    def _run(self, scenario: Callable[..., None], args: tuple[Any, ...], timeout: float) -> None:
        try:
            if not self._processes:
                self._start()
            for pipe in self._pipes:
                pipe.send((scenario, args, timeout))
            self._collect(scenario.__name__.lstrip("_"), timeout)
        except BaseException:  # a test's own time limit too: the ranks are in the middle of it
            self.stop()
            raise

    def stop(self) -> None:
        """End the processes and remove their files."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        context: Any = multiprocessing.get_context("spawn")
        if sys.platform == "linux":
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(
                ["torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"]
            )
        for rank in range(self.world_size):
            here, there = context.Pipe()
            self._pipes.append(here)
            process = context.Process(
                target=_serve,
                args=(rank, self.world_size, str(self._folder), there),
                name=f"rank {rank}",
                daemon=True,
            )
            process.start()
            self._processes.append(process)
            there.close()
        self._collect("the start of the ranks", START_SECONDS)

    def _collect(self, what: str, timeout: float) -> None:
        """Wait until each rank has reported once; on anything but success end all and raise."""
        deadline = time.monotonic() + timeout + _BACKSTOP_SECONDS
        reports: dict[int, str | None] = {}
        reason = ""
        crashed = False
        while len(reports) < self.world_size:
            pending = {self._pipes[r]: r for r in range(self.world_size) if r not in reports}
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                reason = reason or f"not done after {timeout:g} s"
                break
            for pipe in ready:
                rank = pending[pipe]  # type: ignore[index]
                try:
                    reports[rank] = self._pipes[rank].recv()
                except (EOFError, OSError):
                    self._processes[rank].join(1)
                    code = self._processes[rank].exitcode
                    crashed = crashed or (code or 0) < 0  # minus the signal's number
                    reports[rank] = f"the process ended, exit code {code}"
                if reports[rank] is not None and not reason:
                    reason = f"failed on rank {rank}"
                    deadline = min(deadline, time.monotonic() + _AFTER_FAILURE_SECONDS)
        if reason:
            message = [f"{what}: {reason}"]
            for rank in range(self.world_size):
                report = reports.get(rank, "had not reported when it was ended")
                message.append(f"--- rank {rank}: {report or 'passed'}")
                message.append(self._output(rank))
            raise RankError("\n".join(message), crashed)

    def _output(self, rank: int) -> str:
        assert self._folder is not None
        path = _log_path(self._folder, rank)
        text = path.read_text(errors="replace").strip()[-4000:] if path.exists() else ""
        return f"--- rank {rank} printed:\n{text}" if text else f"--- rank {rank} printed nothing"


@contextmanager
def started(world_size: int = 2) -> Iterator[Ranks]:
    """Ranks for the time of a ``with``."""
    ranks = Ranks(world_size)
    try:
        yield ranks
    finally:
        ranks.stop()


def _log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    """What a rank does: join the group, then run what it is sent until the other end is gone."""
    faulthandler.dump_traceback_later(START_SECONDS, exit=True)
    log = os.open(_log_path(Path(folder), rank), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()  # where a crash in native code happened
    if sys.platform in _LOOPBACK:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo ranks work on the CPU, whatever is there
        os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK[sys.platform]
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(Path(folder) / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=START_SECONDS),
        )
        dist.barrier()
        faulthandler.cancel_dump_traceback_later()
        pipe.send(None)
        while True:
            try:
                scenario, args, timeout = pipe.recv()
            except EOFError:
                return
            faulthandler.dump_traceback_later(timeout, exit=True)
            torch.manual_seed(0)
            scenario(*args)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(None)
    except BaseException:
        pipe.send(traceback.format_exc())
        time.sleep(_AFTER_FAILURE_SECONDS)  # a closed connection would fail the others differently


# ---------------------------------------------------------------------- what the scenarios train

FREQUENCIES = {"first": 1, "middle": 3, "last": 2}


class Net(nn.Module):
    """Three layers. On two ranks their 7 rows split unevenly, and ``last`` leaves rank 1 none."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(5, 7, dtype=dtype)
            self.middle = nn.Linear(7, 7, dtype=dtype)
            self.last = nn.Linear(7, 1, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))
        return y


def sharded(model: Net) -> Net:
    """The model after FSDP2 has replaced its parameters by DTensors."""
    for layer in (model.first, model.middle, model.last, model):
        fully_shard(layer)
    return model


def levels(model: nn.Module, frequencies: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """A param group per layer, each at its own frequency, with parameters' and groups' names."""
    return [
        {
            "params": [(n, p) for n, p in model.named_parameters() if n.startswith(f"{layer}.")],
            "frequency": frequency,
            "name": layer,
        }
        for layer, frequency in (frequencies or FREQUENCIES).items()
    ]


def give_gradients(model: nn.Module, step: int) -> None:
    """Gradients that depend on ``step`` and the parameter only, however it is sharded."""
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if isinstance(param, DTensor):
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
        else:
            param.grad = grad


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Optimizer steps with the gradients of these step numbers, cleared after each."""
    for step in steps:
        give_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    """A copy of the tensor, put together from all ranks' shards if it is a DTensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter and state tensor by name."""
    tensors = {}
    for name, param in model.named_parameters():
        tensors[name] = whole(param)
        for key, value in sorted(optimizer.state.get(param, {}).items()):
            tensors[f"{name} {key}"] = whole(value)
    return tensors


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """The same entries, dtypes and bits."""
    assert actual.keys() == expected.keys(), f"{what}: {actual.keys() ^ expected.keys()}"
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, f"{what}: {name} is {actual[name].dtype}"
        assert torch.equal(actual[name], tensor), f"{what}: {name} is {actual[name]}, not {tensor}"


def assert_near(
    actual: dict[str, Tensor], expected: dict[str, Tensor], what: str, tolerance: float = 1e-6
) -> None:
    """The same entries and dtypes, and values that differ by rounding."""
    assert actual.keys() == expected.keys(), f"{what}: {actual.keys() ^ expected.keys()}"
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name],
            tensor,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{what}: {name}: {text}",
        )


def assert_fresh_state_dict_is_no_gradient(model: nn.Module, optimizer: NestedOptimizer) -> None:
    """Taking a state dict, which steps a fresh optimizer to make its state, shifts no window."""
    hooked: list[int] = []
    optimizer.register_meta_update_hook(lambda _: hooked.append(1))
    before = snapshot(model, optimizer)
    options = StateDictOptions(full_state_dict=True)
    state: Any = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    assert not hooked, "a meta update hook ran"
    after = snapshot(model, optimizer)
    assert_same({name: after[name] for name in before}, before, "weights")
    for name, _ in model.named_parameters():
        frequency = FREQUENCIES[name.split(".")[0]]
        assert after[f"{name} window_count"] == 0, name
        assert ("window_sum" in state[name]) == (frequency > 1), name
        if frequency > 1:
            assert not after[f"{name} window_sum"].any(), name

    updated_at: dict[str, list[int]] = {name: [] for name in before}
    for step in range(6):
        take_steps(model, optimizer, range(step, step + 1))
        now = snapshot(model, optimizer)
        for name in before:
            if not torch.equal(now[name], after[name]):
                updated_at[name].append(step + 1)
        after = now
    for name, steps in updated_at.items():
        frequency = FREQUENCIES[name.split(".")[0]]
        assert steps == list(range(frequency, 7, frequency)), name
    assert len(hooked) == 6
