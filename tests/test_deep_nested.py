"""DeepNestedOptimizer: where it starts, what it is with learning off, how it is used."""

import copy
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from nested_optim import DeepNestedOptimizer, NestedOptimizer
from nested_optim.meta import learned

from .helpers import assert_same_state, assert_same_tensors, clone_params, make_params, train
from .meta_helpers import Net, batch, loss_of, step_on, two_groups

OFF = {"learn_lr": False, "learn_momentum": False, "learn_mixing": False}
SHAPES = ((4, 3), (5,), (), (2, 2, 2), (0, 3))


# -------------------------------------------------------------------- equal to NestedOptimizer

FLAGS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "coupled, maximize": {"weight_decay": 0.1, "decoupled": False, "maximize": True},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "mean of 3": {"frequency": 3, "weight_decay": 0.1},
    "sum of 2": {"frequency": 2, "window": "sum"},
    "float32 state": {"state_dtype": torch.float32},
}


@pytest.mark.parametrize("foreach", [False, True], ids=["for-loop", "foreach"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str
)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_without_learning_it_is_nested_optimizer_bit_for_bit(flags, dtype, foreach):
    """All parts on, at meta_lr=0 and past several meta updates; and all parts off."""
    params = make_params(*SHAPES, dtype=dtype)
    options = {"lr": 0.01, "weight_decay": 0.0, "foreach": foreach, **flags}
    nested = NestedOptimizer(params, **options)
    for learning in ({"meta_lr": 0.0, "meta_update_freq": 2, "cms_frequencies": (1, 2, 3)}, OFF):
        twins = clone_params(make_params(*SHAPES, dtype=dtype))
        deep = DeepNestedOptimizer(twins, **options, **learning)
        expected = clone_params(make_params(*SHAPES, dtype=dtype))
        nested = NestedOptimizer(expected, **options)
        for seed in range(7):
            train(deep, twins, [seed])
            train(nested, expected, [seed])
            assert_same_tensors(twins, expected)
        if learning is OFF:
            assert_same_state(deep, nested)
        else:
            assert torch.equal(deep.get_lr_multipliers(), torch.ones(1))


@pytest.mark.parametrize("seed", range(3))
def test_a_scheduled_run_with_meta_lr_zero_is_nested_optimizer_s(seed):
    models = [Net(torch.float32), Net(torch.float32)]
    makers = [
        lambda m: DeepNestedOptimizer(two_groups(m, lr=0.02), lr=0.05, meta_lr=0.0, mode="simple"),
        lambda m: NestedOptimizer(two_groups(m, lr=0.02), lr=0.05, weight_decay=0.0),
    ]
    runs = []
    for model, make in zip(models, makers):
        optimizer = make(model)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for i in range(15):
            optimizer.zero_grad()
            loss_of(model, batch(seed * 100 + i, torch.float32)).backward()
            optimizer.step()
            scheduler.step()
        runs.append(list(model.parameters()))
    assert_same_tensors(*runs)


@pytest.mark.parametrize("module", learned.SWITCHES)
def test_what_has_been_learned_is_used_at_meta_lr_zero_however_it_came_there(module):
    model, plain = Net(torch.float32), Net(torch.float32)
    options = {"lr": 0.05, "meta_lr": 0.0}
    deep, nested = DeepNestedOptimizer(model, **options), NestedOptimizer(plain.parameters(), 0.05)
    nested.param_groups[0]["weight_decay"] = 0.0
    for i in range(3):
        step_on(deep, model, batch(i, torch.float32))
        step_on(nested, plain, batch(i, torch.float32))
    assert_same_tensors(list(model.parameters()), list(plain.parameters()))
    deep.param_groups[0][f"{module}_weights"].add_(0.1)
    again = Net(torch.float32)
    again.load_state_dict(model.state_dict())
    loaded = DeepNestedOptimizer(again, **options)
    loaded.load_state_dict(copy.deepcopy(deep.state_dict()))
    for optimizer, net in ((deep, model), (loaded, again), (nested, plain)):
        step_on(optimizer, net, batch(3, torch.float32))
    assert_same_tensors(list(model.parameters()), list(again.parameters()))
    assert not torch.equal(model.first.weight, plain.first.weight)


def test_an_update_without_a_trace_teaches_nothing():
    """Of what learning has left behind, nothing is true after updates at meta_lr=0."""
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(model, lr=0.05, meta_update_freq=100, meta_rule="adam")
    first = optimizer.param_groups[0]

    def gathered(seed, rate):
        first["meta_lr"] = rate
        step_on(optimizer, model, batch(seed, torch.float32))
        return torch.cat([first[f"{m}_grad"] for m in learned.modules(first)]).clone()

    found = [gathered(seed, rate) for seed, rate in enumerate([1e-4, 1e-4, 0.0, 1e-4, 1e-4])]
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(found)]
    assert changed == [True, False, False, True]
    assert all(torch.isfinite(grads).all() for grads in found)


def test_at_the_start_it_is_adamw_until_the_first_meta_update():
    model, plain = Net(torch.float32), Net(torch.float32)
    deep = DeepNestedOptimizer(model, lr=0.05, meta_lr=0.1, meta_update_freq=5)
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.0)
    for i in range(6):
        x = batch(i, torch.float32)
        step_on(deep, model, x, told=True)
        step_on(adamw, plain, x)
        ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
        same = all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert same == (i < 4), i


# -------------------------------------------------------------------- memory


def keys_of(optimizer):
    return set().union(*(state.keys() for state in optimizer.state.values()))


def test_parts_that_are_off_have_no_tensors():
    base = {"step", "window_count", "exp_avg"}
    trace = {"previous_grad", "update_trace"}
    began = {"initial_param"}
    slow = {"exp_avg_slow1", "exp_avg_slow2"}
    cases = [
        (OFF, base | {"exp_avg_sq"}),
        ({**OFF, "normalize": False}, base),
        ({}, base | {"exp_avg_sq"} | trace | began | slow),
        ({"horizon": "step"}, base | {"exp_avg_sq"} | trace | slow),
        ({"meta_rule": "adam"}, base | {"exp_avg_sq"} | trace | slow),
        ({"learn_lr": False}, base | {"exp_avg_sq"} | trace | slow),
        ({"learn_mixing": False}, base | {"exp_avg_sq"} | trace | began),
        ({"cms_frequencies": (1,)}, base | {"exp_avg_sq"} | trace | began),
        ({"mode": "explicit"}, base | {"exp_avg_sq"} | slow),
        ({**OFF, "learn_lr": True, "normalize": False}, base | trace | began),
    ]
    for options, expected in cases:
        params = make_params(*SHAPES)
        optimizer = DeepNestedOptimizer(params, **options)
        train(optimizer, params, [0, 1])
        assert keys_of(optimizer) == expected, options
        first = optimizer.param_groups[0]
        tensors = {m for m in learned.SWITCHES if first[f"{m}_weights"] is not None}
        assert tensors == set(learned.modules(first)), options
        assert (first["long_run"] is not None) == (began <= expected), options
        tensors.add("long")
        assert all(first[k] is None for k in learned.KEYS[:-2] if k.split("_")[0] not in tensors)


@pytest.mark.parametrize("horizon, count", [("run", 12), ("step", 10)])
def test_one_momentum_costs_twelve_bytes_per_parameter(horizon, count):
    params = make_params((1000, 100))
    optimizer = DeepNestedOptimizer(params, cms_frequencies=(1,), horizon=horizon)
    train(optimizer, params, [0, 1])
    held = sum(t.numel() * t.element_size() for t in optimizer.state[params[0]].values())
    assert held <= count * params[0].numel() + 100


# -------------------------------------------------------------------- use


def test_a_bare_model_that_returns_its_loss_learns_after_one_meta_period():
    class SimpleModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(10, 5)

        def forward(self, x):
            return {"loss": self.fc(x).sum()}

    model = SimpleModel()
    optimizer = DeepNestedOptimizer(model, base_lr=1e-3, mode="simple")
    for step in range(1, 202):
        x = torch.randn(4, 10)
        optimizer.zero_grad()
        out = model(x)
        out["loss"].backward()
        result = optimizer.step(out["loss"].item())
        assert result["global_step"] == step
        assert torch.equal(result["lr_multipliers"], torch.ones(1)) == (step < 100)
    assert optimizer.last_meta_loss is not None
    assert float(optimizer.controller_grad_norm) > 0


def test_a_bare_model_makes_the_groups_core_and_memory():
    class Titan(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = nn.Linear(3, 3)
            self.memory_bank = nn.Linear(3, 3)

    model = Titan()
    optimizer = DeepNestedOptimizer(model)
    assert [group["name"] for group in optimizer.param_groups] == ["core", "memory"]
    assert optimizer.param_groups[1]["param_names"] == ["memory_bank.weight", "memory_bank.bias"]
    assert optimizer.param_groups[1]["params"] == list(model.memory_bank.parameters())
    assert [g["name"] for g in DeepNestedOptimizer(nn.Linear(2, 2)).param_groups] == ["core"]
    by_keyword = DeepNestedOptimizer(model=model, base_lr=0.5)
    assert by_keyword.group_names() == ["core", "memory"] and by_keyword.defaults["lr"] == 0.5
    own = DeepNestedOptimizer(model.core.parameters(), model=model)
    assert own.group_names() == ["group0"] and own.model is model
    with pytest.raises(TypeError, match="two models"):
        DeepNestedOptimizer(model, model=nn.Linear(1, 1))
    with pytest.raises(TypeError, match="given twice"):
        DeepNestedOptimizer(model.parameters(), params=model.parameters())


def test_step_takes_a_closure_as_torch_s_does_and_a_loss_as_a_number_or_a_tensor():
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(model, lr=0.01)
    x = batch(0, torch.float32)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    assert torch.is_tensor(optimizer.step(closure))
    assert optimizer.step() is None
    for count, loss in enumerate((1.5, torch.tensor(1.5), torch.ones(1, requires_grad=True), 2), 3):
        result = optimizer.step(loss)
        assert result["global_step"] == count
        assert result["lr_multipliers"].shape == (1,)
    before = [p.detach().clone() for p in model.parameters()]
    for wrong in ("1.0", torch.ones(2), True, [1.0]):
        with pytest.raises(TypeError, match="a closure, or this step's loss"):
            optimizer.step(wrong)
    assert_same_tensors(list(model.parameters()), before)


def features_seen(optimizer, model):
    return optimizer.state[next(iter(model.parameters()))]["update_trace"][2:8]


def test_networks_see_what_the_update_before_measured():
    """So that one pass over memory does: no gradient has to be looked at before it is used."""
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(model, lr=0.01)
    p = model.first.weight
    measured = []
    for i in range(3):
        loss_of(model, batch(i, torch.float32)).backward()
        momentum = optimizer.state[p]["exp_avg"].clone() if i else torch.zeros_like(p)
        lengths = [float(t.detach().norm()) for t in (p.grad, momentum, p)]
        product = float((p.grad * momentum).sum())
        optimizer.step()
        cosine = product / (lengths[0] * lengths[1]) if i else 0.0
        measured.append(torch.tensor([lengths[0], lengths[1], cosine, lengths[2]]))
        trace = optimizer.state[p]["update_trace"]
        torch.testing.assert_close(trace[12:16], measured[i], rtol=1e-5, atol=1e-7)
        seen = torch.zeros(4) if i == 0 else measured[i - 1]
        logs = (seen / p.numel() ** 0.5 + 1e-12).log() / 10
        logs[2] = seen[2]
        torch.testing.assert_close(trace[8:12], logs, rtol=1e-5, atol=1e-7)
        optimizer.zero_grad()


def test_a_loss_is_seen_in_its_own_step_only():
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(model, lr=0.01)
    x = batch(0, torch.float32)
    loss_of(model, x).backward()
    optimizer.step(math.e - 1)
    torch.testing.assert_close(features_seen(optimizer, model)[4:], torch.tensor([0.1, 1.0]))
    optimizer.step()
    assert not features_seen(optimizer, model)[4:].any()
    optimizer.step(lambda: torch.tensor(3.0))  # a rank's own loss would let replicas drift
    assert not features_seen(optimizer, model)[4:].any()
    with pytest.raises(RuntimeError, match="sparse"):
        model.first.weight.grad = torch.ones(3, 4).to_sparse()
        optimizer.step(5.0)
    assert optimizer._loss is None


def test_hooks_run_once_per_step_whatever_the_step_is_given():
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(model, lr=0.01)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_meta_update_hook(lambda o: seen.append(o.param_groups[0]["global_step"]))
    loss_of(model, batch(0, torch.float32)).backward()
    before = model.gain.detach().clone()
    optimizer.register_meta_update_hook(lambda o: seen.append(not torch.equal(model.gain, before)))
    optimizer.step()
    optimizer.step(1.0)
    assert seen == ["pre", 1, True, "post", "pre", 2, True, "post"]


def test_the_learning_rate_of_a_group_is_the_scheduler_s():
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(
        two_groups(model), lr=0.01, meta_lr=0.05, meta_update_freq=2, cms_frequencies=(1,)
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for i in range(6):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.01 * 0.9**i] * 2)
        step_on(optimizer, model, batch(i, torch.float32), told=True)
        assert [group["lr"] for group in optimizer.param_groups] == rates
        expected = [rate * float(m) for rate, m in zip(rates, optimizer.get_lr_multipliers())]
        assert optimizer.get_effective_lrs() == pytest.approx(expected)
        scheduler.step()
    assert (optimizer.get_lr_multipliers() != 1).all()


@pytest.mark.parametrize("foreach", [False, True])
def test_the_multiplier_scales_the_update_and_the_decay(foreach):
    """With the momentum's network and the mixture off, a step is AdamW's at the scaled rate."""
    params = make_params((4, 3))
    optimizer = DeepNestedOptimizer(
        params,
        lr=0.01,
        weight_decay=0.1,
        learn_momentum=False,
        learn_mixing=False,
        foreach=foreach,
        meta_lr=0.1,
        meta_update_freq=2,
    )
    train(optimizer, params, range(6))
    twins = clone_params(params)
    adamw = torch.optim.AdamW(twins, lr=0.01, weight_decay=0.1)
    state = copy.deepcopy(optimizer.state[params[0]])
    adamw.state[twins[0]] = {k: state[k] for k in ("step", "exp_avg", "exp_avg_sq")}
    train(optimizer, params, [7])
    multiplier = float(optimizer.get_lr_multipliers())
    assert abs(multiplier - 1) > 0.1
    adamw.param_groups[0]["lr"] = 0.01 * multiplier
    train(adamw, twins, [7])
    torch.testing.assert_close(params, twins)


def test_clipping_is_torch_s_and_leaves_gradients_alone():
    params = make_params((4, 3), (5,))
    twins = clone_params(params)
    clipped = DeepNestedOptimizer(params, lr=0.1, max_grad_norm=1.0, meta_lr=0.0)
    plain = NestedOptimizer(twins, lr=0.1, weight_decay=0.0)
    for seed in range(4):
        scale = 10.0 ** (seed - 2)
        for p, q in zip(params, twins):
            p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            q.grad = p.grad.clone()
        before = [p.grad.clone() for p in params]
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        clipped.step()
        plain.step()
        assert_same_tensors([p.grad for p in params], before)
        torch.testing.assert_close(params, twins)


def test_metrics_are_numbers_by_the_groups_names():
    model = Net(torch.float32)
    groups = two_groups(model)
    groups[0]["name"], groups[1]["name"] = "body", "head"
    optimizer = DeepNestedOptimizer(groups, lr=0.01, meta_lr=0.05, meta_update_freq=2)
    assert optimizer.metrics()["lr_multiplier/head"] == 1.0
    for i in range(4):
        step_on(optimizer, model, batch(i, torch.float32), told=True)
    found = optimizer.metrics()
    assert set(found) == {
        "lr_multiplier/body",
        "lr_multiplier/head",
        "effective_lr/body",
        "effective_lr/head",
        "momentum_avg_norm",
        "saturated",
        "meta_loss",
        "controller_grad_norm",
    }
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    assert found["lr_multiplier/body"] == float(optimizer.get_lr_multipliers()[0])
    stats = optimizer.get_momentum_stats()
    assert stats["momentum_avg_norm"] == found["momentum_avg_norm"] > 0
    assert {"scale", "shift", "damping", "mixing0", "mixing1", "mixing2"} < stats.keys()


@pytest.mark.parametrize("horizon, most", [("step", 1.25), ("run", 3.0)])
def test_saturation_is_counted_and_does_not_come_from_the_start(horizon, most):
    """A model whose gradients and weights are of any size begins within the bounds."""
    for scale in (1e-12, 1.0, 1e12):
        params = make_params((3, 3))
        optimizer = DeepNestedOptimizer(params, lr=1e-3, meta_update_freq=1, horizon=horizon)
        for seed in range(5):
            params[0].grad = scale * torch.randn(
                3, 3, generator=torch.Generator().manual_seed(seed)
            )
            optimizer.step()
        assert optimizer.metrics()["saturated"] == 0.0
        assert 1 / most < float(optimizer.get_lr_multipliers()) < most
    weights = optimizer.param_groups[0]["controller_weights"]
    weights[-1] += 1e3  # the bias of its output
    train(optimizer, params, [9])
    assert optimizer.metrics()["saturated"] == 1.0
    assert optimizer.metrics()["lr_multiplier/group0"] == pytest.approx(100.0, rel=1e-2)


# -------------------------------------------------------------------- refusals


def test_all_groups_share_the_learned_parts():
    first, second = make_params((2, 2), (3,))
    with pytest.raises(ValueError, match=r"param group 0.*meta_lr=0.5: all groups share"):
        DeepNestedOptimizer([{"params": [first], "meta_lr": 0.5}])
    optimizer = DeepNestedOptimizer([{"params": [first]}, {"params": [second]}])
    train(optimizer, [first, second], [0])
    with pytest.raises(ValueError, match="controller_weights"):
        optimizer.add_param_group(
            {"params": make_params((2,)), "controller_weights": torch.ones(3)}
        )
    optimizer.param_groups[1]["meta_lr"] = 0.5
    with pytest.raises(ValueError, match=r"param group 1: meta_lr is 0.5.*edit it in every group"):
        train(optimizer, [first, second], [1])
    optimizer.param_groups[0]["meta_lr"] = 0.5
    train(optimizer, [first, second], [1])
    for group in optimizer.param_groups:
        group["controller_hidden_dim"] = 16
    with pytest.raises(ValueError, match="do not fit the controller that is there"):
        train(optimizer, [first, second], [2])


def test_checkpointing_is_a_way_to_unroll():
    params = make_params((2,))
    optimizer = DeepNestedOptimizer(params, use_gradient_checkpointing=True)
    assert optimizer.param_groups[0]["unroll"] == "stepwise"
    with pytest.raises(ValueError, match="use_gradient_checkpointing=True means"):
        DeepNestedOptimizer(params, use_gradient_checkpointing=True, unroll="first_order")


def test_a_group_added_in_mid_run_learns_with_the_others():
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(
        two_groups(model)[:1], lr=0.01, meta_lr=0.05, meta_update_freq=2
    )
    for i in range(3):
        step_on(optimizer, model, batch(i, torch.float32))
    optimizer.add_param_group({"params": model.last.parameters(), "name": "late"})
    for i in range(3, 8):
        step_on(optimizer, model, batch(i, torch.float32))
    found = optimizer.get_lr_multipliers()
    assert found.shape == (2,) and (found != 1).all()


def test_compiling_the_step_runs_it_as_it_is():
    model, plain = Net(torch.float32), Net(torch.float32)
    options = {"lr": 0.01, "meta_lr": 0.05, "meta_update_freq": 2}
    compiled, eager = DeepNestedOptimizer(model, **options), DeepNestedOptimizer(plain, **options)
    step = torch.compile(compiled.step, backend="eager")
    for i in range(4):
        for optimizer, net, run in ((compiled, model, step), (eager, plain, eager.step)):
            optimizer.zero_grad()
            loss_of(net, batch(i, torch.float32)).backward()
            run()
    assert_same_tensors(list(model.parameters()), list(plain.parameters()))


def test_parts_can_be_switched_in_mid_run():
    params = make_params((3, 3))
    optimizer = DeepNestedOptimizer(params, lr=0.01, meta_lr=0.05, meta_update_freq=2, **OFF)
    train(optimizer, params, range(3))
    for switch in ("learn_lr", "learn_momentum", "learn_mixing"):
        optimizer.param_groups[0][switch] = True
        train(optimizer, params, range(3, 8))
    assert (optimizer.get_lr_multipliers() != 1).all()
    optimizer.param_groups[0].update(OFF)
    train(optimizer, params, range(8, 10))
    assert all(torch.isfinite(p).all() for p in params)


def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
        with pytest.raises(RuntimeError, match=r"sharded.*learn_lr, learn_momentum"):
            DeepNestedOptimizer([p]).step()
        before = p.full_tensor().clone()
        DeepNestedOptimizer([p], **OFF, max_grad_norm=1.0).step()
        assert (p.full_tensor() < before).all()
    finally:
        torch.distributed.destroy_process_group()


def test_the_readme_s_lines_run(capsys):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (block,) = (b for b in blocks if "DeepNestedOptimizer" in b)
    model = Net(torch.float32)
    loss = loss_of(model, batch(0, torch.float32))
    exec(block, {"model": model, "loss": loss})
    assert "'lr_multiplier/core': 1.0" in capsys.readouterr().out
