"""The learned momentum as a transformation: DeepNestedOptimizer's steps, and true gradients."""

import copy
import pickle

import pytest
import torch
import torchopt
from torch.nn import Parameter
from torchopt.schedule import linear_schedule

from nested_optim import DeepNestedOptimizer, NestedOptimizer, functional
from nested_optim.meta import learned

from .test_functional import make
from .test_functional_gradients import (
    DTYPE,
    STEPS,
    differences,
    loss_of,
    problem,
    unrolled,
)

SMALL = {"controller_hidden_dim": 3, "momentum_hidden_dim": 4, "cms_frequencies": (1, 2, 3)}
MODULES = ("controller", "momentum", "mixing")
#: In the order of a flattened tree, which is that of the names.
SHAPES = {"a": (4, 3), "b": (5,), "c": (), "d": (2, 2)}
GROUP = {"a": 0, "b": 0, "c": 1, "d": 2}


def moved_weights(dtype=torch.float32, noise=0.3, **options):
    """Weights away from their start, where every module has a say."""
    generator = torch.Generator().manual_seed(4)
    found = functional.learned_weights(**{**SMALL, **options})
    return {
        module: (flat + noise * torch.randn(flat.shape, generator=generator)).to(dtype)
        for module, flat in found.items()
    }


def optimizer_with(weights, groups, **options):
    optimizer = DeepNestedOptimizer(groups, foreach=False, meta_lr=0.0, **{**SMALL, **options})
    first = optimizer.param_groups[0]
    learned.ensure(first, torch.device("cpu"))
    for module, flat in weights.items():
        first[f"{module}_weights"].copy_(flat)
    return optimizer


def run_both(
    rule, weights, params, groups, steps=13, told=False, missing=(), number=GROUP, **options
):
    """The transformation's and the optimizer's parameters after every step, and both states."""
    held = {name: Parameter(p.clone()) for name, p in params.items()}
    listed = [
        {"params": [held[k] for k in held if number[k] == at], **given}
        for at, given in enumerate(groups)
    ]
    optimizer = optimizer_with(weights, listed, **options)
    state = rule.init(params)
    for t in range(steps):
        dtype = next(iter(params.values())).dtype
        grads = make({k: p.shape for k, p in params.items()}, dtype, 100 + t)
        grads = {k: None if (t, k) in missing else g for k, g in grads.items()}
        for name, p in held.items():
            p.grad = None if grads[name] is None else grads[name].clone()
        if told:
            loss = torch.tensor(3.0 / (t + 1))
            params, state = rule.step(grads, state, params, loss=loss)
            optimizer.step(loss)
        else:
            params, state = rule.step(grads, state, params)
            optimizer.step()
        yield params, held, state, optimizer


def assert_equal(params, held, state, optimizer):
    for name, p in held.items():
        assert torch.equal(params[name], p.detach()), name
        theirs, ours = optimizer.state[p], state.leaves[name]
        assert ours.keys() - theirs.keys() <= {"update_sizes"}
        assert theirs.keys() - ours.keys() <= {"previous_grad", "update_trace", "initial_param"}
        shared = ours.keys() & theirs.keys()
        for key in shared - ({"window_sum"} if not theirs["window_count"] else set()):
            assert torch.equal(ours[key], theirs[key]), (name, key)
            assert ours[key].dtype == theirs[key].dtype, (name, key)


FREQUENCIES = (3, 1, 2)
VARIANTS = {
    "plain": {},
    "the loss told": {"told": True},
    "amsgrad, coupled": {"amsgrad": True, "decoupled": False},
    "sums, maximize": {"window": "sum", "maximize": True},
    "not normalized": {"normalize": False, "lr": 0.3},
    "clipped": {"max_grad_norm": 0.5},
    "bounds": {"min_lr_mult": 0.5, "max_lr_mult": 1.5},
}


@pytest.mark.parametrize("mode", ["explicit", "simple"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_optimizer_to_the_last_bit(dtype, variant, mode):
    options = {"lr": 0.05, "weight_decay": 0.1, "mode": mode, **VARIANTS[variant]}
    told = options.pop("told", False)
    weights = moved_weights()
    frequency = {k: FREQUENCIES[GROUP[k]] for k in SHAPES}
    rule = functional.learned_adamw(
        weights, frequency=frequency, group=GROUP, **{**SMALL, **options}
    )
    groups = [{"frequency": f} for f in FREQUENCIES]
    for found in run_both(rule, weights, make(SHAPES, dtype), groups, told=told, **options):
        assert_equal(*found)
    params, held, state, optimizer = found
    assert int(state.leaves["a"]["step"]) == 4
    assert optimizer.get_lr_multipliers().ne(1).all()  # the networks had a say
    params, state = rule.flush(state, params)
    assert optimizer.flush() == 3
    assert_equal(params, held, state, optimizer)


@pytest.mark.parametrize("mode", ["explicit", "simple"])
@pytest.mark.parametrize("present", [("controller",), ("momentum",), ("mixing",), MODULES[:2]])
def test_modules_that_are_left_out_are_switched_off(present, mode):
    weights = {module: flat for module, flat in moved_weights().items() if module in present}
    switches = {learned.SWITCHES[module]: module in present for module in MODULES}
    rule = functional.learned_adamw(weights, lr=0.05, group=GROUP, mode=mode, **SMALL)
    groups = [{}, {}, {}]
    for found in run_both(rule, weights, make(SHAPES), groups, lr=0.05, mode=mode, **switches):
        assert_equal(*found)
    assert ("exp_avg_slow1" in found[2].leaves["a"]) == ("mixing" in present)


def test_weights_at_their_start_are_adamw_s_steps_and_so_are_none():
    for weights in (None, {}, functional.learned_weights()):
        rule = functional.learned_adamw(weights, lr=0.05, weight_decay=0.1, frequency=2)
        plain = functional.adamw(lr=0.05, weight_decay=0.1, frequency=2)
        params, others = make(SHAPES), make(SHAPES)
        state, other = rule.init(params), plain.init(others)
        for t in range(6):
            params, state = rule.step(make(SHAPES, seed=t), state, params)
            others, other = plain.step(make(SHAPES, seed=t), other, others)
        assert all(torch.equal(params[k], others[k]) for k in SHAPES)


def test_the_weights_are_the_optimizer_s_own():
    optimizer = DeepNestedOptimizer([Parameter(torch.zeros(2))], lr=0.1)
    learned.ensure(optimizer.param_groups[0], torch.device("cpu"))
    found = functional.learned_weights()
    assert list(found) == list(MODULES)
    for module, flat in found.items():
        assert torch.equal(flat, optimizer.param_groups[0][f"{module}_weights"]), module
    given = functional.learned_weights(cms_frequencies=(1, 10), learn_lr=False, dtype=DTYPE)
    assert list(given) == ["momentum", "mixing"] and given["mixing"].shape == (2,)
    assert given["momentum"].dtype == DTYPE
    assert list(functional.learned_weights(cms_frequencies=(1,))) == ["controller", "momentum"]


def test_a_parameter_without_a_gradient_is_no_part_of_what_its_group_shows():
    missing = {(1, "a"), (2, "a"), (4, "b"), (5, "b"), (3, "d")}
    weights = moved_weights()
    options = {"lr": 0.05, "mode": "explicit"}
    rule = functional.learned_adamw(weights, group=GROUP, **options, **SMALL)
    groups = [{}, {}, {}]
    for found in run_both(rule, weights, make(SHAPES), groups, missing=missing, **options):
        assert_equal(*found)


def test_param_groups_become_trees_with_their_numbers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    named = dict(model.named_parameters())
    groups = [
        {"params": [(k, p) for k, p in named.items() if k.startswith(at)], **given}
        for at, given in (("0", {"lr": 0.02, "frequency": 2}), ("1", {"weight_decay": 0.3}))
    ]
    # Flattened trees are in the order of names; so the optimizer's groups must be for equal bits.
    for group in groups:
        group["params"].sort(key=lambda pair: pair[0])
    trees = functional.option_trees(groups, numbered=True, lr=0.05, weight_decay=0.1)
    assert trees["group"] == {"0.bias": 0, "0.weight": 0, "1.bias": 1, "1.weight": 1}
    weights = moved_weights()
    rule = functional.learned_adamw(weights, **trees, **SMALL)
    params = {name: p.detach().clone() for name, p in named.items()}
    state = rule.init(params)
    optimizer = optimizer_with(weights, groups, lr=0.05, weight_decay=0.1, mode="explicit")
    for t in range(7):
        grads = make({k: p.shape for k, p in params.items()}, seed=t)
        params, state = rule.step(grads, state, params)
        for name, p in named.items():
            p.grad = grads[name].clone()
        optimizer.step()
        for name, p in named.items():
            assert torch.equal(params[name], p.detach()), name


# -------------------------------------------------------------------- gradients

GRADIENT_OPTIONS = {
    "explicit": {},
    "simple": {"mode": "simple"},
    "windows": {"frequency": {"a": 2, "b": 1}, "group": {"a": 0, "b": 1}},
    "one group on two levels": {"frequency": {"a": 2, "b": 1}},
    "coupled, amsgrad": {"weight_decay": 0.1, "decoupled": False, "amsgrad": True},
    "decoupled": {"weight_decay": 0.1, "maximize": True},
    "not normalized": {"normalize": False},
    "clipped": {"max_grad_norm": 0.2},
}
TINY = {"controller_hidden_dim": 1, "momentum_hidden_dim": 1, "cms_frequencies": (1, 2, 3)}


def assert_agree(function, inputs):
    """With shorter steps than elsewhere: networks away from their start are strongly curved."""
    inputs = [v.detach().clone().requires_grad_() for v in inputs]
    found = torch.autograd.grad(function(*inputs), inputs)
    for ours, true in zip(found, differences(function, inputs, step=2e-5)):
        assert true.abs().max() > 1e-6  # it has a say
        error = (ours - true).norm() / true.norm()
        assert error <= 1e-6, error


def start():
    params, _, _ = problem()
    flats = moved_weights(DTYPE, **TINY)
    lr, weight = (torch.tensor(v, dtype=DTYPE) for v in (0.05, 0.1))
    return [lr, params["a"], params["b"], weight, *(flats[module] for module in MODULES)]


def through_five(lr, a, b, weight, *flats, chain=lambda rule: rule, **options):
    def build(lr, weight):
        return functional.learned_adamw(dict(zip(MODULES, flats)), lr=lr, **{**TINY, **options})

    return unrolled(build, lr, a, b, weight, chain=chain)


@pytest.mark.parametrize("name", GRADIENT_OPTIONS)
def test_gradients_through_five_updates_agree_with_finite_differences(name):
    options = GRADIENT_OPTIONS[name]
    assert_agree(lambda *inputs: through_five(*inputs, **options), start())


def test_a_schedule_and_the_loss_are_differentiated_too():
    _, inputs, targets = problem()

    def final(lr, a, b, scale, *flats):
        params = {"a": a, "b": b}
        rule = functional.learned_adamw(
            dict(zip(MODULES, flats)), lr=lambda count: lr * 0.8**count, **TINY
        )
        state = rule.init(params)
        for x, y in zip(inputs[:STEPS], targets):
            loss = scale * loss_of(params, x, y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params, state = rule.step(dict(zip(params, grads)), state, params, loss=loss)
        return loss_of(params, inputs[STEPS], targets[STEPS])

    assert_agree(final, start())


def test_step_and_update_have_one_gradient_though_a_window_leaves_a_parameter_as_it_was():
    """By ``step`` a waiting parameter must not be the tensor that other updates depended on."""
    inputs, targets = problem()[1:]
    options = {"frequency": {"a": 3, "b": 1}}
    for build in (
        lambda flats, lr: functional.learned_adamw(flats, lr=lr, **TINY, **options),
        lambda flats, lr: functional.adamw(lr=lr, **options),
    ):
        slopes = []
        for through_step in (True, False):
            given = [v.clone().requires_grad_() for v in start()]
            lr, a, b, _, *flats = given
            params, rule = {"a": a, "b": b}, build(dict(zip(MODULES, flats)), lr)
            state = rule.init(params)
            for x, y in zip(inputs[:STEPS], targets):
                loss = loss_of(params, x, y)
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                grads = dict(zip(params, grads))
                if through_step:
                    params, state = rule.step(grads, state, params)
                else:
                    moves, state = rule.update(grads, state, params=params, inplace=False)
                    params = torchopt.apply_updates(params, moves, inplace=False)
            last = loss_of(params, inputs[STEPS], targets[STEPS])
            slopes.append(torch.autograd.grad(last, [lr, a, b]))
        for one, other in zip(*slopes):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


@pytest.mark.parametrize("mode", ["explicit", "simple"])
def test_gradients_of_exactly_zero_leave_meta_gradients_finite_and_right(mode):
    _, inputs, targets = problem()

    def masked(lr, a, b, weight, *flats):
        keep = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=DTYPE)
        params = {"a": a, "b": b}
        rule = functional.learned_adamw(dict(zip(MODULES, flats)), lr=lr, mode=mode, **TINY)
        state = rule.init(params)
        for x, y in zip(inputs[:STEPS], targets):
            loss = (torch.tanh(x @ params["a"].T + params["b"]) * keep - y).square().mean()
            loss = loss + weight * (params["a"].pow(4).mean(1) * keep).sum()
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params, state = rule.step(dict(zip(params, grads)), state, params)
        last = torch.tanh(inputs[STEPS] @ params["a"].T + params["b"]) * keep
        return (last - targets[STEPS]).square().mean()

    assert_agree(masked, start())


def test_no_gradient_at_all_leaves_meta_gradients_finite():
    given = [v.clone().requires_grad_() for v in start()]
    lr, a, b, _, *flats = given
    rule = functional.learned_adamw(dict(zip(MODULES, flats)), lr=lr, weight_decay=0.1, **TINY)
    params, state = {"a": a, "b": b}, None
    state = rule.init(params)
    zeros = {k: torch.zeros_like(p) for k, p in params.items()}
    for _ in range(STEPS):
        params, state = rule.step(zeros, state, params)
    total = sum(p.sum() for p in params.values())
    found = torch.autograd.grad(total, [lr, a, b, *flats], allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in found)
    assert found[0] != 0 and found[3].any()  # decay is multiplied, too


def test_the_learning_rate_s_derivative_at_zero_and_the_bits_of_a_tensor():
    grads, params = make(SHAPES, seed=3), make(SHAPES)
    lr = torch.tensor(0.05, dtype=DTYPE, requires_grad=True)
    weights = moved_weights()
    rules = [functional.learned_adamw(weights, lr=rate, **SMALL) for rate in (0.05, lr)]
    moved = [rule.step(grads, rule.init(params), params)[0] for rule in rules]
    for k in SHAPES:
        torch.testing.assert_close(moved[1][k].detach(), moved[0][k], rtol=1e-6, atol=1e-7)
        assert moved[1][k].dtype == moved[0][k].dtype
    still = torch.tensor(0.0, dtype=DTYPE, requires_grad=True)
    rule = functional.learned_adamw(weights, lr=still, **SMALL)
    new, _ = rule.step(grads, rule.init(params), params)
    assert all(torch.equal(new[k].detach(), params[k]) for k in SHAPES)
    (slope,) = torch.autograd.grad(sum(p.sum() for p in new.values()), still)
    expected = sum((moved[0][k] - params[k]).double().sum() for k in SHAPES) / 0.05
    assert slope.item() == pytest.approx(expected.item(), rel=1e-4)


def test_torch_func_and_second_derivatives_go_through():
    params, inputs, targets = problem()
    flats = moved_weights(DTYPE, **TINY)

    def final(lr, flats):
        rule = functional.learned_adamw(flats, lr=lr, **TINY)
        values, state = params, rule.init(params)
        for x, y in zip(inputs[:3], targets):
            values, state = rule.step(torch.func.grad(loss_of)(values, x, y), state, values)
        return loss_of(values, inputs[3], targets[3])

    lr = torch.tensor(0.05, dtype=DTYPE)
    slopes = torch.func.grad(final, argnums=1)(lr, flats)
    rate = lr.clone().requires_grad_()
    leaves = {k: v.clone().requires_grad_() for k, v in flats.items()}
    found = torch.autograd.grad(final(rate, leaves), [rate, *leaves.values()], create_graph=True)
    for module, slope in zip(MODULES, found[1:]):
        torch.testing.assert_close(slopes[module], slope.detach(), rtol=1e-12, atol=1e-14)
    (curvature,) = torch.autograd.grad(found[0], rate)
    ends = [torch.func.grad(final)(lr + h, flats) for h in (1e-5, -1e-5)]
    assert curvature.item() == pytest.approx(((ends[0] - ends[1]) / 2e-5).item(), rel=1e-5)


# -------------------------------------------------------------------- TorchOpt's protocol


def test_it_chains_with_clipping_and_schedules_and_gradients_pass():
    def chain(rule):
        return torchopt.chain(
            torchopt.clip.clip_grad_norm(1e6),
            rule,
            torchopt.transform.scale_by_schedule(lambda count: 0.9 ** count.item()),
        )

    assert_agree(lambda *inputs: through_five(*inputs, chain=chain), start())


def test_a_chain_clips_as_the_optimizer_does():
    weights = moved_weights()
    clipped = functional.learned_adamw(
        weights, lr=linear_schedule(0.1, 0.0, 4), max_grad_norm=0.5, **SMALL
    )
    chained = torchopt.chain(
        torchopt.clip.clip_grad_norm(0.5),
        functional.learned_adamw(weights, lr=linear_schedule(0.1, 0.0, 4), **SMALL),
    )
    params, others = make(SHAPES), make(SHAPES)
    state, other = clipped.init(params), chained.init(others)
    for t in range(6):
        params, state = clipped.step(make(SHAPES, seed=t), state, params)
        moves, other = chained.update(make(SHAPES, seed=t), other, params=others, inplace=False)
        others = torchopt.apply_updates(others, moves, inplace=False)
    for k in SHAPES:
        torch.testing.assert_close(params[k], others[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_func_optimizer_runs_the_rule_and_rounds_once_more(inplace):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    inputs, targets = torch.randn(16, 4), torch.randn(16, 2)
    names = [n for n, _ in model.named_parameters()]
    rule = functional.learned_adamw(
        moved_weights(noise=0.02), lr=0.02, frequency=(1, 2, 1, 3), group=(0, 0, 1, 1), **SMALL
    )

    def objective(params):
        outputs = torch.func.functional_call(model, dict(zip(names, params)), (inputs,))
        return (outputs - targets).square().mean()

    optimizer = torchopt.FuncOptimizer(rule, inplace=inplace)
    params = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    exact = tuple(p.detach().clone() for p in params)
    state, losses = rule.init(exact), []
    for _ in range(20):
        loss = objective(params)
        losses.append(loss.item())
        params = optimizer.step(loss, params)
        if not inplace:
            params = tuple(p.detach().requires_grad_() for p in params)
            optimizer.load_state_dict(
                torchopt.pytree.tree_map(torch.Tensor.detach, optimizer.state_dict())
            )
        leaves = tuple(p.clone().requires_grad_() for p in exact)
        grads = torch.autograd.grad(objective(leaves), leaves)
        exact, state = rule.step(grads, state, exact)
    assert losses[-1] < 0.9 * losses[0]
    for p, q in zip(params, exact):
        torch.testing.assert_close(p.detach(), q, rtol=1e-3, atol=1e-4)


def test_func_optimizer_learns_the_weights():
    lr, a, b, weight, *flats = (v.requires_grad_() for v in start())
    expected = torch.autograd.grad(through_five(lr, a, b, weight, *flats), [lr, *flats])
    _, inputs, targets = problem()
    rule = functional.learned_adamw(dict(zip(MODULES, flats)), lr=lr, **TINY)
    optimizer, params = torchopt.FuncOptimizer(rule), (a, b)
    for x, y in zip(inputs[:STEPS], targets):
        penalty = weight * (a.numel() / 7) * params[0].pow(4).mean()
        loss = loss_of(dict(zip("ab", params)), x, y) + penalty
        params = optimizer.step(loss, params)
    last = loss_of(dict(zip("ab", params)), inputs[STEPS], targets[STEPS])
    for found, true in zip(torch.autograd.grad(last, [lr, *flats]), expected):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mode", ["explicit", "simple"])
def test_in_place_reuses_the_tensors_and_otherwise_nothing_is_touched(mode):
    rule = functional.learned_adamw(
        moved_weights(), lr=0.1, frequency={"a": 2, "b": 1, "c": 1, "d": 1}, mode=mode, **SMALL
    )
    params, grads = make(SHAPES), make(SHAPES, seed=1)
    state = rule.init(params)
    before = copy.deepcopy((params, grads, state))
    updates, fresh = rule.update(grads, state, params=params, inplace=False)
    for one, other in zip(*map(torchopt.pytree.tree_leaves, (before, (params, grads, state)))):
        assert torch.equal(one, other)
    written, same = rule.update(grads, state, params=params, inplace=True)
    assert all(written[k] is grads[k] and torch.equal(written[k], updates[k]) for k in SHAPES)
    for old, new, other in zip(*map(torchopt.pytree.tree_leaves, (state, same, fresh))):
        assert new is old and torch.equal(new, other)


def test_transformations_copy_and_pickle():
    rule = functional.learned_adamw(moved_weights(), lr=0.1, group=GROUP, **SMALL)
    params = make(SHAPES)
    expected, _ = rule.step(make(SHAPES, seed=1), rule.init(params), params, loss=torch.ones(()))
    for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        found, _ = other.step(make(SHAPES, seed=1), other.init(params), params, loss=torch.ones(()))
        assert all(torch.equal(found[k], expected[k]) for k in SHAPES)


def test_torchopt_s_optimizer_trains_with_it_in_place():
    held = [Parameter(p) for p in make(SHAPES).values()]
    twins = [Parameter(p) for p in make(SHAPES).values()]
    weights = functional.learned_weights(**SMALL)  # at their start: AdamW
    ours = torchopt.Optimizer(held, functional.learned_adamw(weights, lr=0.1, **SMALL))
    theirs = NestedOptimizer(twins, lr=0.1, weight_decay=0.0)
    for t in range(6):
        for p, q, g in zip(held, twins, make(SHAPES, seed=t).values()):
            p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
    for p, q in zip(held, twins):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------- errors


def weights_with(**changes):
    return {**functional.learned_weights(**SMALL), **changes}


BAD = [
    ({"weights": {"mixer": torch.zeros(3)}}, r"weights.*'mixer'.*controller, momentum, mixing"),
    ({"weights": weights_with(mixing=torch.zeros(2))}, r"weights\['mixing'\].*3 numbers.*\(2,\)"),
    ({"weights": weights_with(controller=torch.zeros(5))}, r"weights\['controller'\].*numbers"),
    ({"weights": weights_with(momentum=None)}, r"weights\['momentum'\].*tensor"),
    (
        {"weights": weights_with(mixing=torch.zeros(3, dtype=torch.int64))},
        r"weights\['mixing'\].*floating",
    ),
    (
        {"weights": weights_with(), "cms_frequencies": (1,)},
        r"weights\['mixing'\].*cms_frequencies",
    ),
    ({"cms_frequencies": (2, 3)}, "cms_frequencies"),
    ({"mode": "stepwise"}, "Invalid mode: 'stepwise'"),
    ({"min_lr_mult": 2.0}, "Invalid min_lr_mult"),
    ({"controller_hidden_dim": 0}, "Invalid controller_hidden_dim"),
    ({"max_grad_norm": -1.0}, "Invalid max_grad_norm"),
    ({"normalize": 1}, "Invalid normalize"),
    ({"betas": (torch.tensor(0.9), 0.99)}, "betas.*numbers"),
    ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1"),
    ({"lr": -1.0}, "Invalid learning rate"),
    ({"frequency": {"a": 0}}, "frequency of 'a': Invalid"),
    ({"group": {"a": -1}}, "group of 'a': Invalid group: -1"),
    ({"group": True}, "Invalid group: True"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        functional.learned_adamw(**{**SMALL, **options})


def test_weights_that_learn_are_refused_in_place_and_other_states_by_name():
    weights = moved_weights()
    flat = weights["momentum"].requires_grad_()
    rule = functional.learned_adamw(weights, lr=0.1, **SMALL)
    params = make(SHAPES)
    with pytest.raises(RuntimeError, match=r"weights\['momentum'\].*pass inplace=False"):
        rule.update(make(SHAPES), rule.init(params), params=params)
    with torch.no_grad():
        rule.update(make(SHAPES), rule.init(params), params=make(SHAPES))
    assert flat.requires_grad
    plain = functional.adamw(lr=0.1)
    with pytest.raises(ValueError, match=r"'a' has no 'exp_avg_slow1'.*init"):
        rule.step(make(SHAPES), plain.init(params), params)
    with pytest.raises(ValueError, match="`group` does not fit the parameters"):
        functional.learned_adamw(group={"a": 1}, **SMALL).init(params)
    with pytest.raises(ValueError, match=r"loss.*one element"):
        rule.step(make(SHAPES), rule.init(params), params, loss=torch.ones(2))
