"""DeltaMomentum: SGD whose momentum forgets along the gradient before it adds it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    _capturable_doc,
    _differentiable_doc,
    _foreach_doc,
    _maximize_doc,
)

from . import kernels, rules
from .delta_steps import DeltaSteps, default_product_dtype, takes
from .fused import Work
from .memory_argument import MemoryT
from .momentum import MomentumOptimizer, foreach_decay, foreach_descend, foreach_scale, in_place
from .nested import _buckets
from .optimizer import ParamsT
from .tensors import is_dtensor, laid_out_like, resolve_dtype

#: Elements that one batched product copies together; larger matrices run alone, uncopied.
_BATCH_ELEMENTS = 2**24

_PRODUCT_DTYPES = ("float16", "bfloat16", "float32", "float64")


class DeltaMomentum(MomentumOptimizer):
    def __init__(
        self,
        params: ParamsT | None = None,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        delta_rate: float = 1.0,
        *,
        normalized: bool = False,
        product_dtype: torch.dtype | str | None = None,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        frequency: int = 1,
        window: str = "mean",
        state_dtype: torch.dtype | str | None = None,
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
            "momentum": momentum,
            "delta_rate": delta_rate,
            "normalized": normalized,
            "product_dtype": product_dtype,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "frequency": frequency,
            "window": window,
            "state_dtype": state_dtype,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, param_groups=param_groups, memory=memory)

    def _check_options(self, options: dict[str, Any], where: str) -> dict[str, Any]:
        canonical = super()._check_options(options, where)
        rate = options["delta_rate"]
        if not 0.0 <= rate < math.inf:
            raise ValueError(f"{where}Invalid delta_rate value: {rate}")
        canonical["delta_rate"] = float(rate)
        if options["product_dtype"] is not None:
            # A string, so that checkpoints hold plain values.
            dtype = _product_dtype(options, where)
            canonical["product_dtype"] = str(dtype).removeprefix("torch.")
        return canonical

    def _check_edits(self, group: dict[str, Any], where: str) -> None:
        super()._check_edits(group, where)
        dtype = _product_dtype(group, where)
        if dtype is None or dtype.itemsize > 2:
            return
        for i, p in enumerate(group["params"]):
            if p.is_complex():
                raise ValueError(
                    f"{self._param_label(group, i)} is complex, and there are no complex products "
                    f"in {dtype}: give its group product_dtype=None"
                )

    _kernel_steps: DeltaSteps | None = None

    def _run_kernels(
        self, group: dict[str, Any], kept: list[list[Tensor]], grads: list[Tensor]
    ) -> list[int] | None:
        if torch.compiler.is_compiling() or not takes(group):
            return None
        if not any(map(kernels.available, {p.device for p in kept[0]})):
            return None
        if self._kernel_steps is None:
            self._kernel_steps = DeltaSteps()
        params, bufs = kept
        return self._kernel_steps(group, params, bufs, grads, _product_dtype(group))

    def _repeat_step(self) -> bool:
        if self._kernel_steps is None or torch.compiler.is_compiling():
            return False
        return self._kernel_steps.repeat(self)

    def _remember_step(self, work: Work) -> None:
        if self._kernel_steps is not None and not torch.compiler.is_compiling():
            self._kernel_steps.remember(self, work)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._kernel_steps is not None:
            self._kernel_steps.forget()

    def _run(
        self,
        group: dict[str, Any],
        kept: list[list[Tensor]],
        grads: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        tensors = [kept[0], grads, kept[1]]
        if self._uses_foreach(group, kept[0]):
            _multi_tensor_deltamomentum(tensors, group)
        else:
            _single_tensor_deltamomentum(tensors, group)


def _product_dtype(group: dict[str, Any], where: str = "") -> torch.dtype | None:
    """The dtype that the group asks for; None if it leaves that to each buffer."""
    name = group["product_dtype"]
    if name is None:
        return None
    dtype = resolve_dtype(name, where, "product_dtype")
    if str(dtype).removeprefix("torch.") not in _PRODUCT_DTYPES:
        raise ValueError(
            f"{where}Invalid product_dtype: {name!r}. Choose one of {', '.join(_PRODUCT_DTYPES)}, "
            "or None for the buffer's own"
        )
    return dtype


# Each path below takes the lists [params, grads, momentum_buffers] and updates all but the
# gradients in place.


def _single_tensor_deltamomentum(tensors: list[list[Tensor]], group: dict[str, Any]) -> None:
    """The rule itself, tensor by tensor."""
    params, grads, bufs = tensors
    wanted = _product_dtype(group)

    def rule(param: Tensor, grad: Tensor, buf: Tensor, **options: Any) -> tuple[Tensor, ...]:
        dtype = wanted or default_product_dtype(buf)
        return rules.delta_momentum(param, grad, buf, product_dtype=dtype, **options)

    options = {key: group[key] for key in ("delta_rate", "normalized")}
    in_place(rule, [params, bufs], grads, group, **options)


def _multi_tensor_deltamomentum(tensors: list[list[Tensor]], group: dict[str, Any]) -> None:
    """The rule on lists of tensors."""
    momentum, rate = group["momentum"], group["delta_rate"]
    for params, grads, bufs in _buckets(tensors).values():
        grads = foreach_decay(group, params, grads)
        terms = []
        if rate and momentum:
            # On a CPU a batch saves nothing, and one by one the products have the rule's bits.
            batched = not params[0].is_cpu and not is_dtensor(params[0])
            terms = _delta_terms(bufs, grads, group, _BATCH_ELEMENTS if batched else 0)
        foreach_scale(bufs, momentum)
        torch._foreach_add_(bufs, grads)
        if terms:
            torch._foreach_sub_(bufs, terms)
        foreach_descend(group, params, bufs)


def _delta_terms(
    bufs: list[Tensor], grads: list[Tensor], group: dict[str, Any], batch_elements: int
) -> list[Tensor]:
    """Each tensor's ``rules.delta_term``; those of one shape in batches of up to so many elements.

    A batch of small matrices costs two launches instead of two for each, and a copy of both.
    """
    options = {
        "rate": group["delta_rate"],
        "momentum": group["momentum"],
        "normalized": group["normalized"],
        "product_dtype": _product_dtype(group) or default_product_dtype(bufs[0]),
    }
    shapes: dict[Any, list[int]] = {}
    pairs = [tuple(map(rules.as_matrix, pair)) for pair in zip(bufs, grads)]
    for i, (buf, _) in enumerate(pairs):
        shapes.setdefault(buf.shape, []).append(i)
    terms: list[Any] = [None] * len(bufs)
    for shape, members in shapes.items():
        size = max(1, batch_elements // max(1, shape.numel()))
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            if len(chunk) == 1:
                found: Any = [rules.delta_term(*pairs[chunk[0]], **options)]
            else:
                stacks = (torch.stack(column) for column in zip(*(pairs[i] for i in chunk)))
                found = rules.delta_term(*stacks, **options).unbind(0)
            for i, term in zip(chunk, found):
                terms[i] = laid_out_like(term.reshape(bufs[i].shape), bufs[i])
    return terms


DeltaMomentum.__doc__ = rf"""SGD whose momentum forgets along the gradient before it adds it.

    .. math::
        b \leftarrow b\,(\alpha I - \rho\, g^\dagger g) + g, \qquad
        \theta \leftarrow \theta - \eta\, b, \qquad \rho = \frac{{r}}{{1 + r |g|^2 / \alpha}}

    Delta Momentum of Nested Learning (arXiv 2512.24695, Eq. 48-49) with P = 1, in the form of
    ``torch.optim.SGD``: the buffer is a memory trained by an L2 regression, whose descent step is
    the delta rule, instead of by a dot product, whose step is plain momentum. With ``delta_rate=0``
    this is SGD with momentum, bit for bit with the same flags. A matrix is multiplied from the
    right; a tensor of more dimensions counts as the matrix (out, rest), a vector or scalar as one
    row.

    The paper's decay has no rate (r = 1) and no bound: a gradient that stays longer than
    :math:`\sqrt{{1 + \alpha}}` then makes the buffer grow without end. Here :math:`\rho` shrinks so
    that :math:`\rho |g|^2 < \alpha` for every gradient, and the buffer stays within
    :math:`\max |g| / (1 - \alpha)` as plain momentum's does. |g| is the Frobenius norm, which is
    at least the spectral norm, and equal to it for a vector.

    When it helps: where a momentum that is large enough to be fast overshoots, for it lets go of
    what the present gradient contradicts. It does not help where gradients agree (there momentum
    gains by adding them up, and this one does not add along ``g``), and it takes two matrix
    products per step. ``delta_rate`` has the unit 1 / gradient squared: gradients much shorter than
    ``delta_rate ** -0.5`` leave plain momentum. With ``normalized=True`` it has none.

    Args:
        params (iterable): parameters, ``(name, parameter)`` pairs, or dicts of groups, each of
            which may set every option below.
        lr (float or Tensor): learning rate (default: 1e-3). A tensor needs ``foreach`` off or
            ``capturable=True``.
        momentum (float): decay rate :math:`\alpha` of the buffer, in [0, 1] (default: 0.9).
        delta_rate (float): r, at least 0 (default: 1.0, the paper's).
        normalized (bool): count the rate in units of :math:`\alpha / |g|^2`: then :math:`\rho |g|^2
            = \alpha r / (1 + r)` at every scale of the gradient, so that 1 takes off half of what
            the buffer has along a vector gradient (default: False).
        product_dtype (torch.dtype or str): dtype of the two products, ``"bfloat16"``,
            ``"float16"``, ``"float32"`` or ``"float64"``. Buffer and gradient are brought to a
            norm that suits it first, and only the term that the buffer forgets is rounded to it.
            None means bfloat16 on CUDA for buffers of at most 32 bits, and elsewhere (on a CPU, few
            of which multiply in bfloat16 at a useful speed, for float64 and complex buffers) the
            buffer's own; ``"float32"`` is full precision (where
            ``torch.set_float32_matmul_precision`` has its say), with which a step on a GPU takes
            several times as long (default: None).
        weight_decay (float): weight of SGD's L2 penalty, which the momentum sees (default: 0.0).
        decoupled (bool): shrink parameters by ``lr * weight_decay`` instead, as AdamW does
            (default: False).
        frequency (int): gradients per update, at least 1 (default: 1); see
            :class:`NestedOptimizer`.
        window (str): what an update sees of its gradients, their ``"mean"`` or ``"sum"`` (default:
            ``"mean"``).
        state_dtype (torch.dtype or str): dtype of the buffer; None means the parameter's
            (default: None).
        {_maximize_doc}
        {_foreach_doc} Here foreach is also the default on CPU, where it gives the same bits. The
            default on CUDA with Triton is kernels around the products, for real parameters
            and buffers of at most 32 bits; whatever they do not serve goes through foreach.
        {_capturable_doc} Windows then close on the device.
        {_differentiable_doc}
        fused (bool, optional): True is refused: no kernel has all of this rule in it.
        param_groups (iterable): the same as ``params``.
        memory (str, tuple or dict): a :class:`WeightMemory` from the start: a preset's name, its
            frequencies, or a dict of its arguments (default: None).

    Complex parameters are their own matrices, with the conjugate transpose, not pairs of real
    ones; there :math:`\alpha I - \rho g^\dagger g` acts on complex rows. Sharded parameters
    (DTensors) give what whole ones would; their products communicate at each update.

    State: ``step``, ``window_count``, ``window_sum`` where there are windows, ``momentum_buffer``
    (of the parameter's shape). Checkpoints of SGD with momentum load; ``dampening`` and Nesterov's
    form are not offered.

    Raises:
        ValueError: an option's value or name is invalid, or a parameter is in two groups.
        RuntimeError: ``fused=True``.

    Example:
        >>> optimizer = DeltaMomentum(model.parameters(), lr=0.1, momentum=0.95, normalized=True)
    """
