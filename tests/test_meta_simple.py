"""First-order hypergradients against finite differences of the real two-step process."""

import copy
import math

import pytest
import torch
from torch import nn

from nested_optim import DeepNestedOptimizer
from nested_optim.meta import learned, simple
from nested_optim.meta.networks import GAIN
from nested_optim.meta.simple import Due

from .helpers import assert_same_tensors
from .meta_helpers import (
    SMALL,
    Net,
    assert_agrees,
    batch,
    finite_differences,
    in_float64,
    loss_of,
    relative_error,
    snapshot,
    step_on,
    two_groups,
)

SLOW = ("exp_avg_slow1", "exp_avg_slow2")
#: Gradients are gathered as they are.
RAW = {"meta_rule": "adam", **SMALL}

VARIANTS = {
    "plain": {},
    "decay": {"weight_decay": 0.3},
    "coupled": {"weight_decay": 0.3, "decoupled": False},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "not normalized": {"normalize": False, "lr": 0.3},
    "for-loop": {"foreach": False, "weight_decay": 0.1},
    "controller alone": {"learn_momentum": False, "learn_mixing": False},
    "momentum alone": {"learn_lr": False, "learn_mixing": False, "weight_decay": 0.1},
    "mixing alone": {"learn_lr": False, "learn_momentum": False},
    "clipped": {"max_grad_norm": 0.1},
}


def build(model, **options):
    optimizer = DeepNestedOptimizer(
        two_groups(model), **{"lr": 0.05, "meta_update_freq": 1000, **RAW, **options}
    )
    in_float64(optimizer)
    return optimizer


def gathered(optimizer):
    first = optimizer.param_groups[0]
    return {m: first[f"{m}_grad"].clone() for m in learned.modules(first)}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_hypergradient_is_that_of_the_loss_after_a_real_step(options):
    model = Net()
    optimizer = build(model, **options)
    for i in range(4):
        step_on(optimizer, model, batch(i), told=True)
    restore = snapshot(optimizer, model)

    def limit(norm):
        for group in optimizer.param_groups:
            group["max_grad_norm"] = norm

    def run(perturb):
        restore()
        limit(options.get("max_grad_norm"))
        perturb()
        step_on(optimizer, model, batch(4), told=True)
        return loss_of(model, batch(5)).detach()

    sign = -1 if options.get("maximize") else 1
    restore()
    step_on(optimizer, model, batch(4), told=True)
    before = gathered(optimizer)
    # What is learned from a gradient does not depend on what clipping does to it now.
    limit(None)
    step_on(optimizer, model, batch(5), told=True)
    found = {m: sign * (after - before[m]) for m, after in gathered(optimizer).items()}
    assert_agrees(optimizer, run, found)
    if not options:  # weight by weight
        expected = finite_differences(optimizer, run)
        for module in expected:
            assert relative_error(found[module], expected[module]) <= 1e-6, module
            assert (expected[module] != 0).all(), module


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"amsgrad": True}], ids=str)
def test_the_hypergradient_is_by_the_betas_of_the_update_that_it_is_about(options):
    """Schedulers cycle them."""
    model = Net()
    optimizer = build(model, **options)

    def step(seed):
        for group in optimizer.param_groups:
            group["betas"] = 0.1 * seed + 0.4, 0.9 + 0.01 * seed
        return step_on(optimizer, model, batch(seed))

    for seed in range(4):
        step(seed)
    restore = snapshot(optimizer, model)

    def run(perturb):
        restore()
        perturb()
        step(4)
        return loss_of(model, batch(5)).detach()

    step(4)
    before = gathered(optimizer)
    step(5)
    found = {m: after - before[m] for m, after in gathered(optimizer).items()}
    for module, expected in finite_differences(optimizer, run).items():
        assert relative_error(found[module], expected) <= 1e-6, module


def test_a_trace_of_an_older_checkpoint_takes_the_betas_of_now():
    models = Net(), Net()
    optimizer, again = map(build, models)
    for i in range(3):
        step_on(optimizer, models[0], batch(i))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        assert state["update_trace"].shape == (simple.TRACE,) == (18,)
        state["update_trace"] = state["update_trace"][:16].clone()
    again.load_state_dict(saved)
    models[1].load_state_dict(models[0].state_dict())
    in_float64(again, noise=0.0)
    for opt, model in zip((optimizer, again), models):
        step_on(opt, model, batch(3))
        in_float64(opt, noise=0.0)
    for module, grad in gathered(optimizer).items():
        torch.testing.assert_close(gathered(again)[module], grad, rtol=1e-5, atol=1e-7)


def test_in_float32_the_last_gradient_is_kept_in_bfloat16_which_learning_hardly_notices():
    found = []
    for dtype in (torch.float32, torch.float64):
        model = Net().to(dtype)
        optimizer = build(model)
        for i in range(6):
            step_on(optimizer, model, batch(i).to(dtype), told=True)
        kept = {state["previous_grad"].dtype for state in optimizer.state.values()}
        assert kept == {torch.bfloat16 if dtype == torch.float32 else dtype}
        found.append(gathered(optimizer))
    for module in found[0]:
        assert relative_error(found[0][module].double(), found[1][module]) < 4e-3, module


def test_a_slow_group_learns_from_its_window_s_mean_loss():
    model = Net()
    options = {"lr": 0.05, "meta_update_freq": 1000, **RAW, "weight_decay": 0.1}
    optimizer = DeepNestedOptimizer(two_groups(model, frequency=2), **options)
    in_float64(optimizer)
    for p in model.first.parameters():
        p.requires_grad_(False)
    model.gain.requires_grad_(False)
    for i in range(3):
        step_on(optimizer, model, batch(i))
    restore = snapshot(optimizer, model)

    def run(perturb):
        restore()
        perturb()
        step_on(optimizer, model, batch(3))  # closes a window
        losses = [step_on(optimizer, model, batch(i)) for i in (4, 5)]
        return (losses[0] + losses[1]) / 2

    step_on(optimizer, model, batch(3))
    before = gathered(optimizer)
    step_on(optimizer, model, batch(4))
    assert all(torch.equal(a, b) for a, b in zip(gathered(optimizer).values(), before.values()))
    step_on(optimizer, model, batch(5))
    found = {m: after - before[m] for m, after in gathered(optimizer).items()}
    assert_agrees(optimizer, run, found)


def test_the_hypergradient_is_exact_across_a_meta_update():
    model = Net()
    optimizer = build(model, meta_update_freq=3, meta_lr=0.05, weight_decay=0.1)
    for i in range(5):
        step_on(optimizer, model, batch(i))
    restore = snapshot(optimizer, model)
    first = optimizer.param_groups[0]

    # The sixth step moves the weights before it uses them; it is perturbed after that.
    updated = learned.meta_step

    def run(perturb):
        restore()

        def moved(*args):
            norm = updated(*args)
            perturb()
            return norm

        learned.meta_step = moved
        try:
            step_on(optimizer, model, batch(5))
        finally:
            learned.meta_step = updated
        return loss_of(model, batch(6)).detach()

    step_on(optimizer, model, batch(5))
    assert first["meta_updates"] == 2
    assert all(not grad.any() for grad in gathered(optimizer).values())
    step_on(optimizer, model, batch(6))
    assert_agrees(optimizer, run, gathered(optimizer))


def test_complex_parameters_learn_as_their_parts():
    z = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
    optimizer = DeepNestedOptimizer([z], lr=0.05, meta_update_freq=1000, **RAW)
    in_float64(optimizer)
    target = torch.randn(3, 2, dtype=torch.complex128)

    def loss(i):
        return ((z - target * (1 + 0.1 * i)).abs() ** 2).mean()

    def step(i):
        optimizer.zero_grad()
        loss(i).backward()
        optimizer.step()

    for i in range(3):
        step(i)
    restore = snapshot(optimizer, nn.Module())

    def run(perturb):
        restore()
        perturb()
        step(3)
        return loss(4).detach()

    step(3)
    before = gathered(optimizer)
    step(4)
    found = {m: after - before[m] for m, after in gathered(optimizer).items()}
    assert_agrees(optimizer, run, found)


def test_a_gradient_that_is_not_finite_teaches_nothing():
    model = Net()
    optimizer = build(model)
    for i in range(3):
        step_on(optimizer, model, batch(i))
    before = gathered(optimizer)
    model.last.weight.grad = torch.full_like(model.last.weight, float("inf"))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(gathered(optimizer).values(), before.values()))


def test_every_learned_weight_moves_in_the_first_meta_update():
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(
        two_groups(model), lr=0.05, meta_update_freq=4, meta_lr=0.01, cms_frequencies=(1, 10, 100)
    )
    x = batch(0, torch.float32)
    step_on(optimizer, model, x)
    first = optimizer.param_groups[0]
    start = {m: first[f"{m}_weights"].clone() for m in learned.modules(first)}
    assert set(start) == {"controller", "momentum", "mixing"}
    for i in range(1, 4):
        step_on(optimizer, model, batch(i, torch.float32), told=True)
    assert first["meta_updates"] == 1
    told = optimizer.step(1.0)["lr_multipliers"]
    assert (told != 1).all()
    for module, before in start.items():
        moved = first[f"{module}_weights"] != before
        # Weights of the loss, which the first steps were not told, had no input to learn from.
        assert moved.float().mean() > 0.85, module


def test_an_observed_loss_counts_as_one_that_the_step_was_told():
    runs = []
    for how in ("step", "observe", "in a closure", "withdrawn"):
        model = Net(torch.float32)
        optimizer = DeepNestedOptimizer(model, lr=0.05, meta_update_freq=2, meta_lr=0.05)
        for i in range(5):
            optimizer.zero_grad()
            loss = loss_of(model, batch(i, torch.float32))
            loss.backward()
            if how == "step":
                optimizer.step(loss)
            elif how == "in a closure":

                def closure(told=loss, to=optimizer):
                    to.observe_loss(told.detach())
                    return told

                optimizer.step(closure)
            else:
                optimizer.observe_loss(loss.detach() if how == "observe" else 3.0)
                if how == "withdrawn":
                    optimizer.observe_loss(None)
                optimizer.step()
        runs.append([p.detach().clone() for p in model.parameters()])
        assert optimizer._told == (how != "withdrawn") and optimizer._loss is None
    told, observed, inside, withdrawn = runs
    assert_same_tensors(told, observed)
    assert_same_tensors(told, inside)
    assert any(not torch.equal(a, b) for a, b in zip(told, withdrawn))
    with pytest.raises(TypeError):
        optimizer.observe_loss("low")


def after_one_gathering(scale=1.0, **options):
    """What a gradient adds to those gathered, the gradient, and what the last update moved."""
    model = Net()
    optimizer = DeepNestedOptimizer(two_groups(model), lr=0.01, meta_update_freq=1000, **options)
    in_float64(optimizer, noise=0.0)
    for i in range(4):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer.zero_grad()
        (scale * loss_of(model, batch(i))).backward()
        optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    kept = gathered(optimizer)
    optimizer.zero_grad()
    (scale * loss_of(model, batch(4))).backward()
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    return {m: after - kept[m] for m, after in gathered(optimizer).items()}, grad, moved


@pytest.mark.parametrize("normalize", [True, False])
def test_the_cosine_rule_divides_by_the_lengths_of_gradient_and_update(normalize):
    raw, grad, moved = after_one_gathering(meta_rule="adam", normalize=normalize)
    divided, *_ = after_one_gathering(normalize=normalize)
    lengths = grad.norm() * moved.norm()
    for module in raw:
        assert relative_error(divided[module] * lengths, raw[module]) <= 1e-9, module
    # The derivative by one multiplier for all is the cosine itself; the last bias has it times 16.
    cosine = torch.dot(grad, moved) / lengths
    assert divided["controller"][-1].item() == pytest.approx(GAIN * cosine.item(), rel=1e-9)


def test_what_the_cosine_rule_gathers_does_not_depend_on_the_scale_of_the_loss():
    one, *_ = after_one_gathering(eps=1e-30)
    other, *_ = after_one_gathering(scale=2.0**20, eps=1e-30)
    # Other weights' derivatives depend on what the networks see, and that is sizes.
    assert other["controller"][-1].item() == pytest.approx(one["controller"][-1].item(), rel=1e-9)
    assert relative_error(other["mixing"], one["mixing"]) <= 1e-9


@pytest.mark.parametrize("far", [False, True])
def test_the_cosine_rule_descends_on_the_sum_no_further_than_it_trusts(far):
    model = Net()
    rate = 1.0 if far else 1e-5
    optimizer = DeepNestedOptimizer(
        two_groups(model), lr=0.05, meta_update_freq=6, meta_lr=rate, horizon="step"
    )
    for i in range(5):
        step_on(optimizer, model, batch(i))
    first = optimizer.param_groups[0]
    # What the sixth gradient will add.
    grads, length = simple.hypergradients(first, optimizer.state, due(optimizer, model), SLOW)
    sums = {m: total + grads[m] / length for m, total in gathered(optimizer).items()}
    before = {m: first[f"{m}_weights"].clone() for m in sums}
    step_on(optimizer, model, batch(5))
    assert first["meta_updates"] == 1
    for module, total in sums.items():
        moved = (first[f"{module}_weights"] - before[module]).double()
        expected = -rate * total.double()
        if far:
            assert expected.norm() > learned.TRUST
            expected *= learned.TRUST / expected.norm()
        assert relative_error(moved, expected) <= 1e-3, module  # weights are float32
        assert not first[f"{module}_exp_avg_sq"].any()


def due(optimizer, model):
    """The gradients of the sixth batch, as the step finds them."""
    optimizer.zero_grad()
    loss_of(model, batch(5)).backward()
    return [
        Due(group, group["params"], [p.grad.clone() for p in group["params"]])
        for group in optimizer.param_groups
    ]


def test_from_gradients_that_are_noise_the_cosine_rule_learns_next_to_nothing():
    changes = {}
    for rule in ("cosine", "adam"):
        p = nn.Parameter(torch.zeros(256, 256))
        options = {"learn_momentum": False, "learn_mixing": False, "meta_update_freq": 10}
        optimizer = DeepNestedOptimizer([p], lr=1e-6, meta_rule=rule, meta_lr=1e-3, **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            p.grad = torch.randn(256, 256, generator=generator)
            optimizer.step()
        changes[rule] = abs(math.log(float(optimizer.get_lr_multipliers()[0])))
    assert changes["cosine"] < 0.1
    assert changes["adam"] > 2 * changes["cosine"]


def test_the_defaults_correct_a_learning_rate_that_is_far_too_small():
    finals = []
    for rate in (0.0, 1e-4):
        model = Net(torch.float32)
        optimizer = DeepNestedOptimizer(model, lr=1e-4, meta_lr=rate)
        for i in range(400):
            step_on(optimizer, model, batch(i % 20, torch.float32))
        finals.append(loss_of(model, batch(0, torch.float32)).item())
    assert float(optimizer.get_lr_multipliers()[0]) > 3
    assert finals[1] < 0.8 * finals[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"meta_rule": "sgd"}, "Invalid meta_rule: 'sgd'. Choose one of cosine, adam"),
        ({"meta_rule": "cosine", "mode": "explicit"}, "one of adam for mode='explicit'"),
    ],
)
def test_a_meta_rule_that_is_not_there_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DeepNestedOptimizer(Net(), **options)


def test_a_mode_edited_to_one_without_the_meta_rule_is_refused_before_a_step():
    model = Net()
    optimizer = DeepNestedOptimizer(model)
    step_on(optimizer, model, batch(0))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["mode"] = "explicit"
    with pytest.raises(ValueError, match=r"meta_rule: 'cosine'\. Choose one of adam for"):
        step_on(optimizer, model, batch(1))
    assert_same_tensors(before, list(model.parameters()))
    optimizer.param_groups[0]["mode"] = "other"
    with pytest.raises(ValueError, match="Invalid mode: 'other'"):
        step_on(optimizer, model, batch(1))
    optimizer.param_groups[0].update(mode="explicit", meta_rule="adam")
    with pytest.raises(ValueError, match="horizon='run' is for meta_rule='cosine'"):
        step_on(optimizer, model, batch(1))
    optimizer.param_groups[0]["horizon"] = "step"
    step_on(optimizer, model, batch(1))


def test_learning_follows_the_loss_where_the_learning_rate_is_too_small():
    torch.manual_seed(0)
    finals = []
    for rate in (0.0, 0.01):
        model = Net(torch.float32)
        optimizer = DeepNestedOptimizer(model, lr=1e-4, meta_lr=rate, meta_update_freq=5)
        for i in range(150):
            step_on(optimizer, model, batch(i % 20, torch.float32))
        finals.append(loss_of(model, batch(0, torch.float32)).item())
    assert float(optimizer.get_lr_multipliers()[0]) > 1.5
    assert finals[1] < 0.95 * finals[0]


def test_learning_follows_the_loss_where_the_learning_rate_is_too_large():
    model = Net(torch.float32)
    # The way from the start, far out after the first steps, is another matter.
    optimizer = DeepNestedOptimizer(model, lr=0.5, meta_lr=0.01, meta_update_freq=5, horizon="step")
    for i in range(150):
        step_on(optimizer, model, batch(i % 20, torch.float32))
    assert float(optimizer.get_lr_multipliers()[0]) < 0.5
