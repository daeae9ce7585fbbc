"""NestedOptimizer: AdamW whose parameter groups update at their own frequency."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    _capturable_doc,
    _differentiable_doc,
    _foreach_doc,
    _fused_doc,
    _get_value,
    _maximize_doc,
    _view_as_real,
)

from . import rules
from .memory_argument import MemoryT
from .optimizer import NARROW, LevelOptimizer, ParamsT
from .tensors import resolve_dtype, to_scalar


class NestedOptimizer(LevelOptimizer):
    def __init__(
        self,
        params: ParamsT | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        frequency: int = 1,
        window: str = "mean",
        decoupled: bool = True,
        state_dtype: torch.dtype | str | None = None,
        kahan_sum: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        param_groups: ParamsT | None = None,
        memory: MemoryT = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "frequency": frequency,
            "window": window,
            "decoupled": decoupled,
            "state_dtype": state_dtype,
            "kahan_sum": kahan_sum,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, param_groups=param_groups, memory=memory)

    _moment_keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _has_kernels = True

    def _check_options(self, options: dict[str, Any], where: str) -> dict[str, Any]:
        canonical = super()._check_options(options, where)
        eps, betas = options["eps"], options["betas"]
        if not 0.0 <= eps:
            raise ValueError(f"{where}Invalid epsilon value: {eps}")
        if len(betas) != 2:
            raise ValueError(f"{where}Invalid betas: {betas}. Give two, (beta1, beta2)")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{where}Invalid beta parameter at index {i}: {beta}")
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError(f"{where}betas must be either both floats or both Tensors")
        for i, beta in enumerate(betas):
            if isinstance(beta, Tensor):
                if options["foreach"] and not options["capturable"]:
                    raise ValueError(
                        f"{where}betas[{i}] as a Tensor is not supported for capturable=False and "
                        "foreach=True"
                    )
                if beta.numel() != 1:
                    raise ValueError(f"{where}Tensor betas[{i}] must be 1-element")
        canonical["betas"] = tuple(
            to_scalar(b) if isinstance(b, Tensor) else float(b) for b in betas
        )
        if options["kahan_sum"] and options["differentiable"]:
            raise RuntimeError(
                f"{where}`kahan_sum` does not support `differentiable`: rounding has no gradient"
            )
        if options["state_dtype"] is not None:
            # A string, so that checkpoints hold plain values.
            dtype = resolve_dtype(options["state_dtype"], where)
            canonical["state_dtype"] = str(dtype).removeprefix("torch.")
        return canonical

    def _check_edits(self, group: dict[str, Any], where: str) -> None:
        super()._check_edits(group, where)
        on_host = group["foreach"] and not group["capturable"]
        if on_host and any(isinstance(x, Tensor) for x in (group["lr"], *group["betas"])):
            raise RuntimeError(
                f"{where}lr or betas as a Tensor is not supported for capturable=False and "
                "foreach=True; leave foreach at None"
            )

    def _import_group(self, group: dict[str, Any]) -> dict[str, Any]:
        decoupled = group.pop("decoupled_weight_decay", None)
        if decoupled is not None:
            group.setdefault("decoupled", decoupled)
        return group

    def _export_group(self, group: dict[str, Any]) -> dict[str, Any]:
        # torch.optim.Adam and AdamW look for this key to tell which of the two they are.
        return {**group, "decoupled_weight_decay": group["decoupled"]}

    def _uses_foreach(self, group: dict[str, Any], params: Any) -> bool:
        if group["foreach"] is None and isinstance(group["betas"][0], Tensor):
            return bool(group["capturable"]) and super()._uses_foreach(group, params)
        return super()._uses_foreach(group, params)

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        dtype = self._state_dtype(param, group)
        for key in self._moment_keys[: 3 if group["amsgrad"] else 2]:
            if key not in state:
                state[key] = torch.zeros_like(
                    param, dtype=dtype, memory_format=torch.preserve_format
                )
        if group["kahan_sum"] and _is_narrow(param) and "kahan_comp" not in state:
            state["kahan_comp"] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        amsgrad, fused = group["amsgrad"], group["fused"]
        states = list(map(self.state.__getitem__, params))
        for p, state in zip(params, states):
            if (amsgrad and "max_exp_avg_sq" not in state) or (
                group["kahan_sum"] and "kahan_comp" not in state
            ):
                self._init_state(p, group, state)  # switched on in mid-run
            if (group["capturable"] or fused) and state["step"].device != p.device:
                state["step"] = state["step"].to(p.device)
        kept = [params, *([s[key] for s in states] for key in self._moment_keys[: 2 + amsgrad])]
        steps = [state["step"] for state in states]
        kahan = group["kahan_sum"] and any("kahan_comp" in state for state in states)
        if not kahan and len(set(map(_dtype, chain(grads, *kept)))) == 1:
            self._run(group, kept, grads, steps)
            return

        # The rule works in one dtype: the wider of the parameter's and its moments'.
        dtypes = [torch.promote_types(p.dtype, m.dtype) for p, m in zip(params, kept[1])]
        comps = [s.get("kahan_comp") if kahan else None for s in states]
        for i, comp in enumerate(comps):
            if comp is not None:
                dtypes[i] = torch.promote_types(dtypes[i], torch.float32)
        work = [[t.to(dtype) for t, dtype in zip(tensors, dtypes)] for tensors in kept]
        for i, comp in enumerate(comps):
            if comp is not None:
                work[0][i] = rules.kahan_join(params[i], comp, dtypes[i])
        self._run(group, work, [grad.to(dtype) for grad, dtype in zip(grads, dtypes)], steps)
        for i, comp in enumerate(comps):
            if comp is not None:
                comp.copy_(rules.kahan_split(work[0][i], comp.dtype)[1])
        for originals, results in zip(kept, work):
            for original, result in zip(originals, results):
                if result is not original:
                    original.copy_(result)

    def _run(
        self,
        group: dict[str, Any],
        kept: list[list[Tensor]],
        grads: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """The rule on parameters and moments (``kept``), each of its gradient's dtype."""
        fused = group["fused"]
        copies = [list(tensors) for tensors in kept] if fused else kept
        grads = list(grads)
        if fused:
            _make_strides_agree([*copies, grads])
        max_exp_avg_sqs = copies[3] if group["amsgrad"] else []
        tensors = [copies[0], grads, *copies[1:3], max_exp_avg_sqs, steps]
        if fused:
            _fused_nestedoptimizer(tensors, group, **self._amp_scaling())
        elif self._uses_foreach(group, kept[0]):
            _multi_tensor_nestedoptimizer(tensors, group)
        else:
            _single_tensor_nestedoptimizer(tensors, group)
        if fused:
            for originals, results in zip(kept, copies):
                for original, result in zip(originals, results):
                    if result is not original:
                        original.copy_(result)


_dtype = attrgetter("dtype")


def _is_narrow(param: Tensor) -> bool:
    """Whether additions to this parameter are lost to rounding in ordinary training."""
    return param.dtype in NARROW


# Each path below takes the lists [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs (empty
# without amsgrad), steps] and updates all but the gradients in place.


def _single_tensor_nestedoptimizer(tensors: list[list[Tensor]], group: dict[str, Any]) -> None:
    """The rule itself, tensor by tensor."""
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = tensors
    as_tensor = _steps_stay_tensors(group)
    for i, step in enumerate(steps):
        step += 1
        kept = [params[i], exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1]]
        # Autograd must find the old values unharmed when it comes back.
        old = [t.clone() for t in kept] if group["differentiable"] else kept
        new = rules.adamw(
            old[0],
            grads[i],
            *old[1:],
            step=step.clone() if as_tensor else _get_value(step),
            lr=to_scalar(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled"],
            maximize=group["maximize"],
        )
        for tensor, result in zip(kept, new):
            tensor.copy_(result)  # type: ignore[arg-type]


def _multi_tensor_nestedoptimizer(tensors: list[list[Tensor]], group: dict[str, Any]) -> None:
    """The rule on lists of tensors, in the operations and order of torch's foreach AdamW."""
    lr, eps, weight_decay = to_scalar(group["lr"]), group["eps"], group["weight_decay"]
    beta1, beta2 = group["betas"]
    for bucket in _buckets(tensors).values():
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = bucket
        if any(p.is_complex() for p in params):
            _view_as_real(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                *([max_exp_avg_sqs] if max_exp_avg_sqs else []),
            )
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        _count(steps)

        if isinstance(weight_decay, Tensor) or weight_decay != 0:
            if group["decoupled"]:
                torch._foreach_mul_(params, 1 - lr * weight_decay)
            elif group["maximize"]:  # these gradients are already ours
                torch._foreach_add_(grads, params, alpha=weight_decay)
            else:
                grads = list(torch._foreach_add(grads, params, alpha=weight_decay))

        weight1 = 1 - beta1
        if isinstance(weight1, Tensor) and not weight1.is_cpu:
            weight1 = weight1.to(params[0].device)
        torch._foreach_lerp_(exp_avgs, grads, weight1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        if isinstance(beta2, Tensor):
            scaled = torch._foreach_mul(grads, 1 - beta2)
            torch._foreach_addcmul_(exp_avg_sqs, scaled, grads, 1.0)
        else:
            torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        if max_exp_avg_sqs:
            torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
        denominators = torch._foreach_sqrt(max_exp_avg_sqs or exp_avg_sqs)

        if _steps_stay_tensors(group):
            # On the device: the root of 1 - beta2**t, and 1 / ((beta1**t - 1) / lr), the negative
            # step size.
            step_sizes = torch._foreach_pow(beta1, steps)
            roots = torch._foreach_pow(beta2, steps)
            torch._foreach_sub_(step_sizes, 1)
            torch._foreach_sub_(roots, 1)
            torch._foreach_neg_(roots)
            torch._foreach_div_(step_sizes, lr)
            torch._foreach_reciprocal_(step_sizes)
            torch._foreach_sqrt_(roots)
            torch._foreach_div_(denominators, roots)
            torch._foreach_add_(denominators, eps)
            torch._foreach_div_(denominators, step_sizes)
            torch._foreach_addcdiv_(params, exp_avgs, denominators)
        else:
            corrections = [rules.bias_corrections(_get_value(t), (beta1, beta2)) for t in steps]
            torch._foreach_div_(denominators, [second**0.5 for _, second in corrections])
            torch._foreach_add_(denominators, eps)
            negative_sizes = [(lr / first) * -1 for first, _ in corrections]
            torch._foreach_addcdiv_(params, exp_avgs, denominators, negative_sizes)


def _fused_nestedoptimizer(
    tensors: list[list[Tensor]],
    group: dict[str, Any],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """torch's fused kernel on the windows' gradients, where ours does not run."""
    kernel: Any = torch._fused_adamw_ if group["decoupled"] else torch._fused_adam_
    for device, bucket in _buckets(tensors).items():
        lr, scale, inf = (
            t.to(device[0]) if isinstance(t, Tensor) and not t.is_cpu else t
            for t in (to_scalar(group["lr"]), grad_scale, found_inf)
        )
        steps = bucket[-1]
        _count(steps)
        kernel(
            *bucket,
            amsgrad=group["amsgrad"],
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            grad_scale=scale,
            found_inf=inf,
        )
        if inf is not None:
            torch._foreach_sub_(steps, [inf] * len(steps))  # type: ignore[list-item]


def _count(steps: list[Tensor]) -> None:
    if steps[0].is_cpu and not torch.compiler.is_compiling():
        # Wrapped once: a Python number would be wrapped anew for each CPU tensor.
        torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def _make_strides_agree(lists: list[list[Tensor]]) -> None:
    """Replace the tensors of a parameter by contiguous copies where their strides differ.

    torch's fused kernels walk the memory of all of them alike: on a parameter that is a strided
    view, or a gradient laid out in another way, they would pair wrong elements.
    """
    if all(map(Tensor.is_contiguous, chain.from_iterable(lists))):
        return
    for i, tensors in enumerate(zip(*lists)):
        if len({t.stride() for t in tensors}) > 1:
            for column, tensor in zip(lists, tensors):
                column[i] = tensor.contiguous()


def _steps_stay_tensors(group: dict[str, Any]) -> bool:
    """Whether step counts must not be read as numbers: on a device, in autograd, in a trace."""
    return group["capturable"] or group["differentiable"] or torch.compiler.is_compiling()


def _buckets(tensors: list[list[Tensor]]) -> dict[Any, list[list[Tensor]]]:
    """The lists split by device and dtype of the parameters."""
    split: Any = Optimizer._group_tensors_by_device_and_dtype(tensors)  # type: ignore[arg-type]
    return {key: lists for key, (lists, _) in split.items()}


NestedOptimizer.__doc__ = rf"""AdamW whose parameter groups update at their own frequency.

    With ``frequency=1`` (the default) this is ``torch.optim.AdamW``, or with ``decoupled=False``
    ``torch.optim.Adam``, bit for bit with the same flags. A group with ``frequency=f`` keeps its
    gradients in a window and updates once every ``f`` gradients, at steps ``f, 2f, 3f, ...``, as
    AdamW would on the window's mean:

    .. math::
        \bar g = \frac{{1}}{{f}} \sum_{{t = kf+1}}^{{(k+1)f}} g_t, \qquad
        \theta \leftarrow \mathrm{{AdamW}}(\theta, \bar g)

    These are the levels of Nested Learning (arXiv 2512.24695, Eq. 70-71); the paper sums
    (``window="sum"``), the mean lets a learning rate carry over from AdamW. Weight decay acts with
    the update, so a slow group decays ``1/f`` as often. The window lives in ``state``: clear
    gradients after every step, clip them before it. All groups at one ``frequency`` with ``"mean"``
    are plain gradient accumulation.

    Args:
        params (iterable): parameters, ``(name, parameter)`` pairs, or dicts of groups, each of
            which may set every option below.
        lr (float or Tensor): learning rate (default: 1e-3). A tensor needs ``foreach`` off or
            ``capturable=True``.
        betas (tuple): decay rates of the moments (default: (0.9, 0.999)).
        eps (float): added to the denominator (default: 1e-8).
        weight_decay (float): decoupled weight decay (default: 1e-2), or with ``decoupled=False``
            the weight of Adam's L2 penalty.
        amsgrad (bool): divide by the largest second moment so far (default: False).
        frequency (int): gradients per update, at least 1 (default: 1). May be changed in
            ``param_groups`` at any time: no gradient is lost or counted twice.
        window (str): ``"mean"`` divides by the number of gradients in the window, ``"sum"`` does
            not (default: ``"mean"``).
        decoupled (bool): AdamW's weight decay; False gives Adam's (default: True).
        state_dtype (torch.dtype or str): dtype of the moments; None means the parameter's. With
            ``torch.float32`` a bfloat16 parameter is updated in float32 and rounded once. Windows
            are float32 or wider in any case (default: None).
        kahan_sum (bool): keep what rounding takes from a bfloat16 or float16 parameter, in a tensor
            of its shape and dtype beside it (state ``kahan_comp``), and add it to the next update:
            small updates then add up instead of vanishing. Wider parameters need none and get none
            (default: False).
        {_maximize_doc}
        {_foreach_doc} Here foreach is also the default on CPU, where it gives the same bits.
        {_capturable_doc} Windows then close on the device.
        {_differentiable_doc}
        {_fused_doc}
            Here the default on CUDA is one Triton kernel for all groups, whatever their
            frequencies; it serves floating-point parameters, and whatever it does not goes through
            foreach. ``fused=True`` asks for it by name, and on a CPU for torch's kernel, to which
            windows add their own pass.
        param_groups (iterable): the same as ``params``.
        memory (str, tuple or dict): a :class:`WeightMemory` from the start: a preset's name, its
            frequencies, or a dict of its arguments (default: None).

    Raises:
        ValueError: an option's value or name is invalid, or a parameter is in two groups.

    Example:
        >>> optimizer = NestedOptimizer(
        ...     [
        ...         {{"params": model.head.parameters()}},
        ...         {{"params": model.body.parameters(), "frequency": 10}},
        ...     ],
        ...     lr=1e-3,
        ... )
    """
