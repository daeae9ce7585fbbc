"""The learned step on a CUDA device: the rule and autograd, no waiting, exact resuming."""

import copy

import pytest
import torch
from torch.nn import Parameter

from nested_optim import DeepNestedOptimizer, kernels
from nested_optim.meta import learned

from ..helpers import assert_same_state, assert_same_tensors, make_params, random_grads, set_grads

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not kernels.available(torch.device("cuda")),
    reason="needs a CUDA device and Triton",
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Spans and parts of spans, aligned and not, scalars.
SHAPES = (256, 512), (1000, 97), (8, 3, 3, 3), (1025,), (8192,), (7,), ()


def on_cuda(dtype, device="cuda"):
    return [Parameter(p.detach().to(device)) for p in make_params(*SHAPES, dtype=dtype)]


def build(params, fused=True, **options):
    options = {"lr": 0.01, "meta_lr": 0.01, "meta_update_freq": 4, **options}
    late = options.pop("late", {})
    groups = [{"params": params[:3], "name": "early"}, {"params": params[3:], **late}]
    return DeepNestedOptimizer(groups, fused=fused, **options)


def give_gradients(params, seed):
    """Noise, and a part that lasts; the CPU's numbers."""
    on_cpu = [torch.empty(p.shape, dtype=p.dtype) for p in params]
    noise = [g.to(p.device) for g, p in zip(random_grads(on_cpu, seed), params)]
    set_grads(params, [g + p.detach().sign() for g, p in zip(noise, params)])


def served(optimizer):
    return bool(optimizer._learning._plans)


def assert_alike(optimizer, twin, rtol, of_learned):
    for group, other in zip(optimizer.param_groups, twin.param_groups):
        for p, q in zip(group["params"], other["params"]):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=rtol)
            mine, its = optimizer.state[p], twin.state[q]
            for key in mine:
                # Rounding at the edge of two bfloat16 numbers may fall to either.
                bound = max(10 * rtol, 2**-7 if mine[key].dtype == BF16 else 0)
                torch.testing.assert_close(mine[key], its[key], rtol=bound, atol=bound)
    first, other = optimizer.param_groups[0], twin.param_groups[0]
    keys = [f"{m}_{part}" for m in learned.modules(first) for part in learned.PARTS]
    if first["long_run"] is not None:
        keys.append("long_run")
    for key in keys:
        scale = other[key].abs().max().clamp(min=1e-30)
        torch.testing.assert_close(
            first[key] / scale, other[key] / scale, rtol=of_learned, atol=of_learned
        )


VARIANTS = {
    "all": {"weight_decay": 0.1},
    "one momentum": {"cms_frequencies": (1,)},
    "controller alone": {"learn_momentum": False, "learn_mixing": False, "meta_rule": "adam"},
    "amsgrad, coupled": {"amsgrad": True, "weight_decay": 0.1, "decoupled": False},
    "not normalized": {"normalize": False, "maximize": True},
    "windows": {"late": {"frequency": 3}},
    "a look before a meta update": {"meta_update_freq": 5, "weight_decay": 0.1},
    "the next losses alone": {"horizon": "step"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_steps_and_what_is_learned_are_those_of_the_rule(options):
    params, twins = on_cuda(F64), on_cuda(F64)
    optimizer, twin = build(params, **options), build(twins, fused=False, **options)
    for seed in range(10):
        for ps, opt in ((params, optimizer), (twins, twin)):
            give_gradients(ps, seed)
            opt.step(0.5 * seed)
    assert served(optimizer) and not served(twin)
    # The networks' weights are float32, and so is what they are learned from.
    assert_alike(optimizer, twin, 1e-6, 1e-5)


@pytest.mark.parametrize(
    "dtype, options, bound",
    [(F32, {}, 2e-4), (BF16, {"state_dtype": F32}, 3e-2), (F16, {"state_dtype": F32}, 4e-3)],
    ids=str,
)
def test_narrow_tensors_follow_the_rule(dtype, options, bound):
    params, twins = on_cuda(dtype), on_cuda(dtype)
    optimizer, twin = build(params, **options), build(twins, fused=False, **options)
    for seed in range(10):
        for ps, opt in ((params, optimizer), (twins, twin)):
            give_gradients(ps, seed)
            opt.step()
    assert served(optimizer)
    assert_alike(optimizer, twin, bound, max(bound, 5e-3))


def test_a_step_waits_for_nothing():
    params = on_cuda(F32)
    optimizer = build(params, meta_update_freq=3)
    for seed in range(4):
        give_gradients(params, seed)
        optimizer.step(torch.ones((), device="cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.step(torch.ones((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_resumes_to_the_last_bit():
    params = on_cuda(F32)
    optimizer = build(params, late={"frequency": 2})
    for seed in range(5):
        give_gradients(params, seed)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    twins = [Parameter(p.detach().clone()) for p in params]
    again = build(twins, late={"frequency": 2})
    again.load_state_dict(saved)
    for seed in range(5, 12):
        for ps, opt in ((params, optimizer), (twins, again)):
            give_gradients(ps, seed)
            opt.step()
    assert_same_tensors(params, twins)
    assert_same_state(optimizer, again)


def test_nothing_is_allocated_but_for_the_networks():
    params = on_cuda(F32)
    optimizer = build(params, cms_frequencies=(1,))
    for seed in range(3):
        give_gradients(params, seed)
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(8):
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device_than_the_current_one():
    params, twins = on_cuda(F32, "cuda:1"), on_cuda(F32)
    optimizer, twin = build(params), build(twins)
    for seed in range(5):
        for ps, opt in ((params, optimizer), (twins, twin)):
            give_gradients(ps, seed)
            opt.step()
    assert_same_tensors([p.cpu() for p in params], [p.cpu() for p in twins])
