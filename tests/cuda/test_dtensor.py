"""FSDP2 on a CUDA device: the kernels step the shards."""

import os
import socket

import pytest
import torch
from torch import nn

from nested_optim import NestedOptimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", 0),
    )
    os.environ.setdefault("LOCAL_RANK", "0")
    yield
    torch.distributed.destroy_process_group()


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 5)).cuda()


def test_sharded_parameters_step_on_the_kernels_as_whole_ones_do(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cuda", (1,))
    whole, sharded = make_model(), make_model()
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    optimizers = [
        NestedOptimizer(
            [
                {"params": model[0].parameters(), "frequency": 3},
                {"params": model[2].parameters()},
            ],
            lr=0.01,
        )
        for model in (whole, sharded)
    ]
    for seed in range(8):
        torch.manual_seed(seed)
        inputs = torch.randn(4, 33, device="cuda")
        for model, optimizer in zip((whole, sharded), optimizers):
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(whole.parameters(), sharded.parameters()):
        torch.testing.assert_close(p, q.full_tensor(), rtol=1e-6, atol=1e-7)
    served = optimizers[1]._fused.served
    assert all(p in served for p in sharded.parameters())
