"""AdamW whose step size, momentum and mixture of momenta are given from outside, as pure functions.

One update of one tensor, and what the loss at the next gradient says about its inputs. Who gives
them (learned networks, in ``DeepNestedOptimizer``) is nothing to these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adamw import bias_corrections


class DeepNestedState(NamedTuple):
    """What one update returns: new tensors, none of them an argument."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor | None
    max_exp_avg_sq: Tensor | None
    slow: tuple[Tensor, ...]
    grad: Tensor  # as the moments saw it: with an L2 penalty, and for ascent with its sign turned


class Inputs(NamedTuple):
    """What an update takes beside gradient and state: 0-d tensors, or None for a part left out.

    ``multiplier`` scales the learning rate (and with it decoupled weight decay); ``scale``,
    ``shift`` and ``damping`` change the fastest momentum; ``mixing``, ``(momenta,)``, mixes the
    momenta. (1, 1, 0, 0, (1, 0, ...)) is AdamW, to the last bit.
    """

    multiplier: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    damping: Tensor | None = None
    mixing: Tensor | None = None


class _Root(torch.autograd.Function):
    """The square root, whose derivative at 0 is taken to be 0.

    A second moment is 0 where every gradient was: the root of its square, |g|, has 0 among its
    subgradients there, where infinity times 0 would be no number.

    ``moment_root`` has the same values and first derivatives, and higher ones, for a mask in the
    graph. This one keeps no mask: one per step is 5 to 10 % of what an exact unroll holds.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return torch.where(root > 0, grad / (2 * root), 0.0)


def _root(x: Tensor) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _Root.apply(x)  # type: ignore[no-any-return]
    return x.sqrt()


def slow_weight(step: float, frequency: int, beta: Any) -> Any:
    """The weights that a slow momentum's gradients add up to after ``step`` updates.

    It decays by ``beta`` where a chunk of ``frequency`` updates opens, and takes each gradient with
    ``(1 - beta) / frequency``.
    """
    chunks = (step - 1) // frequency
    in_chunk = step - chunks * frequency
    return beta * (1 - beta**chunks) + (1 - beta) * in_chunk / frequency


def slow_momentum(momentum: Tensor, grad: Tensor, step: float, frequency: int, beta: float) -> Any:
    """A momentum that averages the means of chunks of ``frequency`` gradients, in one tensor.

    After the last update of a chunk it is ``beta`` times what it was after the chunk before, plus
    ``1 - beta`` times the chunk's mean. Within a chunk it is on its way there.
    """
    if (step - 1) % frequency == 0:
        momentum = momentum * beta
    return torch.add(momentum, grad.to(momentum.dtype), alpha=(1 - beta) / frequency)


def product(*factors: Tensor | None) -> Tensor | None:
    """The product of those that are there; None if there are none."""
    given = [factor for factor in factors if factor is not None]
    if not given:
        return None
    result = given[0]
    for factor in given[1:]:
        result = result * factor
    return result


def coefficients(
    inputs: Inputs, step: float, beta: float, frequencies: Sequence[int]
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """What the numerator multiplies the fastest momentum, the gradient and the slow ones by.

    None leaves the momentum as it is, or the gradient out. Inputs may be ``(tensors,)`` as well as
    0-d.
    """
    multiplier, scale, shift, _, mixing = inputs
    first = None if mixing is None else mixing[0]
    correction = 1 - beta**step
    fast = product(multiplier, first, scale)
    now = None
    if shift is not None:
        now = product(multiplier, first, shift * correction)
    slow = []
    for i, frequency in enumerate(frequencies[1:], start=1):
        assert mixing is not None
        weight = product(multiplier, mixing[i])
        assert weight is not None
        slow.append(weight * (correction / slow_weight(step, frequency, beta)))
    return fast, now, slow


def deep_nested(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor | None = None,
    max_exp_avg_sq: Tensor | None = None,
    slow: Sequence[Tensor] = (),
    *,
    step: float,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    frequencies: Sequence[int] = (1,),
    inputs: Inputs = Inputs(),  # noqa: B008 (a tuple)
    root: Callable[[Tensor], Tensor] | None = None,
) -> DeepNestedState:
    r"""One update.

    .. math::
        m &\leftarrow \beta_1 (1 - d)\, m + (1-\beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        n &= w_0 (s\, \hat m + b\, g) + \sum_{i>0} w_i \hat m_i \\
        \theta &\leftarrow (1 - \eta\mu\lambda)\,\theta
            - \eta\mu\, \frac{n}{\sqrt{\hat v} + \epsilon}

    with hats for averages corrected for their start, multiplier :math:`\mu`, scale s, shift b,
    damping d, mixing w, and slow momenta :math:`m_i` (:func:`slow_momentum`). Where the inputs are
    ``Inputs()`` or (1, 1, 0, 0, (1, 0, ...)), :func:`adamw` has the same bits.

    Args:
        param: the parameter, any shape; a complex one is updated as its real and imaginary parts.
        grad: its gradient, same shape and dtype.
        exp_avg: fastest momentum ``m``, same shape.
        exp_avg_sq: second moment ``v``; None leaves out the division.
        max_exp_avg_sq: largest second moment so far (AMSGrad), or None.
        slow: one momentum for each of ``frequencies`` but the first, in any dtype.
        step: how many updates there will have been with this one, a number ``>= 1``.
        lr: learning rate ``eta``, a number or a tensor of one element, which may be in autograd.
        betas: decay rates of momenta and second moment, numbers.
        eps: added to the denominator.
        weight_decay: ``lambda``; with ``decoupled=False`` the weight of Adam's L2 penalty.
        decoupled: shrink the parameter instead of adding to the gradient.
        maximize: ascend.
        frequencies: updates per chunk of each momentum, the first of them 1.
        inputs: what changes the update, real 0-d tensors in any dtype.
        root: the square root that the second moment goes through, finite in its derivative at 0;
            None takes one that can be differentiated once, in little memory.

    Returns:
        The new parameter and state.
    """
    beta1, beta2 = betas
    is_complex = param.is_complex()
    if maximize:
        grad = -grad
    if not isinstance(weight_decay, (int, float)) or weight_decay != 0:
        if decoupled:
            rate: Any = lr * weight_decay
            if inputs.multiplier is not None:
                rate = rate * inputs.multiplier
            param = _times(param, 1 - rate)
        elif isinstance(weight_decay, Tensor):
            grad = torch.addcmul(grad, param, weight_decay)
        else:
            grad = torch.add(grad, param, alpha=weight_decay)
    if is_complex:
        param, grad, exp_avg = map(torch.view_as_real, (param, grad, exp_avg))
        exp_avg_sq, max_exp_avg_sq = (
            None if t is None else torch.view_as_real(t) for t in (exp_avg_sq, max_exp_avg_sq)
        )
        slow = [torch.view_as_real(t) for t in slow]

    if inputs.damping is not None:
        exp_avg = _times(exp_avg, 1 - inputs.damping)
    exp_avg = torch.lerp(exp_avg, grad, 1 - beta1)
    slow = [slow_momentum(m, grad, step, f, beta1) for m, f in zip(slow, frequencies[1:])]
    fast, now, others = coefficients(inputs, step, beta1, frequencies)
    numerator = exp_avg if fast is None else _times(exp_avg, fast)
    if now is not None:
        numerator = numerator + _times(grad, now)
    for momentum, weight in zip(slow, others):
        numerator = numerator + _times(momentum, weight).to(numerator.dtype)

    correction1, correction2 = bias_corrections(step, betas)
    size: Any = -(lr / correction1)
    # torch takes the factor of a sum as a number, which has no gradient.
    learns = isinstance(size, Tensor) and size.requires_grad
    if exp_avg_sq is None:
        if learns:
            param = (param + size * numerator).to(param.dtype)
        else:
            param = torch.add(param, numerator, alpha=size)
    else:
        exp_avg_sq = torch.addcmul((exp_avg_sq * beta2).to(grad.dtype), grad, grad, value=1 - beta2)
        second = exp_avg_sq
        if max_exp_avg_sq is not None:
            max_exp_avg_sq = second = torch.maximum(max_exp_avg_sq, exp_avg_sq)
        denominator = ((root or _root)(second) / correction2**0.5).add_(eps)
        if learns:
            param = (param + size * (numerator / denominator)).to(param.dtype)
        else:
            param = torch.addcdiv(param, numerator, denominator, value=size)

    if is_complex:
        param, grad, exp_avg = map(torch.view_as_complex, (param, grad, exp_avg))
        exp_avg_sq, max_exp_avg_sq = (
            None if t is None else torch.view_as_complex(t) for t in (exp_avg_sq, max_exp_avg_sq)
        )
        slow = [torch.view_as_complex(t) for t in slow]
    return DeepNestedState(param, exp_avg, exp_avg_sq, max_exp_avg_sq, tuple(slow), grad)


def _times(tensor: Tensor, factor: Any) -> Tensor:
    result: Tensor = tensor * factor_for(tensor, factor)
    return result.to(tensor.dtype)


def factor_for(tensor: Tensor, factor: Any) -> Any:
    """A factor that multiplies this tensor as a number would.

    Numbers and 0-d tensors are rounded to the dtype in which the product is computed, but not
    before the product of two 0-d tensors.
    """
    if tensor.dim() or not isinstance(factor, Tensor):
        return factor
    dtype = tensor.real.dtype if tensor.is_complex() else tensor.dtype
    return factor.to(torch.promote_types(dtype, torch.float32))


# ------------------------------------------------------------------ what the next gradient says


def alignments(
    grad: Tensor,
    param: Tensor,
    last_grad: Tensor,
    exp_avg: Tensor,
    second: Tensor | None = None,
    slow: Sequence[Tensor] = (),
    *,
    step: float,
    betas: Sequence[Any],
    eps: float,
    frequencies: Sequence[int] = (1,),
) -> tuple[Tensor, Tensor]:
    r"""Products of a gradient with the parts of the update before it.

    Args:
        grad: the gradient of the loss now, any shape.
        param: the parameter, as that update left it.
        last_grad: the gradient as that update's moments saw it (``DeepNestedState.grad``).
        exp_avg: its fastest momentum, as it left it.
        second: the second moment that it divided by, or None.
        slow: its slow momenta.
        step: its step, ``>= 1``.
        betas: its two decay rates, numbers or 0-d tensors.
        eps: its.
        frequencies: of its momenta.

    Returns:
        ``(3 + slow momenta,)``: with :math:`h = g / (\sqrt{\hat v} + \epsilon)`, the products of g
        with the parameter, and of h with :math:`\hat m`, the last gradient, and each
        :math:`\hat m_i`. ``(2,)``: the squared lengths of g and of
        :math:`\hat m / (\sqrt{\hat v} + \epsilon)`.
    """
    correction1, correction2 = bias_corrections(step, (betas[0], betas[1]))
    wide = torch.promote_types(param.dtype, torch.float32)
    tensors = [grad, param, last_grad, exp_avg, *slow]
    if param.is_complex():
        tensors = [torch.view_as_real(t) for t in tensors]
        second = None if second is None else torch.view_as_real(second)
        wide = wide.to_real()
    grad, param, last_grad, exp_avg, *slow = (t.to(wide).reshape(-1) for t in tensors)
    scaled, direction = grad, exp_avg
    if second is not None:
        denominator = (second.to(wide).reshape(-1).sqrt() / correction2**0.5).add_(eps)
        scaled, direction = grad / denominator, exp_avg / denominator
    weights = [slow_weight(step, f, betas[0]) for f in frequencies[1:]]
    products = [
        torch.dot(grad, param),
        torch.dot(scaled, exp_avg) / correction1,
        torch.dot(scaled, last_grad),
        *(torch.dot(scaled, m) / weight for m, weight in zip(slow, weights)),
    ]
    lengths = [torch.dot(grad, grad), torch.dot(direction, direction) / correction1**2]
    return torch.stack([x.to(wide) for x in products]), torch.stack([x.to(wide) for x in lengths])


def way(grad: Tensor, param: Tensor, start: Tensor) -> Tensor:
    r"""What a gradient says of the way that a parameter has come.

    The first number is the derivative of the loss by the logarithm of that way's length, the
    gradient taken at its end.

    Args:
        grad: the gradient of the loss now, any shape.
        param: the parameter now.
        start: where it began, or a place near that.

    Returns:
        ``(3,)``: :math:`\langle g, \theta - \theta_0 \rangle` and the squared lengths of both.
    """
    wide = torch.promote_types(param.dtype, torch.float32)
    tensors = [grad, param, start]
    if param.is_complex():
        tensors, wide = [torch.view_as_real(t) for t in tensors], wide.to_real()
    grad, param, start = (t.to(wide).reshape(-1) for t in tensors)
    gone = param - start
    return torch.stack([torch.dot(grad, gone), torch.dot(grad, grad), torch.dot(gone, gone)])


def next_loss(
    products: Tensor,
    inputs: Inputs,
    *,
    lr: Tensor,
    weight_decay: Tensor,
    beta: Tensor,
    correction: Tensor,
) -> Tensor:
    r"""The loss after an update, to first order in the parameter: differentiate it by the inputs.

    :math:`\langle g, \theta(\mu, s, b, d, w) \rangle` for each of T tensors, where g is the
    gradient after the update and :math:`\theta` the parameter that the update makes of these
    inputs. Its derivatives are those of the loss, exactly, at the inputs that the update had.

    Args:
        products: ``(T, 3 + slow momenta)``, rows of :func:`alignments`.
        inputs: what the update had, each ``(T,)`` and ``mixing`` ``(momenta,)``, in autograd.
        lr: ``(T,)``.
        weight_decay: ``(T,)``, decoupled; 0 for an L2 penalty.
        beta: ``(T,)``, decay rate of the momenta.
        correction: ``(T,)``, ``1 - beta**step``.

    Returns:
        ``(T,)``.
    """
    after, momentum, gradient, *slow = products.unbind(-1)
    multiplier, scale, shift, damping, mixing = inputs
    fast = momentum
    if damping is not None:
        new = (1 - beta) / correction * gradient
        old = (momentum - new) / (1 - damping.detach())
        fast = (1 - damping) * old + new
    direction = fast if scale is None else scale * fast
    if shift is not None:
        direction = direction + shift * gradient
    if mixing is not None:
        direction = mixing[0] * direction
        for weight, product_ in zip(mixing[1:], slow):
            direction = direction + weight * product_
    size, decay = lr, lr * weight_decay
    if multiplier is not None:
        size, decay = size * multiplier, decay * multiplier
    # What the parameter was before, from what it is.
    before = (after + (size * direction).detach()) / (1 - decay.detach())
    return before * (1 - decay) - size * direction
