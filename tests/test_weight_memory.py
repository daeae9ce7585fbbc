"""WeightMemory: the exchange rule, its special cases, and steps that must not count."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nested_optim import DGD, M3, DeltaMomentum, NestedOptimizer, WeightMemory, rules
from nested_optim.exchanges import exchange_, exchange_where_

from .helpers import (
    assert_same_state,
    assert_same_tensors,
    clone_params,
    make_params,
    random_grads,
    set_grads,
    step_with,
    train,
)

SHAPES = (7, 5), (11,), ()

OPTIMIZERS = {
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr),
    "AdamW-fused": lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True),
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "SGD-momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "RMSprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr),
    "Adagrad": lambda params, lr: torch.optim.Adagrad(params, lr=lr),
    "NestedOptimizer": lambda params, lr: NestedOptimizer(params, lr=lr),
    "NestedOptimizer-slow": lambda params, lr: NestedOptimizer(params, lr=lr, frequency=3),
    "M3": lambda params, lr: M3(
        [{"params": params[:1], "alpha": 0.25}, {"params": params[1:], "algorithm": "adamw"}], lr=lr
    ),
    "DeltaMomentum": lambda params, lr: DeltaMomentum(params, lr=lr),
}


class ByHand:
    """The exchange as it is written down, in float64 lists of Python's own making."""

    def __init__(self, params, frequencies, write, pull):
        self.settings = list(zip(frequencies, write, pull))
        self.levels = [[p.detach().double().clone() for p in params] for _ in frequencies]
        self.count = 0

    def after_step(self, params):
        """The live weights that the exchange leaves, given those that the step left."""
        self.count += 1
        live = [p.detach().double().clone() for p in params]
        chain = [live, *self.levels]
        for k, (frequency, write, pull) in enumerate(self.settings):
            if self.count % frequency == 0:
                for u, v in zip(chain[k], chain[k + 1]):
                    d = v - u
                    u += pull * d
                    v -= write * d
        return live


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "frequencies, write, pull",
    [
        ((2, 4), (0.5, 0.5), (0.5, 0.5)),  # frequencies that coincide: the fastest pair first
        ((1, 3, 3), (0.1, 0.3, 0.6), (0.05, 0.7, 0.2)),
        ((3,), (1.0,), (0.0,)),
        ((2,), (0.0,), (1.0,)),
    ],
    ids=str,
)
def test_any_optimizer_follows_the_written_rule(name, frequencies, write, pull):
    params = make_params(*SHAPES, dtype=torch.float64)
    twins = clone_params(params)
    optimizer, twin = (OPTIMIZERS[name](ps, 0.1) for ps in (params, twins))
    memory = WeightMemory(optimizer, frequencies, write, pull)
    reference = ByHand(twins, frequencies, write, pull)
    for seed in range(13):
        step_with(optimizer, params, random_grads(params, seed))
        step_with(twin, twins, random_grads(twins, seed))
        with torch.no_grad():
            for p, value in zip(twins, reference.after_step(twins)):
                p.copy_(value)
        torch.testing.assert_close(params, twins, rtol=1e-12, atol=1e-12)
        for k, level in enumerate(reference.levels):
            torch.testing.assert_close(memory.weights(k + 1), level, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("write, pull", [(0.5, 0.5), (0.2, 0.7), (0.01, 0.0), (1.0, 0.0)])
def test_the_rule_is_the_formula(dtype, write, pull):
    u, v = (torch.randn(50, dtype=dtype) for _ in range(2))
    new_u, new_v = rules.exchange(u, v, write=write, pull=pull)
    exact = torch.complex128 if dtype.is_complex else torch.float64
    d = v.to(exact) - u.to(exact)
    tolerance = {torch.bfloat16: 4e-3, torch.float32: 3e-7}.get(dtype, 1e-15)
    for new, want in ((new_u, u.to(exact) + pull * d), (new_v, v.to(exact) - write * d)):
        assert new.dtype == dtype
        assert (new.to(exact) - want).abs().max() <= tolerance * (u.abs().max() + v.abs().max())


@pytest.mark.parametrize("write, pull", [(0.5, 0.5), (0.3, 0.3), (0.05, 0.05)])
def test_equal_rates_conserve_the_sum_of_a_pair(write, pull):
    u, v = (torch.randn(100, dtype=torch.float64) for _ in range(2))
    new_u, new_v = rules.exchange(u, v, write=write, pull=pull)
    torch.testing.assert_close(new_u + new_v, u + v, rtol=0, atol=1e-15)
    assert not torch.equal(new_u, u)


@pytest.mark.parametrize(
    "u_dtype, v_dtype",
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.complex64, torch.complex64),
    ],
    ids=str,
)
@pytest.mark.parametrize("write, pull", [(0.5, 0.5), (0.2, 0.7), (0.01, 0.0), (0.0, 1.0)])
def test_lists_in_place_are_the_rule_to_the_last_bit(u_dtype, v_dtype, write, pull):
    us = [torch.randn(s, dtype=u_dtype) for s in SHAPES] + [torch.randn(6, 4, dtype=u_dtype).t()]
    vs = [torch.randn(s, dtype=v_dtype) for s in SHAPES] + [torch.randn(6, 4, dtype=v_dtype).t()]
    us.append(torch.randn(50, dtype=u_dtype))
    vs.append(us[-1].to(v_dtype))  # as rounding has left it
    want = [rules.exchange(u, v, write=write, pull=pull) for u, v in zip(us, vs)]
    exchange_(us, vs, write, pull)
    assert_same_tensors(us, [u for u, _ in want])
    assert_same_tensors(vs, [v for _, v in want])


@pytest.mark.parametrize("gate", [True, False])
def test_a_gate_on_the_device_decides_alike(gate):
    us, vs = ([torch.randn(s) for s in SHAPES] for _ in range(2))
    want_u, want_v = ([t.clone() for t in ts] for ts in (us, vs))
    if gate:
        exchange_(want_u, want_v, 0.3, 0.4)
    exchange_where_(us, vs, 0.3, 0.4, torch.tensor(gate))
    assert_same_tensors(us, want_u)
    assert_same_tensors(vs, want_v)


# ---------------------------------------------------------------------- special cases


def test_without_pull_one_level_is_torchs_average_of_the_weights():
    """Bit for bit ``torch.optim.swa_utils`` with the same decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)  # the first update copies
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    memory = WeightMemory(optimizer, frequencies=(1,), write=(1 - 0.9,), pull=(0.0,))
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    assert_same_tensors(memory.weights(1), list(averaged.module.parameters()))


def test_complementary_rates_are_lookahead():
    """Zhang et al. 2019, algorithm 1: slow += alpha (fast - slow); fast = slow."""
    alpha, k = 0.8, 5
    params = make_params(*SHAPES, dtype=torch.float64)
    twins = clone_params(params)
    slow = [p.detach().clone() for p in twins]
    optimizer, inner = (torch.optim.SGD(ps, lr=0.1, momentum=0.9) for ps in (params, twins))
    memory = WeightMemory(optimizer, frequencies=(k,), write=(alpha,), pull=(1 - alpha,))
    for step in range(1, 23):
        for opt, ps in ((optimizer, params), (inner, twins)):
            step_with(opt, ps, random_grads(ps, step))
        if step % k == 0:
            for s, p in zip(slow, twins):
                s += alpha * (p.detach() - s)
                p.data.copy_(s)
            assert_same_tensors(params, memory.weights(1))  # the pair is one
    torch.testing.assert_close(params, twins, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(memory.weights(1), slow, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("off", ["everywhere", "far away"])
def test_a_memory_without_exchanges_leaves_the_optimizer_as_it_is(name, off):
    params = make_params(*SHAPES)
    twins = clone_params(params)
    optimizer, bare = (OPTIMIZERS[name](ps, 0.1) for ps in (params, twins))
    memory = WeightMemory(optimizer, () if off == "everywhere" else (1000, 2000))
    for opt, ps in ((optimizer, params), (bare, twins)):
        train(opt, ps, range(7))
    assert_same_tensors(params, twins)
    if off == "everywhere":
        assert_same_state(optimizer, bare)
        assert_same_tensors(memory.weights(0), memory.weights(-1))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_lr_0_from_the_start_nothing_moves(name):
    params = make_params(*SHAPES)
    before = clone_params(params)
    optimizer = OPTIMIZERS[name](params, 0.0)
    memory = WeightMemory(optimizer, (1, 2))
    train(optimizer, params, range(5))
    assert_same_tensors(params, before)
    assert_same_tensors(memory.weights(-1), before)


@pytest.mark.parametrize("write, pull", [(0.5, 0.5), (0.1, 0.9), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("frequencies", [(1,), (1, 2)])
def test_with_lr_0_narrow_copies_move_nothing(frequencies, write, pull):
    """They are rounded, and must not draw the weights to what they can hold."""
    params = make_params(*SHAPES)
    before = clone_params(params)
    optimizer = torch.optim.SGD(params, lr=0.0)
    memory = WeightMemory(optimizer, frequencies, write, pull, dtype="bfloat16")
    train(optimizer, params, range(5))
    assert_same_tensors(params, before)
    assert_same_tensors(memory.weights(-1), [p.detach().bfloat16() for p in before])


def test_copies_are_of_the_weights_before_the_first_step():
    params = make_params(*SHAPES)
    before = clone_params(params)
    optimizer = torch.optim.AdamW(params, lr=0.1)
    memory = WeightMemory(optimizer, (10,))
    train(optimizer, params, range(3))
    assert_same_tensors(memory.weights(1), before)


@pytest.mark.parametrize("in_closure", [False, True])
def test_a_parameter_that_joins_late_gets_its_copy_then(in_closure):
    params = make_params((3,), (4,))
    optimizer = torch.optim.AdamW(params, lr=0.1)
    memory = WeightMemory(optimizer, (4,), 0.5, 0.5)

    def step(grads):
        def closure():
            set_grads(params, grads)
            return 0.0

        if in_closure:
            optimizer.zero_grad()
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    for seed in range(2):
        step([random_grads(params, seed)[0], None])
        assert params[1] not in optimizer.state  # an empty state is not ours to fill
        assert memory.weights(1)[1] is params[1]
    before = params[1].detach().clone()
    for seed in range(2, 4):
        step(random_grads(params, seed))
    moved = memory.weights(1)[1]
    assert not torch.equal(moved, before)  # exchanged at step 4, with the others
    assert_same_tensors([params[1]], [moved])  # .5 / .5 meet in the middle
    step(random_grads(params, 5))
    assert optimizer.state[params[1]]["step"] == 3


def test_an_optimizers_first_step_finds_its_state_empty():
    """torch takes a parameter with any state for an initialised one: KeyError 'exp_avg'."""
    params = make_params(*SHAPES)
    for cls in (torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Rprop, torch.optim.NAdam):
        optimizer = cls(params)
        WeightMemory(optimizer)
        train(optimizer, params, range(2))


def test_lbfgs_counts_its_outer_steps():
    p = Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.LBFGS([p], lr=0.5, max_iter=3)
    memory = WeightMemory(optimizer, (2,), 0.5, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert optimizer.state[p]["memory_count"] == 4
    assert_same_tensors([p], memory.weights(1))
    assert p.norm() < 2


def test_the_model_rule_and_a_memory_go_together():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = DGD(model, lr=0.05)
    memory = WeightMemory(optimizer, (2,))
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    assert_same_tensors(memory.weights(0), memory.weights(1))


# ---------------------------------------------------------------------- steps that do not count


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused):
    params = make_params(*SHAPES)
    twins = clone_params(params)
    runs = []
    for ps, skips in ((params, True), (twins, False)):
        optimizer = torch.optim.AdamW(ps, lr=0.1, fused=fused)
        memory = WeightMemory(optimizer, (2,), 0.4, 0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for seed in range(6):
            set_grads(ps, random_grads(ps, seed))
            if seed in (0, 3):
                if not skips:
                    continue
                ps[0].grad[0, 0] = torch.inf
            scaler.scale(torch.zeros(()))  # so that it begins
            scaler.step(optimizer)
            scaler.update(1.0)
        runs.append((ps, memory.weights(1), optimizer))
    assert_same_tensors(runs[0][0], runs[1][0])
    assert_same_tensors(runs[0][1], runs[1][1])
    assert runs[0][2].state[params[0]]["memory_count"] == 4


@torch.no_grad()
@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_steps_counted_on_the_device_give_the_same(frequency):
    """The path that neither reads the counter nor ``found_inf``, here on CPU tensors."""
    params = make_params(*SHAPES)
    twins = clone_params(params)
    memories = []
    for ps in (params, twins):
        optimizer = torch.optim.AdamW(ps, lr=0.1)
        memories.append(WeightMemory(optimizer, (frequency, 2), 0.4, 0.3))
    for seed in range(8):
        found = torch.tensor([float(seed in (2, 5))])
        for memory, ps in zip(memories, (params, twins)):
            if found and ps is twins:
                continue
            if found:  # fused steps run their hooks even where they leave all as it was
                memory._before_step(memory.optimizer, (), {})
                memory._exchange_on_device(found)
                continue
            set_grads(ps, random_grads(ps, seed))
            if ps is params and seed:
                exchange, memory._exchange = memory._exchange, lambda count: None
                memory.optimizer.step()
                memory._exchange = exchange
                memory._count -= 1
                memory._exchange_on_device(torch.tensor([0.0]))
            else:
                memory.optimizer.step()
    assert_same_tensors(params, twins)
    assert_same_tensors(memories[0].weights(-1), memories[1].weights(-1))
    assert memories[0].optimizer.state[params[0]]["memory_count"] == 6


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NestedOptimizer"])
def test_a_step_that_only_creates_state_does_not_count(name):
    """What ``torch.distributed.checkpoint`` does to a fresh optimizer."""
    params = make_params(*SHAPES)
    twins = clone_params(params)
    optimizer, twin = (OPTIMIZERS[name](ps, 0.1) for ps in (params, twins))
    memory, other = (WeightMemory(opt, (2,), 0.4, 0.3) for opt in (optimizer, twin))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step_with(optimizer, params, [torch.zeros_like(p) for p in params])
    assert all(optimizer.state[p]["memory_count"] == 0 for p in params)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for p in params:  # the optimizers' own counter has moved, as torch's does
        if "step" in optimizer.state[p]:
            optimizer.state[p]["step"].zero_()
    for opt, ps in ((optimizer, params), (twin, twins)):
        train(opt, ps, range(3))
    assert_same_tensors(params, twins)
    assert_same_tensors(memory.weights(1), other.weights(1))


@pytest.mark.parametrize("grad", ["zero", "not zero"])
def test_sparse_gradients_tell_whether_a_step_counts(grad):
    table = nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.0)
    memory = WeightMemory(optimizer, (2,))
    for _ in range(2):
        optimizer.zero_grad()
        (table(torch.tensor([1, 2, 1])).sum() * (grad != "zero")).backward()
        optimizer.step()
    # Without state of its own and at lr 0, the first step may have served to create it.
    assert memory.optimizer.state[table.weight]["memory_count"] == 1 + (grad != "zero")


# ---------------------------------------------------------------------- groups and options


def test_groups_have_their_own_settings():
    params = make_params((3,), (4,), (5,), dtype=torch.float64)
    twins = clone_params(params)
    groups = [
        {"params": params[:1], "memory_frequencies": (2,), "memory_write": (0.2,)},
        {"params": params[1:2], "memory_frequencies": ()},
        {"params": params[2:]},
    ]
    optimizer, bare = torch.optim.SGD(groups, lr=0.1), torch.optim.SGD(twins, lr=0.1)
    WeightMemory(optimizer, (3, 6), 0.5, 0.5)
    settings = [((2,), (0.2,), (0.5,)), ((), (), ()), ((3, 6), (0.5, 0.5), (0.5, 0.5))]
    byhand = [ByHand([q], *own) for q, own in zip(twins, settings)]
    for seed in range(7):
        train(optimizer, params, [seed])
        train(bare, twins, [seed])
        for q, rule in zip(twins, byhand):
            q.data.copy_(rule.after_step([q])[0])
    torch.testing.assert_close(params, twins, rtol=1e-13, atol=1e-13)
    assert [len([k for k in optimizer.state[p] if k.startswith("memory")]) for p in params] == [
        2,
        0,
        3,
    ]


def test_settings_may_change_in_mid_run():
    params = make_params((4,), dtype=torch.float64)
    optimizer = torch.optim.SGD(params, lr=0.1)
    memory = WeightMemory(optimizer, (2,), 0.5, 0.5)
    group = optimizer.param_groups[0]
    train(optimizer, params, range(3))
    group.update(memory_frequencies=[1, 5], memory_write=0.25, memory_pull=[0.25, 0.5])
    old, before = memory.weights(1)[0].clone(), params[0].detach().clone()
    train(optimizer, params, [3])
    assert group["memory_frequencies"] == (1, 5) and group["memory_write"] == (0.25, 0.25)
    moved = before - 0.1 * random_grads(params, 3)[0]
    torch.testing.assert_close(memory.weights(1)[0], old + 0.25 * (moved - old))
    assert_same_tensors(memory.weights(2), [before])  # the new level begins at the live weights
    group["memory_frequencies"] = ()
    train(optimizer, params, [4])
    assert not optimizer.state[params[0]]
    group["memory_frequencies"] = (1, 5)
    before = params[0].detach().clone()
    train(optimizer, params, [5])
    assert_same_tensors(memory.weights(2), [before])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frequencies": (0,)}, r"frequencies\[0\].*frequency"),
        ({"frequencies": (10, 2.5)}, r"frequencies\[1\]"),
        ({"frequencies": (True,)}, r"frequencies\[0\]"),
        ({"frequencies": 10}, "sequence of integers"),
        ({"frequencies": (10,), "write": (0.6,), "pull": (0.5,)}, "exceeds 1"),
        ({"frequencies": (10,), "write": -0.1}, r"write\[0\] must be a number from 0 to 1"),
        ({"frequencies": (10,), "pull": float("nan")}, r"pull\[0\] must be a number"),
        ({"frequencies": (10,), "write": (0.5, 0.5)}, "2 entries for 1 frequencies"),
        ({"write": "half"}, "number or a sequence"),
        ({"dtype": torch.int32}, "floating-point"),
        ({"preset": "best"}, "preset must be one of continual, replay"),
        ({"frequencies": (), "buffers_from": nn.BatchNorm1d(2)}, "needs frequencies"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused_and_change_nothing(options, message):
    optimizer = torch.optim.AdamW(make_params((3,)))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        WeightMemory(optimizer, **options)
    assert optimizer.state_dict() == before
    WeightMemory(optimizer)  # no hook is left behind


def test_an_invalid_group_is_named_and_stops_the_step_before_it_moves():
    params = make_params((3,), (4,))
    groups = [{"params": params[:1]}, {"params": params[1:], "name": "slow"}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    WeightMemory(optimizer)
    optimizer.param_groups[1]["memory_write"] = (0.9, 0.9)
    before = clone_params(params)
    set_grads(params, random_grads(params, 0))
    with pytest.raises(ValueError, match=r"param group 1 \('slow'\): .*exceeds 1"):
        optimizer.step()
    assert_same_tensors(params, before)
    assert not optimizer.state


def test_a_typo_in_a_memory_option_is_told():
    with pytest.raises(ValueError, match="did you mean 'memory_frequencies'"):
        NestedOptimizer([{"params": make_params((3,)), "memory_frequency": (3,)}], lr=0.1)


def test_the_signature_says_the_defaults_and_presets_come_before_them():
    own = inspect.signature(WeightMemory).parameters
    assert (own["frequencies"].default, own["write"].default) == ((10, 50), (0.5, 0.5))
    group = {}
    for preset in (None, "continual"):
        optimizer = torch.optim.SGD(make_params((3,)), lr=0.1)
        WeightMemory(optimizer, preset=preset, write=None)
        group[preset] = optimizer.param_groups[0]
    assert group[None]["memory_frequencies"] == (10, 50)
    assert group["continual"]["memory_frequencies"] == (5, 50)
    assert group["continual"]["memory_write"] == (0.2, 0.2)
    optimizer = torch.optim.SGD(make_params((3,)), lr=0.1)
    WeightMemory(optimizer, (3, 4, 5))  # one rate for all serves any number of levels
    assert optimizer.param_groups[0]["memory_pull"] == (0.5, 0.5, 0.5)


def test_one_memory_per_optimizer():
    optimizer = torch.optim.AdamW(make_params((3,)))
    memory = WeightMemory(optimizer)
    with pytest.raises(ValueError, match="has a WeightMemory already"):
        WeightMemory(optimizer)
    memory.detach()
    WeightMemory(optimizer)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, but got Linear"):
        WeightMemory(nn.Linear(2, 2))


def test_detaching_leaves_the_bare_optimizer():
    params = make_params(*SHAPES)
    optimizer = torch.optim.AdamW(params, lr=0.1)
    bare_keys = set(optimizer.param_groups[0])
    memory = WeightMemory(optimizer, (1,))
    train(optimizer, params, range(2))
    twins = clone_params(params)
    bare = torch.optim.AdamW(twins, lr=0.1)
    memory.detach()
    assert set(optimizer.param_groups[0]) == bare_keys
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for opt, ps in ((optimizer, params), (bare, twins)):
        train(opt, ps, range(2, 5))
    assert_same_tensors(params, twins)
    assert_same_state(optimizer, bare)


def test_detaching_leaves_what_the_caller_has_set():
    params = make_params((3,), (4,), (5,))
    groups = [{"params": params[:1], "memory_frequencies": [7]}, {"params": params[1:2]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    memory = WeightMemory(optimizer, (2,))
    optimizer.add_param_group({"params": params[2:], "memory_dtype": "bfloat16"})
    train(optimizer, params, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    memory.detach()
    own = [{k: v for k, v in g.items() if "memory" in k} for g in optimizer.param_groups]
    assert own == [{"memory_frequencies": (7,)}, {}, {"memory_dtype": "bfloat16"}]


def test_a_parameter_of_another_shape_is_refused():
    params = make_params((3,))
    optimizer = torch.optim.SGD(params, lr=0.1)
    WeightMemory(optimizer)
    train(optimizer, params, range(1))
    params[0].data = torch.zeros(5)
    params[0].grad = torch.zeros(5)
    optimizer.add_param_group({"params": make_params((2,))})  # so that it looks again
    with pytest.raises(RuntimeError, match=r"has shape \(5,\), but its copy 'memory_1' has \(3,\)"):
        optimizer.step()


def test_groups_that_are_added_get_the_memory():
    params = make_params((3,), (4,))
    optimizer = torch.optim.SGD(params[:1], lr=0.1)
    memory = WeightMemory(optimizer, (2,))
    train(optimizer, params[:1], range(1))
    optimizer.add_param_group({"params": params[1:]})
    train(optimizer, params, range(1, 2))
    assert_same_tensors(params, memory.weights(1))
    assert optimizer.param_groups[1]["memory_frequencies"] == (2,)


def test_a_compiled_step_runs_the_exchange():
    params = make_params((4, 3))
    twins = clone_params(params)
    results = []
    for ps, compiles in ((params, True), (twins, False)):
        optimizer = torch.optim.SGD(ps, lr=0.1)
        memory = WeightMemory(optimizer, (2,), 0.4, 0.3)
        step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        for seed in range(5):
            set_grads(ps, random_grads(ps, seed))
            step()
        results.append(memory.weights(1))
    torch.testing.assert_close(params, twins)
    torch.testing.assert_close(*results)
    assert not torch.equal(params[0], results[0][0])
