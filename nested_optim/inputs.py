"""The inputs of an update: of one gradient, or of a window whose sample lives in state.

Per weight, a window's sample is four tensors of ``state``, of fixed shapes: ``samples``
``(window_samples, features)``, their ``sample_keys``, ``sample_count`` (inputs in the window) and
``sample_steps`` (gradients that they came with). Under ranks that average their gradients they are
the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import Capture, Layout
from .samples import EMPTY, Sample, across_ranks, padded


@dataclass(slots=True)
class Inputs:
    """What ``rules.dgd`` takes of a weight's inputs, and how the weight is a matrix."""

    layout: Layout
    rows: Tensor
    count: float | Tensor
    scale: float | Tensor
    #: In which the layer multiplied the rows, where they still have another dtype.
    dtype: torch.dtype | None = None


def take(
    capture: Capture, params: list[Tensor], dtypes: list[torch.dtype], size: int, keyed: bool
) -> list[Sample]:
    """The captured inputs of these weights, over all ranks.

    On one rank they are as many as were captured, at most what ``max_tokens`` or ``window_samples``
    was at that time. Of several, rows come in ``dtypes`` and fill exactly ``size`` places.
    """
    ranks = capture.ranks()
    samples = capture.take(params, keyed or ranks > 1)
    if ranks == 1:
        return samples
    typed = [s._replace(rows=s.rows.to(dtype)) for s, dtype in zip(samples, dtypes)]
    return across_ranks(typed, size, capture.process_group)


def of_one_gradient(
    capture: Capture,
    params: list[Tensor],
    group: dict[str, Any],
    dtype_of: Callable[[Tensor, dict[str, Any]], torch.dtype],
) -> Iterator[tuple[int, Inputs]]:
    """What updates by one gradient take of the captured inputs, by the parameters' ``id()``.

    ``dtype_of`` gives the dtype of a parameter's state.
    """
    if capture.ranks() == 1:
        for p, (sample, dtype) in zip(params, capture.take_uncast(params)):
            yield id(p), for_update(capture, p, group, sample, dtype=dtype)
        return
    dtypes = [dtype_of(p, group) for p in params]
    for p, sample in zip(params, take(capture, params, dtypes, group["max_tokens"], False)):
        yield id(p), for_update(capture, p, group, sample)


def for_update(
    capture: Capture,
    param: Tensor,
    group: dict[str, Any],
    sample: Sample,
    steps: Any = 1,
    dtype: torch.dtype | None = None,
) -> Inputs:
    """What an update takes, from a sample of the inputs that came with ``steps`` gradients.

    ``dtype``: in which the layer multiplied the rows, if it may not be theirs.
    """
    total: Any = sample.total
    count: Any = sample.rows.shape[0]
    if isinstance(total, Tensor):  # and there may be places without a row
        wide = torch.promote_types(param.dtype, torch.float32)
        total = total.to(wide)
        steps = steps.to(wide) if isinstance(steps, Tensor) else steps
        count = total.clamp(max=count)
    scale: Any = 1.0
    if group["reduction"] == "sum":
        scale = total / capture.ranks()  # whose gradients were averaged
        if group["window"] == "mean":
            scale = scale / steps
    elif group["window"] == "sum":
        scale = steps
    return Inputs(capture.layout_of[id(param)], sample.rows, count, scale, dtype)


def open_window(
    state: dict[str, Any], param: Tensor, features: int, size: int, dtype: torch.dtype
) -> None:
    """Create the window's tensors, or bring them to an edited size."""
    if "samples" not in state:
        state["samples"] = param.detach().new_zeros(size, features, dtype=dtype)
        state["sample_keys"] = torch.full((size,), EMPTY, device=param.device)
        state["sample_count"] = torch.zeros((), dtype=torch.int64, device=param.device)
        state["sample_steps"] = torch.zeros((), dtype=torch.float32, device=param.device)
    elif len(state["samples"]) != size:
        kept = padded(Sample(state["samples"], state["sample_keys"], 0), size)
        state["samples"], state["sample_keys"] = kept.rows, kept.keys


def add_to_window(state: dict[str, Any], sample: Sample) -> None:
    """Put what came with one gradient into the window."""
    state["sample_count"] += sample.total
    state["sample_steps"] += 1
    if len(sample.rows):
        rows = torch.cat([state["samples"], sample.rows.to(state["samples"].dtype)])
        keys = torch.cat([state["sample_keys"], sample.keys])
        kept = padded(Sample(rows, keys, 0), len(state["samples"]))
        state["samples"].copy_(kept.rows)
        state["sample_keys"].copy_(kept.keys)


def read_window(state: dict[str, Any]) -> tuple[Sample, Tensor] | None:
    """The window's sample and how many gradients it came with; None where there is no window."""
    if "samples" not in state:
        return None
    sample = Sample(state["samples"], state["sample_keys"], state["sample_count"])
    return sample, state["sample_steps"]


def empty_window(state: dict[str, Any]) -> None:
    """Forget the window's sample: its update is done."""
    if "samples" in state:
        state["samples"].zero_()
        state["sample_keys"].fill_(EMPTY)
        state["sample_count"].zero_()
        state["sample_steps"].zero_()
