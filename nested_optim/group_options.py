"""Options of param groups and patterns over names: checked, compared, and explained when wrong."""

from __future__ import annotations

import difflib
import fnmatch
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

from .levels import check_frequency
from .names import FoundParameters

# fmt: off
KNOWN_KEYS = (
    "match", "frequency", "lr", "lr_mult", "weight_decay", "name", "betas", "eps", "amsgrad",
    "window", "decoupled", "state_dtype", "maximize", "foreach", "capturable", "differentiable",
    "fused", "kahan_sum", "algorithm", "mode", "slow_frequency", "alpha", "second_moment",
    "ns_steps", "ns_coefficients", "ns_dtype", "adjust_lr", "momentum", "nesterov", "flatten",
    "out_dim", "split_sizes", "num_heads", "max_batch_bytes",
    "delta_rate", "normalized", "product_dtype", "memory", "objective", "base", "batch", "decay",
    "max_tokens", "reduction", "window_samples",
    "memory_frequencies", "memory_write", "memory_pull", "memory_dtype",
)
# fmt: on
_OTHER_WORDS = {"learning_rate": "lr", "wd": "weight_decay"}  # no close matches for difflib


def is_bias_or_1d(name: str, param: Parameter, found: FoundParameters) -> bool:
    """Whether ``no_decay_1d`` means this parameter."""
    if name.endswith("bias"):
        return True
    if found.flattened or is_lazy(param):
        why = "flattened by FSDP (fully_shard keeps it)" if found.flattened else "not known yet"
        raise ValueError(
            f"no_decay_1d needs the shape of {name!r}, which is {why}: set weight_decay by rules"
        )
    # DeepSpeed's ZeRO-3 leaves an empty tensor in place and keeps the shape beside it.
    return len(getattr(param, "ds_shape", param.shape)) <= 1


def matcher(pattern: str, syntax: str, label: str) -> Callable[[str], Any]:
    """Whether a name matches, as a function whose result is true or false."""
    if syntax == "glob":
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    try:
        return re.compile(pattern).search
    except re.error as error:
        raise ValueError(
            f"{label}: {pattern!r} is not a valid regular expression: {error}. For wildcards, pass "
            "syntax='glob'"
        ) from error


def why_unmatched(
    label: str,
    patterns: list[str],
    matches: Callable[[str], bool],
    found: FoundParameters,
    syntax: str,
) -> str:
    """What to say of patterns that match no trainable parameter: tied, frozen, or misspelt."""
    if tied := [name for name in found.aliases if matches(name)]:
        firsts = sorted({found.aliases[name] for name in tied})
        return (
            f"{label}: matches only {listing(tied)}, tied to {listing(firsts)}. A tied "
            "parameter goes by its first name: match that"
        )
    if frozen := [name for name in found.frozen if matches(name)]:
        return (
            f"{label}: matches only frozen parameters: {listing(frozen)}. Set requires_grad "
            "on them, or remove the pattern"
        )
    message = f"{label}: matches no parameter."
    wider = f"*{patterns[0]}*"
    if syntax == "glob" and any(fnmatch.fnmatchcase(name, wider) for name in found.names):
        return f"{message} A glob must match the whole name: did you mean {wider!r}?"
    if close := _close_names(patterns, found.names):
        return f"{message} Did you mean {listing(close)}?"
    return f"{message} The names are {listing(found.names)}"


def _close_names(patterns: list[str], names: list[str]) -> list[str]:
    """Names, module paths and components of names that look like a word of the patterns."""
    candidates: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            for candidate in (parts[end - 1], ".".join(parts[:end])):
                candidates.setdefault(candidate.lower(), candidate)
    close: dict[str, None] = {}
    for pattern in patterns:
        # A regular expression less its classes (\d, \w) and the backslashes of its dots.
        plain = re.sub(r"\\[A-Za-z]", "", pattern).replace("\\", "")
        for word in re.findall(r"[^\W\d]\w+", plain) + re.findall(r"[\w.]+", plain):
            if word not in candidates.values():  # those are not the typo
                matches = difflib.get_close_matches(word.lower(), candidates)
                close.update(dict.fromkeys(candidates[match] for match in matches))
    return list(close)


def check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(map(repr, choices))}, but is {value!r}")


def check_options(options: Mapping[str, Any], where: str, reserved: Sequence[str] = ()) -> None:
    """Raise for a key that is misspelt or out of place, and for a value that no optimizer takes."""
    for key, value in options.items():
        if not isinstance(key, str):
            raise ValueError(f"{where}option names are strings, but one is {key!r}")
        if key in reserved or key in ("params", "param_names"):
            raise ValueError(f"{where}{key!r} cannot be set here: remove it")
        if key not in KNOWN_KEYS:
            if close := _close_keys(key.lower(), (*KNOWN_KEYS, *reserved)):
                meant = " or ".join(map(repr, close))
                raise ValueError(f"{where}unknown option {key!r}: did you mean {meant}?")
        elif key == "frequency":
            check_frequency(value, where)
        elif key in ("lr", "weight_decay", "lr_mult"):
            check_number(value, key, where)


def _close_keys(key: str, known: Sequence[str]) -> list[str]:
    if key in _OTHER_WORDS:
        return [_OTHER_WORDS[key]]
    # Beginnings count too: by difflib's measure, "freq" is far from "frequency".
    longer = [word for word in known if len(key) > 3 and word.startswith(key)]
    return longer or difflib.get_close_matches(key, known, cutoff=0.82)


def check_number(value: Any, key: str, where: str) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{where}{key} as a tensor must have one element, not {value.numel()}")
    elif isinstance(value, bool):
        raise ValueError(f"{where}{key} must be a number, but is {value!r}")
    else:
        check_real(value, key, where)
    if not 0 <= value < math.inf:
        raise ValueError(f"{where}{key} must be finite and not negative, but is {value!r}")


def check_real(value: Any, key: str, where: str) -> None:
    """Raise if this is neither a real number nor a tensor."""
    if not isinstance(value, (Tensor, numbers.Real)):
        hint = " (YAML reads 1e-4 as a string: write 1.0e-4)" if isinstance(value, str) else ""
        raise ValueError(f"{where}{key} must be a number, but is {value!r}{hint}")


def check_betas(betas: Any, where: str) -> None:
    """Raise if these are no sequence of numbers and tensors."""
    if not hasattr(betas, "__iter__"):
        raise ValueError(f"{where}Invalid betas: {betas!r}. Give a tuple of numbers")
    for i, beta in enumerate(betas):
        check_real(beta, f"betas[{i}]", where)


def same(a: Any, b: Any) -> bool:
    """Equality of option values, dicts of them and tensors included."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


def with_own_lr(options: dict[str, Any]) -> dict[str, Any]:
    """The options with a copy of a tensor lr: schedulers write it in place, for one group only."""
    lr = options.get("lr")
    return {**options, "lr": lr.detach().clone()} if isinstance(lr, Tensor) else options


def listing(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def flat_option(options: Mapping[str, Any], key: str, count: int, sizes: str, where: str) -> Tensor:
    """A flat tensor of learned numbers as a group keeps it: float32, beside its parameters.

    Args:
        options: the group's.
        key: the tensor's.
        count: how many numbers it has to have.
        sizes: what that follows from.
        where: what errors begin with.

    Raises:
        ValueError: it is no tensor, or not of so many numbers.
    """
    value = options[key]
    if not isinstance(value, Tensor) or value.shape != (count,):
        shape = tuple(value.shape) if isinstance(value, Tensor) else value
        raise ValueError(
            f"{where}{key} must be a tensor of {count} numbers for {sizes}, but is {shape}"
        )
    params = options.get("params") or []
    return value.to(params[0].device if params else value.device, torch.float32)
