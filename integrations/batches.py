"""Batches: moving them, choosing held-out ones, and agreeing on them between ranks."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from .random_state import random_state_kept, ranked


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device; other things in it stay as they are."""
    if hasattr(batch, "to"):  # a tensor, or a batch with a method of its own
        return batch.to(device)
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def check_held_out(loader: Any) -> None:
    """Raise if :func:`held_out_batch` cannot choose from this loader."""
    try:
        empty = len(loader) == 0
    except TypeError as error:
        raise TypeError(
            "meta updates choose a batch by its number, but this val_loader has no length: give "
            "it a map-style dataset, or a list of batches"
        ) from error
    if empty:
        raise ValueError("val_loader has no batch")


def held_out_batch(loader: Any, index: int, seed: int = 0) -> Any:
    """A batch of held-out data that depends on ``seed`` and ``index`` only.

    So a run that is resumed sees the batches that it would have seen, and no generator of the
    training run is used. From a ``DataLoader`` over a map-style dataset the samples are drawn at
    random, without replacement within the batch; from anything else with a length, batch number
    ``index`` modulo that length is taken.
    """
    with random_state_kept(seed * 1_000_003 + index):
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            dataset: Any = loader.dataset
            size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
            chosen = torch.randperm(len(dataset))[:size].tolist()
            return loader.collate_fn([dataset[i] for i in chosen])
        at = index % len(loader)
        return loader[at] if hasattr(loader, "__getitem__") else next(islice(loader, at, None))


def of_first_rank(batches: list[Any]) -> list[Any]:
    """Rank 0's batches, on every rank; without ranks, the batches."""
    if not ranked():
        return batches
    sent = [to_device(batch, torch.device("cpu")) for batch in batches]
    dist.broadcast_object_list(sent, src=0)
    return sent
