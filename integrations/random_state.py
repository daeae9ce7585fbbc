"""The states of all random number generators that training may use, to save and to protect."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def random_state() -> dict[str, Any]:
    """States of Python's, NumPy's (if it is loaded) and torch's generators.

    Made of tensors and plain values only, so that ``torch.load(weights_only=True)`` reads them.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = (name, [int(key) for key in keys], *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators back to where :func:`random_state` found them."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        import numpy

        name, numbers, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.array(numbers, dtype=numpy.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Run the body on generators that are put back afterwards; seeded first, where a seed is given.

    What the body draws then changes nothing of the training around it.
    """
    state = random_state()
    try:
        if seed is not None:
            random.seed(seed)
            torch.manual_seed(seed)
            if (numpy := sys.modules.get("numpy")) is not None:
                numpy.random.seed(seed % 2**32)
        yield
    finally:
        set_random_state(state)


def ranked() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    return not ranked() or dist.get_rank() == 0


def of_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not ranked():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def of_this_rank(values: list[Any]) -> Any:
    """This rank's value of those that :func:`of_all_ranks` gathered.

    Raises:
        ValueError: they come from another number of ranks.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if ranked() else (0, 1)
    if len(values) != size:
        raise ValueError(
            f"the checkpoint was written on {len(values)} ranks, and this run has {size}: exact "
            "resuming needs as many"
        )
    return values[rank]
