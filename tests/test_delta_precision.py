"""Products in bfloat16, the default on CUDA, train as well as products in full precision."""

import statistics

import pytest
import torch
from torch.nn import Parameter
from torch.nn import functional as F

from nested_optim import DeltaMomentum

pytest.importorskip("sklearn")
pytest.importorskip("rich")

from benchmarks.demo.stream import build_model
from benchmarks.training.digits import batches, whole

SEEDS, STEPS = range(5), 100


def digits(seed, **options):
    """The training loss of an MLP after a hundred batches of digits."""
    model, (train, _) = build_model(seed), whole(seed)
    stream, optimizer = batches(train, seed), DeltaMomentum(model.parameters(), lr=0.1, **options)
    for _ in range(STEPS):
        inputs, labels = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return F.cross_entropy(model(train[0]), train[1]).item()


def regression(seed, **options):
    """The error of a matrix on inputs whose scales span a decade, and noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs, weight, noise = (
        torch.randn(shape, generator=generator) for shape in ((256, 24), (24, 16), (256, 16))
    )
    inputs = inputs * torch.logspace(0, -1, 24)
    targets, param = inputs @ weight + 0.1 * noise, Parameter(torch.zeros(24, 16))
    optimizer = DeltaMomentum([param], lr=1.0, **options)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.mse_loss(inputs @ param, targets).backward()
        optimizer.step()
    return F.mse_loss(inputs @ param, targets).item()


@pytest.mark.parametrize("task", [digits, regression])
@pytest.mark.parametrize("normalized", [False, True])
def test_bfloat16_products_end_where_float32_s_do(task, normalized):
    losses = {
        dtype: [task(seed, normalized=normalized, product_dtype=dtype) for seed in SEEDS]
        for dtype in ("float32", "bfloat16")
    }
    plain = [task(seed, delta_rate=0.0) for seed in SEEDS]
    rounded, term = (
        statistics.mean(abs(a - b) for a, b in zip(losses["float32"], others))
        for others in (losses["bfloat16"], plain)
    )
    assert rounded <= 0.5 * statistics.stdev(losses["float32"])
    assert rounded <= 0.1 * term  # what is rounded matters here
