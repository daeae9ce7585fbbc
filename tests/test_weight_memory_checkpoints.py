"""A weight memory rides in the optimizer's checkpoints, whoever saves them."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from nested_optim import NestedOptimizer, WeightMemory

from .helpers import (
    assert_same_state,
    assert_same_tensors,
    clone_params,
    make_params,
    random_grads,
    step_with,
    train,
)

SHAPES = (7, 5), (11,), ()

OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "NestedOptimizer": lambda params: NestedOptimizer(params, lr=0.1, frequency=3),
}


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("memory_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resuming_is_never_having_stopped(name, dtype, memory_dtype, stop):
    """Also with float32 copies of bfloat16 weights, which torch's loading would round."""
    if dtype.is_complex and memory_dtype:
        pytest.skip("there is no complex bfloat16")
    params = make_params(*SHAPES, dtype=dtype)
    optimizer = OPTIMIZERS[name](params)
    options = {"frequencies": (2, 4), "write": (0.3, 0.4), "pull": 0.2, "dtype": memory_dtype}
    WeightMemory(optimizer, **options)
    train(optimizer, params, range(stop))
    saved = through_a_file(optimizer.state_dict())
    resumed_params = clone_params(params)
    train(optimizer, params, range(stop, 10))

    resumed = OPTIMIZERS[name](resumed_params)
    WeightMemory(resumed, **options)
    resumed.load_state_dict(saved)
    train(resumed, resumed_params, range(stop, 10))
    assert_same_tensors(resumed_params, params)
    assert_same_state(resumed, optimizer)


def test_a_checkpoint_can_be_loaded_twice():
    params = make_params(*SHAPES)
    optimizer = torch.optim.AdamW(params, lr=0.1)
    memory = WeightMemory(optimizer, (1,))
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    weights = clone_params(params)
    results = []
    for _ in range(2):
        with torch.no_grad():
            for p, w in zip(params, weights):
                p.copy_(w)
        optimizer.load_state_dict(copy.deepcopy(kept))
        train(optimizer, params, range(2, 5))
        results.append([t.clone() for t in (*params, *memory.weights(1))])
    assert_same_tensors(*results)


def test_loading_shares_no_memory_that_moves():
    """Exchanges after loading leave the state_dict that was loaded as it was."""
    params = make_params(*SHAPES)
    optimizer = torch.optim.SGD(params, lr=0.1)
    WeightMemory(optimizer, (1,))
    train(optimizer, params, range(2))
    saved = through_a_file(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    train(optimizer, params, range(2))
    for key, entries in kept["state"].items():
        for name, value in entries.items():
            assert torch.equal(saved["state"][key][name], value), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_without_a_memory_starts_one(name):
    params = make_params(*SHAPES)
    bare = OPTIMIZERS[name](params)
    train(bare, params, range(3))
    saved = through_a_file(bare.state_dict())
    optimizer = OPTIMIZERS[name](params)
    memory = WeightMemory(optimizer, (2,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["memory_frequencies"] == (2,)
    before = clone_params(params)
    train(optimizer, params, range(3, 4))
    assert_same_tensors(memory.weights(1), before)


def test_the_bare_optimizer_goes_on_from_a_checkpoint_with_a_memory():
    params = make_params(*SHAPES)
    twins = clone_params(params)
    optimizer = torch.optim.AdamW(params, lr=0.1)
    WeightMemory(optimizer, (1000,))
    train(optimizer, params, range(3))
    bare = torch.optim.AdamW(twins, lr=0.1)
    bare.load_state_dict(through_a_file(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(twins, params):
            p.copy_(q)
    for opt, ps in ((optimizer, params), (bare, twins)):
        train(opt, ps, range(3, 6))
    assert_same_tensors(params, twins)


def test_own_settings_of_groups_survive_a_foreign_checkpoint():
    """torch replaces a group by the saved one, whatever else it held."""
    params = make_params((3,), (4,))
    groups = [{"params": params[:1], "memory_frequencies": (7,)}, {"params": params[1:]}]
    bare = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    train(bare, params, range(1))
    optimizer = torch.optim.AdamW(groups)
    WeightMemory(optimizer)
    optimizer.load_state_dict(bare.state_dict())
    assert [g["memory_frequencies"] for g in optimizer.param_groups] == [(7,), (10, 50)]


def test_the_checkpoints_settings_win_with_one_warning():
    params = make_params((3,))
    optimizer = torch.optim.AdamW(params)
    WeightMemory(optimizer, (2,), 0.1, 0.2)
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    other = torch.optim.AdamW(clone_params(params))
    WeightMemory(other, (5, 10), 0.1, 0.2)
    with pytest.warns(UserWarning, match="memory_frequencies") as caught:
        other.load_state_dict(saved)
    assert len(caught) == 1
    assert other.param_groups[0]["memory_frequencies"] == (2,)


@pytest.mark.parametrize("what", ["shape", "count", "settings"])
def test_a_broken_checkpoint_is_refused_before_anything_changes(what):
    params = make_params((3,), (4,))
    optimizer = torch.optim.AdamW(params, lr=0.1)
    WeightMemory(optimizer, (2,))
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    if what == "shape":
        saved["state"][1]["memory_1"] = torch.zeros(9)
    elif what == "count":
        saved["state"][1]["memory_count"] = torch.tensor(7)
    else:
        saved["param_groups"][0]["memory_pull"] = (0.9,)
    twin = torch.optim.AdamW(params, lr=0.1)
    memory = WeightMemory(twin, (2,))
    train(twin, params, range(1))
    before = copy.deepcopy(twin.state_dict())
    message = {"shape": "'memory_1'.*shape", "count": "disagree", "settings": "exceeds 1"}[what]
    with pytest.raises(ValueError, match=message):
        twin.load_state_dict(saved)
    after = twin.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entries in before["state"].items():
        for name, value in entries.items():
            assert torch.equal(after["state"][key][name], value)
    assert memory.weights(1)[0] is twin.state[params[0]]["memory_1"]


def loaded_too_early(dtype, steps, memory_dtype=None):
    """The optimizer and its parameters, its state loaded before there is a memory; and its twin."""
    params = make_params(*SHAPES, dtype=dtype)
    optimizer = torch.optim.AdamW(params, lr=0.1)
    WeightMemory(optimizer, (2, 5), 0.3, 0.2, dtype=memory_dtype)
    train(optimizer, params, range(steps))
    late_params = clone_params(params)
    late = torch.optim.AdamW(late_params, lr=0.1)
    late.load_state_dict(through_a_file(optimizer.state_dict()))
    return late, late_params, optimizer, params


@pytest.mark.parametrize(
    "dtype, memory_dtype",
    [
        (torch.float32, None),
        (torch.float64, "float32"),
        (torch.float32, "bfloat16"),
        (torch.bfloat16, "bfloat16"),
    ],
    ids=str,
)
def test_attaching_after_loading_takes_over_what_is_exact(dtype, memory_dtype):
    late, late_params, optimizer, params = loaded_too_early(dtype, 3, memory_dtype)
    assert late.state[late_params[0]]["memory_count"].dtype == dtype  # as torch has cast it
    WeightMemory(late)
    for opt, ps in ((optimizer, params), (late, late_params)):
        train(opt, ps, range(3, 9))
    assert_same_tensors(params, late_params)
    assert_same_state(optimizer, late)


@pytest.mark.parametrize(
    "dtype, memory_dtype, count, message",
    [
        (torch.bfloat16, None, None, "'memory_1'.*bfloat16, rounded from torch.float32"),
        (torch.float32, "float64", None, "'memory_1'.*float32, rounded from torch.float64"),
        (torch.bfloat16, "bfloat16", 256, "'memory_count'.*256 in torch.bfloat16"),
    ],
    ids=str,
)
def test_attaching_after_loading_is_refused_where_something_was_lost(
    dtype, memory_dtype, count, message
):
    late, late_params, *_ = loaded_too_early(dtype, 3, memory_dtype)
    if count is not None:
        for p in late_params:
            late.state[p]["memory_count"].fill_(count)
    before = copy.deepcopy(late.state_dict())
    with pytest.raises(ValueError, match=message + ".*Attach the memory first"):
        WeightMemory(late)
    assert before["param_groups"] == late.state_dict()["param_groups"]


def test_attaching_to_counts_that_differ_is_refused():
    late, late_params, *_ = loaded_too_early(torch.float32, 3)
    late.state[late_params[1]]["memory_count"].fill_(7)
    with pytest.raises(ValueError, match=r"disagrees on memory_count.*\[3, 7\]"):
        WeightMemory(late)


@pytest.mark.parametrize("copies", ["pickle", "deepcopy"])
def test_copies_of_an_optimizer_keep_the_levels_and_take_a_new_memory(copies):
    params = make_params(*SHAPES)
    optimizer = NestedOptimizer(params, lr=0.1)
    WeightMemory(optimizer, (2, 4))
    train(optimizer, params, range(3))
    copied = (
        pickle.loads(pickle.dumps(optimizer)) if copies == "pickle" else copy.deepcopy(optimizer)
    )
    own = [p for g in copied.param_groups for p in g["params"]]
    WeightMemory(copied)  # the group's settings, which it kept, come before these
    for opt, ps in ((optimizer, params), (copied, own)):
        train(opt, ps, range(3, 9))
    assert_same_tensors(params, own)
    assert_same_state(optimizer, copied)


@pytest.mark.parametrize("copies", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_memory_is_not_copied_itself(copies):
    """Copies would watch an optimizer that knows nothing of them."""
    memory = WeightMemory(torch.optim.AdamW(make_params((3,))))
    with pytest.raises(TypeError, match="attach a WeightMemory to the copy"):
        copies(memory)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, NestedOptimizer])
def test_distributed_checkpoints_bring_the_memory_back(cls, flatten):
    """Also where the optimizer itself has no state, as SGD without momentum."""

    def build(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = cls(model.parameters(), lr=0.1)
        return model, optimizer, WeightMemory(optimizer, (2, 3), 0.3, 0.4)

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer, memory = build(0)
    params = list(model.parameters())
    train(optimizer, params, range(5))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    weights = copy.deepcopy(model.state_dict())

    other, resumed, its_memory = build(1)
    other.load_state_dict(weights)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert_same_tensors(its_memory.weights(-1), memory.weights(-1))
    for opt, ps in ((optimizer, params), (resumed, list(other.parameters()))):
        train(opt, ps, range(5, 11))
    assert_same_tensors(params, list(other.parameters()))
    assert_same_tensors(its_memory.weights(1), memory.weights(1))


def test_saving_a_fresh_optimizer_counts_no_step():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = WeightMemory(optimizer, (2,))
    before = clone_params(list(model.parameters()))
    get_optimizer_state_dict(model, optimizer)
    params = list(model.parameters())
    assert all(optimizer.state[p]["memory_count"] == 0 for p in params)
    step_with(optimizer, params, random_grads(params, 0))
    assert_same_tensors(memory.weights(1), before)


def test_averages_of_buffers_ride_along():
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, WeightMemory(optimizer, (1, 2), 0.3, 0.4, buffers_from=model)

    def go(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()

    model, optimizer, memory = build()
    go(model, optimizer, range(1))
    bare = torch.optim.AdamW(model.parameters(), lr=0.1).state_dict()
    bare = {**bare, "state": {}}
    go(model, optimizer, range(1, 3))
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    go(model, optimizer, range(3, 7))
    other, resumed, its_memory = build()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(copy.deepcopy(saved[1]))
    go(other, resumed, range(3, 7))
    for level in (1, 2, "mean"):
        a, b = memory.model_state_dict(model, level), its_memory.model_state_dict(other, level)
        assert_same_tensors(list(a.values()), list(b.values()))
    wrong = copy.deepcopy(saved[1])
    other.load_state_dict(saved[0])
    faster = torch.optim.AdamW(other.parameters(), lr=0.1)
    its_memory = WeightMemory(faster, (3,), 0.3, 0.4, buffers_from=other)
    with pytest.warns(UserWarning, match="memory_frequencies"):
        faster.load_state_dict(copy.deepcopy(saved[1]))  # whose frequencies win, for buffers too
    go(other, faster, range(3, 7))
    for level in (1, 2):
        a, b = memory.model_state_dict(model, level), its_memory.model_state_dict(other, level)
        assert_same_tensors(list(a.values()), list(b.values()))
    faster.load_state_dict(bare)
    assert "memory_buffers" not in faster.param_groups[0]
    wrong["param_groups"][0]["memory_buffers"] = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="averages of buffers"):
        resumed.load_state_dict(wrong)
