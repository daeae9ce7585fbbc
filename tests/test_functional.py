"""The rules as TorchOpt transformations: what the optimizers do, in TorchOpt's protocol."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchopt
from torch.nn import Parameter
from torchopt.schedule import linear_schedule

from nested_optim import (
    M3,
    DeltaMomentum,
    NestedOptimizer,
    depth_groups,
    functional,
    matrix_groups,
)
from nested_optim.rules import MatrixForm

SHAPES = {"slow": (4, 3), "fast": (5,), "scalar": ()}
FREQUENCIES = {"slow": 3, "fast": 1, "scalar": 2}


def make(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator, dtype=dtype) for k, s in shapes.items()}


def run_both(rule, cls, params, groups, steps=13, missing=(), **options):
    """The transformation's and the optimizer's parameters after every step, and both states."""
    held = {name: Parameter(p.clone()) for name, p in params.items()}
    listed = [{"params": [p], **groups.get(name, {})} for name, p in held.items()]
    optimizer = cls(listed, foreach=False, **options)
    state = rule.init(params)
    for t in range(steps):
        dtype = next(iter(params.values())).dtype
        grads = make({k: p.shape for k, p in params.items()}, dtype, 100 + t)
        grads = {k: None if (t, k) in missing else g for k, g in grads.items()}
        params, state = rule.step(grads, state, params)
        for name, p in held.items():
            p.grad = None if grads[name] is None else grads[name].clone()
        optimizer.step()
        yield params, held, state, optimizer


def assert_equal(params, held, state, optimizer):
    for name, p in held.items():
        assert torch.equal(params[name], p.detach()), name
        theirs, ours = optimizer.state[p], state.leaves[name]
        assert ours.keys() == theirs.keys()
        # What a window's sum holds between windows has no meaning.
        for key in ours.keys() - ({"window_sum"} if not theirs["window_count"] else set()):
            assert torch.equal(ours[key], theirs[key]), (name, key)
            assert ours[key].dtype == theirs[key].dtype, (name, key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"decoupled": False, "maximize": True, "lr": 0.3}]
)
def test_adamw_is_the_optimizer_to_the_last_bit(dtype, window, options):
    options = {"lr": 0.05, "weight_decay": 0.1, "window": window, **options}
    rule = functional.adamw(frequency=FREQUENCIES, **options)
    groups = {name: {"frequency": f} for name, f in FREQUENCIES.items()}
    for found in run_both(rule, NestedOptimizer, make(dtype=dtype), groups, **options):
        assert_equal(*found)
    assert int(found[2].leaves["slow"]["step"]) == 4


def test_a_parameter_without_a_gradient_keeps_its_phase():
    missing = {(1, "slow"), (2, "slow"), (3, "fast"), (0, "scalar")}
    rule = functional.adamw(lr=0.1, frequency=FREQUENCIES)
    groups = {name: {"frequency": f} for name, f in FREQUENCIES.items()}
    steps = list(run_both(rule, NestedOptimizer, make(), groups, steps=5, missing=missing, lr=0.1))
    # The optimizer has no state yet for what has had no gradient.
    assert_equal(*steps[-1])
    (_, _, state, _) = steps[-1]
    assert [int(state.leaves[k]["window_count"]) for k in SHAPES] == [0, 0, 0]
    assert [int(state.leaves[k]["step"]) for k in SHAPES] == [1, 4, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("delta_rate", [0.0, 2.0])
def test_momentum_is_sgd_s_and_delta_momentum_its_optimizer_s(dtype, delta_rate):
    options = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}
    if delta_rate:
        options["delta_rate"] = delta_rate
        rule = functional.delta_momentum(frequency=FREQUENCIES, **options)
    else:
        rule = functional.momentum(frequency=FREQUENCIES, **options)
    groups = {name: {"frequency": f} for name, f in FREQUENCIES.items()}
    options["delta_rate"] = delta_rate
    for found in run_both(rule, DeltaMomentum, make(dtype=dtype), groups, **options):
        assert_equal(*found)
    plain = {k: Parameter(p) for k, p in make(dtype=dtype).items()}
    sgd = torch.optim.SGD(plain.values(), lr=0.05, momentum=0.8, weight_decay=0.1, foreach=False)
    params = make(dtype=dtype)
    rule = functional.momentum(lr=0.05, momentum=0.8, weight_decay=0.1)
    state = rule.init(params)
    for t in range(4):
        grads = make(dtype=dtype, seed=t)
        params, state = rule.step(grads, state, params)
        for name, p in plain.items():
            p.grad = grads[name].clone()
        sgd.step()
    assert all(torch.equal(params[k], plain[k].detach()) for k in SHAPES)


MATRICES = {"matrix": (6, 4), "conv": (4, 3, 2, 2), "fused": (6, 3), "bias": (6,)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("second_moment", [None, "row", "element"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_m3_is_the_optimizer_to_the_last_bit(dtype, second_moment, alpha):
    options = {"lr": 0.02, "weight_decay": 0.1, "alpha": alpha, "slow_frequency": 2}
    options |= {"second_moment": second_moment, "ns_steps": 3}
    rule = functional.m3(
        algorithm={"matrix": "m3", "conv": "m3", "fused": "m3", "bias": "adamw"},
        form={"matrix": None, "conv": None, "fused": MatrixForm(split_sizes=(2, 4)), "bias": None},
        frequency={"matrix": 2, "conv": 1, "fused": 1, "bias": 3},
        **options,
    )
    groups = {
        "matrix": {"frequency": 2},
        "fused": {"split_sizes": (2, 4)},
        "bias": {"algorithm": "adamw", "frequency": 3},
    }
    for found in run_both(rule, M3, make(MATRICES, dtype), groups, **options):
        assert_equal(*found)
    assert ("slow_update" in found[2].leaves["conv"]) == bool(alpha)


def test_m3_refuses_what_is_no_matrix_and_says_where():
    with pytest.raises(ValueError, match=r"'bias' of shape \(6,\).*'adamw' in the tree"):
        functional.m3().init(make(MATRICES))
    with pytest.raises(ValueError, match="complex"):
        functional.m3().init({"w": torch.zeros(2, 2, dtype=torch.complex64)})


def test_options_differ_by_parameter_and_weight_decay_acts_at_boundaries():
    lrs, decays = {"slow": 0.1, "fast": 0.2, "scalar": 0.4}, {"slow": 0.5, "fast": 0.0, "scalar": 1}
    rule = functional.adamw(lr=lrs, weight_decay=decays, frequency=FREQUENCIES)
    groups = {
        k: {"frequency": FREQUENCIES[k], "lr": lrs[k], "weight_decay": decays[k]} for k in SHAPES
    }
    for found in run_both(rule, NestedOptimizer, make(), groups):
        assert_equal(*found)
    # Zero gradients: only decay moves a parameter, and only where a window closes.
    params, zeros = make(), {k: torch.zeros(s) for k, s in SHAPES.items()}
    state = rule.init(params)
    for t in range(1, 7):
        before = params
        params, state = rule.step(zeros, state, params)
        shrinks = 1 - lrs["slow"] * decays["slow"] if t % 3 == 0 else 1
        assert torch.equal(params["slow"], before["slow"] * shrinks)


def test_a_tree_of_options_may_be_the_upper_part_of_the_parameters_tree():
    params = {"body": {"w": torch.ones(2), "b": torch.ones(1)}, "head": (torch.ones(3),)}
    rule = functional.adamw(lr=0.1, frequency={"body": 2, "head": 1})
    state = rule.init(params)
    grads = torchopt.pytree.tree_map(torch.ones_like, params)
    params, state = rule.step(grads, state, params)
    assert params["body"]["w"].eq(1).all() and params["body"]["b"].eq(1).all()
    assert params["head"][0].lt(1).all()
    params, _ = rule.step(grads, state, params)
    assert params["body"]["w"].lt(1).all() and params["body"]["b"].lt(1).all()


def test_the_frequency_may_be_edited_and_windows_flushed_without_losing_a_gradient():
    held = Parameter(torch.ones(2))
    optimizer = NestedOptimizer([held], lr=0.1, frequency=3, foreach=False)
    params = (torch.ones(2),)
    state = functional.adamw(lr=0.1, frequency=3).init(params)
    for t, frequency in enumerate((3, 3, 2, 1, 4, 4, 4)):
        optimizer.param_groups[0]["frequency"] = frequency
        grad = torch.tensor([1.0 + t, -3.0 * t])
        held.grad = grad.clone()
        optimizer.step()
        rule = functional.adamw(lr=0.1, frequency=frequency)
        params, state = rule.step((grad,), state, params)
        assert torch.equal(params[0], held.detach()), t
    assert int(state.leaves[0]["window_count"]) == 3
    params, state = rule.flush(state, params)
    assert optimizer.flush() == 1
    assert torch.equal(params[0], held.detach())
    again, _ = rule.flush(state, params)  # nothing is pending
    assert again[0] is params[0]


def test_a_schedule_is_read_as_a_scheduler_s_learning_rate_would_be():
    def schedule(count):
        return 0.1 * 0.9**count

    rule = functional.adamw(lr=schedule, frequency=FREQUENCIES)
    held = {k: Parameter(p) for k, p in make().items()}
    groups = [{"params": [p], "frequency": FREQUENCIES[k]} for k, p in held.items()]
    optimizer = NestedOptimizer(groups, lr=0.1, foreach=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 0.9**count)
    params = make()
    state = rule.init(params)
    for t in range(7):
        grads = make(seed=50 + t)
        params, state = rule.step(grads, state, params)
        for k, p in held.items():
            p.grad = grads[k]
        optimizer.step()
        scheduler.step()
    assert int(state.calls) == 7
    for k, p in held.items():
        assert torch.equal(params[k], p.detach())


def test_clipping_and_a_schedule_of_torchopt_chain_around_a_rule():
    clip = torchopt.clip.clip_grad_norm(0.5)
    inner = functional.adamw(lr=linear_schedule(0.1, 0.0, 4), frequency=FREQUENCIES)
    halve = torchopt.transform.scale(0.5)
    chained = torchopt.chain(clip, inner, halve)
    assert isinstance(chained, torchopt.base.ChainedGradientTransformation)
    params, by_hand = make(), make()
    state, inner_state = chained.init(params), inner.init(by_hand)
    for t in range(6):
        grads = make(seed=70 + t)
        kept = copy.deepcopy(grads)
        updates, state = chained.update(grads, state, params=params, inplace=False)
        assert all(torch.equal(grads[k], kept[k]) for k in SHAPES)
        params = torchopt.apply_updates(params, updates, inplace=False)
        norm = torch.stack([g.norm() for g in kept.values()]).norm()
        factor = min(1.0, 0.5 / (float(norm) + 1e-6))
        clipped = {k: g * factor for k, g in kept.items()}
        moved, inner_state = inner.step(clipped, inner_state, by_hand)
        by_hand = {k: p + 0.5 * (moved[k] - p) for k, p in by_hand.items()}
        if t < 2:  # the slow group waits for its window, also as a part of a chain
            assert not updates["slow"].any()
    for k in SHAPES:
        torch.testing.assert_close(params[k], by_hand[k], rtol=1e-6, atol=1e-7)
    # Flat chains hand lists on: options of a whole tree still work there.
    flat = torchopt.combine.chain_flat(clip, functional.adamw(lr=0.1, frequency=2))
    updates, _ = flat.update(make(), flat.init(params), params=params, inplace=False)
    assert updates.keys() == params.keys() and not updates["fast"].any()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["adamw", "m3", "delta_momentum"])
def test_func_optimizer_runs_the_rule_and_rounds_once_more(inplace, name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    inputs, targets = torch.randn(16, 4), torch.randn(16, 2)
    start = tuple(p.detach().clone() for p in model.parameters())
    names = [n for n, _ in model.named_parameters()]
    options = {"lr": 0.02, "frequency": (1, 2, 1, 3), "weight_decay": 0.1}
    if name == "m3":
        options["algorithm"] = ("m3", "adamw", "m3", "adamw")
    rule = getattr(functional, name)(**options)

    def loss_of(params):
        outputs = torch.func.functional_call(model, dict(zip(names, params)), (inputs,))
        return (outputs - targets).square().mean()

    optimizer = torchopt.FuncOptimizer(rule, inplace=inplace)
    params = tuple(p.clone().requires_grad_() for p in start)
    exact, state, losses = start, rule.init(start), []
    for _ in range(30):
        loss = loss_of(params)
        losses.append(loss.item())
        params = optimizer.step(loss, params)
        if not inplace:  # cut the graph: the next step is another one
            params = tuple(p.detach().requires_grad_() for p in params)
            optimizer.load_state_dict(
                torchopt.pytree.tree_map(torch.Tensor.detach, optimizer.state_dict())
            )
        leaves = tuple(p.clone().requires_grad_() for p in exact)
        grads = torch.autograd.grad(loss_of(leaves), leaves)
        exact, state = rule.step(grads, state, exact)
    assert losses[-1] < 0.8 * losses[0]
    # Not the bits: update = new - old, and old + update is rounded again.
    for p, q in zip(params, exact):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-5)


def test_torchopt_s_optimizer_trains_in_place():
    held = [Parameter(p) for p in make().values()]
    twins = [Parameter(p) for p in make().values()]
    ours = torchopt.Optimizer(held, functional.adamw(lr=0.1, frequency=2))
    theirs = NestedOptimizer(twins, lr=0.1, frequency=2)
    for t in range(6):
        for p, q, g in zip(held, twins, make(seed=t).values()):
            p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
    for p, q in zip(held, twins):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_in_place_reuses_the_tensors_and_otherwise_nothing_is_touched():
    rule = functional.adamw(lr=0.1, frequency=FREQUENCIES)
    params, grads = make(), make(seed=1)
    state = rule.init(params)
    before = copy.deepcopy((params, grads, state))
    updates, fresh = rule.update(grads, state, params=params, inplace=False)
    for a, b in zip(*map(torchopt.pytree.tree_leaves, (before, (params, grads, state)))):
        assert torch.equal(a, b)
    # A window holds a copy: what the caller does to its gradients later is no matter of it.
    grads["slow"].zero_()
    assert torch.equal(fresh.leaves["slow"]["window_sum"], before[1]["slow"])

    grads = make(seed=1)
    written, same = rule.update(grads, state, params=params, inplace=True)
    assert all(written[k] is grads[k] for k in SHAPES)
    assert all(torch.equal(written[k], updates[k]) for k in SHAPES)
    for old, new, other in zip(*map(torchopt.pytree.tree_leaves, (state, same, fresh))):
        assert new is old and torch.equal(new, other)
    # A gradient that is one number seen many times cannot be written to.
    expanded = {k: torch.ones(()).expand(s) for k, s in SHAPES.items()}
    written, _ = rule.update(expanded, same, params=params, inplace=True)
    assert written["fast"].shape == (5,) and expanded["fast"].eq(1).all()


def test_a_tensor_that_learns_is_refused_in_place():
    lr = torch.tensor(0.1, requires_grad=True)
    for rule in (functional.adamw(lr=lr), functional.adamw(lr=lambda count: lr)):
        with pytest.raises(RuntimeError, match="pass inplace=False"):
            rule.update(make(), rule.init(make()), params=make())
    rule = functional.momentum(lr=0.1, momentum=lr)
    with pytest.raises(RuntimeError, match=r"'fast'.*pass inplace=False"):
        rule.update(make(), rule.init(make()), params=make())
    with torch.no_grad():
        rule.update(make(), rule.init(make()), params=make())


BAD = [
    (lambda: functional.adamw(lr=-1.0), "Invalid learning rate: -1.0"),
    (lambda: functional.adamw(lr={"a": 0.1, "b": -1}), "lr of 'b': Invalid learning rate"),
    (lambda: functional.adamw(betas=(0.9, 1.0)), "Invalid beta parameter at index 1"),
    (lambda: functional.adamw(frequency=0), "Invalid frequency: 0"),
    (lambda: functional.adamw(frequency={"a": 1, "b": True}), "frequency of 'b': Invalid"),
    (lambda: functional.adamw(window="median"), "Invalid window"),
    (lambda: functional.adamw(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
    (lambda: functional.adamw(lr=torch.zeros(2)), "Tensor lr must be 1-element"),
    (lambda: functional.momentum(momentum=1.5), "Invalid momentum value"),
    (lambda: functional.momentum(momentum=torch.zeros(2)), "Tensor momentum must be 1-element"),
    (lambda: functional.delta_momentum(momentum=torch.tensor(0.9)), "delta_rate=0 only"),
    (lambda: functional.m3(ns_coefficients="sextic"), "Invalid ns_coefficients"),
    (lambda: functional.m3(algorithm={"a": "sgd"}), "Invalid algorithm: 'sgd'"),
    (lambda: functional.m3(form=(2, 4)), "Invalid form: 2"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_options_are_refused_with_the_optimizers_words(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_trees_and_gradients_that_do_not_fit_are_refused_by_name():
    params = make()
    with pytest.raises(ValueError, match="`frequency` does not fit the parameters"):
        functional.adamw(frequency={"slow": 2}).init(params)
    rule = functional.adamw(lr=0.1)
    state = rule.init(params)
    with pytest.raises(ValueError, match="need the parameters"):
        rule.update(make(), state, inplace=False)
    with pytest.raises(ValueError, match="gradients do not have the structure"):
        rule.step((torch.ones(2),), state, params)
    with pytest.raises(ValueError, match=r"'fast' has shape \(5,\), its gradient \(4,\)"):
        rule.step({**make(), "fast": torch.ones(4)}, state, params)
    with pytest.raises(RuntimeError, match="'fast' has a sparse gradient"):
        rule.step({**make(), "fast": torch.ones(5).to_sparse()}, state, params)
    with pytest.raises(ValueError, match=r"has no 'max_exp_avg_sq'.*init"):
        functional.adamw(amsgrad=True).step(make(), state, params)
    with pytest.raises(TypeError, match="lr is a number"):
        functional.adamw(lr="fast")


def test_transformations_copy_and_pickle_and_their_state_saves(tmp_path):
    rule = functional.adamw(lr=0.1, frequency=FREQUENCIES)
    params = make()
    _, state = rule.step(make(seed=1), rule.init(params), params)
    torch.save(state._asdict(), tmp_path / "state.pt")
    loaded = functional.LevelState(**torch.load(tmp_path / "state.pt", weights_only=True))
    for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        for t in range(3):
            expected, _ = rule.step(make(seed=t), state, params)
            found, _ = other.step(make(seed=t), loaded, params)
            assert all(torch.equal(found[k], expected[k]) for k in SHAPES)


def test_without_torchopt_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['torchopt'] = None\n"
        "import nested_optim\n"
        "try:\n    import nested_optim.functional\n"
        "except ImportError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install torchopt==0.7.3" in run.stdout, run.stderr


def test_param_groups_become_trees_and_take_the_optimizer_s_steps():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(4, 6, 3), torch.nn.Flatten(), torch.nn.Linear(6, 5), torch.nn.Linear(5, 2)
    )
    levels = depth_groups(model, (1, 3), lr=0.05)
    levels[0]["weight_decay"] = 0.5
    groups = matrix_groups(model, groups=levels, matrix={"lr_mult": 2})
    trees = functional.option_trees(groups, weight_decay=0.1, alpha=0.25, slow_frequency=2)
    assert set(trees) == {
        "lr", "weight_decay", "frequency", "algorithm", "form", "alpha", "slow_frequency"
    }  # fmt: skip
    assert trees["slow_frequency"] == 2 and set(trees["frequency"].values()) == {1, 3}
    assert trees["form"]["0.weight"] == MatrixForm(flatten=True)
    rule = functional.m3(**trees)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = rule.init(params)
    optimizer = M3(groups, weight_decay=0.1, alpha=0.25, slow_frequency=2, foreach=False)
    for t in range(7):
        grads = make({k: p.shape for k, p in params.items()}, seed=t)
        params, state = rule.step(grads, state, params)
        for name, p in model.named_parameters():
            p.grad = grads[name].clone()
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(params[name], p.detach()), name


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": [torch.ones(1)]}], "without names"),
        ([{"params": [("a", 0)], "betas": (0.9, 0.9)}], "betas=.*one value for all"),
        ([{"params": [("a", 0)], "lr": 0.1}, {"params": [("b", 0)]}], "'b'.*without lr"),
    ],
)
def test_param_groups_that_make_no_trees_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        functional.option_trees(groups)


def test_the_readme_s_example_runs_and_finds_the_learning_rate_s_gradient():
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "functional.adamw" in block
    )
    torch.manual_seed(0)
    names = {
        "model": torch.nn.Sequential(torch.nn.Linear(3, 2)),
        "batches": [(torch.randn(8, 3), torch.randn(8, 2)) for _ in range(4)],
    }
    exec(compile(code, "README.md", "exec"), names)
    assert names["lr"].grad.abs() > 0
    assert int(names["state"][1].leaves["0.weight"]["step"]) == 2


def test_a_switch_that_is_none_is_refused_and_a_rule_shows_what_is_its_own():
    for make, name in ((functional.adamw, "amsgrad"), (functional.m3, "nesterov")):
        with pytest.raises(ValueError, match=f"Invalid {name}: 'x'. True or False"):
            make(**{name: "x"})
    with pytest.raises(ValueError, match=r"Invalid maximize: 1\. True or False"):
        functional.momentum(maximize=1)
    assert "m3" not in repr(functional.adamw()) and "m3" in repr(functional.m3())
