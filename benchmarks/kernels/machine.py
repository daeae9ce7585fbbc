"""What the numbers were measured on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nested_optim

from .contestants import Contestant

GPU_FIELDS = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem")


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:1`` as a device that is there.

    Raises:
        ValueError: it is not there, or it is none of these.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"{name!r} is no device: choose auto, cpu, cuda or cuda:0, cuda:1, ...")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"{name!r}: torch {torch.__version__} finds no CUDA device")
        count = torch.cuda.device_count()
        device = torch.device("cuda", device.index or 0)
        if device.index >= count:
            raise ValueError(f"{name!r}: there are {count} CUDA devices, counted from 0")
    return device


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if names:
            return str(names[0]).strip()
    return platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    result: dict[str, Any] = {
        "device": str(device),
        "cpu": cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "nvidia_smi": _nvidia_smi(device),
        }
    return result


def _nvidia_smi(device: torch.device) -> dict[str, str] | None:
    """Name, driver and highest clocks; None where the tool is not there or fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    # By UUID: CUDA_VISIBLE_DEVICES counts differently from the tool.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    selections = [["-i", f"GPU-{uuid}"]] if uuid is not None else []
    if torch.cuda.device_count() == 1:
        selections.append([])
    for selection in selections:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [*command, *selection], capture_output=True, text=True, timeout=30, check=True
            )
            lines = done.stdout.strip().splitlines()
            if len(lines) == 1:
                return dict(zip(GPU_FIELDS, map(str.strip, lines[0].split(","))))
    return None


def versions(contestants: list[Contestant]) -> dict[str, str]:
    packages = {"nested_optim": nested_optim.__version__, "numpy": np.__version__}
    packages |= {"python": platform.python_version(), "torch": torch.__version__}
    packages["cuda"] = torch.version.cuda or "none"
    for name in ("triton", *(c.distribution for c in contestants)):
        if name in packages:
            continue
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return packages
