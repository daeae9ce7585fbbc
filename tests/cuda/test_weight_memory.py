"""A weight memory on a CUDA device: the CPU's numbers, skipped steps, CUDA graphs, no syncs."""

import copy

import pytest
import torch
from torch.nn import Parameter

from nested_optim import NestedOptimizer, WeightMemory

from ..helpers import assert_same_tensors, clone_params, make_params, random_grads, set_grads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = (1030, 17), (129,), ()
CLASSES = {
    "AdamW": lambda ps, **o: torch.optim.AdamW(ps, lr=0.1, **o),
    "NestedOptimizer": lambda ps, **o: NestedOptimizer(ps, lr=0.1, **o),
    "SGD": lambda ps, **o: torch.optim.SGD(ps, lr=torch.tensor(0.1), **o),
}


def on_cuda(params):
    return [Parameter(p.detach().cuda()) for p in params]


def step(optimizer, params, seed):
    cpu = [torch.empty_like(p, device="cpu") for p in params]
    set_grads(params, [g.to(params[0].device) for g in random_grads(cpu, seed)])
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("counts", ["host", "device"])
def test_it_does_what_it_does_on_the_cpu(name, dtype, counts):
    cpu = make_params(*SHAPES, dtype=dtype)
    cuda = on_cuda(cpu)
    memories = []
    for ps in (cpu, cuda):
        optimizer = CLASSES[name](ps)
        capturable = counts == "device" and ps is cuda
        memories.append(WeightMemory(optimizer, (2, 4), 0.3, 0.4, capturable=capturable))
        for seed in range(9):
            step(optimizer, ps, seed)
    assert memories[1].optimizer.state[cuda[0]]["memory_count"].is_cuda == (counts == "device")
    for k in range(3):
        torch.testing.assert_close(
            [t.cpu() for t in memories[1].weights(k)], memories[0].weights(k), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("cls", [torch.optim.AdamW, NestedOptimizer])
def test_a_step_that_a_scaler_skips_on_the_device_does_not_count(cls):
    params = on_cuda(make_params(*SHAPES))
    twins = clone_params(params)
    memories = []
    for ps, skips in ((params, True), (twins, False)):
        optimizer = cls(ps, lr=0.1, fused=True)
        memories.append(WeightMemory(optimizer, (2,), 0.4, 0.3))
        scaler = torch.amp.GradScaler("cuda", init_scale=1.0)
        for seed in range(7):
            cpu = [torch.empty_like(p, device="cpu") for p in ps]
            set_grads(ps, [g.cuda() for g in random_grads(cpu, seed)])
            if seed in (0, 3):
                if not skips:
                    continue
                ps[0].grad[0, 0] = torch.inf
            scaler.scale(torch.zeros((), device="cuda"))
            scaler.step(optimizer)
            scaler.update(1.0)
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(memories[0].weights(1), memories[1].weights(1), rtol=1e-6, atol=1e-6)
    assert memories[0].optimizer.state[params[0]]["memory_count"].item() == 5


@pytest.mark.parametrize("cls", [torch.optim.AdamW, NestedOptimizer])
def test_one_captured_graph_serves_every_exchange(cls):
    params = on_cuda(make_params(*SHAPES))
    twins = clone_params(params)
    optimizer, eager = (cls(ps, lr=0.1, capturable=True) for ps in (params, twins))
    memory, other = (WeightMemory(o, (2, 4), 0.3, 0.4) for o in (optimizer, eager))
    grads = [torch.empty_like(p) for p in params]
    for p, g in zip(params, grads):
        p.grad = g

    def load(seed):
        cpu = [torch.empty_like(p, device="cpu") for p in params]
        for g, value in zip(grads, random_grads(cpu, seed)):
            g.copy_(value)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in range(3):
            load(seed)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(3, 12):
        load(seed)
        graph.replay()
    for seed in range(12):
        step(eager, twins, seed)
    torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(memory.weights(-1), other.weights(-1), rtol=1e-5, atol=1e-6)


def test_counting_on_the_host_cannot_be_captured():
    params = on_cuda(make_params((8,)))
    optimizer = NestedOptimizer(params, lr=0.1, capturable=True)
    WeightMemory(optimizer, (2,), capturable=False)
    for seed in range(2):  # the first one makes the copies
        step(optimizer, params, seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(graph):
        optimizer.step()


@pytest.mark.parametrize("capturable", [False, True])
def test_an_exchange_waits_for_nothing(capturable):
    params = on_cuda(make_params(*SHAPES))
    optimizer = torch.optim.AdamW(params, lr=0.1, fused=True)
    WeightMemory(optimizer, (1, 2), capturable=capturable)
    step(optimizer, params, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_memory_resumes_on_the_device():
    params = on_cuda(make_params(*SHAPES, dtype=torch.bfloat16))
    twins = clone_params(params)
    optimizer, resumed = (torch.optim.AdamW(ps, lr=0.1, fused=True) for ps in (params, twins))
    for o in (optimizer, resumed):
        WeightMemory(o, (2,), capturable=True)
    for seed in range(3):
        step(optimizer, params, seed)
    with torch.no_grad():
        for p, q in zip(twins, params):
            p.copy_(q)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it shares tensors
    assert resumed.state[twins[0]]["memory_1"].dtype == torch.float32
    for seed in range(3, 8):
        step(optimizer, params, seed)
        step(resumed, twins, seed)
    assert_same_tensors(params, twins)
