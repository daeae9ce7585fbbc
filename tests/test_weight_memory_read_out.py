"""Reading out a weight memory: evaluate, export, and come back to the live weights."""

import pytest
import torch
from torch import nn

from nested_optim import DeepNestedOptimizer, NestedOptimizer, WeightMemory
from nested_optim.memory_levels import PRESETS

from .helpers import assert_same_tensors, clone_params, make_params, random_grads, train


def trained(frequencies=(2, 4), write=0.3, pull=0.2, **options):
    params = make_params((7, 5), (11,), ())
    optimizer = torch.optim.AdamW(params, lr=0.1)
    memory = WeightMemory(optimizer, frequencies, write, pull, **options)
    train(optimizer, params, range(5))
    return params, optimizer, memory


@pytest.mark.parametrize("level", [-1, 0, 1, 2, -2, "mean", (0.2, 0.5, 0.3)], ids=str)
def test_a_read_out_is_in_the_parameters_and_leaves_them(level):
    params, _, memory = trained()
    live = clone_params(params)
    levels = [[t.detach().clone() for t in memory.weights(k)] for k in range(3)]
    assert not torch.equal(levels[0][0], levels[1][0])
    assert not torch.equal(levels[1][0], levels[2][0])
    shares = {"mean": (1 / 3, 1 / 3, 1 / 3)}.get(level, level)
    if isinstance(shares, int):
        want = levels[shares]
    else:
        want = [sum(s * t for s, t in zip(shares, ts)) for ts in zip(*levels)]
    with memory.read_out(level) as reading:
        assert reading is memory
        torch.testing.assert_close([p.detach() for p in params], want, rtol=1e-6, atol=1e-6)
        if isinstance(level, int):
            assert_same_tensors(params, want)
    assert_same_tensors(params, live)


def test_the_live_weights_come_back_if_the_body_raises():
    params, optimizer, memory = trained()
    live = clone_params(params)
    with pytest.raises(ZeroDivisionError), memory.read_out():
        raise ZeroDivisionError
    assert_same_tensors(params, live)
    train(optimizer, params, range(2))  # and training goes on


@pytest.mark.parametrize("cls", [torch.optim.AdamW, NestedOptimizer])
def test_training_and_checkpoints_are_refused_inside(cls):
    params = make_params((3,))
    optimizer = cls(params, lr=0.1)
    memory = WeightMemory(optimizer, (2,))
    train(optimizer, params, range(3))
    saved = optimizer.state_dict()
    live = clone_params(params)
    with memory.read_out():
        params[0].grad = random_grads(params, 0)[0]
        for action in (
            optimizer.step,
            optimizer.state_dict,
            lambda: optimizer.load_state_dict(saved),
            lambda: optimizer.add_param_group({"params": make_params((2,))}),
            memory.detach,
            memory.read_out().__enter__,
        ):
            with pytest.raises(RuntimeError, match=r"inside read_out\(\)"):
                action()
    assert_same_tensors(params, live)
    optimizer.add_param_group({"params": make_params((2,))})


def test_what_else_would_move_the_weights_is_refused_inside():
    """Windows that are flushed and meta updates, for which there are no hooks."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)

    def loss_fn(model, batch):
        return model(batch).square().mean()

    memory = {"frequencies": (1,), "write": 0.2, "pull": 0.1}
    optimizer = DeepNestedOptimizer(
        model, lr=0.1, mode="explicit", loss_fn=loss_fn, frequency=4, memory=memory
    )
    optimizer.flush = real = optimizer.flush  # somebody has wrapped it
    batch = torch.randn(8, 4)
    for _ in range(6):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    with optimizer.weight_memory.read_out():
        for action in (optimizer.flush, lambda: optimizer.meta_update(batch, [batch])):
            with pytest.raises(RuntimeError, match=r"inside read_out\(\)"):
                action()
    assert optimizer.flush is real
    optimizer.meta_update(batch, [batch])
    assert optimizer.flush() > 0


def test_a_run_that_was_read_out_is_the_run_that_was_not():
    params, optimizer, memory = trained()
    others, other, _ = trained()
    with memory.read_out():
        (params[0].sum() ** 2).backward()  # as an evaluation that wants gradients might
    for opt, ps in ((optimizer, params), (other, others)):
        train(opt, ps, range(5, 9))
    assert_same_tensors(params, others)


@pytest.mark.parametrize(
    "level, message",
    [
        (3, r"no level 3 in param group 0.*2 slow"),
        (-4, "no level -4"),
        ("slow", "integer, 'mean'"),
        (True, "integer, 'mean'"),
        (1.5, "integer, 'mean'"),
        ((0.5, 0.5), "2 weights were given for the 3 levels"),
        ((0.5, 0.5, 0.5), "sum to 1"),
        ((float("nan"), 0.5, 0.5), "sum to 1"),
        (["a", 1.0], "must be numbers"),
        ((None, 0.5, 0.5), "must be numbers"),
    ],
    ids=str,
)
def test_a_level_that_is_not_there_is_refused(level, message):
    params, _, memory = trained()
    live = clone_params(params)
    with pytest.raises(ValueError, match=message), memory.read_out(level):
        pass
    assert_same_tensors(params, live)


def test_there_is_nothing_to_read_after_detaching():
    params, _, memory = trained()
    memory.detach()
    memory.detach()
    for action in (
        lambda: memory.weights(),
        lambda: memory.weights(1),
        lambda: memory.read_out().__enter__(),
        lambda: memory.read_out(0).__enter__(),
        lambda: memory.model_state_dict(nn.Linear(2, 2)),
    ):
        with pytest.raises(RuntimeError, match="was detached"):
            action()
    assert memory.weights(0) == params


def test_groups_without_copies_are_read_live():
    params = make_params((3,), (4,))
    groups = [{"params": params[:1], "memory_frequencies": ()}, {"params": params[1:]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    memory = WeightMemory(optimizer, (5,))
    before = clone_params(params)
    train(optimizer, params, range(2))
    live = params[0].detach().clone()
    with memory.read_out():
        assert_same_tensors(params, [live, before[1]])
    with memory.read_out("mean"):
        assert_same_tensors(params[:1], [live])


def test_a_memory_before_its_first_step_reads_the_live_weights():
    params = make_params((3,))
    live = clone_params(params)
    memory = WeightMemory(torch.optim.SGD(params, lr=0.1))
    with memory.read_out():
        assert_same_tensors(params, live)
    assert_same_tensors(memory.weights(), live)


def test_a_read_out_is_exported_as_a_plain_state_dict():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(torch.bfloat16))
    model[1].bias = nn.Parameter(model[1].bias.detach().to(torch.bfloat16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = WeightMemory(optimizer, (3,))
    params = list(model.parameters())
    train(optimizer, params, range(2))
    live = clone_params(params)
    exported = memory.model_state_dict(model)
    assert list(exported) == list(model.state_dict())
    for value, slow, p in zip(exported.values(), memory.weights(), params):
        assert torch.equal(value, slow.to(p.dtype)) and value.dtype == p.dtype
    train(optimizer, params, range(2, 8))
    plain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).bfloat16())
    plain.load_state_dict(exported)
    assert not torch.equal(plain[0].weight, live[0])


def batchnorm_run(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    memory = WeightMemory(optimizer, (2, 4), 0.5, 0.3, buffers_from=model, **options)
    history = []
    for _ in range(9):
        optimizer.zero_grad()
        if not history:
            history.append([model[1].running_mean.clone(), model[1].running_var.clone()])
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        history.append([model[1].running_mean.clone(), model[1].running_var.clone()])
    return model, memory, history


def test_buffers_are_written_but_never_pulled():
    model, memory, history = batchnorm_run()
    first = [b.clone() for b in history[1]]  # as they stood when the first step came
    slow = [b.clone() for b in first]
    for step in range(1, 10):
        if step % 2 == 0:
            first = [s + 0.5 * (b - s) for s, b in zip(first, history[step])]
        if step % 4 == 0:
            slow = [v + 0.5 * (u - v) for v, u in zip(slow, first)]
    live = [b.clone() for b in model[1].buffers()]
    assert_same_tensors(live[:2], history[-1])
    for level, want in ((1, first), (2, slow), (0, history[-1])):
        with memory.read_out(level):
            torch.testing.assert_close([model[1].running_mean, model[1].running_var], want)
            assert model[1].num_batches_tracked == 9
    assert_same_tensors(list(model[1].buffers()), live)


def test_statistics_can_be_computed_anew_for_a_read_out():
    model, memory, _ = batchnorm_run()
    live = [b.clone() for b in model.buffers()]
    inputs = [torch.randn(16, 4) for _ in range(4)]
    model.eval()
    with memory.read_out(-1, update_bn=inputs):
        with torch.no_grad():
            hidden = torch.cat([model[0](x) for x in inputs])
        torch.testing.assert_close(model[1].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
        assert not model.training
    assert_same_tensors(list(model.buffers()), live)


@pytest.mark.parametrize("level", [None, 0, 1, "mean", (0.5, 0.25, 0.25)], ids=str)
def test_averages_of_buffers_are_given_by_name(level):
    model, memory, _ = batchnorm_run()
    given = memory.average_buffers() if level is None else memory.average_buffers(level)
    assert list(given) == ["1.running_mean", "1.running_var"]
    with memory.read_out(level):
        assert_same_tensors(list(given.values()), [model[1].running_mean, model[1].running_var])
    given["1.running_mean"].zero_()
    assert memory.average_buffers()["1.running_mean"].any()


def test_averages_of_buffers_need_the_model_and_begin_live():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = WeightMemory(optimizer, (2,), buffers_from=model)
    assert torch.equal(memory.average_buffers(1)["1.running_var"], torch.ones(3))
    with pytest.raises(ValueError, match="no level 4"):
        memory.average_buffers(4)
    with memory.read_out(update_bn=[torch.randn(8, 4)]):  # before there is anything to swap
        assert model[1].running_mean.any()
    assert not model[1].running_mean.any()
    memory.detach()
    with pytest.raises(ValueError, match="buffers_from=model"):
        WeightMemory(optimizer).average_buffers()


@pytest.mark.parametrize("averaged", [False, True])
def test_a_read_out_is_exported_with_statistics_of_its_own(averaged):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    memory = WeightMemory(optimizer, (2,), buffers_from=model if averaged else None)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = [torch.randn(16, 4) for _ in range(3)]
    exported = memory.model_state_dict(model, 1, update_bn=iter(inputs))
    hidden = torch.cat([x @ exported["0.weight"].T + exported["0.bias"] for x in inputs])
    torch.testing.assert_close(exported["1.running_mean"], hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert exported["1.num_batches_tracked"] == 3
    assert torch.equal(exported["0.weight"], memory.weights(1)[0])
    assert_same_tensors(list(model.state_dict().values()), list(before.values()))


def test_averages_of_buffers_go_by_the_groups_settings():
    """Also when these change: a new level begins at the live buffers."""
    model, memory, _ = batchnorm_run()
    group = memory.optimizer.param_groups[0]

    def step():
        memory.optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        memory.optimizer.step()

    kept = group["memory_buffers"][0].clone()
    group.update(memory_frequencies=(100, 200, 300), memory_write=0.5, memory_pull=0.1)
    step()
    live = torch.cat([model[1].running_mean, model[1].running_var])
    rows = group["memory_buffers"]
    assert rows.shape == (3, 6)
    assert_same_tensors([rows[0], rows[2]], [kept, live])
    group.update(memory_frequencies=(1,), memory_write=0.5, memory_pull=0.1)
    step()
    live = torch.cat([model[1].running_mean, model[1].running_var])
    torch.testing.assert_close(group["memory_buffers"], (kept + 0.5 * (live - kept))[None])
    with memory.read_out(1):
        torch.testing.assert_close(model[1].running_mean, group["memory_buffers"][0, :3])
    group["memory_frequencies"] = ()
    step()
    assert "memory_buffers" not in group
    before = model[1].running_mean.clone()
    with memory.read_out():
        assert torch.equal(model[1].running_mean, before)


def test_a_loader_that_fails_leaves_the_model_as_it_was():
    model, memory, _ = batchnorm_run()
    model.eval()
    model[2].train()  # each module has its own mode
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loader():
        yield torch.randn(8, 4)
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"), memory.read_out(update_bn=loader()):
        pass
    assert [m.training for m in model.modules()] == [False, False, False, True]
    assert model[1].momentum == 0.1
    assert_same_tensors(list(model.state_dict().values()), list(before.values()))
    with memory.read_out(update_bn=[torch.randn(8, 4)]):
        assert [m.training for m in model.modules()] == [False, False, False, True]


def test_statistics_need_the_model():
    _, _, memory = trained()
    with pytest.raises(ValueError, match="buffers_from=model"), memory.read_out(update_bn=[]):
        pass


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_settings_and_a_level(name):
    params = make_params((3,))
    optimizer = torch.optim.SGD(params, lr=0.1)
    memory = WeightMemory(optimizer, preset=name)
    group, preset = optimizer.param_groups[0], PRESETS[name]
    assert group["memory_frequencies"] == preset.frequencies
    assert (group["memory_write"], group["memory_pull"]) == (preset.write, preset.pull)
    train(optimizer, params, range(3))
    levels = [[t.clone() for t in memory.weights(level)] for level in range(3)]
    if preset.read == "mean":
        want = [sum(of_param) / 3 for of_param in zip(*levels)]
    else:
        want = levels[preset.read]
    with memory.read_out():
        torch.testing.assert_close(params, want, rtol=0, atol=1e-6, check_stride=False)
        assert any(not torch.equal(p, live) for p, live in zip(params, levels[0]))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("frequencies", [(1,), (1, 2, 3)])
def test_presets_read_out_any_number_of_levels(name, frequencies):
    params = make_params((3,))
    optimizer = torch.optim.SGD(params, lr=0.1)
    memory = WeightMemory(optimizer, frequencies, 0.2, 0.1, preset=name)
    train(optimizer, params, range(4))
    levels = [memory.weights(k)[0].detach().clone() for k in range(len(frequencies) + 1)]
    want = sum(levels) / len(levels) if PRESETS[name].read == "mean" else levels[-1]
    with memory.read_out():
        torch.testing.assert_close(params[0].detach(), want)


def test_what_is_given_comes_before_a_preset():
    optimizer = torch.optim.SGD(make_params((3,)), lr=0.1)
    WeightMemory(optimizer, frequencies=(3,), write=0.2, pull=0.1, preset="continual")
    assert optimizer.param_groups[0]["memory_frequencies"] == (3,)
    assert optimizer.param_groups[0]["memory_pull"] == (0.1,)
