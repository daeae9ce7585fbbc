"""What the momentum methods of this package share: the options and checkpoints of torch's SGD."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .nested import _count
from .optimizer import LevelOptimizer
from .rules.momentum import is_deferred
from .tensors import laid_out_like, resolve_dtype, to_scalar


class MomentumOptimizer(LevelOptimizer):
    """Base of the optimizers that are ``torch.optim.SGD`` with another momentum.

    A subclass applies its rule in :meth:`_run`. Its groups hold ``momentum`` and ``decoupled``
    beside what every class has, its state ``momentum_buffer``.
    """

    _moment_keys: tuple[str, ...] = ("momentum_buffer",)

    def _check_options(self, options: dict[str, Any], where: str) -> dict[str, Any]:
        self._check_fused(options, where)
        canonical = super()._check_options(options, where)
        if not 0.0 <= options["momentum"] <= 1.0:
            raise ValueError(f"{where}Invalid momentum value: {options['momentum']}")
        canonical["momentum"] = float(options["momentum"])
        if options["state_dtype"] is not None:
            # A string, so that checkpoints hold plain values.
            dtype = resolve_dtype(options["state_dtype"], where)
            canonical["state_dtype"] = str(dtype).removeprefix("torch.")
        return canonical

    def _check_edits(self, group: dict[str, Any], where: str) -> None:
        super()._check_edits(group, where)
        self._check_fused(group, where)
        if group["foreach"] and not group["capturable"] and isinstance(group["lr"], Tensor):
            raise RuntimeError(
                f"{where}lr as a Tensor is not supported for capturable=False and foreach=True; "
                "leave foreach at None"
            )

    def _check_fused(self, options: dict[str, Any], where: str) -> None:
        if options["fused"]:
            raise RuntimeError(
                f"{where}{type(self).__name__} has no fused kernel; leave `fused` at None"
            )

    def _import_group(self, group: dict[str, Any]) -> dict[str, Any]:
        for key, plain in (("dampening", 0), ("nesterov", False)):
            value = group.pop(key, None)
            if value is None:
                continue
            if value != plain:
                raise ValueError(
                    f"{type(self).__name__} has no {key}, but a group or checkpoint of "
                    f"torch.optim.SGD has {key}={value!r}; train on with {key}={plain!r}"
                )
            group.pop("fused", None)  # whether torch's own kernel ran
        return group

    def _export_group(self, group: dict[str, Any]) -> dict[str, Any]:
        # Without them torch.optim.SGD does not go on from our checkpoints.
        return {**group, "dampening": 0, "nesterov": False}

    def _keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Which of ``_moment_keys`` a parameter of this group has."""
        return self._moment_keys

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        dtype = self._state_dtype(param, group)
        for key in self._keys(group):
            if key not in state:
                state[key] = torch.zeros_like(
                    param, dtype=dtype, memory_format=torch.preserve_format
                )

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        keys = self._keys(group)
        states = list(map(self.state.__getitem__, params))
        for p, state in zip(params, states):
            if any(key not in state for key in keys):  # an option was switched in mid-run
                self._init_state(p, group, state)
            if group["capturable"] and state["step"].device != p.device:
                state["step"] = state["step"].to(p.device)
        kept = [params, *([state[key] for state in states] for key in keys)]
        left = self._run_kernels(group, kept, grads)
        rest = states
        if left is not None:
            kept = [[tensors[i] for i in left] for tensors in kept]
            grads, rest = [grads[i] for i in left], [states[i] for i in left]
        if rest:
            with _in_one_dtype(kept, grads) as (work, work_grads):
                self._run(group, work, work_grads, rest)
        _count([state["step"] for state in states])

    def _run_kernels(
        self, group: dict[str, Any], kept: list[list[Tensor]], grads: list[Tensor]
    ) -> list[int] | None:
        """Apply the rule where a class has kernels that serve; which are left, None for all.

        As :meth:`_run`, but each tensor has the dtype that it is kept in.
        """
        return None

    @abc.abstractmethod
    def _run(
        self,
        group: dict[str, Any],
        kept: list[list[Tensor]],
        grads: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        """The rule on the lists in ``kept``, parameters first, in place.

        The tensors of one parameter share their dtype. What of ``states`` is not in ``kept`` is the
        subclass's own.
        """


@contextmanager
def _in_one_dtype(
    kept: list[list[Tensor]], grads: list[Tensor]
) -> Iterator[tuple[list[list[Tensor]], list[Tensor]]]:
    """The tensors in the wider of the parameter's and its state's dtype, rounded once at the end.

    With one dtype throughout they are the originals.
    """
    dtypes = [torch.promote_types(p.dtype, m.dtype) for p, m in zip(kept[0], kept[1])]
    work = [[t.to(dtype) for t, dtype in zip(tensors, dtypes)] for tensors in kept]
    yield work, [grad.to(dtype) for grad, dtype in zip(grads, dtypes)]
    for originals, results in zip(kept, work):
        for original, result in zip(originals, results):
            if result is not original:
                original.copy_(result)


def in_place(
    rule: Callable[..., tuple[Tensor, ...]],
    kept: list[list[Tensor]],
    grads: list[Tensor],
    group: dict[str, Any],
    **options: Any,
) -> None:
    """Apply a pure rule, tensor by tensor: ``kept <- rule(param, grad, *state)``."""
    for tensors, grad in zip(zip(*kept), grads):
        # Autograd must find the old values unharmed when it comes back.
        old = [t.clone() for t in tensors] if group["differentiable"] else tensors
        new = rule(old[0], grad, *old[1:], **shared_options(group), **options)
        for tensor, result in zip(tensors, new):
            tensor.copy_(laid_out_like(result, tensor))


def shared_options(group: dict[str, Any]) -> dict[str, Any]:
    """The options that every momentum rule takes."""
    keys = ("momentum", "weight_decay", "decoupled", "maximize")
    return {"lr": to_scalar(group["lr"]), **{key: group[key] for key in keys}}


def foreach_scale(tensors: list[Tensor], factor: Any) -> None:
    """Multiply in place."""
    if tensors[0].is_cpu and not isinstance(factor, Tensor):
        # There _foreach_mul_ would first round the number to the tensors' dtype.
        for tensor in tensors:
            tensor.mul_(factor)
    else:
        torch._foreach_mul_(tensors, factor)


def foreach_decay(group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """``rules.momentum.decay`` on lists; parameters in place, gradients returned."""
    lr, weight_decay = to_scalar(group["lr"]), group["weight_decay"]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        if group["decoupled"]:
            foreach_scale(params, 1 - lr * weight_decay)
        elif group["maximize"]:  # these gradients are already ours
            torch._foreach_add_(grads, params, alpha=weight_decay)
        else:
            grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    return grads


def foreach_descend(group: dict[str, Any], params: list[Tensor], directions: list[Tensor]) -> None:
    """``rules.momentum.descend`` on lists, in place."""
    lr: Any = to_scalar(group["lr"])
    if is_deferred(lr):
        torch._foreach_sub_(params, torch._foreach_mul(directions, lr))
    else:
        torch._foreach_add_(params, directions, alpha=-lr)
