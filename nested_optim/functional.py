"""The update rules as TorchOpt gradient transformations: pure functions of trees of tensors.

Each function here returns a pair ``(init, update)`` that chains with TorchOpt's clipping and
schedules and runs in ``torchopt.FuncOptimizer``::

    import torchopt
    from nested_optim import functional

    rule = torchopt.chain(
        torchopt.clip.clip_grad_norm(1.0),
        functional.adamw(lr=1e-3, frequency={"embedding": 10, "head": 1}),
    )
    state = rule.init(params)
    updates, state = rule.update(grads, state, params=params, inplace=False)
    params = torchopt.apply_updates(params, updates, inplace=False)

Everything that goes in is differentiable: parameters, gradients, state, and learning rates, decay
rates and weight decay that are tensors. So a loss at the end of several updates can be
differentiated with respect to what chose them. The arithmetic is that of
:mod:`nested_optim.rules`, and what a transformation does is what the optimizer of the same name
does.

Two things of TorchOpt to know: ``update`` has ``inplace=True`` as its default, which writes into
the tensors that it is given and records no gradient, and ``clip_grad_norm`` treats the factor by
which it clips as a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import rules
from .delta_momentum import DeltaMomentum
from .functional_learned import LearnedTransformation, learned_adamw, learned_weights
from .leaf_rules import AdamWRule, M3Rule, MomentumRule, option_trees
from .m3 import ALGORITHMS, M3
from .nested import NestedOptimizer
from .rules import MatrixForm
from .tensors import resolve_dtype, to_scalar
from .transformations import (
    LevelState,
    LevelTransformation,
    Rate,
    checked_options,
    pytree,
    transformation,
)

__all__ = [
    "LearnedTransformation",
    "LevelState",
    "LevelTransformation",
    "adamw",
    "delta_momentum",
    "learned_adamw",
    "learned_weights",
    "m3",
    "momentum",
    "option_trees",
]


def adamw(
    lr: Rate | Any = 1e-3,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor | Any = 1e-2,
    amsgrad: bool = False,
    *,
    frequency: int | Any = 1,
    window: str = "mean",
    decoupled: bool = True,
    maximize: bool = False,
) -> LevelTransformation:
    r"""AdamW with levels: :class:`nested_optim.NestedOptimizer` as a gradient transformation.

    Where an option is said to be a *tree*, it may be one value for all parameters, or a tree of
    values with the structure of the parameters or the upper part of it.

    Args:
        lr: learning rate: a number, a tensor of one element (differentiable), or a schedule, called
            with how often ``update`` has been called before (an int from 0); a tree of these
            (default: 1e-3).
        betas: decay rates of the moments, numbers or tensors (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-8).
        weight_decay: a number or tensor, or a tree of these. It acts where a window closes
            (default: 1e-2).
        amsgrad: keep the largest second moment (default: False).
        frequency: gradients per update, an integer from 1 to 2^24, or a tree of these (default: 1).
        window: what an update sees of a window's gradients: their ``"mean"`` or ``"sum"`` (default:
            ``"mean"``).
        decoupled: AdamW's weight decay, or (False) Adam's (default: True).
        maximize: ascend (default: False).

    Returns:
        The transformation. While a window is open its parameter's update is zero.

    Raises:
        ValueError: an option is invalid. Values of tensors are not looked at.

    Numbers give the bits of ``NestedOptimizer(foreach=False)``, tensors those of
    ``NestedOptimizer(differentiable=True)`` up to the rounding of step counts. An element whose
    gradients have all been exactly zero has the finite derivative that it should have.
    """
    checked = checked_options(
        NestedOptimizer,
        lr,
        weight_decay,
        betas=_numbers(betas, (0.9, 0.999)),
        eps=eps,
        amsgrad=amsgrad,
        window=window,
        decoupled=decoupled,
        maximize=maximize,
    )
    rule = AdamWRule(_betas(betas, checked["betas"]), eps, amsgrad, decoupled, maximize)
    return transformation(rule, lr, weight_decay, frequency, window)


def momentum(
    lr: Rate | Any = 1e-3,
    momentum: float | Tensor = 0.9,
    weight_decay: float | Tensor | Any = 0.0,
    *,
    frequency: int | Any = 1,
    window: str = "mean",
    decoupled: bool = False,
    maximize: bool = False,
) -> LevelTransformation:
    """SGD with momentum on levels, in the form of ``torch.optim.SGD``.

    Args:
        lr: as for :func:`adamw` (default: 1e-3).
        momentum: decay rate of the buffer, a number in [0, 1] or a tensor of one element (default:
            0.9).
        weight_decay: weight of SGD's L2 penalty, or a tree of weights (default: 0.0).
        frequency, window: as for :func:`adamw`.
        decoupled: shrink parameters by ``lr * weight_decay`` instead (default: False).
        maximize: ascend (default: False).

    Raises:
        ValueError: an option is invalid. Values of tensors are not looked at.
    """
    return delta_momentum(
        lr,
        momentum,
        0.0,
        weight_decay=weight_decay,
        frequency=frequency,
        window=window,
        decoupled=decoupled,
        maximize=maximize,
    )


def delta_momentum(
    lr: Rate | Any = 1e-3,
    momentum: float | Tensor = 0.9,
    delta_rate: float = 1.0,
    *,
    normalized: bool = False,
    weight_decay: float | Tensor | Any = 0.0,
    frequency: int | Any = 1,
    window: str = "mean",
    decoupled: bool = False,
    maximize: bool = False,
) -> LevelTransformation:
    """:class:`nested_optim.DeltaMomentum` as a gradient transformation.

    Args:
        lr, weight_decay, frequency, window, decoupled, maximize: as for :func:`momentum`.
        momentum: decay rate of the buffer; a tensor only with ``delta_rate=0`` (default: 0.9).
        delta_rate: how much the buffer forgets along a gradient, at least 0 (default: 1.0).
        normalized: count that in units of ``momentum / |g|**2`` (default: False).

    Raises:
        ValueError: an option is invalid. Values of tensors are not looked at.
    """
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1:
            raise ValueError(f"Tensor momentum must be 1-element, not {tuple(momentum.shape)}")
        if delta_rate:
            raise ValueError("momentum as a Tensor is for delta_rate=0 only: give a number")
    checked = checked_options(
        DeltaMomentum,
        lr,
        weight_decay,
        momentum=0.0 if isinstance(momentum, Tensor) else momentum,
        delta_rate=delta_rate,
        normalized=normalized,
        window=window,
        decoupled=decoupled,
        maximize=maximize,
    )
    value = to_scalar(momentum) if isinstance(momentum, Tensor) else checked["momentum"]
    rule = MomentumRule(value, checked["delta_rate"], normalized, decoupled, maximize)
    return transformation(rule, lr, weight_decay, frequency, window)


def m3(
    lr: Rate | Any = 1e-3,
    betas: Sequence[float] = (0.95, 0.95, 0.9),
    alpha: float = 0.0,
    slow_frequency: int = 10,
    ns_steps: int = 5,
    ns_coefficients: str | Sequence[Any] = "quintic",
    eps: float = 1e-8,
    weight_decay: float | Tensor | Any = 1e-2,
    *,
    algorithm: str | Any = "m3",
    form: MatrixForm | Any = None,
    adamw_betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    second_moment: str | None = None,
    adjust_lr: str | None = "match_rms_adamw",
    nesterov: bool = True,
    ns_dtype: torch.dtype | str | None = None,
    frequency: int | Any = 1,
    window: str = "mean",
    maximize: bool = False,
) -> LevelTransformation:
    """:class:`nested_optim.M3` in its default mode, for matrices, and AdamW for the rest.

    Args:
        lr, frequency, window, maximize: as for :func:`adamw`.
        betas, alpha, slow_frequency, ns_steps, ns_coefficients, second_moment, adjust_lr, nesterov,
            ns_dtype: as for :class:`nested_optim.M3`.
        eps: M3's, and AdamW's (default: 1e-8).
        weight_decay: decoupled, a number or tensor, or a tree of these (default: 1e-2).
        algorithm: a tree of ``"m3"`` and ``"adamw"``. Shapes do not tell a hidden matrix from an
            embedding, so nothing is guessed; :func:`nested_optim.matrix_groups` knows a model's
            (default: ``"m3"`` for all).
        form: a tree of :class:`nested_optim.rules.MatrixForm`, which say how a parameter is read as
            matrices, or of None (default: None).
        adamw_betas: AdamW's decay rates (default: (0.9, 0.999)).

    Raises:
        ValueError: an option is invalid; from ``init``, a parameter under ``"m3"`` is no matrix.
    """
    checked = checked_options(
        M3,
        lr,
        weight_decay,
        shape=(1, 1),
        betas=betas,
        alpha=alpha,
        slow_frequency=slow_frequency,
        ns_steps=ns_steps,
        ns_coefficients=ns_coefficients,
        eps=eps,
        second_moment=second_moment,
        adjust_lr=adjust_lr,
        nesterov=nesterov,
        ns_dtype=ns_dtype,
        window=window,
        maximize=maximize,
    )
    other = adamw(betas=adamw_betas, eps=eps, maximize=maximize).levels.rule
    assert isinstance(other, AdamWRule)
    tree: Any = algorithm
    for value in pytree.tree_leaves(tree):
        if value not in ALGORITHMS:
            raise ValueError(f"Invalid algorithm: {value!r}. Choose of {', '.join(ALGORITHMS)}")
    tree = form
    for value in pytree.tree_leaves(tree):
        if not isinstance(value, MatrixForm):
            raise ValueError(f"Invalid form: {value!r}. Give rules.MatrixForm or None")
    options = {
        key: checked[key]
        for key in ("betas", "alpha", "slow_frequency", "eps", "adjust_lr", "nesterov", "maximize")
    }
    options["schedule"] = rules.ns_schedule(checked["ns_coefficients"], ns_steps)
    dtype = resolve_dtype(ns_dtype) if ns_dtype is not None else None
    rule = M3Rule(options, second_moment, dtype, other)
    made = transformation(rule, lr, weight_decay, frequency, window)
    return LevelTransformation(replace(made.levels, algorithm=algorithm, form=form))


# ---------------------------------------------------------------------- options


def _numbers(betas: Any, stand_in: tuple[float, float]) -> Any:
    """Betas whose values can be checked without waiting for a device."""
    return stand_in if any(isinstance(b, Tensor) for b in betas) else betas


def _betas(given: Any, checked: Any) -> tuple[Any, Any]:
    if not any(isinstance(b, Tensor) for b in given):
        return tuple(checked)  # type: ignore[return-value]
    if len(given) != 2:
        raise ValueError(f"Invalid betas: {given}. Give two, (beta1, beta2)")
    if any(isinstance(b, Tensor) and b.numel() != 1 for b in given):
        raise ValueError("Tensor betas must be 1-element")
    first, second = given
    return to_scalar(first), to_scalar(second)
