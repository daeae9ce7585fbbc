"""One optimizer of this package (or torch's Adam and AdamW) from a name and plain options.

What :mod:`.config` and :mod:`.hf` share.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import nested_optim
from nested_optim import (
    DGD,
    M3,
    DeepMomentum,
    DeltaMomentum,
    NestedOptimizer,
    WeightMemory,
    build_param_groups,
    matrix_groups,
)
from nested_optim.memory_argument import attach_memory

Groups = list[dict[str, Any]]

#: torch's own, beside which ours are compared: they know no levels.
_TORCH = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_CLASSES: dict[str, type[Optimizer]] = {
    "nested": NestedOptimizer,
    "m3": M3,
    "muon": M3,
    "dgd": DGD,
    "delta": DeltaMomentum,
    "deep_momentum": DeepMomentum,
    **_TORCH,
}
#: Names of ``optimizer``.
OPTIMIZERS = (*_CLASSES, "deep_nested")
#: Those that read parameters as matrices, or layers' inputs, which ZeRO's flat pieces do not have.
_NEEDS_SHAPES = ("m3", "muon", "dgd", "deep_nested")
#: Set here, or not at all.
_RESERVED = ("params", "param_groups", "params_or_model", "model", "self", "lr", "base_lr")
_LEVEL_KEYS = ("frequency", "window")


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of this name.

    Raises:
        ValueError: no such optimizer, with close matches.
    """
    if name == "deep_nested":
        found: type[Optimizer] = nested_optim.DeepNestedOptimizer
        return found
    if name not in _CLASSES:
        raise ValueError(f"unknown optimizer {name!r}{_hint(name, OPTIMIZERS)}")
    return _CLASSES[name]


def option_names(name: str) -> tuple[str, ...]:
    """The options that the optimizer of this name takes, besides parameters and ``lr``."""
    parameters = inspect.signature(optimizer_class(name)).parameters
    return tuple(key for key in parameters if key not in _RESERVED)


def build_optimizer(
    model: nn.Module,
    optimizer: str = "nested",
    *,
    lr: float,
    weight_decay: float | None = None,
    rules: Iterable[Mapping[str, Any]] | None = None,
    no_decay_1d: bool = True,
    memory: Mapping[str, Any] | Sequence[int] | str | None = None,
    **options: Any,
) -> Optimizer:
    """An optimizer of a model's trainable parameters.

    Args:
        model: the module that is trained.
        optimizer: ``"nested"`` (:class:`NestedOptimizer`), ``"m3"``, ``"muon"`` (M3 with
            no other ``alpha`` than 0: torch's Muon, bit for bit, and AdamW for the rest),
            ``"dgd"``, ``"delta"``, ``"deep_momentum"``, ``"deep_nested"``, or torch's own
            ``"adam"`` and ``"adamw"``.
        lr: the learning rate of every group that has none of its own.
        weight_decay: of every group that has none of its own. Default: the optimizer's.
        rules: for :func:`build_param_groups`, first match wins; what matches none is one group.
        no_decay_1d: whether biases and parameters of one dimension have no weight decay.
        memory: a :class:`WeightMemory` to attach to it, ours or torch's: a preset's name, its
            frequencies, or a dict of its arguments (``{}`` for the defaults). A string is
            ``"deep_momentum"``'s own option of that name.
        options: of the optimizer's constructor.

    Raises:
        ValueError: an unknown optimizer or option, with close matches; a rule that matches nothing;
            levels for an optimizer that has none.
    """
    cls = optimizer_class(optimizer)
    known = option_names(optimizer)
    if optimizer == "deep_momentum" and memory in ("linear", "mlp"):  # what its momentum is
        options, memory = {**options, "memory": memory}, None
    for key in options:
        if key not in known:
            raise ValueError(f"{optimizer!r} has no option {key!r}{_hint(key, known)}")
    rules = list(rules or ())
    if optimizer in _TORCH:
        for rule in rules:
            if level := [key for key in _LEVEL_KEYS if key in rule]:
                raise ValueError(
                    f"torch's {cls.__name__} has no {level[0]!r}, which the rule for "
                    f"{rule.get('match')!r} sets: use the optimizer 'nested'"
                )
    if isinstance(memory, Mapping):
        names = tuple(inspect.signature(WeightMemory).parameters)
        for key in memory:
            if key not in names or key in ("optimizer", "buffers_from"):
                raise ValueError(f"a weight memory has no option {key!r}{_hint(key, names)}")
    defaults = {"lr": lr} | ({} if weight_decay is None else {"weight_decay": weight_decay})
    groups = build_param_groups(model, rules, defaults=defaults, no_decay_1d=no_decay_1d)
    built = _construct(cls, optimizer, model, groups, {**defaults, **options})
    if memory is not None:
        attach_memory(built, dict(memory) if isinstance(memory, Mapping) else memory)
    return built


def _construct(
    cls: Callable[..., Optimizer], name: str, model: nn.Module, groups: Groups, options: Any
) -> Optimizer:
    if name in ("m3", "muon"):
        groups = matrix_groups(model, groups=groups)
        if name == "muon":
            options = {"alpha": 0.0, **options}
            if options["alpha"]:
                raise ValueError("'muon' is M3 with alpha=0: use 'm3' for another alpha")
    if name == "dgd":
        return cls(groups, model=model, **options)
    if name == "deep_nested":
        return cls(params=groups, model=model, **options)
    return cls(groups, **options)


def refuse_flattened(name: str, rules: Any, where: str) -> None:
    """Raise where DeepSpeed's ZeRO will replace parameters by flat pieces of several.

    Raises:
        ValueError: this optimizer, or rules over names, cannot work on those.
    """
    why = None
    if name in _NEEDS_SHAPES:
        why = f"the optimizer {name!r} needs each parameter's own shape and layer"
    elif rules:
        why = "rules go by parameters' names"
    if why is not None:
        raise ValueError(
            f"{where} flattens parameters into pieces without names and shapes, but {why}. Use "
            "FSDP2 (fully_shard), which keeps both, or the optimizer 'nested' without rules"
        )


def _hint(key: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(str(key), known, n=3, cutoff=0.6)
    if close:
        return f": did you mean {' or '.join(map(repr, close))}?"
    return f": there are {', '.join(known)}"
