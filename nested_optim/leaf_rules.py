"""The rules on one parameter: which tensors each keeps, under which names, and how it moves.

For :mod:`nested_optim.functional`; the arithmetic is that of :mod:`nested_optim.rules`. Each rule
has ``start(param, leaf)``, the tensors that it keeps, and ``move(param, grad, kept, leaf)``, the
new parameter and the tensors that have changed. A rule that looks at several parameters at a time
has a ``together`` of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rules
from .orthogonalize import ns_dtype_for
from .rules import MatrixForm


def zeros(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros of the parameter's shape and memory format."""
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def window_dtype(param: Tensor) -> torch.dtype:
    """The dtype of windows, and of what M3 keeps for long."""
    return torch.promote_types(param.dtype, torch.float32)


class Leaf(NamedTuple):
    """The options of one parameter."""

    path: tuple[Any, ...]
    lr: Any
    weight_decay: Any
    frequency: int
    algorithm: str
    form: MatrixForm | None
    group: int
    place: float  # of the group among the groups, from 0 to 1

    def label(self) -> str:
        """For errors."""
        return f"parameter {'.'.join(map(str, self.path))!r}" if self.path else "the parameter"


class Due(NamedTuple):
    """A parameter whose window has closed."""

    param: Tensor
    grad: Tensor  # what the window came to, in the window's dtype
    kept: dict[str, Tensor]
    leaf: Leaf


#: A new parameter, and the tensors of its state that have changed.
Moved = tuple[Tensor, dict[str, Tensor]]


def not_ours(leaf: Leaf, key: str) -> ValueError:
    """The error for a state that lacks a tensor."""
    return ValueError(
        f"the state of {leaf.label()} has no {key!r}: it was made by another rule, or with other "
        "options; make one with this transformation's init"
    )


class LeafRule:
    """What rules have in common, with nothing to it for those that take each parameter alone."""

    def move(self, param: Tensor, grad: Tensor, kept: dict[str, Tensor], leaf: Leaf) -> Moved:
        raise NotImplementedError

    def start(self, param: Tensor, leaf: Leaf) -> dict[str, Tensor]:
        raise NotImplementedError

    def together(self, due: Sequence[Due], loss: Tensor | None) -> list[Moved]:
        """All parameters that are due in one step, whose loss is known or not."""
        moved = []
        for one in due:
            try:
                moved.append(self.move(one.param, one.grad.to(one.param.dtype), *one[2:]))
            except KeyError as error:
                raise not_ours(one.leaf, error.args[0]) from None
        return moved

    def before(self, grads: list[Any]) -> list[Any]:
        """What enters the windows in place of a step's gradients."""
        return grads

    def learned(self) -> dict[str, Any]:
        """Options, by name, that may be tensors in autograd."""
        return {}


@dataclass(frozen=True)
class AdamWRule(LeafRule):
    betas: tuple[Any, Any]
    eps: float
    amsgrad: bool
    decoupled: bool
    maximize: bool

    def learned(self) -> dict[str, Any]:
        return {"betas[0]": self.betas[0], "betas[1]": self.betas[1]}

    def start(self, param: Tensor, leaf: Leaf) -> dict[str, Tensor]:
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if self.amsgrad else 2]
        return {key: zeros(param) for key in keys}

    def move(
        self, param: Tensor, grad: Tensor, kept: dict[str, Tensor], leaf: Leaf
    ) -> tuple[Tensor, dict[str, Tensor]]:
        step: Any = float(kept["step"]) + 1
        if any(isinstance(x, Tensor) for x in (leaf.lr, *self.betas)):
            dtype = torch.promote_types(param.dtype, torch.float32).to_real()
            step = torch.tensor(step, dtype=dtype, device=param.device)
        new = rules.adamw(
            param,
            grad,
            kept["exp_avg"],
            kept["exp_avg_sq"],
            kept["max_exp_avg_sq"] if self.amsgrad else None,
            step=step,
            lr=leaf.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=leaf.weight_decay,
            decoupled=self.decoupled,
            maximize=self.maximize,
        )
        moments = {"exp_avg": new.exp_avg, "exp_avg_sq": new.exp_avg_sq}
        if new.max_exp_avg_sq is not None:
            moments["max_exp_avg_sq"] = new.max_exp_avg_sq
        return new.param, moments


@dataclass(frozen=True)
class MomentumRule(LeafRule):
    momentum: Any
    delta_rate: float
    normalized: bool
    decoupled: bool
    maximize: bool

    def learned(self) -> dict[str, Any]:
        return {"momentum": self.momentum}

    def start(self, param: Tensor, leaf: Leaf) -> dict[str, Tensor]:
        return {"momentum_buffer": zeros(param)}

    def move(
        self, param: Tensor, grad: Tensor, kept: dict[str, Tensor], leaf: Leaf
    ) -> tuple[Tensor, dict[str, Tensor]]:
        options: dict[str, Any] = {
            "lr": leaf.lr,
            "momentum": self.momentum,
            "weight_decay": leaf.weight_decay,
            "decoupled": self.decoupled,
            "maximize": self.maximize,
        }
        rule: Any = rules.momentum
        if self.delta_rate:
            rule = rules.delta_momentum
            options |= {"delta_rate": self.delta_rate, "normalized": self.normalized}
        new = rule(param, grad, kept["momentum_buffer"], **options)
        return new.param, {"momentum_buffer": new.momentum_buffer}


@dataclass(frozen=True)
class M3Rule(LeafRule):
    options: dict[str, Any]  # of rules.m3, but for those of a leaf
    second_moment: str | None
    ns_dtype: torch.dtype | None
    other: AdamWRule

    def learned(self) -> dict[str, Any]:
        return {f"adamw_{name}": value for name, value in self.other.learned().items()}

    def start(self, param: Tensor, leaf: Leaf) -> dict[str, Tensor]:
        if leaf.algorithm == "adamw":
            return self.other.start(param, leaf)
        form = leaf.form or MatrixForm()
        why = form.why_not(param.shape)
        if why is not None or param.is_complex():
            why = "is complex" if param.is_complex() else (why or "").split(":")[0]
            raise ValueError(
                f"{leaf.label()} of shape {tuple(param.shape)} {why}: give it 'adamw' in the tree "
                "`algorithm`, or say in the tree `form` how it is to be read as matrices"
            )
        wide = window_dtype(param)
        state = {"momentum_buffer": zeros(param)}
        if self.options["alpha"]:
            state["slow_momentum_buffer"] = zeros(param, wide)
            state["slow_update"] = zeros(param, ns_dtype_for(param, self.ns_dtype))
            state["slow_count"] = torch.zeros(())
        if self.second_moment == "element":
            state["second_moment"] = zeros(param, wide)
        elif self.second_moment == "row":
            shape = form.row_shape(param.shape)
            state["second_moment"] = torch.zeros(shape, dtype=wide, device=param.device)
        return state

    def move(
        self, param: Tensor, grad: Tensor, kept: dict[str, Tensor], leaf: Leaf
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if leaf.algorithm == "adamw":
            return self.other.move(param, grad, kept, leaf)
        position = int(kept["slow_count"]) if self.options["alpha"] else 0
        keys = ("momentum_buffer", "slow_momentum_buffer", "slow_update", "second_moment")
        new = rules.m3(
            param,
            grad,
            *(kept.get(key) for key in keys),  # type: ignore[arg-type]
            position=position,
            lr=leaf.lr,
            weight_decay=leaf.weight_decay,
            form=leaf.form,
            ns_dtype=ns_dtype_for(param, self.ns_dtype),
            **self.options,
        )
        state = {key: value for key, value in zip(keys, new[1:]) if value is not None}
        if self.options["alpha"]:
            ends = position + 1 >= self.options["slow_frequency"]
            state["slow_count"] = torch.tensor(0.0 if ends else position + 1.0)
        return new.param, state


_FORM_KEYS = ("flatten", "out_dim", "split_sizes", "num_heads")
_TREE_KEYS = ("lr", "weight_decay", "frequency", "algorithm")


def option_trees(
    groups: Iterable[dict[str, Any]], *, numbered: bool = False, **defaults: Any
) -> dict[str, Any]:
    """Param groups as trees of options, for parameters in a dict by name.

    ::

        groups = matrix_groups(model, groups=depth_groups(model, (1, 10)))
        rule = functional.m3(**functional.option_trees(groups, lr=1e-3, weight_decay=0.1))
        state = rule.init(dict(model.named_parameters()))

    Args:
        groups: with ``(name, parameter)`` pairs, as this package's functions make them.
        numbered: add the tree ``group``, the number of each parameter's group, for
            ``functional.learned_adamw``.
        **defaults: options for groups that have none of their own.

    Returns:
        For each option that occurs (``lr``, ``weight_decay``, ``frequency``, ``algorithm``,
        ``form``) a dict from names to values; other ``defaults`` as they are.

    Raises:
        ValueError: a group without names, with an option that is the same for a whole
            transformation, or without one that other groups have and that has no default.
    """
    listed = [dict(group) for group in groups]
    values: dict[str, dict[str, Any]] = {}
    for at, group in enumerate(listed):
        where = f"param group {at}" + (f" ({group['name']!r})" if "name" in group else "")
        options = {k: v for k, v in group.items() if k not in ("params", "name", "param_names")}
        form = {key: options.pop(key) for key in _FORM_KEYS if key in options}
        if form:
            options["form"] = MatrixForm(**form)
        for key in options.keys() - {*_TREE_KEYS, "form"}:
            raise ValueError(
                f"{where} has {key}={options[key]!r}, which is one value for all parameters of a "
                f"transformation; by parameter there are {', '.join(_TREE_KEYS)} and the matrix's "
                "form"
            )
        for entry in group["params"]:
            if not isinstance(entry, tuple):
                raise ValueError(
                    f"{where} has parameters without names: give (name, parameter) pairs"
                )
            values[entry[0]] = {**options, "group": at} if numbered else options
    keys = {key for options in values.values() for key in options}
    trees: dict[str, Any] = {k: v for k, v in defaults.items() if k not in keys}
    stand_ins = {"frequency": 1, "form": None, **defaults}
    for key in sorted(keys):
        for name, options in values.items():
            if key not in options and key not in stand_ins:
                raise ValueError(
                    f"parameter {name!r} is in a group without {key}, which other groups have: "
                    f"give a default, option_trees(groups, {key}=...)"
                )
        trees[key] = {name: opts.get(key, stand_ins.get(key)) for name, opts in values.items()}
    return trees
