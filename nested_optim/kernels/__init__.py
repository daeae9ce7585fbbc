"""Triton kernels and the tables they read. Nothing here knows of optimizers."""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

#: Parameters, gradients and moments that the kernels can take.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def interpreted() -> bool:
    """Whether Triton runs its kernels on the host, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device."""
    if not _triton_installed():
        return False
    if interpreted():
        return device.type == "cpu"
    return device.type == "cuda" and torch.version.cuda is not None and _capable(device.index or 0)


@functools.cache
def _capable(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (7, 0)


def aligned(*tensors: Tensor) -> bool:
    """Whether all begin at multiples of 16 bytes."""
    return not any(t.data_ptr() & 15 for t in tensors)


def on(device: torch.device) -> Any:
    """A context in which launches go to this device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
