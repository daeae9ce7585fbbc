"""The fused kernels on CUDA devices: exactness, layouts, graphs, compilation, scaling, waiting."""

import contextlib
import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import Parameter

from nested_optim import NestedOptimizer, rules

from ..helpers import assert_same_state, assert_same_tensors, assert_unchanged, snapshot
from ..test_kernels import (
    BF16,
    F16,
    F32,
    F64,
    Twins,
    assert_any_layout_trains_as_contiguous_memory_does,
    assert_kahan_sum_follows_float32_where_plain_training_stalls,
    gradients,
    seeded,
    three_levels,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

MANY = 100_000_000  # cycles that a device waits: some hundredths of a second


def on_cuda(*shapes, dtype=F32, device="cuda"):
    return [Parameter(seeded(shape, i, dtype, device)) for i, shape in enumerate(shapes)]


def give_grads(params, seed):
    for p, grad in zip(params, gradients(params, seed)):
        p.grad = grad


@pytest.fixture
def no_waiting():
    """Within it, whatever makes the host wait for the device is an error."""

    class NoWaiting:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    yield NoWaiting()
    torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------- exactness


def random_shapes(seed, number=9):
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(10 ** (4.5 * torch.rand((), generator=generator))) for _ in range(number)]
    return [(n,) if i % 2 else (n // 7 + 1, 7) for i, n in enumerate(sizes)]


def largest_errors(optimizer, params, steps):
    """Of updates against the rule in float64, from where each began: parameters, moments.

    Parameters' errors are relative to themselves or the learning rate, moments' to the largest.
    """
    group = optimizer.param_groups[0]
    options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    frequencies = {p: g["frequency"] for g in optimizer.param_groups for p in g["params"]}
    worst = torch.zeros(3, dtype=F64, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for step in range(1, steps + 1):
        expected = []
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, device="cuda").to(p.dtype)
            state, f = optimizer.state.get(p), frequencies[p]
            if step % f:
                continue
            total = p.grad.to(torch.promote_types(p.dtype, F32))
            kept = [p, p * 0, p * 0]
            if state:
                kept = [p, state["exp_avg"], state["exp_avg_sq"]]
            if f > 1:
                total = (state["window_sum"] + total) / torch.tensor(float(f), device="cuda")
            old = [t.detach().to(F64, copy=True) for t in kept]
            new = rules.adamw(old[0], total.to(F64), *old[1:], step=step // f, **options)
            expected.append((p, new[:3]))
        optimizer.step()
        for p, right in expected:
            state = optimizer.state[p]
            found = p, state["exp_avg"], state["exp_avg_sq"]
            sizes = [right[0].abs().clamp(min=options["lr"]), *(t.abs().max() for t in right[1:])]
            errors = [((a.detach() - b).abs() / c).max() for a, b, c in zip(found, right, sizes)]
            worst = worst.maximum(torch.stack(errors))
    return worst[0].item(), worst[1:].max().item()


@pytest.mark.parametrize(
    "dtype, moments, steps, bounds",
    [
        (F32, F32, 1000, (1e-6, 6e-7)),
        (F64, F64, 100, (1e-12, 1e-12)),
        (BF16, F32, 1000, (1 / 250, 6e-7)),
        (F16, F32, 300, (1 / 2000, 6e-7)),
        (BF16, BF16, 300, (1 / 250, 1 / 250)),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_kernels_are_as_exact_as_the_for_loop(dtype, moments, steps, bounds, seed):
    found = []
    for path in ({}, {"foreach": False}):
        params = on_cuda(*random_shapes(seed), dtype=dtype)
        options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, "state_dtype": moments}
        optimizer = NestedOptimizer(three_levels(params), **options, **path)
        found.append(largest_errors(optimizer, params, steps))
    for kernel, loop, bound in zip(*found, bounds):
        assert kernel <= bound
        assert kernel <= 2 * loop + 1e-7


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": "sum", "amsgrad": True},
        {"decoupled": False, "weight_decay": 0.1, "maximize": True},
        {"betas": (0.0, 0.9), "kahan_sum": True},
    ],
    ids=str,
)
def test_levels_equal_the_for_loop_s_step_by_step(dtype, options):
    params = on_cuda((300, 7), (5,), (), (1025,), (0, 2), (64,), dtype=dtype)
    wide = None if dtype == F64 else F32
    twins = Twins(params, three_levels, state_dtype=wide, **{"lr": 1e-3, **options})
    twins.train(range(21))
    twins.set_options(2, frequency=4)
    twins.train(range(21, 30))
    assert twins.kernels.flush() == twins.loop.flush() > 0
    twins.assert_alike()


@pytest.mark.parametrize("frequency", [1, 2])
def test_any_layout_trains_as_contiguous_memory_does(frequency):
    assert_any_layout_trains_as_contiguous_memory_does(Twins, "cuda", frequency=frequency)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_kahan_sum_follows_float32_where_plain_training_stalls(dtype):
    assert_kahan_sum_follows_float32_where_plain_training_stalls(dtype, {}, "cuda")


def test_thousands_of_tiny_tensors_train_as_on_foreach():
    shapes = [(i % 40,) for i in range(3000)]
    params, others = on_cuda(*shapes), on_cuda(*shapes)
    optimizer = NestedOptimizer(three_levels(params))
    foreach = NestedOptimizer(three_levels(others), foreach=True)
    for seed in range(12):
        for optimizer_, ps in ((optimizer, params), (foreach, others)):
            generator = torch.Generator("cuda").manual_seed(seed)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            optimizer_.step()
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for key in ("step", "window_count"):
            assert optimizer.state[p][key].item() == foreach.state[q][key].item()


def test_a_tensor_of_more_than_2_31_elements_is_updated_to_its_end():
    n = 2**31 + 2**20 + 5
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of free memory")
    places = torch.randint(0, n, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    places = torch.tensor([0, 2**31 - 1, 2**31, n - 513, n - 2, n - 1, *places], device="cuda")
    param = Parameter(torch.empty(n, dtype=BF16, device="cuda").normal_())
    start = param.detach()[places]
    sample = Parameter(start.clone())
    optimizers = [NestedOptimizer([p], lr=0.1, frequency=2) for p in (param, sample)]
    param.grad = torch.empty_like(param).normal_()
    for factor in (1.0, -0.25):
        param.grad.mul_(factor)
        sample.grad = param.grad[places]
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(param.detach()[places], sample.detach(), rtol=1 / 128, atol=1e-6)
    assert (sample != start).float().mean() > 0.9


# ---------------------------------------------------------------------- devices


@two_devices
def test_parameters_on_another_device_than_the_current_one_are_updated():
    torch.cuda.set_device(0)
    Twins(on_cuda((1000,), (3,), device="cuda:1"), frequency=2).train(range(5))
    assert torch.cuda.current_device() == 0


@two_devices
def test_parameters_on_two_devices_are_updated():
    params = [*on_cuda((1000,), (3,)), *on_cuda((70,), (2, 3), device="cuda:1")]
    Twins(params, three_levels).train(range(11))


def test_the_path_may_change_in_mid_run():
    twins = Twins(on_cuda((300,), (3,)), frequency=3)
    for seed, foreach in enumerate([None, True, True, None, None, False, None, True]):
        twins.kernels.param_groups[0]["foreach"] = foreach
        twins.train([seed])


def test_checkpoints_go_from_the_cpu_to_the_kernels_and_back():
    on_cpu, params = on_cuda((300,), (3,), device="cpu"), on_cuda((300,), (3,))
    first = NestedOptimizer(on_cpu, frequency=3)
    second = NestedOptimizer(params, frequency=3)
    for seed in range(4):
        give_grads(on_cpu, seed)
        first.step()
    for p, q in zip(params, on_cpu):
        p.data.copy_(q)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(4, 8):
        for optimizer, ps in ((first, on_cpu), (second, params)):
            give_grads(ps, seed)
            optimizer.step()
    first.load_state_dict(copy.deepcopy(second.state_dict()))
    for p, q in zip(params, on_cpu):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-5, atol=1e-6)
        assert first.state[q]["step"].item() == second.state[p]["step"].item() == 2
        assert first.state[q]["window_count"].item() == 2


# ---------------------------------------------------------------------- waiting and memory


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": torch.tensor(0.01)}, {"kahan_sum": True, "amsgrad": True}, {"capturable": True}],
    ids=str,
)
def test_a_step_does_not_wait_for_the_device(options, no_waiting):
    if "lr" in options:
        options = {"lr": options["lr"].cuda()}
    params = [*on_cuda((300, 70), (5,), ()), *on_cuda((9,), (70,), (1000,), dtype=BF16)]
    optimizer = NestedOptimizer(three_levels(params), **options)
    keep = []
    for seed in range(300):
        keep.append([torch.full_like(p, 0.5 + seed) for p in params])
        for i, (p, grad) in enumerate(zip(params, keep[-1])):
            p.grad = None if seed % 7 == i else grad
        if seed % 5 == 0:
            optimizer.param_groups[1]["weight_decay"] = 0.01 * seed
        # While a parameter has no state, an lr on the device is looked at: is it 0?
        makes_state = "lr" in options and seed < 2
        with contextlib.nullcontext() if makes_state else no_waiting:
            optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("options", [{}, {"state_dtype": F32, "kahan_sum": True}], ids=str)
def test_a_step_takes_no_memory(options):
    params = on_cuda(*[(2**20,)] * 8, dtype=BF16)
    optimizer = NestedOptimizer(three_levels(params), **options)
    keep = []  # so that no gradient is where another was
    for seed in range(12):
        keep.append([torch.full_like(p, 0.1 * seed) for p in params])
        for p, grad in zip(params, keep[-1]):
            p.grad = grad
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        torch.cuda.synchronize()
        if seed > 1:
            assert torch.cuda.max_memory_allocated() - before < 2**20


def test_hundreds_of_steps_may_wait_for_the_device():
    twins = Twins(on_cuda((600,), (3,)), frequency=2)
    twins.train(range(2))
    grads = [gradients(twins.params, seed) for seed in range(400)]
    torch.cuda.synchronize()
    torch.cuda._sleep(MANY)
    for each in grads:
        for p, grad in zip(twins.params, each):
            p.grad = grad
        twins.kernels.step()
    for each in grads:
        for p, grad in zip(twins.members[1], each):
            p.grad = grad
        twins.loop.step()
    for p, q in zip(*twins.members):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def replace_a_state_tensor(optimizer, seed):
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["exp_avg"] = state["exp_avg"].clone()


def switch_an_option(optimizer, seed):
    optimizer.param_groups[0]["amsgrad"] = seed % 2 == 1


def add_a_group(optimizer, seed):
    (late,) = on_cuda((5,))
    late.grad = torch.ones_like(late)
    optimizer.add_param_group({"params": [late]})


@pytest.mark.parametrize("change", [replace_a_state_tensor, switch_an_option, add_a_group])
def test_tables_made_anew_leave_waiting_steps_alone(change):
    twins = Twins(on_cuda((600,), (3,)), frequency=2)
    twins.train(range(2))
    grads = [gradients(twins.params, seed) for seed in range(2, 12)]
    torch.cuda.synchronize()
    for optimizer, params in zip(twins.both, twins.members):
        torch.cuda._sleep(MANY)
        for seed, each in enumerate(grads):
            change(optimizer, seed)
            for p, grad in zip(params, each):
                p.grad = grad
            optimizer.step()
    twins.assert_alike()


def test_a_waiting_step_outlives_its_optimizer():
    warm, params, others = on_cuda((3,)), on_cuda((600,), (3,)), on_cuda((600,), (3,))
    give_grads(warm, 0)
    NestedOptimizer(warm).step()  # compiles the kernels
    for ps in (params, others):
        give_grads(ps, 0)
    NestedOptimizer(others, foreach=False, lr=0.1).step()
    optimizer = NestedOptimizer(params, lr=0.1)
    torch.cuda.synchronize()
    torch.cuda._sleep(MANY)
    optimizer.step()
    del optimizer
    # What is pinned next must not overwrite what the step is still to read.
    taken = [torch.zeros(2**i, dtype=torch.int64).pin_memory() for i in range(20) for _ in range(4)]
    torch.cuda.synchronize()
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    del taken


# ---------------------------------------------------------------------- CUDA graphs


class Toy(nn.Module):
    """Elementwise, so that eager and captured runs have the same bits."""

    def __init__(self, dtype):
        super().__init__()
        self.weight, self.bias, self.scale = on_cuda((64, 32), (32,), (), dtype=dtype)

    def forward(self, x):
        return ((x * self.weight + self.bias).tanh() * self.scale).square().mean()


class Training:
    """A model with three levels and its input; a step is forward, backward and update."""

    def __init__(self, dtype=F32, **options):
        self.model, self.x = Toy(dtype), torch.zeros(64, 32, device="cuda", dtype=dtype)
        self.params = list(self.model.parameters())
        self.optimizer = NestedOptimizer(three_levels(self.params), **{"lr": 0.01, **options})

    def see(self, seed):
        self.x.copy_(seeded((64, 32), seed, self.x.dtype))

    def step(self):
        loss = self.model(self.x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def train(self, seeds):
        for seed in seeds:
            self.see(seed)
            self.step()

    def warm_up(self, seeds):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.train(seeds)
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, function=None):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (function or self.step)()
        return graph

    def set_options(self, **options):
        for group in self.optimizer.param_groups:
            group.update(options)


def pair(dtype=F32, options=dict):
    """A training to be captured, and one that stays eager; the same steps behind both."""
    captured, eager = Training(dtype, capturable=True, **options()), Training(dtype, **options())
    captured.warm_up(range(3))
    eager.train(range(3))
    return captured, eager


def assert_alike(captured, eager):
    torch.cuda.synchronize()
    assert_same_tensors(captured.params, eager.params)
    assert_same_state(captured.optimizer, eager.optimizer)


def tensor(value):
    return torch.tensor(value, device="cuda")


def fill(key):
    return lambda training: training.optimizer.param_groups[0][key].fill_(0.002)


def set_numbers(training):
    training.set_options(lr=0.05, weight_decay=0.3, betas=(0.5, 0.7), eps=1e-4)


def set_frequencies(training):
    for group, frequency in zip(training.optimizer.param_groups[1:], (2, 4)):
        group["frequency"] = frequency


#: Options, what is edited between replays, and whether that must be uploaded.
REPLAYS = {
    "as it is": (dict, lambda _: None, False),
    "lr, a tensor": (lambda: {"lr": tensor(0.05)}, fill("lr"), False),
    "weight_decay, a tensor": (lambda: {"weight_decay": tensor(0.5)}, fill("weight_decay"), False),
    "betas, tensors": (
        lambda: {"betas": (tensor(0.9), tensor(0.95))},
        lambda training: training.optimizer.param_groups[0]["betas"][0].fill_(0.5),
        False,
    ),
    "numbers": (dict, set_numbers, True),
    "frequencies": (dict, set_frequencies, True),
    "a tensor for a number": (dict, lambda training: training.set_options(lr=tensor(0.05)), True),
}


@pytest.mark.parametrize("options, edit, upload", REPLAYS.values(), ids=list(REPLAYS))
def test_a_captured_training_step_replays_as_the_eager_one(options, edit, upload):
    captured, eager = pair(options=options)
    graph = captured.capture()
    for seed in range(3, 28):
        if seed == 12:
            edit(captured)
            edit(eager)
            if upload:
                captured.optimizer.upload_options()
        captured.see(seed)
        graph.replay()
        eager.train([seed])
        assert_alike(captured, eager)
    assert eager.optimizer.state[eager.params[0]]["step"].item() == 28


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_graph_may_hold_compensated_sums(dtype):
    captured, eager = pair(dtype, lambda: {"kahan_sum": True, "state_dtype": F32, "lr": 1e-4})
    graph = captured.capture()
    for seed in range(3, 20):
        captured.see(seed)
        graph.replay()
        eager.train([seed])
    assert_alike(captured, eager)
    assert captured.optimizer.state[captured.params[0]]["kahan_comp"].any()


def test_several_graphs_and_eager_steps_take_turns():
    captured, eager = pair()
    graphs = [captured.capture(), captured.capture()]
    for seed in range(3, 24):
        captured.see(seed)
        [graphs[0].replay, graphs[1].replay, captured.step][seed % 3]()
        eager.train([seed])
        assert_alike(captured, eager)


def test_a_capture_before_any_step_is_refused():
    training = Training(capturable=True)
    give_grads(training.params, 0)
    with pytest.raises(RuntimeError, match="earlier step"):
        training.capture(training.optimizer.step)
    assert not any(training.optimizer.state.get(p) for p in training.params)
    training.warm_up(range(2))
    training.capture().replay()
    torch.cuda.synchronize()


def test_a_capture_of_edited_options_is_refused_until_they_are_uploaded():
    training = Training(capturable=True)
    training.warm_up(range(2))
    training.set_options(weight_decay=0.3)
    before = snapshot(training.optimizer)
    with pytest.raises(RuntimeError, match="upload_options"):
        training.capture(training.optimizer.step)
    assert_unchanged(training.optimizer, before)
    training.optimizer.upload_options()
    training.capture().replay()
    torch.cuda.synchronize()
    assert training.optimizer.state[training.params[0]]["step"].item() == 3


def test_loading_after_a_capture_leaves_both_usable():
    captured, eager = pair()
    saved = copy.deepcopy(captured.optimizer.state_dict())
    start = [p.detach().clone() for p in captured.params]
    graph = captured.capture()
    graph.replay()
    captured.optimizer.load_state_dict(saved)
    graph.replay()  # on the state that it was captured with
    torch.cuda.synchronize()
    for p, value in zip(captured.params, start):
        p.data.copy_(value)
    captured.train([3])
    eager.train([3])
    assert_alike(captured, eager)
    graph = captured.capture()
    captured.see(4)
    graph.replay()
    eager.train([4])
    assert_alike(captured, eager)


# ---------------------------------------------------------------------- compilation, scaling


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_training_step_equals_the_eager_one_and_keeps_its_frames(backend):
    torch._dynamo.reset()
    compiled, eager = Training(), Training()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    step, frames = torch.compile(compiled.step, backend=counter), []
    for seed in range(25):
        compiled.see(seed)
        step()
        frames.append(counter.frame_count)
        eager.train([seed])
    assert frames[1] == frames[-1] > 0
    for p, q in zip(compiled.params, eager.params):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
        for key in ("step", "window_count"):
            here, there = (t.optimizer.state[r][key] for t, r in ((compiled, p), (eager, q)))
            assert here.item() == there.item()


@pytest.mark.parametrize("frequency", [1, 2])
def test_half_precision_training_skips_overflows_without_waiting(frequency, no_waiting):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1)).cuda()
    twin = copy.deepcopy(model)
    params, others = list(model.parameters()), list(twin.parameters())
    optimizer = NestedOptimizer(params, lr=0.01, frequency=frequency)
    by_hand = NestedOptimizer(others, lr=0.01, frequency=frequency, foreach=False)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=3)
    assert optimizer._step_supports_amp_scaling
    for seed in range(14):
        overflow = seed in (0, 4, 5)
        with torch.autocast("cuda", dtype=F16):
            loss = model(seeded((16, 32), seed, device="cuda")).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        if overflow:
            params[0].grad[0, 0] = float("inf")
        before = snapshot(optimizer)
        with no_waiting:
            scaler.step(optimizer)
        if overflow and seed:
            assert_unchanged(optimizer, before)
        elif not overflow:
            for p, q in zip(params, others):
                q.grad = p.grad / scale
            by_hand.step()
        scaler.update()
        for p, q in zip(params, others):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert optimizer.state[params[0]]["step"].item() == 11 // frequency
