"""What goes on around the read-out of a weight memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .exchanges import Settings
from .memory_levels import group_label, mix, mixture
from .tensors import local

#: Methods that work on the live weights, for which optimizers have no hooks.
_METHODS = ("add_param_group", "flush", "meta_update")


@contextmanager
def refusing(optimizer: Optimizer, refuse: Callable[[str], None]) -> Iterator[None]:
    """Have ``refuse`` called in the place of what would work on the live weights."""

    def instead(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: refuse(f"optimizer.{name}()")

    own = vars(optimizer)
    before = {name: own[name] for name in _METHODS if name in own}
    own.update((name, instead(name)) for name in _METHODS if hasattr(optimizer, name))
    try:
        yield
    finally:
        for name in _METHODS:
            own.pop(name, None)
        own.update(before)


def read_params(
    optimizer: Optimizer, groups: list[tuple[dict[str, Any], Settings]], level: Any
) -> list[tuple[Tensor, Tensor]]:
    """The parameters that have copies, each with what it is in a read-out."""
    swaps = []
    for at, (group, settings) in enumerate(groups):
        shares = mixture(level, settings.levels, group_label(at, group))
        for p in group["params"]:
            own = optimizer.state.get(p, {})
            if settings.levels and settings.keys[-1] in own:
                tensors = [local(p), *(local(own[key]) for key in settings.keys)]
                swaps.append((tensors[0], mix(tensors, shares)))
    return swaps


@contextmanager
def swapped(
    swaps: list[tuple[Tensor, Tensor]], model: nn.Module | None, update_bn: Any, device: Any
) -> Iterator[None]:
    """Each tensor with another's values, and statistics computed anew; afterwards as it was."""
    if update_bn is not None and model is not None:
        known = {id(target) for target, _ in swaps}
        swaps = swaps + [(b, b) for b in model.buffers() if id(b) not in known]
    with torch.no_grad():
        live = [target.clone() for target, _ in swaps]
    try:
        with torch.no_grad():
            for target, value in swaps:
                target.copy_(value)
        if update_bn is not None and model is not None:
            with modes_kept(model):
                torch.optim.swa_utils.update_bn(update_bn, model, device)
        yield
    finally:
        with torch.no_grad():
            for (target, _), value in zip(swaps, live):
                target.copy_(value)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each module is in the mode it was in, and BatchNorm's momenta are what they were.

    ``torch.optim.swa_utils.update_bn`` sets both, and brings back neither if its loader fails.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [(module, module.momentum) for module in norms]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, momentum in momenta:
            module.momentum = momentum
