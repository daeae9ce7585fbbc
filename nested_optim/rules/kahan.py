"""Compensated summation (Kahan 1965) of a narrow parameter: two numbers that stand for one."""

from __future__ import annotations

import torch
from torch import Tensor


def kahan_join(param: Tensor, comp: Tensor, dtype: torch.dtype) -> Tensor:
    """The number that ``param`` and what rounding took from it stand for, in ``dtype``."""
    return param.to(dtype) + comp.to(dtype)


def kahan_split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``value`` rounded to ``dtype``, and the difference, rounded likewise.

    With bfloat16 the pair holds 16 significant bits of ``value`` or more; where the rounded value
    is infinite the difference is 0.
    """
    rounded = value.to(dtype)
    left = value - rounded.to(value.dtype)
    return rounded, torch.where(torch.isfinite(rounded), left, torch.zeros_like(left)).to(dtype)
