"""What the learned networks see: logarithms of sizes, differentiable and finite for any tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..tensors import whole
from .networks import wide_dtype

#: Gradient size, parameter size, the group's place, updates so far, the loss, whether it is known.
GROUP_FEATURES = 6
#: Gradient size, momentum size, their cosine, parameter size.
TENSOR_FEATURES = 4
#: What is measured of a tensor: the norms of gradient and momentum, their cosine, and the
#: parameter's norm.
SIZES = 4

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


def clipped(grads: Sequence[Tensor | None], max_norm: float | None) -> list[Tensor | None]:
    """These gradients, clipped; as they are if the bound is None."""
    given = [g for g in grads if g is not None]
    if max_norm is None or not given:
        return list(grads)
    factor = clip_factor(given, max_norm)
    return [None if g is None else (g * factor.to(g.device)).to(g.dtype) for g in grads]


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


def measure(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    maximize: bool,
    home: torch.device,
) -> Tensor:
    """What the networks' features are made of, differentiable.

    Args:
        params: the parameters of a group that are updated now.
        grads: their gradients.
        momenta: their fastest momenta, before the update; none where no network looks at them.
        maximize: momenta are of gradients with their signs turned.
        home: where the networks are.

    Returns:
        ``(tensors, SIZES)``.
    """
    param_norms = torch.stack([norm(p).to(home) for p in params])
    grad_norms = torch.stack([norm(grad).to(home) for grad in grads])
    if not momenta:
        nothing = torch.zeros_like(grad_norms)
        return torch.stack([grad_norms, nothing, nothing, param_norms], dim=-1)
    momentum_norms = torch.stack([norm(m).to(home) for m in momenta])
    products = torch.stack([dot(g, m).to(home) for g, m in zip(grads, momenta)])
    lengths = grad_norms * momentum_norms
    # Where one is 0 there is no angle, and no gradient of one.
    known = lengths > 0
    cosines = torch.where(known, products / torch.where(known, lengths, 1.0), 0.0)
    if maximize:
        cosines = -cosines
    return torch.stack([grad_norms, momentum_norms, cosines, param_norms], dim=-1)


def group_features(
    params: Sequence[Tensor], sizes: Tensor, place: float, step: float, loss: Tensor | None
) -> Tensor:
    """What the controller sees of a group.

    Args:
        params: those of the group that are updated now.
        sizes: ``(tensors, SIZES)``, theirs.
        place: of the group among the groups, from 0 (the first) to 1 (the last).
        step: the largest number of updates, with this one.
        loss: this step's, 0-d; None where the step was not told.

    Returns:
        ``(GROUP_FEATURES,)``.
    """
    total = sum(map(_count, params))
    joint = [_log(torch.linalg.vector_norm(sizes[:, i]), total) for i in (0, 3)]
    known = beside(sizes, [2 * place - 1, math.log1p(step) / 10])
    if loss is None:
        said = sizes.new_zeros(2)
    else:
        loss = loss.to(sizes, non_blocking=True)
        said = torch.stack([torch.sign(loss) * torch.log1p(loss.abs()) / 10, torch.ones_like(loss)])
    return _finite(torch.cat([torch.stack(joint), known, said]))


def tensor_features(params: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """What the momentum's network sees of each tensor.

    Args:
        params: the parameters.
        sizes: ``(tensors, SIZES)``.

    Returns:
        ``(tensors, TENSOR_FEATURES)``.
    """
    counts = beside(sizes, [float(_count(p)) for p in params])
    grads, momenta, cosines, own = sizes.unbind(-1)
    columns = [_log(grads, counts), _log(momenta, counts), cosines, _log(own, counts)]
    return _finite(torch.stack(columns, dim=-1))


def features(
    modules: Iterable[str],
    params: Sequence[Tensor],
    sizes: Tensor,
    *,
    place: float,
    step: float,
    loss: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """What the networks see, as it will be kept with the update.

    Args:
        modules: the learned modules that there are.
        params: the parameters of a group that are updated now.
        sizes: ``(tensors, SIZES)``, see :func:`measure`.
        place: see :func:`group_features`; likewise ``step`` and ``loss``.
        step: see there.
        loss: see there.

    Returns:
        ``(GROUP_FEATURES,)`` for a controller and ``(tensors, TENSOR_FEATURES)`` for a momentum's
        network, or None, in the widest of the parameters' dtypes and float32.
    """
    wide = torch.float32
    for p in params:
        wide = torch.promote_types(wide, p.real.dtype if p.is_complex() else p.dtype)
    of_group = of_tensors = None
    if "controller" in modules:
        of_group = group_features(params, sizes, place, step, loss).to(wide)
    if "momentum" in modules:
        of_tensors = tensor_features(params, sizes).to(wide)
    return of_group, of_tensors
