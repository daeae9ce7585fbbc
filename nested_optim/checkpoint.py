"""Loading state: checked as a whole, merged with the live groups, kept in its own dtypes.

``torch.optim.Optimizer.load_state_dict`` replaces each group by the saved one and casts every
tensor to its parameter's dtype. Both lose what these optimizers need: options that a torch
checkpoint does not know, and float32 state of bfloat16 parameters.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .names import strip_wrapper_prefixes
from .tensors import capturing, whole

if TYPE_CHECKING:
    from .optimizer import LevelOptimizer

# Schedulers and hooks move these while training, so a difference is no surprise.
_MOVED_IN_TRAINING = frozenset({"lr", "initial_lr", "meta_step"})
# Those that cycle momentum against the learning rate say so by this key of a group.
_CYCLED, _CYCLES = frozenset({"betas", "momentum"}), "max_momentum"


def load(optimizer: LevelOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What ``optimizer.__setstate__`` needs to be where ``state_dict`` was; changes nothing.

    Raises:
        ValueError: groups, names or shapes differ, or an option's value is invalid.
    """
    live_groups = optimizer.param_groups
    saved_groups = [optimizer._import_group(deepcopy(g)) for g in state_dict["param_groups"]]
    _check_sizes(live_groups, saved_groups)
    _check_names(live_groups, saved_groups)

    groups: list[dict[str, Any]] = []
    changed: dict[str, tuple[int, Any, Any]] = {}
    owners: dict[Any, tuple[Tensor, dict[str, Any], str]] = {}
    for at, (live, saved) in enumerate(zip(live_groups, saved_groups)):
        group = {**{k: v for k, v in live.items() if k != "params"}, **saved}
        # Names that agree up to a wrapper's prefix are best told as they are here.
        group.update((k, live[k]) for k in ("params", "param_names") if k in live)
        label = f"checkpoint's {optimizer._group_label(at, group)}: "
        group.update(optimizer._check_options(group, label))
        moved = _MOVED_IN_TRAINING.union(optimizer._learned_keys)
        if _CYCLES in group:
            moved |= _CYCLED
        for key in optimizer.defaults.keys() - moved:
            if not _same(live[key], group[key]):
                changed.setdefault(key, (at, live[key], group[key]))
        for i, (key, param) in enumerate(zip(saved["params"], live["params"])):
            owners[key] = (param, group, optimizer._param_label(live, i))
        groups.append(group)

    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for key, entries in state_dict["state"].items():
        if key not in owners:
            state[key] = entries
            continue
        param, group, label = owners[key]
        shapes = {name: optimizer._state_shape(param, group, name) for name in entries}
        # torch.distributed.checkpoint leaves an empty dict where a flattened one has no tensor.
        entries = {k: v for k, v in entries.items() if shapes[k] is None or isinstance(v, Tensor)}
        if "window_sum" not in entries and float(entries.get("window_count", 0)) > 0:
            raise ValueError(
                f"checkpoint's window of {label} holds gradients, but its 'window_sum' is missing: "
                "give the group the checkpoint's frequency before loading, and change it after"
            )
        for name, value in entries.items():
            shape = shapes[name]
            if shape is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"checkpoint's {name!r} of {label} has shape {tuple(value.shape)}, where this "
                    f"parameter needs {shape}: the checkpoint belongs to another model, or to the "
                    "same parameters in another order"
                )
            state[param][name] = optimizer._load_tensor(param, group, name, value)

    if changed:
        details = ", ".join(
            f"{key} (group {at}: {live!r} -> {saved!r})"
            for key, (at, live, saved) in sorted(changed.items())
        )
        warnings.warn(
            f"the checkpoint's options replace the optimizer's where they differ: {details}. To "
            "keep your own, set them in param_groups after loading.",
            stacklevel=5,  # load, load_state_dict and two frames of its decorator
        )
    return {"state": state, "param_groups": groups}


def find_state_probes(state: Any, work: list[Any]) -> set[Tensor]:
    """Parameters for which a step on ``work`` only serves to create state.

    ``torch.distributed.checkpoint`` makes a fresh optimizer's state by a step with lr 0 and
    zero gradients, which must not count as a gradient. Looked at only while a parameter has no
    state and lr is 0; reading the gradients then waits for the device once.
    """
    if torch.compiler.is_compiling():
        return set()
    fresh = [
        (group, [(p, g) for p, g in zip(params, grads) if not state.get(p)])
        for group, params, grads in work
    ]
    if not any(pairs for _, pairs in fresh) or capturing():
        return set()
    params, moves = [], []
    for group, pairs in fresh:
        lr = group["lr"]
        if not pairs or float(lr.detach() if isinstance(lr, Tensor) else lr) != 0:
            continue
        for p, grad in pairs:
            moves.append(whole((_stored(grad) != 0).any()))  # ranks must decide alike
            params.append(p)
    moved: dict[int, bool] = {}
    for device in {move.device for move in moves}:
        here = [i for i, move in enumerate(moves) if move.device == device]
        moved.update(zip(here, torch.stack([moves[i] for i in here]).tolist()))
    return {p for i, p in enumerate(params) if not moved[i]}


def _stored(grad: Tensor) -> Tensor:
    """What a gradient of any layout holds in memory."""
    if grad.layout is torch.sparse_coo:
        return grad._values()  # which may say an element in several parts
    return grad if grad.layout is torch.strided else grad.values()


def _check_sizes(live_groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    if len(live_groups) != len(saved_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)} in the checkpoint, {len(live_groups)} here"
        )
    for at, (live, saved) in enumerate(zip(live_groups, saved_groups)):
        if len(live["params"]) != len(saved["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group: group {at} has {len(saved['params'])} parameters in the "
                f"checkpoint, {len(live['params'])} here"
                + _name_difference(live.get("param_names"), saved.get("param_names"))
            )
        if "name" in live and "name" in saved and live["name"] != saved["name"]:
            raise ValueError(
                f"param group {at} is called {live['name']!r} here and {saved['name']!r} in the "
                "checkpoint: build the groups in the checkpoint's order"
            )


def _name_difference(live: list[str] | None, saved: list[str] | None) -> str:
    if not live or not saved:
        return ""
    here, there = [[strip_wrapper_prefixes(name) for name in names] for names in (live, saved)]
    only_here = [name for name in here if name not in there][:5]
    only_there = [name for name in there if name not in here][:5]
    return f"; only here: {only_here}, only in the checkpoint: {only_there}"


def _check_names(live_groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    """Positions decide which state a parameter gets, so names at one position must agree."""
    for at, (live, saved) in enumerate(zip(live_groups, saved_groups)):
        pairs = list(zip(live.get("param_names") or (), saved.get("param_names") or ()))
        wrong = [
            (i, a, b)
            for i, (a, b) in enumerate(pairs)
            if strip_wrapper_prefixes(a) != strip_wrapper_prefixes(b)
        ]
        if wrong:
            listed = "; ".join(f"{i}: {a!r} here, {b!r} in the checkpoint" for i, a, b in wrong[:5])
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(
                f"parameter names of group {at} differ from the checkpoint's at position {listed}"
                f"{more}. Build the groups in the checkpoint's order"
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return bool(torch.equal(torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu()))
    return bool(a == b)
