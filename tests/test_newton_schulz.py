"""Newton-Schulz: the rule against singular values, batches and cheaper forms against the rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_optim import orthogonalize as orthogonalize_module
from nested_optim.orthogonalize import _choose, _segments, orthogonal_batches, orthogonalize
from nested_optim.rules import MatrixForm, lr_factor, newton_schulz, ns_schedule

from .interpreter import interpreted

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def gaussian(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def with_spectrum(values, rows, columns, seed=0):
    """A matrix of these singular values."""
    u = torch.linalg.qr(gaussian(rows, len(values), seed=seed))[0]
    v = torch.linalg.qr(gaussian(columns, len(values), seed=seed + 1))[0]
    return u @ torch.diag(torch.as_tensor(values, dtype=F64)) @ v.T


def by_svd(matrix, schedule, eps=1e-7):
    """What Newton-Schulz does, done to the singular values themselves."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True).clamp(min=eps)
    for a, b, c in schedule:
        s = a * s + b * s**3 + c * s**5
    return (u * s.unsqueeze(-2)) @ vh


SHAPES = [(5, 5), (4, 9), (9, 4), (1, 6), (6, 1), (1, 1), (3, 4, 7), (2, 7, 4), (2, 3, 5, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express", "cubic"])
def test_singular_values_go_through_the_polynomials_and_vectors_stay(coefficients, shape):
    matrix = gaussian(*shape)
    schedule = ns_schedule(coefficients, 5)
    torch.testing.assert_close(newton_schulz(matrix, schedule), by_svd(matrix, schedule))


def test_no_steps_leave_a_matrix_as_it_is():
    matrix = gaussian(3, 4)
    assert newton_schulz(matrix, ns_schedule("quintic", 0)) is matrix


def test_zeros_stay_zeros_and_small_norms_are_normalised_down_to_eps():
    schedule = ns_schedule("quintic", 5)
    assert not newton_schulz(torch.zeros(3, 4), schedule).any()
    matrix = gaussian(3, 4)
    whole = newton_schulz(matrix, schedule, eps=1e-6)
    torch.testing.assert_close(newton_schulz(1e-5 * matrix, schedule, eps=1e-6), whole)
    faint = newton_schulz(1e-12 * matrix, schedule, eps=1e-6)
    torch.testing.assert_close(faint, 3.4445**5 * 1e-6 * matrix)  # as if linear


def test_the_quintic_brings_what_is_not_tiny_near_one_and_three_cubic_steps_do_not():
    matrix = gaussian(256, 256)
    quintic = torch.linalg.svdvals(newton_schulz(matrix, ns_schedule("quintic", 5)))
    cubic = torch.linalg.svdvals(newton_schulz(matrix, ns_schedule("cubic", 3)))
    assert 0.8 < quintic.median() < 1.0
    assert quintic.max() < 1.25
    assert cubic.median() < 0.25


def test_polar_express_reaches_one_where_the_quintic_stays_about_it():
    spectrum = torch.logspace(0, -3, 40, dtype=F64)  # of Frobenius norm above 1
    matrix = with_spectrum(spectrum, 40, 60)
    values = torch.linalg.svdvals(newton_schulz(matrix, ns_schedule("polar_express", 8)))
    assert (values - 1).abs().max() < 1e-2
    quintic = torch.linalg.svdvals(newton_schulz(matrix, ns_schedule("quintic", 8)))
    assert (quintic - 1).abs().max() > 0.1


def test_a_schedule_repeats_its_last_triple():
    assert ns_schedule((1, 2, 3), 3) == ((1.0, 2.0, 3.0),) * 3
    assert ns_schedule([(1, 2, 3), [4, 5, 6]], 3) == ((1, 2, 3), (4, 5, 6), (4, 5, 6))
    assert ns_schedule("polar_express", 12)[-4:] == ((1.875, -1.25, 0.375),) * 4


@pytest.mark.parametrize(
    "wrong", ["quartic", (1, 2), (), 3.0, ((1, 2, 3), (1, 2)), (1, 2, float("nan")), ("a", "b", 1)]
)
def test_a_schedule_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=r"Invalid ns_coefficients.*quintic"):
        ns_schedule(wrong, 5)


@pytest.mark.parametrize(
    "adjust, shape, out_dim, factor",
    [
        ("match_rms_adamw", (16, 64), 0, 1.6),
        ("match_rms_adamw", (64, 16), 1, 1.6),
        ("original", (64, 16), 0, 2.0),
        ("original", (16, 64), 0, 1.0),
        ("original", (16, 64), 1, 2.0),
        ("spectral", (16, 64), 0, 0.5),
        ("spectral", (16, 64), 1, 2.0),
        (None, (16, 64), 0, 1.0),
        ("match_rms_adamw", (0, 4), 0, 1.0),
    ],
)
def test_the_factors_of_the_learning_rate(adjust, shape, out_dim, factor):
    assert lr_factor(adjust, *shape, out_dim=out_dim) == pytest.approx(factor)


# ---------------------------------------------------------------------------- forms


FORMS = [
    (MatrixForm(), (6, 4), [(1, 6, 4)]),
    (MatrixForm(split_sizes=(2, 4)), (6, 4), [(1, 2, 4), (1, 4, 4)]),
    (MatrixForm(split_sizes=(2, 4), out_dim=1), (4, 6), [(1, 4, 2), (1, 4, 4)]),
    (MatrixForm(num_heads=3), (6, 4), [(3, 2, 4)]),
    (MatrixForm(num_heads=3, out_dim=1), (4, 6), [(3, 4, 2)]),
    (MatrixForm(split_sizes=(4, 2), num_heads=(2, 1)), (6, 5), [(2, 2, 5), (1, 2, 5)]),
    (MatrixForm(split_sizes=(4, 2), num_heads=2, out_dim=1), (5, 6), [(2, 5, 2), (2, 5, 1)]),
    (MatrixForm(flatten=False), (3, 6, 4), [(3, 6, 4)]),
    (MatrixForm(flatten=False, split_sizes=(2, 4)), (3, 6, 4), [(3, 2, 4), (3, 4, 4)]),
    (MatrixForm(flatten=False, split_sizes=(2, 2), out_dim=1), (3, 6, 4), [(3, 6, 2)] * 2),
    (MatrixForm(flatten=True), (6, 2, 3), [(1, 6, 6)]),
    (MatrixForm(), (6, 2, 3, 2), [(1, 6, 12)]),
    (MatrixForm(split_sizes=(2, 4)), (6, 2, 3, 2), [(1, 2, 12), (1, 4, 12)]),
    (MatrixForm(flatten=True, out_dim=1), (6, 2, 3), [(1, 6, 6)]),
    (MatrixForm(split_sizes=(6, 6), out_dim=1), (6, 2, 3, 2), [(1, 6, 6), (1, 6, 6)]),
]


@pytest.mark.parametrize("form, shape, parts", FORMS, ids=str)
def test_a_parameter_divides_into_its_matrices_and_comes_together_again(form, shape, parts):
    assert form.why_not(shape) is None
    tensor = gaussian(*shape)
    split = form.split(tensor)
    assert [tuple(part.shape) for part in split] == parts
    assert all(part is tensor or part._base is tensor for part in split)  # views, to be written to
    assert torch.equal(form.join(split, shape), tensor)
    rows = gaussian(*form.row_shape(shape))
    assert torch.equal(form.join(form.split(rows), rows.shape), rows)
    for part, row in zip(split, form.split(rows)):
        # One number per output and matrix.
        kept = part.size(1 + form.out_dim)
        assert row.numel() == part.size(0) * kept and row.size(1 + form.out_dim) == kept


@pytest.mark.parametrize(
    "form, shape, why",
    [
        (MatrixForm(), (), "no rows and columns"),
        (MatrixForm(), (5,), "no rows and columns"),
        (MatrixForm(), (3, 4, 5), "set flatten=False or flatten=True"),
        (MatrixForm(flatten=False), (2, 3, 4, 5), "more than one batch dimension"),
        (MatrixForm(split_sizes=(2, 3)), (6, 4), "add up to 5"),
        (MatrixForm(split_sizes=(2, 4), out_dim=1), (6, 4), "has 4 outputs"),
        (MatrixForm(num_heads=4), (6, 4), "not divisible in 4 heads"),
        (MatrixForm(num_heads=(1, 2)), (6, 4), "has 1 projections"),
        (MatrixForm(flatten=False, num_heads=2), (3, 6, 4), "is a batch of matrices"),
    ],
)
def test_a_shape_that_a_form_cannot_read_is_refused_with_the_reason(form, shape, why):
    assert why in (form.why_not(shape) or "")


# ---------------------------------------------------------------------------- many at once

MANY = [(1, 8, 8), (2, 8, 20), (1, 20, 8), (3, 8, 8), (1, 1, 5), (0, 4, 4), (1, 5, 0)]


@pytest.mark.parametrize("max_batch_bytes", [1, 4000, 2**20])
@pytest.mark.parametrize("backend", ["auto", "bmm", "gram"])
def test_many_matrices_are_each_done_as_by_themselves(backend, max_batch_bytes):
    matrices = [gaussian(*shape, seed=i) for i, shape in enumerate(MANY)]
    schedule = ns_schedule("quintic", 5)
    given = {"dtype": F64, "backend": backend, "max_batch_bytes": max_batch_bytes}
    results = orthogonalize(matrices, schedule, **given)
    for matrix, result in zip(matrices, results, strict=True):
        torch.testing.assert_close(result, newton_schulz(matrix, schedule), rtol=1e-9, atol=1e-11)


def test_matrices_of_one_shape_go_together_within_the_bound_of_memory():
    matrices = [gaussian(1, 8, 20, seed=i, dtype=F32) for i in range(10)]
    matrices.insert(5, gaussian(1, 4, 4, dtype=F32))
    each = 4 * (3 * 8 * 20 + 5 * 8 * 8)
    options = {"eps": 1e-7, "dtype": F32}
    # The square one is not done by way of its Gram matrix, and comes first.
    for room, sizes in ((1, [1] * 11), (3 * each, [1, 3, 3, 3, 1]), (2**30, [1, 10])):
        batches = orthogonal_batches(
            matrices, ns_schedule("quintic", 5), max_batch_bytes=room, **options
        )
        assert [sum(batch.counts) for batch in batches] == sizes


@pytest.mark.parametrize(
    "room, together", [(2**30, [5]), (2 * 4 * (3 * 8 * 20 + 5 * 8 * 8), [2, 2, 1])]
)
def test_what_has_its_short_side_in_common_goes_through_the_gram_form_together(
    room, together, monkeypatch
):
    shapes = [(1, 8, 20), (2, 30, 8), (1, 8, 20), (1, 8, 40)]
    matrices = [gaussian(*shape, seed=i, dtype=F32) for i, shape in enumerate(shapes)]
    schedule = ns_schedule("quintic", 5)
    squares = []
    real = orthogonalize_module._plain_product

    def watching(a, b, *args, **kwargs):
        if a.size(1) == a.size(2) and kwargs.get("diagonal"):
            squares.append(len(a))
        return real(a, b, *args, **kwargs)

    monkeypatch.setattr(orthogonalize_module, "_plain_product", watching)
    results = orthogonalize(matrices, schedule, max_batch_bytes=room)
    assert squares == [n for n in together for _ in range(5)]
    for matrix, result in zip(matrices, results, strict=True):
        torch.testing.assert_close(result, newton_schulz(matrix, schedule), rtol=1e-4, atol=1e-5)


def test_matrices_that_follow_each_other_in_memory_are_not_copied():
    stack = gaussian(6, 4, 7)
    joined = orthogonalize_module._stacked([stack[:2], stack[2:3], stack[3:5]])
    assert joined.data_ptr() == stack.data_ptr() and torch.equal(joined, stack[:5])
    for parts in (
        [stack[:2], stack[3:5]],  # a gap
        [stack[2:3], stack[:2]],  # another order
        [stack[:1], gaussian(1, 4, 7)],
        [stack.mT[:1], stack.mT[1:2]],
        [stack[:2, :, :5], stack[2:3, :, :5]],
    ):
        joined = orthogonalize_module._stacked(parts)
        assert joined.data_ptr() != parts[0].data_ptr()
        assert torch.equal(joined, torch.cat(parts))


def test_a_large_batch_stays_within_its_bound(monkeypatch):
    held = []
    real = torch.cat

    def watching(tensors, *args, **kwargs):
        held.append(sum(t.numel() for t in tensors))
        return real(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", watching)
    matrices = [gaussian(2, 16, 16, seed=i, dtype=F32) for i in range(20)]
    orthogonalize(matrices, ns_schedule("quintic", 5), max_batch_bytes=50_000)
    assert held and max(held) * 4 * 8 <= 50_000


def test_the_gram_form_serves_wide_matrices_and_the_plain_one_square_ones():
    cpu = torch.device("cpu")
    assert _choose("auto", cpu, F32, 64, 64, 5) == "bmm"
    assert _choose("auto", cpu, F32, 64, 256, 5) == "gram"
    assert _choose("auto", cpu, BF16, 64, 64, 5) == "bmm"
    assert _choose("auto", cpu, F32, 64, 256, 0) == "bmm"
    with pytest.raises(ValueError, match="Invalid backend"):
        orthogonalize([gaussian(1, 2, 2)], ns_schedule("quintic", 5), backend="qr")
    with pytest.raises(ValueError, match="needs Triton, a CUDA device"):
        orthogonalize([gaussian(1, 2, 2)], ns_schedule("quintic", 5), backend="symmetric")


@given(steps=st.integers(1, 40), length=st.integers(1, 12))
def test_runs_add_up_and_none_is_too_long(steps, length):
    runs = _segments(steps, length)
    assert sum(runs) == steps and max(runs) <= length and max(runs) - min(runs) <= 1
    assert runs == sorted(runs, reverse=True)


@settings(max_examples=25, deadline=None)
@given(
    short=st.integers(1, 24),
    extra=st.integers(0, 60),
    condition=st.floats(0, 6),
    name=st.sampled_from(["quintic", "polar_express", "cubic"]),
    seed=st.integers(0, 99),
)
def test_the_gram_form_in_float32_is_more_exact_than_bfloat16_products(
    short, extra, condition, name, seed
):
    spectrum = torch.logspace(0, -condition, short, dtype=F64)
    matrix = with_spectrum(spectrum, short, short + extra, seed).unsqueeze(0)
    schedule = ns_schedule(name, 5)
    truth = newton_schulz(matrix, schedule)

    def error(**options):
        result = orthogonalize([matrix.float()], schedule, **options)[0]
        return ((result.double() - truth).norm() / truth.norm()).item()

    gram = error(dtype=F32, backend="gram")
    assert gram < 3e-4
    assert gram <= error(dtype=BF16, backend="bmm") + 1e-5


# ---------------------------------------------------------------------------- the kernel


@pytest.fixture(scope="module")
def symmetric():
    """The kernel's module, interpreted; afterwards as it was."""
    with interpreted() as modules:
        yield modules["symmetric"]


@pytest.mark.parametrize("dtype, bound", [(F16, 2e-3), (F32, 1e-5)], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 5, 7), (1, 64, 64), (2, 130, 70), (1, 1, 3), (3, 16, 200), (0, 4, 4), (2, 0, 3)]
)
def test_a_symmetric_product_is_the_product(shape, dtype, bound, symmetric):
    x = (gaussian(*shape) / max(1, shape[2]) ** 0.5).to(dtype)
    exact = x.double() @ x.double().mT
    gram = symmetric.symmetric_product(x, x)
    assert gram.dtype == dtype
    torch.testing.assert_close(gram.double(), exact, rtol=bound, atol=bound)
    again = symmetric.symmetric_product(gram, gram, 2.0, gram, -1.5, 3.0)
    r = gram.double()
    expected = 2 * r @ r - 1.5 * r + 3 * torch.eye(shape[1], dtype=F64)
    torch.testing.assert_close(again.double(), expected, rtol=bound, atol=2 * bound)


@pytest.mark.parametrize("size, depth", [(130, 72), (256, 64), (72, 200)])
def test_a_symmetric_product_reads_through_descriptors_where_it_can(size, depth, symmetric):
    if symmetric.TensorDescriptor is None:
        pytest.skip("needs Triton 3.4")
    x = (gaussian(2, size, depth) / depth**0.5).to(F16)
    tall = x.mT.contiguous().mT if depth % 8 == 0 and size % 8 == 0 else x
    bound = 5e-3
    plus = gaussian(2, size, size, seed=1).to(F16)
    plus = plus + plus.mT
    exact = 1.5 * x.double() @ x.double().mT - 0.5 * plus.double() + 2 * torch.eye(size)
    for a, b in ((x, x), (tall, tall), (x, tall), (tall, x)):
        assert symmetric.described(a) and symmetric.described(b)
        out = torch.full((2, size, size), torch.nan, dtype=F16)
        done = symmetric.symmetric_product(a, b, 1.5, plus, -0.5, 2.0, out)
        assert done is out
        torch.testing.assert_close(out.double(), exact, rtol=bound, atol=bound)


def test_only_what_is_aligned_is_read_through_descriptors(symmetric):
    if symmetric.TensorDescriptor is None:
        pytest.skip("needs Triton 3.4")
    x = torch.zeros(2, 128, 136, dtype=F16)
    assert symmetric.described(x) and symmetric.described(x.mT)
    assert symmetric.described(x[:, :, 8:])
    assert not symmetric.described(x[:, :, 1:129])  # starts elsewhere than at 16 bytes
    assert not symmetric.described(torch.zeros(2, 128, 131, dtype=F16))
    assert not symmetric.described(x[:, ::2, ::2])
    assert not symmetric.described(x.float())


def test_a_symmetric_product_takes_inputs_that_are_not_contiguous(symmetric):
    x = gaussian(2, 20, 9, dtype=F32)
    # Another layout adds up in another order, so not to the last bit.
    torch.testing.assert_close(symmetric.symmetric_product(x.mT, x.mT), x.mT @ x)
    wide = gaussian(2, 20, 18, dtype=F32)[:, :, :9]
    torch.testing.assert_close(symmetric.symmetric_product(wide, wide), wide @ wide.mT)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(3, 64, 32), (2, 5, 7), (0, 3, 3), (2, 40, 77)])
def test_matrices_are_divided_by_their_norms(shape, dtype, symmetric):
    from nested_optim.kernels import normalize

    x = gaussian(*shape).to(dtype)
    norms = gaussian(shape[0], 1, 1, seed=1).abs().float() + 0.1
    exact = x.double() / norms.double()
    done = normalize.divided(x, norms, F16)
    assert done.dtype == F16
    torch.testing.assert_close(done.double(), exact, rtol=1e-3, atol=1e-6)


def test_results_may_stay_as_they_were_computed(symmetric):
    matrices = [gaussian(1, 24, 90, dtype=F32)]
    options = {"eps": 1e-7, "dtype": BF16, "max_batch_bytes": 2**30}
    schedule = ns_schedule("quintic", 5)
    [left], [rounded] = (
        orthogonal_batches(matrices, schedule, as_computed=kept, **options)
        for kept in (True, False)
    )
    assert (left.result.dtype, rounded.result.dtype) == (F16, BF16)
    assert torch.equal(left.result.bfloat16(), rounded.result)


@pytest.mark.parametrize("backend", ["auto", "symmetric", "gram"])
@pytest.mark.parametrize("shape", [(2, 40, 40), (2, 24, 90), (1, 90, 24)], ids=str)
def test_the_kernels_forms_are_no_less_exact_than_bfloat16_products(shape, backend, symmetric):
    matrix = gaussian(*shape)
    schedule = ns_schedule("quintic", 5)
    truth = newton_schulz(matrix, schedule)
    done = orthogonalize([1e-6 * matrix.float()], schedule, dtype=BF16, backend=backend)[0]
    plain = newton_schulz(matrix.to(BF16), schedule)
    assert done.dtype == BF16
    error, reference = ((x.double() - truth).norm() / truth.norm() for x in (done, plain))
    assert error <= reference


def test_with_kernels_the_gram_form_serves_sooner(symmetric):
    cpu = torch.device("cpu")
    assert _choose("auto", cpu, BF16, 64, 64, 5) == "gram"
    assert _choose("auto", cpu, BF16, 64, 128, 5) == "gram"
