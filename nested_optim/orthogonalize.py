"""Newton-Schulz on many matrices at once: batched by shape, on the short side, cheaply.

:func:`nested_optim.rules.newton_schulz` is the truth for one matrix; what is here computes the same
with fewer launches and fewer operations. Three forms of one iteration are at hand:

- ``"bmm"``: the iteration as it is written, with batched products;
- ``"symmetric"``: the same, with half of each product whose result is symmetric left out (Triton,
  on CUDA);
- ``"gram"``: the iteration on the Gram matrix ``R = X X^T`` alone. Every factor of the iteration is
  a polynomial of ``R``, so the factors multiply up to one ``Q``, and ``X`` is met only twice: in
  ``R`` and in ``Q X``. For ``X`` of shape (n, m), n < m, this trades products of ``n n m``
  multiplications for products of ``n n n``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from . import kernels
from .rules.newton_schulz import Coefficients, newton_schulz

BACKENDS = ("auto", "bmm", "symmetric", "gram")

# A step of the Gram form multiplies the rounding error of R by up to a * a, about 12, in directions
# of small singular values, so R is made anew from X after so many steps. In float16 three steps,
# then two, end as near the truth as five of the plain form in float16; four, then one, do not.
_STEPS_PER_GRAM = {torch.float16: 3, torch.bfloat16: 1, torch.float32: 3, torch.float64: 6}


# The kernel's products are placed by 32-bit numbers.
_MOST_ROWS = 46340


class Batch(NamedTuple):
    """Matrices of one shape that are orthogonalised together."""

    #: Where they are in the list that was given.
    indices: list[int]
    #: How many matrices each of them holds.
    counts: list[int]
    #: Shape (matrices, rows, columns).
    result: Tensor


def ns_dtype_for(param: Tensor, name: torch.dtype | None) -> torch.dtype:
    """The dtype of a parameter's orthogonalised momentum.

    By default bfloat16 on an accelerator, as ``torch.optim.Muon`` has it; on a CPU, few of which
    multiply in bfloat16 at a useful speed, float32; for a float64 parameter float64.
    """
    if name is not None:
        return name
    if param.dtype == torch.float64:
        return torch.float64
    return torch.float32 if param.device.type == "cpu" else torch.bfloat16


def orthogonalize(
    matrices: Sequence[Tensor],
    schedule: Sequence[Coefficients],
    *,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float32,
    max_batch_bytes: int = 2**31,
    backend: str = "auto",
) -> list[Tensor]:
    """Newton-Schulz of each tensor, those of one shape together.

    Args:
        matrices: tensors of shape (batch, rows, columns), of any device and floating dtype.
        schedule: coefficients, one triple per step (:func:`nested_optim.rules.ns_schedule`).
        eps: smallest Frobenius norm that is normalised to 1.
        dtype: of the result. The products are computed in it, or in a dtype that is no less
            accurate (float16 for bfloat16: normalised matrices do not need its range).
        max_batch_bytes: bound of the temporary memory of one batch; a single matrix may exceed it.
        backend: ``"auto"`` chooses by device and shape, the others ask for a form by name.

    Returns:
        Tensors of the shapes of ``matrices``, in ``dtype``.

    Raises:
        ValueError: an unknown backend, or one that does not run on these tensors.
    """
    results: list[Tensor | None] = [None] * len(matrices)
    for batch in orthogonal_batches(
        matrices,
        schedule,
        eps=eps,
        dtype=dtype,
        max_batch_bytes=max_batch_bytes,
        backend=backend,
    ):
        for i, part in zip(batch.indices, batch.result.split(batch.counts)):
            results[i] = part
    return [result for result in results if result is not None]


def orthogonal_batches(
    matrices: Sequence[Tensor],
    schedule: Sequence[Coefficients],
    *,
    eps: float,
    dtype: torch.dtype,
    max_batch_bytes: int,
    backend: str = "auto",
    as_computed: bool = False,
    norms: Sequence[Tensor | None] | None = None,
) -> Iterator[Batch]:
    """The same, batch by batch, so that a caller can go on with each batch and then let it go.

    With ``as_computed`` results may be left in float16 where ``dtype`` is bfloat16. Of tensors
    whose Frobenius norms are known, shape (batch, 1, 1) and at least float32, ``norms`` has them.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Invalid backend: {backend!r}. Choose one of {', '.join(BACKENDS)}")
    buckets: dict[tuple[torch.device, torch.Size], list[int]] = {}
    for i, matrix in enumerate(matrices):
        buckets.setdefault((matrix.device, matrix.shape[1:]), []).append(i)
    together: dict[tuple[torch.device, int], list[int]] = {}
    for (device, (rows, columns)), indices in buckets.items():
        short, long = sorted((rows, columns))
        chosen = _choose(backend, device, dtype, short, long, len(schedule))
        if chosen == "gram":
            together.setdefault((device, short), []).extend(indices)
            continue
        for some in _within(matrices, indices, dtype, max_batch_bytes):
            x = _stacked([matrices[i] for i in some])
            tall = rows > columns
            norm = _known(matrices, norms, some)
            result = _iterate(x.mT if tall else x, schedule, eps, dtype, chosen, norm)
            yield Batch(some, [matrices[i].size(0) for i in some], result.mT if tall else result)
    for (device, _), indices in together.items():
        work = _work_dtype(dtype, device)
        for group in _within(matrices, indices, dtype, max_batch_bytes):
            alike = [list(run) for _, run in groupby(group, lambda i: matrices[i].shape[1:])]
            xs = [
                _normalised(
                    _stacked([matrices[i] for i in some]), eps, work, _known(matrices, norms, some)
                )
                for some in alike
            ]
            for some, x in zip(alike, _gram(xs, schedule)):
                done = x if as_computed else x.to(dtype)
                yield Batch(some, [matrices[i].size(0) for i in some], done)


def _bytes_each(dtype: torch.dtype, short: int, long: int) -> int:
    """Temporary memory of one matrix."""
    return dtype.itemsize * (3 * short * long + 5 * short * short)


def _within(
    matrices: Sequence[Tensor], indices: list[int], dtype: torch.dtype, max_bytes: int
) -> Iterator[list[int]]:
    """The indices in order, as many at a time as the memory allows (or one)."""
    some: list[int] = []
    total = 0
    for i in indices:
        count, rows, columns = matrices[i].shape
        size = count * _bytes_each(dtype, *sorted((rows, columns)))
        if some and total + size > max_bytes:
            yield some
            some, total = [], 0
        some.append(i)
        total += size
    if some:
        yield some


def _stacked(given: list[Tensor]) -> Tensor:
    """(matrices, rows, columns) of tensors of one shape: a view where they follow each other."""
    first = given[0]
    if len(given) == 1:
        return first
    size = first[0].numel() * first.element_size()
    at = first.data_ptr()
    for x in given:
        same = x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and x.is_contiguous() and x.dtype == first.dtype and x.data_ptr() == at):
            return torch.cat(given)
        at += x.size(0) * size
    return first.as_strided((sum(x.size(0) for x in given), *first.shape[1:]), first.stride())


def _choose(
    backend: str, device: torch.device, dtype: torch.dtype, short: int, long: int, steps: int
) -> str:
    symmetric = kernels.available(device) and dtype in (torch.float16, torch.bfloat16)
    symmetric = symmetric and short <= _MOST_ROWS
    if backend == "symmetric" and not symmetric:
        raise ValueError(
            "backend='symmetric' needs Triton, a CUDA device, float16 or bfloat16, and at most "
            f"{_MOST_ROWS} rows or columns, but the matrices are {dtype} on {device} and their "
            f"short side is {short}; leave it at 'auto'"
        )
    if backend != "auto":
        return backend
    if not steps or not short:
        return "bmm"
    # Multiplications per n*n, a symmetric product counted by half where it is computed by half.
    # Where they are as many the Gram form has fewer launches.
    half = 1 if symmetric else 2
    lengths = _segments(steps, _STEPS_PER_GRAM[_work_dtype(dtype, device)])
    squares = sum(4 * length - 3 for length in lengths)
    plain = steps * ((half + 2) * long + half * short)
    gram = len(lengths) * (half + 2) * long + squares * half * short
    if gram < plain or (symmetric and gram == plain):
        return "gram"
    return "symmetric" if symmetric else "bmm"


def _work_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """float16 for bfloat16: of the same speed, and of three more bits where nothing exceeds 1."""
    if dtype == torch.bfloat16 and kernels.available(device):
        return torch.float16
    return dtype


def _segments(steps: int, length: int) -> list[int]:
    """``steps`` cut into runs of at most ``length``, the longest first."""
    runs = -(-steps // length)
    shortest, longer = divmod(steps, runs)
    return [shortest + 1] * longer + [shortest] * (runs - longer)


def _norm(x: Tensor) -> Tensor:
    # At least float32 until the scale is known: float16 would lose small gradients.
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
    return norm


def _known(
    matrices: Sequence[Tensor], norms: Sequence[Tensor | None] | None, some: list[int]
) -> Tensor | None:
    """Norms of some tensors, if those of one of them were given."""
    given = [None if norms is None else norms[i] for i in some]
    if all(norm is None for norm in given):
        return None
    found = [_norm(matrices[i]) if norm is None else norm for i, norm in zip(some, given)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _normalised(x: Tensor, eps: float, dtype: torch.dtype, norm: Tensor | None = None) -> Tensor:
    """(matrices, rows, columns), each of Frobenius norm 1."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = (_norm(x) if norm is None else norm).clamp(min=eps)
    if wide == torch.float32 != dtype and kernels.available(x.device) and x.is_contiguous():
        from .kernels.normalize import divided

        return divided(x, norm, dtype)
    normalised: Tensor = (x / norm).to(dtype)
    return normalised


def _iterate(
    wide: Tensor,
    schedule: Sequence[Coefficients],
    eps: float,
    dtype: torch.dtype,
    backend: str,
    norm: Tensor | None,
) -> Tensor:
    """Newton-Schulz of a (matrices, short, long) tensor by one of the two plain forms."""
    if backend == "bmm" or not schedule:
        return newton_schulz(wide.to(dtype), schedule, eps)
    x = _normalised(wide, eps, _work_dtype(dtype, wide.device), norm)
    for a, b, c in schedule:
        gram = _half_product(x, x)
        polynomial = _half_product(gram, gram, alpha=c, plus=gram, beta=b)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    result: Tensor = x.to(dtype)
    return result


def _gram(xs: list[Tensor], schedule: Sequence[Coefficients]) -> list[Tensor]:
    """Newton-Schulz of (matrices, rows, columns) tensors that have their short side in common."""
    short = min(xs[0].shape[1:])
    counts = [len(x) for x in xs]
    product = _half_product if _halves(xs[0]) else _plain_product
    at = 0
    for length in _segments(len(schedule), _STEPS_PER_GRAM[xs[0].dtype]):
        r = xs[0].new_empty(sum(counts), short, short)
        for x, part in zip(xs, r.split(counts)):
            side = x if x.size(1) == short else x.mT
            product(side, side, out=part)
        q: Tensor | None = None
        for k, (a, b, c) in enumerate(schedule[at : at + length]):
            polynomial = product(r, r, alpha=c, plus=r, beta=b, diagonal=a)
            q = polynomial if q is None else product(polynomial, q)
            if k + 1 < length:
                r = product(product(polynomial, r), polynomial)
        assert q is not None
        parts = zip(xs, q.split(counts))
        xs = [torch.bmm(p, x) if x.size(1) == short else torch.bmm(x, p) for x, p in parts]
        at += length
    return xs


def _halves(x: Tensor) -> bool:
    fits = min(x.shape[1:]) <= _MOST_ROWS
    return fits and kernels.available(x.device) and x.dtype in (torch.float16, torch.bfloat16)


def _half_product(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    plus: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """``alpha a b^T + beta plus + diagonal I``, where that is symmetric, computed by half."""
    from .kernels.symmetric import symmetric_product

    return symmetric_product(a, b, alpha, plus, beta, diagonal, out)


def _plain_product(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    plus: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """The same by batched matrix products."""
    if plus is None:
        result = torch.bmm(a, b.mT, out=out)
        if alpha != 1.0:
            result *= alpha
    else:
        result = torch.baddbmm(plus, a, b.mT, beta=beta, alpha=alpha, out=out)
    if diagonal:
        result.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return result
