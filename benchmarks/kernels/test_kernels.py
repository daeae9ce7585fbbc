"""One step under pytest-benchmark: ``pytest benchmarks/kernels --benchmark-only``.

Whatever device is there, on few models; ``python -m benchmarks kernels`` measures more. A mix of
frequencies runs a whole period, one step per round: compare means.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from . import machine
from .contestants import ADAMW, OWN, PEERS, Contestant
from .correctness import check
from .shapes import MODELS
from .timing import threads
from .workload import Runner, Workload

DEVICE = machine.pick_device("auto")
TIMED = [c for c in (*OWN, *PEERS) if c.device_type in (None, DEVICE.type) and c.is_adamw]
ROUNDS = 30


@pytest.fixture(scope="module", autouse=True)
def one_thread_on_cpu() -> Iterator[None]:
    with threads(1 if DEVICE.type == "cpu" else None):  # the models are small there
        yield


@pytest.fixture(scope="module", params=["gpt2", "resnet", "tiny"])
def workload(request: pytest.FixtureRequest) -> Workload:
    model = MODELS[request.param]
    shapes = model.full() if DEVICE.type == "cuda" else model.quick()
    return Workload(shapes, torch.float32, DEVICE)


@pytest.mark.parametrize("contestant", TIMED, ids=lambda c: c.key)
def test_step(benchmark, request, workload: Workload, contestant: Contestant):
    reason = contestant.missing() or contestant.unfit(workload.shapes)
    if reason is not None:
        pytest.skip(reason)
    runner = Runner(contestant, workload, ADAMW)
    assert check(runner).passed
    runner.use_gradients(0)

    def step() -> None:
        runner.optimizer.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = request.node.callspec.params["workload"]
    benchmark.pedantic(step, rounds=max(ROUNDS, runner.period), iterations=1)
