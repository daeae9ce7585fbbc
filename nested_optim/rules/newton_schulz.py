"""Newton-Schulz: the nearest semi-orthogonal matrix by matrix products alone, as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: One step ``X <- a X + b (X X^T) X + c (X X^T)^2 X``.
Coefficients = tuple[float, float, float]

# Amsel et al. 2025 (arXiv 2505.16932), Algorithm 1: the best odd polynomial for each step of a
# composition on singular values in [1e-3, 1]. All but the last are shrunk a little, so that values
# which rounding has pushed above 1 do not diverge.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

#: By name, one triple per step; the last one serves all further steps.
NAMED_COEFFICIENTS: dict[str, tuple[Coefficients, ...]] = {
    # Jordan et al. 2024 (Muon): steep at 0, and then within about [0.7, 1.2] for good.
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        *((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS),
        (1.875, -1.25, 0.375),
    ),
    # The classical iteration: converges to 1, slowly.
    "cubic": ((1.5, -0.5, 0.0),),
}


def ns_schedule(coefficients: Any, steps: int) -> tuple[Coefficients, ...]:
    """The coefficients of each of ``steps`` Newton-Schulz steps.

    Args:
        coefficients: a name (``"quintic"``, ``"polar_express"``, ``"cubic"``), one triple ``(a, b,
            c)`` for all steps, or a sequence of triples, whose last one serves all further steps.
        steps: how many, at least 0.

    Raises:
        ValueError: an unknown name, or no triples of finite numbers.
    """
    if isinstance(coefficients, str):
        if coefficients not in NAMED_COEFFICIENTS:
            names = ", ".join(NAMED_COEFFICIENTS)
            raise ValueError(
                f"Invalid ns_coefficients: {coefficients!r}. Choose one of {names}, or give (a, b, "
                "c)"
            )
        triples: Any = NAMED_COEFFICIENTS[coefficients]
    else:
        triples = coefficients
        try:
            triples = tuple(triples)
            if all(isinstance(x, (int, float)) for x in triples):
                triples = (triples,)
            triples = tuple(tuple(float(x) for x in triple) for triple in triples)
        except (TypeError, ValueError):
            triples = ()
        finite = all(abs(x) < float("inf") for triple in triples for x in triple)
        if not triples or any(len(triple) != 3 for triple in triples) or not finite:
            raise ValueError(
                f"Invalid ns_coefficients: {coefficients!r}. Give three finite numbers (a, b, c), a"
                f" sequence of such triples, or one of {', '.join(NAMED_COEFFICIENTS)}"
            )
    return tuple(triples[min(i, len(triples) - 1)] for i in range(steps))


def newton_schulz(matrix: Tensor, schedule: Sequence[Coefficients], eps: float = 1e-7) -> Tensor:
    r"""Push the singular values of a matrix towards 1 and keep its singular vectors.

    .. math::
        X_0 = M / \max(\|M\|_F, \epsilon), \qquad
        X_{k+1} = a_k X_k + \left(b_k X_k X_k^T + c_k (X_k X_k^T)^2\right) X_k

    on the transpose where that is the wider one, so that the products are of the short side. The
    operations and their order are those of ``torch.optim.Muon``, so equal inputs of two dimensions
    give equal bits.

    Args:
        matrix: shape (..., rows, columns); leading dimensions are a batch. Its dtype is that of the
            computation.
        schedule: coefficients ``(a, b, c)``, one triple per step (:func:`ns_schedule`). Without
            any, ``matrix`` is returned as it is, not normalised.
        eps: a matrix of a smaller Frobenius norm is scaled up by ``1 / eps`` only.

    Returns:
        The result, of the shape and dtype of ``matrix``. Zeros stay zeros.
    """
    if not schedule:
        return matrix
    matrix = matrix.contiguous()  # the order in which products are summed is not the layout's
    wide = matrix.mT if matrix.size(-2) > matrix.size(-1) else matrix
    batched = wide.flatten(0, -3) if wide.ndim > 3 else wide
    norm = torch.linalg.vector_norm(batched, dim=(-2, -1), keepdim=True)
    x: Tensor = batched / norm.clamp(min=eps)
    plus_product: Any = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in schedule:
        gram = x @ x.mT
        polynomial = plus_product(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        x = plus_product(x, polynomial, x, beta=a)
    x = x.reshape(wide.shape)
    return x.mT if wide is not matrix else x
