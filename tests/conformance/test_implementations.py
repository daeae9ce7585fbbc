"""For-loop, foreach, fused: one optimizer, whatever computes it, on whatever dtypes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import TensorTracker

from .checks import (
    EVERY,
    TRAINABLE,
    Case,
    assert_same,
    assert_trains_alike,
    cases,
    copies,
    each_case,
    each_class,
    everything,
    needs_cuda,
    seeded,
    set_gradients,
    state_of,
    torch_case,
    train,
)
from .infos import KERNELS

HALVES = (torch.bfloat16, torch.float16)


def each_case_and_dtype(path: str, *dtypes: torch.dtype) -> pytest.MarkDecorator:
    chosen = [
        pytest.param(case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}")
        for dtype in dtypes
        for case in cases(path, dtype=dtype)
        if case.info.serves(dtype)
    ]
    return pytest.mark.parametrize(("case", "dtype"), chosen)


def assert_matches_the_loop(case: Case, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    """Compare all values after every step, then go on from the loop's: errors do not add up."""
    tracker = TensorTracker(tolerance)
    loop = {flag: False for flag in case.info.supported_impls}
    for overrides in (loop, {}):
        params = case.params(dtype)
        optimizer = case.build(params, **overrides)
        for step in range(7):
            set_gradients(params, step)
            params[1].grad = None if step == 3 else params[1].grad
            optimizer.step()
            for p in params:
                for value in [p, *meaningful(optimizer.state[p])]:
                    if overrides:
                        tracker.add(value)
                    else:
                        tracker.pop_check_set(value, torch_case)
    assert tracker.all_popped()


def meaningful(state: dict[str, Any]) -> list[Any]:
    """The values of a state; the sum of a window without gradients says nothing."""
    empty = "window_count" in state and state["window_count"].item() == 0
    return [value for key, value in state.items() if not (empty and key == "window_sum")]


@each_case_and_dtype("foreach", torch.float32, torch.float64, torch.bfloat16, torch.complex64)
def test_foreach_does_what_the_loop_does(case: Case, dtype: torch.dtype) -> None:
    tolerance = {}
    if not case.info.exact_foreach:
        tolerance = {"rtol": 1 / 64, "atol": 1e-2} if dtype in HALVES else {}
    elif case.device == "cpu" and not dtype.is_complex:
        tolerance = {"rtol": 0.0, "atol": 0.0}
    elif dtype in HALVES and case.device == "cuda":
        # With tensor betas foreach rounds (1 - beta2) * gradient once more, in torch's as in ours.
        tolerance = {"rtol": 3e-2, "atol": 5e-3}
    assert_matches_the_loop(case, dtype, tolerance)


@each_case_and_dtype("fused", torch.float32, torch.float64, *HALVES)
def test_fused_does_what_the_loop_does(case: Case, dtype: torch.dtype) -> None:
    one_ulp = {"rtol": 1 / 128, "atol": 5e-3}  # of bfloat16
    assert_matches_the_loop(case, dtype, one_ulp if dtype in HALVES else {})


@each_case("differentiable")
def test_differentiable_does_what_the_loop_does(case: Case) -> None:
    params = case.params()
    plain = copies(params)
    differentiable = case.build(params)
    loop = case.build(plain, differentiable=False)
    for step in range(6):
        train(differentiable, params, [step])
        train(loop, plain, [step])
        torch.testing.assert_close(params, plain)


@needs_cuda
@each_case("fused", where=lambda case: case.device == "cuda" and not case.kwargs.get("capturable"))
def test_fused_on_cuda_does_what_fused_on_the_cpu_does(case: Case) -> None:
    params = case.params()
    on_cpu = [Parameter(p.detach().cpu()) for p in params]
    first, second = case.build(params), case.build(on_cpu)
    for step in range(6):
        train(first, params, [step])
        train(second, on_cpu, [step])
        torch.testing.assert_close([p.detach().cpu() for p in params], [p.detach() for p in on_cpu])


PREFIXES = ("_single_tensor_", "_multi_tensor_", "_fused_")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], set[str]]:
    """Given a case, the set in which its class's functional paths sign when they run."""

    def start(case: Case) -> set[str]:
        seen: set[str] = set()
        module_name, suffix = case.info.functional

        def watched(module_name: str, name: str, signature: str) -> None:
            module = importlib.import_module(module_name)
            original = getattr(module, name)

            def signing(*args: Any, **kwargs: Any) -> Any:
                seen.add(signature)
                return original(*args, **kwargs)

            monkeypatch.setattr(module, name, signing)

        for prefix in PREFIXES:
            if prefix != "_fused_" or "fused" in case.info.supported_impls:
                watched(module_name, prefix + suffix, prefix)
        if case.info.kernels and case.info.has_kernels_on(case.device):
            watched(case.info.kernels, "step", KERNELS)
        return seen

    return start


@each_case(*EVERY)
def test_a_flag_selects_its_implementation(case: Case, watch: Callable[[Case], set[str]]) -> None:
    seen = watch(case)
    params = case.params()
    train(case.build(params), params, range(case.frequency))
    fused = KERNELS if case.info.has_kernels_on(case.device) else "_fused_"
    expected = {"foreach": "_multi_tensor_", "fused": fused}
    assert seen == {expected.get(case.path, "_single_tensor_")}


@each_class()
def test_the_default_implementation_is_the_fastest_exact_one(
    case: Case, watch: Callable[[Case], set[str]]
) -> None:
    seen = watch(case)
    params = case.params()
    train(case.info.optim_cls(params), params, range(1))
    expected = case.info.default_path[case.device]
    assert seen == {expected}
    seen.clear()
    params = case.params()
    train(case.info.optim_cls(params, lr=torch.tensor(0.01)), params, range(1))
    with_tensor_lr = KERNELS if expected == KERNELS else "_single_tensor_"
    assert seen == {with_tensor_lr}


MIXED = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


def mixed_params(case: Case) -> list[Parameter]:
    """Parameters of several dtypes in turn; fused serves real ones only."""
    dtypes = MIXED[:-1] if case.path == "fused" else MIXED
    dtypes = tuple(filter(case.info.serves, dtypes))
    per_dtype = [case.params(dtype, seed=i) for i, dtype in enumerate(dtypes)]
    return [p for same_shape in zip(*per_dtype, strict=True) for p in same_shape]


def assert_trains_as_separate(case: Case, params: list[Parameter], kinds: list[Any]) -> None:
    """One group trains as an optimizer for each kind of its parameters."""
    apart = copies(params)
    together = case.build(params, **case.info.narrow_options)
    members = {kind: [p for p, k in zip(apart, kinds, strict=True) if k == kind] for kind in kinds}
    separate = [case.build(chosen, **case.info.narrow_options) for chosen in members.values()]
    for step in range(6):
        set_gradients(params, step)
        set_gradients(apart, step)
        together.step()
        for optimizer in separate:
            optimizer.step()
        assert_same([p.detach() for p in params], [p.detach() for p in apart], f"step {step}")
    for optimizer, chosen in zip(separate, members.values(), strict=True):
        own = {id(p): q for p, q in zip(apart, params, strict=True)}
        assert_same(state_of(together, [own[id(p)] for p in chosen]), state_of(optimizer, chosen))


@each_case(*EVERY, where=lambda case: not case.info.learned)
def test_mixed_dtypes_in_a_group_train_as_separate_optimizers(case: Case) -> None:
    params = mixed_params(case)
    assert_trains_as_separate(case, params, [p.dtype for p in params])


@needs_cuda
@each_case(
    *EVERY,
    where=lambda case: (
        case.device == "cuda" and not case.kwargs.get("capturable") and not case.info.learned
    ),
)
def test_mixed_devices_in_a_group_train_as_separate_optimizers(case: Case) -> None:
    params = mixed_params(case)
    for i in range(0, len(params), 3):
        params[i] = Parameter(params[i].detach().cpu(), requires_grad=params[i].requires_grad)
    assert_trains_as_separate(case, params, [(p.device, p.dtype) for p in params])


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@each_case(*EVERY)
def test_the_default_dtype_does_not_matter(case: Case, request: pytest.FixtureRequest) -> None:
    expected = case.params()
    train(case.build(expected), expected)
    request.getfixturevalue("float64_by_default")
    params = case.params()
    optimizer = case.build(params)
    train(optimizer, params)
    assert torch.get_default_dtype() == torch.float64
    if case.path == "differentiable" or case.kwargs.get("capturable"):
        # Step counts take part as tensors, in the default dtype.
        torch.testing.assert_close(params, expected)
    else:
        assert_same([p.detach() for p in params], [p.detach() for p in expected])


def pairs_complex_numbers(case: Case) -> bool:
    return case.info.elementwise and case.info.serves(torch.complex64)


@each_case("forloop", "foreach", "differentiable", where=pairs_complex_numbers)
def test_complex_parameters_train_as_pairs_of_real_ones(case: Case) -> None:
    numbers = case.params(torch.complex64)
    pairs = [Parameter(torch.view_as_real(p.detach()).clone(), p.requires_grad) for p in numbers]
    complex_optimizer, real_optimizer = case.build(numbers), case.build(pairs)
    for step in range(6):
        set_gradients(numbers, step)
        for p, pair in zip(numbers, pairs, strict=True):
            assert p.grad is not None
            pair.grad = torch.view_as_real(p.grad).clone()
        complex_optimizer.step()
        real_optimizer.step()
        for p, pair in zip(numbers, pairs, strict=True):
            torch.testing.assert_close(torch.view_as_real(p.detach()), pair.detach())
            real_state = real_optimizer.state[pair]
            for key, value in complex_optimizer.state[p].items():
                as_real = torch.view_as_real(value) if value.is_complex() else value
                torch.testing.assert_close(as_real, real_state[key])


@each_case("forloop", "foreach", where=pairs_complex_numbers)
def test_a_complex_parameter_trains_as_its_real_and_imaginary_parts(case: Case) -> None:
    def valley(z: Tensor) -> Tensor:
        x, y = z.abs()
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    whole = Parameter(seeded((2,), 0, torch.complex64, case.device))
    real = Parameter(whole.detach().real.clone())
    imaginary = Parameter(whole.detach().imag.clone())
    options = case.info.steep_options
    first, second = case.build([whole], **options), case.build([real, imaginary], **options)
    start = whole.detach().clone()
    for _ in range(10):
        first.zero_grad()
        second.zero_grad()
        valley(whole).backward()
        valley(torch.complex(real, imaginary)).backward()
        first.step()
        second.step()
        torch.testing.assert_close(whole.detach().real, real.detach())
        torch.testing.assert_close(whole.detach().imag, imaginary.detach())
    assert not torch.equal(whole.detach(), start)


@each_class("fused")
def test_fused_refuses_what_it_cannot_serve(case: Case) -> None:
    params = case.params(torch.complex64)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating"):
        optimizer = case.build(params)
        set_gradients(params, 0)
        optimizer.step()
    assert_same([p.detach() for p in params], [p.detach() for p in case.params(torch.complex64)])


def unscales_exactly(case: Case) -> bool:
    """Whether scaling by a power of two and back leaves no trace.

    torch's fused CUDA kernel for coupled decay unscales and adds the decay in one rounding.
    """
    return case.device == "cpu" or case.kwargs.get("decoupled", True)


def set_amp(optimizer: Any, device: str, scale: float, found_inf: float) -> None:
    optimizer.grad_scale = torch.tensor(scale, device=device)
    optimizer.found_inf = torch.tensor(found_inf, device=device)


@each_case("fused")
def test_fused_skips_a_step_whose_gradients_overflowed(case: Case) -> None:
    params, plain = case.params(), case.params()
    optimizer, twin = case.build(params), case.build(plain)
    # Either the step takes the scale and the flag, or it says that it does not.
    takes_them = getattr(optimizer, "_step_supports_amp_scaling", False)
    assert takes_them or case.frequency > 1
    assert_trains_alike((optimizer, params), (twin, plain), range(3))
    before = everything(optimizer, params)

    set_gradients(params, 3)
    set_amp(optimizer, case.device, 1.0, found_inf=1.0)
    if takes_them:
        optimizer.step()
    else:
        with pytest.raises(RuntimeError, match="grad_scale"):
            optimizer.step()
    assert_same(everything(optimizer, params), before)
    if takes_them:
        set_amp(optimizer, case.device, 4.0, found_inf=0.0)
        set_gradients(params, 4)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(4)
        optimizer.step()
        train(twin, plain, [4])
        values = ([p.detach() for p in ps] for ps in (params, plain))
        assert_same(*values, exact=unscales_exactly(case))

    del optimizer.grad_scale, optimizer.found_inf
    exact = unscales_exactly(case)
    assert_trains_alike((optimizer, params), (twin, plain), range(5, 8), exact)


@each_case(*TRAINABLE)
def test_a_step_that_the_scaler_skips_never_happened(case: Case) -> None:
    params, plain = case.params(), case.params()
    optimizer, twin = case.build(params), case.build(plain)
    scaler = torch.amp.GradScaler(case.device, init_scale=2.0**6)
    for step in range(8):
        overflow = step in (1, 4, 5)
        before = everything(optimizer, params)
        set_gradients(params, step)
        scale = float(scaler.scale(torch.ones((), device=case.device)))
        for p in params:
            assert p.grad is not None
            p.grad.mul_(scale)
        if overflow:
            assert params[0].grad is not None
            params[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() < scale) == overflow
        if overflow:
            assert_same(everything(optimizer, params), before)
        else:
            train(twin, plain, [step])
            values = ([p.detach() for p in ps] for ps in (params, plain))
            exact = unscales_exactly(case)
            assert_same(*values, exact=exact)
            assert_same(state_of(optimizer, params), state_of(twin, plain), exact=exact)


@each_case(
    "differentiable",  # in float64 throughout, where finite differences are precise
    where=lambda case: not case.kwargs.keys() & {"capturable", "state_dtype"},
    dtype=torch.float64,
)
def test_gradients_flow_through_steps_to_all_that_went_in(case: Case) -> None:
    steps = case.info.unrolled_updates * case.frequency

    def unrolled(start: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = iter(inputs)
        p = start.clone()
        overrides: dict[str, Any] = {
            key: (next(given), next(given)) if key == "betas" else next(given)
            for key in case.info.differentiable_options
        }
        optimizer = case.build([p], **overrides)
        for grad in given:
            p.grad = grad
            optimizer.step()
        state = optimizer.state[p].values()
        return (p, *(v for v in state if isinstance(v, Tensor) and v.requires_grad))

    values = {"lr": [0.1], "weight_decay": [0.2], "betas": [0.8, 0.95]}
    options = [
        torch.tensor(value, dtype=torch.float64, device=case.device)
        for key in case.info.differentiable_options
        for value in values[key]
    ]
    shape = case.info.vector(3)
    start = seeded(shape, 0, torch.float64, case.device)
    grads = [seeded(shape, 1 + i, torch.float64, case.device) for i in range(steps)]
    inputs = [t.requires_grad_() for t in (start, *options, *grads)]
    assert torch.autograd.gradcheck(unrolled, inputs)
    # Every one of them has a say in where the parameter ends.
    found = torch.autograd.grad(unrolled(*inputs)[0].sum(), inputs, allow_unused=True)
    assert all(g is not None and bool(g.any()) for g in found), f"{found}"


@needs_cuda
@each_class("foreach")
def test_foreach_needs_room_for_one_copy_of_the_parameters(case: Case) -> None:
    size = 4 * 2**20
    peaks = {}
    for foreach in (False, True):
        params = [Parameter(torch.zeros(2**10, 2**10, device="cuda")) for _ in range(8)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = case.build(params, foreach=foreach)
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        peaks[foreach] = torch.cuda.max_memory_allocated() - before
    assert peaks[True] <= peaks[False] + len(params) * size


def can_be_captured(case: Case) -> bool:
    # The for-loop copies tensor betas from the CPU, here as in torch, which a capture forbids.
    betas = case.kwargs.get("betas", (0.9, 0.999))
    copies_betas = case.path == "forloop" and isinstance(betas[0], Tensor)
    return bool(case.kwargs.get("capturable")) and not copies_betas


@needs_cuda
@each_case(*TRAINABLE, where=can_be_captured)
def test_a_captured_step_replays_as_the_eager_one(case: Case) -> None:
    params, plain = case.params(), case.params()
    optimizer, eager = case.build(params), case.build(plain)
    train(eager, plain, range(8))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    grads = [p.grad for p in params]
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(2, 8):
        set_gradients(params, step)
        for p, grad in zip(params, grads, strict=True):
            assert p.grad is not None and grad is not None
            grad.copy_(p.grad)
        graph.replay()
    torch.testing.assert_close(params, plain)
    torch.testing.assert_close(
        [list(s.values()) for s in state_of(optimizer, params)],
        [list(s.values()) for s in state_of(eager, plain)],
    )
