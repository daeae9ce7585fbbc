"""M3's windows, chunks, checkpoints, dtypes and neighbours of AdamW's."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import OneCycleLR

from nested_optim import NestedOptimizer, rules

from .helpers import (
    assert_same_state,
    assert_same_tensors,
    assert_unchanged,
    clone_params,
    make_params,
    random_grads,
    set_grads,
    slow_m3,
    snapshot,
    step_with,
    train,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
QUINTIC = rules.ns_schedule("quintic", 5)


def trained(params, seeds, **options):
    optimizer = slow_m3(params, **options)
    train(optimizer, params, seeds)
    return optimizer


# ---------------------------------------------------------------------------- levels, phases


def test_chunks_count_the_groups_own_updates():
    params = make_params((6, 9), dtype=F64)
    optimizer = slow_m3(params, frequency=3, slow_frequency=2, betas=(0.9, 0.9, 0.0))
    grads = [random_grads(params, seed)[0] for seed in range(6)]
    for t, grad in enumerate(grads, start=1):
        step_with(optimizer, params, [grad])
        if t == 3:
            assert optimizer.state[params[0]]["slow_count"].item() == 1
    state = optimizer.state[params[0]]
    means = torch.stack([torch.stack(grads[:3]).mean(0), torch.stack(grads[3:]).mean(0)])
    torch.testing.assert_close(state["slow_momentum_buffer"], means.mean(0))
    assert (state["step"].item(), state["slow_count"].item()) == (2, 0)


def test_a_parameter_without_a_gradient_keeps_its_chunk():
    first, second = make_params((4, 5), (4, 5))
    optimizer = slow_m3([first, second], slow_frequency=4)
    for seed in range(6):
        grads = random_grads([first, second], seed)
        step_with(optimizer, [first, second], [grads[0], grads[1] if seed % 2 else None])
    counts = [optimizer.state[p]["slow_count"].item() for p in (first, second)]
    assert counts == [2, 3]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("second_moment", [None, "row", "element"])
@pytest.mark.parametrize("done", [1, 5, 8])
def test_resuming_within_a_window_and_a_chunk_is_never_having_stopped(done, second_moment, foreach):
    def build(params):
        matrices = {"params": params[:2], "frequency": 2, "slow_frequency": 3}
        matrices |= {"second_moment": second_moment, "alpha": 0.5}
        rest = {"params": params[2:], "algorithm": "adamw", "frequency": 3}
        return slow_m3([matrices, rest], foreach=foreach)

    params = make_params((6, 9), (9, 6), (5,), (3, 4))
    optimizer = build(params)
    train(optimizer, params, range(done))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = clone_params(params)
    resumed = build(twins)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(done, done + 15):
        for one, its in ((optimizer, params), (resumed, twins)):
            train(one, its, [seed])
        assert_same_tensors(params, twins)
    assert_same_state(optimizer, resumed)


def test_a_slow_momentum_may_begin_and_end_in_mid_run():
    params, twins = (make_params((6, 9)) for _ in range(2))
    optimizer = trained(params, range(3), alpha=0.0, slow_frequency=2)
    assert "slow_momentum_buffer" not in optimizer.state[params[0]]
    optimizer.param_groups[0]["alpha"] = 0.5
    train(optimizer, params, range(3, 5))
    assert optimizer.state[params[0]]["slow_update"].any()
    optimizer.param_groups[0]["alpha"] = 0.0
    before = optimizer.state[params[0]]["slow_update"].clone()
    train(optimizer, params, range(5, 9))
    assert torch.equal(optimizer.state[params[0]]["slow_update"], before)
    del twins


def test_a_step_that_only_makes_state_leaves_chunks_as_they_are():
    [p] = make_params((4, 6))
    optimizer = slow_m3([p], lr=0.0, slow_frequency=3)
    start = p.detach().clone()
    step_with(optimizer, [p], [torch.zeros(4, 6)])
    state = optimizer.state[p]
    assert set(state) == {
        "step", "window_count", "momentum_buffer", "slow_momentum_buffer", "slow_update",
        "slow_count",
    }  # fmt: skip
    assert (state["step"].item(), state["slow_count"].item()) == (1, 0)
    assert torch.equal(p.detach(), start)


def test_counting_on_the_device_is_counting_on_the_host():
    params = make_params((6, 9), (6, 9), (9, 4))
    twins = clone_params(params)
    options = {"slow_frequency": 3, "alpha": 0.5, "frequency": 2, "second_moment": "row"}
    on_host = slow_m3(params, **options)
    on_device = slow_m3(twins, capturable=True, foreach=True, **options)
    loop_params = clone_params(params)
    loop = slow_m3(loop_params, capturable=True, foreach=False, **options)
    for seed in range(20):
        for optimizer, its in ((on_host, params), (on_device, twins), (loop, loop_params)):
            train(optimizer, its, [seed])
        torch.testing.assert_close(twins, params, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loop_params, params, rtol=1e-5, atol=1e-6)
    for optimizer, its in ((on_device, twins), (loop, loop_params)):
        for key in ("step", "window_count", "slow_count"):
            assert optimizer.state[its[0]][key] == on_host.state[params[0]][key], key


def test_a_compiled_training_step_does_what_the_plain_one_does():
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    twin = copy.deepcopy(model)
    inputs = torch.randn(8, 6)
    optimizers = [slow_m3(m.parameters(), slow_frequency=3, frequency=2) for m in (model, twin)]

    def training_step(m, optimizer):
        m(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(training_step, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=2):
        for _ in range(14):
            training_step(model, optimizers[0])
            compiled(twin, optimizers[1])
            torch.testing.assert_close(model.weight, twin.weight)


# ---------------------------------------------------------------------------- with AdamW's groups


def test_groups_of_adamw_are_nested_optimizers():
    matrices, rest = make_params((6, 9), seed=1), make_params((5,), (3, 4), (), seed=2)
    alone, muon_alone = clone_params(rest), clone_params(matrices)
    options = {"lr": 0.01, "weight_decay": 0.1}
    joint = slow_m3(
        [
            {"params": matrices},
            {"params": rest, "algorithm": "adamw", "frequency": 2, "betas": (0.8, 0.9)},
        ],
        **options,
    )
    nested = NestedOptimizer(alone, frequency=2, betas=(0.8, 0.9), **options)
    single = slow_m3(muon_alone, **options)
    for seed in range(7):
        train(joint, [*matrices, *rest], [seed])
        grads = random_grads([*matrices, *rest], seed)
        step_with(single, muon_alone, grads[:1])
        step_with(nested, alone, grads[1:])
        assert_same_tensors(rest, alone)
        assert_same_tensors(matrices, muon_alone)
    for p, q in zip(rest, alone):
        assert joint.state[p].keys() == nested.state[q].keys()


def test_betas_are_a_pair_for_adamw_and_three_for_m3():
    params = make_params((3, 4), (5,))
    groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}]
    optimizer = slow_m3(groups)
    assert [g["betas"] for g in optimizer.param_groups] == [(0.95, 0.95, 0.9), (0.9, 0.999)]
    assert "betas" not in groups[1]
    adamw = slow_m3(params, algorithm="adamw")
    assert adamw.param_groups[0]["betas"] == (0.9, 0.999)
    with pytest.raises(ValueError, match="M3 takes three"):
        slow_m3(params[:1], betas=(0.9, 0.99))
    with pytest.raises(ValueError, match=r"Invalid betas.*Give two"):
        slow_m3([{**groups[1], "betas": (0.9, 0.9, 0.9)}])
    optimizer.param_groups[1]["betas"] = (0.9, 0.9, 0.9)
    set_grads(params, random_grads(params, 0))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"param group 1.*betas of two numbers"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_one_schedule_moves_both_kinds_of_groups():
    params = make_params((3, 4), (5,))
    groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw", "lr": 0.1}]
    optimizer = slow_m3(groups, lr=0.2)
    schedule = OneCycleLR(optimizer, max_lr=[0.2, 0.1], total_steps=10)
    for seed in range(9):
        train(optimizer, params, [seed])
        schedule.step()
    assert [len(g["betas"]) for g in optimizer.param_groups] == [3, 2]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * optimizer.param_groups[1]["lr"])
    assert optimizer.param_groups[0]["betas"][1:] == (0.95, 0.9)


# ---------------------------------------------------------------------------- precision


def test_kahan_summation_keeps_small_updates_of_bfloat16_matrices():
    def distance(kahan_sum):
        p = Parameter(torch.full((8, 8), 1.0, dtype=BF16))
        optimizer = slow_m3([p], lr=1e-4, weight_decay=0.0, kahan_sum=kahan_sum)
        torch.manual_seed(0)
        grad = torch.randn(8, 8).to(BF16)
        for _ in range(400):
            p.grad = grad
            optimizer.step()
        kept = optimizer.state[p].get("kahan_comp", torch.zeros(8, 8))
        return (p.detach().float() + kept.float() - 1).abs().max().item()

    assert distance(False) == 0.0
    exact = Parameter(torch.full((8, 8), 1.0))
    optimizer = slow_m3([exact], lr=1e-4, weight_decay=0.0)
    torch.manual_seed(0)
    grad = torch.randn(8, 8).to(BF16).float()
    for _ in range(400):
        exact.grad = grad
        optimizer.step()
    assert distance(True) == pytest.approx((exact.detach() - 1).abs().max().item(), rel=0.1)


def test_state_dtype_keeps_the_momentum_of_bfloat16_matrices_in_float32():
    params = make_params((6, 9), dtype=BF16)
    optimizer = trained(params, range(3), state_dtype=F32, slow_frequency=2)
    state = optimizer.state[params[0]]
    assert state["momentum_buffer"].dtype == F32
    assert state["slow_momentum_buffer"].dtype == F32
    twins = clone_params(params)
    resumed = slow_m3(twins, state_dtype=F32, slow_frequency=2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(optimizer, resumed)
    # Rounded once: equal to a float32 run of the same values.
    wide = [Parameter(p.detach().float()) for p in params]
    reference = slow_m3(wide, slow_frequency=2)
    reference.load_state_dict(
        {
            **copy.deepcopy(optimizer.state_dict()),
            "param_groups": reference.state_dict()["param_groups"],
        }
    )
    grads = random_grads(params, 9)
    step_with(resumed, twins, grads)
    step_with(reference, wide, [g.float() for g in grads])
    assert_same_tensors(twins, [p.detach().bfloat16() for p in wide])


@pytest.mark.parametrize("name, dtype", [(None, F32), ("bfloat16", BF16), (F64, F64)], ids=str)
def test_the_slow_update_is_kept_as_it_comes_out_of_newton_schulz(name, dtype):
    params = make_params((6, 9))
    optimizer = trained(params, range(2), ns_dtype=name, slow_frequency=2)
    assert optimizer.state[params[0]]["slow_update"].dtype == dtype
    fresh = slow_m3(clone_params(params), ns_dtype=name, slow_frequency=2)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(optimizer, fresh)


# ---------------------------------------------------------------------------- others' checkpoints


def test_a_checkpoint_of_torchs_muon_goes_on_as_it_was():
    params = make_params((6, 9), (9, 9))
    muon = Muon(params, lr=0.02, momentum=0.9, weight_decay=0.2, ns_steps=4)
    train(muon, params, range(4))
    twins = clone_params(params)
    ours = slow_m3(twins, alpha=0.0, ns_dtype=BF16)
    with pytest.warns(UserWarning, match="options replace the optimizer's"):
        ours.load_state_dict(copy.deepcopy(muon.state_dict()))
    group = ours.param_groups[0]
    assert (group["betas"][0], group["adjust_lr"], group["ns_steps"]) == (0.9, "original", 4)
    assert "momentum" not in group and "adjust_lr_fn" not in group
    for seed in range(4, 8):
        train(muon, params, [seed])
        train(ours, twins, [seed])
        assert_same_tensors(params, twins)


def test_a_checkpoint_of_torchs_adamw_loads_into_groups_of_adamw():
    params = make_params((5,), (3, 4))
    adamw = AdamW(params, lr=0.02)
    train(adamw, params, range(3))
    twins = clone_params(params)
    ours = slow_m3([{"params": twins, "algorithm": "adamw"}], lr=0.02, weight_decay=1e-2)
    ours.load_state_dict(copy.deepcopy(adamw.state_dict()))
    for seed in range(3, 6):
        train(adamw, params, [seed])
        train(ours, twins, [seed])
        assert_same_tensors(params, twins)


def test_a_checkpoint_whose_state_has_other_shapes_is_refused():
    params = make_params((6, 9))
    saved = trained(params, range(2), second_moment="row", slow_frequency=2).state_dict()
    other = slow_m3(make_params((6, 8)), second_moment="row")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"'momentum_buffer'.*\(6, 9\).*needs \(6, 8\)"):
        other.load_state_dict(copy.deepcopy(saved))
    assert_unchanged(other, before)
    broken = copy.deepcopy(saved)
    broken["state"][0]["second_moment"] = torch.zeros(6, 9)
    same = slow_m3(clone_params(params), second_moment="row")
    with pytest.raises(ValueError, match=r"'second_moment'.*\(6, 9\).*needs \(6, 1\)"):
        same.load_state_dict(broken)
