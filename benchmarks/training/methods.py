"""The optimizers that train the models: what we offer, what there is, and what explains the rest.

All take a model, a learning rate and a weight decay, and the number of steps of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nested_optim import M3, NestedOptimizer, depth_groups, matrix_groups

from .controls import AdEMAMix, StaleM3, flat_muon

#: Of NestedOptimizer's groups, shallow slowest.
LEVELS = (1, 4, 16)

Build = Callable[[nn.Module, float, float, int], list[Optimizer]]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        settings: what tells it from others, for the identity of its results.
        build: gives one optimizer, or two that are stepped together.
    """

    key: str
    label: str
    kind: str  # "control", "ours" or "ablation"
    settings: tuple[Any, ...]
    build: Build


def _adamw(**options: Any) -> Build:
    def build(model: nn.Module, lr: float, weight_decay: float, steps: int) -> list[Optimizer]:
        kept: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "fused": True, **options}
        return [torch.optim.AdamW(model.parameters(), **kept)]

    return build


def _muon(flat: bool) -> Build:
    """torch's Muon on matrices of two dimensions, which are all it takes; AdamW trains the rest.

    ``flat``: it is given the weights of convolutions as matrices, too.
    """

    def build(model: nn.Module, lr: float, weight_decay: float, steps: int) -> list[Optimizer]:
        hidden: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for group in matrix_groups(model):
            for entry in group["params"]:
                p = entry[1] if isinstance(entry, tuple) else entry
                is_hidden = group["algorithm"] == "m3" and (flat or p.ndim == 2)
                (hidden if is_hidden else rest).append(p)
        adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, fused=True)
        if not hidden:
            return [adamw]
        options: Any = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        return [(flat_muon if flat else torch.optim.Muon)(hidden, **options), adamw]

    return build


def _m3(cls: type[M3] = M3, **options: Any) -> Build:
    def build(model: nn.Module, lr: float, weight_decay: float, steps: int) -> list[Optimizer]:
        return [cls(matrix_groups(model, matrix=options), lr=lr, weight_decay=weight_decay)]

    return build


def _ademamix(model: nn.Module, lr: float, weight_decay: float, steps: int) -> list[Optimizer]:
    # A slow decay of a tenth of the run, as far as the paper's 0.9999 is of its runs.
    betas = (0.9, 0.999, 1 - 10 / max(steps, 100))
    return [AdEMAMix(model.parameters(), lr, betas, weight_decay=weight_decay, warmup=steps)]


def _nested(realise: str) -> Build:
    def build(model: nn.Module, lr: float, weight_decay: float, steps: int) -> list[Optimizer]:
        groups = depth_groups(model, LEVELS, realise=realise, lr=lr)  # type: ignore[arg-type]
        return [NestedOptimizer(groups, lr=lr, weight_decay=weight_decay)]

    return build


def _method(key: str, label: str, kind: str, build: Build, *settings: Any) -> Method:
    return Method(key, label, kind, settings, build)


def _m3_method(key: str, label: str, cls: type[M3] = M3, **options: Any) -> Method:
    kind = "ours" if key in ("m3", "m3_paper") else "ablation"
    return Method(key, label, kind, tuple(sorted(options.items())), _m3(cls, **options))


METHODS = {
    method.key: method
    for method in (
        _method("adamw", "AdamW", "control", _adamw()),
        _method("adamw_95", "AdamW, betas .9, .95", "control", _adamw(betas=(0.9, 0.95))),
        _method("muon", "torch Muon, AdamW", "control", _muon(flat=False)),
        _method("muon_flat", "torch Muon, convolutions too", "control", _muon(flat=True)),
        _method("ademamix", "AdEMAMix", "control", _ademamix),
        _m3_method("m3", "M3", alpha=0.0),  # the default, named: results are kept by it
        _m3_method("m3_paper", "M3, mode='paper'", mode="paper"),
        _method("nested", "NestedOptimizer 16/4/1", "ours", _nested("window"), *LEVELS),
        _method("nested_lr", "AdamW, lr / f 16/4/1", "control", _nested("lr"), *LEVELS),
        _m3_method("m3_slow", "M3, alpha .25", alpha=0.25),
        _m3_method("m3_alpha.1", "M3, alpha .1", alpha=0.1),
        _m3_method("m3_alpha.5", "M3, alpha .5", alpha=0.5),
        _m3_method("m3_alpha1", "M3, alpha 1", alpha=1.0),
        _m3_method("m3_f1", "M3, alpha .25, slow frequency 1", alpha=0.25, slow_frequency=1),
        _m3_method("m3_f50", "M3, alpha .25, slow frequency 50", alpha=0.25, slow_frequency=50),
        _m3_method("m3_row", "M3, second moment by row", second_moment="row"),
        _m3_method("m3_stale", "M3, alpha .25 of a stale copy", StaleM3, alpha=0.25),
    )
}
