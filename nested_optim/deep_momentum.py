"""DeepMomentum: the momentum is a small memory that is trained on the gradient stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    _capturable_doc,
    _differentiable_doc,
    _foreach_doc,
    _maximize_doc,
    _use_grad_for_differentiable,
)

from . import momentum_memory, rules
from .fused import FusedSteps
from .momentum import MomentumOptimizer, foreach_decay, foreach_descend, foreach_scale, in_place
from .optimizer import ParamsT
from .step_hooks import outside_autocast
from .tensors import is_dtensor

#: Options of the MLP memory, of which there is one for all groups, and their defaults.
_MEMORY_DEFAULTS: dict[str, Any] = {
    "memory_lr": 1e-3,
    "hidden": 16,
    "memory_decays": (0.0, 0.99),
    "trust": 1.0,
    "memory_samples": 4096,
    "memory_seed": 0,
}
_GLOBAL = ("memory", "objective", *_MEMORY_DEFAULTS)
#: What cannot change under a memory that exists.
_STRUCTURE = ("memory", "objective", "hidden", "memory_decays")


class DeepMomentum(MomentumOptimizer):
    def __init__(
        self,
        params: ParamsT | None = None,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        memory: str = "mlp",
        objective: str | None = None,
        memory_lr: float = 1e-3,
        hidden: int = 16,
        memory_decays: tuple[float, float] = (0.0, 0.99),
        trust: float = 1.0,
        memory_samples: int = 4096,
        memory_seed: int = 0,
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
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "memory": memory,
            "objective": objective,
            "memory_lr": memory_lr,
            "hidden": hidden,
            "memory_decays": memory_decays,
            "trust": trust,
            "memory_samples": memory_samples,
            "memory_seed": memory_seed,
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
            # Made by the first step, in the first group only.
            **dict.fromkeys(momentum_memory.TENSORS),
            "memory_step": 0,
        }
        self._samples: list[momentum_memory.Sample] = []
        self._metrics: dict[str, Tensor] = {}
        super().__init__(params, defaults, param_groups=param_groups)

    _moment_keys = ("momentum_buffer", "exp_avg_fast", "exp_avg_slow")
    _learned_keys = (*momentum_memory.TENSORS, "memory_step")

    # ------------------------------------------------------------------ options

    def _check_options(self, options: dict[str, Any], where: str) -> dict[str, Any]:
        canonical = super()._check_options(options, where)
        memory, objective = options["memory"], options["objective"]
        if memory not in ("linear", "mlp"):
            raise ValueError(
                f"{where}Invalid memory: {memory!r}. Choose one of linear, mlp: what the momentum "
                "is here. Slow copies of the weights, which other optimizers take as memory=, are "
                "attached by WeightMemory(optimizer, ...)"
            )
        if objective is None:
            objective = "l2" if memory == "mlp" else "dot"
        canonical["objective"] = objective
        if objective not in rules.OBJECTIVES:
            raise ValueError(f"{where}Invalid objective: {objective!r}. Choose one of l2, dot")
        if memory == "linear":
            if objective == "l2":
                raise ValueError(
                    f"{where}a linear memory with the objective 'l2' is DeltaMomentum: use that "
                    "class, or objective='dot' for SGD with momentum"
                )
            given = {key: options[key] for key in _MEMORY_DEFAULTS}
            given["memory_decays"] = tuple(given["memory_decays"])
            changed = [key for key in given if given[key] != _MEMORY_DEFAULTS[key]]
            if changed:
                raise ValueError(
                    f"{where}{', '.join(changed)}: a linear memory has no such option; leave it out"
                )
            return canonical

        self._check_flags(options, where)
        if not options["momentum"] < 1.0:
            raise ValueError(f"{where}Invalid momentum value: {options['momentum']}; below 1 here")
        for key in ("memory_lr", "trust"):
            if not 0.0 <= options[key] < math.inf:
                raise ValueError(f"{where}Invalid {key}: {options[key]}")
        for key, least in (("hidden", 1), ("memory_samples", 1), ("memory_seed", 0)):
            value = options[key]
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{where}Invalid {key}: {value!r}. An integer, at least {least}")
        decays = tuple(options["memory_decays"])
        if len(decays) != 2 or not all(0.0 <= decay < 1.0 for decay in decays):
            raise ValueError(f"{where}Invalid memory_decays: {decays}. Give two, in [0, 1)")
        canonical["memory_decays"] = tuple(float(decay) for decay in decays)
        canonical.update(momentum_memory.checked(options, where))
        return canonical

    @staticmethod
    def _check_flags(options: dict[str, Any], where: str) -> None:
        for flag in ("capturable", "differentiable"):
            if options[flag]:
                raise RuntimeError(
                    f"{where}an MLP memory does not support `{flag}`: it takes a training step of "
                    "its own within the optimizer's. memory='linear' does"
                )

    def _check_edits(self, group: dict[str, Any], where: str) -> None:
        super()._check_edits(group, where)
        first = self.param_groups[0]
        for key in _STRUCTURE:
            if group[key] != first[key]:
                raise ValueError(
                    f"{where}{key} is {group[key]!r}, but {first[key]!r} in the first group: all "
                    "groups share one memory"
                )
        if group["memory"] == "mlp":
            self._check_flags(group, where)
            weights = group["memory_weights"]
            if weights is not None and weights.numel() != rules.memory_size(group["hidden"]):
                raise ValueError(
                    f"{where}hidden={group['hidden']} does not fit the memory that is there; "
                    "choose it when building the optimizer"
                )

    def _check_other_groups(self, group: dict[str, Any], where: str) -> None:
        super()._check_other_groups(group, where)
        shared = self.param_groups[0] if self.param_groups else self.defaults
        for key in _GLOBAL:
            if group.setdefault(key, shared[key]) != shared[key]:
                raise ValueError(
                    f"{where}{key}={group[key]!r}: all groups share one memory, whose {key} is "
                    f"{shared[key]!r}; set it when building the optimizer"
                )
        for key in self._learned_keys:
            if isinstance(group.get(key), Tensor) or group.get(key):
                raise ValueError(f"{where}{key} is no option; load_state_dict() brings a memory")

    def _check_parameter(self, param: Tensor, group: dict[str, Any], where: str) -> None:
        super()._check_parameter(param, group, where)
        if group["memory"] == "mlp" and is_dtensor(param):
            raise RuntimeError(
                f"{where} is sharded (a DTensor): every rank would train its own memory, on its "
                "own shard. Use memory='linear' or DeltaMomentum, or replicate the parameter"
            )

    # ------------------------------------------------------------------ state

    def _keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._moment_keys if group["memory"] == "mlp" else self._moment_keys[:1]

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        # A buffer that SGD left is taken to be full.
        full = "momentum_buffer" in state
        super()._init_state(param, group, state)
        if group["memory"] == "mlp":
            momentum_memory.ensure(self.param_groups[0], param.device)
            if "scales" not in state:
                state["scales"] = momentum_memory.empty_scales(param)
                if full:
                    state["scales"][2] = 1 / (1 - group["momentum"])

    def _load_tensor(self, param: Tensor, group: dict[str, Any], key: str, value: Any) -> Any:
        if key != "scales":
            return super()._load_tensor(param, group, key, value)
        if is_dtensor(param):
            raise ValueError("an MLP memory does not serve sharded parameters (DTensors)")
        if value.shape != (rules.MEMORY_SCALES,):
            raise ValueError(f"checkpoint's 'scales' has shape {tuple(value.shape)}, not (5,)")
        return value.to(momentum_memory.empty_scales(param))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_samples", [])
        self.__dict__.setdefault("_metrics", {})

    # ------------------------------------------------------------------ step

    def _step(self, closure: Callable[[], Any] | None, fused: FusedSteps | None) -> Any:
        self._samples = []
        loss = super()._step(closure, fused)
        self._train_memory()
        return loss

    @_use_grad_for_differentiable
    def _step_while_compiling(self, closure: Callable[[], Any] | None) -> Any:
        if self.param_groups[0]["memory"] == "mlp":
            return self._step_uncompiled(closure)
        return super()._step_while_compiling(closure)

    @outside_autocast
    @_use_grad_for_differentiable
    def flush(self) -> int:
        self._samples = []
        updated = super().flush()
        self._train_memory()
        return updated

    flush.__doc__ = MomentumOptimizer.flush.__doc__

    def _run_meta_update_hooks(self) -> None:
        self._train_memory()  # hooks find the step complete
        super()._run_meta_update_hooks()

    def _run(
        self,
        group: dict[str, Any],
        kept: list[list[Tensor]],
        grads: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        tensors = [kept[0], grads, *kept[1:]]
        weights = None
        if group["memory"] == "mlp":
            first = self.param_groups[0]
            weights = momentum_memory.ensure(first, kept[0][0].device)
            tensors.append([state["scales"] for state in states])
            total = sum(p.numel() for g in self.param_groups for p in g["params"])
            self._samples += momentum_memory.take_samples(first, total, tensors, group)
        if self._uses_foreach(group, kept[0]):
            _multi_tensor_deepmomentum(tensors, group, weights)
        else:
            _single_tensor_deepmomentum(tensors, group, weights)

    def _train_memory(self) -> None:
        """One step of the memory on what this step's gradients taught; nothing without any."""
        samples, self._samples = self._samples, []
        if samples:
            self._metrics = momentum_memory.train(self.param_groups[0], samples)

    def metrics(self) -> dict[str, Tensor]:
        """How well the last step's gradients were foreseen, as 0-d tensors; empty before any.

        ``memory_loss`` is the loss that the memory was last trained on, before that training;
        ``momentum_loss`` the loss of plain momentum's mean gradient on the same sample. Both are 0
        on the first step, where there was nothing to predict from, and {} with a linear memory.
        """
        return dict(self._metrics)


# Each path below takes the lists [params, grads, momentum_buffers], with an MLP memory's weights
# also [.., exp_avgs_fast, exp_avgs_slow, scales], and updates all but the gradients in place.


def _single_tensor_deepmomentum(
    tensors: list[list[Tensor]], group: dict[str, Any], weights: Tensor | None
) -> None:
    """The rule itself, tensor by tensor."""
    params, grads, *state = tensors
    if weights is None:
        in_place(rules.momentum, [params, *state], grads, group)
        return
    options = {"decays": group["memory_decays"], "trust": group["trust"]}
    for params, grads, *state in momentum_memory.by_kind(tensors):
        here = weights.to(params[0].device)
        in_place(rules.deep_momentum, [params, *state], grads, group, weights=here, **options)


def _multi_tensor_deepmomentum(
    tensors: list[list[Tensor]], group: dict[str, Any], weights: Tensor | None
) -> None:
    """The rule on lists of tensors."""
    momentum, decays = group["momentum"], group["memory_decays"]
    for params, grads, bufs, *rest in momentum_memory.by_kind(tensors):
        grads = foreach_decay(group, params, grads)
        foreach_scale(bufs, momentum)
        torch._foreach_add_(bufs, grads)
        if weights is None:
            foreach_descend(group, params, bufs)
            continue
        fasts, slows, scales = rest
        grads, *state = map(momentum_memory.as_real, (grads, bufs, fasts, slows))
        for averages, kept in zip(state[1:], decays):
            torch._foreach_lerp_(averages, grads, 1 - kept)
        squares = momentum_memory.mean_squares(grads)
        new = rules.advance_scales(torch.stack(scales), squares, momentum, decays)
        torch._foreach_copy_(scales, list(new.unbind(0)))
        directions = momentum_memory.directions(
            weights.to(params[0].device),
            state,
            rules.memory_units(new),
            group["trust"],
            # On a CPU packing saves nothing, and one by one the results have the rule's bits.
            pack_elements=0 if params[0].is_cpu else rules.MEMORY_SLICE,
        )
        if params[0].is_complex():
            directions = list(map(torch.view_as_complex, directions))
        foreach_descend(group, params, directions)


DeepMomentum.__doc__ = rf"""SGD whose momentum is a memory, trained on the gradients as they come.

    Deep Momentum Gradient Descent of Nested Learning (arXiv 2512.24695, Eq. 50): a momentum is a
    memory of the gradient stream, and need not be linear. With ``memory="mlp"`` the update is

    .. math::
        b \leftarrow \alpha b + g, \qquad
        \theta \leftarrow \theta - \eta\,(b + w \sigma f(x)), \qquad
        x = (\tfrac{{b}}{{w}}, \bar g_{{fast}}, \bar g_{{slow}}) / \sigma

    where f is one MLP for all coordinates of all parameters, w the number of gradients that b
    stands for, and :math:`\sigma` the running root mean square of the tensor's gradients. f starts
    as 0, so the first steps *are* SGD with momentum, and it can leave it only by learning; with
    ``memory_lr=0`` it never does, to the bit. ``b / w + f`` is a prediction of the next gradient.
    Before a tensor is updated, what the memory predicted from the features before is compared with
    the gradient that came, on ``memory_samples`` coordinates; after all are, the memory takes one
    Adam step on

    - ``objective="l2"``: the mean squared error. The memory learns the expected gradient given
      the features: it shrinks what is noise and keeps what persists.
    - ``objective="dot"``: minus their product, plus half the square of f, without which the
      product has no optimum. The memory learns the expected gradient too, but adds it to the
      momentum: where gradients persist, steps become up to twice as long.

    What f adds to a tensor's update is cut to ``trust`` times the norm of b. At 1 the update never
    points against plain momentum, however wrong the memory is.

    ``memory="linear"``, with ``"dot"``, is the paper's reading of plain momentum (Eq. 33), and is
    ``torch.optim.SGD`` with momentum, bit for bit; with ``"l2"`` it would be
    :class:`DeltaMomentum`, and is refused.

    When it helps: where gradients are predictable from their recent past, and where the learning
    rate is high for plain momentum, whose overshooting the memory foresees. Where it is low,
    ``"l2"`` is slower than plain momentum: noise cannot be foreseen, so steps get shorter. It
    learns the gradients of the path that it is on, and lags behind when they change. The paper
    gives no sizes and no training: features, network and objective are our choices. It costs three
    tensors of the parameter's size, and per update about 10 operations and a tanh per hidden unit
    and coordinate (``python -m benchmarks rules cost``).

    Args:
        params (iterable): parameters, ``(name, parameter)`` pairs, or dicts of groups, each of
            which may set every option below but the memory's own.
        lr (float or Tensor): learning rate, on SGD's scale (default: 1e-3). A tensor needs
            ``foreach`` off or ``capturable=True``.
        momentum (float): decay rate :math:`\alpha` of b, in [0, 1) (default: 0.9).
        memory (str): what the momentum is, ``"mlp"`` or ``"linear"`` (default: ``"mlp"``). The
            ``memory=`` of our other optimizers is another thing: attach slow copies of the weights
            here by ``WeightMemory(optimizer)``.
        objective (str): ``"l2"`` or ``"dot"``, see above; None is ``"l2"`` for an MLP and ``"dot"``
            for a linear memory (default: None).
        memory_lr (float): learning rate of the memory's own Adam (default: 1e-3).
        hidden (int): hidden units of f; it has 4 * hidden weights (default: 16).
        memory_decays (tuple): decays of the fast and the slow average; 0 is the last gradient
            (default: (0.0, 0.99)).
        trust (float): bound of what f adds to b, as a multiple of the norm of b, per tensor; 0 is
            plain momentum (default: 1.0).
        memory_samples (int): about how many coordinates train the memory per step (default: 4096).
        memory_seed (int): seed of f's first layer; the global random state is left alone
            (default: 0).
        weight_decay (float): weight of SGD's L2 penalty, which the memory sees (default: 0.0).
        decoupled (bool): shrink parameters by ``lr * weight_decay`` instead, as AdamW does
            (default: False).
        frequency (int): gradients per update, at least 1 (default: 1); see
            :class:`NestedOptimizer`.
        window (str): what an update sees of its gradients, their ``"mean"`` or ``"sum"`` (default:
            ``"mean"``).
        state_dtype (torch.dtype or str): dtype of the buffer and averages; None means the
            parameter's (default: None).
        {_maximize_doc}
        {_foreach_doc} Here foreach is also the default on CPU, where it gives the same bits.
        {_capturable_doc} With a linear memory only.
        {_differentiable_doc} With a linear memory only.
        fused (bool, optional): there is no fused kernel for this rule; True is refused.
        param_groups (iterable): the same as ``params``.

    The memory's options are those of all groups; a group that differs is refused. A step in which
    the memory's gradient is not finite leaves the memory as it was. Tensors whose gradients have a
    root mean square outside of 1e-18 to 1e18 get plain momentum. Complex parameters train as their
    real and imaginary parts. Sharded parameters (DTensors) need a linear memory.

    State: ``step``, ``window_count``, ``window_sum`` where there are windows, ``momentum_buffer``,
    and with an MLP ``exp_avg_fast``, ``exp_avg_slow`` (of the parameter's shape) and ``scales``
    (five numbers). The memory is ``memory_weights``, ``memory_exp_avg``, ``memory_exp_avg_sq``
    (flat float32 tensors) and ``memory_step`` in ``param_groups[0]``. Checkpoints of SGD with
    momentum load.

    Raises:
        ValueError: an option's value or name is invalid, or a parameter is in two groups.
        RuntimeError: ``fused=True``, or with an MLP ``capturable`` or ``differentiable``.

    Example:
        >>> optimizer = DeepMomentum(model.parameters(), lr=0.1)
        >>> optimizer.step()
        >>> optimizer.metrics()["memory_loss"]  # beside ["momentum_loss"]
    """
