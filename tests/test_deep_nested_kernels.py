"""The learned step's kernels, interpreted on the CPU, against the rule and autograd."""

import copy

import pytest
import torch
from torch.nn import Parameter

from nested_optim import DeepNestedOptimizer, NestedOptimizer, windows
from nested_optim.meta import learned

from .helpers import (
    assert_same_state,
    assert_same_tensors,
    clone_params,
    make_params,
    random_grads,
    set_grads,
)
from .interpreter import interpreted

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# A scalar, a part of a chunk, more than a span's chunk; the last is cut into rows of 33.
SHAPES = ((), (4, 3), (21, 33))
SMALL = {"controller_hidden_dim": 3, "momentum_hidden_dim": 5, "cms_frequencies": (1, 2, 3)}


@pytest.fixture(scope="module", autouse=True)
def modules():
    with interpreted() as found:
        yield found


@pytest.fixture
def launches(modules, monkeypatch):
    """Of each launch of the pass: whether it measured, and whether it updated."""
    found = []
    launch = modules["learned_adamw"].launch_pass

    def counted(kind, grid, args):
        found.append((args[15], args[16]))
        launch(kind, grid, args)

    monkeypatch.setattr(modules["learned_adamw"], "launch_pass", counted)
    return found


def build(params, fused=True, **options):
    options = {"lr": 0.02, "meta_lr": 0.01, "meta_update_freq": 3, **SMALL, **options}
    late = options.pop("late", {})
    groups = [{"params": params[:1], "name": "early"}, {"params": params[1:], **late}]
    return DeepNestedOptimizer(groups, fused=fused, **options)


def pair(dtype=F64, shapes=SHAPES, **options):
    params = make_params(*shapes, dtype=dtype)
    twins = clone_params(params)
    return build(params, **options), build(twins, fused=False, **options), params, twins


def grads_of(params, seed):
    """Noise, and a part that lasts, so that updates and gradients have angles."""
    noise = random_grads(params, seed)
    return [g + p.detach().sign() for g, p in zip(noise, params)]


def advance(optimizer, params, seed, loss=None):
    set_grads(params, grads_of(params, seed))
    return optimizer.step(loss) if loss is not None else optimizer.step()


def assert_alike(optimizer, twin, rtol, of_learned=None):
    for group, other in zip(optimizer.param_groups, twin.param_groups):
        for p, q in zip(group["params"], other["params"]):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=rtol)
            mine, its = optimizer.state[p], twin.state[q]
            assert mine.keys() == its.keys()
            for key in mine:
                assert mine[key].dtype == its[key].dtype
                # The interpreter cuts what a device rounds.
                bound = max(10 * rtol, 2**-7 if mine[key].dtype == BF16 else 0)
                torch.testing.assert_close(mine[key], its[key], rtol=bound, atol=bound)
    first, other = optimizer.param_groups[0], twin.param_groups[0]
    of_learned = of_learned or 1e-6  # they are float32
    for key in learned.KEYS:
        if isinstance(first[key], torch.Tensor):
            scale = other[key].abs().max().clamp(min=1e-30)
            torch.testing.assert_close(
                first[key] / scale, other[key] / scale, rtol=of_learned, atol=of_learned
            )
        else:
            assert first[key] == other[key]
    torch.testing.assert_close(
        optimizer.get_lr_multipliers(), twin.get_lr_multipliers(), rtol=of_learned, atol=0
    )
    mine, its = optimizer.get_momentum_stats(), twin.get_momentum_stats()
    assert mine.keys() == its.keys()
    for key, value in mine.items():
        assert value == pytest.approx(its[key], rel=10 * of_learned, abs=of_learned)


VARIANTS = {
    "all": {"weight_decay": 0.1},
    "controller alone": {"learn_momentum": False, "learn_mixing": False, "meta_rule": "adam"},
    "momentum alone": {"learn_lr": False, "learn_mixing": False, "weight_decay": 0.1},
    "mixing alone": {"learn_lr": False, "learn_momentum": False, "cms_frequencies": (1, 2)},
    "coupled, amsgrad": {"weight_decay": 0.3, "decoupled": False, "amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "not normalized": {"normalize": False},
    "clipped": {"max_grad_norm": 0.5, "meta_rule": "adam"},
    "a look before a meta update": {"meta_update_freq": 5, "weight_decay": 0.1},
    "windows": {"late": {"frequency": 2, "lr": 0.05, "eps": 1e-6, "betas": (0.8, 0.9)}},
    "no first momentum": {"betas": (0.0, 0.99), "cms_frequencies": (1, 4)},
}


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_steps_and_what_is_learned_are_those_of_the_rule(options, launches):
    optimizer, twin, params, twins = pair(**options)
    for seed in range(5):
        loss = 1.5 - seed if seed % 2 else None  # told or not
        advance(optimizer, params, seed, loss)
        advance(twin, twins, seed, loss)
    assert optimizer.param_groups[0]["meta_updates"] == 1
    moved = [(p.grad is not None) for p in params]
    assert all(moved) and any(update for _, update in launches)
    adam = options.get("meta_rule") == "adam"
    # By the cosine rule a rounding of what is gathered, in float32, moves what is learned.
    assert_alike(optimizer, twin, 1e-9 if adam else 1e-6)


def test_the_way_from_where_parameters_began_is_summed_group_by_group(modules, monkeypatch):
    """Over several spans of a tensor, of whose groups not all are looked at in a step."""
    looked = []
    launch = modules["look_back"].launch_look
    monkeypatch.setattr(
        modules["look_back"],
        "launch_look",
        lambda kind, grid, args: (looked.append(args[6].tolist()), launch(kind, grid, args)),
    )
    monkeypatch.setattr(modules["look_back"], "PART", 2)
    shapes = (1,), (3, 33), (129, 65)  # the last is of two spans, its group of two parts
    late = {"frequency": 2, "lr": 0.05}
    optimizer, twin, params, twins = pair(shapes=shapes, late=late, meta_update_freq=20)
    for seed in range(10):
        advance(optimizer, params, seed)
        advance(twin, twins, seed)
    # Places among the groups of a step, and how many steps a look stands for.
    assert looked == [[[1, 4]], [[0, 5]], [[1, 4]], [[0, 5]]]
    assert_alike(optimizer, twin, 1e-6)


def test_the_betas_of_the_update_before_are_those_that_count(launches):
    optimizer, twin, params, twins = pair(meta_rule="adam", weight_decay=0.1)
    for seed in range(5):
        for opt in (optimizer, twin):
            for group in opt.param_groups:
                group["betas"] = 0.1 * seed + 0.4, 0.9 + 0.01 * seed
        advance(optimizer, params, seed)
        advance(twin, twins, seed)
    assert launches
    assert_alike(optimizer, twin, 1e-9)


def test_before_a_meta_update_a_pass_only_measures_and_otherwise_one_pass_does_all(launches):
    optimizer, _, params, _ = pair()
    for seed in range(5):
        advance(optimizer, params, seed)
    # The first update is left to other paths; the third is a meta update.
    assert launches == [(True, True), (True, False), (False, True), *[(True, True)] * 2]
    launches.clear()
    for group in optimizer.param_groups:
        group["meta_lr"] = 0.0
    advance(optimizer, params, 5)
    assert launches == [(False, True)]


@pytest.mark.parametrize(
    "dtype, options",
    [(F32, {}), (BF16, {"state_dtype": F32}), (F16, {"state_dtype": F32}), (BF16, {})],
    ids=str,
)
def test_narrow_tensors_are_computed_wide_and_rounded_once(dtype, options, launches):
    optimizer, twin, params, twins = pair(dtype, **options)
    for seed in range(5):
        advance(optimizer, params, seed)
        advance(twin, twins, seed)
    assert len(launches) == 5
    bound = {F32: 1e-4, F16: 3e-3, BF16: 3e-2}[dtype]
    assert_alike(optimizer, twin, bound, of_learned=max(2e-3, bound))


def test_tensors_of_several_dtypes_learn_together(launches):
    params = [*make_params((4, 3)), *make_params((5,), dtype=BF16)]
    twins = clone_params(params)
    optimizer, twin = build(params), build(twins, fused=False)
    for seed in range(4):
        advance(optimizer, params, seed)
        advance(twin, twins, seed)
    assert len(launches) == 2 * 4
    assert_alike(optimizer, twin, 3e-2, of_learned=3e-2)


def test_layouts_in_memory_do_not_matter(launches):
    weights = [
        torch.randn(4, 3, 5, 2, dtype=F64).to(memory_format=torch.channels_last),
        torch.randn(7, 5, dtype=F64).t(),
        torch.randn(9, dtype=F64),
    ]
    params, twins = ([Parameter(w.clone()) for w in weights] for _ in range(2))
    assert not params[0].is_contiguous() and not params[1].is_contiguous()
    optimizer, twin = build(params), build(twins, fused=False)
    for seed in range(4):
        grads = [g.contiguous() for g in grads_of(twins, seed)]
        for ps, opt in ((params, optimizer), (twins, twin)):
            for p, g in zip(ps, grads):
                p.grad = g.clone()
            opt.step()
    assert len(launches) == 4
    assert_alike(optimizer, twin, 1e-6)


@pytest.mark.parametrize(
    "params",
    [
        [torch.randn(3), torch.randn(0, 2)],
        [torch.randn(3), torch.randn(8, 6)[:, ::2]],
        [torch.randn(3), torch.randn(3, dtype=F64)],
    ],
    ids=["an empty tensor", "a strided view", "traces of two dtypes"],
)
def test_what_the_kernels_do_not_know_is_left_to_other_paths(params, launches):
    params = [Parameter(p) for p in params]
    twins = [Parameter(p.detach().clone()) for p in params]
    optimizer, twin = build(params), build(twins, fused=False)
    for seed in range(3):
        advance(optimizer, params, seed)
        advance(twin, twins, seed)
    assert not launches
    assert_alike(optimizer, twin, 1e-5, of_learned=1e-3)  # clones are added up in another order


FLAGS = {
    "defaults": {},
    "decay": {"weight_decay": 0.1},
    "amsgrad, coupled": {"amsgrad": True, "weight_decay": 0.1, "decoupled": False},
    "windows": {"frequency": 2},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("mode", ["simple", "explicit"])
def test_without_learning_it_is_nested_optimizer_s_kernel_bit_for_bit(mode, flags, launches):
    params = make_params(*SHAPES)
    twins = clone_params(params)
    # In explicit mode there are no kernels of learned updates to insist on.
    fused = {"fused": mode == "simple"}
    own = {"meta_lr": 0.0, "mode": mode, **fused, **flags}
    optimizer = build(params, **own)
    nested = NestedOptimizer(twins, lr=0.02, **{"weight_decay": 0.0, **fused, **flags})
    for seed in range(5):
        advance(optimizer, params, seed, 1.0)
        advance(nested, twins, seed)
        assert_same_tensors(params, twins)
    assert not launches
    assert torch.equal(optimizer.get_lr_multipliers(), torch.ones(2))
    saved = copy.deepcopy(optimizer.state_dict())
    again = build([Parameter(p.detach().clone()) for p in params], **own)
    again.load_state_dict(saved)
    mine = [p for group in again.param_groups for p in group["params"]]
    for seed in range(5, 8):
        advance(again, mine, seed)
        advance(nested, twins, seed)
        assert_same_tensors(mine, twins)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
def test_learning_begins_and_rests_where_meta_lr_is_moved(launches):
    optimizer, twin, params, twins = pair(meta_lr=0.0, meta_rule="adam", weight_decay=0.1)

    def run(seeds, rate):
        for opt in (optimizer, twin):
            for group in opt.param_groups:
                group["meta_lr"] = rate
        for seed in seeds:
            advance(optimizer, params, seed, 1.0)
            advance(twin, twins, seed, 1.0)

    run(range(4), 0.0)
    first = optimizer.param_groups[0]
    assert not launches and first["global_step"] == 4 and not first["meta_updates"]
    run(range(4, 9), 0.01)
    # An update before which there was no trace teaches nothing; the ninth step is a meta update's.
    assert launches and first["meta_updates"] == 2
    assert all(state["step"].is_cpu for state in optimizer.state.values())
    assert not optimizer._step_supports_amp_scaling  # a scaler unscales before it
    assert_alike(optimizer, twin, 1e-9)
    assert (optimizer.get_lr_multipliers() != 1).all()
    before = len(launches)
    run(range(9, 11), 0.0)  # what has been learned goes on
    assert len(launches) == before + 2
    assert_alike(optimizer, twin, 1e-9)


def test_it_resumes_to_the_last_bit_on_the_kernels_and_elsewhere(launches):
    optimizer, _, params, _ = pair(late={"frequency": 2})
    for seed in range(4):
        advance(optimizer, params, seed)
    saved = copy.deepcopy(optimizer.state_dict())
    start = [p.detach().clone() for p in params]
    for seed in range(4, 7):
        advance(optimizer, params, seed)
    for fused in (True, False):
        twins = [Parameter(p.clone()) for p in start]
        again = build(twins, late={"frequency": 2})
        again.load_state_dict(copy.deepcopy(saved))
        for group in again.param_groups:
            group["fused"] = fused
        before = len(launches)
        for seed in range(4, 7):
            advance(again, twins, seed)
        assert (len(launches) > before) == fused
        if fused:
            assert_same_tensors(params, twins)
            assert_same_state(optimizer, again)
        else:
            assert_alike(optimizer, again, 1e-6)


def test_moved_memory_and_new_gradients_are_found(launches):
    optimizer, twin, params, twins = pair()
    for seed in range(4):
        for ps in (params, twins):
            ps[1].data = ps[1].data.clone()
            ps[1].grad = None
        if seed == 3:  # other learned tensors, as after a checkpoint
            for opt in (optimizer, twin):
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        advance(optimizer, params, seed)
        advance(twin, twins, seed)
    assert_alike(optimizer, twin, 1e-6)
    set_grads(params, [None, *grads_of(params, 4)[1:]])
    set_grads(twins, [None, *grads_of(twins, 4)[1:]])
    optimizer.step()
    twin.step()
    assert_alike(optimizer, twin, 1e-6)
    assert len(launches) == 5


def _leave_out(optimizer, params):
    params[1].grad = None


def _slow_down(optimizer, params):
    optimizer.param_groups[1]["frequency"] = 2


def _turn_off(optimizer, params):
    for group in optimizer.param_groups:
        group["meta_lr"] = 0.0


def _other_lr(optimizer, params):
    optimizer.param_groups[1]["lr"] = 0.3


def _add_group(optimizer, params):
    params.append(torch.nn.Parameter(torch.ones(5, dtype=F64)))
    params[-1].grad = torch.linspace(-1, 1, 5, dtype=F64)
    optimizer.add_param_group({"params": params[-1:]})


def _add_idle_group(optimizer, params):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(5, dtype=F64))]})


def _swap(optimizer, params):
    group = optimizer.param_groups[1]
    params[2] = torch.nn.Parameter(params[2].detach() + 1)
    params[2].grad = torch.ones_like(params[2])
    group["params"] = [params[1], params[2]]


def _forget_state(optimizer, params):
    del optimizer.state[params[0]]


def _lay_out_anew(optimizer, params):
    params[2].grad = params[2].grad.t().contiguous().t()


def _load(optimizer, params):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _gone(optimizer, params):
    for p in params:
        p.grad = None


CHANGES = [
    _leave_out, _slow_down, _turn_off, _other_lr, _add_group, _add_idle_group, _swap,
    _forget_state, _lay_out_anew, _load, _gone,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_steps_like_the_last_are_made_without_a_look_at_all_that_did_not_change(
    change, monkeypatch
):
    """And are the same steps, to the last bit, before and after a change."""
    looked = []
    real = windows.advance
    monkeypatch.setattr(windows, "advance", lambda *args: (looked.append(args[0]), real(*args))[1])
    alone = {"learn_lr": False, "learn_momentum": False, "cms_frequencies": (1, 2)}
    params = make_params(*SHAPES, dtype=F64)
    twins = clone_params(params)
    optimizer, twin = build(params, **alone), build(twins, **alone)
    monkeypatch.setattr(twin._learning, "repeat", lambda optimizer: None)
    found = {}
    for seed in range(7):
        looked.clear()
        for opt, tensors in ((optimizer, params), (twin, twins)):
            old = tensors[: len(SHAPES)]
            set_grads(old, grads_of(old, seed))
            if seed == 3:
                change(opt, tensors)
            opt.step()
        found[seed] = looked.count(optimizer)
        for mine, its in zip(params, twins):
            assert torch.equal(mine, its)
        assert_same_state(optimizer, twin)
        assert looked.count(twin) == len(twin.param_groups)
    # The first step begins, the second is the first by the kernels.
    assert found[0] == found[1] == 2 and found[2] == 0
    assert (found[3] > 0) == (change not in (_other_lr, _lay_out_anew, _turn_off))
    assert (found[6] > 0) == (change is _slow_down)  # the others are alike again
    assert_alike(optimizer, twin, 0.0, of_learned=1e-15)


@pytest.mark.parametrize(
    "bad, error, named",
    [("sparse", RuntimeError, "sparse gradients"), ("frequency", ValueError, "param group 1")],
)
def test_what_is_refused_is_refused_in_a_step_like_the_last(bad, error, named):
    optimizer, _, params, _ = pair()
    for seed in range(4):
        advance(optimizer, params, seed)
    set_grads(params, grads_of(params, 4))
    before = [p.detach().clone() for p in params]
    if bad == "sparse":
        params[1].grad = params[1].grad.to_sparse()
    else:
        optimizer.param_groups[1]["frequency"] = True
    with pytest.raises(error, match=named):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    optimizer.param_groups[1]["frequency"] = 1
    advance(optimizer, params, 5)
    assert not any(map(torch.equal, params, before))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("rule", ["cosine", "adam"])
def test_a_gradient_that_is_not_finite_teaches_nothing(rule, launches):
    optimizer, _, params, _ = pair(meta_update_freq=100, meta_rule=rule)
    for seed in range(9):
        advance(optimizer, params, seed)
    first = optimizer.param_groups[0]
    gathers = [f"{module}_grad" for module in learned.modules(first)]
    gathers += ["long_run"] if rule == "cosine" else []
    before = {key: first[key].clone() for key in gathers}
    assert all(grad.abs().max() > 0 for grad in before.values())
    grads = grads_of(params, 9)  # of a step that looks back
    grads[0].fill_(float("inf"))
    set_grads(params, grads)
    optimizer.step()
    for key, grad in before.items():
        assert torch.equal(first[key], grad)
    assert len(launches) == 9


def test_a_learning_rate_that_is_a_tensor_is_read_in_every_step():
    optimizer, twin, params, twins = pair(lr=torch.tensor(0.02), foreach=False)
    for seed in range(4):
        advance(optimizer, params, seed)
        advance(twin, twins, seed)
        for group in (*optimizer.param_groups, *twin.param_groups):
            group["lr"].mul_(0.7)
    assert_alike(optimizer, twin, 1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "explicit"}, "`fused` needs mode='simple'"),
        ({"cms_frequencies": (1, 2, 3, 4)}, "kernels for 3 momenta at most"),
        ({"momentum_hidden_dim": 200}, "needs momentum_hidden_dim <= 128"),
        ({"controller_hidden_dim": 129}, "needs controller_hidden_dim <= 128"),
        ({"late": {"fused": False}}, "learned updates of all groups are one pass"),
    ],
)
def test_what_has_no_kernels_is_refused_by_its_name(options, message):
    with pytest.raises(RuntimeError, match=message):
        build(make_params(*SHAPES), **options)


def test_kernels_that_are_not_there_are_refused_and_groups_that_part_from_the_others(monkeypatch):
    optimizer, _, params, _ = pair()
    advance(optimizer, params, 0)
    optimizer.param_groups[1]["fused"] = None
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="learned updates of all groups are one pass"):
        advance(optimizer, params, 1)
    assert_same_tensors(params, before)
    optimizer.param_groups[1]["fused"] = True
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="learned updates have no kernels on cpu"):
        advance(optimizer, params, 1)
    assert_same_tensors(params, before)


@pytest.mark.parametrize(
    "options, by_kernels",
    [
        ({"fused": None}, True),
        ({"fused": True}, True),
        ({"fused": False}, False),
        ({"fused": None, "foreach": True}, False),
        ({"fused": None, "foreach": False}, False),
        ({"fused": None, "cms_frequencies": (1, 2, 3, 4)}, False),
        ({"fused": None, "momentum_hidden_dim": 256}, False),
    ],
    ids=str,
)
def test_learned_steps_go_by_the_kernels_unless_they_cannot_or_another_path_is_asked_for(
    options, by_kernels, launches
):
    params = make_params(*SHAPES)
    optimizer = build(params, **options)
    for seed in range(2):
        advance(optimizer, params, seed)
    assert bool(launches) == by_kernels
    # Counted on the host, so that a step asks the device for nothing.
    assert all(state["step"].is_cpu for state in optimizer.state.values())
