"""Param groups from a model: by rules over names, by depth, by role.

Everything here reads the names and shapes of ``model.named_parameters()``, returns plain lists that
any ``torch.optim`` optimizer takes, and changes nothing of the caller's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import Parameter

from .depth import count_layers, infer_param_depth, layer_ids, layer_ranks
from .group_options import (
    check_choice,
    check_number,
    check_options,
    is_bias_or_1d,
    listing,
    matcher,
    same,
    why_unmatched,
    with_own_lr,
)
from .levels import check_frequency
from .names import FoundParameters, find_parameters, strip_wrapper_prefixes

__all__ = [
    "build_param_groups",
    "count_layers",
    "depth_groups",
    "group_titans_params",
    "infer_param_depth",
    "strip_wrapper_prefixes",
]


def build_param_groups(
    model: nn.Module,
    rules: Iterable[Mapping[str, Any]],
    *,
    defaults: Mapping[str, Any] | None = None,
    no_decay_1d: bool = False,
    layer_decay: float | None = None,
    on_unmatched: Literal["default", "error"] = "default",
    on_unused_rule: Literal["error", "warn", "ignore"] = "error",
    syntax: Literal["regex", "glob"] = "regex",
) -> list[dict[str, Any]]:
    r"""Sort a model's parameters into param groups by rules over their names; first match wins.

    A name is what ``model.named_parameters()`` gives, less the prefixes of ``torch.compile``, FSDP,
    activation checkpointing and data-parallel wrappers. Frozen parameters are left out; a tied one
    is taken once, under its first name. A rule is a dict:

    - ``match``: a pattern, or a list of patterns of which one must match;
    - ``lr``, or ``lr_mult`` (times ``defaults["lr"]``), not both;
    - ``frequency``, ``weight_decay``: options of the group, like any further key (which is refused
      only if it looks like a misspelt known one);
    - ``name``: the group's name; without one, ``rule<i>``. Rules with equal options and the same
      name, or both without, share a group; the same name with other options is an error.

    Args:
        model: the module that is trained.
        rules: the rules, most specific first. May be empty.
        defaults: options of every group whose rule does not set them.
        no_decay_1d: parameters of at most one dimension, and biases, get weight decay 0 whatever
            their rule says, in groups of their own named ``<name>_no_decay``.
        layer_decay: in (0, 1]. Multiplies every lr, a rule's own included, by
            ``layer_decay ** (num_layers + 1 - layer_id)``, in groups ``<name>_layer<layer_id>``.
            ``layer_id`` is 0 for embeddings, i + 1 for layer i, and ``num_layers + 1`` (so the full
            lr) for the head, the final norm and what is not recognised; ``num_layers`` is
            :func:`count_layers`. Needs ``defaults["lr"]``.
        on_unmatched: ``"default"`` puts parameters that no rule matches into a last group named
            ``"default"``; ``"error"`` refuses them.
        on_unused_rule: what to do about a rule that gets no parameter.
        syntax: ``"regex"`` is ``re.search``: a pattern matches anywhere in the name unless anchored
            by ``^`` and ``$``. ``"glob"`` is ``fnmatch.fnmatchcase`` on the whole name.

    Returns:
        Groups in the order of their first rule, the default group last. ``"params"`` is a list of
        ``(name, parameter)`` tuples in the model's order; every group has a ``"name"`` of its own,
        and, where lr is a tensor, a copy of its own.

    Raises:
        ValueError: an invalid rule or option, an unused rule (with the close matches), an unmatched
            parameter under ``on_unmatched="error"``, or a model without trainable parameters.
        TypeError: ``model`` is not a module, or ``rules`` or ``defaults`` not of the stated kind.

    Example::

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> slow = {"match": r"^0\.", "frequency": 10, "lr_mult": 0.5, "name": "slow"}
        >>> groups = build_param_groups(model, [slow], defaults={"lr": 1e-3})
        >>> [(g["name"], g["lr"], [name for name, _ in g["params"]]) for g in groups]
        [('slow', 0.0005, ['0.weight', '0.bias']), ('default', 0.001, ['2.weight', '2.bias'])]
    """
    check_choice("on_unmatched", on_unmatched, ("default", "error"))
    check_choice("on_unused_rule", on_unused_rule, ("error", "warn", "ignore"))
    check_choice("syntax", syntax, ("regex", "glob"))
    if defaults is not None and not isinstance(defaults, Mapping):
        raise TypeError(f"defaults must be a dict of options, but got {defaults!r}")
    base = dict(defaults or {})
    check_options(base, "defaults: ", reserved=("lr_mult", "match", "name"))
    if layer_decay is not None:
        check_number(layer_decay, "layer_decay", "")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], but is {layer_decay}")
        if "lr" not in base:
            raise ValueError("layer_decay needs a base learning rate: pass defaults={'lr': ...}")
    if isinstance(rules, (Mapping, str)) or not isinstance(rules, Iterable):
        raise TypeError(f"rules must be a list of dicts, but got {type(rules).__name__}: {rules!r}")
    parsed = [_parse_rule(i, rule, base, syntax) for i, rule in enumerate(rules)]
    default = _Rule(len(parsed), "default", "the default group", [], [], base)
    homes = _merge_equal([*parsed, default])
    found = find_parameters(model)

    owners = {n: next((r for r in parsed if r.matches(n)), default) for n in found.trainable}
    used = {rule.index for rule in owners.values()}
    for rule in parsed:
        if rule.index not in used and on_unused_rule != "ignore":
            message = _why_unused(rule, found, owners, syntax)
            if on_unused_rule == "error":
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
    unmatched = [name for name, rule in owners.items() if rule is default]
    if unmatched and on_unmatched == "error":
        raise ValueError(
            f"no rule matches {listing(unmatched)}. Add a rule, or pass on_unmatched='default'"
        )

    ids, num_layers = layer_ids(found.names) if layer_decay is not None else ({}, 0)
    members: dict[tuple[int, int | None, bool], list[tuple[str, Parameter]]] = {}
    for name, param in found.trainable.items():
        home = homes[owners[name].index]
        decays = no_decay_1d and not same(home.options.get("weight_decay"), 0)
        key = (home.index, ids.get(name), decays and is_bias_or_1d(name, param, found))
        members.setdefault(key, []).append((name, param))

    groups: dict[str, dict[str, Any]] = {}
    # Sorting by rule alone keeps the model's order among the groups of one rule.
    for (index, layer_id, no_decay), params in sorted(members.items(), key=lambda kv: kv[0][0]):
        options, name = dict(homes[index].options), homes[index].name or f"rule{index}"
        if layer_decay is not None and layer_id is not None:
            options["lr"] = options["lr"] * layer_decay ** (num_layers + 1 - layer_id)
            name += f"_layer{layer_id}"
        if no_decay:
            options["weight_decay"] = 0.0
            name += "_no_decay"
        if name in groups:
            raise ValueError(f"{homes[index].label}: there is a group {name!r} already: rename one")
        groups[name] = {"params": params, "name": name, **with_own_lr(options)}
    return list(groups.values())


def depth_groups(
    model: nn.Module,
    frequencies: Sequence[int] = (1, 10, 100),
    slow: Literal["shallow", "deep"] = "shallow",
    realise: Literal["window", "lr", "both"] = "window",
    **options: Any,
) -> list[dict[str, Any]]:
    """Split a model's parameters by depth into one group per frequency.

    Depths are those of :func:`infer_param_depth`, with layers renumbered among those of their stack
    that hold parameters; without numbered layers, the model's children are the layers, in order.
    The range from 0 to 1 is cut into equal bins, one per frequency; an edge is in the lower bin.

    Args:
        model: the module that is trained.
        frequencies: one per level, in any order; they are used exactly as given.
        slow: the end that gets the largest frequency.
        realise: what makes a level of frequency f slow: ``"window"``, an update every f gradients;
            ``"lr"``, the learning rate ``lr / f`` at every step, for which ``lr`` must be among the
            options (it is the fastest group's at f = 1); ``"both"``.
        options: further options of every group, e.g. ``lr=1e-3``.

    Returns:
        Groups from shallow to deep, named ``depth0``, ``depth1``, ...; ``"params"`` as in
        :func:`build_param_groups`. A bin without parameters gives no group, and a warning.

    Raises:
        ValueError: no or invalid frequencies, invalid options, no ``lr`` to divide, or no trainable
            parameters.

    Example::

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(g["name"], g["frequency"]) for g in depth_groups(model, frequencies=(1, 8))]
        [('depth0', 8), ('depth1', 1)]
    """
    check_choice("slow", slow, ("shallow", "deep"))
    check_choice("realise", realise, ("window", "lr", "both"))
    if isinstance(frequencies, str) or not isinstance(frequencies, Iterable):
        raise TypeError(f"frequencies must be a sequence of integers, but got {frequencies!r}")
    levels = [check_frequency(f, f"frequencies[{i}]: ") for i, f in enumerate(frequencies)]
    if not levels:
        raise ValueError("frequencies is empty: give one per level, such as (1, 10, 100)")
    levels.sort(reverse=slow == "shallow")
    reserved = ("frequencies", "frequency", "lr_mult", "match", "name")
    check_options(options, "depth_groups: ", reserved)
    if realise != "window" and "lr" not in options:
        raise ValueError(f"depth_groups: realise={realise!r} divides lr by the frequency: pass lr=")
    found = find_parameters(model)

    ranks = layer_ranks(found.names)
    bins: list[list[tuple[str, Parameter]]] = [[] for _ in levels]
    for name, param in found.trainable.items():
        rank, size = ranks.get(name, (None, 1))
        depth = infer_param_depth(name, size) if rank is None else (rank + 1) / size
        # The tolerance: rounding must not lift (i + 1) / n above an edge that it stands for.
        bins[max(0, math.ceil(depth * len(levels) - 1e-9) - 1)].append((name, param))
    if empty := [str(levels[i]) for i, params in enumerate(bins) if not params]:
        warnings.warn(
            f"depth_groups: no trainable parameter is as deep as frequency {', '.join(empty)} is "
            "for: give fewer frequencies, or use build_param_groups",
            stacklevel=2,
        )
    groups = []
    for i, params in enumerate(bins):
        if params:
            own = {**with_own_lr(options)}
            if realise != "window":
                own["lr"] = own["lr"] / levels[i]
            frequency = 1 if realise == "lr" else levels[i]
            groups.append({"params": params, "name": f"depth{i}", **own, "frequency": frequency})
    return groups


def group_titans_params(model: nn.Module) -> tuple[list[Parameter], list[Parameter]]:
    """Split a Titans-style model's parameters into the core's and the memory's.

    Memory is every parameter with a component ``memory_bank`` in its name. Both lists are in the
    model's order, without frozen parameters, and with tied ones once (under their first name); the
    memory's may be empty.

    Raises:
        ValueError: the model has no trainable parameters.

    Example::

        >>> model = nn.ModuleDict({"core": nn.Linear(4, 4), "memory_bank": nn.Linear(4, 4)})
        >>> core, memory = group_titans_params(model)
        >>> len(core), len(memory)
        (2, 2)
    """
    core: list[Parameter] = []
    memory: list[Parameter] = []
    for name, param in find_parameters(model).trainable.items():
        (memory if "memory_bank" in name.split(".") else core).append(param)
    return core, memory


@dataclass
class _Rule:
    index: int
    name: str | None
    label: str  # for errors
    patterns: list[str]
    matchers: list[Callable[[str], Any]]
    options: dict[str, Any]

    def matches(self, name: str) -> bool:
        return any(matcher(name) for matcher in self.matchers)


def _parse_rule(index: int, rule: Any, base: dict[str, Any], syntax: str) -> _Rule:
    if not isinstance(rule, Mapping):
        raise ValueError(
            f"rule {index} is {rule!r}, of type {type(rule).__name__}: write a dict such as "
            "{'match': 'pattern', 'frequency': 10}"
        )
    match, name = rule.get("match"), rule.get("name")
    label = f"rule {index} (match={match!r})"
    check_options(rule, f"{label}: ")
    if "match" not in rule:
        raise ValueError(f"{label}: 'match' is missing among its keys: {', '.join(rule) or 'none'}")
    patterns: list[Any] = list(match) if isinstance(match, (list, tuple)) else [match]
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"{label}: 'match' must be a non-empty string, or a list of them")
    if "name" in rule and not (isinstance(name, str) and name):
        raise ValueError(f"{label}: 'name' must be a non-empty string, but is {name!r}")
    options = {**base, **{k: v for k, v in rule.items() if k not in ("match", "name", "lr_mult")}}
    if "lr_mult" in rule:
        if "lr" in rule:
            raise ValueError(f"{label}: sets both 'lr' and 'lr_mult': keep one of them")
        if "lr" not in base:
            raise ValueError(
                f"{label}: 'lr_mult' needs a base learning rate: pass defaults={{'lr': ...}}, or "
                "set 'lr' in the rule"
            )
        options["lr"] = base["lr"] * rule["lr_mult"]
    matchers = [matcher(pattern, syntax, label) for pattern in patterns]
    return _Rule(index, name, label, patterns, matchers, options)


def _merge_equal(rules: list[_Rule]) -> list[_Rule]:
    """For each rule the first of the same name (or none) and options, whose group it shares."""
    homes: list[_Rule] = []
    for rule in rules:
        namesakes = [home for home in homes if home.name == rule.name]
        twins = [home for home in namesakes if same(home.options, rule.options)]
        if rule.name is not None and namesakes and not twins:
            raise ValueError(
                f"{rule.label} and {namesakes[0].label} share the name {rule.name!r} but not their "
                "options: rename one, or give both the same options"
            )
        homes.append(twins[0] if twins else rule)
    return homes


def _why_unused(rule: _Rule, found: FoundParameters, owners: dict[str, _Rule], syntax: str) -> str:
    if taken := [name for name in found.trainable if rule.matches(name)]:
        takers = dict(sorted((owners[name].index, owners[name].label) for name in taken))
        return (
            f"{rule.label}: all that it matches was taken by {' and '.join(takers.values())}: "
            f"{listing(taken)}. The first match wins: move this rule up, or remove it"
        )
    return why_unmatched(rule.label, rule.patterns, rule.matches, found, syntax)
