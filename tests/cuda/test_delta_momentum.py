"""DeltaMomentum's kernels on a CUDA device: the rule, no waiting, and the same in CUDA graphs."""

import copy

import pytest
import torch
from torch.nn import Parameter

from nested_optim import DeltaMomentum, delta_steps, kernels, rules

from ..helpers import make_params, random_grads, step_with

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not kernels.available(torch.device("cuda")),
    reason="needs a CUDA device and Triton",
)

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# Several of a shape, alone, more rows than columns, nothing a multiple of anything, vectors.
SHAPES = (256, 512), (256, 512), (1000, 96), (33, 77), (33, 77), (8, 3, 3, 3), (1025,), (7,), ()
EPS = {F32: 2e-6, F16: 2e-3, BF16: 1.6e-2}


def on_cuda(*shapes, dtype=F32):
    return [Parameter(p.detach().cuda()) for p in make_params(*shapes, dtype=dtype)]


def grads_of(params, seed, scale=1.0):
    """The CPU's numbers, on the device."""
    on_cpu = [torch.empty(p.shape, dtype=p.dtype) for p in params]
    return [(scale * g).cuda() for g in random_grads(on_cpu, seed)]


@pytest.fixture
def launched(monkeypatch):
    """How many tensors each launch of the update had."""
    from nested_optim.kernels.delta import DeltaTable

    sizes = []
    update = DeltaTable.update

    def counted(self, part, *args, **kwargs):
        sizes.append(self.parts[part])
        update(self, part, *args, **kwargs)

    monkeypatch.setattr(DeltaTable, "update", counted)
    return sizes


def assert_near(got, want, rounding):
    for a, b in zip(got, want, strict=True):
        bound = rounding * max(float(b.abs().max()), 1.0)
        torch.testing.assert_close(a.detach().double(), b, rtol=0, atol=bound)


@pytest.mark.parametrize("product", [None, "float32"])
@pytest.mark.parametrize(
    "dtype, state", [(F32, None), (BF16, None), (F16, None), (BF16, F32), (F32, BF16)]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"normalized": True, "maximize": True}, {"weight_decay": 0.3, "decoupled": True}],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_a_step_is_the_rule_in_float64(dtype, state, product, options, scale, launched):
    params = on_cuda(*SHAPES, dtype=dtype)
    optimizer = DeltaMomentum(
        params, lr=0.1, delta_rate=0.7, product_dtype=product, state_dtype=state, **options
    )
    step_with(optimizer, params, grads_of(params, 0, scale))
    bufs = [optimizer.state[p]["momentum_buffer"].double() for p in params]
    olds, grads = [p.detach().double() for p in params], grads_of(params, 1, scale)
    step_with(optimizer, params, grads)
    assert launched == [len(SHAPES)] * 2
    want = [
        rules.delta_momentum(p, g.double(), b, lr=0.1, momentum=0.9, delta_rate=0.7, **options)
        for p, g, b in zip(olds, grads, bufs)
    ]
    kept = state or dtype
    products = F32 if product == "float32" else BF16
    found = [optimizer.state[p]["momentum_buffer"] / scale for p in params]
    rounding = max(EPS[products], EPS[kept])
    assert_near(found, [new.momentum_buffer / scale for new in want], rounding)
    assert_near(params, [new.param for new in want], max(0.1 * scale * rounding, EPS[dtype]))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("normalized", [False, True])
def test_gradients_of_every_scale_stay_in_range(scale, normalized):
    params = on_cuda(*SHAPES)
    optimizer = DeltaMomentum(params, lr=0.1, normalized=normalized, product_dtype=BF16)
    bufs = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for seed in range(2):
        grads = grads_of(params, seed, scale)
        bufs = [
            rules.delta_momentum(
                b, g.double(), b, lr=0.1, momentum=0.9, delta_rate=1.0, normalized=normalized
            ).momentum_buffer
            for b, g in zip(bufs, grads)
        ]
        step_with(optimizer, params, grads)
    found = [optimizer.state[p]["momentum_buffer"].double() / scale for p in params]
    assert_near(found, [b / scale for b in bufs], EPS[BF16])


def test_layouts_parts_and_windows_are_as_on_torch_s_operations(launched, monkeypatch):
    monkeypatch.setattr(delta_steps, "_PART_BYTES", 2**20)
    params = on_cuda(*SHAPES)
    image = torch.randn(5, 3, 4, 4, device="cuda").to(memory_format=torch.channels_last)
    shifted = torch.randn(1201, device="cuda")[1:].view(40, 30)
    params += [Parameter(image), Parameter(shifted), Parameter(torch.randn(6, 5).cuda().t())]
    twins = [Parameter(p.detach().clone()) for p in params]
    options = {"lr": 0.1, "frequency": 2, "product_dtype": "float32"}
    ours, plain = DeltaMomentum(params, **options), DeltaMomentum(twins, foreach=True, **options)
    for seed in range(6):
        grads = grads_of(params, seed)
        if seed == 3:
            grads[1] = None
        step_with(ours, params, grads)
        step_with(plain, twins, grads)
    assert launched
    torch.testing.assert_close(list(params), list(twins), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"product_dtype": F32}, {"weight_decay": 0.1}, {"capturable": True, "frequency": 3}],
    ids=str,
)
@pytest.mark.parametrize("lr_on_device", [False, True])
def test_no_step_waits_for_the_device(options, lr_on_device, launched):
    params = on_cuda(*SHAPES)
    lr = torch.tensor(0.1, device="cuda") if lr_on_device else 0.1
    optimizer = DeltaMomentum(params, lr=lr, **options)
    for seed in range(7):
        grads = grads_of(params, seed)
        # torch's for-loop, which a learning rate on the device asks for elsewhere, is not run.
        torch.cuda.set_sync_debug_mode("error" if seed else "default")
        try:
            step_with(optimizer, params, grads)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(launched) == 7
    assert all(bool(p.isfinite().all()) for p in params)


def test_a_learning_rate_on_the_device_is_the_number():
    results = []
    for lr in (0.1, torch.tensor(0.1, device="cuda")):
        params = on_cuda(*SHAPES)
        optimizer = DeltaMomentum(params, lr=lr, weight_decay=0.2, decoupled=True)
        for seed in range(3):
            step_with(optimizer, params, grads_of(params, seed))
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_are_repeated_and_see_what_changes(weight_decay, launched, monkeypatch):
    repeated = []
    repeat = delta_steps.DeltaSteps.repeat

    def noted(self, optimizer):
        repeated.append(repeat(self, optimizer))
        return repeated[-1]

    monkeypatch.setattr(delta_steps.DeltaSteps, "repeat", noted)
    options = {"lr": 0.1, "product_dtype": "float32", "weight_decay": weight_decay}
    params, twins = on_cuda(*SHAPES), on_cuda(*SHAPES)
    ours, plain = DeltaMomentum(params, **options), DeltaMomentum(twins, foreach=True, **options)
    for seed in range(9):
        if seed == 3:
            params[0].data = params[0].data.clone()
        if seed == 5:
            state = ours.state[params[2]]
            state["momentum_buffer"] = state["momentum_buffer"].clone()
        for ps, optimizer in ((params, ours), (twins, plain)):
            grads = grads_of(ps, seed)
            if seed == 7:
                grads[3] = grads[3].t().contiguous().t()
            step_with(optimizer, ps, grads)
    # The last gradients: one that lies otherwise is left to torch, and then its plan is replaced.
    assert repeated == [True, True, False, True, False, True, False, False]
    torch.testing.assert_close(list(params), list(twins), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_products_are_in_bfloat16_unless_asked_for_otherwise(options):
    results = []
    for product in (None, "bfloat16", "float32"):
        params = on_cuda(*SHAPES)
        optimizer = DeltaMomentum(params, lr=0.1, product_dtype=product, **options)
        for seed in range(2):
            step_with(optimizer, params, grads_of(params, seed))
        results.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results[:2]))
    assert not torch.equal(results[1][0], results[2][0])


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("product", [None, "float32"])
def test_a_captured_step_is_the_step(frequency, product, launched):
    options = {"capturable": True, "frequency": frequency, "product_dtype": product}
    params, twins = on_cuda(*SHAPES), on_cuda(*SHAPES)
    lr = torch.tensor(0.1, device="cuda")
    captured, plain = (DeltaMomentum(ps, lr=lr, **options) for ps in (params, twins))
    static = grads_of(params, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step_with(captured, params, static)
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        step_with(plain, twins, static)
    before = len(launched)
    for p, grad in zip(params, static):
        p.grad = grad
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    # What a window came to has other memory in the graph's pool, and its layout is the same.
    assert len(launched) == before + 1
    for seed in range(1, 8):
        grads = grads_of(params, seed)
        torch._foreach_copy_(static, grads)
        lr.fill_(0.1 / seed)
        graph.replay()
        step_with(plain, twins, grads)
    for p, twin in zip(params, twins):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)
        assert captured.state[p]["step"] == plain.state[twin]["step"]


def test_a_checkpoint_goes_on_and_a_copy_is_on_its_own():
    params = on_cuda(*SHAPES)
    optimizer = DeltaMomentum(params, lr=0.1, product_dtype=BF16)
    for seed in range(3):
        step_with(optimizer, params, grads_of(params, seed))
    twins = [Parameter(p.detach().clone()) for p in params]
    resumed = DeltaMomentum(twins, lr=0.1, product_dtype=BF16)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        grads = grads_of(params, seed)
        step_with(optimizer, params, grads)
        step_with(resumed, twins, grads)
    torch.testing.assert_close(list(params), list(twins), rtol=1e-6, atol=1e-7)


def test_every_product_is_as_good_as_its_dtype_on_a_large_matrix():
    params = on_cuda((768, 3072), (5000, 768), (2304, 768), (2304, 768))
    bufs, grads = ([torch.randn_like(p) for p in params] for _ in range(2))
    for product, rounding in (("float32", 1e-5), ("bfloat16", 1.6e-2)):
        optimizer = DeltaMomentum(params, lr=0.0, momentum=0.9, product_dtype=product)
        for p, b, g in zip(params, bufs, grads):
            optimizer.state[p]["momentum_buffer"] = b.clone()
            optimizer.state[p]["step"] = torch.tensor(1.0)
            optimizer.state[p]["window_count"] = torch.tensor(0.0)
            p.grad = g
        optimizer.step()
        for p, b, g in zip(params, bufs, grads):
            exact = rules.delta_term(b.double(), g.double(), rate=1.0, momentum=0.9)
            term = 0.9 * b.double() + g - optimizer.state[p]["momentum_buffer"]
            assert (term - exact).norm() <= rounding * exact.norm() + 1e-6 * b.norm()
