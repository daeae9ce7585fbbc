"""The unroll: steps equal to real ones, and their gradient equal to finite differences."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from nested_optim import DeepNestedOptimizer
from nested_optim.meta import learned, unroll

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

EXPLICIT = {"mode": "explicit", "loss_fn": loss_of}


def build(model, warmup=3, told=False, **options):
    groups = options.pop("groups", None) or two_groups(model)
    optimizer = DeepNestedOptimizer(
        groups, **{"lr": 0.05, "model": model, **EXPLICIT, **SMALL, **options}
    )
    for i in range(warmup):
        step_on(optimizer, model, batch(i, next(model.parameters()).dtype), told)
    return optimizer


def gradient(optimizer, k, how):
    batches = [batch(10 + i) for i in range(k)]
    return unroll.meta_gradient(optimizer, batch(99), batches, loss_of, how)


# -------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_meta_gradient_is_that_of_the_loss_after_real_steps(k):
    model = Net()
    optimizer = build(model, weight_decay=0.1)
    in_float64(optimizer)
    restore = snapshot(optimizer, model)

    def run(perturb):
        restore()
        perturb()
        for i in range(k):
            step_on(optimizer, model, batch(10 + i))
        return loss_of(model, batch(99)).detach()

    loss, exact = gradient(optimizer, k, "exact")
    same_loss, stepwise = gradient(optimizer, k, "stepwise")
    assert torch.equal(loss, same_loss)
    assert torch.equal(loss, run(lambda: None))
    assert set(exact) == set(stepwise) == {"controller", "momentum", "mixing"}
    for module in exact:
        assert relative_error(stepwise[module], exact[module]) <= 1e-12, module
    assert_agrees(optimizer, run, exact)
    if k <= 5:  # weight by weight
        for module, expected in finite_differences(optimizer, run).items():
            assert relative_error(exact[module], expected) <= 1e-6, module


VARIANTS = {
    "windows": {"groups": lambda model: two_groups(model, frequency=2)},
    "sums": {"groups": lambda model: two_groups(model, frequency=3, window="sum")},
    "clipping": {"max_grad_norm": 0.1},
    "amsgrad, coupled": {"amsgrad": True, "weight_decay": 0.1, "decoupled": False},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "not normalized": {"normalize": False, "lr": 0.3},
    "the loss told": {"told": True},
    "from the start": {"warmup": 0},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_meta_gradient_knows_every_option(options):
    model = Net()
    told = options.get("told", False)
    groups = {k: make(model) for k, make in options.items() if k == "groups"}
    optimizer = build(model, **{**options, **groups})
    in_float64(optimizer)
    restore = snapshot(optimizer, model)

    def run(perturb):
        restore()
        perturb()
        for i in range(3):
            step_on(optimizer, model, batch(10 + i), told)
        return loss_of(model, batch(99)).detach()

    loss, exact = gradient(optimizer, 3, "exact")
    same_loss, stepwise = gradient(optimizer, 3, "stepwise")
    assert torch.equal(loss, same_loss)
    for module in exact:
        assert relative_error(stepwise[module], exact[module]) <= 1e-12, module
    assert_agrees(optimizer, run, exact)
    assert torch.equal(loss, run(lambda: None))


def test_first_order_is_exact_for_one_step_and_biased_for_more():
    model = Net()
    optimizer = build(model)
    in_float64(optimizer)
    for k in (1, 5):
        exact = gradient(optimizer, k, "exact")[1]
        first_order = gradient(optimizer, k, "first_order")[1]
        for module in exact:
            error = relative_error(first_order[module], exact[module])
            assert (error <= 1e-10) if k == 1 else (1e-3 < error < 10), (k, module)


def test_gradients_that_are_exactly_zero_have_a_finite_meta_gradient():
    model = Net()
    optimizer = build(model, warmup=0, weight_decay=0.1)
    in_float64(optimizer)
    still = torch.zeros(8, 4, dtype=torch.float64)
    nothing = lambda module, x: 0.0 * loss_of(module, x)  # noqa: E731
    mixed = lambda module, x: loss_of(module, x) if x.any() else nothing(module, x)  # noqa: E731
    for how in ("exact", "stepwise"):
        batches = [still, batch(0), still, batch(1)]
        _, found = unroll.meta_gradient(optimizer, batch(99), batches, mixed, how)
        assert all(torch.isfinite(g).all() and g.any() for g in found.values())


# -------------------------------------------------------------------- what it leaves alone


class Block(nn.Module):
    """A transformer layer with an embedding, dropout and batch normalization."""

    def __init__(self, dropout=0.2, norm=True):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, labels=None):
        hidden = self.layer(self.embed(tokens))
        logits = self.head(self.norm(hidden.transpose(1, 2)).transpose(1, 2))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 11, (4, 6), generator=generator)
    return {"tokens": found, "labels": found.roll(1, 1)}


def train_block(optimizer, model, steps, start=0):
    for i in range(start, start + steps):
        optimizer.zero_grad()
        model(**tokens(i))["loss"].backward()
        optimizer.step()


def everything(optimizer, model):
    first = optimizer.param_groups[0]
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "state": optimizer.state_dict()["state"],
            "options": {k: v for k, v in first.items() if k != "params" and k not in learned.KEYS},
            "modes": [m.training for m in model.modules()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "rng": torch.get_rng_state(),
        }
    )


def assert_equal(a, b):
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("how", ["exact", "stepwise", "first_order"])
def test_a_meta_update_leaves_everything_but_what_is_learned_untouched(how):
    torch.manual_seed(0)
    model = Block()
    optimizer = DeepNestedOptimizer(
        model, lr=1e-2, mode="explicit", unroll=how, weight_decay=0.1, meta_lr=0.01
    )
    train_block(optimizer, model, 3)
    model(**tokens(3))["loss"].backward()
    before = everything(optimizer, model)
    first = optimizer.param_groups[0]
    learned_before = {m: first[f"{m}_weights"].clone() for m in learned.modules(first)}
    optimizer.meta_update(tokens(50), [tokens(i) for i in range(2)])
    assert_equal(everything(optimizer, model), before)
    for module, weights in learned_before.items():
        moved = first[f"{module}_weights"] != weights
        assert moved.float().mean() > 0.85, module
    assert float(optimizer.controller_grad_norm) > 0
    assert math.isfinite(float(optimizer.last_meta_loss))


def test_a_run_with_meta_lr_zero_is_the_run_without_meta_updates():
    runs = []
    for updates in (True, False):
        torch.manual_seed(0)
        model = Block()
        optimizer = DeepNestedOptimizer(model, lr=1e-2, mode="explicit", meta_lr=0.0)
        for i in range(6):
            train_block(optimizer, model, 1, i)
            if updates and i % 2:
                optimizer.meta_update(tokens(50), [tokens(i)])
        runs.append((everything(optimizer, model), optimizer))
    assert_equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize("learning", [False, True], ids=["at the start", "learned"])
def test_unrolled_steps_are_the_real_steps(learning):
    torch.manual_seed(0)
    model = Block()
    optimizer = DeepNestedOptimizer(
        [
            {"params": model.embed.parameters(), "frequency": 2},
            {"params": [*model.layer.parameters(), *model.norm.parameters()]},
        ],
        lr=1e-2,
        model=model,
        mode="explicit",
        weight_decay=0.1,
        max_grad_norm=0.5,
    )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        train_block(optimizer, model, 3)
        if learning:
            in_float64(optimizer, noise=0.2)
        position = unroll.rehearse(optimizer, [tokens(i) for i in range(3, 8)])
        train_block(optimizer, model, 5, 3)
    rehearsal = unroll.Rehearsal(optimizer, None)
    for name, slot, count in zip(rehearsal.names, position.slots, position.counts):
        p = dict(rehearsal.loss.named_parameters())[name]
        state = optimizer.state[p]
        assert torch.equal(slot["param"], p), name
        assert count == (float(state["step"]), float(state["window_count"]))
        for key in slot.keys() - {"param", "window_sum"}:
            assert torch.equal(slot[key], state[key]), (name, key)
        if count[1]:
            assert torch.equal(slot["window_sum"], state["window_sum"]), name
    for name, buffer in rehearsal.loss.named_buffers():
        assert torch.equal(position.buffers[name], buffer), name
    if learning:
        assert (optimizer.get_lr_multipliers() != 1).all()


def test_stepwise_equals_exact_with_dropout_and_batch_normalization():
    torch.manual_seed(0)
    model = Block().double()
    optimizer = DeepNestedOptimizer(model, lr=1e-2, mode="explicit")
    train_block(optimizer, model, 3)
    in_float64(optimizer)
    batches = [tokens(i) for i in range(4)]
    exact = unroll.meta_gradient(optimizer, tokens(50), batches, None, "exact")
    stepwise = unroll.meta_gradient(optimizer, tokens(50), batches, None, "stepwise")
    assert torch.equal(exact[0], stepwise[0])
    for module in exact[1]:
        assert relative_error(stepwise[1][module], exact[1][module]) <= 1e-10


# -------------------------------------------------------------------- models


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", ["exact", "stepwise"])
def test_a_compiled_model_is_unrolled_without_its_compilation(how, inside):
    """What it is compiled to cannot be differentiated twice."""
    torch._dynamo.reset()
    model = torch.compile(Net(), backend="aot_eager")
    models = Net(), Outer(model) if inside else model
    optimizers = [DeepNestedOptimizer(m, lr=0.05, unroll=how, **EXPLICIT) for m in models]
    plain, wrapped = optimizers
    for optimizer, m in zip(optimizers, models):
        step_on(optimizer, m, batch(0))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0  # it has really been compiled, its backward pass included
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q)
        q.data.copy_(p.data)
    given = batch(50), [batch(1), batch(2)]
    torch.testing.assert_close(wrapped.meta_update(*given), plain.meta_update(*given))
    for module in ("controller", "momentum", "mixing"):
        mine, its = (o.param_groups[0][f"{module}_weights"] for o in (wrapped, plain))
        torch.testing.assert_close(mine, its)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def in_bfloat16(module, given):
    with torch.autocast("cpu", torch.bfloat16):
        return module(**given)["loss"]


def test_autocast_is_unrolled_as_it_trains():
    torch.manual_seed(0)
    model = Block(dropout=0.0)
    optimizer = DeepNestedOptimizer(model, lr=1e-2, mode="explicit", loss_fn=in_bfloat16)
    train_block(optimizer, model, 1)
    batches = [tokens(i) for i in range(3)]
    found = [
        unroll.meta_gradient(optimizer, tokens(9), batches, f, how)
        for f, how in ((in_bfloat16, "exact"), (in_bfloat16, "stepwise"), (None, "exact"))
    ]
    for module in found[0][1]:
        assert relative_error(found[1][1][module], found[0][1][module]) <= 1e-3
        assert relative_error(found[0][1][module], found[2][1][module]) <= 0.3
    position = unroll.rehearse(optimizer, batches)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for given in batches:
            optimizer.zero_grad()
            in_bfloat16(model, given).backward()
            optimizer.step()
        validation = in_bfloat16(model, tokens(9))
    rehearsal = unroll.Rehearsal(optimizer, None)
    for name, slot, p in zip(rehearsal.names, position.slots, rehearsal.params):
        assert torch.equal(slot["param"], p), name
    assert torch.equal(found[0][0], validation.detach())


def test_a_frozen_and_an_unused_parameter_are_passed_over():
    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    model = Wider()
    optimizer = DeepNestedOptimizer(model, lr=0.05, **EXPLICIT, **SMALL)
    model.first.bias.requires_grad_(False)
    for how in ("exact", "stepwise", "first_order"):
        _, found = gradient(optimizer, 2, how)
        assert all(g.any() for g in found.values())


# -------------------------------------------------------------------- its use


def test_steps_are_rehearsed_with_the_optimizer_s_own_loss():
    model = Net()
    optimizer = build(model)  # the model returns no loss itself
    position = unroll.rehearse(optimizer, [batch(10), batch(11)])
    for i in (10, 11):
        step_on(optimizer, model, batch(i))
    by_name = dict(zip(unroll.Rehearsal(optimizer, None).names, position.slots))
    assert torch.equal(by_name["model.first.weight"]["param"], model.first.weight)


def test_batches_come_from_the_ring_or_from_the_caller():
    model = Net(torch.float32)
    optimizer = build(model, k_unroll=2)
    val = batch(99, torch.float32)
    with pytest.raises(RuntimeError, match=r"unrolls 2 steps, but 0 batches.*observe_batch"):
        optimizer.meta_update(val)
    for i in range(5):
        optimizer.observe_batch(batch(i, torch.float32))
    twin = build(Net(torch.float32), k_unroll=2)
    ours = optimizer.meta_update(val)
    theirs = twin.meta_update(val, [batch(3, torch.float32), batch(4, torch.float32)])
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="at least one training batch"):
        optimizer.meta_update(val, [])


def test_meta_updates_run_by_themselves_where_validation_batches_are_given():
    model = Net(torch.float32)
    calls = []

    def val():
        calls.append(1)
        return batch(99, torch.float32)

    optimizer = DeepNestedOptimizer(
        model, lr=0.05, k_unroll=2, meta_update_freq=3, val_batch_fn=val, **EXPLICIT
    )
    for i in range(7):
        x = batch(i, torch.float32)
        optimizer.observe_batch(x)
        step_on(optimizer, model, x)
    assert len(calls) == 2 and optimizer.param_groups[0]["meta_updates"] == 2


def automatic(model, every, k, **options):
    val = batch(99, torch.float32)
    options = {"lr": 0.05, "k_unroll": k, "meta_update_freq": every, **EXPLICIT, **options}
    return DeepNestedOptimizer(model, val_batch_fn=lambda: val, **options)


def observed_steps(optimizer, model, steps, start=0):
    """After how many of these steps there has been a meta update."""
    found = []
    for i in range(start, start + steps):
        before = optimizer.param_groups[0]["meta_updates"]
        x = batch(i, torch.float32)
        optimizer.observe_batch(x)
        step_on(optimizer, model, x)
        if optimizer.param_groups[0]["meta_updates"] > before:
            found.append(i + 1)
    return found


def test_meta_updates_wait_for_their_batches_where_they_are_more_frequent_than_an_unroll_is_long():
    model = Net(torch.float32)
    optimizer = automatic(model, every=2, k=5)
    assert observed_steps(optimizer, model, 10) == [6, 8, 10]


def test_meta_updates_wait_for_their_batches_after_resuming():
    model = Net(torch.float32)
    optimizer = automatic(model, every=4, k=3)
    assert observed_steps(optimizer, model, 7) == [4]
    saved = copy.deepcopy(optimizer.state_dict())
    again = automatic(model, every=4, k=3)
    again.load_state_dict(saved)
    # The eighth step finds one batch.
    assert observed_steps(again, model, 9, start=7) == [12, 16]


def test_meta_updates_without_any_batch_are_refused():
    model = Net(torch.float32)
    optimizer = automatic(model, every=2, k=1)
    step_on(optimizer, model, batch(0, torch.float32))
    with pytest.raises(RuntimeError, match=r"0 batches have been seen: call observe_batch\(\)"):
        step_on(optimizer, model, batch(1, torch.float32))


def test_what_an_unroll_cannot_do_is_refused():
    model = Net(torch.float32)
    val = batch(99, torch.float32)
    simple = DeepNestedOptimizer(model, loss_fn=loss_of)
    with pytest.raises(RuntimeError, match="mode='explicit'"):
        simple.meta_update(val, [val])
    blind = DeepNestedOptimizer(model.parameters(), **EXPLICIT)
    with pytest.raises(RuntimeError, match="build the optimizer with model="):
        blind.meta_update(val, [val])
    foreign = DeepNestedOptimizer([nn.Parameter(torch.ones(2))], model=model, **EXPLICIT)
    with pytest.raises(ValueError, match=r"parameter 0 of param group 0.*not a parameter of the"):
        foreign.meta_update(val, [val])
    silent = DeepNestedOptimizer(model, mode="explicit")
    with pytest.raises(TypeError, match=r"output has no loss.*loss_fn"):
        silent.meta_update(val, [val])
    nothing = DeepNestedOptimizer(
        model, learn_lr=False, learn_momentum=False, learn_mixing=False, **EXPLICIT
    )
    with pytest.raises(RuntimeError, match="nothing to learn"):
        nothing.meta_update(val, [val])
    with pytest.raises(ValueError, match="val_batch_fn is for mode='explicit'"):
        DeepNestedOptimizer(model, val_batch_fn=lambda: val)


def mean_square(module, x):
    return module(x).square().mean()


@pytest.mark.parametrize("how", ["exact", "stepwise", "first_order"])
def test_what_autograd_cannot_go_through_is_refused_by_its_name(how):
    def build(model, loss_fn=mean_square):
        return DeepNestedOptimizer(model, mode="explicit", loss_fn=loss_fn, unroll=how)

    x, rows = torch.ones(2, 3), torch.tensor([1, 2])
    sparse = build(nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1)))
    with pytest.raises(RuntimeError, match=r"sparse gradients, but '0.weight' has one.*sparse=Fal"):
        sparse.meta_update(rows, [rows])
    frozen = build(nn.Linear(3, 1))
    frozen.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"parameters are frozen; set requires_grad"):
        frozen.meta_update(x, [x])
    # Of the training batch, or of the one for validation only.
    detached = build(nn.Linear(3, 1), lambda m, x: mean_square(m, x).detach())
    late = build(nn.Linear(3, 1))
    late.loss_fn = lambda m, x: mean_square(m, x) if x.all() else mean_square(m, x).detach()
    for optimizer, val in ((detached, x), (late, torch.zeros(2, 3))):
        with pytest.raises(RuntimeError, match=r"does not depend on the parameters in autograd"):
            optimizer.meta_update(val, [x])
        assert optimizer.param_groups[0]["meta_updates"] == 0


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, but is 3"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function or None, but is 3"),
        ({"val_batch_fn": 3}, TypeError, "val_batch_fn must be a function or None, but is 3"),
        (
            {"use_gradient_checkpointing": "no"},
            ValueError,
            "Invalid use_gradient_checkpointing: 'no'. True or False",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_another_kind_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        DeepNestedOptimizer([nn.Parameter(torch.ones(2))], mode="explicit", **options)


def test_explicit_learning_lowers_the_validation_loss():
    finals = []
    for rate in (0.0, 0.01):
        model = Net(torch.float32)
        optimizer = DeepNestedOptimizer(
            model, lr=1e-3, meta_lr=rate, k_unroll=2, unroll="stepwise", **EXPLICIT
        )
        for i in range(60):
            x = batch(i % 20, torch.float32)
            optimizer.observe_batch(x)
            step_on(optimizer, model, x)
            if i % 3 == 2:
                optimizer.meta_update(batch(99, torch.float32))
        finals.append(loss_of(model, batch(99, torch.float32)).item())
    assert finals[1] < 0.95 * finals[0]
