"""What is compared. Every method is an optimizer, and the weights that can be read out beside it.

All get the same weights, batches and loop, weight decay 0, and as many learning rates.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nested_optim import M3, NestedOptimizer, depth_groups, matrix_groups
from nested_optim.memory_levels import PRESETS
from nested_optim.weight_memory import WeightMemory

from .baselines import EWC, Lookahead
from .models import DEPTHS, LEVELS, SHORT_LEVELS

#: Six rates, half a decade apart; extended until the best is inside.
ADAPTIVE_LRS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
DESCENT_LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
EMA_DECAYS = (0.99, 0.995)
EWC_STRENGTHS = (1e2, 1e3, 1e4, 1e5)
LIVE = "live"
#: What a preset reads out where nothing else is said.
PRESET_READ_OUT = "preset's"

ReadOut = Callable[[], AbstractContextManager[Any]]


@dataclass
class Learner:
    """An optimizer with what else one run needs.

    Attributes:
        read_outs: by name, contexts in which a model holds the weights to be measured; ``averages``
            says which model that is, where it is not the trained one.
        aliases: further names of read-outs.
        accumulate: batches per step.
        after_step: called after each optimizer step.
    """

    optimizer: Optimizer
    read_outs: dict[str, ReadOut] = field(default_factory=lambda: {LIVE: nullcontext})
    averages: dict[str, nn.Module] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    accumulate: int = 1
    after_step: list[Callable[[], None]] = field(default_factory=list)
    ewc: EWC | None = None


Build = Callable[[nn.Module, str, float], Learner]


@dataclass(frozen=True)
class Method:
    """A row of the table, or several: one for each read-out.

    Attributes:
        kind: ``"control"``, ``"other"`` (windows, M3), ``"memory"``, or ``"ceiling"``.
        settings: everything that tells it from others, for the identity of its results.
    """

    key: str
    label: str
    kind: str
    build: Build
    lrs: tuple[float, ...] = ADAPTIVE_LRS
    settings: tuple[Any, ...] = ()
    joint: bool = False


# ------------------------------------------------------------------ optimizers


def _groups(model: nn.Module, kind: str, lr: float) -> list[dict[str, Any]]:
    """Groups by depth with the learning rate divided by each depth's number: shallow slowest."""
    return depth_groups(model, LEVELS[DEPTHS[kind]], realise="lr", lr=lr)


def _adamw(model: nn.Module, kind: str, lr: float) -> Optimizer:
    return AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def _adamw_divided(model: nn.Module, kind: str, lr: float) -> Optimizer:
    return AdamW(_groups(model, kind, lr), lr=lr, weight_decay=0.0, fused=True)


def _sgd(model: nn.Module, kind: str, lr: float) -> Optimizer:
    return SGD(model.parameters(), lr=lr, fused=True)


def _sgd_divided(model: nn.Module, kind: str, lr: float) -> Optimizer:
    return SGD(_groups(model, kind, lr), lr=lr, fused=True)


def _sgd_momentum(model: nn.Module, kind: str, lr: float) -> Optimizer:
    return SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)


def _windows(model: nn.Module, kind: str, lr: float) -> Optimizer:
    groups = depth_groups(model, LEVELS[DEPTHS[kind]])
    return NestedOptimizer(groups, lr=lr, weight_decay=0.0)


def _short_windows(model: nn.Module, kind: str, lr: float) -> Optimizer:
    groups = depth_groups(model, SHORT_LEVELS[DEPTHS[kind]])
    return NestedOptimizer(groups, lr=lr, weight_decay=0.0)


def _m3(model: nn.Module, kind: str, lr: float) -> Optimizer:
    return M3(matrix_groups(model), lr=lr, weight_decay=0.0, alpha=0.25)


BASES: dict[str, tuple[str, Callable[[nn.Module, str, float], Optimizer], tuple[float, ...]]] = {
    "adamw": ("AdamW", _adamw, ADAPTIVE_LRS),
    "adamw_lrf": ("AdamW, lr / f", _adamw_divided, ADAPTIVE_LRS),
    "sgd": ("SGD without momentum", _sgd, DESCENT_LRS),
    "sgd_lrf": ("SGD without momentum, lr / f", _sgd_divided, DESCENT_LRS),
    "sgd_momentum": ("SGD, momentum 0.9", _sgd_momentum, DESCENT_LRS),
    "windows": ("windows", _windows, ADAPTIVE_LRS),
    "windows_short": ("short windows", _short_windows, ADAPTIVE_LRS),
    "m3": ("M3", _m3, ADAPTIVE_LRS),
}


# ------------------------------------------------------------------ what is put around them


def _plain(base: str, *, accumulate: int = 1) -> Build:
    def build(model: nn.Module, kind: str, lr: float) -> Learner:
        return Learner(BASES[base][1](model, kind, lr), accumulate=accumulate)

    return build


def _with_averages(base: str) -> Build:
    """Exponential moving averages of the weights, read out beside them: they change no training."""

    def build(model: nn.Module, kind: str, lr: float) -> Learner:
        learner = Learner(BASES[base][1](model, kind, lr))
        for decay in EMA_DECAYS:
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
            name = f"EMA {decay:g}"
            learner.read_outs[name] = nullcontext
            learner.averages[name] = average
            learner.after_step.append(_updates(average, model))
        return learner

    return build


def _updates(average: AveragedModel, model: nn.Module) -> Callable[[], None]:
    """``average.update_parameters(model)``, without a walk through the modules at every step."""
    averaged, current = list(average.module.parameters()), list(model.parameters())

    def update() -> None:
        if started:
            average.multi_avg_fn(averaged, current, average.n_averaged)
        else:
            average.update_parameters(model)  # copies
            started.append(True)

    started: list[bool] = []
    return update


def _lookahead(base: str) -> Build:
    def build(model: nn.Module, kind: str, lr: float) -> Learner:
        optimizer = BASES[base][1](model, kind, lr)
        lookahead = Lookahead(optimizer)
        return Learner(optimizer, {LIVE: nullcontext, "slow": lookahead.read_out})

    return build


def _ewc(strength: float) -> Build:
    def build(model: nn.Module, kind: str, lr: float) -> Learner:
        return Learner(_adamw(model, kind, lr), ewc=EWC(model, strength))

    return build


def _memory(base: str, preset: str | None, **options: Any) -> Build:
    def build(model: nn.Module, kind: str, lr: float) -> Learner:
        optimizer = BASES[base][1](model, kind, lr)
        memory = WeightMemory(optimizer, preset=preset, **options)
        read_outs: dict[str, ReadOut] = {LIVE: nullcontext}
        levels = len(optimizer.param_groups[0]["memory_frequencies"])
        for level in range(1, levels + 1):
            read_outs[f"level {level}"] = lambda n=level: memory.read_out(n)
        read_outs["mean"] = lambda: memory.read_out("mean")
        aliases = {}
        if preset is not None:
            chosen = _resolved(preset, options)[3]
            aliases[PRESET_READ_OUT] = (
                chosen if chosen == "mean" else f"level {chosen}" if chosen else LIVE
            )
        return Learner(optimizer, read_outs, aliases=aliases)

    return build


def _resolved(preset: str | None, options: dict[str, Any]) -> tuple[Any, ...]:
    """What the settings come to, so that results of a preset that has changed are not reused.

    Returns:
        frequencies, write, pull, what is read out where nothing is said (a level, ``"mean"``, None
        without a preset), and the copies' dtype, if one is asked for.
    """
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    WeightMemory(optimizer, preset=preset, **options)
    group = optimizer.param_groups[0]
    found = [tuple(group[f"memory_{key}"]) for key in ("frequencies", "write", "pull")]
    read = None if preset is None else PRESETS[preset].read
    if isinstance(read, int) and read < 0:  # from the slowest on
        read += len(found[0]) + 1
    dtype = options.get("dtype")
    return (*found, read, *([] if dtype is None else [dtype]))


def _memory_method(
    key: str, label: str, base: str, preset: str | None = None, **options: Any
) -> Method:
    settings = (base, *_resolved(preset, options))
    build = _memory(base, preset, **options)
    return Method(key, label, "memory", build, BASES[base][2], settings)


def _make_methods() -> dict[str, Method]:
    def base(key: str, kind: str, build: Build | None = None, label: str | None = None) -> Method:
        name, _, lrs = BASES[key]
        return Method(key, label or name, kind, build or _plain(key), lrs)

    found = [
        base("adamw", "control", _with_averages("adamw")),
        Method("accumulation", "AdamW, accumulation 4", "control", _plain("adamw", accumulate=4)),
        base("adamw_lrf", "control", _with_averages("adamw_lrf")),
        base("sgd_momentum", "control"),
        base("sgd", "control", _with_averages("sgd")),
        base("sgd_lrf", "control", _with_averages("sgd_lrf")),
        Method("lookahead", "Lookahead 10 / 0.5", "control", _lookahead("adamw")),
        Method("lookahead_lrf", "Lookahead, lr / f", "control", _lookahead("adamw_lrf")),
        *(
            Method(f"ewc_{s:g}", f"AdamW, EWC {s:g}", "control", _ewc(s), settings=(s,))
            for s in EWC_STRENGTHS
        ),
        base("windows", "other", label="windows, long"),
        base("windows_short", "other", label="windows, short"),
        Method("m3", "M3, alpha 0.25", "other", _plain("m3"), settings=("alpha", 0.25)),
        _memory_method("continual", "memory 'continual'", "adamw", "continual"),
        _memory_method("continual_lrf", "memory 'continual', lr / f", "adamw_lrf", "continual"),
        _memory_method("replay", "memory 'replay'", "adamw", "replay"),
        _memory_method("replay_lrf", "memory 'replay', lr / f", "adamw_lrf", "replay"),
        *(parse_memory(f"{name}:10/50:0.5:0.5") for name in ("adamw", "adamw_lrf", "sgd_lrf")),
        Method("joint", "joint training", "ceiling", _plain("adamw"), joint=True),
    ]
    return {method.key: method for method in found}


def parse_memory(text: str) -> Method:
    """A WeightMemory by its settings: ``BASE:FREQUENCIES:WRITE:PULL``, levels divided by ``/``.

    Such as ``adamw_lrf:10/50:0.5:0.5`` or ``adamw:1/10:0.01/0.1:0``; with ``:bfloat16`` behind it,
    of copies in that dtype.

    Raises:
        ValueError: it is not of this form, or WeightMemory refuses the settings.
    """
    parts = text.split(":")
    if len(parts) not in (4, 5) or parts[0] not in BASES:
        raise ValueError(
            f"{text!r} is no memory: write BASE:FREQUENCIES:WRITE:PULL, such as "
            f"adamw_lrf:10/50:0.5:0.5, with BASE one of {', '.join(BASES)}"
        )
    dtype = parts[4] if len(parts) == 5 else None
    try:
        frequencies = tuple(int(f) for f in parts[1].split("/"))
        write, pull = (tuple(float(r) for r in part.split("/")) for part in parts[2:4])
    except ValueError as error:
        raise ValueError(f"{text!r} is no memory: {error}") from None
    options = {
        "frequencies": frequencies,
        "write": write * len(frequencies) if len(write) == 1 else write,
        "pull": pull * len(frequencies) if len(pull) == 1 else pull,
    }
    label = f"memory {parts[1]} ({parts[2]}, {parts[3]}) on {BASES[parts[0]][0]}"
    if dtype is not None:
        options["dtype"] = dtype
        label += f", copies in {dtype}"
    return _memory_method(text, label, parts[0], **options)


def get(key: str) -> Method:
    """The method of this key, which may be the settings of a memory.

    Raises:
        ValueError: there is none.
    """
    if key in METHODS:
        return METHODS[key]
    if ":" in key:
        return parse_memory(key)
    raise ValueError(f"{key!r} is no method: choose among {', '.join(METHODS)}")


METHODS = _make_methods()
