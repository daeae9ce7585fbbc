"""What goes on around the read-out of a weight memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

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
