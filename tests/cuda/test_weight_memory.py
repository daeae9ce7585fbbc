"""A weight memory on a CUDA device: the CPU's numbers, skipped steps, CUDA graphs, no syncs."""

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import Parameter

from nested_optim import NestedOptimizer, WeightMemory

from ..helpers import assert_same_tensors, clone_params, make_params, random_grads, set_grads

exchange = pytest.importorskip("nested_optim.kernels.exchange")
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


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("counts", ["host", "capturable", "scaled"])
def test_an_exchange_waits_for_nothing(counts, dtype):
    params = on_cuda(make_params(*SHAPES))
    optimizer = torch.optim.AdamW(params, lr=0.1, fused=True)
    WeightMemory(optimizer, (1, 2), capturable=counts == "capturable", dtype=dtype)
    step(optimizer, params, 0)
    if counts == "scaled":  # as a GradScaler leaves them
        optimizer.grad_scale = torch.ones((), device="cuda")
        optimizer.found_inf = torch.zeros((), device="cuda")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("frequencies", [(2,), (2, 3, 6)])
def test_steps_counted_on_the_device_take_one_launch(frequencies, monkeypatch):
    """Whether or not anything is due; what there is to exchange is looked up once."""
    launched = []
    real = exchange.ExchangeTable.launch_due

    def counting(self, *args):
        launched.append(self.n_tensors)
        real(self, *args)

    monkeypatch.setattr(exchange.ExchangeTable, "launch_due", counting)
    monkeypatch.setattr(exchange.ExchangeTable, "launch", None)
    params = on_cuda(make_params(*SHAPES))
    optimizer = torch.optim.AdamW(params, lr=0.1, fused=True)
    memory = WeightMemory(optimizer, frequencies, 0.3, 0.2, capturable=True)
    looks = []
    pairs = memory._pairs
    monkeypatch.setattr(memory, "_pairs", lambda: (looks.append(1), pairs())[1])
    for seed in range(7):
        step(optimizer, params, seed)
    assert launched == [len(SHAPES)] * 7
    assert len(looks) == 1


@pytest.mark.parametrize("counts", ["host", "device"])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, NestedOptimizer])
def test_narrow_copies_draw_nothing_that_stands_still(cls, counts):
    params = on_cuda(make_params(*SHAPES))
    before = clone_params(params)
    optimizer = cls(params, lr=0.0, weight_decay=0.0)
    options = {"dtype": "bfloat16", "capturable": counts == "device"}
    memory = WeightMemory(optimizer, (1, 2), 0.3, 0.4, **options)
    for seed in range(5):
        step(optimizer, params, seed)
    assert_same_tensors(params, before)
    assert_same_tensors(memory.weights(-1), [p.detach().bfloat16() for p in before])


@pytest.mark.parametrize("counts", ["host", "device"])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, NestedOptimizer])
@pytest.mark.parametrize("how", ["load", "off", "clear", "detach"])
def test_copies_that_are_gone_give_their_memory_back(how, cls, counts):
    size = 1 << 20
    params = on_cuda(make_params((size,)))
    optimizer = cls(params, lr=0.1)
    memory = WeightMemory(optimizer, (1, 2), 0.3, 0.2, capturable=counts == "device")

    def allocated():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    for seed in range(3):
        step(optimizer, params, seed)
    before = allocated()
    copies = 2 * 4 * size
    if how == "load":
        for _ in range(3):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for seed in range(3):
                step(optimizer, params, seed)
        assert abs(allocated() - before) < copies // 4
    elif how == "clear":
        optimizer.state.clear()
        for seed in range(3):
            step(optimizer, params, seed)
        assert abs(allocated() - before) < copies // 4
    else:
        if how == "detach":
            memory.detach()
        else:
            optimizer.param_groups[0]["memory_frequencies"] = ()
        for seed in range(2):
            step(optimizer, params, seed)
        assert abs(before - allocated() - copies) < copies // 4


def test_what_a_graph_reads_is_kept_for_it():
    params = on_cuda(make_params(*SHAPES))
    optimizer = torch.optim.AdamW(params, lr=0.1, capturable=True)
    WeightMemory(optimizer, (1,), 0.3, 0.2)
    for seed in range(3):
        step(optimizer, params, seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    kept = [weakref.ref(optimizer.state[p]["memory_1"]) for p in params]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert all(ref() is not None for ref in kept)


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
