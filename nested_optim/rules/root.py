"""A square root through which gradients stay finite."""

from __future__ import annotations

from torch import Tensor


def moment_root(square: Tensor) -> Tensor:
    """``square.sqrt()``, with derivative 0 where ``square`` is exactly 0.

    For a second moment, which is 0 where every gradient so far has been. There the derivative of
    the root is infinite and that of the moment is 0: autograd makes NaN of the two, but an update
    ``g / (|g| + eps)`` has the derivative ``1 / eps`` at 0, which is what comes out without the
    root's part.
    """
    if not square.requires_grad:
        return square.sqrt()
    zero = square == 0
    return square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
