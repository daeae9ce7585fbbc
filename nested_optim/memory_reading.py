"""What goes on around the read-out of a weight memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
