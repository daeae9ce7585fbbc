"""What the learned networks see: logarithms of sizes, differentiable and finite for any tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors import whole
from .networks import wide_dtype

#: Gradient size, parameter size, the group's place, updates so far, the loss, whether it is known.
GROUP_FEATURES = 6
#: Gradient size, momentum size, their cosine, parameter size.
TENSOR_FEATURES = 4

_TINY = 1e-12
_BOUND = 3.0  # of a feature: sizes from e-30 to e30


def beside(like: Tensor, values: Sequence[float]) -> Tensor:
    """A tensor of these numbers on this one's device, which nobody waits for."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def norm(tensor: Tensor) -> Tensor:
    """The 2-norm, 0-d, in a dtype wide enough for its square."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    found: Tensor = torch.linalg.vector_norm(tensor, dtype=wide)
    return found.to(wide_dtype(tensor.device))


def clip_factor(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """What scales all of these gradients so that their joint norm is at most ``max_norm``; 0-d."""
    home = grads[0].device
    norms = torch.stack([whole(norm(grad)).to(home) for grad in grads])
    factor: Tensor = max_norm / (torch.linalg.vector_norm(norms) + 1e-6)
    return factor.clamp(max=1.0)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products of real tensors, or of the parts of complex ones; 0-d."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    product = torch.dot(a.to(wide).reshape(-1), b.to(wide).reshape(-1))
    return product.to(wide_dtype(a.device))


def _log(norms: Tensor, count: int | Tensor) -> Tensor:
    return torch.log(norms / count**0.5 + _TINY) / 10


def _finite(features: Tensor) -> Tensor:
    return torch.nan_to_num(features, 0.0, _BOUND, -_BOUND).clamp(-_BOUND, _BOUND)


def _count(tensor: Tensor) -> int:
    return max(1, tensor.numel() * (2 if tensor.is_complex() else 1))


def group_features(
    params: Sequence[Tensor],
    param_norms: Tensor,
    grad_norms: Tensor,
    place: float,
    step: float,
    loss: Tensor | None,
) -> Tensor:
    """What the controller sees of a group.

    Args:
        params: those of the group that are updated now.
        param_norms: ``(tensors,)``, their norms.
        grad_norms: ``(tensors,)``, their gradients'.
        place: of the group among the groups, from 0 (the first) to 1 (the last).
        step: the largest number of updates, with this one.
        loss: this step's, 0-d; None where the step was not told.

    Returns:
        ``(GROUP_FEATURES,)``.
    """
    total = sum(map(_count, params))
    sizes = [_log(torch.linalg.vector_norm(norms), total) for norms in (grad_norms, param_norms)]
    known = beside(param_norms, [2 * place - 1, math.log1p(step) / 10])
    if loss is None:
        said = param_norms.new_zeros(2)
    else:
        loss = loss.to(param_norms, non_blocking=True)
        said = torch.stack([torch.sign(loss) * torch.log1p(loss.abs()) / 10, torch.ones_like(loss)])
    return _finite(torch.cat([torch.stack(sizes), known, said]))


def tensor_features(
    params: Sequence[Tensor],
    param_norms: Tensor,
    grad_norms: Tensor,
    momentum_norms: Tensor,
    products: Tensor,
) -> Tensor:
    """What the momentum's network sees of each tensor.

    Args:
        params: the parameters.
        param_norms: ``(tensors,)``, and likewise of gradients and momenta (before the update).
        grad_norms: see there.
        momentum_norms: see there.
        products: ``(tensors,)``, of gradient and momentum.

    Returns:
        ``(tensors, TENSOR_FEATURES)``.
    """
    counts = beside(param_norms, [float(_count(p)) for p in params])
    lengths = grad_norms * momentum_norms
    # Where one is 0 there is no angle, and no gradient of one.
    known = lengths > 0
    cosine = torch.where(known, products / torch.where(known, lengths, 1.0), 0.0)
    sizes = [_log(norms, counts) for norms in (grad_norms, momentum_norms)]
    return _finite(torch.stack([*sizes, cosine, _log(param_norms, counts)], dim=-1))


def observe(
    modules: Sequence[str],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    place: float,
    step: float,
    loss: Tensor | None,
    maximize: bool,
    home: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """What the networks see before an update of these tensors, as they will be kept with them.

    Args:
        modules: the learned modules that there are.
        params: the parameters of a group that are updated now.
        grads: their gradients.
        momenta: their fastest momenta, before the update.
        place: see :func:`group_features`; likewise ``step`` and ``loss``.
        step: see there.
        loss: see there.
        maximize: momenta are of gradients with their signs turned.
        home: where the networks are.

    Returns:
        ``(GROUP_FEATURES,)`` for a controller and ``(tensors, TENSOR_FEATURES)`` for a momentum's
        network, or None, in the widest of the parameters' dtypes and float32.
    """
    of_group = of_tensors = None
    if "controller" in modules or "momentum" in modules:
        wide = torch.float32
        for p in params:
            wide = torch.promote_types(wide, p.real.dtype if p.is_complex() else p.dtype)
        param_norms = torch.stack([norm(p).to(home) for p in params])
        grad_norms = torch.stack([norm(grad).to(home) for grad in grads])
    if "controller" in modules:
        of_group = group_features(params, param_norms, grad_norms, place, step, loss).to(wide)
    if "momentum" in modules:
        lengths = torch.stack([norm(m).to(home) for m in momenta])
        products = torch.stack([dot(g, m).to(home) for g, m in zip(grads, momenta)])
        if maximize:
            products = -products
        of_tensors = tensor_features(params, param_norms, grad_norms, lengths, products).to(wide)
    return of_group, of_tensors
