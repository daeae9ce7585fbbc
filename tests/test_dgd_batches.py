"""DGD's products in batches, as an accelerator takes them: the rule's numbers, here on the CPU."""

import pytest
import torch
from torch import nn

from nested_optim import DGD, descent, pools, rules
from nested_optim.capture import Layout
from nested_optim.inputs import Inputs

from .helpers import assert_same_tensors

# Of one shape several, of another one alone; where S is formed and where it is not.
WEIGHTS = (6, 4), (6, 4), (4, 6), (6, 4), (4, 6), (3, 2, 2, 3), (3, 2, 2, 3), (5, 4)


@pytest.fixture(autouse=True)
def batches(monkeypatch):
    """How many weights each batch of products had."""
    sizes = []
    terms = descent._terms

    def counted(weights, *args):
        sizes.append(len(weights))
        return terms(weights, *args)

    monkeypatch.setattr(descent, "_terms", counted)
    monkeypatch.setattr(descent, "_in_batches", lambda param: True)
    return sizes


def make(transposed, rows, dtype=torch.float64, input_dtype=None, tensors=False):
    """Weights, gradients and inputs, the last two weights' counts and scales being others'."""
    torch.manual_seed(0)
    weights = [torch.randn(shape, dtype=dtype) for shape in WEIGHTS]
    weights[5] = weights[5].to(memory_format=torch.channels_last)
    grads = [torch.randn_like(w) for w in weights]
    taken = []
    for i, w in enumerate(weights):
        layout = Layout(transposed and w.dim() == 2)
        x = torch.randn(rows, layout.features(w), dtype=input_dtype or dtype)
        count, scale = (rows, 1.0) if i < 6 else (rows - 1, 2.5)
        if tensors:
            wide = torch.promote_types(dtype, torch.float32)
            count, scale = (torch.tensor(n, dtype=wide) for n in (count + i, scale + i))
        taken.append(Inputs(layout, x, count, scale))
    return weights, grads, taken


def options_of(**options):
    return {
        "lr": 0.03,
        "decay": 0.7,
        "batch": "mean",
        "weight_decay": 0.0,
        "maximize": False,
        "differentiable": False,
        **options,
    }


def both(weights, grads, taken, group):
    """Updated in batches, and by the rule in float64."""
    expected = []
    for w, g, x in zip(weights, grads, taken):
        matrices = (x.layout.matrix(t.double()) for t in (w, g))
        keys = ("decay", "batch", "weight_decay", "maximize")
        new = rules.dgd(
            *matrices,
            x.rows.double(),
            lr=group["lr"],
            count=x.count,
            scale=x.scale,
            **{key: group[key] for key in keys},
        )
        expected.append(x.layout.unmatrix(new, w))
    steps = [torch.tensor(0.0) for _ in weights]
    descent._multi_tensor_dgd(weights, grads, list(taken), steps, group)
    assert all(step == 1 for step in steps)
    return weights, expected


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [2, 50])
@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.2, "maximize": True}, {"lr": torch.tensor(0.03)}],
    ids=["plain", "maximize", "tensor lr"],
)
def test_batches_are_the_rule_to_rounding(transposed, rows, tensors, options, batches):
    if "lr" in options:  # as exact as a float32 learning rate that both widen
        options = {"lr": options["lr"].double()}
    got, want = both(*make(transposed, rows, tensors=tensors), options_of(**options))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert max(batches) == 3 and sum(batches) == len(WEIGHTS)


@pytest.mark.parametrize("elements, sizes", [(1, [1] * 8), (50, [2, 1, 2, 1, 1, 1])])
def test_batches_are_bounded(elements, sizes, batches, monkeypatch):
    monkeypatch.setattr(descent, "_BATCH_BYTES", 8 * elements)
    got, want = both(*make(False, 2), options_of())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert sorted(batches) == sorted(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("rows", [2, 50])
def test_bfloat16_inputs_round_the_products_and_nothing_else(dtype, weight_decay, rows):
    weights, grads, taken = make(False, rows, dtype, torch.bfloat16)
    old = [w.clone() for w in weights]
    got, want = both(weights, grads, taken, options_of(weight_decay=weight_decay, decay=0.1))
    for new, exact, before in zip(got, want, old):
        # The products are a small part of the change here.
        bound = 0.02 * float((exact - before).abs().max())
        bound += torch.finfo(dtype).eps * float(exact.abs().max())
        assert float((new - exact).abs().max()) <= bound


def test_a_narrow_weight_is_rounded_once():
    weights, grads, taken = make(False, 2, torch.bfloat16, torch.float32)
    got, want = both(weights, grads, taken, options_of(weight_decay=0.1))
    assert_same_tensors(got, [w.to(torch.bfloat16) for w in want])


def test_a_weight_that_no_input_has_reached_descends_plainly(batches):
    weights, grads, taken = make(False, 2)
    taken = [Inputs(x.layout, x.rows[:0], 0, 1.0) for x in taken]
    expected = [w - 0.03 * g for w, g in zip(weights, grads)]
    steps = [torch.tensor(0.0) for _ in weights]
    descent._multi_tensor_dgd(weights, grads, taken, steps, options_of())
    assert not batches
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [2, 50])
def test_adamw_s_terms_are_the_rule_s(transposed, rows, batches):
    weights, _, taken = make(transposed, rows)
    found = descent.subtracted_terms(weights, [*taken[:-1], None], options_of(), foreach=True)
    assert len(found) == len(weights) - 1 and max(batches) == 3
    for (weight, term), x in zip(sorted(found, key=lambda pair: at(weights, pair[0])), taken):
        exact = rules.input_decay(
            x.layout.matrix(weight), x.rows, lr=0.03, decay=0.7, count=x.count, scale=x.scale
        )
        torch.testing.assert_close(term, x.layout.unmatrix(exact, weight), rtol=1e-12, atol=1e-12)


def at(tensors, one):
    return next(i for i, tensor in enumerate(tensors) if tensor is one)


class Conv1D(nn.Module):
    """A linear layer whose weight is (inputs, outputs), as Hugging Face's."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def make_model():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(40, 8), nn.Tanh(),
        Conv1D(8, 8), nn.Tanh(), Conv1D(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8),
    )  # fmt: skip
    return model.double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base": "adamw", "weight_decay": 0.1},
        {"frequency": 3, "window": "sum"},
        {"base": "adamw", "frequency": 2, "reduction": "sum"},
        {"weight_decay": 0.1, "maximize": True, "lr": 1e-3},
        {"batch": "exact"},
        {"foreach": False},
        {"base": "adamw", "foreach": False},
    ],
    ids=str,
)
def test_training_in_batches_is_training_one_by_one(options, batches, monkeypatch):
    results = []
    for batched in (True, False):
        monkeypatch.setattr(descent, "_in_batches", lambda param, on=batched: on)
        model = make_model()
        optimizer = DGD(model, **{"lr": 0.01, "max_tokens": 5, "window_samples": 6, **options})
        for seed in range(6):
            x = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(seed)).double()
            model(x).square().sum(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    alone = options.get("batch") == "exact" or options.get("foreach") is False
    assert bool(batches) != alone
    assert alone or max(batches) == 2


def test_layers_that_see_as_many_inputs_share_one_choice(monkeypatch):
    """49 layers of a decoder would else hash, select and sort the same places 49 times."""
    chosen = []
    choose = pools.chosen

    def noted(*args):
        chosen.append(choose(*args))
        return chosen[-1]

    monkeypatch.setattr(pools, "chosen", noted)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    optimizer = DGD(model, 0.01, max_tokens=3)
    for _ in range(2):
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    first, second = chosen[:5], chosen[5:]
    assert len(second) == 5
    for step in (first, second):
        assert all(choice[0] is step[0][0] for choice in step)
    assert first[0][1].tolist() != second[0][1].tolist()  # another step, another sample
    assert not optimizer._capture._choices


def test_shared_choices_do_not_pile_up():
    model = nn.Linear(4, 4)
    optimizer = DGD(model, 0.01, max_tokens=3)
    for _ in range(200):  # no step, no zero_grad: each starts where the last one ended
        model(torch.randn(8, 4)).sum().backward()
    assert 0 < len(optimizer._capture._choices) <= 64
