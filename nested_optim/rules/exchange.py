"""The exchange between weights and a slower copy of them."""

from __future__ import annotations

import torch
from torch import Tensor


def pull_after_write(write: float, pull: float) -> float:
    """The rate at which the faster weights go to the slower ones *after* these were written.

    ``u + pull (v - u)`` with the old ``v`` is ``u + r (v' - u)`` with ``v' = v + write (u - v)``
    and ``r = pull / (1 - write)``: so both can change in place, one after the other.
    """
    return min(1.0, pull / (1 - write)) if write < 1 else 0.0


def narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Whether numbers of ``than`` may be rounded in ``dtype``."""
    return torch.promote_types(dtype, than) != dtype


def exchange(faster: Tensor, slower: Tensor, *, write: float, pull: float) -> tuple[Tensor, Tensor]:
    """One exchange of a pair of levels: ``(faster + pull d, slower - write d)``, ``d = slower -
    faster``.

    After the chain of levels of *Nested Learning* (arXiv 2512.24695, Eq. 70-74), over the weights
    themselves. With ``write = pull`` the sum of the pair stays (Benna and Fusi, Nature Neuroscience
    2016); ``write = a, pull = 1 - a`` is Lookahead (Zhang et al. 2019); ``pull = 0`` is an
    exponential moving average of decay ``1 - write``.

    Args:
        faster: the weights, or a copy of them; any shape.
        slower: the slower copy, of the same shape.
        write: how far the slower copy goes to the faster weights, in [0, 1].
        pull: how far the faster weights go to the slower copy; ``write + pull <= 1``.

    A slower copy that is narrower than the faster weights cannot follow them everywhere. Where it
    is what they round to, both stay as they are, so that weights which stand still are not drawn
    to what their copy can hold.

    Returns:
        The new pair, computed in the wider of both dtypes and float32, each rounded to its own.
        Equal inputs come back as they are.
    """
    if faster.is_complex():  # two numbers, as elsewhere in torch.optim
        pair = torch.view_as_real(faster), torch.view_as_real(slower)
        new_faster, new_slower = exchange(*pair, write=write, pull=pull)
        return torch.view_as_complex(new_faster), torch.view_as_complex(new_slower)
    wide = torch.promote_types(torch.promote_types(faster.dtype, slower.dtype), torch.float32)
    u, v = faster.to(wide), slower.to(wide)
    v = v.lerp(u, write)
    u = u.lerp(v, pull_after_write(write, pull)).to(faster.dtype)
    if narrower(slower.dtype, faster.dtype):
        u = torch.where(faster.to(slower.dtype) == slower, faster, u)
    return u, v.to(slower.dtype)
