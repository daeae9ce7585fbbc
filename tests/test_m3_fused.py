"""M3 beside groups on the fused kernels, interpreted on the CPU."""

import pytest
import torch

from .helpers import clone_params, make_params, random_grads, set_grads, slow_m3
from .interpreter import interpreted

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def on_the_host():
    with interpreted():
        yield


@pytest.mark.parametrize("matrices_first", [True, False])
def test_vectors_step_on_the_kernels_beside_matrices_with_three_betas(matrices_first):
    params = make_params((6, 4), (5,))
    twins = clone_params(params)
    optimizers = []
    for ps, fused in ((params, True), (twins, None)):
        groups = [
            {"params": [ps[0]], "slow_frequency": 2},
            {"params": [ps[1]], "algorithm": "adamw", "lr": 0.03, "frequency": 2, "fused": fused},
        ]
        optimizers.append(slow_m3(groups if matrices_first else groups[::-1], lr=0.1))
    for seed in range(5):
        for ps, optimizer in zip((params, twins), optimizers):
            set_grads(ps, random_grads(ps, seed))
            optimizer.step()
    assert optimizers[0]._fused is not None and optimizers[0]._fused.served == {params[1]}
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-6)


def test_a_model_of_matrices_alone_has_nothing_for_the_kernels():
    params = make_params((6, 4))
    optimizer = slow_m3(params, lr=0.1)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1
