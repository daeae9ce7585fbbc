"""Where the time of a step goes: names, means, and what is left over."""

import pytest
import torch

from benchmarks.where import where

CPU = torch.device("cpu")


def test_the_dearest_operation_comes_first_and_the_rest_is_added_up():
    a, small = torch.randn(300, 300), torch.randn(8)

    def step():
        a @ a
        small.exp()
        small.sin()

    found = where(step, CPU, 1, most=1)
    assert list(found) == ["aten::mm", "others"]
    assert found["aten::mm"] > 0 and found["others"] > 0
    everything = where(step, CPU, 1)
    assert {"aten::mm", "aten::exp", "aten::sin"} <= set(everything) and "others" not in everything


def test_times_are_means_over_the_steps():
    a = torch.randn(300, 300)

    def work():
        for _ in range(20):
            a @ a

    assert where(work, CPU, 20)["aten::mm"] < where(work, CPU, 1)["aten::mm"] / 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_kernels_are_named():
    a = torch.randn(300, 300, device="cuda")
    found = where(lambda: a @ a, torch.device("cuda"), 1)
    assert found and not any(name.startswith("aten::") for name in found)
