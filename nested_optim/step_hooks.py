"""What runs around an optimizer's step and its ``state_dict``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_Update = TypeVar("_Update", bound=Callable[..., Any])

#: Device types that have an autocast.
_KINDS = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "hpu", "xla", "mps")))


def outside_autocast(update: _Update) -> _Update:
    """Let an update run with autocast off, which would round its products and fail at others.

    A closure among its arguments runs as the caller would run it.
    """

    @functools.wraps(update)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return update(self, *args, **kwargs)
        kinds = filter(torch.is_autocast_enabled, _KINDS)
        callers = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds]

        def as_called(closure: Callable[[], Any]) -> Any:
            with ExitStack() as stack:
                for kind, dtype in callers:
                    stack.enter_context(torch.autocast(kind, dtype))
                return closure()

        def within(argument: Any) -> Any:
            return functools.partial(as_called, argument) if callable(argument) else argument

        with ExitStack() as stack:
            for kind, dtype in callers:
                stack.enter_context(torch.autocast(kind, dtype, enabled=False))
            given = map(within, args)
            return update(self, *given, **{key: within(value) for key, value in kwargs.items()})

    return wrapper  # type: ignore[return-value]


def hooked_when_needed(step: Callable[..., Any]) -> Callable[..., Any]:
    """Run step hooks and the profiler's range as torch does, when there is anything to run.

    torch wraps ``step`` of every optimizer class that is not marked as wrapped. On a GPU, where the
    host does little else, the wrapper's time shows.
    """
    with_hooks = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.compiler.is_compiling()
            or torch.autograd._profiler_enabled()
        ):
            return with_hooks(self, closure)
        return step(self, closure)

    wrapper.hooked = True  # type: ignore[attr-defined]
    return wrapper


def export_groups(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Groups as a checkpoint holds them."""
    if "param_groups" not in state_dict:  # a hook put before this one gave it another form
        return state_dict
    groups = [optimizer._export_group(group) for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}
