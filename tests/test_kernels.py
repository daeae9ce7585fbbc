"""The fused kernels, interpreted on the CPU: the rule, windows, layouts, and what they refuse."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from torch.nn import Parameter
from torch.optim import AdamW

from nested_optim import NestedOptimizer, rules
from nested_optim.fused import FusedSteps

from . import test_windows_property as lives
from .helpers import assert_same_tensors, assert_unchanged, make_params, snapshot, step_with
from .interpreter import interpreted

triton = pytest.importorskip("triton")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
#: Relative: what may add up over some steps; of a narrow dtype one ulp, then both go on alike.
TOLERANCE = {F64: 1e-12, F32: 1e-5, BF16: 1 / 128, F16: 1 / 1024}


@pytest.fixture(scope="module", autouse=True)
def level_adamw():
    """The kernels' module, interpreted; afterwards as it was."""
    with interpreted() as modules:
        yield modules["level_adamw"]


def seeded(shape, seed, dtype=F32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(device, dtype)


def gradients(params, seed):
    """In contiguous memory, whatever the parameters' layout."""
    return [seeded(p.shape, 100 * seed + i, p.dtype, p.device) for i, p in enumerate(params)]


EXACT = "step", "window_count", "window_sum"


class Twins:
    """Two optimizers of equal parameters: one on the kernels, the other on the for-loop."""

    def __init__(self, params, arrange=list, **options):
        self.params = params
        plain = [Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
        self.members = params, plain
        on_cpu = all(p.is_cpu for p in params)
        self.kernels = NestedOptimizer(arrange(params), fused=True if on_cpu else None, **options)
        self.loop = NestedOptimizer(arrange(plain), foreach=False, **options)
        self.both = self.kernels, self.loop

    def step(self, grads):
        for optimizer, params in zip(self.both, self.members):
            for p, grad in zip(params, grads):
                p.grad = grad
            optimizer.step()

    def train(self, seeds):
        for seed in seeds:
            self.step(gradients(self.params, seed))
            self.assert_alike()

    def set_options(self, group=0, **options):
        for optimizer in self.both:
            optimizer.param_groups[group].update(options)

    def assert_alike(self):
        for i, (p, q) in enumerate(zip(*self.members)):
            state, expected = self.kernels.state[p], self.loop.state[q]
            assert state.keys() == expected.keys()
            pairs = {key: (state[key], expected[key]) for key in expected}
            if expected and expected["window_count"] == 0:
                pairs.pop("window_sum", None)
            narrow = [(p.data, q.data), *pairs.values()] if p.dtype in (BF16, F16) else []
            if "kahan_comp" in pairs:
                both = [
                    rules.kahan_join(*pair, F32) for pair in zip((p, q), pairs.pop("kahan_comp"))
                ]
                bound = 2**-12 if expected["exp_avg"].dtype == F32 else 2**-9
                torch.testing.assert_close(*both, rtol=bound, atol=bound / 10)
            else:
                pairs["value"] = p, q
            loosest = TOLERANCE[expected["exp_avg"].dtype] if expected else 0.0
            for key, (a, b) in pairs.items():
                assert a.dtype == b.dtype or key == "window_sum"  # at least float32
                exact = key in EXACT and a.dtype == b.dtype
                a, bound = a.to(b), 0.0 if exact else max(TOLERANCE[b.dtype], loosest)
                assert torch.allclose(a, b, rtol=bound, atol=bound / 10), (
                    f"{key} of parameter {i} differs by {(a - b).abs().max()}"
                )
            for a, b in narrow:
                a.copy_(b)


def three_levels(params):
    return [{"params": params[i::3], "frequency": f} for i, f in enumerate((1, 3, 10))]


RULE = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def held(optimizer, param):
    state = optimizer.state.get(param) or {"exp_avg": param * 0, "exp_avg_sq": param * 0}
    return [t.detach().to(F64, copy=True) for t in (param, state["exp_avg"], state["exp_avg_sq"])]


def errors(optimizer, params, steps):
    """The largest errors of a step against the rule in float64, from where the step began.

    Of the parameter, relative to itself or the update, whichever is larger; of the moments,
    relative to the largest element.
    """
    worst = torch.zeros(3, dtype=F64)
    for step in range(1, steps + 1):
        (grad,) = gradients(params, step)
        start = held(optimizer, *params)
        exact = rules.adamw(start[0], grad.double(), *start[1:], step=step, **RULE)[:3]
        step_with(optimizer, params, [grad])
        sizes = [exact[0].abs().maximum((exact[0] - start[0]).abs())]
        sizes += [moment.abs().max() for moment in exact[1:]]
        for i, (found, right, size) in enumerate(zip(held(optimizer, *params), exact, sizes)):
            worst[i] = worst[i].maximum(((found - right).abs() / size).max())
    return worst[0].item(), worst[1:].max().item()


@pytest.mark.parametrize(
    "dtype, moments, steps, bounds",
    [
        (F32, F32, 100, (8e-7, 3e-7)),
        pytest.param(F32, F32, 1000, (3e-6, 3e-7), marks=pytest.mark.slow),
        # Powers of the betas are as near as the exponential function of the host (or the device).
        (F64, F64, 40, (4e-15, 1e-15)),
        # Triton's interpreter cuts what it should round to bfloat16: one ulp, not half of it.
        (BF16, F32, 40, (1 / 128, 3e-7)),
        (F16, F32, 40, (1 / 2048, 3e-7)),
        (BF16, BF16, 40, (1 / 128, 1 / 128)),
    ],
)
def test_the_kernels_are_as_exact_as_the_for_loop(dtype, moments, steps, bounds):
    found = []
    for path in ({"fused": True}, {"foreach": False}):
        params = [Parameter(seeded((300,), 0, dtype))]
        optimizer = NestedOptimizer(params, **RULE, state_dtype=moments, **path)
        found.append(errors(optimizer, params, steps))
    for kernel, loop, bound in zip(*found, bounds):
        assert kernel <= bound
        # Largest of many: where a parameter passes through 0, either may be the unlucky one.
        assert kernel <= 3 * loop + 1e-7


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": "sum"},
        {"decoupled": False, "weight_decay": 0.1, "maximize": True},
        {"amsgrad": True, "maximize": True},
        {"betas": (0.0, 0.9), "weight_decay": 0.0},
        {"betas": (0.4, 0.0), "window": "sum", "decoupled": False},
        {"lr": torch.tensor(0.02, dtype=F64), "betas": tuple(torch.tensor([0.8, 0.9], dtype=F64))},
    ],
    ids=str,
)
def test_windows_equal_the_for_loop_s_step_by_step(options):
    twins = Twins(make_params((2, 3), (4,), (), dtype=F64), three_levels, **{"lr": 0.01, **options})
    twins.train(range(12))
    assert [twins.kernels.state[p]["step"].item() for p in twins.params] == [12, 4, 1]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("frequency", [1, 2])
def test_lr_zero_with_eps_zero_moves_nothing(frequency):
    params = make_params((3,), ())
    optimizer = NestedOptimizer(params, lr=0.0, eps=0.0, frequency=frequency, fused=True)
    before = [p.detach().clone() for p in params]
    for factor in (0, 0, 1, 0):
        step_with(optimizer, params, [factor * g for g in gradients(params, 0)])
    assert_same_tensors(params, before)


def test_a_frequency_that_goes_up_and_comes_back_loses_no_gradient():
    twins = Twins(make_params((3,), (2,), dtype=F64), lambda ps: [{"params": [p]} for p in ps])
    for seed, frequency in enumerate([1, 5, 5, 1, 1, 3, 2, 2, 1, 4]):
        twins.set_options(frequency=frequency)
        twins.train([seed])
    assert [optimizer.flush() for optimizer in twins.both] == [1, 1]
    twins.assert_alike()


class LifeOnKernels(lives.OptimizerLife):
    @initialize(group=lives.options, values=st.lists(lives.numbers, min_size=1, max_size=2))
    def begin(self, group, values):
        super().begin({"fused": True}, group, values)


class TestLifeOnKernels(LifeOnKernels.TestCase):
    settings = settings(
        max_examples=8,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=True,
    )


class Launches:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.number = kernel, 0

    def __getitem__(self, grid):
        self.number += 1
        return self.kernel[grid]


@pytest.mark.parametrize("dtypes", [(F32,), (F32, F64, BF16, F16)], ids=len)
def test_one_launch_serves_all_groups_of_a_dtype(dtypes, level_adamw, monkeypatch):
    launches = [Launches(level_adamw.advance), Launches(level_adamw.apply)]
    for kernel, name in zip(launches, ("advance", "apply")):
        monkeypatch.setattr(level_adamw, name, kernel)
    params = [p for dtype in dtypes for p in make_params((2,), (3,), (1,), dtype=dtype)]
    optimizer = NestedOptimizer(three_levels(params), fused=True)
    optimizer.add_param_group({"params": make_params((2,)), "lr": 0.5, "frequency": 2})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    step_with(optimizer, params, gradients(params, 0))
    assert [kernel.number for kernel in launches] == [len(dtypes)] * 2


def test_tables_are_made_once_while_gradients_and_options_move(monkeypatch):
    builds, tables, keep = [], [], []
    build = FusedSteps.build
    monkeypatch.setattr(FusedSteps, "build", lambda *args: builds.append(1) or build(*args))
    params = make_params((3,), (2, 2), ())
    optimizer = NestedOptimizer(three_levels(params), fused=True)
    for seed in range(10):
        keep.append(gradients(params, seed))  # so that none is where another was
        for p, grad in zip(params, keep[-1]):
            p.grad = None if seed == 4 and p is params[0] else grad
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
        tables.append([t.table for t in optimizer._fused._tables])
    assert len(builds) == 1 == len(tables[0])
    assert all(step == tables[0] for step in tables)


def first(optimizer):
    return optimizer.param_groups[0]["params"][0]


def replace_state(key):
    return lambda o: o.state[first(o)].update({key: o.state[first(o)][key].clone()})


def move(find, dtype=None):
    return lambda o: setattr(find(o), "data", find(o).data.to(dtype, copy=True))


def set_option(**options):
    return lambda o: o.param_groups[0].update(options)


EDITS = {
    "memory of a parameter": move(first),
    "dtype of a parameter": move(first, F64),
    "a moment": replace_state("exp_avg"),
    "a window": replace_state("window_sum"),
    "a counter": replace_state("step"),
    "a window's counter": replace_state("window_count"),
    "memory of the state": lambda o: [
        move(lambda _, t=t: t)(o) for t in o.state[first(o)].values()
    ],
    "all state": lambda o: o.state.clear(),
    "state of one": lambda o: o.state.pop(first(o)),
    "group of a parameter": lambda o: o.param_groups[1]["params"].insert(
        0, o.param_groups[0]["params"].pop()
    ),
    "order of groups": lambda o: o.param_groups.reverse(),
    "a parameter less": lambda o: o.param_groups[0]["params"].pop(),
    "amsgrad": set_option(amsgrad=True),
    "state_dtype": set_option(state_dtype="float64"),
    "numbers": set_option(betas=(0.5, 0.6), eps=0.1, weight_decay=0.3, frequency=5),
    "forms": set_option(window="sum", maximize=True, decoupled=False),
    "a late step": lambda o: o.state[first(o)]["step"].fill_(300000),
    "a rate on the host": lambda o: o.param_groups[1]["lr"].fill_(0.5),
}


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
def test_the_next_step_heeds_what_was_edited(edit, shape):
    def arrange(params):
        fast = {"params": params[2:], "lr": torch.tensor(0.01)}
        return [{"params": params[:2], "frequency": 2, "lr": 0.1}, fast]

    twins = Twins(make_params(shape, (1,), (2,)), arrange)
    twins.train(range(3))
    held = [t.data for o in twins.both for s in o.state.values() for t in s.values()]
    for optimizer in twins.both:
        edit(optimizer)
    twins.train(range(3, 6))
    assert all(t.numel() for t in held)  # their memory was not given to others meanwhile


@pytest.mark.parametrize("other", [{"foreach": True, "fused": None}, {"fused": None}], ids=str)
def test_a_group_left_to_another_path_trains_when_it_is_unfrozen(other):
    served, left = make_params((3,), (2,))
    left.requires_grad_(False)
    optimizer = NestedOptimizer([{"params": [served]}, {"params": [left], **other}], fused=True)
    step_with(optimizer, [served], gradients([served], 0))
    left.requires_grad_(True)
    before = left.detach().clone()
    assert not optimizer._step_supports_amp_scaling
    step_with(optimizer, [served, left], gradients([served, left], 1))
    assert not torch.equal(left, before)


def test_checkpoints_of_torch_s_adamw_go_in_and_out():
    params = make_params((3, 2), (4,), dtype=F64)
    plain = [Parameter(p.detach().clone()) for p in params]
    reference, optimizer = AdamW(plain), NestedOptimizer(params, fused=True)
    for seed in range(6):
        if seed == 2:
            saved = copy.deepcopy(reference.state_dict())
            saved["param_groups"][0].update(fused=True)
            optimizer.load_state_dict(saved)
        if seed == 4:
            reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for o, ps in ((reference, plain), (optimizer, params)):
            step_with(o, ps, gradients(params, seed))
        for p, q in zip(params, plain):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
            assert reference.state[q]["step"] == optimizer.state[p]["step"] == seed + 1


PLACES = {
    "empty": lambda device: seeded((0, 3), 0, device=device),
    "transposed": lambda device: seeded((5, 7), 0, device=device).t(),
    "channels last": lambda device: seeded((2, 4, 5, 3), 0, device=device).permute(0, 3, 1, 2),
    "with gaps": lambda device: seeded((5, 6), 1, device=device)[:, ::2],
    "misaligned": lambda device: seeded((514,), 0, device=device)[1:],
    "one of one": lambda device: seeded((1, 1, 1), 0, device=device).expand(1, 1, 1),
}
for shape in ((), (511,), (512,), (513,), (1024,), (1025,)):
    PLACES[f"of shape {shape}"] = lambda device, shape=shape: seeded(shape, 0, device=device)


def reversed_strides(grad):
    order = tuple(reversed(range(grad.dim())))
    return grad.permute(order).contiguous().permute(order)


def gapped(grad):
    wide = grad.new_zeros(*grad.shape, 2)
    wide[..., 0] = grad
    return wide[..., 0]


def misaligned(grad):
    return torch.cat([grad.new_zeros(1), grad.reshape(-1)])[1:].view(grad.shape)


def repeated(grad):
    return grad.flatten()[:1].squeeze().expand(grad.shape) if grad.numel() else grad


LAYOUTS = torch.clone, reversed_strides, gapped, misaligned, repeated


def assert_any_layout_trains_as_contiguous_memory_does(kind, device, **options):
    places = {name: make(device) for name, make in PLACES.items()}
    around, before = places["with gaps"]._base, places["misaligned"]._base
    outside = around[:, 1::2].clone(), before[:1].clone()
    twins = kind([Parameter(t) for t in places.values()], **options)
    for seed, lay_out in enumerate(LAYOUTS):
        twins.step([lay_out(grad) for grad in gradients(twins.params, seed)])
        twins.assert_alike()
    for p, (name, t) in zip(twins.params, places.items()):
        assert p.data_ptr() == t.data_ptr() and p.stride() == t.stride(), name
    assert_same_tensors([around[:, 1::2], before[:1]], outside)


@pytest.mark.parametrize("frequency", [1, 2])
def test_any_layout_trains_as_contiguous_memory_does(frequency):
    assert_any_layout_trains_as_contiguous_memory_does(Twins, "cpu", frequency=frequency)


def test_mixed_dtypes_in_a_group_train_as_on_the_for_loop():
    params = [Parameter(seeded((3,), 0, dtype)) for dtype in (F32, BF16, F16, F64)]
    Twins(params, frequency=2, state_dtype=F32).train(range(4))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no such grads")
def test_gradients_may_be_wider_than_their_parameter():
    twins = Twins([Parameter(seeded((5,), 0, BF16))], state_dtype=F32, frequency=2)
    for (param,) in twins.members:
        param.grad_dtype = F32
    for seed in range(4):
        twins.step([seeded((5,), seed)])
        twins.assert_alike()


def scaled_step(optimizer, params, grads, scale, overflow=0.0):
    grads = [grad if scale is None else grad * scale for grad in grads]
    for p, grad in zip(params, grads):
        p.grad = grad.clone()
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)
    optimizer.found_inf = torch.tensor(overflow)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert_same_tensors([p.grad for p in params], grads)


@pytest.mark.parametrize("scale", [8.0, None])
def test_the_kernels_unscale_and_skip_windows_and_all(scale):
    twins = Twins(make_params((600,), (3,), (2,)), three_levels, amsgrad=True)
    for seed in range(3):
        grads = gradients(twins.params, seed)
        start = [p.detach().clone() for p in twins.params]
        before = snapshot(twins.kernels)
        scaled_step(twins.kernels, twins.params, grads, scale, overflow=1.0)
        assert_same_tensors(twins.params, start)
        if seed:
            assert_unchanged(twins.kernels, before)
        else:
            assert not any(t.any() for s in twins.kernels.state.values() for t in s.values())
        scaled_step(twins.kernels, twins.params, grads, scale)
        step_with(twins.loop, twins.members[1], grads)
        twins.assert_alike()


def test_scaling_is_left_to_the_scaler_where_steps_are_not_the_kernels_alone():
    optimizer = NestedOptimizer(make_params((3,)), frequency=2, fused=True)
    assert optimizer._step_supports_amp_scaling
    with_hook = optimizer.register_meta_update_hook(lambda _: None)
    assert not optimizer._step_supports_amp_scaling
    with_hook.remove()
    optimizer.add_param_group({"params": make_params((2,), dtype=torch.cfloat), "fused": None})
    assert not optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("frequency", [1, 2])
def test_the_grad_scaler_works_with_the_kernels(frequency):
    twins = Twins(make_params((3,), (2,)), frequency=frequency)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    for seed, overflow in enumerate([True, False, False, True, False]):
        grads = gradients(twins.params, seed)
        scale = scaler.scale(torch.ones(())).item()
        for p, grad in zip(twins.params, grads):
            p.grad = grad * scale
        if overflow:
            twins.params[1].grad[0] = float("nan")
        else:
            step_with(twins.loop, twins.members[1], grads)
        scaler.step(twins.kernels)
        scaler.update()
        assert (scaler.get_scale() < scale) == overflow
        if seed:
            twins.assert_alike()


def assert_kahan_sum_follows_float32_where_plain_training_stalls(dtype, path, device):
    start = torch.tensor([1.0, -1.5, 0.75], dtype=dtype, device=device)
    starts = start.clone(), start.clone(), start.float()
    options = {"lr": 1e-5, "weight_decay": 0.0, "state_dtype": F32, **path}
    runs = [(Parameter(s), {**options, "kahan_sum": i > 0}) for i, s in enumerate(starts)]
    runs = [(NestedOptimizer([p], **options), p) for p, options in runs]
    for seed in range(25):
        away = -start.sign() * (1 + seed % 3)
        for optimizer, p in runs:
            step_with(optimizer, [p], [away.to(p.dtype)])
    (_, plain), (kept, narrow), (_, wide) = runs
    assert torch.equal(plain, start)
    moved = (wide.detach() - start.float()).double()
    assert (moved.abs() > 2e-4).all()
    reached = rules.kahan_join(narrow.detach(), kept.state[narrow]["kahan_comp"], F64)
    torch.testing.assert_close(reached - start.double(), moved, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("path", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_kahan_sum_follows_float32_where_plain_training_stalls(dtype, path):
    assert_kahan_sum_follows_float32_where_plain_training_stalls(dtype, path, "cpu")


@pytest.mark.parametrize(
    "dtype, options",
    [
        (BF16, {}),
        (BF16, {"frequency": 2, "state_dtype": F32}),
        (F16, {"frequency": 2, "state_dtype": F32}),
    ],
)
def test_kahan_sum_in_the_kernels_is_that_of_the_for_loop(dtype, options):
    twins = Twins([Parameter(seeded((300,), 0, dtype))], eps=1e-3, **options)
    for seed, on in enumerate([False, True, True, True, True]):  # switched on in mid-run
        twins.set_options(kahan_sum=on)
        twins.train([seed])
    comp = twins.kernels.state[twins.params[0]]["kahan_comp"]
    assert comp.dtype == dtype and comp.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_overflow_leaves_no_nan_in_the_state():
    (param,) = params = [Parameter(torch.full((3,), 65504.0, dtype=F16))]
    optimizer = NestedOptimizer(params, lr=1e4, weight_decay=0.0, kahan_sum=True, fused=True)
    for _ in range(2):
        step_with(optimizer, params, [-torch.ones(3, dtype=F16)])
        assert torch.isinf(param).all()
        assert all(torch.isfinite(t).all() for t in optimizer.state[param].values())


def test_compensations_are_saved_and_made_for_narrow_parameters_only():
    params = [Parameter(seeded((40,), 0, dtype)) for dtype in (BF16, F32, F16, F64)]
    options = {"lr": 1e-4, "eps": 1e-3, "kahan_sum": True, "fused": True}
    optimizer = NestedOptimizer(params, **options)
    step_with(optimizer, params, gradients(params, 0))
    assert ["kahan_comp" in optimizer.state[p] for p in params] == [True, False, True, False]
    twin_params = [Parameter(p.detach().clone()) for p in params]
    twin = NestedOptimizer(twin_params, **options)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, ps in ((optimizer, params), (twin, twin_params)):
        step_with(o, ps, gradients(params, 1))
    for p, q in zip(params, twin_params):
        assert_same_tensors([p, *optimizer.state[p].values()], [q, *twin.state[q].values()])


REFUSED = {
    "sparse gradients, but parameter 'second'": lambda group: give_sparse_grad(*group["params"]),
    "param group 1: Invalid frequency": lambda group: group.update(frequency=0),
    "param group 1: Invalid window": lambda group: group.update(window="max"),
}


def give_sparse_grad(param):
    param.grad = param.grad.to_sparse()


@pytest.mark.parametrize("message, spoil", REFUSED.items(), ids=list(REFUSED))
def test_what_no_step_can_do_is_refused_before_anything_changes(message, spoil):
    params = make_params((2, 3), (2, 3))
    named = [{"params": [(name, p)]} for name, p in zip(("first", "second"), params)]
    optimizer = NestedOptimizer(named, frequency=2, fused=True)
    for seed in range(3):
        step_with(optimizer, params, gradients(params, seed))
    for p, grad in zip(params, gradients(params, 3)):
        p.grad = grad
    spoil(optimizer.param_groups[1])
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_kahan_sum_with_differentiable_is_refused():
    with pytest.raises(RuntimeError, match="`kahan_sum` does not support `differentiable`"):
        NestedOptimizer(make_params((2,)), kahan_sum=True, differentiable=True)


def test_options_go_to_the_kernels_without_a_step():
    params = make_params((2,), (3,))
    optimizer = NestedOptimizer([{"params": [p]} for p in params], frequency=2, fused=True)
    optimizer.upload_options()  # nowhere to go yet
    step_with(optimizer, params, gradients(params, 0))
    optimizer.param_groups[1].update(lr=0.5, frequency=7, weight_decay=0.25)
    optimizer.upload_options()
    (table,) = [t.table for t in optimizer._fused._tables]
    assert table.settings[1, [0, 1, 7]].tolist() == [0.5, 0.25, 7.0]
    optimizer.add_param_group({"params": make_params((2,)), "frequency": 3})
    optimizer.upload_options()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.upload_options()


def test_a_frequency_is_not_uploaded_to_where_there_are_no_windows():
    twins = Twins(make_params((2,), dtype=F64))
    twins.train([0])
    twins.set_options(frequency=3)
    with pytest.raises(RuntimeError, match="run step"):
        twins.kernels.upload_options()
    twins.train(range(1, 5))


def test_a_parameter_that_no_kernel_serves_ends_unscaling_on_the_device():
    class Odd(Parameter):
        pass

    served = make_params((3,))
    optimizer = NestedOptimizer(served, frequency=2, fused=True)
    step_with(optimizer, served, gradients(served, 0))
    assert optimizer._step_supports_amp_scaling
    odd = Odd(torch.ones(3))
    odd.grad = torch.ones(3)
    optimizer.param_groups[0]["params"][0] = odd
    assert not optimizer._step_supports_amp_scaling
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="taken by fused kernels only"):
        optimizer.step()
    assert odd not in optimizer.state
    assert torch.equal(odd.detach(), torch.ones(3))
