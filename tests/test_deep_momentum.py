"""DeepMomentum: momentum at the start, learning that is real, and a memory that travels with it."""

import itertools

import pytest
import torch
from torch import nn
from torch.optim import SGD

from nested_optim import DeepMomentum, momentum_memory, rules

from .helpers import (
    assert_same_tensors,
    assert_unchanged,
    clone_params,
    make_params,
    random_grads,
    set_grads,
    snapshot,
    step_with,
    train,
)

SHAPES = (6, 4), (7,), (), (3, 2, 4), (0, 3)
LINEAR = {"memory": "linear", "objective": "dot"}
TENSORS = ("memory_weights", "memory_exp_avg", "memory_exp_avg_sq")


def memory_of(optimizer):
    return [optimizer.param_groups[0][key] for key in TENSORS]


# ---------------------------------------------------------------------- plain momentum


@pytest.mark.parametrize(
    "memory",
    [
        LINEAR,
        {"memory": "linear"},
        {"memory_lr": 0.0},
        {"memory_lr": 0.0, "objective": "dot"},
        {"trust": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str
)
def test_a_memory_that_is_linear_or_does_not_learn_is_sgd_to_the_last_bit(dtype, memory):
    for foreach, weight_decay, maximize in itertools.product([False, True], (0.0, 0.1), [0, 1]):
        ours = make_params(*SHAPES, dtype=dtype)
        theirs = clone_params(ours)
        options = {"lr": 0.02, "momentum": 0.9, "weight_decay": weight_decay, "maximize": maximize}
        optimizer = DeepMomentum(ours, foreach=foreach, **memory, **options)
        # SGD's own foreach rounds 0.9 to bfloat16 on a CPU; its default there is the for-loop.
        reference = SGD(theirs, foreach=foreach and dtype != torch.bfloat16, **options)
        for seed in range(10):
            grads = random_grads(ours, seed)
            if seed in (0, 4):
                grads[seed % 3] = None
            for params, optim in ((ours, optimizer), (theirs, reference)):
                step_with(optim, params, grads)
            assert_same_tensors(ours, theirs)
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(
                optimizer.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"]
            )


@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_the_first_two_updates_are_sgd_s_whatever_the_memory_is_to_learn(objective):
    """Before the second there is nothing to predict from, so it still is what it began as."""
    ours, theirs = make_params(*SHAPES), make_params(*SHAPES)
    optimizer = DeepMomentum(ours, lr=0.1, memory_lr=0.1, objective=objective)
    reference = SGD(theirs, lr=0.1, momentum=0.9)
    for seed in range(3):
        train(optimizer, ours, [seed])
        train(reference, theirs, [seed])
        alike = [torch.equal(p, q) for p, q in zip(ours, theirs) if p.numel()]
        assert all(alike) if seed < 2 else not any(alike)


def test_a_linear_memory_has_sgd_s_state_and_no_memory_tensors():
    params = make_params(*SHAPES)
    optimizer = DeepMomentum(params, **LINEAR)
    train(optimizer, params, range(2))
    for p in params:
        assert set(optimizer.state[p]) == {"step", "window_count", "momentum_buffer"}
    assert memory_of(optimizer) == [None, None, None]
    assert optimizer.metrics() == {}


# ---------------------------------------------------------------------- the memory's learning


def memory_sample(n=50, hidden=5):
    generator = torch.Generator().manual_seed(0)
    features, target = torch.randn(4, n, generator=generator, dtype=torch.float64).split([3, 1])
    valid = (torch.arange(n) % 7 > 0).double()
    weights = torch.randn(rules.memory_size(hidden), generator=generator, dtype=torch.float64)
    return weights, features, target[0], valid


@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_the_memory_s_gradient_agrees_with_finite_differences(objective):
    weights, *sample = memory_sample()

    def loss(weights):
        return rules.memory_loss(weights, *sample, objective)

    assert torch.autograd.gradcheck(loss, weights.requires_grad_())
    (grad,) = torch.autograd.grad(loss(weights), weights)
    assert (grad != 0).all()


@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_what_training_does_in_a_step_is_adam_on_that_gradient(objective):
    """The step's own update of the weights, against central differences in float64 and Adam."""
    params = make_params((5, 4), (6,))
    optimizer = DeepMomentum(params, lr=0.1, memory_lr=0.01, hidden=4, objective=objective)
    train(optimizer, params, range(4))
    group = optimizer.param_groups[0]
    weights = group["memory_weights"].double()
    features, targets = [], []
    for p, grad in zip(params, random_grads(params, 4)):
        state = optimizer.state[p]
        units = rules.memory_units(state["scales"].double())
        rows = (state[key].double() for key in optimizer._moment_keys)
        features.append(torch.stack([row.flatten() * u for row, u in zip(rows, units)]))
        targets.append(grad.double().flatten() * units[-1])
    sample = torch.cat(features, 1), torch.cat(targets), torch.ones(26, dtype=torch.float64)

    slopes = []
    for i in range(len(weights)):
        h = torch.zeros_like(weights)
        h[i] = 1e-6
        up, down = (rules.memory_loss(weights + d, *sample, objective) for d in (h, -h))
        slopes.append((up - down) / 2e-6)
    twin = nn.Parameter(group["memory_weights"].clone())
    adam = torch.optim.Adam([twin], lr=0.01, betas=(0.9, 0.99))
    state = {"step": torch.tensor(float(group["memory_step"]))}
    state |= {key: group[f"memory_{key}"].clone() for key in ("exp_avg", "exp_avg_sq")}
    adam.state[twin] = state
    twin.grad = torch.stack(slopes).float()
    adam.step()
    before = group["memory_weights"].clone()
    train(optimizer, params, [4])
    assert (group["memory_weights"] != before).all()
    torch.testing.assert_close(group["memory_weights"], twin.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        optimizer.metrics()["memory_loss"].double(), rules.memory_loss(weights, *sample, objective)
    )


def alternating(params, step):
    """Gradients that a linear average with one decay cannot follow: they change sign each step."""
    generator = torch.Generator().manual_seed(0)
    sign = (-1.0) ** step
    return [sign * torch.randn(p.shape, generator=generator) for p in params]


@pytest.mark.parametrize("objective, untrained, trained", [("l2", 1.0, 0.2), ("dot", 0.0, -0.4)])
def test_the_loss_falls_on_a_predictable_stream_and_every_weight_moves(
    objective, untrained, trained
):
    params = make_params((30, 20), (40,))
    optimizer = DeepMomentum(params, lr=0.0, memory_lr=0.01, objective=objective)
    frozen_params = make_params((30, 20), (40,))
    frozen = DeepMomentum(frozen_params, lr=0.0, memory_lr=0.0, objective=objective)
    for step in range(300):
        step_with(optimizer, params, alternating(params, step))
        step_with(frozen, frozen_params, alternating(params, step))
        if step == 0:
            start = optimizer.param_groups[0]["memory_weights"].clone()
    losses, losses_frozen = optimizer.metrics(), frozen.metrics()
    assert losses["memory_loss"] < trained
    assert losses["momentum_loss"] > untrained - 0.1
    assert torch.equal(losses_frozen["memory_loss"], losses_frozen["momentum_loss"])
    assert (optimizer.param_groups[0]["memory_weights"] != start).all()
    assert torch.equal(frozen.param_groups[0]["memory_weights"], start)


def test_under_pure_noise_the_memory_learns_to_expect_nothing():
    """The expected gradient is 0: its error 1, where the momentum's own mean only adds noise."""
    params = make_params((60, 50))
    optimizer = DeepMomentum(params, lr=0.0, memory_lr=0.003)
    losses = []
    for seed in range(400):
        train(optimizer, params, [seed])
        losses.append(torch.stack(list(optimizer.metrics().values())))
    trained, momentum = torch.stack(losses[-100:]).mean(0)
    assert momentum > 1.04  # 1 + (1 - 0.9) / (1 + 0.9)
    assert trained < 1.02


def test_a_memory_in_use_brings_a_noisy_quadratic_no_further_from_its_minimum():
    torch.manual_seed(0)
    ends = {}
    for memory_lr in (0.0, 1e-3):
        p = nn.Parameter(torch.full((200,), 3.0))
        optimizer = DeepMomentum([p], lr=0.05, momentum=0.9, memory_lr=memory_lr)
        tail = []
        for step in range(600):
            noise = torch.randn(200, generator=torch.Generator().manual_seed(step))
            p.grad = p.detach() + noise
            optimizer.step()
            tail.append(p.detach().square().mean())
        ends[memory_lr] = torch.stack(tail[-300:]).mean()
    assert ends[1e-3] < ends[0.0]


def test_a_gradient_that_is_not_finite_leaves_the_memory_as_it_was():
    params = make_params((6, 4))
    optimizer = DeepMomentum(params, memory_lr=0.1)
    train(optimizer, params, range(3))
    before = [t.clone() for t in memory_of(optimizer)]
    step_with(optimizer, params, [torch.full((6, 4), float("inf"))])
    assert all(torch.equal(a, b) for a, b in zip(before, memory_of(optimizer)))


def test_the_global_random_state_and_p_grad_are_left_alone():
    params = make_params((6, 4))
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    optimizer = DeepMomentum(params)
    grads = random_grads(params, 0)
    set_grads(params, grads)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(torch.randn(3), expected)
    assert torch.equal(params[0].grad, grads[0])


def test_seeds_make_different_memories_and_the_same_one_twice():
    weights = {}
    for seed in (0, 1):
        for again in range(2):
            params = make_params((2,))
            optimizer = DeepMomentum(params, memory_seed=seed)
            train(optimizer, params, [0])
            weights[seed, again] = optimizer.param_groups[0]["memory_weights"]
    assert torch.equal(weights[0, 0], weights[0, 1])
    assert not torch.equal(weights[0, 0], weights[1, 0])


def test_samples_stay_within_their_number_and_visit_every_coordinate():
    params = [torch.zeros(30, 10), torch.zeros(100), torch.zeros(50, 3)]
    # Each coordinate's gradient is its number, in units of 1.
    numbers = torch.arange(550.0).split([p.numel() for p in params])
    grads = [part.view(p.shape) for part, p in zip(numbers, params)]
    scales = [torch.ones(rules.MEMORY_SCALES)] * 3
    group = {"decoupled": False, "weight_decay": 0.0, "maximize": False}
    seen = []
    for step in range(40):
        first = {"memory_samples": 64, "memory_step": step}
        tensors = [params, grads, grads, grads, grads, scales]
        (sample,) = momentum_memory.take_samples(first, 550, tensors, group)
        assert 60 <= sample.target.numel() <= 64
        assert sample.valid.all()
        assert torch.equal(sample.features, sample.target.expand(3, -1))
        seen.append(sample.target)
    assert set(torch.cat(seen).int().tolist()) == set(range(550))


# ---------------------------------------------------------------------- stability


@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("memory_lr", [0.0, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("size", [1, 10])
def test_p_squared_descends_from_four_however_fast_the_memory_learns(objective, memory_lr, size):
    p = nn.Parameter(torch.linspace(4, 5, size))
    optimizer = DeepMomentum([p], lr=0.05, memory_lr=memory_lr, objective=objective)
    trace = []
    for _ in range(300):
        p.grad = 2 * p.detach()
        optimizer.step()
        trace.append(p.detach().abs().max().item())
    assert trace[1] < trace[0] < 5
    assert trace[-1] < 0.05


def test_a_memory_that_is_wrong_never_turns_the_update_against_the_momentum():
    torch.manual_seed(0)
    buf = torch.randn(40)
    for trust in (0.0, 0.5, 1.0):
        for output in (-100 * buf, 100 * torch.randn(40), torch.zeros(40)):
            direction = rules.trusted_direction(buf, output, trust)
            assert (direction - buf).norm() <= trust * buf.norm() * (1 + 1e-5)
            assert direction @ buf >= -1e-4
    small = 0.01 * torch.randn(40)
    assert torch.equal(rules.trusted_direction(buf, small, 1.0), buf + small)


def test_opposite_gradients_give_opposite_updates():
    """The memory is odd: nothing in it prefers a direction."""
    ends = []
    for sign in (1.0, -1.0):
        params = [nn.Parameter(torch.zeros(6, 4))]
        optimizer = DeepMomentum(params, lr=0.1, memory_lr=0.05)
        for seed in range(6):
            step_with(optimizer, params, [sign * g for g in random_grads(params, seed)])
        ends.append(params[0].detach())
    assert torch.equal(ends[0], -ends[1])
    assert ends[0].any()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_gradients_does_not_matter(scale):
    ends = []
    for factor in (1.0, scale):
        params = [nn.Parameter(torch.zeros(6, 4))]
        optimizer = DeepMomentum(params, lr=0.1 / factor, memory_lr=0.02)
        for seed in range(8):
            step_with(optimizer, params, [factor * g for g in random_grads(params, seed)])
        ends.append(params[0].detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e25, 1e37])
def test_gradients_out_of_range_get_plain_momentum_and_no_nan(scale):
    params, plain = make_params((6, 4)), make_params((6, 4))
    optimizer = DeepMomentum(params, lr=1e-9, memory_lr=0.1)
    reference = SGD(plain, lr=1e-9, momentum=0.9)
    for seed in range(4):
        grads = [scale * g for g in random_grads(params, seed)]
        step_with(optimizer, params, grads)
        step_with(reference, plain, grads)
    assert_same_tensors(params, plain)
    assert all(torch.isfinite(t).all() for t in memory_of(optimizer))


# ---------------------------------------------------------------------- paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_a_step_is_the_rule_on_each_tensor_with_the_memory_as_it_was(dtype):
    params = make_params(*SHAPES, dtype=dtype)
    options = {"lr": 0.05, "weight_decay": 0.1, "maximize": True}
    optimizer = DeepMomentum(params, memory_lr=0.05, **options)
    train(optimizer, params, range(5))
    weights = optimizer.param_groups[0]["memory_weights"].clone()
    expected = []
    for p, grad in zip(params, random_grads(params, 5)):
        state = optimizer.state[p]
        kept = [state[key].clone() for key in (*optimizer._moment_keys, "scales")]
        expected.append(
            rules.deep_momentum(
                p.detach().clone(), grad, *kept, weights, momentum=0.9, decays=(0.0, 0.99),
                **options,
            )
        )  # fmt: skip
    plain = [rules.momentum(p.detach(), g, optimizer.state[p]["momentum_buffer"], lr=0.05,
             momentum=0.9, weight_decay=0.1, maximize=True).param
             for p, g in zip(params, random_grads(params, 5))]  # fmt: skip
    train(optimizer, params, [5])
    for p, new, without in zip(params, expected, plain):
        torch.testing.assert_close(p.detach(), new.param)
        torch.testing.assert_close(optimizer.state[p]["scales"], new.scales)
        assert not p.numel() or not torch.allclose(p.detach(), without, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pack_elements", [1, 30, 10_000])
@pytest.mark.parametrize("trust", [0.1, 10.0])
def test_packed_tensors_get_what_they_would_get_alone(pack_elements, trust):
    """What an accelerator runs: small tensors go through the memory together."""
    params = make_params((6, 4), (7,), (), (3, 2, 4), (0, 3), (40,), (2, 2))
    state = [random_grads(params, seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(rules.memory_size(8), generator=generator)
    units = rules.memory_units(torch.rand(len(params), 5, generator=generator) + 0.1)
    found = momentum_memory.directions(weights, state, units, trust, pack_elements)
    for i, direction in enumerate(found):
        alone = [column[i] for column in state]
        output = rules.memory_output(weights, alone, units[i])
        torch.testing.assert_close(direction, rules.trusted_direction(alone[0], output, trust))


def test_slices_bound_the_memory_in_use_and_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    state = [torch.randn(7, 11, generator=generator) for _ in range(3)]
    weights = torch.randn(rules.memory_size(8), generator=generator)
    units = rules.memory_units(torch.rand(5, generator=generator) + 0.1)
    whole = rules.memory_output(weights, state, units)
    monkeypatch.setattr("nested_optim.rules.momentum_memory._CPU_SLICE", 10)
    torch.testing.assert_close(rules.memory_output(weights, state, units), whole)


def test_complex_parameters_train_as_pairs_of_real_ones():
    numbers = make_params((6, 4), (5,), dtype=torch.complex64)
    pairs = [nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in numbers]
    ours, real = DeepMomentum(numbers, memory_lr=0.05), DeepMomentum(pairs, memory_lr=0.05)
    for seed in range(6):
        grads = random_grads(numbers, seed)
        step_with(ours, numbers, grads)
        step_with(real, pairs, [torch.view_as_real(g) for g in grads])
    for p, pair in zip(numbers, pairs):
        torch.testing.assert_close(torch.view_as_real(p.detach()), pair.detach())


def test_one_memory_learns_from_all_groups_and_takes_one_step_per_step():
    params = make_params((6, 4), (5,), (8,))
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)]
    groups[2]["frequency"] = 2
    optimizer = DeepMomentum(groups, memory_lr=0.05)
    joined = make_params((6, 4), (5,), (8,))
    twin = DeepMomentum([{"params": joined[:2]}, {"params": joined[2:], "frequency": 2}], lr=0.1,
                        memory_lr=0.05)  # fmt: skip
    twin.param_groups[0]["lr"] = 0.1
    for seed in range(5):
        train(optimizer, params, [seed])
        train(twin, joined, [seed])
    assert optimizer.param_groups[0]["memory_step"] == 5
    assert all(g["memory_weights"] is None for g in optimizer.param_groups[1:])
    # Learning rates do not enter what the memory sees here, nor does where a group ends.
    torch.testing.assert_close(memory_of(optimizer), memory_of(twin))


def test_a_step_without_gradients_or_with_open_windows_teaches_nothing():
    params = make_params((6, 4))
    optimizer = DeepMomentum(params, frequency=3, memory_lr=0.1)
    train(optimizer, params, range(6))
    before = [t.clone() for t in memory_of(optimizer)]
    optimizer.step()
    train(optimizer, params, range(6, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, memory_of(optimizer)))
    assert optimizer.param_groups[0]["memory_step"] == 2
    assert optimizer.flush() == 1
    assert optimizer.param_groups[0]["memory_step"] == 3
    assert not torch.equal(before[0], optimizer.param_groups[0]["memory_weights"])


def test_hooks_find_the_memory_trained():
    params = make_params((6, 4))
    optimizer = DeepMomentum(params, memory_lr=0.1)
    seen = []
    optimizer.register_meta_update_hook(
        lambda o: seen.append(o.param_groups[0]["memory_weights"].clone())
    )
    after = []
    for seed in range(3):
        train(optimizer, params, [seed])
        after.append(optimizer.param_groups[0]["memory_weights"].clone())
    assert all(torch.equal(a, b) for a, b in zip(seen, after, strict=True))
    assert optimizer.param_groups[0]["memory_step"] == 3


@pytest.mark.filterwarnings("ignore")
def test_a_step_under_compile_runs_as_the_eager_one():
    torch._dynamo.reset()
    params, compiled_params = make_params((4, 3), (5,)), make_params((4, 3), (5,))
    optimizer = DeepMomentum(params, lr=0.05, frequency=2, memory_lr=0.05)
    compiled = DeepMomentum(compiled_params, lr=0.05, frequency=2, memory_lr=0.05)
    step = torch.compile(compiled.step, backend="eager")
    for seed in range(7):
        train(optimizer, params, [seed])
        set_grads(compiled_params, random_grads(compiled_params, seed))
        step()
    assert_same_tensors(params, compiled_params)
    assert_same_tensors(memory_of(optimizer), memory_of(compiled))


# ---------------------------------------------------------------------- refusals


def test_a_group_cannot_have_a_memory_of_its_own():
    params = make_params((3,), (4,))
    for key, value in (("hidden", 4), ("memory_lr", 0.5), ("objective", "dot"), ("trust", 0.5)):
        with pytest.raises(ValueError, match=f"param group 1: {key}=.*all groups share one memory"):
            DeepMomentum([{"params": params[:1]}, {"params": params[1:], key: value}])
    optimizer = DeepMomentum(params[:1])
    with pytest.raises(ValueError, match="memory_weights is no option"):
        optimizer.add_param_group({"params": params[1:], **dict.fromkeys(TENSORS, torch.ones(64))})
    DeepMomentum([{"params": params[:1], "hidden": 4}, {"params": params[1:]}], hidden=4)


def test_the_objective_is_the_memory_s_unless_given():
    for memory, objective in (("mlp", "l2"), ("linear", "dot")):
        optimizer = DeepMomentum(make_params((3,)), memory=memory)
        assert optimizer.param_groups[0]["objective"] == objective
        optimizer.add_param_group({"params": make_params((3,)), "objective": None})
        assert optimizer.param_groups[1]["objective"] == objective


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"capturable": True}, "does not support `capturable`"),
        ({"differentiable": True}, "does not support `differentiable`"),
        ({"hidden": 4}, "hidden=4 does not fit the memory that is there"),
        ({"fused": True}, "has no fused kernel"),
    ],
)
def test_edits_that_the_memory_cannot_follow_are_refused_before_anything_changes(edit, message):
    params = make_params((3, 2))
    optimizer = DeepMomentum(params)
    train(optimizer, params, range(2))
    optimizer.param_groups[0].update(edit)
    set_grads(params, random_grads(params, 2))
    before = snapshot(optimizer)
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_an_edit_of_one_group_s_memory_is_refused():
    params = make_params((3,), (4,))
    optimizer = DeepMomentum([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.param_groups[1]["objective"] = "dot"
    set_grads(params, random_grads(params, 0))
    with pytest.raises(ValueError, match="param group 1: objective is 'dot', but 'l2'"):
        optimizer.step()
    assert not optimizer.state


def test_the_memory_s_learning_rate_may_be_edited_in_the_first_group():
    params = make_params((6, 4))
    optimizer = DeepMomentum(params, memory_lr=0.0)
    train(optimizer, params, range(3))
    before = optimizer.param_groups[0]["memory_weights"].clone()
    optimizer.param_groups[0]["memory_lr"] = 0.1
    train(optimizer, params, [3])
    assert (optimizer.param_groups[0]["memory_weights"] != before).any()


def test_a_small_model_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    inputs, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 3
    optimizer = DeepMomentum(model.parameters(), lr=0.05)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
