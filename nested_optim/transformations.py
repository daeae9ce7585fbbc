"""What all transformations share: windows on trees of tensors, their state, TorchOpt's protocol.

The transformations themselves are in :mod:`nested_optim.functional`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

from .leaf_rules import Due, Leaf, LeafRule, window_dtype, zeros
from .levels import check_frequency, check_window, divisor, window_closes
from .tensors import to_scalar

#: A learning rate: a number, a tensor of one element, or a schedule ``count -> number or tensor``.
Rate = float | Tensor | Callable[[int], Any]


class LevelState(NamedTuple):
    """The state of a transformation: tensors only, as TorchOpt's tools expect."""

    #: How often the state was advanced, int64 on the CPU. Schedules are read at it.
    calls: Tensor
    #: For each parameter, in the parameters' structure, what its optimizer would hold in
    #: ``optimizer.state[parameter]``, under the same keys.
    leaves: Any


@dataclass(frozen=True)
class Levels:
    """A rule on a tree of parameters, each with its own window."""

    rule: LeafRule
    window: str
    lr: Any
    weight_decay: Any
    frequency: Any
    algorithm: Any = None  # M3 has a choice
    form: Any = None
    group: Any = 0

    def leaves(self, params: Any, calls: int) -> tuple[list[Any], Any, list[Leaf]]:
        """Parameters, their structure, and the options of each."""
        flat, spec = pytree.tree_flatten(params, none_is_leaf=True)
        paths = pytree.tree_paths(params, none_is_leaf=True)
        columns = [
            _broadcast(getattr(self, name), params, name)
            for name in ("lr", "weight_decay", "frequency", "algorithm", "form", "group")
        ]
        last = max(columns[-1], default=0) or 1
        columns.append([group / last for group in columns[-1]])
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
        loss: Tensor | None = None,
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
            after, new, due = list(flat), list(states), {}
            entering = self.rule.before(flat_grads)
            for i, (param, leaf) in enumerate(zip(flat, options)):
                total, new[i] = self.arrive(param, entering[i], states[i], leaf, flush)
                if total is not None:
                    due[i] = Due(param, total, states[i], leaf)
            moved = self.rule.together(list(due.values()), loss) if due else []
            for i, (param, changed) in zip(due, moved):
                after[i], new[i] = param, self.leave(param, states[i], changed)
        return _Advance(spec, flat_grads, flat, after, states, new)

    def arrive(
        self, param: Any, grad: Any, kept: dict[str, Tensor], leaf: Leaf, flush: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """A gradient enters its window: what that comes to, if it closes, and the state."""
        count = float(kept["window_count"]) if kept else 0.0
        if param is None or (grad is None and not (flush and count)):
            return None, kept
        if grad is None:
            total = kept["window_sum"]
        else:
            count += 1
            if count > 1:
                total = kept["window_sum"] + grad
            elif leaf.frequency == 1:
                total = grad
            else:  # a copy: the caller may reuse its gradients
                total = grad.to(window_dtype(param), copy=True)
        if not flush and not window_closes(count, leaf.frequency):
            return None, {**kept, "window_sum": total, "window_count": torch.tensor(count)}
        parts = divisor(count, self.window)
        return (total / parts if parts != 1 else total), kept

    def leave(
        self, param: Any, kept: dict[str, Tensor], moved: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state after an update that has changed these tensors of it."""
        state = {**kept, **moved, "step": kept["step"] + 1, "window_count": torch.zeros(())}
        if "window_sum" in kept:  # a new one: the old sum holds on to the window's graph
            state["window_sum"] = zeros(param, window_dtype(param))
        return state

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

    def parameters(self) -> Any:
        """New ones. One that waits is another tensor than before where autograd looks on: a
        gradient by it must not go back through updates of others that it had a part in."""
        return self.tree(
            [
                new.view_as(new) if new is old and new is not None and new.requires_grad else new
                for old, new in zip(self.before, self.after)
            ]
        )

    def updates(self) -> list[Any]:
        """Differences, as TorchOpt adds them: None where there is no gradient."""
        return [
            None if grad is None else torch.zeros_like(old) if new is old else new - old
            for grad, old, new in zip(self.grads, self.before, self.after)
        ]


class LevelTransformation(GradientTransformation):
    """A rule of this package as TorchOpt's pair of ``init`` and ``update``, with two more methods.

    Made by the functions of :mod:`nested_optim.functional`; it has no state of its own. Options may
    be changed in mid-run by going on with another transformation of the same rule from the same
    state, as windows live there.
    """

    levels: Levels

    def __new__(cls, levels: Levels) -> LevelTransformation:
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
        return done.parameters(), LevelState(state.calls + 1, done.tree(done.new))

    def flush(self, state: LevelState, params: Any) -> tuple[Any, LevelState]:
        """Apply every partly filled window as if it were complete; as :meth:`step` otherwise."""
        done = self.levels.advance(None, state, params, flush=True)
        return done.parameters(), LevelState(state.calls, done.tree(done.new))


# ---------------------------------------------------------------------- options


_SWITCHES = {"amsgrad", "decoupled", "maximize", "nesterov"}


def checked_options(
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


def transformation(
    rule: LeafRule, lr: Any, weight_decay: Any, frequency: Any, window: str
) -> LevelTransformation:
    for path, value in zip(
        pytree.tree_paths(frequency, none_is_leaf=True),
        pytree.tree_leaves(frequency, none_is_leaf=True),
    ):
        check_frequency(value, f"frequency of {'.'.join(map(str, path))!r}: " if path else "")
    return LevelTransformation(Levels(rule, check_window(window), lr, weight_decay, frequency))


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


def _refuse_learned(leaf: Leaf, rule: LeafRule) -> None:
    options = {"lr": leaf.lr, "weight_decay": leaf.weight_decay, **rule.learned()}
    for name, option in options.items():
        if isinstance(option, Tensor) and option.requires_grad:
            raise RuntimeError(
                f"{name} of {leaf.label()} requires a gradient, and inplace=True (the default of "
                "`update` in TorchOpt) records none: pass inplace=False"
            )


def _write(target: Any, value: Any) -> Any:
    """``value`` in the memory of ``target``, where that can be."""
    if value is target or target is None or value is None or target.dtype != value.dtype:
        return value
    if any(stride == 0 and size > 1 for stride, size in zip(target.stride(), target.shape)):
        return value  # an expanded tensor has one place for many elements
    return target.copy_(value)
