"""A group of frequency f is AdamW stepped once on its window's gradient."""

import itertools

import pytest
import torch
from torch.optim import Adam, AdamW

from nested_optim import NestedOptimizer

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


def window_gradients(params, seeds, window):
    """The sum, left to right in float32 or wider, or the mean of the gradients of these seeds."""
    totals = None
    for seed in seeds:
        grads = [
            g.to(torch.promote_types(g.dtype, torch.float32)) for g in random_grads(params, seed)
        ]
        totals = grads if totals is None else [t + g for t, g in zip(totals, grads)]
    n = len(seeds) if window == "mean" else 1
    # Not even by 1: torch 2.6 rounds when it divides a complex tensor.
    means = [t / n for t in totals] if n > 1 else totals
    return [t.to(p.dtype) for t, p in zip(means, params)]


@pytest.mark.parametrize("frequency", [1, 2, 3, 5])
@pytest.mark.parametrize("window", ["mean", "sum"])
@pytest.mark.parametrize(
    "flags",
    [
        {"foreach": False},
        {"foreach": True},
        {"foreach": None},
        {"foreach": False, "maximize": True, "weight_decay": 0.1},
        {"foreach": True, "maximize": True, "amsgrad": True},
        {"fused": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_a_window_equals_adamw_stepped_once_on_its_gradient(frequency, window, flags, dtype):
    if flags.get("fused") and dtype.is_complex:
        flags = {"foreach": False}
    reference_params = make_params(*SHAPES, dtype=dtype)
    params = clone_params(reference_params)
    same_path = {"foreach": False} if flags.get("foreach", 0) is None else flags
    reference = AdamW(reference_params, lr=0.01, **same_path)
    optimizer = NestedOptimizer(params, lr=0.01, frequency=frequency, window=window, **flags)
    for update in range(4):
        seeds = range(update * frequency, (update + 1) * frequency)
        for seed in seeds:
            assert_same_tensors(params, reference_params)
            step_with(optimizer, params, random_grads(params, seed))
        step_with(reference, reference_params, window_gradients(params, seeds, window))
    assert_same_tensors(params, reference_params)
    for p, q in zip(params, reference_params):
        for key, expected in reference.state[q].items():
            assert torch.equal(optimizer.state[p][key], expected), key
            assert optimizer.state[p][key].dtype == expected.dtype, key


@pytest.mark.parametrize("foreach", [False, True])
def test_the_coupled_form_is_adam_on_the_window(foreach):
    reference_params = make_params(*SHAPES)
    params = clone_params(reference_params)
    options = {"lr": 0.01, "weight_decay": 0.1, "foreach": foreach}
    reference = Adam(reference_params, **options)
    optimizer = NestedOptimizer(params, frequency=3, decoupled=False, **options)
    for update in range(3):
        seeds = range(3 * update, 3 * update + 3)
        train(optimizer, params, seeds)
        step_with(reference, reference_params, window_gradients(params, seeds, "mean"))
    assert_same_tensors(params, reference_params)


def test_updates_happen_at_f_2f_3f():
    (param,) = params = make_params((3,))
    optimizer = NestedOptimizer(params, frequency=3)
    moved = []
    for step in range(1, 10):
        before = param.detach().clone()
        train(optimizer, params, [step])
        if not torch.equal(before, param):
            moved.append(step)
    assert moved == [3, 6, 9]


def test_boundary_gradient_is_counted():
    (param,) = params = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))]
    optimizer = NestedOptimizer(params, frequency=2, betas=(0.0, 0.5), weight_decay=0.0)
    for gradient in (1.0, 100.0):
        step_with(optimizer, params, [torch.tensor([gradient], dtype=torch.float64)])
    assert optimizer.state[param]["exp_avg"].item() == 50.5


@pytest.mark.parametrize("window, expected", [("mean", 50.5), ("sum", 101.0)])
def test_the_mean_is_the_mean_and_the_sum_is_the_sum(window, expected):
    (param,) = params = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = NestedOptimizer(params, frequency=2, betas=(0.0, 0.5), window=window)
    for gradient in (1.0, 100.0):
        step_with(optimizer, params, [torch.tensor([gradient])])
    assert optimizer.state[param]["exp_avg"].item() == expected


def test_a_missing_gradient_on_the_boundary_keeps_the_window_open():
    (param,) = params = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = NestedOptimizer(params, frequency=2, betas=(0.0, 0.5))
    for gradient in (1.0, None, 100.0, 7.0):
        step_with(optimizer, params, [None if gradient is None else torch.tensor([gradient])])
    state = optimizer.state[param]
    assert state["exp_avg"].item() == 50.5  # of 1 and 100: the window that None left open
    assert state["step"].item() == 1
    assert state["window_count"].item() == 1 and state["window_sum"].item() == 7.0


def test_parameters_of_one_group_keep_phases_of_their_own():
    params = make_params((2,), (2,))
    optimizer = NestedOptimizer(params, frequency=2)
    grads = random_grads(params, 0)
    step_with(optimizer, params, [grads[0], None])
    step_with(optimizer, params, grads)
    counts = [optimizer.state[p]["window_count"].item() for p in params]
    updates = [optimizer.state[p]["step"].item() for p in params]
    assert (counts, updates) == ([0, 1], [1, 0])


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("change_after", [1, 2, 3])
@pytest.mark.parametrize("old, new", [(4, 2), (4, 1), (4, 6), (1, 3)])
def test_editing_frequency_neither_loses_nor_repeats_a_gradient(foreach, change_after, old, new):
    (param,) = params = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))]
    optimizer = NestedOptimizer(params, frequency=old, betas=(0.0, 0.5), foreach=foreach)
    frequency, window, windows, seen = old, [], [], []
    for i in range(12):
        if i == change_after:
            optimizer.param_groups[0]["frequency"] = frequency = new
        gradient = float(2**i)  # a sum of these tells which gradients are in it
        step_with(optimizer, params, [torch.tensor([gradient], dtype=torch.float64)])
        window.append(gradient)
        if len(window) >= frequency:
            windows.append(sum(window) / len(window))
            window = []
            seen.append(optimizer.state[param]["exp_avg"].item())
    assert seen == windows
    assert optimizer.state[param]["step"].item() == len(windows)


def test_flush_applies_partial_windows_and_counts_the_parameters_it_updated():
    params = make_params((2,), (3,), (4,))
    reference_params = clone_params(params)
    optimizer = NestedOptimizer(
        [{"params": params[:2], "frequency": 3}, {"params": params[2:], "frequency": 1}], lr=0.1
    )
    train(optimizer, params, [0, 1])
    assert optimizer.flush() == 2
    assert optimizer.flush() == 0
    reference = AdamW(reference_params[:2], lr=0.1)
    step_with(reference, reference_params, window_gradients(params, [0, 1], "mean"))
    assert_same_tensors(params[:2], reference_params[:2])
    assert [optimizer.state[p]["window_count"].item() for p in params] == [0, 0, 0]
    # The window after a flush is a full one.
    train(optimizer, params, [2, 3])
    assert [optimizer.state[p]["step"].item() for p in params] == [1, 1, 4]


def test_the_window_does_not_depend_on_when_gradients_are_cleared():
    runs = []
    for clear_to_none in (True, False):
        params = make_params(*SHAPES)
        optimizer = NestedOptimizer(params, frequency=3)
        for seed in range(7):
            set_grads(params, random_grads(params, seed))
            optimizer.step()
            optimizer.zero_grad(set_to_none=clear_to_none)
        runs.append((optimizer, params))
    assert_same_tensors(runs[0][1], runs[1][1])
    assert_same_state(runs[0][0], runs[1][0])


@pytest.mark.parametrize(
    "flags", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}], ids=str
)
def test_gradients_are_read_and_never_written(flags):
    params = make_params(*SHAPES)
    options = {"frequency": 2, "maximize": True, "decoupled": False, "weight_decay": 0.1, **flags}
    optimizer = NestedOptimizer(
        [{"params": params[:1]}, {"params": params[1:], "frequency": 1}], **options
    )
    for seed in range(4):
        grads = random_grads(params, seed)
        set_grads(params, grads)
        kept = [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, kept))
        assert_same_tensors(kept, grads)


def test_weight_decay_acts_at_boundaries_only():
    for decoupled in (True, False):
        (param,) = params = [torch.nn.Parameter(torch.ones(1))]
        optimizer = NestedOptimizer(
            params, lr=0.1, weight_decay=0.5, frequency=4, decoupled=decoupled
        )
        values = []
        for _ in range(8):
            step_with(optimizer, params, [torch.zeros(1)])
            values.append(param.item())
        assert values[:3] == [1.0] * 3
        assert values[3] == values[4] == values[6] < 1.0
        assert values[7] < values[3]
        if decoupled:
            assert values[7] == pytest.approx((1 - 0.1 * 0.5) ** 2)


def test_a_slow_group_is_as_frozen_between_boundaries_as_no_group_at_all():
    params = make_params((4,), (4,))
    optimizer = NestedOptimizer(
        [{"params": params[:1]}, {"params": params[1:], "frequency": 5}], weight_decay=0.1
    )
    train(optimizer, params, range(5))
    before = params[1].detach().clone()
    moments = {k: v.clone() for k, v in optimizer.state[params[1]].items() if "exp" in k}
    train(optimizer, params, range(5, 9))
    assert torch.equal(params[1], before)
    for key, value in moments.items():
        assert torch.equal(optimizer.state[params[1]][key], value)


@pytest.mark.parametrize("flags", [{"foreach": False}, {"foreach": True}, {}], ids=str)
def test_windows_that_close_on_the_device_equal_those_that_the_host_closes(flags):
    runs = []
    for capturable in (False, True):
        params = make_params(*SHAPES)
        optimizer = NestedOptimizer(
            [{"params": params[:1], "frequency": 3}, {"params": params[1:], "frequency": 2}],
            capturable=capturable,
            amsgrad=True,
            window="sum",
            **flags,
        )
        train(optimizer, params, range(5))
        optimizer.flush()
        train(optimizer, params, range(5, 11))
        runs.append((optimizer, params))
    (host, host_params), (device, device_params) = runs
    for p, q in zip(host_params, device_params):
        # capturable divides in another order, as torch's does
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for key in ("step", "window_count"):
            assert host.state[p][key] == device.state[q][key]
        assert torch.equal(host.state[p]["exp_avg"], device.state[q]["exp_avg"])


def test_levels_of_one_model_update_independently():
    params = make_params(*[(3,)] * 3)
    frequencies = (1, 4, 10)
    optimizer = NestedOptimizer(
        [{"params": [p], "frequency": f} for p, f in zip(params, frequencies)]
    )
    train(optimizer, params, range(20))
    assert [optimizer.state[p]["step"].item() for p in params] == [20, 5, 2]
    for i, frequency in enumerate(frequencies):
        alone = make_params(*[(3,)] * 3)
        train(NestedOptimizer([alone[i]], frequency=frequency), alone, range(20))
        assert torch.equal(alone[i], params[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_windows_of_narrow_gradients_are_kept_in_float32(dtype):
    (param,) = params = [torch.nn.Parameter(torch.zeros(1, dtype=dtype))]
    optimizer = NestedOptimizer(params, frequency=300, window="mean", betas=(0.0, 0.5))
    for _ in range(300):  # 1 + 1 + ... stops at 256 in bfloat16
        step_with(optimizer, params, [torch.ones(1, dtype=dtype)])
    assert optimizer.state[param]["window_sum"].dtype == torch.float32
    assert optimizer.state[param]["exp_avg"].item() == 1.0


@pytest.mark.parametrize("foreach", [False, True])
def test_float32_state_of_bfloat16_parameters_is_adamw_in_float32_rounded_once(foreach):
    params = make_params(*SHAPES, dtype=torch.bfloat16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer = NestedOptimizer(
        params, lr=0.01, frequency=2, state_dtype=torch.float32, foreach=foreach
    )
    reference = AdamW(wide, lr=0.01, foreach=foreach)
    for update in range(4):
        totals = [torch.zeros_like(p) for p in wide]
        for seed in (2 * update, 2 * update + 1):
            grads = random_grads(params, seed)
            step_with(optimizer, params, grads)
            totals = [t + g.float() for t, g in zip(totals, grads)]
        step_with(reference, wide, [t / 2 for t in totals])
        with torch.no_grad():
            for p in wide:
                p.copy_(p.bfloat16())
    assert_same_tensors([p.float() for p in params], wide)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32


def test_narrow_moments_are_possible_and_rounded_after_each_update():
    (param,) = params = make_params((50,))
    optimizer = NestedOptimizer(params, state_dtype="bfloat16")
    wide = make_params((50,))
    reference = NestedOptimizer(wide)
    train(optimizer, params, [0])
    train(reference, wide, [0])
    state = optimizer.state[param]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(state["exp_avg"], reference.state[wide[0]]["exp_avg"].bfloat16())
    assert torch.equal(param, wide[0])  # the first update saw the moments before their rounding


@pytest.mark.parametrize("optimizer_frequency", [1, 3])
def test_lr_zero_moves_nothing(optimizer_frequency):
    for flags in ({"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True},
                  {"capturable": True, "foreach": False}, {"amsgrad": True}):  # fmt: skip
        params = make_params(*SHAPES)
        before = clone_params(params)
        optimizer = NestedOptimizer(
            params, lr=0.0, weight_decay=0.5, frequency=optimizer_frequency, **flags
        )
        for seed, factor in itertools.product(range(3), (0.0, 1.0)):
            step_with(optimizer, params, [g * factor for g in random_grads(params, seed)])
        assert_same_tensors(params, before)


def test_every_path_descends_on_a_parabola():
    for frequency, flags in itertools.product(
        (1, 3), ({"foreach": False}, {"foreach": True}, {"fused": True}, {"decoupled": False})
    ):
        param = torch.nn.Parameter(torch.tensor([4.0]))
        optimizer = NestedOptimizer([param], lr=0.1, weight_decay=0.0, frequency=frequency, **flags)
        for _ in range(60 * frequency):
            optimizer.zero_grad()
            param.square().sum().backward()
            optimizer.step()
        assert abs(param.item()) < 0.5
