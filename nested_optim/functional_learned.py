"""The learned momentum as a gradient transformation, part of :mod:`nested_optim.functional`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .deep_nested import DeepNestedOptimizer
from .leaf_rules import Due, Leaf, LeafRule, Moved, not_ours, window_dtype, zeros
from .meta import learned, together
from .meta.features import SIZES, clipped
from .meta.networks import wide_dtype
from .meta.options import SLOW_KEYS
from .rules.root import moment_root
from .tensors import is_dtensor
from .transformations import (
    LevelState,
    LevelTransformation,
    Rate,
    checked_options,
    pytree,
    transformation,
)

#: Where a leaf's state keeps what the networks see next, in ``mode="simple"``.
_SEEN_NEXT = "update_sizes"


@dataclass(frozen=True)
class LearnedRule(LeafRule):
    options: dict[str, Any]  # as of a param group
    weights: dict[str, Tensor]

    def learned(self) -> dict[str, Any]:
        return {f"weights[{module!r}]": flat for module, flat in self.weights.items()}

    def before(self, grads: list[Any]) -> list[Any]:
        return clipped(grads, self.options["max_grad_norm"])

    @property
    def slow_keys(self) -> tuple[str, ...]:
        count = len(self.options["cms_frequencies"]) - 1 if "mixing" in self.weights else 0
        return SLOW_KEYS[:count]

    @property
    def keys(self) -> tuple[str, ...]:
        """Of a leaf's state, beside those of all rules."""
        moments = ("exp_avg_sq", "max_exp_avg_sq")[: 1 + self.options["amsgrad"]]
        seen = (_SEEN_NEXT,) if self.options["mode"] == "simple" else ()
        return (
            "exp_avg",
            *(moments if self.options["normalize"] else ()),
            *self.slow_keys,
            *seen,
        )

    def start(self, param: Tensor, leaf: Leaf) -> dict[str, Tensor]:
        if is_dtensor(param):
            raise RuntimeError(
                f"{leaf.label()} is sharded (a DTensor), and learned updates look at whole tensors"
            )
        wide = window_dtype(param)
        state = {}
        for key in self.keys:
            if key == _SEEN_NEXT:
                state[key] = torch.zeros(SIZES, dtype=wide.to_real(), device=param.device)
            else:
                state[key] = zeros(param, wide if key in self.slow_keys else None)
        return state

    def together(self, due: Sequence[Due], loss: Tensor | None) -> list[Moved]:
        for one in due:
            for key in self.keys:
                if key not in one.kept:
                    raise not_ours(one.leaf, key)
        home = due[0].param.device
        flats = {module: w.to(home, wide_dtype(home)) for module, w in self.weights.items()}
        groups: dict[int, list[int]] = {}
        for i, one in enumerate(due):
            groups.setdefault(one.leaf.group, []).append(i)
        moved: dict[int, Moved] = {}
        for members in groups.values():
            found = self._group([due[i] for i in members], flats, home, loss)
            moved.update(zip(members, found))
        return [moved[i] for i in range(len(due))]

    def _group(
        self,
        due: list[Due],
        flats: dict[str, Tensor],
        home: torch.device,
        loss: Tensor | None,
    ) -> list[Moved]:
        work = [
            together.Due(
                {"param": one.param, **one.kept},
                one.grad,
                float(one.kept["step"]) + 1,
                {"lr": one.leaf.lr, "weight_decay": one.leaf.weight_decay},
            )
            for one in due
        ]
        last = None
        if self.options["mode"] == "simple":
            last = torch.stack([o.kept[_SEEN_NEXT].to(home, wide_dtype(home)) for o in due])
        slots, sizes = together.update(
            work,
            self.options,
            flats,
            self.slow_keys,
            place=due[0].leaf.place,
            home=home,
            loss=loss,
            last=last,
            root=moment_root,
        )
        if last is not None:
            for slot, row in zip(slots, sizes.unbind(0)):
                slot[_SEEN_NEXT] = row.to(slot[_SEEN_NEXT])
        return [(slot["param"], {key: slot[key] for key in self.keys}) for slot in slots]


class LearnedTransformation(LevelTransformation):
    """:func:`learned_adamw` as TorchOpt's pair, whose :meth:`step` may be told the loss."""

    def step(
        self, grads: Any, state: LevelState, params: Any, *, loss: Tensor | None = None
    ) -> tuple[Any, LevelState]:
        """As :meth:`LevelTransformation.step`.

        Args:
            grads: see there; likewise ``state`` and ``params``.
            state: see there.
            params: see there.
            loss: this step's, a tensor of one element, which the controller then sees; gradients
                go back through it. ``update`` is not told (default: None).

        Raises:
            ValueError: as there, or the loss is not one element.
        """
        if loss is not None:
            if loss.numel() != 1:
                raise ValueError(f"loss must be a tensor of one element, not {tuple(loss.shape)}")
            loss = loss.reshape(())
        done = self.levels.advance(grads, state, params, loss=loss)
        return done.parameters(), LevelState(state.calls + 1, done.tree(done.new))


def learned_weights(
    *,
    cms_frequencies: Sequence[int] = (1, 10, 100),
    controller_hidden_dim: int = 32,
    momentum_hidden_dim: int = 64,
    learn_lr: bool = True,
    learn_momentum: bool = True,
    learn_mixing: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The weights that :func:`learned_adamw` begins with, where its steps are AdamW's exactly.

    They are the same on every machine, and those of ``DeepNestedOptimizer``, which keeps its own
    in ``param_groups[0]["controller_weights"]``, ``["momentum_weights"]`` and
    ``["mixing_weights"]``.

    Args:
        cms_frequencies, controller_hidden_dim, momentum_hidden_dim: as for :func:`learned_adamw`.
        learn_lr: with the controller (default: True).
        learn_momentum: with the momentum's network (default: True).
        learn_mixing: with the mixture, where there are two momenta at least (default: True).
        dtype: of the tensors (default: float32).
        device: where they are (default: the CPU).

    Returns:
        Flat tensors by module: ``"controller"``, ``"momentum"``, ``"mixing"`` (one number per
        momentum).
    """
    options = checked_options(
        DeepNestedOptimizer,
        0.0,
        0.0,
        cms_frequencies=cms_frequencies,
        controller_hidden_dim=controller_hidden_dim,
        momentum_hidden_dim=momentum_hidden_dim,
        learn_lr=learn_lr,
        learn_momentum=learn_momentum,
        learn_mixing=learn_mixing,
    )
    return {
        module: learned.start(options, module, torch.empty(0, dtype=dtype, device=device)).clone()
        for module in learned.modules(options)
    }


def learned_adamw(
    weights: Mapping[str, Tensor] | None = None,
    lr: Rate | Any = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor | Any = 0.0,
    amsgrad: bool = False,
    *,
    mode: str = "explicit",
    group: int | Any = 0,
    frequency: int | Any = 1,
    window: str = "mean",
    decoupled: bool = True,
    maximize: bool = False,
    normalize: bool = True,
    cms_frequencies: Sequence[int] = (1, 10, 100),
    controller_hidden_dim: int = 32,
    momentum_hidden_dim: int = 64,
    min_lr_mult: float = 0.01,
    max_lr_mult: float = 100.0,
    max_grad_norm: float | None = None,
) -> LearnedTransformation:
    r"""AdamW whose step size and momenta networks choose, with the networks' weights an argument.

    The updates of :class:`nested_optim.DeepNestedOptimizer`, whose formulas are there: a controller
    gives each group's multiplier of the learning rate, a second network each tensor's scale, shift
    and damping of the momentum, and a few numbers mix momenta on several time scales. Here nothing
    is learned by itself: differentiate a loss after some updates with respect to the weights, and
    follow that gradient in whatever way. *Trees* are as for :func:`adamw`.

    Args:
        weights: flat tensors by module: ``"controller"`` and ``"momentum"``, of the sizes that
            :func:`learned_weights` has, and ``"mixing"``, ``(momenta,)``. Any floating dtype; they
            are computed with in float64. What is left out is switched off: no multipliers, a plain
            momentum, no slow momenta. None is :func:`learned_weights` with the sizes below, where
            steps are AdamW's (default: None).
        lr: as for :func:`adamw`; multipliers multiply it (default: 1e-3).
        betas: decay rates of momenta and second moment, numbers (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-8).
        weight_decay: as for :func:`adamw`; multipliers multiply it too, if decoupled (default: 0).
        amsgrad: keep the largest second moment (default: False).
        mode: what the networks see, in the words of the optimizer. ``"explicit"``: sizes and angle
            of this update's gradient, momentum and parameter. ``"simple"``: those of each
            parameter's update before, zeros at its first. Gradients go back through both, where the
            optimizer's own learning in simple mode takes what was seen as given (default:
            ``"explicit"``).
        group: the number of a parameter's group, an integer from 0, or a tree of these, see
            ``option_trees(groups, numbered=True)``. A group has one multiplier; its place among
            the groups, and joint sizes over those that are updated at a time, are what the
            controller sees (default: 0, one group).
        frequency: gradients per update, or a tree of these (default: 1).
        window: ``"mean"`` or ``"sum"`` (default: ``"mean"``).
        decoupled: AdamW's weight decay, or (False) Adam's (default: True).
        maximize: ascend (default: False).
        normalize: divide by the root of the second moment (default: True).
        cms_frequencies: updates per chunk of each momentum, ascending from 1; each beside the
            first is a tensor of the parameter's shape in the state (default: (1, 10, 100)).
        controller_hidden_dim: units per layer of the controller (default: 32).
        momentum_hidden_dim: units per layer of the momentum's network (default: 64).
        min_lr_mult: lower bound of multipliers, in (0, 1) (default: 0.01).
        max_lr_mult: upper bound, above 1 (default: 100).
        max_grad_norm: clip the joint norm of a step's gradients to this before all else. Gradients
            go through the factor, which TorchOpt's ``clip_grad_norm`` takes as a number (default:
            None).

    Returns:
        The transformation. Its ``step`` may be told the loss; ``update``, which chains call, is
        not. A leaf's state has the optimizer's keys, but in simple mode ``update_sizes``
        (4 numbers, seen by the next update) in place of ``update_trace`` and ``previous_grad``.

    Raises:
        ValueError: an option is invalid. Values of tensors are not looked at.

    Numbers give the bits of ``DeepNestedOptimizer(foreach=False)`` at these weights, where its
    groups hold their parameters in the order of the flattened tree (a dict's: sorted by name; else
    joint sizes are rounded in another way).
    """
    given = {} if weights is None else weights
    if unknown := [module for module in given if module not in learned.SWITCHES]:
        raise ValueError(
            f"weights has {unknown[0]!r}: the modules are {', '.join(learned.SWITCHES)}"
        )
    if any(isinstance(beta, Tensor) for beta in betas):
        raise ValueError("betas of learned updates are numbers, not tensors")
    options = checked_options(
        DeepNestedOptimizer,
        lr,
        weight_decay,
        betas=betas,
        eps=eps,
        amsgrad=amsgrad,
        window=window,
        decoupled=decoupled,
        maximize=maximize,
        mode=mode,
        normalize=normalize,
        cms_frequencies=cms_frequencies,
        controller_hidden_dim=controller_hidden_dim,
        momentum_hidden_dim=momentum_hidden_dim,
        min_lr_mult=min_lr_mult,
        max_lr_mult=max_lr_mult,
        max_grad_norm=max_grad_norm,
    )
    if weights is None:
        found = {m: learned.start(options, m, torch.empty(0)) for m in learned.modules(options)}
    else:
        found = {m: _checked_weights(options, m, weights[m]) for m in weights}
    rule = LearnedRule(options, {m: found[m] for m in learned.SWITCHES if m in found})
    tree: Any = group
    for path, number in zip(
        pytree.tree_paths(tree, none_is_leaf=True), pytree.tree_leaves(tree, none_is_leaf=True)
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            where = f"group of {'.'.join(map(str, path))!r}: " if path else ""
            raise ValueError(f"{where}Invalid group: {number!r}. Give an integer from 0")
    made = transformation(rule, lr, weight_decay, frequency, window)
    return LearnedTransformation(replace(made.levels, group=group))


def _checked_weights(options: dict[str, Any], module: str, flat: Any) -> Tensor:
    name = f"weights[{module!r}]"
    if not isinstance(flat, Tensor) or not flat.is_floating_point():
        kind = flat.dtype if isinstance(flat, Tensor) else repr(flat)
        raise ValueError(f"{name} must be a floating-point tensor, not {kind}")
    if module not in learned.modules(options):
        raise ValueError(f"{name} has nothing to mix: cms_frequencies has one entry")
    count = learned.size(options, module)
    if flat.shape != (count,):
        raise ValueError(
            f"{name} must be a flat tensor of {count} numbers for these sizes of networks and "
            f"cms_frequencies, but is {tuple(flat.shape)}"
        )
    return flat
