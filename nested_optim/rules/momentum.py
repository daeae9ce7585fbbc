"""SGD with momentum, in the form of ``torch.optim.SGD``, as pure functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class MomentumState(NamedTuple):
    """What one update returns: new tensors, none of them an argument."""

    param: Tensor
    momentum_buffer: Tensor


def is_deferred(lr: float | Tensor) -> bool:
    """Whether a learning rate must take part as a tensor: in autograd, on a device, in a trace."""
    return isinstance(lr, Tensor) and (
        lr.requires_grad or not lr.is_cpu or torch.compiler.is_compiling()
    )


def decay(
    param: Tensor,
    grad: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    decoupled: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The parameter and the gradient that the momentum is to see.

    Weight decay is added to the gradient, as SGD does, or (``decoupled``) taken off the parameter.
    """
    if maximize:
        grad = -grad
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        if decoupled:  # rounded back: a 0-d tensor lr would promote a 0-d parameter
            param = (param * (1 - lr * weight_decay)).to(param.dtype)
        elif isinstance(weight_decay, Tensor):
            grad = torch.addcmul(grad, param, weight_decay)
        else:
            grad = torch.add(grad, param, alpha=weight_decay)
    return param, grad


def descend(param: Tensor, direction: Tensor, lr: float | Tensor) -> Tensor:
    """``param - lr * direction``, with SGD's roundings."""
    if is_deferred(lr):
        return (param - lr * direction).to(param.dtype)
    size: Any = -lr
    return torch.add(param, direction, alpha=size)


def momentum(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float | Tensor = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> MomentumState:
    r"""One update of SGD with momentum.

    .. math::
        b \leftarrow \alpha b + g, \qquad \theta \leftarrow \theta - \eta b

    In Nested Learning's words (arXiv 2512.24695, Eq. 33) ``b`` is a linear memory, trained by
    gradient descent on its dot product with the gradients that it is given, with decay.

    Args:
        param: the parameter, any shape.
        grad: its gradient, same shape and dtype.
        momentum_buffer: ``b``, same shape; zeros before the first update, which makes it ``g``.
        lr: learning rate ``eta``, a number or a tensor of one element.
        momentum: decay rate ``alpha`` of the buffer.
        weight_decay: weight of SGD's L2 penalty, or with ``decoupled`` of a decay like AdamW's.
        decoupled: shrink the parameter instead of adding to the gradient.
        maximize: ascend.

    Returns:
        The new parameter and buffer.
    """
    param, grad = decay(
        param, grad, lr=lr, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize
    )
    momentum_buffer = torch.add(momentum_buffer * momentum, grad)
    return MomentumState(descend(param, momentum_buffer, lr), momentum_buffer)
