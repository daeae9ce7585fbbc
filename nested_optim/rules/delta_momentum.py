"""Delta Momentum (Nested Learning, arXiv 2512.24695, Eq. 48-49) as pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .momentum import MomentumState, decay, descend


def as_matrix(tensor: Tensor) -> Tensor:
    """The matrix as which the rule sees a tensor: ``(out, rest)``; a vector is one row."""
    if tensor.dim() < 2:
        return tensor.reshape(1, 1) if tensor.dim() == 0 else tensor.unsqueeze(0)
    return tensor.flatten(1)


def delta_term(
    buf: Tensor,
    grad: Tensor,
    *,
    rate: float,
    momentum: float,
    normalized: bool = False,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""What the buffer forgets along the present gradient: :math:`\rho\, b\, (g^\dagger g)`.

    .. math::
        \rho = \frac{r}{1 + r |g|^2 / \alpha}, \qquad \text{or normalized} \qquad
        \rho = \frac{r}{1 + r} \frac{\alpha}{|g|^2},

    with :math:`|g|` the Frobenius norm of each matrix, which is at least its spectral norm. So
    :math:`\rho |g|_2^2 < \alpha` whatever the gradient, and no singular value of
    :math:`\alpha I - \rho g^\dagger g` exceeds :math:`\alpha`. Gradients are brought to a norm of
    at most 1 first, so neither large nor small ones leave the range of their dtype.

    Args:
        buf: the buffer, ``(..., out, in)``; each matrix of a batch on its own.
        grad: the gradient, same shape and dtype, real or complex.
        rate: ``r``, at least 0, in units of 1 / gradient squared; if normalized, without unit.
        momentum: ``alpha``, above 0.
        normalized: count the rate in units of ``alpha / |g|**2``.
        product_dtype: real dtype in which the two products are taken, of buffer and gradient
            brought to norm 1 first; everything else is in at least float32, and the result is
            rounded once. None: all in ``buf``'s dtype.

    Returns:
        The term, of ``buf``'s shape and dtype. Products run over the smaller of ``out`` and ``in``.
    """
    rows, columns = grad.shape[-2:]
    if rows * columns == 0:
        return torch.zeros_like(buf)
    grad = grad.contiguous()  # sums go through memory, and are not to depend on its order
    if product_dtype is not None:
        return _term_of_units(buf, grad, rate, momentum, normalized, product_dtype)
    dtype = buf.dtype
    if dtype == torch.float16:  # where products of 1e3 overflow
        buf, grad = buf.float(), grad.float()
    dims, half = (-2, -1), grad.dtype == torch.bfloat16
    wide = torch.float32 if half else None
    # Of norm 1 / room, so that sums over rows of the buffer are no longer than its numbers. The
    # term depends on neither scale, so autograd need not see them.
    mean, unit = _to_mean_one(grad)
    norm = torch.linalg.vector_norm(unit.detach(), dim=dims, keepdim=True, dtype=wide).clamp(min=1)
    room = 2.0 ** math.ceil(math.log2(columns) / 2)
    unit = unit / (norm * room).to(unit.dtype if half else norm.dtype)
    square = (torch.linalg.vector_norm(unit, dim=dims, keepdim=True, dtype=wide) * room) ** 2
    if normalized:
        factor = momentum * (rate / (1 + rate)) / square.clamp(min=0.5)  # 1, or that of zeros
    else:
        scale = mean * norm
        factor = momentum / (momentum / (scale * rate * scale) + square)
    if half:
        factor = factor.to(dtype)
    if rows <= columns:
        term: Tensor = ((buf @ unit.mH) * factor) @ unit
    else:
        term = buf @ ((unit.mH @ unit) * factor)
    return term.mul_(room**2).to(dtype)


def _term_of_units(
    buf: Tensor, grad: Tensor, rate: float, momentum: float, normalized: bool, dtype: torch.dtype
) -> Tensor:
    """:func:`delta_term` with its products in ``dtype``."""
    rows, columns = grad.shape[-2:]
    kept = buf.dtype
    wide = torch.promote_types(torch.promote_types(kept, dtype), torch.float32)
    dtype = dtype.to_complex() if kept.is_complex else dtype
    buf_scale, buf = _to_mean_one(buf.to(wide))
    scale, grad = _to_mean_one(grad.to(wide))
    # Of numbers with mean magnitude 1, or of none but zeros.
    length = torch.linalg.vector_norm(buf, dim=(-2, -1), keepdim=True).clamp(min=1)
    norm = torch.linalg.vector_norm(grad, dim=(-2, -1), keepdim=True).clamp(min=1)
    square = norm**2
    if normalized:
        factor: float | Tensor = momentum * (rate / (1 + rate))
    else:
        factor = momentum * square / (momentum / (scale * rate * scale) + square)
    # Halfway between norm 1 and mean magnitude 1: neither the elements of large matrices nor sums
    # over them leave the range of float16.
    balance = (rows * columns) ** 0.25
    left, unit = (buf * (balance / length)).to(dtype), (grad * (balance / norm)).to(dtype)
    if rows <= columns:
        term: Tensor = ((left @ unit.mH) / balance) @ unit
    else:
        term = left @ ((unit.mH @ unit) / balance)
    term = (term.to(wide) * (factor * length / balance**2)) * buf_scale
    return term.to(kept)


def _to_mean_one(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The mean magnitude of each matrix, whatever its numbers are, and the matrix divided by it."""
    rows, columns = tensor.shape[-2:]
    room = 2.0 ** math.ceil(math.log2(rows * columns))  # or a sum would leave the dtype's range
    wide = torch.float32 if tensor.dtype == torch.bfloat16 else None
    shares = (tensor.detach() / room).abs()
    mean = shares.sum((-2, -1), keepdim=True, dtype=wide) * (room / (rows * columns))
    mean = mean.clamp(min=torch.finfo(tensor.dtype).tiny)
    return mean, tensor / mean.to(shares.dtype)


def delta_momentum(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    delta_rate: float,
    normalized: bool = False,
    product_dtype: torch.dtype | None = None,
    weight_decay: float | Tensor = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> MomentumState:
    r"""One update of Delta Momentum.

    .. math::
        b \leftarrow b\,(\alpha I - \rho\, g^\dagger g) + g, \qquad
        \theta \leftarrow \theta - \eta b

    It is gradient descent on an L2 regression, where plain momentum descends on a dot product:
    what the buffer already says along ``g`` is taken off before ``g`` is added. The paper gives the
    decay no rate, which long gradients make unstable; see :func:`delta_term` for :math:`\rho`. A
    tensor of more than two dimensions is the matrix ``(out, rest)``, one of fewer a single row.

    Args:
        param: the parameter, any shape.
        grad: its gradient, same shape and dtype.
        momentum_buffer: ``b``, same shape; zeros before the first update, which makes it ``g``.
        lr: learning rate ``eta``, a number or a tensor of one element.
        momentum: decay rate ``alpha`` of the buffer.
        delta_rate: ``r``; 0 is SGD with momentum.
        normalized: count ``r`` in units of ``alpha / |g|**2``.
        product_dtype: dtype of the products, as in :func:`delta_term`.
        weight_decay: weight of SGD's L2 penalty, or with ``decoupled`` of a decay like AdamW's.
        decoupled: shrink the parameter instead of adding to the gradient.
        maximize: ascend.

    Returns:
        The new parameter and buffer.
    """
    param, grad = decay(
        param, grad, lr=lr, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize
    )
    old = momentum_buffer
    momentum_buffer = torch.add(old * momentum, grad)
    if delta_rate and momentum:
        term = delta_term(
            as_matrix(old),
            as_matrix(grad),
            rate=delta_rate,
            momentum=momentum,
            normalized=normalized,
            product_dtype=product_dtype,
        )
        momentum_buffer = momentum_buffer - term.reshape(old.shape)
    return MomentumState(descend(param, momentum_buffer, lr), momentum_buffer)
