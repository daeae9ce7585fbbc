"""The inputs of `DeepNestedOptimizer`, and the class with its learned parts off."""

from __future__ import annotations

from typing import Any

import torch
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInput

from nested_optim import DeepNestedOptimizer
from nested_optim.meta import learned

from .inputs import bad, options


class PlainDeepNested(DeepNestedOptimizer):
    """DeepNestedOptimizer with every learned part off: NestedOptimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        off = dict.fromkeys(learned.SWITCHES.values(), False)
        super().__init__(*args, **{**off, **kwargs})


def learning_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    fast = {"meta_lr": 0.01, "meta_update_freq": 2}
    small = {"cms_frequencies": (1, 2), "momentum_hidden_dim": 4, "controller_hidden_dim": 4}
    inputs = [
        options("default"),
        options("learning", **fast, cms_frequencies=(1, 2, 3)),
        options("learning, weight_decay, amsgrad", **fast, **small, weight_decay=0.1, amsgrad=True),
        options("coupled, maximize", **fast, weight_decay=0.1, decoupled=False, maximize=True),
        options("sum of 2, clipped", **fast, **small, frequency=2, window="sum", max_grad_norm=9.0),
        options("not normalized", **fast, **small, normalize=False),
        options("float32 state", **fast, state_dtype=torch.float32, weight_decay=0.1),
        options("explicit", mode="explicit"),
    ]
    if dtype == torch.float16:
        for entry in inputs:
            entry.kwargs["eps"] = 0.1
    return inputs


def learning_errors() -> list[ErrorOptimizerInput]:
    """What is refused beside what every class with levels refuses."""
    return [
        bad("negative eps", ValueError, "Invalid epsilon value: -1.0", eps=-1.0),
        bad("unknown mode", ValueError, "Invalid mode: 'auto'.*simple, explicit", mode="auto"),
        bad("unknown unroll", ValueError, "Invalid unroll: 'half'.*stepwise", unroll="half"),
        bad("meta_lr from YAML", ValueError, "Invalid meta_lr: '1e-4'", meta_lr="1e-4"),
        bad("negative meta_lr", ValueError, "Invalid meta_lr: -1.0", meta_lr=-1.0),
        bad("no period", ValueError, "Invalid meta_update_freq: 0", meta_update_freq=0),
        bad("no units", ValueError, "Invalid momentum_hidden_dim: 0", momentum_hidden_dim=0),
        bad("one-sided range", ValueError, "0 < min_lr_mult < 1 < max_lr_mult", min_lr_mult=1.0),
        bad("no fast momentum", ValueError, "The first is 1", cms_frequencies=(10, 100)),
        bad("descending", ValueError, "each further one is larger", cms_frequencies=(1, 4, 4)),
        bad("half a step", ValueError, r"cms_frequencies\[1\]: .*2.5", cms_frequencies=(1, 2.5)),
        bad("no norm", ValueError, "Invalid max_grad_norm: 0.0.*None", max_grad_norm=0.0),
        bad("a switch of 1", ValueError, "Invalid learn_lr: 1. True or False", learn_lr=1),
        bad("two rates", ValueError, "lr=0.1 and base_lr=0.2 are one option", lr=0.1, base_lr=0.2),
        bad("fused", RuntimeError, "`fused` needs mode='simple'", fused=True, mode="explicit"),
        bad("capturable", RuntimeError, "does not support `capturable`", capturable=True),
        bad("differentiable", RuntimeError, "not support `differentiable`", differentiable=True),
        bad("kahan", RuntimeError, "does not support `kahan_sum`", kahan_sum=True),
        bad(
            "tensor betas",
            RuntimeError,
            "does not support betas that are tensors",
            betas=(torch.tensor(0.9), torch.tensor(0.99)),
        ),
    ]
