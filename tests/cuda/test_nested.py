"""NestedOptimizer on a CUDA device: torch's bits, no syncs, CUDA graphs, torch.compile, AMP."""

import copy
import itertools

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Adam, AdamW

from nested_optim import NestedOptimizer

from ..helpers import assert_same_state, assert_same_tensors, make_params, random_grads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = (33, 17), (129,), ()


def cuda_params(dtype=torch.float32):
    return [Parameter(p.detach().cuda()) for p in make_params(*SHAPES, dtype=dtype)]


def set_cuda_grads(params, seed):
    cpu = [torch.empty_like(p, device="cpu") for p in params]
    for p, grad in zip(params, random_grads(cpu, seed)):
        p.grad = grad.cuda()


DTYPES = torch.float32, torch.bfloat16, torch.float64, torch.complex64


@pytest.mark.parametrize("torch_class, extra", [(AdamW, {}), (Adam, {"decoupled": False})])
@pytest.mark.parametrize(
    "dtype, path",
    [
        *itertools.product(DTYPES, [{"foreach": True}, {"foreach": False}]),
        (torch.complex64, {}),  # which the kernels leave to foreach
    ],
    ids=str,
)
def test_frequency_one_is_torch_bit_for_bit(torch_class, extra, dtype, path):
    flags = itertools.product([False, True], [False, True], [0.0, 0.1], [False, True])
    for amsgrad, maximize, weight_decay, capturable in flags:
        options = {
            "amsgrad": amsgrad,
            "maximize": maximize,
            "weight_decay": weight_decay,
            "capturable": capturable,
            **path,
        }
        params, reference_params = cuda_params(dtype), cuda_params(dtype)
        lr = torch.tensor(0.01, device="cuda") if capturable else 0.01
        optimizer = NestedOptimizer(params, lr=lr, **options, **extra)
        reference = torch_class(reference_params, lr=copy.deepcopy(lr), **options)
        for seed in range(6):
            for ps, opt in ((params, optimizer), (reference_params, reference)):
                set_cuda_grads(ps, seed)
                if seed == 3:
                    opt.param_groups[0]["lr"] = lr * 0.5
                opt.step()
        assert_same_tensors(params, reference_params)
        for p, q in zip(params, reference_params):
            for key, value in reference.state[q].items():
                assert torch.equal(optimizer.state[p][key], value), (options, key)


def build(params, **options):
    return NestedOptimizer(
        [{"params": params[:1], "frequency": 3}, {"params": params[1:], "frequency": 1}],
        **{"lr": 0.01, **options},
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"foreach": False},
        {"fused": True},
        {"capturable": True},
        {"capturable": True, "foreach": False},
        {"capturable": True, "fused": True},
        {"state_dtype": torch.float64},
    ],
    ids=str,
)
def test_windows_equal_those_on_the_cpu_and_steps_do_not_wait_for_the_device(options):
    cpu_params, params = make_params(*SHAPES), cuda_params()
    on_cpu, optimizer = build(cpu_params, foreach=False), build(params, **options)
    for seed in range(8):
        for p, grad in zip(cpu_params, random_grads(cpu_params, seed)):
            p.grad = grad
        on_cpu.step()
        set_cuda_grads(params, seed)
        torch.cuda.synchronize()
        # A state of the optimizer's that is on the device must never be read by the host. (torch's
        # for-loop without capturable reads the step, which is on the CPU there.)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(params, cpu_params):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-5, atol=1e-6)
        for key in ("step", "window_count"):
            assert optimizer.state[p][key].item() == on_cpu.state[q][key].item()
    assert optimizer.flush() == 1
    assert on_cpu.flush() == 1


@pytest.mark.parametrize(
    "path", [{}, {"foreach": False}, {"fused": True}, {"capturable": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_the_mean_is_the_cpu_s_division_on_every_path(path, dtype):
    if path.get("fused") and dtype.is_complex:
        path = {}
    cpu_params, params = make_params(*SHAPES, dtype=dtype), cuda_params(dtype)
    options = {"frequency": 3, "betas": (0.0, 0.9), "lr": 0.0}
    on_cpu = NestedOptimizer(cpu_params, foreach=False, **options)
    optimizer = NestedOptimizer(params, **options, **path)
    for seed in range(3):
        for p, q, grad in zip(params, cpu_params, random_grads(cpu_params, seed)):
            p.grad, q.grad = grad.cuda(), grad
        on_cpu.step()
        optimizer.step()
    for p, q in zip(params, cpu_params):  # with beta1 0 the first moment is the mean
        assert torch.equal(optimizer.state[p]["exp_avg"].cpu(), on_cpu.state[q]["exp_avg"])


@pytest.mark.parametrize("path", [{}, {"foreach": False}, {"fused": True}], ids=str)
def test_one_captured_graph_serves_every_phase(path):
    params, eager_params = cuda_params(), cuda_params()
    options = {"capturable": True, "lr": torch.tensor(0.01, device="cuda"), **path}
    optimizer, eager = build(params, **options), build(eager_params, **copy.deepcopy(options))
    for p in params:
        p.grad = torch.zeros_like(p)
    grads = [p.grad for p in params]

    def load(seed):
        set_cuda_grads(eager_params, seed)
        for buffer, p in zip(grads, eager_params):
            buffer.copy_(p.grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for seed in range(2):  # warm-up creates the state
            load(seed)
            optimizer.step()
            eager.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    load(2)
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(2, 12):
        load(seed)
        if seed == 6:  # a scheduler writes a tensor lr in place
            for opt in (optimizer, eager):
                for group in opt.param_groups:
                    group["lr"].fill_(0.002)
        graph.replay()
        eager.step()
    torch.cuda.synchronize()
    assert_same_tensors(params, eager_params)
    assert_same_state(optimizer, eager)


def test_hooks_are_refused_in_a_capture():
    params = cuda_params()
    optimizer = build(params, capturable=True)
    set_cuda_grads(params, 0)
    optimizer.step()
    optimizer.register_meta_update_hook(lambda _: None)
    before = [p.detach().clone() for p in params]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(graph):
        optimizer.step()
    assert_same_tensors(params, before)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_equals_the_eager_one():
    torch._dynamo.reset()
    params, eager_params = cuda_params(), cuda_params()
    optimizer, eager = build(params), build(eager_params)
    step = torch.compile(optimizer.step)
    for seed in range(8):
        for ps in (params, eager_params):
            set_cuda_grads(ps, seed)
        step()
        eager.step()
    for p, q in zip(params, eager_params):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"].item() == eager.state[q]["step"].item()


@pytest.mark.parametrize("foreach", [True, False, None])
def test_lr_zero_moves_nothing_on_a_fresh_capturable_optimizer(foreach):
    params = cuda_params()
    before = [p.detach().clone() for p in params]
    optimizer = build(params, lr=0.0, capturable=True, foreach=foreach)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_tensors(params, before)
    assert optimizer.state[params[0]]["window_count"].item() == 0


def test_resuming_inside_a_window_is_exact():
    for options in ({}, {"capturable": True}, {"fused": True}):
        params = cuda_params(torch.bfloat16)
        options = {"state_dtype": torch.float32, **options}
        optimizer = build(params, **options)
        for seed in range(4):
            set_cuda_grads(params, seed)
            optimizer.step()
        resumed_params = [Parameter(p.detach().clone()) for p in params]
        resumed = build(resumed_params, **options)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for seed in range(4, 9):
            for ps, opt in ((params, optimizer), (resumed_params, resumed)):
                set_cuda_grads(ps, seed)
                opt.step()
        assert_same_tensors(params, resumed_params)
        assert_same_state(optimizer, resumed)


@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("frequency", [1, 2])
def test_the_grad_scaler_skips_and_unscales(frequency, path):
    params = cuda_params()
    optimizer = NestedOptimizer(params, frequency=frequency, **path)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    for seed, overflow in enumerate([False, True, False]):
        optimizer.zero_grad()
        grads = [g.cuda() for g in random_grads([p.cpu() for p in params], seed)]
        scaler.scale(sum((p * g).sum() for p, g in zip(params, grads))).backward()
        if overflow:
            params[0].grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    for p in params:
        state = optimizer.state[p]
        assert (state["step"] * frequency + state["window_count"].to(p.device)).item() == 2
        assert torch.isfinite(p).all()


def test_a_model_may_live_on_two_devices():
    params = [*cuda_params()[:1], *make_params((5,))]
    optimizer = NestedOptimizer(params, frequency=2)
    for seed in range(2):
        for p, grad in zip(params, random_grads([p.cpu() for p in params], seed)):
            p.grad = grad.to(p.device)
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [1, 1]
