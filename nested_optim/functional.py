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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from torchopt import pytree
    from torchopt.base import GradientTransformation
except ImportError as error:
    raise ImportError(
        "nested_optim.functional builds on TorchOpt, which is not installed here: "
        "pip install torchopt==0.7.3"
    ) from error

from . import rules
from .delta_momentum import DeltaMomentum
from .leaf_rules import (
    AdamWRule,
    Leaf,
    M3Rule,
    MomentumRule,
    option_trees,
    window_dtype,
    zeros,
)
from .levels import check_frequency, check_window, divisor, window_closes
from .m3 import ALGORITHMS, M3
from .nested import NestedOptimizer
from .rules import MatrixForm
from .tensors import resolve_dtype, to_scalar

__all__ = [
    "LevelState",
    "LevelTransformation",
    "adamw",
    "delta_momentum",
    "m3",
    "momentum",
    "option_trees",
]

#: A learning rate: a number, a tensor of one element, or a schedule ``count -> number or tensor``.
Rate = float | Tensor | Callable[[int], Any]


_SWITCHES = {"amsgrad", "decoupled", "maximize", "nesterov"}


class LevelState(NamedTuple):
    """The state of a transformation: tensors only, as TorchOpt's tools expect."""

    #: How often the state was advanced, int64 on the CPU. Schedules are read at it.
    calls: Tensor
    #: For each parameter, in the parameters' structure, what its optimizer would hold in
    #: ``optimizer.state[parameter]``, under the same keys.
    leaves: Any


@dataclass(frozen=True)
class _Levels:
    """A rule on a tree of parameters, each with its own window."""

    rule: AdamWRule | MomentumRule | M3Rule
    window: str
    lr: Any
    weight_decay: Any
    frequency: Any
    algorithm: Any = None  # M3 has a choice
    form: Any = None

    def leaves(self, params: Any, calls: int) -> tuple[list[Any], Any, list[Leaf]]:
        """Parameters, their structure, and the options of each."""
        flat, spec = pytree.tree_flatten(params, none_is_leaf=True)
        paths = pytree.tree_paths(params, none_is_leaf=True)
        columns = [
            _broadcast(getattr(self, name), params, name)
            for name in ("lr", "weight_decay", "frequency", "algorithm", "form")
        ]
        options = [
            Leaf(path, to_scalar(lr(calls) if callable(lr) else lr), to_scalar(decay), *rest)
            for path, lr, decay, *rest in zip(paths, *columns)
        ]
        return flat, spec, options

    def init(self, params: Any) -> LevelState:
        flat, spec, options = self.leaves(params, 0)
        states: list[dict[str, Tensor]] = []
        for param, leaf in zip(flat, options):
            if param is None:
                states.append({})
                continue
            state = {"step": torch.zeros(()), "window_count": torch.zeros(())}
            state |= self.rule.start(param, leaf)
            if leaf.frequency > 1:
                state["window_sum"] = zeros(param, window_dtype(param))
            states.append(state)
        return LevelState(torch.zeros((), dtype=torch.int64), pytree.tree_unflatten(spec, states))

    def advance(
        self,
        grads: Any,
        state: LevelState,
        params: Any,
        *,
        flush: bool = False,
        inplace: bool = False,
    ) -> _Advance:
        """Everything after one gradient each, or after a flush; nothing is modified."""
        if params is None:
            raise ValueError(
                "these rules need the parameters: update(grads, state, params=params, ...)"
            )
        flat, spec, options = self.leaves(params, int(state.calls))
        states = _up_to(spec, state.leaves, "the state's leaves")
        flat_grads = [None] * len(flat) if flush else _up_to(spec, grads, "the gradients")
        for param, grad, leaf in zip(flat, flat_grads, options):
            _check_gradient(param, grad, leaf)
            if inplace and torch.is_grad_enabled():
                _refuse_learned(leaf, self.rule)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not inplace):
            results = [
                self.move(param, grad, kept, leaf, flush)
                for param, grad, kept, leaf in zip(flat, flat_grads, states, options)
            ]
        after, new = map(list, zip(*results)) if results else ([], [])
        return _Advance(spec, flat_grads, flat, after, states, new)

    def move(
        self, param: Any, grad: Any, kept: dict[str, Tensor], leaf: Leaf, flush: bool
    ) -> tuple[Any, dict[str, Tensor]]:
        """One parameter: its gradient enters the window, and the rule runs where that closes."""
        count = float(kept["window_count"]) if kept else 0.0
        if param is None or (grad is None and not (flush and count)):
            return param, kept
        dtype = window_dtype(param)
        if grad is None:
            total = kept["window_sum"]
        else:
            count += 1
            if count > 1:
                total = kept["window_sum"] + grad
            elif leaf.frequency == 1:
                total = grad
            else:  # a copy: the caller may reuse its gradients
                total = grad.to(dtype, copy=True)
        if not flush and not window_closes(count, leaf.frequency):
            return param, {**kept, "window_sum": total, "window_count": torch.tensor(count)}
        parts = divisor(count, self.window)
        gradient = (total / parts if parts != 1 else total).to(param.dtype)
        try:
            new, moved = self.rule.move(param, gradient, kept, leaf)
        except KeyError as error:
            raise ValueError(
                f"the state of {leaf.label()} has no {error}: it was made by another rule, or with "
                "other options; make one with this transformation's init"
            ) from None
        state = {**kept, **moved, "step": kept["step"] + 1, "window_count": torch.zeros(())}
        if "window_sum" in kept:  # a new one: the old sum holds on to the window's graph
            state["window_sum"] = zeros(param, dtype)
        return new, state

    def update(
        self, updates: Any, state: LevelState, *, params: Any = None, inplace: bool = True
    ) -> tuple[Any, LevelState]:
        """The updates that ``torchopt.apply_updates`` adds to the parameters, and the new state.

        ``inplace=True`` writes both into the tensors that were given, as TorchOpt's transformations
        do, and records no gradient.
        """
        done = self.advance(updates, state, params, inplace=inplace)
        if not inplace:
            return done.tree(done.updates()), LevelState(state.calls + 1, done.tree(done.new))
        with torch.no_grad():
            written = [_write(*pair) for pair in zip(done.grads, done.updates())]
            kept = [
                {key: _write(old.get(key), value) for key, value in new.items()}
                for old, new in zip(done.old, done.new)
            ]
            return done.tree(written), LevelState(state.calls.add_(1), done.tree(kept))


class _Advance(NamedTuple):
    """The structure of the trees, and flat lists: gradients, parameters and states."""

    spec: Any
    grads: list[Any]
    before: list[Any]
    after: list[Any]
    old: list[dict[str, Tensor]]
    new: list[dict[str, Tensor]]

    def tree(self, leaves: list[Any]) -> Any:
        return pytree.tree_unflatten(self.spec, leaves)

    def updates(self) -> list[Any]:
        """Differences, as TorchOpt adds them: None where there is no gradient."""
        return [
            None if grad is None else torch.zeros_like(old) if new is old else new - old
            for grad, old, new in zip(self.grads, self.before, self.after)
        ]


class LevelTransformation(GradientTransformation):
    """A rule of this package as TorchOpt's pair of ``init`` and ``update``, with two more methods.

    Made by :func:`adamw`, :func:`m3`, :func:`momentum` and :func:`delta_momentum`; it has no state
    of its own. Options may be changed in mid-run by going on with another transformation of the
    same rule from the same state, as windows live there.
    """

    levels: _Levels

    def __new__(cls, levels: _Levels) -> LevelTransformation:
        self = super().__new__(cls, levels.init, levels.update)
        self.levels = levels
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.levels,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.levels!r})"

    def step(self, grads: Any, state: LevelState, params: Any) -> tuple[Any, LevelState]:
        """The new parameters, to the optimizer's last bit, and the new state.

        ``update`` returns a difference, and adding it to the parameters rounds once more; this does
        not. Nothing is modified in place.

        Args:
            grads: gradients in the structure of ``params``; a leaf that is None is passed over, and
                keeps its phase.
            state: what ``init`` or the update before returned.
            params: the parameters, any tree of tensors.

        Raises:
            ValueError: trees of different structure, or a gradient of another shape.
            RuntimeError: a sparse gradient.
        """
        done = self.levels.advance(grads, state, params)
        return done.tree(done.after), LevelState(state.calls + 1, done.tree(done.new))

    def flush(self, state: LevelState, params: Any) -> tuple[Any, LevelState]:
        """Apply every partly filled window as if it were complete; as :meth:`step` otherwise."""
        done = self.levels.advance(None, state, params, flush=True)
        return done.tree(done.after), LevelState(state.calls, done.tree(done.new))


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
    checked = _checked(
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
    return _transformation(rule, lr, weight_decay, frequency, window)


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
    checked = _checked(
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
    return _transformation(rule, lr, weight_decay, frequency, window)


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
    checked = _checked(
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
    made = _transformation(rule, lr, weight_decay, frequency, window)
    return LevelTransformation(replace(made.levels, algorithm=algorithm, form=form))


# ---------------------------------------------------------------------- options


def _checked(
    cls: Any, lr: Any, weight_decay: Any, shape: tuple[int, ...] = (1,), **options: Any
) -> dict[str, Any]:
    """The options as the optimizer class takes them, or its error."""
    for name, tree in (("lr", lr), ("weight_decay", weight_decay)):
        for path, value in zip(pytree.tree_paths(tree), pytree.tree_leaves(tree)):
            where = f"{name} of {'.'.join(map(str, path))!r}: " if path else ""
            if name == "lr" and callable(value):
                continue
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(f"{where}Tensor {name} must be 1-element")
            elif not isinstance(value, (int, float)):
                raise TypeError(f"{where}{name} is a number, a tensor or a schedule, not {value!r}")
            elif not 0.0 <= value:
                label = "learning rate" if name == "lr" else "weight_decay value"
                raise ValueError(f"{where}Invalid {label}: {value}")
    for name in _SWITCHES & options.keys():
        if not isinstance(options[name], bool):
            raise ValueError(f"Invalid {name}: {options[name]!r}. True or False")
    defaults: dict[str, Any] = cls([torch.zeros(shape)], **options).defaults
    return defaults


def _transformation(
    rule: Any, lr: Any, weight_decay: Any, frequency: Any, window: str
) -> LevelTransformation:
    for path, value in zip(
        pytree.tree_paths(frequency, none_is_leaf=True),
        pytree.tree_leaves(frequency, none_is_leaf=True),
    ):
        check_frequency(value, f"frequency of {'.'.join(map(str, path))!r}: " if path else "")
    return LevelTransformation(_Levels(rule, check_window(window), lr, weight_decay, frequency))


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


# ---------------------------------------------------------------------- trees and tensors


def _up_to(spec: Any, tree: Any, what: str) -> list[Any]:
    try:
        found: list[Any] = spec.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(f"{what} do not have the structure of the parameters: {error}") from None
    return found


def _broadcast(prefix: Any, params: Any, name: str) -> list[Any]:
    try:
        return list(pytree.broadcast_prefix(prefix, params, none_is_leaf=True))
    except ValueError as error:
        raise ValueError(
            f"the tree `{name}` does not fit the parameters: {error}. Give one value, or a tree "
            "with the parameters' structure or the upper part of it"
        ) from None


def _check_gradient(param: Any, grad: Any, leaf: Leaf) -> None:
    if param is None or grad is None:
        return
    if grad.layout is not torch.strided:
        raise RuntimeError(f"{leaf.label()} has a sparse gradient ({grad.layout}): make it dense")
    if grad.shape != param.shape:
        raise ValueError(
            f"{leaf.label()} has shape {tuple(param.shape)}, its gradient {tuple(grad.shape)}"
        )


def _refuse_learned(leaf: Leaf, rule: Any) -> None:
    options = (leaf.lr, leaf.weight_decay, *getattr(rule, "betas", ()))
    for option in (*options, getattr(rule, "momentum", None)):
        if isinstance(option, Tensor) and option.requires_grad:
            raise RuntimeError(
                f"an option of {leaf.label()} requires a gradient, and inplace=True (the default "
                "of `update` in TorchOpt) records none: pass inplace=False"
            )


def _write(target: Any, value: Any) -> Any:
    """``value`` in the memory of ``target``, where that can be."""
    if value is target or target is None or value is None or target.dtype != value.dtype:
        return value
    if any(stride == 0 and size > 1 for stride, size in zip(target.stride(), target.shape)):
        return value  # an expanded tensor has one place for many elements
    return target.copy_(value)
