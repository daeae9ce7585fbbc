"""Small things about tensors: layouts of DTensors, names of dtypes, CUDA graph captures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def placements(tensor: Any) -> Any:
    """How a DTensor is laid out over its mesh; None for any other tensor."""
    return getattr(tensor, "placements", None)


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """A DTensor's local shard, which shares its memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, the same on every rank; any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def laid_out_like(value: Tensor, param: Any) -> Tensor:
    """``value`` with the layout of ``param``: sums over ranks done, shards cut.

    A plain tensor is taken to be the whole, equal on every rank, and cut without traffic.
    """
    wanted = placements(param)
    if placements(value) == wanted or (wanted is not None and value.shape != param.shape):
        return value
    if wanted is None:
        return value
    if placements(value) is None:
        from torch.distributed.tensor import DTensor, Replicate

        mesh = param.device_mesh
        everywhere = [Replicate()] * mesh.ndim
        value = DTensor.from_local(value.to(param.device), mesh, everywhere, run_check=False)
    return value.redistribute(placements=wanted)  # type: ignore[attr-defined, no-any-return]


def resolve_dtype(
    name: str | torch.dtype, where: str = "", option: str = "state_dtype"
) -> torch.dtype:
    """The floating-point dtype of this name (``"float32"``), or a ValueError."""
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"{where}Invalid {option}: {name!r}. Give a real floating-point dtype such as "
            "torch.float32, or None for the parameter's own"
        )
    return dtype


def to_scalar(value: Any) -> Any:
    """A tensor of one element as a 0-d tensor; a number as it is."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
