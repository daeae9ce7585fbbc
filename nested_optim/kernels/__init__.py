"""Triton kernels and the tables they read. Nothing here knows of optimizers."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

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
