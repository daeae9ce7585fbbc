"""What the whole way says: against finite differences, closed forms, and a valley with walls."""

import copy
import math

import pytest
import torch
from torch import nn

from nested_optim import DeepNestedOptimizer
from nested_optim.meta import learned, long_run
from nested_optim.meta.controller import multipliers
from nested_optim.rules.deep_nested import way

from .helpers import assert_same_tensors
from .meta_helpers import (
    SMALL,
    Net,
    batch,
    in_float64,
    loss_of,
    relative_error,
    step_on,
    two_groups,
)

STATISTICS = 3
MULTIPLIERS_ONLY = {"learn_momentum": False, "learn_mixing": False}


def build(model, **options):
    options = {"lr": 0.05, "meta_update_freq": 1000, **SMALL, **options}
    optimizer = DeepNestedOptimizer(two_groups(model), **options)
    in_float64(optimizer)
    first = optimizer.param_groups[0]
    first["long_run"] = torch.zeros(long_run.size(first), dtype=torch.float64)
    return optimizer


def gradient(optimizer):
    return optimizer.param_groups[0]["long_run"][STATISTICS:].clone()


# ------------------------------------------------------------------ the derivative


def test_the_first_product_is_the_derivative_of_the_loss_by_the_way_s_length():
    model = Net()
    starts = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for i in range(5):
        optimizer.zero_grad()
        loss_of(model, batch(i)).backward()
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model, batch(5)).backward()
    ends = [p.detach().clone() for p in model.parameters()]
    rows = [way(p.grad, p.detach(), s) for p, s in zip(model.parameters(), starts)]

    def loss_at(length):
        with torch.no_grad():
            for p, start, end in zip(model.parameters(), starts, ends):
                p.copy_(start + math.exp(length) * (end - start))
            return float(loss_of(model, batch(5)))

    h = 1e-5
    expected = (loss_at(h) - loss_at(-h)) / (2 * h)
    assert float(sum(row[0] for row in rows)) == pytest.approx(expected, rel=1e-8)
    for row, p, start, end in zip(rows, model.parameters(), starts, ends):
        assert float(row[1]) == pytest.approx(float(p.grad.square().sum()))
        assert float(row[2]) == pytest.approx(float((end - start).square().sum()))


@pytest.mark.parametrize("maximize", [False, True])
def test_what_the_controller_gathers_is_that_derivative_by_each_of_its_weights(maximize):
    """Of the loss at the end of ways whose lengths the multipliers change, over the lengths."""
    model = Net()
    starts = [p.detach().clone() for p in model.parameters()]
    optimizer = build(model, maximize=maximize)
    first = optimizer.param_groups[0]
    for i in range(4):
        step_on(optimizer, model, batch(i), told=True)
    assert not gradient(optimizer).any()  # the fifth step is the first that is looked at
    ends = [p.detach().clone() for p in model.parameters()]
    places = {id(p): at for at, g in enumerate(optimizer.param_groups) for p in g["params"]}
    owner = [places[id(p)] for p in model.parameters()]
    features = torch.stack(
        [optimizer.state[g["params"][0]]["update_trace"][2:8] for g in optimizer.param_groups]
    )
    weights = first["controller_weights"].clone()

    def of(flat):
        return multipliers(flat, features, 1, learned.LAYERS, 0.01, 100.0)

    def loss_of_weights(flat):
        lengths = of(flat) / of(weights)
        with torch.no_grad():
            for p, start, end, at in zip(model.parameters(), starts, ends, owner):
                p.copy_(start + lengths[at] * (end - start))
            loss = float(loss_of(model, batch(4)))
            for p, end in zip(model.parameters(), ends):
                p.copy_(end)
        return -loss if maximize else loss

    h, expected = 1e-5, []
    for i in range(len(weights)):
        shift = torch.zeros_like(weights)
        shift[i] = h
        expected.append(loss_of_weights(weights + shift) - loss_of_weights(weights - shift))
    expected = torch.tensor(expected, dtype=torch.float64) / (2 * h)
    step_on(optimizer, model, batch(4), told=True)
    optimizer.zero_grad()
    with torch.no_grad():  # the gradient at the end of the way, for the lengths
        after = [p.detach().clone() for p in model.parameters()]
        for p, end in zip(model.parameters(), ends):
            p.copy_(end)
    loss_of(model, batch(4)).backward()
    g_g = sum(p.grad.square().sum() for p in model.parameters())
    w_w = sum((e - s).square().sum() for e, s in zip(ends, starts))
    expected *= long_run.EVERY / (g_g * w_w).sqrt()
    assert relative_error(gradient(optimizer), expected) <= 1e-6
    assert (expected != 0).all()
    assert not torch.equal(after[0], ends[0])


# ------------------------------------------------------------------ looks and statistics


def looks(monkeypatch, frequencies, steps, **options):
    """The steps in which each group was looked at, and what each look stood for."""
    found, now = [[] for _ in frequencies], 0
    real = long_run.learn

    def recorded(first, state, dues, seen):
        for at, stands_for in zip(seen.at, seen.steps):
            place = next(i for i, g in enumerate(optimizer.param_groups) if g is dues[at].group)
            found[place].append((now, stands_for))
        real(first, state, dues, seen)

    monkeypatch.setattr(long_run, "learn", recorded)
    params = [nn.Parameter(torch.randn(3, 2)) for _ in frequencies]
    groups = [{"params": [p], "frequency": f} for p, f in zip(params, frequencies)]
    optimizer = DeepNestedOptimizer(groups, **SMALL, **options)
    while now < steps:
        now += 1
        for p in params:
            p.grad = torch.randn(3, 2)
        optimizer.step()
    return found


def test_each_group_is_looked_at_every_five_steps_or_at_each_of_its_updates(monkeypatch):
    found = looks(monkeypatch, (1, 2, 7), 21)
    assert found[0] == [(5, 5), (10, 5), (15, 5), (20, 5)]
    # Every second update; the first is where it begins.
    assert found[1] == [(4, 4), (8, 4), (12, 4), (16, 4), (20, 4)]
    assert found[2] == [(14, 7), (21, 7)]


def test_it_is_off_where_it_has_nothing_to_teach(monkeypatch):
    for options in ({"horizon": "step"}, {"meta_rule": "adam"}, {"learn_lr": False}):
        assert looks(monkeypatch, (1,), 11, **options) == [[]]
    assert looks(monkeypatch, (1,), 11, meta_lr=0.0) == [[]]


def test_the_statistics_are_the_faded_mean_of_cosines_and_its_standard_error():
    model = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = DeepNestedOptimizer(model.parameters(), lr=0.01, meta_update_freq=1000, **SMALL)
    starts = [p.detach().clone() for p in model.parameters()]
    found = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        gone = [p.detach() - s for p, s in zip(model.parameters(), starts)]
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) + p.detach()
        if seed and (seed + 1) % 5 == 0:
            g = torch.cat([p.grad.flatten() for p in model.parameters()])
            w = torch.cat([x.flatten() for x in gone])
            found.append(-float(torch.dot(g, w) / (g.norm() * w.norm())))
        optimizer.step()
    first = optimizer.param_groups[0]
    weights = [long_run.FADES**age for age in range(len(found))][::-1]
    mean = sum(w * c for w, c in zip(weights, found)) / sum(weights)
    squares = sum(w * (c - mean) ** 2 for w, c in zip(weights, found))
    kept = first["long_run"][:STATISTICS].tolist()
    assert kept == pytest.approx([sum(weights), mean, squares], rel=1e-5)

    # Disagreement, and agreement, of the next losses with the way.
    t = mean / (math.sqrt(squares / sum(weights)) / math.sqrt(sum(weights)))
    gathered = gradient(optimizer)
    sure = t**2 / (t**2 + long_run.DOUBT**2)
    for sign, rest in ((-1, 1 - sure), (1, 1.0)):
        first["controller_grad"].copy_(sign * 0.5 * gathered)
        assert [float(share) for share in long_run.shares(first)] == pytest.approx(
            [sure, rest], rel=1e-5
        )
    long_run.join(first)
    torch.testing.assert_close(first["controller_grad"], gathered * (sure + 0.5), rtol=1e-5, atol=0)
    assert not gradient(optimizer).any()


def test_before_there_are_enough_looks_the_next_losses_count_in_full():
    params = [nn.Parameter(torch.randn(3, 2))]
    optimizer = DeepNestedOptimizer(params, **SMALL)
    params[0].grad = torch.ones(3, 2)
    optimizer.step()
    first = optimizer.param_groups[0]
    gathered = torch.ones_like(first["controller_grad"])
    first["controller_grad"].copy_(-gathered)
    for count, sure in ((3.0, 0.0), (4.0, 4.0 / (4.0 + long_run.DOUBT**2))):
        # Of a standard error of half the mean.
        first["long_run"].copy_(torch.cat([torch.tensor([count, 1.0, count**2 / 4]), gathered]))
        assert [float(share) for share in long_run.shares(first)] == pytest.approx([sure, 1 - sure])


def test_cosines_of_exactly_nothing_say_nothing():
    """Gradients of other elements than those that have moved."""
    p = nn.Parameter(torch.zeros(2, 40))
    optimizer = DeepNestedOptimizer([p], meta_update_freq=30, **SMALL, **MULTIPLIERS_ONLY)
    for step in range(40):
        p.grad = torch.zeros(2, 40)
        looked_at = (step + 1) % 5 == 0
        p.grad[int(looked_at), step] = 1.0
        optimizer.step()
        if step == 28:
            kept = optimizer.param_groups[0]["long_run"]
            assert kept[0] > 3.5 and not kept[1:STATISTICS].any()
            assert [float(share) for share in long_run.shares(optimizer.param_groups[0])] == [0, 1]
    assert torch.isfinite(optimizer.param_groups[0]["controller_weights"]).all()
    assert torch.isfinite(p).all()


def test_a_meta_update_joins_both_for_the_controller_alone_and_uses_them_once():
    model = Net()
    optimizer = DeepNestedOptimizer(
        two_groups(model), lr=0.05, meta_update_freq=21, meta_lr=1e-5, **SMALL
    )
    for i in range(20):
        step_on(optimizer, model, batch(i))
    first = optimizer.param_groups[0]
    before = {m: first[f"{m}_weights"].clone() for m in learned.modules(first)}
    with torch.no_grad():
        for p in model.parameters():  # so that the last gradient adds nothing
            p.grad = torch.zeros_like(p)
    first["controller_grad"].copy_(-gradient(optimizer))
    sure, rest = long_run.shares(first)
    assert 0 < sure < 1 and rest == 1 - sure
    expected = {m: first[f"{m}_grad"].clone() for m in before}
    expected["controller"] = sure * gradient(optimizer) + rest * first["controller_grad"]
    optimizer.step()
    assert first["meta_updates"] == 1
    for module, total in expected.items():
        moved = first[f"{module}_weights"] - before[module]
        assert relative_error(moved, -1e-5 * total) <= 1e-2, module  # weights are float32
    assert not gradient(optimizer).any() and first["long_run"][0] > 0
    assert not first["controller_grad"].any()


def test_what_is_not_finite_is_left_out():
    params = [nn.Parameter(torch.randn(3, 2))]
    optimizer = DeepNestedOptimizer(params, **SMALL)
    for step in range(1, 12):
        params[0].grad = torch.zeros(3, 2) if step == 5 else torch.randn(3, 2)
        if step == 10:
            params[0].grad[0, 0] = torch.nan
        optimizer.step()
        if step < 10:
            assert torch.isfinite(params[0]).all()
    assert torch.equal(
        optimizer.param_groups[0]["long_run"],
        torch.zeros(long_run.size(optimizer.param_groups[0])),
    )


# ------------------------------------------------------------------ state


@pytest.mark.parametrize(
    "dtype, kept",
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.complex64, torch.complex64),
    ],
    ids=str,
)
def test_where_a_parameter_began_is_kept_from_before_its_first_update(dtype, kept):
    p = nn.Parameter(torch.randn(5, 3, dtype=dtype))
    start = p.detach().clone()
    optimizer = DeepNestedOptimizer([p], lr=0.1, **SMALL)
    for seed in range(7):
        p.grad = torch.randn(5, 3, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    held = optimizer.state[p]["initial_param"]
    assert held.dtype == kept and torch.equal(held, start.to(kept))
    assert optimizer.param_groups[0]["long_run"][0] == 1.0
    assert torch.isfinite(optimizer.param_groups[0]["long_run"]).all()


def test_a_checkpoint_from_before_it_was_there_begins_its_way_where_it_is():
    models = Net(torch.float32), Net(torch.float32)
    optimizer, again = (DeepNestedOptimizer(model, **SMALL) for model in models)
    for i in range(6):
        step_on(optimizer, models[0], batch(i, torch.float32))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        del state["initial_param"]
    for group in saved["param_groups"]:
        del group["long_run"], group["horizon"]
    models[1].load_state_dict(models[0].state_dict())
    again.load_state_dict(saved)
    starts = [p.detach().clone() for p in models[1].parameters()]
    for i in range(6, 12):
        step_on(again, models[1], batch(i, torch.float32))
    for p, start in zip(models[1].parameters(), starts):
        assert torch.equal(again.state[p]["initial_param"], start.bfloat16())
    assert again.param_groups[0]["long_run"][0] == 1.0


def test_training_on_does_not_write_to_a_checkpoint_and_goes_on_as_it_would_have():
    models = Net(torch.float32), Net(torch.float32)
    optimizer, again = (
        DeepNestedOptimizer(model, lr=0.05, meta_update_freq=8, meta_lr=0.01, **SMALL)
        for model in models
    )
    for i in range(13):
        step_on(optimizer, models[0], batch(i, torch.float32))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    models[1].load_state_dict(models[0].state_dict())
    again.load_state_dict(saved)
    for opt, model in ((optimizer, models[0]), (again, models[1])):
        for i in range(13, 30):
            step_on(opt, model, batch(i, torch.float32))
    assert_same_tensors(list(models[0].parameters()), list(models[1].parameters()))
    first, its = optimizer.param_groups[0], again.param_groups[0]
    assert torch.equal(first["long_run"], its["long_run"]) and first["meta_updates"] == 3
    assert torch.equal(saved["param_groups"][0]["long_run"], kept["param_groups"][0]["long_run"])
    assert not torch.equal(its["long_run"], kept["param_groups"][0]["long_run"])


def test_a_tensor_of_another_size_is_refused():
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(model, **SMALL)
    step_on(optimizer, model, batch(0, torch.float32))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["long_run"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"long_run must be a tensor of \d+ numbers .* is \(2,\)"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"horizon": "year"}, "Invalid horizon: 'year'. Choose one of step, run"),
        ({"horizon": "run", "meta_rule": "adam"}, "horizon='run' is for meta_rule='cosine'"),
        ({"horizon": "run", "mode": "explicit"}, "Choose horizon='step'"),
    ],
)
def test_a_horizon_that_is_not_there_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DeepNestedOptimizer(Net(), **options)


# ------------------------------------------------------------------ what it is for


def valley(horizon, steps=600, lr=1e-3):
    """A long valley with steep walls, between which noise throws the weights to and fro.

    The next gradient says of every update that it went too far, up a wall; along the valley there
    is far to go.
    """
    p = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    optimizer = DeepNestedOptimizer(
        [p], lr=lr, meta_update_freq=50, meta_lr=3e-4, horizon=horizon, **MULTIPLIERS_ONLY
    )
    generator = torch.Generator().manual_seed(0)
    walls = torch.where(torch.arange(40) < 30, 2e3, 0.02)
    goal = torch.where(torch.arange(40) < 30, 0.0, 5.0)
    for _ in range(steps):
        noise = torch.randn(40, generator=generator, dtype=torch.float64)
        p.grad = walls * (p.detach() - goal) + torch.where(walls > 1, 1.0, 0.05) * noise
        optimizer.step()
    return float(optimizer.get_lr_multipliers()), float(p.detach()[30:].mean())


def test_multipliers_do_not_fall_on_one_step_s_word_while_the_way_is_a_good_one():
    shrunk, near = valley("step")
    grown, far = valley("run")
    assert shrunk < 1.0 and grown > 5.0
    assert far > 3 * near


def test_where_the_first_steps_throw_weights_far_out_the_way_misleads():
    """A limit that is known, and documented: it is why this is no cure for rates too large."""
    found = {}
    for horizon in ("step", "run"):
        model = Net(torch.float32)
        optimizer = DeepNestedOptimizer(
            model, lr=0.5, meta_lr=1e-3, meta_update_freq=20, horizon=horizon
        )
        for i in range(160):
            step_on(optimizer, model, batch(i % 20, torch.float32))
        found[horizon] = float(optimizer.get_lr_multipliers()[0])
    assert found["step"] < 0.5 < 1.0 < found["run"]
