"""How a parameter of any shape is read as matrices, each orthogonalised on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixForm:
    """A parameter's division into matrices.

    Args:
        flatten: all dimensions after the first are one (convolutions). Otherwise the first of three
            counts a batch of matrices (experts), and more than three are not read at all. None:
            what the shape leaves no doubt about (see :meth:`why_not`).
        out_dim: which dimension of a matrix is the layer's output: 0 for ``nn.Linear``, 1 where the
            weight is stored as (in, out), or as (in, out, kernel) and flattened.
        split_sizes: lengths along ``out_dim`` of projections that one parameter holds, such as
            query, key and value; each is a matrix of its own.
        num_heads: how many equal matrices each projection divides into along ``out_dim``: one
            number for all of them, or one each.
    """

    flatten: bool | None = None
    out_dim: int = 0
    split_sizes: tuple[int, ...] | None = None
    num_heads: int | tuple[int, ...] | None = None

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Why a parameter of this shape cannot be read so, and what to do; None if it can."""
        if len(shape) < 2:
            return (
                "has no rows and columns: put it in a group with algorithm='adamw', as "
                "matrix_groups(model) does (build the groups before FSDP1 or ZeRO flatten the "
                "parameters, which hides their shapes for good)"
            )
        if len(shape) == 3 and self.flatten is None:
            return (
                "may be a batch of matrices or a 1-d convolution: set flatten=False or "
                "flatten=True on its group, as matrix_groups(model) does"
            )
        if len(shape) > 3 and self.flatten is False:
            return "has more than one batch dimension: set flatten=True on its group"
        sizes = self.split_sizes
        width = self._matrix_shape(shape)[self.out_dim]
        if sizes is not None and sum(sizes) != width:
            return f"has {width} outputs, but split_sizes {sizes} add up to {sum(sizes)}"
        if self.num_heads is not None:
            if self._is_batch(shape):
                return "is a batch of matrices, for which num_heads is not defined: leave it out"
            heads = self._heads()
            if len(heads) != len(sizes or (width,)):
                return f"has {len(sizes or (width,))} projections, but num_heads {self.num_heads}"
            for size, count in zip(sizes or (width,), heads):
                if size % count:
                    return f"has a projection of {size} outputs, not divisible in {count} heads"
        return None

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The matrices of a parameter-shaped tensor, each (batch, rows, columns).

        They share the tensor's memory, unless it is flattened and not contiguous.
        """
        flat = tensor.flatten(1) if self._is_flattened(tensor.shape) else tensor
        dim = self.out_dim - 2
        sizes = self.split_sizes
        parts = flat.split(list(sizes), dim=dim) if sizes is not None else (flat,)
        if self.num_heads is None:
            return [part if part.ndim == 3 else part.unsqueeze(0) for part in parts]
        divided = [
            part.unflatten(dim, (count, part.size(dim) // count))
            for part, count in zip(parts, self._heads())
        ]
        return [part.movedim(self.out_dim, 0) for part in divided]

    def join(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`split`: a tensor of this shape."""
        merged = list(parts)
        if self.num_heads is not None:
            merged = [part.movedim(0, self.out_dim) for part in merged]
            merged = [part.flatten(self.out_dim, self.out_dim + 1) for part in merged]
        whole = torch.cat(merged, dim=self.out_dim - 2) if len(merged) > 1 else merged[0]
        return whole.reshape(tuple(shape))

    def row_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape with one entry per output, and per matrix of a batch."""
        if self._is_flattened(shape):
            ones = [1] * len(shape)
            return (shape[0], *ones[1:]) if self.out_dim == 0 else (1, *shape[1:])
        dim = len(shape) - 2 + self.out_dim
        return tuple(n if i == dim or i < len(shape) - 2 else 1 for i, n in enumerate(shape))

    def _heads(self) -> tuple[int, ...]:
        if isinstance(self.num_heads, tuple):
            return self.num_heads
        return (self.num_heads or 1,) * len(self.split_sizes or (1,))

    def _is_flattened(self, shape: Sequence[int]) -> bool:
        return len(shape) > 2 and self.flatten is not False

    def _is_batch(self, shape: Sequence[int]) -> bool:
        return len(shape) == 3 and self.flatten is False

    def _matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        if self._is_flattened(shape):
            return shape[0], math.prod(shape[1:])
        return shape[-2], shape[-1]
