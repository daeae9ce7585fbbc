"""The options of ``DeepNestedOptimizer``'s learned parts: defaults, validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from ..names import find_parameters
from ..optimizer import ParamsT
from ..param_groups import group_titans_params
from . import learned, long_run
from .continuum import check_frequencies
from .controller import check_count, check_range

MODES = ("simple", "explicit")
#: How learned weights follow their gradients. There is no angle to the gradient of an unroll.
META_RULES = {"simple": ("cosine", "adam"), "explicit": ("adam",)}
HORIZONS = ("step", "run")
UNROLLS = ("exact", "stepwise", "first_order")
#: How many momenta a parameter may have.
MAX_MOMENTA = 8
#: Where a parameter's state keeps those beside the first.
SLOW_KEYS = tuple(f"exp_avg_slow{i}" for i in range(1, MAX_MOMENTA))

#: What fused=True has kernels for: momenta, and units in a layer of the networks.
MAX_FUSED_MOMENTA, MAX_FUSED_HIDDEN = 3, 128

#: Options that all groups share.
SHARED = (
    "meta_lr",
    "k_unroll",
    "cms_frequencies",
    "momentum_hidden_dim",
    "controller_hidden_dim",
    "mode",
    "meta_update_freq",
    "meta_rule",
    "horizon",
    "unroll",
    "min_lr_mult",
    "max_lr_mult",
    "max_grad_norm",
    "learn_lr",
    "learn_momentum",
    "learn_mixing",
    "normalize",
)
shared = itemgetter(*SHARED)

#: What NestedOptimizer can do and a learned update cannot, and why.
_PLAIN_ONLY = {
    "capturable": "it counts updates on the host",
    "differentiable": "meta_update() goes back through steps instead",
    "kahan_sum": "its rule carries no compensation",
}


def is_plain(group: Mapping[str, Any]) -> bool:
    """Whether these options leave NestedOptimizer's rule as it is."""
    return bool(group["normalize"]) and not learned.modules(group)


def check(options: dict[str, Any], where: str) -> dict[str, Any]:
    """Validate a group's options; return those that need a canonical form.

    Raises:
        ValueError: a value is out of its range.
        RuntimeError: an option needs the learned parts off.
    """
    canonical: dict[str, Any] = {
        "cms_frequencies": check_frequencies(options["cms_frequencies"], where)
    }
    if len(canonical["cms_frequencies"]) > MAX_MOMENTA:
        raise ValueError(f"{where}cms_frequencies has more than {MAX_MOMENTA} entries")
    for key in ("k_unroll", "momentum_hidden_dim", "controller_hidden_dim", "meta_update_freq"):
        check_count(key, options[key], where)
    for key, choices in (("mode", MODES), ("unroll", UNROLLS)):
        if options[key] not in choices:
            raise ValueError(
                f"{where}Invalid {key}: {options[key]!r}. Choose one of {', '.join(choices)}"
            )
    if options["meta_rule"] is None:
        canonical["meta_rule"] = "cosine" if options["mode"] == "simple" else "adam"
    else:
        check_rule(options, where)
    chosen = {**options, **canonical}
    if options["horizon"] is None:
        looks_back = (chosen["mode"], chosen["meta_rule"]) == ("simple", "cosine")
        canonical["horizon"] = "run" if looks_back else "step"
    else:
        check_horizon(chosen, where)
    low, high = check_range(options["min_lr_mult"], options["max_lr_mult"], where)
    canonical.update(min_lr_mult=low, max_lr_mult=high)
    rate = options["meta_lr"]
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
        raise ValueError(f"{where}Invalid meta_lr: {rate!r}. Give a number >= 0")
    canonical["meta_lr"] = float(rate)
    limit = options["max_grad_norm"]
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise ValueError(
                f"{where}Invalid max_grad_norm: {limit!r}. Give a number > 0, or None for no "
                "clipping"
            )
        canonical["max_grad_norm"] = float(limit)
    for key in (*learned.SWITCHES.values(), "normalize"):
        if not isinstance(options[key], bool):
            raise ValueError(f"{where}Invalid {key}: {options[key]!r}. True or False")
    check_plain_only({**options, **canonical}, where)
    canonical.update(learned.checked({**options, **canonical}, where))
    canonical.update(long_run.checked({**options, **canonical}, where))
    return canonical


def check_rule(options: Mapping[str, Any], where: str) -> None:
    """Raise if the mode has no such meta rule, or there is no such mode."""
    known = META_RULES.get(options["mode"])
    if known is None:
        raise ValueError(
            f"{where}Invalid mode: {options['mode']!r}. Choose one of {', '.join(MODES)}"
        )
    if options["meta_rule"] not in known:
        raise ValueError(
            f"{where}Invalid meta_rule: {options['meta_rule']!r}. Choose one of {', '.join(known)} "
            f"for mode={options['mode']!r}"
        )


def check_horizon(options: Mapping[str, Any], where: str) -> None:
    """Raise if there is no such horizon, or it does not go with the meta rule."""
    if options["horizon"] not in HORIZONS:
        raise ValueError(
            f"{where}Invalid horizon: {options['horizon']!r}. Choose one of {', '.join(HORIZONS)}"
        )
    if options["horizon"] == "run" and options["meta_rule"] != "cosine":
        raise ValueError(
            f"{where}horizon='run' is for meta_rule='cosine' in mode='simple': the way gone so far "
            "is compared by its angle. Choose horizon='step'"
        )


def check_plain_only(options: Mapping[str, Any], where: str) -> None:
    """Raise for what a learned update cannot do."""
    if is_plain(options):
        return
    if options["fused"] and (reason := _why_no_kernels(options)):
        raise RuntimeError(f"{where}`fused` {reason}")
    for key, why in _PLAIN_ONLY.items():
        if options[key]:
            raise RuntimeError(
                f"{where}a learned update does not support `{key}`: {why}. It is there with "
                "learn_lr, learn_momentum and learn_mixing off and normalize on"
            )
    if isinstance(options["betas"][0], Tensor):
        raise RuntimeError(
            f"{where}a learned update does not support betas that are tensors: give numbers"
        )


def check_same_pass(group: Mapping[str, Any], first: Mapping[str, Any], where: str) -> None:
    """Raise where one pass is to update some groups and not others."""
    if bool(group["fused"]) != bool(first["fused"]) and not is_plain(group):
        raise RuntimeError(
            f"{where}fused is {group['fused']}, but {first['fused']} in the first group: learned "
            "updates of all groups are one pass; set it for all of them"
        )


def wants_kernels(group: Mapping[str, Any]) -> bool:
    """Whether a learned step goes by the kernels wherever they can do it."""
    if group["fused"] is not None:
        return bool(group["fused"])
    return group["foreach"] is None and _why_no_kernels(group) is None


def _why_no_kernels(options: Mapping[str, Any]) -> str | None:
    """Why learned updates with these options have no kernels, if so."""
    if options["mode"] == "explicit":
        return (
            "needs mode='simple': in explicit mode the networks look at gradients before one pass "
            "over memory could use them"
        )
    if len(options["cms_frequencies"]) > MAX_FUSED_MOMENTA and options["learn_mixing"]:
        return (
            f"has kernels for {MAX_FUSED_MOMENTA} momenta at most, but cms_frequencies has "
            f"{len(options['cms_frequencies'])} entries"
        )
    for key in ("momentum_hidden_dim", "controller_hidden_dim"):
        if options[key] > MAX_FUSED_HIDDEN:
            return f"needs {key} <= {MAX_FUSED_HIDDEN}"
    return None


def subject(
    first: nn.Module | ParamsT | None,
    model: nn.Module | None,
    params: ParamsT | None,
    param_groups: ParamsT | None,
) -> tuple[nn.Module | None, ParamsT | None]:
    """The model and the parameters that a constructor was given, in whichever way.

    Args:
        first: its first argument, a model or parameters.
        model: named.
        params: named.
        param_groups: named; another name of ``params``.

    Raises:
        TypeError: one of them was given twice.
    """
    if isinstance(first, nn.Module):
        if model is not None and model is not first:
            raise TypeError("two models were given: as the first argument and as `model=`")
        model = first
    elif first is not None:
        if params is not None:
            raise TypeError("parameters were given twice: as the first argument and `params=`")
        params = first
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {model!r}")
    if params is None and param_groups is None and model is not None:
        params = _groups_of(model)
    return model, params


def check_functions(**functions: Any) -> None:
    """Raise for what is neither None nor a function.

    Raises:
        TypeError: it is something else.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function or None, but is {function!r}")


def unroll_of(unroll: str, use_gradient_checkpointing: bool) -> str:
    """The way of unrolling that two options come to.

    Raises:
        ValueError: they disagree, or the second is no switch.
    """
    if not isinstance(use_gradient_checkpointing, bool):
        raise ValueError(
            f"Invalid use_gradient_checkpointing: {use_gradient_checkpointing!r}. True or False"
        )
    if use_gradient_checkpointing and unroll not in ("exact", "stepwise"):
        raise ValueError(f"use_gradient_checkpointing=True means unroll='stepwise', not {unroll!r}")
    return "stepwise" if use_gradient_checkpointing else unroll


def _groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """The two groups of a bare model, ``core`` and, where it has one, ``memory``."""
    memory = set(group_titans_params(model)[1])
    named = find_parameters(model).trainable.items()
    groups = [
        {"name": "core", "params": [(n, p) for n, p in named if p not in memory]},
        {"name": "memory", "params": [(n, p) for n, p in named if p in memory]},
    ]
    return [group for group in groups if group["params"]]
