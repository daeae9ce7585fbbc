"""M3, multi-scale momentum Muon (Nested Learning, Algorithm 1), as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .matrix_form import MatrixForm
from .newton_schulz import Coefficients, newton_schulz
from .root import moment_root

ADJUST_LR = ("match_rms_adamw", "original", "spectral")


class M3State(NamedTuple):
    """What one update returns: new tensors, or those given where an update leaves them alone."""

    param: Tensor
    momentum: Tensor
    slow_momentum: Tensor | None
    slow_update: Tensor | None
    second_moment: Tensor | None


def lr_factor(adjust_lr: str | None, rows: int, columns: int, out_dim: int = 0) -> float:
    """What the learning rate is multiplied by for a matrix of this shape.

    Args:
        adjust_lr: ``"match_rms_adamw"``: ``0.2 sqrt(max(rows, columns))``, which gives a
            semi-orthogonal update the RMS that AdamW's updates have (Liu et al. 2025).
            ``"spectral"``: ``sqrt(out / in)``. ``"original"``: ``sqrt(max(1, rows / columns))``
            (Jordan et al. 2024). None: 1.
        rows, columns: of the matrix.
        out_dim: 0 if rows are outputs, 1 if columns are.
    """
    if not rows or not columns:
        return 1.0
    out, fan_in = (rows, columns) if out_dim == 0 else (columns, rows)
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if adjust_lr == "spectral":
        return math.sqrt(out / fan_in)
    if adjust_lr == "original":
        return math.sqrt(max(1, out / fan_in))
    return 1.0


def m3_momenta(
    grad: Tensor,
    momentum: Tensor,
    slow_momentum: Tensor | None,
    *,
    opens: bool | Tensor,
    betas: Sequence[float],
    slow_frequency: int,
    nesterov: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""The two momenta after one gradient, and what the fast one hands to Newton-Schulz.

    .. math::
        M_1 \leftarrow \beta_1 M_1 + (1-\beta_1) g, \qquad
        M_2 \leftarrow \beta_3^{[\text{a chunk opens}]} M_2 + \tfrac{1-\beta_3}{f} g

    so that over a chunk of ``f`` gradients :math:`M_2` becomes
    :math:`\beta_3 M_2 + (1-\beta_3) \bar g`, and no sum of gradients has to be kept beside it.

    Args:
        grad: the gradient, of any shape; momenta are of the same.
        opens: whether this gradient is the first of a chunk: a bool, or a 0-d bool tensor.
        betas: ``(beta1, beta2, beta3)``.
        slow_frequency: gradients in a chunk, ``f``.
        nesterov: look ahead, ``(1-beta1) g + beta1 M1`` instead of ``M1``.

    Returns:
        ``(lookahead, momentum, slow_momentum)``.
    """
    beta1, _, beta3 = betas
    momentum = torch.lerp(momentum, grad, 1 - beta1)
    lookahead = torch.lerp(grad, momentum, beta1) if nesterov else momentum
    if slow_momentum is not None:
        if isinstance(opens, Tensor):
            slow_momentum = slow_momentum * torch.where(opens, beta3, 1.0).to(slow_momentum.dtype)
        elif opens:
            slow_momentum = slow_momentum * beta3
        share = (1 - beta3) / slow_frequency
        slow_momentum = torch.add(slow_momentum, grad.to(slow_momentum.dtype), alpha=share)
    return lookahead, momentum, slow_momentum


def m3_direction(
    fast: Tensor,
    slow: Tensor | None,
    second_moment: Tensor | None,
    *,
    alpha: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    r"""The direction of an update from the two orthogonalised momenta.

    .. math::
        U = O_1 + \alpha O_2, \qquad v \leftarrow \beta_2 v + (1-\beta_2) U^2, \qquad
        U \leftarrow \frac{U}{\sqrt v + \epsilon}, \qquad
        U \leftarrow \frac{\|O_1\|_F}{\|U\|_F} U

    The last scaling gives ``U`` the size that Muon's update has, whatever was added or divided by.
    (It also makes a bias correction of ``v`` superfluous.)

    Args:
        fast: ``O1``, shape (batch, rows, columns).
        slow: ``O2``, same shape, or None (``alpha`` is 0).
        second_moment: ``v``, of the same shape, or of size 1 along the dimension over which squares
            are averaged; None: no division.
        alpha: weight of the slow momentum.
        beta2: decay rate of ``v``.
        eps: added to the denominator.

    Returns:
        ``(direction, ratio, second_moment)``: the update is ``ratio * direction``, with ``ratio``
        of shape (batch, 1, 1), or None for 1.
    """
    if slow is None and second_moment is None:
        return fast, None, None
    direction = fast if slow is None else torch.add(fast, slow, alpha=alpha)
    if second_moment is not None:
        squares = direction.square()
        kept = zip(second_moment.shape[1:], squares.shape[1:])
        if averaged := [i for i, (mine, whole) in enumerate(kept, 1) if mine < whole]:
            squares = squares.mean(averaged, keepdim=True)
        second_moment = torch.lerp(second_moment, squares, 1 - beta2)
        direction = direction / (moment_root(second_moment) + eps)
    sizes = [torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (fast, direction)]
    ratio = sizes[0] / sizes[1].clamp(min=torch.finfo(sizes[1].dtype).tiny)
    return direction, ratio, second_moment


def m3(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    slow_momentum: Tensor | None = None,
    slow_update: Tensor | None = None,
    second_moment: Tensor | None = None,
    *,
    position: int | Tensor,
    lr: float | Tensor,
    betas: Sequence[float],
    alpha: float,
    slow_frequency: int,
    schedule: Sequence[Coefficients],
    ns_dtype: torch.dtype,
    eps: float,
    weight_decay: float | Tensor,
    adjust_lr: str | None,
    nesterov: bool,
    form: MatrixForm | None = None,
    maximize: bool = False,
) -> M3State:
    r"""One update of M3's usable form.

    .. math::
        O_1 = \mathrm{NS}(M_1), \qquad
        \theta \leftarrow (1 - \eta\lambda)\theta - \eta\, s\, U(O_1, O_2, v), \qquad
        O_2 \leftarrow \mathrm{NS}(M_2) \text{ where a chunk ends}

    with the momenta of :func:`m3_momenta`, the direction ``U`` of :func:`m3_direction` and the
    factor ``s`` of :func:`lr_factor`. A fresh ``O2`` serves from the next update on, as in
    Algorithm 1. With ``alpha=0`` and no second moment this is ``torch.optim.Muon``, in its
    operations and their order.

    Args:
        param: the parameter, of a shape that ``form`` can read.
        grad: its gradient, same shape and dtype.
        momentum: ``M1``, same shape and dtype.
        slow_momentum: ``M2``, same shape; None with ``alpha=0``.
        slow_update: ``O2``, same shape, zeros before the first chunk ends; None with ``alpha=0``.
        second_moment: ``v``, of the parameter's shape or of ``form.row_shape``; None for none.
        position: updates that the running chunk holds before this one, ``0 <= position < f``. A
            tensor keeps the whole computation on its device: ``O2`` is then computed at every
            update, and kept where a chunk ends.
        lr, weight_decay: ``eta`` and ``lambda``.
        betas: ``(beta1, beta2, beta3)``, decay rates of ``M1``, ``v`` and ``M2``.
        alpha: weight of the slow momentum.
        slow_frequency: updates per chunk, ``f``.
        schedule: Newton-Schulz coefficients, one triple per step.
        ns_dtype: dtype of the Newton-Schulz products.
        eps: smallest norm that is normalised, and the second moment's guard against 0.
        adjust_lr: see :func:`lr_factor`.
        nesterov: Nesterov's form of the fast momentum.
        form: how the parameter is read as matrices.
        maximize: ascend.

    Returns:
        The new parameter and state.
    """
    form = form or MatrixForm()
    grad = -grad if maximize else grad
    opens = position == 0
    lookahead, momentum, slow_momentum = m3_momenta(
        grad,
        momentum,
        slow_momentum,
        opens=opens,
        betas=betas,
        slow_frequency=slow_frequency,
        nesterov=nesterov,
    )
    param = (param * (1 - lr * weight_decay)).to(param.dtype)
    slows = form.split(slow_update) if slow_update is not None else None
    seconds = form.split(second_moment) if second_moment is not None else None
    moved, new_seconds = [], []
    work = torch.promote_types(param.dtype, torch.float32)
    for i, (old, matrix) in enumerate(zip(form.split(param), form.split(lookahead))):
        fast = _orthogonal(matrix, schedule, ns_dtype, eps)
        direction, ratio, second = m3_direction(
            fast if slows is None and seconds is None else fast.to(work),
            slows[i].to(work) if slows is not None else None,
            seconds[i] if seconds is not None else None,
            alpha=alpha,
            beta2=betas[1],
            eps=eps,
        )
        size = lr * lr_factor(adjust_lr, matrix.size(1), matrix.size(2), form.out_dim)
        if ratio is None and not isinstance(size, Tensor):
            moved.append(torch.add(old, direction, alpha=-size))
        else:
            factor = size if ratio is None else size * ratio
            moved.append((old - factor * direction.to(work)).to(old.dtype))
        new_seconds.append(second)
    param = form.join(moved, param.shape)
    if second_moment is not None:
        second_moment = form.join([s for s in new_seconds if s is not None], second_moment.shape)

    if slow_momentum is not None and slow_update is not None:
        ends = position + 1 >= slow_frequency
        if isinstance(ends, Tensor) or ends:
            parts = [_orthogonal(m, schedule, ns_dtype, eps) for m in form.split(slow_momentum)]
            if isinstance(ends, Tensor):
                stale = form.split(slow_update)
                parts = [torch.where(ends, x.to(y.dtype), y) for x, y in zip(parts, stale)]
            slow_update = form.join(parts, param.shape).to(slow_update.dtype)
    return M3State(param, momentum, slow_momentum, slow_update, second_moment)


def m3_paper(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    slow_momentum: Tensor,
    slow_update: Tensor,
    second_moment: Tensor,
    *,
    position: int,
    lr: float | Tensor,
    betas: Sequence[float],
    alpha: float,
    slow_frequency: int,
    schedule: Sequence[Coefficients],
    ns_dtype: torch.dtype,
    eps: float,
    weight_decay: float | Tensor,
    form: MatrixForm | None = None,
    maximize: bool = False,
) -> M3State:
    r"""One update of Algorithm 1 to the letter, with decoupled weight decay added to it.

    .. math::
        M_1 \leftarrow M_1 + \beta_1 g, \quad V \leftarrow V + \beta_2 g^2, \quad
        \theta \leftarrow \theta - \eta\,
            \frac{\mathrm{NS}(M_1) + \alpha O_2}{\sqrt V + \epsilon}, \quad
        M_2 \leftarrow M_2 + \beta_3 \sum_{\text{chunk}} g, \quad
        O_2 \leftarrow \mathrm{NS}(M_2) \text{ where a chunk ends}

    The betas are write rates; nothing decays. Arguments as for :func:`m3`; with an empty
    ``schedule`` (no Newton-Schulz steps) parameters may be of any shape.
    """
    beta1, beta2, beta3 = betas
    grad = -grad if maximize else grad
    momentum = momentum + beta1 * grad
    second_moment = second_moment + beta2 * grad.square()
    slow_momentum = slow_momentum + beta3 * grad.to(slow_momentum.dtype)

    def orthogonal(matrix: Tensor) -> Tensor:
        if not schedule:
            return matrix.to(param.dtype)
        parts = (form or MatrixForm()).split(matrix)
        done = [_orthogonal(part, schedule, ns_dtype, eps) for part in parts]
        return (form or MatrixForm()).join(done, matrix.shape).to(param.dtype)

    step = (orthogonal(momentum) + alpha * slow_update.to(param.dtype)) / (
        second_moment.sqrt() + eps
    )
    param = (param * (1 - lr * weight_decay)).to(param.dtype)
    param = (param - lr * step).to(param.dtype)
    if position + 1 >= slow_frequency:
        slow_update = orthogonal(slow_momentum).to(slow_update.dtype)
    return M3State(param, momentum, slow_momentum, slow_update, second_moment)


def _orthogonal(
    matrices: Tensor, schedule: Sequence[Coefficients], ns_dtype: torch.dtype, eps: float
) -> Tensor:
    """Newton-Schulz of a (batch, rows, columns) tensor, in ``ns_dtype``."""
    if matrices.size(0) == 1:  # a matrix by itself, as torch multiplies it
        return newton_schulz(matrices[0].to(ns_dtype), schedule, eps).unsqueeze(0)
    return newton_schulz(matrices.to(ns_dtype), schedule, eps)
