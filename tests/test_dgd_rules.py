"""The rule of Delta Gradient Descent against the problem it solves, in float64."""

import itertools

import pytest
import torch

from nested_optim import rules

OUT, IN = 4, 6


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(batch, size=1.0, seed=0):
    """A weight, inputs of about this length, gradients at the outputs."""
    inputs = randn(batch, IN, seed=seed + 1)
    inputs *= size / inputs.norm(dim=1, keepdim=True)
    return randn(OUT, IN, seed=seed), inputs, randn(batch, OUT, seed=seed + 2)


def argmin(weight, inputs, output_grads, lr, decay, mean=True):
    """Minimise sum_b <W x_b, g_b> + decay/2 |W x_b|^2 (or their mean) + |W - W_t|^2 / (2 lr).

    As least squares: |sqrt(decay) W x + g / sqrt(decay)|^2 and |W - W_t|^2 / lr, row by row.
    """
    share = 1 / len(inputs) if mean else 1.0
    system = torch.cat([(share * decay) ** 0.5 * inputs, torch.eye(IN).double() / lr**0.5])
    right = torch.cat([-((share / decay) ** 0.5) * output_grads, weight.T / lr**0.5])
    return torch.linalg.lstsq(system, right, driver="gelsd").solution.T


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("batch", ["mean", "exact"])
@pytest.mark.parametrize("decay", [0.3, 1.0])
@pytest.mark.parametrize("size", [1e-8, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e5, 1e8])
def test_one_input_of_any_length_gives_the_minimum(size, decay, batch):
    weight, inputs, grads = problem(1, size)
    new = rules.dgd(weight, grads.T @ inputs, inputs, lr=0.1, decay=decay, batch=batch)
    assert relative(new, argmin(weight, inputs, grads, 0.1, decay)) < 1e-12


@pytest.mark.parametrize("size", [0.0, 0.1, 10.0])
def test_one_input_gives_the_minimum_for_gradients_that_are_not_its_own_alone(size):
    weight, _, _ = problem(1)
    inputs, grad = size * problem(1)[1], randn(OUT, IN, seed=5)
    options = {"lr": 0.1, "decay": 0.7, "weight_decay": 0.2}
    new = rules.dgd(weight, grad, inputs, batch="exact", **options)
    system = torch.eye(IN).double() + 0.07 * inputs.T @ inputs
    expected = torch.linalg.solve(system, weight - 0.1 * (grad + 0.2 * weight), left=False)
    assert relative(new, expected) < 1e-13


def test_the_printed_case_of_the_paper_has_decay_and_length_one():
    weight, inputs, grads = problem(1, 1.0)
    new = rules.dgd(weight, grads.T @ inputs, inputs, lr=0.1, decay=1.0)
    size = 0.1 / (1 + 0.1)
    expected = weight - size * (weight @ inputs.T @ inputs) - size * grads.T @ inputs
    assert relative(new, expected) < 1e-14


@pytest.mark.parametrize("batch", [2, IN - 1, IN, 3 * IN])
@pytest.mark.parametrize("size", [0.1, 10.0])
@pytest.mark.parametrize("mean", [True, False])
def test_a_batch_gives_the_minimum_for_mean_and_sum_on_either_side_of_woodbury(mean, size, batch):
    weight, inputs, grads = problem(batch, size)
    grad = grads.T @ inputs / (batch if mean else 1)
    scale = 1.0 if mean else batch
    options = {"lr": 0.2, "decay": 0.7, "batch": "exact", "scale": scale}
    new = rules.dgd(weight, grad, inputs, **options)
    assert relative(new, argmin(weight, inputs, grads, 0.2, 0.7, mean)) < 1e-12


def test_mean_and_exact_agree_to_first_order_in_lr():
    weight, inputs, grads = problem(10)
    grad = grads.T @ inputs / 10
    errors = []
    for lr in (1e-2, 5e-3, 2.5e-3, 1.25e-3):
        mean, exact = (
            rules.dgd(weight, grad, inputs, lr=lr, decay=1.0, batch=batch)
            for batch in ("mean", "exact")
        )
        errors.append((mean - exact).norm().item())
    for larger, smaller in itertools.pairwise(errors):
        assert 3.8 < larger / smaller < 4.2  # of second order
    assert errors[-1] > 0


@pytest.mark.parametrize("batch", [1, 3, 5, 100])  # around where forming S takes less work
def test_mean_is_the_printed_formula(batch):
    weight, inputs, grads = problem(batch)
    grad = grads.T @ inputs / batch
    moment = inputs.T @ inputs / batch
    size = 0.1 / (1 + 0.1 * 0.5 * moment.trace())
    new = rules.dgd(weight, grad, inputs, lr=0.1, decay=0.5)
    assert relative(new, weight - size * (grad + 0.5 * weight @ moment)) < 1e-14
    term = rules.input_decay(weight, inputs, lr=0.1, decay=0.5)
    assert relative(term, size * 0.5 * weight @ moment) < 1e-14


@pytest.mark.parametrize("batch", ["mean", "exact"])
def test_without_decay_or_inputs_it_is_plain_descent_to_the_last_bit(batch):
    weight, inputs, grads = problem(10)
    grad = grads.T @ inputs
    plain = rules.sgd(weight, grad, lr=0.1, weight_decay=0.2)
    options = {"lr": 0.1, "weight_decay": 0.2, "batch": batch}
    assert torch.equal(rules.dgd(weight, grad, inputs, decay=0.0, **options), plain)
    assert torch.equal(rules.dgd(weight, grad, inputs[:0], decay=1.0, **options), plain)


@pytest.mark.parametrize("batch", ["mean", "exact"])
def test_rows_of_zeros_count_for_nothing_where_the_count_says_so(batch):
    weight, inputs, grads = problem(4)
    grad = grads.T @ inputs / 4
    padded = torch.cat([inputs, torch.zeros(7, IN).double()])
    options = {"lr": 0.1, "decay": 1.0, "batch": batch}
    expected = rules.dgd(weight, grad, inputs, **options)
    for count in (4, torch.tensor(4.0).double()):
        assert relative(rules.dgd(weight, grad, padded, count=count, **options), expected) < 1e-14
    nothing = rules.dgd(weight, grad, padded[4:], count=torch.tensor(0.0).double(), **options)
    assert relative(nothing, rules.sgd(weight, grad, lr=0.1)) < 1e-15


@pytest.mark.parametrize("batch", ["mean", "exact"])
def test_maximize_turns_the_gradient_and_not_the_decay(batch):
    weight, inputs, grads = problem(4)
    grad = grads.T @ inputs / 4
    options = {"lr": 0.1, "decay": 1.0, "batch": batch}
    up = rules.dgd(weight, grad, inputs, maximize=True, **options)
    assert torch.equal(up, rules.dgd(weight, -grad, inputs, **options))


@pytest.mark.parametrize("batch", ["mean", "exact"])
def test_weight_decay_is_part_of_the_gradient(batch):
    weight, inputs, grads = problem(4)
    grad = grads.T @ inputs / 4
    options = {"lr": 0.1, "decay": 1.0, "batch": batch}
    new = rules.dgd(weight, grad, inputs, weight_decay=0.3, **options)
    assert relative(new, rules.dgd(weight, grad + 0.3 * weight, inputs, **options)) < 1e-15


@pytest.mark.parametrize("batch", ["mean", "exact"])
def test_narrow_weights_are_computed_wide_and_rounded_once(batch):
    weight, inputs, grads = (t.bfloat16() for t in problem(9))
    grad = (grads.T @ inputs) / 9
    options = {"lr": 0.1, "decay": 1.0, "batch": batch}
    exact = rules.dgd(weight.double(), grad.double(), inputs.double(), **options)
    new = rules.dgd(weight, grad, inputs, **options)
    assert new.dtype == torch.bfloat16
    assert relative(new.double(), exact) < 2**-8
    if batch == "exact":
        wide = rules.dgd(weight.float(), grad.float(), inputs.float(), **options)
        assert torch.equal(new, wide.bfloat16())


def test_nothing_given_to_the_rules_is_written_to():
    weight, inputs, grads = problem(9)
    grad = grads.T @ inputs / 9
    given = [weight, inputs, grad]
    before = [t.clone() for t in given]
    for batch in ("mean", "exact"):
        rules.dgd(weight, grad, inputs, lr=0.1, decay=1.0, batch=batch, weight_decay=0.1)
    rules.input_decay(weight, inputs, lr=0.1, decay=1.0)
    rules.sgd(weight, grad, lr=0.1, weight_decay=0.1, maximize=True)
    assert all(torch.equal(a, b) for a, b in zip(before, given))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_plain_descent_is_torch_sgd_to_the_last_bit(dtype, lr, weight_decay, maximize):
    param = torch.nn.Parameter(randn(7, 5, dtype=dtype))
    options = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
    theirs = torch.optim.SGD([param], foreach=False, **options)
    ours = param.detach().clone()
    for seed in range(5):
        param.grad = randn(7, 5, seed=seed + 1, dtype=dtype)
        ours = rules.sgd(ours, param.grad, **options)
        theirs.step()
    assert torch.equal(ours, param)
