"""Delta Gradient Descent (arXiv 2512.24695, Eq. 54-57) as pure functions, and plain descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sgd(
    param: Tensor,
    grad: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    maximize: bool = False,
) -> Tensor:
    r"""One step of plain descent, :math:`\theta - \eta\,(g + \lambda_{wd}\theta)`; a new tensor.

    The operations and their order are those of ``torch.optim.SGD`` without momentum, so equal
    inputs give equal bits.

    Args:
        param: the parameter, any shape.
        grad: its gradient, same shape and dtype.
        lr: learning rate, a number or a tensor of one element.
        weight_decay: weight of the L2 penalty.
        maximize: ascend.
    """
    grad = _penalised(param, grad, weight_decay, maximize)
    if isinstance(lr, Tensor) and lr.requires_grad:
        return torch.addcmul(param, grad, lr, value=-1).to(param.dtype)
    negative: Any = -lr
    return torch.add(param, grad, alpha=negative)


def dgd(
    param: Tensor,
    grad: Tensor,
    inputs: Tensor,
    *,
    lr: float | Tensor,
    decay: float,
    count: float | Tensor | None = None,
    scale: float | Tensor = 1.0,
    batch: str = "mean",
    weight_decay: float | Tensor = 0.0,
    maximize: bool = False,
) -> Tensor:
    r"""One step of Delta Gradient Descent on the weight of a layer :math:`y = W x`.

    With learning rate :math:`\eta`, decay :math:`\lambda`, gradient :math:`G`, and the layer's
    inputs :math:`x_1 \dots x_B` with :math:`S = \frac{1}{B} \sum_b x_b x_b^\top`, the step solves

    .. math::
        W_+ = \arg\min_W \langle W, G \rangle + \tfrac{\lambda}{2} \operatorname{tr}(W S W^\top)
            + \tfrac{1}{2\eta} \|W - W_t\|^2

    whose solution is ``batch="exact"``; ``batch="mean"`` needs no linear system, and forms no S
    but where that is less work (:func:`times_second_moment`):

    .. math::
        \text{exact:}\quad & W_+ = (W_t - \eta G)\,(I + \eta\lambda S)^{-1} \\
        \text{mean:}\quad & W_+ = W_t - e\,(G + \lambda W_t S), \qquad
            e = \frac{\eta}{1 + \eta\lambda \operatorname{tr} S}

    For one input :math:`G = g x^\top` and both are
    :math:`W_t (I - \lambda e\, x x^\top) - e\, g x^\top`, :math:`e = \eta / (1 + \eta\lambda
    |x|^2)`. They agree to first order in :math:`\eta`.

    Args:
        param: the weight as a matrix ``(outputs, inputs)``.
        grad: its gradient, same shape.
        inputs: the layer's inputs, ``(B, inputs)``, or a sample of them; rows of zeros may fill it
            up to a fixed size.
        lr: learning rate.
        decay: weight of :math:`|W x|^2 / 2`; 1 is Eq. 56, 0 is plain descent.
        count: how many rows of ``inputs`` stand for an input (default: all). None at all is plain
            descent.
        scale: factor of ``S``: 1 where ``grad`` belongs to a mean over inputs, their number where
            it belongs to a sum.
        batch: ``"mean"`` or ``"exact"``.
        weight_decay: weight of an L2 penalty, whose gradient is added to ``grad``.
        maximize: ascend the loss; the decay stays a decay.

    Returns:
        The new weight, in the weight's dtype: computed in at least float32, and rounded once. Only
        the products of ``"mean"`` are taken in bfloat16 where ``inputs`` are.
    """
    if decay == 0 or not len(inputs):
        return sgd(param, grad, lr=lr, weight_decay=weight_decay, maximize=maximize)
    wide = torch.promote_types(param.dtype, torch.float32)
    weight, grad = param.to(wide), grad.to(wide)
    grad = _penalised(weight, grad, weight_decay, maximize)
    lr, strength = _wide(lr, wide), decay * scale
    if batch == "mean":
        size = lr / (1 + lr * strength * mean_square(inputs, count, wide))
        new = weight - size * (grad + strength * times_second_moment(weight, inputs, count))
    else:
        rows = inputs.to(wide)
        factor = lr * strength / _at_least_one(len(rows) if count is None else count)
        if len(rows) == 1:
            return _of_one_input(weight, grad, rows, lr, factor).to(param.dtype)
        moved = weight - lr * grad
        # Woodbury: the system has the smaller side of the inputs.
        if rows.shape[0] < rows.shape[1]:
            system = factor * (rows @ rows.T)
            system.diagonal().add_(1)
            new = moved - factor * (_solve(system, rows @ moved.T).T @ rows)
        else:
            system = factor * (rows.T @ rows)
            system.diagonal().add_(1)
            new = _solve(system, moved.T).T
    return new.to(param.dtype)


def _of_one_input(weight: Tensor, grad: Tensor, row: Tensor, lr: Any, factor: Any) -> Tensor:
    """``"exact"`` for one input, however long: along it in closed form, across it by descent.

    A gradient that comes from this input alone points along it up to its own rounding, which times
    ``lr`` may exceed the whole change along it.
    """
    length = torch.linalg.vector_norm(row)
    unit = row / length.clamp(min=torch.finfo(row.dtype).tiny)
    along = grad @ unit.T
    across = grad - along @ unit
    noise = 16 * torch.finfo(grad.dtype).eps * torch.linalg.vector_norm(grad)
    across = torch.where(torch.linalg.vector_norm(across) > noise, across, 0)
    share = factor * length**2
    gone = (lr * along + share * (weight @ unit.T)) / (1 + share)
    new: Tensor = weight - lr * across - gone @ unit
    return new


def input_decay(
    param: Tensor,
    inputs: Tensor,
    *,
    lr: float | Tensor,
    decay: float,
    count: float | Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    r"""What another rule's step is to subtract: :math:`\frac{\eta\lambda}{1 + \eta\lambda
    \operatorname{tr} S}\, W S`.

    It is the part of :func:`dgd` with ``batch="mean"`` that does not come from the gradient. With a
    rule such as AdamW beside it there is no problem of which the sum is the solution.

    Args:
        param: the weight before that step, as a matrix ``(outputs, inputs)``.
        inputs, lr, decay, count, scale: as in :func:`dgd`.

    Returns:
        A matrix of ``param``'s shape, in its dtype, float32 or wider.
    """
    wide = torch.promote_types(param.dtype, torch.float32)
    lr, strength = _wide(lr, wide), decay * scale
    size = lr * strength / (1 + lr * strength * mean_square(inputs, count, wide))
    return size * times_second_moment(param.to(wide), inputs, count)


def mean_square(inputs: Tensor, count: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """The mean of ``|x|**2`` over inputs ``(B, inputs)``: the trace of ``S``, a 0-d tensor."""
    total = torch.linalg.vector_norm(inputs, dtype=dtype).square()
    mean: Tensor = total / _at_least_one(len(inputs) if count is None else count)
    return mean


def times_second_moment(weight: Tensor, inputs: Tensor, count: float | Tensor | None) -> Tensor:
    """``W S`` for a weight ``(outputs, inputs)`` and inputs ``(B, inputs)``.

    ``S`` is formed only where that takes fewer operations than ``(W X) X^T``: it is then at most
    twice as large as ``W``. bfloat16 inputs are multiplied as the layer multiplied them; the result
    has ``weight``'s dtype.
    """
    dtype = inputs.dtype
    if dtype is not torch.bfloat16:
        dtype = torch.promote_types(weight.dtype, torch.float32)
    rows, matrix = inputs.to(dtype), weight.to(dtype)
    batch, (outputs, features) = len(rows), weight.shape
    number = _at_least_one(batch if count is None else count)
    if forms_second_moment(batch, outputs, features):
        product = matrix @ (rows.T @ rows).div_(number)
    else:
        product = (matrix @ rows.T).div_(number) @ rows
    return product.to(weight.dtype)


def forms_second_moment(batch: int, outputs: int, features: int) -> bool:
    """Whether ``W S`` takes fewer operations with ``S`` formed than as ``(W X) X^T``."""
    return features * (batch + outputs) < 2 * outputs * batch


def _penalised(param: Tensor, grad: Tensor, weight_decay: Any, maximize: bool) -> Tensor:
    if maximize:
        grad = -grad
    if isinstance(weight_decay, Tensor) and weight_decay.requires_grad:
        return torch.addcmul(grad, param, weight_decay)
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        return torch.add(grad, param, alpha=weight_decay)
    return grad


def _wide(number: float | Tensor, dtype: torch.dtype) -> Any:
    """A 0-d tensor in this dtype, in which products with numbers are then rounded."""
    return number.to(dtype) if isinstance(number, Tensor) else number


def _at_least_one(count: float | Tensor) -> Any:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _solve(system: Tensor, right: Tensor) -> Tensor:
    # Without the check for singularity (there is none), which would wait for the device.
    solution: Tensor = torch.linalg.solve_ex(system, right, check_errors=False)[0]
    return solution
