"""What ``DGD`` refuses: options that its rule, its capture of inputs or its steps cannot serve."""

from __future__ import annotations

import math
import numbers
from typing import Any

_CHOICES = {"batch": ("mean", "exact"), "base": ("sgd", "adamw"), "reduction": ("mean", "sum")}


def check(options: dict[str, Any], where: str) -> None:
    """Raise for options of a group that do not go together, or that are none."""
    decay = options["decay"]
    real = isinstance(decay, numbers.Real) and not isinstance(decay, bool)
    if not real or not 0.0 <= decay < math.inf:
        raise ValueError(f"{where}Invalid decay: {decay!r}. It is a number >= 0")
    for key, choices in _CHOICES.items():
        if options[key] not in choices:
            raise ValueError(
                f"{where}Invalid {key}: {options[key]!r}. Choose one of {', '.join(choices)}"
            )
    if options["base"] == "adamw" and options["batch"] == "exact":
        raise ValueError(
            f"{where}batch='exact' needs base='sgd': with AdamW's step there is no problem of "
            "which the update is the solution"
        )
    if options["base"] == "sgd" and options["amsgrad"]:
        raise ValueError(f"{where}`amsgrad` needs base='adamw': base='sgd' keeps no moments")
    if options["differentiable"] and decay:
        raise RuntimeError(
            f"{where}`differentiable` needs decay=0: captured inputs are constants to "
            "autograd, so a gradient through the update would lack a part"
        )
    if options["capturable"]:
        raise RuntimeError(
            f"{where}`capturable` is not supported: how many inputs a step sees varies, and "
            "all shapes in a CUDA graph are fixed"
        )
    if options["fused"]:
        raise RuntimeError(
            f"{where}`fused` is not supported: there is no fused kernel of this rule. Leave it "
            "at None"
        )
    check_sizes(options, where)


def check_sizes(options: dict[str, Any], where: str) -> None:
    """Raise for numbers of inputs that are none."""
    for key in ("max_tokens", "window_samples"):
        value = options[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{where}Invalid {key}: {value!r}. It is a number of inputs, an integer >= 1"
            )
