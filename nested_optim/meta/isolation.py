"""What surrounds an unroll: random numbers, differentiable kernels, no recomputation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import checkpoint

#: Of torch's generators: the CPU's, and each CUDA device's.
RngState = tuple[Tensor, dict[int, Tensor]]


@contextmanager
def isolated(params: Sequence[Tensor]) -> Iterator[None]:
    """Everything that an unroll needs and nobody else may notice."""
    with (
        torch.enable_grad(),
        torch.random.fork_rng(devices=_cuda_devices(params)),
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
        _uncheckpointing,
    ):
        yield


class _Direct:
    """``torch.utils.checkpoint`` of either kind keeps activations while this is entered.

    It recomputes them in a backward pass, when the model has its own parameters again and not those
    of the step. Models hold ``checkpoint`` itself, so what that calls is what is replaced, once for
    all threads.
    """

    def __init__(self) -> None:
        self.lock, self.entered = threading.Lock(), 0
        self.hook: Any = None

    def __enter__(self) -> None:
        with self.lock:
            self.entered += 1
            if self.entered == 1:
                self.hook = vars(checkpoint).get("_checkpoint_hook")
                if self.hook is not None:
                    vars(checkpoint)["_checkpoint_hook"] = nullcontext
                _Reentrant.apply = staticmethod(_uncheckpointed)

    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.entered -= 1
            if self.entered == 0:
                if self.hook is not None:
                    vars(checkpoint)["_checkpoint_hook"] = self.hook
                del _Reentrant.apply  # the inherited one is back


_Reentrant: Any = checkpoint.CheckpointFunction
_uncheckpointing = _Direct()


def _uncheckpointed(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    """What the reentrant kind of checkpoint returns; it has a gradient if one of these has."""
    tracked = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
    with torch.set_grad_enabled(tracked and torch.is_grad_enabled()):
        return function(*args)


@contextmanager
def no_calls_of(modules: set[nn.Module]) -> Iterator[None]:
    """Refuse calls of these modules: in a backward pass they are a recomputation."""

    def refuse(module: nn.Module, args: Any) -> None:
        if module in modules:
            raise RuntimeError(
                f"the backward pass calls the model again ({type(module).__name__}): it recomputes "
                "activations in a way that an unroll cannot follow, which has other parameters by "
                "then. Use torch.utils.checkpoint, or switch the checkpointing off for "
                "meta_update()"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _cuda_devices(params: Sequence[Tensor]) -> list[int]:
    return sorted({p.device.index for p in params if p.device.type == "cuda"})


def rng_state(params: Sequence[Tensor]) -> RngState:
    """Of the generators that a model with these parameters draws from."""
    devices = _cuda_devices(params)
    return torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}


def set_rng_state(state: RngState) -> None:
    """The inverse."""
    torch.set_rng_state(state[0])
    for device, value in state[1].items():
        torch.cuda.set_rng_state(value, device)
