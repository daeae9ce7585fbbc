"""DGD's windows of inputs, its checkpoints and its copies."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from nested_optim import DGD

from .helpers import assert_same_state, assert_same_tensors, assert_unchanged, snapshot
from .test_dgd import LR, Net, assert_at, backward, batch, expected_step, formula, run

# ---------------------------------------------------------------------- windows


class Reference:
    """The formula on a window's gradients and on all of the inputs that came with them."""

    def __init__(self, model, window):
        self.model, self.window = model, window
        self.grads, self.inputs = [], []

    def add(self, x):
        self.inputs.append(self.model.inputs(x))
        self.grads.append({n: p.grad.clone() for n, p in self.model.named_parameters()})

    def update(self, reduction="mean", **options):
        expected = {}
        for name, p in self.model.named_parameters():
            grads = torch.stack([g[name] for g in self.grads])
            grad = grads.mean(0) if self.window == "mean" else grads.sum(0)
            if name in self.inputs[0]:
                rows = torch.cat([inputs[name] for inputs in self.inputs])
                scale = len(rows) if reduction == "sum" else len(self.grads)
                if self.window == "mean":
                    scale /= len(self.grads)
                expected[name] = formula(p.detach(), grad, rows, scale=scale, **options)
            else:
                expected[name] = p.detach() - options["lr"] * grad
        self.grads, self.inputs = [], []
        return expected


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("window", ["mean", "sum"])
@pytest.mark.parametrize("rule", ["mean", "exact"])
def test_a_window_is_one_update_on_all_of_its_gradients_and_inputs(rule, window, reduction):
    model = Net()
    lr = 0.01
    optimizer = DGD(
        model, lr, batch=rule, frequency=3, window=window, reduction=reduction, window_samples=100
    )
    reference = Reference(model, window)
    for step in range(7):
        before = copy.deepcopy(model.state_dict())
        x, y = batch(step, size=4 + step)
        backward(model, x, y, reduction)
        reference.add(x)
        if step % 3 == 2:
            before = reference.update(reduction, lr=lr, rule=rule)
        optimizer.step()
        optimizer.zero_grad()
        assert_at(model, before)
    expected = reference.update(reduction, lr=lr, rule=rule)
    assert optimizer.flush() == 8
    assert_at(model, expected)
    assert optimizer.state[model.first.weight]["sample_count"] == 0


def test_windows_keep_a_bounded_uniform_sample_under_fixed_keys():
    model = Net()
    optimizer = DGD(model, LR, frequency=5, window_samples=6)
    shapes, pool = [], []
    for step in range(4):
        x, y = batch(step, size=10)
        backward(model, x, y)
        pool.append(x)
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state[model.first.weight]
        shapes.append({k: tuple(t.shape) for k, t in state.items()})
    assert all(s == shapes[0] for s in shapes)
    assert shapes[0]["samples"] == (6, 5) and shapes[0]["sample_keys"] == (6,)
    assert state["sample_count"] == 40 and state["sample_steps"] == 4
    seen = torch.cat(pool)
    places = [(seen == row).all(1).nonzero().item() for row in state["samples"]]
    assert len(set(places)) == 6
    assert len({place // 10 for place in places}) > 1  # not the first six, nor the last
    assert "samples" not in optimizer.state[model.norm.weight]


def windowed(model, **options):
    layers = {"first": 3, "second": 1, "norm": 2, "last": 4}
    groups = [
        {"params": list(getattr(model, name).named_parameters()), "frequency": f, "name": name}
        for name, f in layers.items()
    ]
    return DGD(groups, LR, model=model, max_tokens=4, window_samples=5, **options)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float64, {"batch": "exact"}),
        (torch.float32, {"base": "adamw", "reduction": "sum"}),
        (torch.bfloat16, {"state_dtype": torch.float32, "kahan_sum": True}),
    ],
    ids=str,
)
def test_resuming_inside_a_window_is_never_having_stopped(dtype, options, stop):
    model = Net(dtype)
    optimizer = windowed(model, **options)
    run(model, optimizer, range(stop))
    saved, resumed_model = through_a_file(optimizer.state_dict()), copy.deepcopy(model)
    run(model, optimizer, range(stop, 13))
    resumed = windowed(resumed_model, **options)
    resumed.load_state_dict(saved)
    run(resumed_model, resumed, range(stop, 13))
    assert_same_tensors(list(resumed_model.parameters()), list(model.parameters()))
    assert_same_state(resumed, optimizer)


RESUME = """
import sys, torch
torch.set_num_threads(1)  # as in the tests: sums depend on it
from tests.test_dgd_windows import Net, run, windowed
saved = torch.load(sys.argv[1], weights_only=True)
model = Net()
model.load_state_dict(saved["model"])
optimizer = windowed(model)
optimizer.load_state_dict(saved["optimizer"])
run(model, optimizer, range(5, 13))
torch.save(model.state_dict(), sys.argv[2])
"""


def test_resuming_in_a_new_process_is_bit_identical(tmp_path, request):
    model = Net()
    optimizer = windowed(model)
    run(model, optimizer, range(5))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    run(model, optimizer, range(5, 13))
    command = [sys.executable, "-c", RESUME, tmp_path / "saved.pt", tmp_path / "resumed.pt"]
    subprocess.run(command, check=True, timeout=120, cwd=request.config.rootpath)
    resumed = torch.load(tmp_path / "resumed.pt")
    assert_same_tensors(list(resumed.values()), list(model.state_dict().values()))


def test_frequency_and_window_size_may_be_edited_inside_a_window():
    model = Net()
    optimizer = DGD(model, LR, frequency=4, window_samples=30)
    reference = Reference(model, "mean")
    for step in range(2):
        x, y = batch(step)
        optimizer.zero_grad()
        backward(model, x, y)
        reference.add(x)
        optimizer.step()
    optimizer.param_groups[0].update(frequency=1, window_samples=50)
    x, y = batch(2)
    optimizer.zero_grad()
    backward(model, x, y)
    reference.add(x)
    expected = reference.update(lr=LR)
    optimizer.step()
    assert_at(model, expected)
    assert optimizer.state[model.first.weight]["samples"].shape == (50, 5)
    # The next window is of one gradient, with its own inputs only.
    x, y = batch(3)
    optimizer.zero_grad()
    backward(model, x, y)
    expected = expected_step(model, model.inputs(x))
    optimizer.step()
    assert_at(model, expected)


def test_a_step_that_only_creates_state_creates_all_of_it_and_needs_no_inputs():
    model = Net()
    optimizer = DGD(model, lr=0.0, frequency=3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state[model.first.weight]
    assert {"samples", "sample_keys", "sample_count", "sample_steps"} < state.keys()
    assert state["window_count"] == 0 and state["sample_steps"] == 0


# ---------------------------------------------------------------------- checkpoints, copies


def test_a_torch_sgd_checkpoint_loads_unless_it_has_momentum():
    model = Net()
    optimizer = DGD(model, LR)
    theirs = SGD(model.parameters(), lr=0.5)
    backward(model, *batch(0))
    theirs.step()
    optimizer.load_state_dict(theirs.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["decay"]) == (0.5, 1.0)
    assert "momentum" not in group
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="with momentum"):
        optimizer.load_state_dict(SGD(model.parameters(), lr=0.5, momentum=0.9).state_dict())
    assert_unchanged(optimizer, before)


def test_a_torch_adamw_checkpoint_loads():
    model = Net()
    plain = copy.deepcopy(model)
    theirs = AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    run(plain, theirs, range(3))
    model.load_state_dict(plain.state_dict())
    ours = DGD(model, lr=0.01, base="adamw", decay=0.0)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    run(plain, theirs, range(3, 6))
    run(model, ours, range(3, 6))
    assert_same_tensors(list(model.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("base, torch_class", [("sgd", SGD), ("adamw", AdamW)])
@pytest.mark.parametrize("flags", [{"fused": True}, {"capturable": True}])
def test_how_torch_made_its_steps_is_not_loaded(base, torch_class, flags):
    model = Net()
    plain = copy.deepcopy(model)
    theirs = torch_class(plain.parameters(), lr=0.01, weight_decay=0.0, fused=flags.get("fused"))
    run(plain, theirs, range(2))
    model.load_state_dict(plain.state_dict())
    saved = copy.deepcopy(theirs.state_dict())
    saved["param_groups"][0].update(flags)  # capturable steps need a GPU
    ours = DGD(model, lr=0.01, base=base, weight_decay=0.0)
    ours.load_state_dict(saved)
    group = ours.param_groups[0]
    assert (group["fused"], group["capturable"]) == (None, False)
    run(model, ours, range(2, 4))
    # A group that says so itself is refused as before.
    with pytest.raises(RuntimeError, match=next(iter(flags))):
        ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "decay": 0.0, **flags})


@pytest.mark.parametrize("state_dtype", [None, torch.float64])
def test_a_loaded_window_takes_the_dtype_of_its_parameter_or_of_the_state(state_dtype):
    model, narrow = Net(), Net(torch.float32)
    optimizer = DGD(model, LR, frequency=3, window_samples=5, state_dtype=state_dtype)
    run(model, optimizer, range(2))
    twin = DGD(narrow, LR, frequency=3, window_samples=5, state_dtype=state_dtype)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    saved, loaded = optimizer.state[model.first.weight], twin.state[narrow.first.weight]
    assert loaded["samples"].dtype == (state_dtype or torch.float32)
    assert torch.equal(loaded["samples"], saved["samples"].to(loaded["samples"].dtype))
    for key in ("sample_keys", "sample_count"):
        assert loaded[key].dtype == torch.int64 and torch.equal(loaded[key], saved[key])
    run(narrow, twin, range(2, 4))
    assert loaded["step"] == 1


def test_changing_the_base_of_trained_parameters_is_refused():
    model = Net()
    optimizer = DGD(model, LR)
    run(model, optimizer, range(1))
    optimizer.param_groups[0]["base"] = "adamw"
    backward(model, *batch(1))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"'first.weight'.*no moments.*new optimizer"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("copier", [copy.deepcopy, by_pickle])
def test_a_copy_watches_no_model_until_it_is_attached_and_then_goes_on_alike(copier):
    model = Net()
    optimizer = windowed(model)
    run(model, optimizer, range(4))
    twin_model, twin = copier((model, optimizer))
    assert twin._capture is None
    with pytest.raises(RuntimeError, match=r"watches no model.*attach\(model\)"):
        run(twin_model, twin, [4])
    twin_model.zero_grad()
    twin.attach(twin_model)
    run(model, optimizer, range(4, 10))
    run(twin_model, twin, range(4, 10))
    assert_same_tensors(list(twin_model.parameters()), list(model.parameters()))
    assert_same_state(twin, optimizer)


def test_an_optimizer_s_pickle_does_not_hold_the_model():
    model = Net()
    model.unrelated = nn.Embedding(100_000, 2)
    optimizer = DGD(model.first.parameters(), LR, model=model)
    backward(model, *batch(0))
    optimizer.step()
    assert len(pickle.dumps(optimizer)) < 20_000
