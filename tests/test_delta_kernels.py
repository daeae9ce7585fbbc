"""Delta Momentum's kernels, interpreted on the CPU: the rule, whatever they are given."""

import copy

import pytest
import torch
from torch.nn import Parameter

from nested_optim import DeltaMomentum, delta_steps, rules

from .helpers import clone_params, make_params, random_grads, set_grads, step_with, train
from .interpreter import interpreted

triton = pytest.importorskip("triton")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Two of a shape, whole chunks, one element too many, more rows than columns, vectors, a number.
SHAPES = (8, 128), (6, 5), (2, 513), (6, 5), (300, 2), (3, 2, 4), (1025,), (7,), (7,), ()


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """The kernels' module, interpreted; afterwards as it was."""
    with interpreted() as modules:
        yield modules["delta"]


@pytest.fixture
def launched(kernel, monkeypatch):
    """How many tensors each launch of the update had."""
    sizes = []
    update = kernel.DeltaTable.update

    def counted(self, part, *args, **kwargs):
        sizes.append(self.parts[part])
        update(self, part, *args, **kwargs)

    monkeypatch.setattr(kernel.DeltaTable, "update", counted)
    return sizes


@pytest.fixture
def made(kernel, monkeypatch):
    """How many tensors each table had."""
    sizes = []
    init = kernel.DeltaTable.__init__

    def counted(self, entries, *args):
        sizes.append(len(entries))
        init(self, entries, *args)

    monkeypatch.setattr(kernel.DeltaTable, "__init__", counted)
    return sizes


def expected(params, bufs, grads, **options):
    """The rule in float64, products and all."""
    options = {"lr": 0.1, "momentum": 0.9, "delta_rate": 0.7, **options}
    news = [
        rules.delta_momentum(p.detach().double(), g.double(), b.double(), **options)
        for p, g, b in zip(params, grads, bufs)
    ]
    return [new.param for new in news], [new.momentum_buffer for new in news]


def assert_near(got, want, rounding, like):
    """Up to ``rounding`` of the largest element of ``like``, which is what has been rounded."""
    for a, b, reference in zip(got, want, like, strict=True):
        bound = rounding * max(float(reference.abs().max()), 1.0) if b.numel() else 0.0
        torch.testing.assert_close(a.detach().double(), b, rtol=0, atol=bound)


def second_step(dtype, options, shapes=SHAPES, grad_scale=1.0):
    """Parameters and buffers before a second step, and what the rule makes of them."""
    params = make_params(*shapes, dtype=dtype)
    optimizer = DeltaMomentum(params, lr=0.1, delta_rate=0.7, **options)
    train(optimizer, params, [0])
    bufs = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    grads = [grad_scale * g for g in random_grads(params, 1)]
    keys = ("normalized", "weight_decay", "decoupled", "maximize")
    want = expected(params, bufs, grads, **{k: options[k] for k in keys if k in options})
    step_with(optimizer, params, grads)
    found = [optimizer.state[p]["momentum_buffer"] for p in params]
    return params, found, *want


@pytest.mark.parametrize("product", [None, "float32", "bfloat16"])
@pytest.mark.parametrize(
    "dtype, state", [(F32, None), (BF16, None), (F16, None), (BF16, F32), (F32, BF16)]
)
def test_the_kernels_are_the_rule(dtype, state, product, launched):
    options = {"product_dtype": product, "state_dtype": state}
    params, bufs, new_params, new_bufs = second_step(dtype, options)
    assert launched == [len(SHAPES)] * 2
    term = F32 if product == "float32" or (product is None and (state or dtype) == F32) else BF16
    rounding = {F32: 2e-6, F16: 2e-3, BF16: 2e-2}
    assert_near(bufs, new_bufs, max(rounding[term], rounding[state or dtype]), new_bufs)
    assert_near(params, new_params, max(0.1 * rounding[term], rounding[dtype]), new_params)


@pytest.mark.parametrize(
    "options",
    [
        {"normalized": True},
        {"weight_decay": 0.3},
        {"weight_decay": 0.3, "maximize": True},
        {"weight_decay": 0.3, "decoupled": True},
        {"weight_decay": 0.3, "decoupled": True, "maximize": True, "normalized": True},
    ],
    ids=str,
)
def test_options_are_the_rule_s(options, launched):
    params, bufs, new_params, new_bufs = second_step(F32, options)
    assert launched == [len(SHAPES)] * 2
    assert_near(bufs, new_bufs, 2e-6, new_bufs)
    assert_near(params, new_params, 1e-6, new_params)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("product", [None, "bfloat16"])
def test_gradients_of_every_scale_stay_in_range(scale, normalized, product):
    """Squares of these leave float32; what the rule makes of them in float64 does not."""
    options = {"normalized": normalized, "product_dtype": product}
    _, bufs, _, new_bufs = second_step(F32, options, grad_scale=scale)
    assert_near(bufs, new_bufs, 1e-2 if product else 1e-5, new_bufs)


def test_a_gradient_of_zeros_decays_the_buffer_and_one_of_nan_does_not_pass_unseen(launched):
    params = make_params((4, 3), (5,))
    optimizer = DeltaMomentum(params, momentum=0.5, normalized=True)
    step_with(optimizer, params, [torch.ones_like(p) for p in params])
    step_with(optimizer, params, [torch.zeros_like(p) for p in params])
    for p in params:
        buf = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(buf, torch.full_like(buf, 0.5))
    step_with(optimizer, params, [torch.full_like(p, float("nan")) for p in params])
    assert all(bool(p.isnan().all()) for p in params) and len(launched) == 3


def test_every_layout_is_served_right_or_left_to_torch(launched):
    torch.manual_seed(0)
    params = [
        Parameter(torch.randn(5, 3, 4, 4).to(memory_format=torch.channels_last)),  # served
        Parameter(torch.randn(40, 30)),  # served, though nothing of it is aligned
        Parameter(torch.randn(6, 5).t()),  # columns first: not
        Parameter(torch.randn(0, 4)),  # nothing to do
        Parameter(torch.randn(8, 8)),  # its gradient lies otherwise: not
        Parameter(torch.randn(3, 4, dtype=torch.complex64)),
        Parameter(torch.randn(3, 4, dtype=F64)),
    ]
    params[1].data = torch.randn(1201)[1:].view(40, 30)
    grads = [torch.randn_like(p) for p in params]
    grads[1] = torch.randn(1201)[1:].view(40, 30)
    grads[4] = torch.randn(8, 8).t()
    twins = [Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    for ps, foreach in ((params, None), (twins, False)):
        optimizer = DeltaMomentum(ps, lr=0.1, foreach=foreach)
        for k in range(3):
            step_with(optimizer, ps, [(1 + k) * g for g in grads])
    assert launched == [2] * 3
    for p, twin in zip(params, twins):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)
        assert p.stride() == twin.stride()


def test_large_steps_are_taken_in_parts(launched, monkeypatch):
    shapes = ((16, 8),) * 5 + ((40, 40), (7,), (8, 16))
    results = []
    for size in (2**27, 4 * 300):
        monkeypatch.setattr(delta_steps, "_PART_BYTES", size)
        params = make_params(*shapes)
        train(DeltaMomentum(params, lr=0.1), params, range(3))
        results.append([p.detach() for p in params])
    # Parts of 300 elements at most, but for a tensor that is larger.
    assert launched == [8] * 3 + [2, 2, 1, 1, 2] * 3
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor([0.1], dtype=F64)])
def test_a_tensor_learning_rate_is_the_number(lr, launched):
    params, twins = make_params(*SHAPES), make_params(*SHAPES)
    options = {"weight_decay": 0.2, "decoupled": True}
    train(DeltaMomentum(params, lr=lr, **options), params, range(3))
    train(DeltaMomentum(twins, lr=0.1, **options), twins, range(3))
    assert len(launched) == 6
    torch.testing.assert_close(list(params), list(twins), rtol=1e-5, atol=1e-6)


def test_the_kernel_reads_a_learning_rate_where_it_lies(kernel):
    params = [torch.randn(2000), torch.randn(3, 5)]
    bufs, grads = ([torch.randn_like(p) for p in params] for _ in range(2))
    entries = [
        kernel.Entry(params[0], bufs[0], 0, 2048, 2048),
        kernel.Entry(params[1], bufs[1], 4096, None, 4112),
    ]
    table = kernel.DeltaTable(entries, F32, [1, 1])
    space = torch.full((4200,), torch.nan)
    addresses = [g.data_ptr() for g in grads]
    table.measure(addresses, momentum=0.9, rate=0.1, normalized=False)
    table.prepare(1, space)
    torch.testing.assert_close(space[4096:4111], grads[1].flatten() / grads[1].norm())
    assert space[:4096].isnan().all() and space[4111:].isnan().all()
    table.prepare(0, space)
    torch.testing.assert_close(space[:2000], grads[0] / grads[0].norm())
    torch.testing.assert_close(space[2048:4048], bufs[0])
    space[4112:4127] = 1.0
    terms = [space[2048:4048].clone(), torch.ones(3, 5)]
    table.factors.copy_(torch.tensor([0.25, 0.75]))
    new_bufs = [0.5 * b - g - f * t for b, g, f, t in zip(bufs, grads, (0.25, 0.75), terms)]
    new_params = [p * (1 - 0.1 * 0.3) - 0.1 * b for p, b in zip(params, new_bufs)]
    for part in range(2):
        table.update(
            part, space, lr=torch.tensor(0.1), weight_decay=0.3, momentum=0.5, sign=-1.0
        )  # fmt: skip
    torch.testing.assert_close(bufs, new_bufs)
    torch.testing.assert_close(params, new_params)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("momentum, rate", [(0.9, 0.3), (1e-3, 1e-45), (0.5, 1e45)])
def test_factors_are_the_rule_s_in_float64(kernel, momentum, rate, monkeypatch):
    """Of more spans than one step of the summation takes, of one, of a number and of zeros."""
    monkeypatch.setattr(kernel, "SUMS", 4)
    scales = (1e-20, 1.0, 1e20, 0.0, 1.0)
    shapes = (9 * kernel.SPAN + 5,), (3, 5), (), (7,), (kernel.SPAN,)
    grads = [s * torch.randn(n) for s, n in zip(scales, shapes)]
    entries, at = [], 0
    for g in grads:
        entries.append(kernel.Entry(torch.randn_like(g), torch.zeros_like(g), at, None, at))
        at += -(-g.numel() // 64) * 64
    table = kernel.DeltaTable(entries, F32)
    addresses = [g.data_ptr() for g in grads]
    for normalized, penalty in ((False, 0.0), (True, 0.0), (False, 0.5)):
        space = torch.full((at,), torch.nan)
        how = {"sign": -1.0, "penalty": penalty}
        table.measure(addresses, momentum=momentum, rate=rate, normalized=normalized, **how)
        table.prepare(0, space, **how)
        for e, g, factor in zip(entries, grads, table.factors.tolist()):
            g = penalty * e.param - g
            norm = g.double().norm()
            bounded = rate / (1 + rate) if normalized else rate / (1 + rate * norm**2 / momentum)
            want = momentum * bounded if normalized else bounded * norm**2
            assert factor == pytest.approx(float(want), rel=1e-6, abs=1e-44)
            unit = space[e.unit : e.unit + g.numel()]
            torch.testing.assert_close(unit, (g.double() / max(norm, 1e-300)).float().flatten())


@pytest.mark.parametrize(
    "options", [{"frequency": 3}, {"frequency": 2, "capturable": True}, {"capturable": True}]
)
@pytest.mark.parametrize("state_dtype", [None, F32])
def test_windows_close_as_on_torch_s_operations(options, state_dtype, launched):
    dtype = F16 if state_dtype else F32  # Triton's interpreter rounds bfloat16 towards zero
    params, twins = make_params(*SHAPES, dtype=dtype), make_params(*SHAPES, dtype=dtype)
    options = {"lr": 0.1, "state_dtype": state_dtype, **options}
    optimizers = DeltaMomentum(params, **options), DeltaMomentum(twins, foreach=True, **options)
    for seed in range(7):
        for ps, optimizer in zip((params, twins), optimizers):
            grads = random_grads(ps, seed)
            if seed == 3:
                grads[1] = None  # its window closes at another step from now on
            step_with(optimizer, ps, grads)
    assert launched
    for p, twin in zip(params, twins):
        tolerance = 1e-2 if state_dtype else 1e-5
        torch.testing.assert_close(p, twin, rtol=tolerance, atol=tolerance)
        for key in ("step", "window_count"):
            assert optimizers[0].state[p][key] == optimizers[1].state[twin][key]
    assert optimizers[0].flush() == optimizers[1].flush()


def test_tables_are_made_once_and_follow_what_moves(made, launched):
    params, twins = make_params((6, 5), (9,)), make_params((6, 5), (9,))
    optimizer, plain = DeltaMomentum(params, lr=0.1), DeltaMomentum(twins, lr=0.1, foreach=True)
    for seed in range(4):
        train(optimizer, params, [seed])  # gradients are new tensors each time
        train(plain, twins, [seed])
    assert len(made) == 1 and len(launched) == 4
    params[0].data = params[0].data.clone()
    state = optimizer.state[params[1]]
    state["momentum_buffer"] = state["momentum_buffer"].clone()
    train(optimizer, params, [4])
    train(plain, twins, [4])
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    train(optimizer, params, [5])
    train(plain, twins, [5])
    assert len(made) == 3
    torch.testing.assert_close(list(params), list(twins), rtol=1e-5, atol=1e-6)


@pytest.fixture
def repeated(monkeypatch):
    """Of each step but an optimizer's first, whether it was made as the one before."""
    found = []
    repeat = delta_steps.DeltaSteps.repeat

    def noted(self, optimizer):
        found.append(repeat(self, optimizer))
        return found[-1]

    monkeypatch.setattr(delta_steps.DeltaSteps, "repeat", noted)
    return found


def new_memory(params, state):
    params[1].data = params[1].data.clone()


def new_buffer(params, state):
    entry = state[params[1]]
    entry["momentum_buffer"] = entry["momentum_buffer"] + 1


def new_count(params, state):
    state[params[1]]["step"] = torch.tensor(7.0)


def another_layout(params, state):
    params[0].data = params[0].data.t().contiguous().t()


def buffer_moved(params, state):
    entry = state[params[0]]
    entry["momentum_buffer"].data = entry["momentum_buffer"].clone()


@pytest.mark.parametrize(
    "change", [new_memory, new_buffer, new_count, another_layout, buffer_moved]
)
def test_a_step_is_repeated_until_tensors_change(change, repeated, launched):
    params, twins = make_params((6, 5), (9,)), make_params((6, 5), (9,))
    optimizer, plain = DeltaMomentum(params, lr=0.1), DeltaMomentum(twins, lr=0.1, foreach=True)
    for seed in range(8):
        if seed == 4:
            change(params, optimizer.state)
            change(twins, plain.state)
        train(optimizer, params, [seed])
        train(plain, twins, [seed])
    again = change is not another_layout  # which is left to torch's operations
    assert repeated == [True, True, True, False, *[again] * 3]
    torch.testing.assert_close(list(params), list(twins), rtol=1e-5, atol=1e-6)
    for p, twin in zip(params, twins):
        assert optimizer.state[p]["step"] == plain.state[twin]["step"]


def transposed(tensor):
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("other", [lambda g: None, transposed, lambda g: g.expand(6, 5)])
def test_a_step_is_repeated_on_gradients_of_one_kind_only(other, repeated):
    params, twins = make_params((6, 5), (9,)), make_params((6, 5), (9,))
    optimizer, plain = DeltaMomentum(params, lr=0.1), DeltaMomentum(twins, lr=0.1, foreach=True)
    for seed in range(8):
        for ps, optim in ((params, optimizer), (twins, plain)):
            set_grads(ps, random_grads(ps, seed))
            if seed == 4:
                ps[0].grad = other(ps[0].grad[:1] if other is not transposed else ps[0].grad)
            optim.step()
    assert repeated == [True] * 3 + [False, False, True, True]
    torch.testing.assert_close(list(params), list(twins), rtol=1e-5, atol=1e-6)


def test_a_sparse_gradient_is_refused_as_ever():
    params = make_params((6, 5), (9,))
    optimizer = DeltaMomentum(params, lr=0.1)
    train(optimizer, params, range(3))
    set_grads(params, random_grads(params, 3))
    params[0].grad = params[0].grad.to_sparse()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before))


@pytest.mark.parametrize(
    "edit, again",
    [
        ({"lr": 0.03}, True),
        ({"lr": torch.tensor(0.03)}, True),
        ({"momentum": 0.5, "delta_rate": 0.1}, True),
        ({"weight_decay": 0.3, "maximize": True}, True),
        ({"normalized": True}, True),
        ({"weight_decay": 0.3, "decoupled": True}, False),
        ({"frequency": 2}, False),
        ({"delta_rate": 0.0}, False),
        ({"momentum": 0.0}, False),
        ({"foreach": False}, False),
        ({"product_dtype": "bfloat16"}, False),
    ],
    ids=str,
)
def test_numbers_may_be_edited_and_what_else_is_edited_is_seen(edit, again, repeated):
    params, twins = make_params((6, 5), (9,)), make_params((6, 5), (9,))
    optimizer, plain = DeltaMomentum(params, lr=0.1), DeltaMomentum(twins, lr=0.1, foreach=False)
    for seed in range(6):
        if seed == 3:
            optimizer.param_groups[0].update(edit)
            plain.param_groups[0].update({**edit, "foreach": False})
        train(optimizer, params, [seed])
        train(plain, twins, [seed])
    assert repeated[:3] == [True, True, again]
    tolerance = 2e-2 if "product_dtype" in edit else 1e-5
    torch.testing.assert_close(list(params), list(twins), rtol=tolerance, atol=tolerance)


def test_an_invalid_edit_is_refused_after_a_step_that_could_be_repeated(repeated):
    params = make_params((6, 5), (9,))
    optimizer = DeltaMomentum(params, lr=0.1)
    train(optimizer, params, range(3))
    before = [p.detach().clone() for p in params]
    for edit in ({"frequency": 0}, {"fused": True}, {"window": "max"}):
        old = dict(optimizer.param_groups[0])
        optimizer.param_groups[0].update(edit)
        with pytest.raises((ValueError, RuntimeError)):
            train(optimizer, params, [3])
        optimizer.param_groups[0].update({key: old[key] for key in edit})
    assert all(torch.equal(p, q) for p, q in zip(params, before))


def test_groups_closures_and_hooks_go_along_with_repeated_steps(repeated, launched):
    results = []
    for foreach in (None, True):
        params = make_params((6, 5), (9,), (4, 3), (2,))
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
        optimizer = DeltaMomentum(groups, lr=0.1, foreach=foreach)
        calls = []
        optimizer.register_meta_update_hook(lambda o, calls=calls: calls.append(1), every=2)
        params[3].requires_grad_(False)  # and never has a gradient

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(5)]
        optimizer.add_param_group({"params": make_params((3, 3), seed=1)})
        params = [p for g in optimizer.param_groups for p in g["params"]]
        losses += [
            optimizer.step(lambda ps=params, o=optimizer: closure(ps, o)).item() for _ in range(3)
        ]
        assert len(calls) == 4
        results.append((losses, [p.detach() for p in params]))
        if foreach is None:
            assert repeated == [*[True] * 4, False, True, True]
            assert launched == [2, 1] * 5 + [2, 1, 1] * 3
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_parameter_made_shorter_in_place_is_seen(made):
    params = make_params((8, 4))
    optimizer = DeltaMomentum(params, lr=0.1)
    train(optimizer, params, [0])
    tail = params[0].detach()[4:].clone()
    params[0].data = params[0].data[:4]  # the same address
    state = optimizer.state[params[0]]
    state["momentum_buffer"] = state["momentum_buffer"][:4]
    params[0].grad = torch.ones(4, 4)
    optimizer.step()
    assert made == [1, 1]
    assert torch.equal(params[0].untyped_storage().size() and tail, tail)


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(delta_steps, "_MAX_PLANS", 3)
    params = make_params(*[(3,)] * 6)
    optimizer = DeltaMomentum(params, lr=0.1)
    for k in range(6):
        set_grads(params, [g if i <= k else None for i, g in enumerate(random_grads(params, k))])
        optimizer.step()
    assert len(optimizer._kernel_steps._plans) <= 3


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"foreach": False}, {"differentiable": True}, {"delta_rate": 0.0},
     {"momentum": 0.0}, {"product_dtype": "float64"}, {"product_dtype": "float16"}],
    ids=str,
)  # fmt: skip
def test_what_the_kernels_do_not_know_takes_the_other_paths(options, launched):
    params, twins = make_params(*SHAPES), make_params(*SHAPES)
    options = {"lr": 0.1, **options}
    if "differentiable" in options:
        for p in (*params, *twins):
            p.requires_grad_(False)
    train(DeltaMomentum(params, **options), params, range(3))
    assert not launched
    train(DeltaMomentum(twins, **{"foreach": False, **options}), twins, range(3))
    torch.testing.assert_close(list(params), list(twins), rtol=1e-5, atol=1e-6)


def test_a_copy_of_the_optimizer_has_tables_of_its_own(launched):
    params = make_params((6, 5))
    optimizer = DeltaMomentum(params, lr=0.1)
    train(optimizer, params, [0])
    twin = copy.deepcopy(optimizer)
    theirs = twin.param_groups[0]["params"]
    before = params[0].detach().clone()
    train(twin, theirs, [1])
    assert torch.equal(params[0], before) and len(launched) == 2
    train(optimizer, params, [1])
    torch.testing.assert_close(params[0], theirs[0])


def test_clones_train_alike():
    params = make_params(*SHAPES)
    twins = clone_params(params)
    for ps in (params, twins):
        train(DeltaMomentum(ps, lr=0.1, product_dtype=BF16), ps, range(4))
    assert all(torch.equal(p, q) for p, q in zip(params, twins))
