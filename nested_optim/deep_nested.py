"""DeepNestedOptimizer: AdamW whose step size and momenta are learned while it trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _use_grad_for_differentiable

from . import kernels
from .deep_nested_fused import FusedLearning
from .deep_nested_steps import apply
from .fused import FusedSteps, Work
from .memory_argument import MemoryT
from .meta import learned, long_run, options, simple
from .meta.explicit import ExplicitUpdates
from .meta.features import clip_factor
from .meta.report import Report, as_loss
from .meta.rest import Rest
from .meta.simple import Due
from .nested import NestedOptimizer
from .optimizer import LevelOptimizer, ParamsT
from .step_hooks import outside_autocast
from .tensors import is_dtensor


class DeepNestedOptimizer(ExplicitUpdates, Report, NestedOptimizer):
    r"""AdamW whose step size and momenta are learned while it trains.

    Three learned parts, each with a switch of its own, change AdamW's update of a tensor:

    .. math::
        m &\leftarrow \beta_1 (1 - d)\, m + (1-\beta_1) g, \qquad
        n = w_0 (s\, \hat m + b\, g) + w_1 \hat m_1 + w_2 \hat m_2 + \dots \\
        \theta &\leftarrow (1 - \eta\mu\lambda)\,\theta
            - \eta\mu\, n / (\sqrt{\hat v} + \epsilon)

    - the controller (``learn_lr``): statistics of each group give its multiplier :math:`\mu`;
    - the momentum (``learn_momentum``): statistics of each tensor give scale s, shift b and damping
      d; the momentum is a step on an L2 regression, see :class:`L2RegressionMomentum`;
    - the mixture (``learn_mixing``): weights w of momenta on the time scales ``cms_frequencies``,
      see :class:`ContinuumMemoryState`.

    They begin at :math:`\mu = s = w_0 = 1` and 0 for the rest, exactly, so the first steps *are*
    AdamW's, and with ``meta_lr=0``, or with all parts off, they stay :class:`NestedOptimizer`'s to
    the bit. They leave it along true gradients of the model's loss only:

    - ``mode="simple"``: every gradient tells what the update before it did to the loss (a
      first-order hypergradient; Baydin et al. 2018). No further forward pass. What an update does
      to momenta, and so to later updates, is left out. Derivatives are gathered and used every
      ``meta_update_freq`` steps, as ``meta_rule`` says. Statistics are those of each tensor's
      update before, so that one pass over memory does (the loss is this step's).
    - ``mode="explicit"``: :meth:`meta_update` takes k real steps on copies and descends on the
      validation loss after them, through all of them. Call it, or give ``val_batch_fn``.

    When it helps: where the learning rate is too small. It cannot undo what steps at a rate that is
    much too large have done, the first of which is AdamW's. It does not replace a search where that
    is cheap. What is best for the next step is known to be less than best for a run (short-horizon
    bias, Wu et al. 2018); so simple mode also looks back at the way from where training began
    (``horizon``).

    Args:
        params_or_model (iterable or Module): parameters, ``(name, parameter)`` pairs, groups; or a
            model, which makes the groups ``core`` and, if it has one, ``memory``
            (:func:`group_titans_params`).
        lr (float or Tensor): learning rate, which multipliers multiply and schedulers may move
            (default: 1e-3).
        model (Module): what :meth:`meta_update` unrolls; with parameters given too, those are
            trained. Not saved with the state.
        params (iterable): the same as ``params_or_model``.
        base_lr (float or Tensor): the same as ``lr``.
        loss_fn (callable): ``loss_fn(model, batch)`` for :meth:`meta_update`; None takes the
            ``loss`` of the model's output. Not saved.
        meta_lr (float): learning rate of the learned parts; 0 leaves them. While they are as they
            began, 0 also leaves slow momenta and what learning needs of an update: both begin where
            it is raised (default: 1e-4).
        k_unroll (int): steps in an unroll from :meth:`observe_batch` (default: 5).
        cms_frequencies (tuple): updates per chunk of each momentum, ascending from 1; each one
            beside the first takes a tensor of at least float32 (default: (1, 10, 100)).
        momentum_hidden_dim (int): units per layer of the momentum's network (default: 64).
        controller_hidden_dim (int): units per layer of the controller (default: 32).
        mode (str): ``"simple"`` or ``"explicit"`` (default: ``"simple"``).
        meta_update_freq (int): steps between meta updates (default: 100).
        meta_rule (str): ``"cosine"`` divides each hypergradient by the lengths of gradient and last
            update, over all tensors, and descends on the sum, by a factor of about two per meta
            update at most. So what is learned does not depend on the loss's scale, and
            little from gradients that are mostly noise. ``"adam"`` is Adam on the mean, which makes
            as much of weak evidence as of strong. ``mode="explicit"`` has ``"adam"`` only
            (default: None, ``"cosine"`` where there is a choice).
        horizon (str): ``"run"`` teaches the controller by the whole way, too: by the cosine of each
            fifth gradient with the way that parameters have come, which is the derivative of the
            loss by that way's length. Where this and what the next losses say disagree, the latter
            count for the less the surer the former is; so multipliers fall where nothing is gained
            any more, and not before. It takes a tensor ``initial_param``, 2 bytes per
            parameter in float32. ``"step"`` goes by the next losses alone (default: None, ``"run"``
            with ``meta_rule="cosine"``, which it needs beside ``learn_lr``).
        unroll (str): ``"exact"``, ``"stepwise"`` (the same in less memory) or ``"first_order"``
            (cheaper, biased), see :mod:`nested_optim.meta.unroll` (default: ``"exact"``).
        use_gradient_checkpointing (bool): another word for ``unroll="stepwise"``.
        min_lr_mult (float): lower bound of multipliers, in (0, 1) (default: 0.01).
        max_lr_mult (float): upper bound, above 1 (default: 100). In between their logarithm moves.
        max_grad_norm (float): clip the joint norm of all gradients to this before anything else
            sees them; ``grad`` itself stays as it is. Other ports clip at 1.0 without being asked
            (default: None, no clipping).
        learn_lr (bool): the controller (default: True).
        learn_momentum (bool): scale, shift and damping (default: True).
        learn_mixing (bool): the mixture, and with it the slow momenta (default: True).
        normalize (bool): divide by the root of the second moment (default: True).
        val_batch_fn (callable): gives a validation batch for a :meth:`meta_update` every
            ``meta_update_freq`` steps, in explicit mode, on the batches of :meth:`observe_batch`
            (before each step); passed over while fewer than ``k_unroll`` have come. Not saved, like
            any hook.
        fused (bool): with the learned parts on, whether to use the kernels, where there is Triton
            and a CUDA device: in one pass over memory a step learns and updates, with 32 bytes per
            parameter in float32 and 8 more per slow momentum. The first update of a parameter, and
            tensors that the kernels do not know, go the other paths. For all groups alike, in
            ``mode="simple"``, with at most three momenta and 128 units in a layer (default: None,
            the kernels wherever they can be used, unless ``foreach`` is given).
        betas, eps, weight_decay, amsgrad, frequency, window, decoupled, state_dtype, maximize,
            foreach, capturable, differentiable, kahan_sum: as in :class:`NestedOptimizer`, with
            ``weight_decay`` 0 by default. The last three, and betas that are tensors, need the
            learned parts off and ``normalize`` on.
        param_groups (iterable): the same as ``params``.
        memory (str, tuple or dict): a :class:`WeightMemory` from the start: a preset's name, its
            frequencies, or a dict of its arguments (default: None).

    All groups share the learned parts and their options. A multiplier is a group's: give parameters
    that should learn their own a group of their own. Sharded parameters (DTensors) need the
    learned parts off.

    State, beside NestedOptimizer's: ``exp_avg_slow1``, ... for slow momenta; in simple mode
    ``previous_grad`` (bfloat16 where moments are float32: only learning reads it, and only in
    products), ``update_trace`` (18 numbers) and, with ``horizon="run"``, ``initial_param``
    (of the same dtype). In ``param_groups[0]``: flat float32
    tensors ``<part>_weights``, ``_exp_avg``, ``_exp_avg_sq`` and ``_grad`` (gathered since the last
    meta update) of the parts ``controller``, ``momentum`` and ``mixing``; ``long_run``;
    ``global_step`` and ``meta_updates``. Saving anywhere and going on is bit for bit the same.
    Batches kept for the unroll, the model and the loss function are not saved.

    Raises:
        ValueError: an option's value or name is invalid, or a parameter is in two groups.
        TypeError: models or parameters are given twice; a model or a function is none.
        RuntimeError: an option that needs the learned parts off.

    Example:
        >>> optimizer = DeepNestedOptimizer(model, lr=1e-3)
        >>> loss.backward()
        >>> result = optimizer.step(loss)  # or step(): the controller then does not see the loss
        >>> result["lr_multipliers"]  # one per group
    """

    def __init__(
        self,
        params_or_model: nn.Module | ParamsT | None = None,
        lr: float | Tensor | None = None,
        *,
        model: nn.Module | None = None,
        params: ParamsT | None = None,
        base_lr: float | Tensor | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        meta_lr: float = 1e-4,
        k_unroll: int = 5,
        cms_frequencies: Sequence[int] = (1, 10, 100),
        momentum_hidden_dim: int = 64,
        controller_hidden_dim: int = 32,
        mode: str = "simple",
        meta_update_freq: int = 100,
        meta_rule: str | None = None,
        horizon: str | None = None,
        unroll: str = "exact",
        use_gradient_checkpointing: bool = False,
        min_lr_mult: float = 0.01,
        max_lr_mult: float = 100.0,
        max_grad_norm: float | None = None,
        learn_lr: bool = True,
        learn_momentum: bool = True,
        learn_mixing: bool = True,
        normalize: bool = True,
        val_batch_fn: Callable[[], Any] | None = None,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
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
        if base_lr is not None:
            if lr is not None and lr is not base_lr and lr != base_lr:
                raise ValueError(f"lr={lr} and base_lr={base_lr} are one option: give one of them")
            lr = base_lr
        options.check_functions(loss_fn=loss_fn, val_batch_fn=val_batch_fn)
        model, params = options.subject(params_or_model, model, params, param_groups)

        defaults = {
            "lr": 1e-3 if lr is None else lr,
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
            "meta_lr": meta_lr,
            "k_unroll": k_unroll,
            "cms_frequencies": cms_frequencies,
            "momentum_hidden_dim": momentum_hidden_dim,
            "controller_hidden_dim": controller_hidden_dim,
            "mode": mode,
            "meta_update_freq": meta_update_freq,
            "meta_rule": meta_rule,
            "horizon": horizon,
            "unroll": options.unroll_of(unroll, use_gradient_checkpointing),
            "min_lr_mult": min_lr_mult,
            "max_lr_mult": max_lr_mult,
            "max_grad_norm": max_grad_norm,
            "learn_lr": learn_lr,
            "learn_momentum": learn_momentum,
            "learn_mixing": learn_mixing,
            "normalize": normalize,
            # Made by the first step, in the first group only.
            **dict.fromkeys(learned.KEYS),
            "global_step": 0,
            "meta_updates": 0,
        }
        self._start_transients()
        self.model, self.loss_fn = model, loss_fn
        LevelOptimizer.__init__(self, params, defaults, param_groups=param_groups, memory=memory)
        if val_batch_fn is not None:
            if mode != "explicit":
                raise ValueError("val_batch_fn is for mode='explicit'; mode='simple' needs no data")
            self.register_meta_update_hook(
                lambda _: self._scheduled_meta_update(val_batch_fn), every=meta_update_freq
            )

    _wide_keys = (*NestedOptimizer._wide_keys, *options.SLOW_KEYS)
    _learned_keys = learned.KEYS

    def _start_transients(self) -> None:
        """What lives from one step to the next for convenience only, and is not saved."""
        self._due: list[Due] = []
        self._counted = False  # whether this step brought a gradient
        self._loss: Tensor | None = None  # this step's, if it was told
        self._told = False  # whether the last step was
        self._batches: deque[Any] = deque()
        self._inputs = {}
        self._learning = FusedLearning()
        self._rest = Rest()
        self.last_meta_loss, self.controller_grad_norm = None, torch.zeros(())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_due" not in self.__dict__:  # unpickled or copied
            self._start_transients()
            self.model = self.loss_fn = None
        self._learning.forget()

    # ------------------------------------------------------------------ options

    def _check_options(self, given: dict[str, Any], where: str) -> dict[str, Any]:
        canonical = super()._check_options(given, where)
        canonical.update(options.check({**given, **canonical}, where))
        return canonical

    def _check_edits(self, group: dict[str, Any], where: str) -> None:
        super()._check_edits(group, where)
        first = self.param_groups[0]
        if options.shared(group) != options.shared(first):
            for key in options.SHARED:
                if group[key] != first[key]:
                    raise ValueError(
                        f"{where}{key} is {group[key]!r}, but {first[key]!r} in the first group: "
                        "all groups share the learned parts; edit it in every group"
                    )
        options.check_plain_only(group, where)
        options.check_same_pass(group, first, where)
        if group["fused"] and not options.is_plain(group):
            device = first["params"][0].device
            if not kernels.available(device):
                raise RuntimeError(
                    f"{where}`fused` is True, but learned updates have no kernels on {device}: "
                    "leave it at None"
                )
        options.check_rule(group, where)
        options.check_horizon(group, where)
        if group is first:
            learned.check_sizes(first, where)

    def _check_other_groups(self, group: dict[str, Any], where: str) -> None:
        super()._check_other_groups(group, where)
        shared = self.param_groups[0] if self.param_groups else self.defaults
        for key in options.SHARED:
            if group.setdefault(key, shared[key]) != shared[key]:
                raise ValueError(
                    f"{where}{key}={group[key]!r}: all groups share the learned parts, whose {key} "
                    f"is {shared[key]!r}; set it when building the optimizer"
                )
        options.check_same_pass({**self.defaults, **group}, shared, where)
        for key in self._learned_keys:
            if isinstance(group.get(key), Tensor) or group.get(key):
                raise ValueError(
                    f"{where}{key} is no option; load_state_dict() brings what was learned"
                )

    def _check_parameter(self, param: Tensor, group: dict[str, Any], where: str) -> None:
        super()._check_parameter(param, group, where)
        if is_dtensor(param) and not options.is_plain(group):
            raise RuntimeError(
                f"{where} is sharded (a DTensor), and learned updates look at whole tensors: "
                "replicate it (DDP), or train with learn_lr, learn_momentum and learn_mixing off"
            )

    @property
    def _nested(self) -> bool:
        """Whether updates are NestedOptimizer's own."""
        groups = self.param_groups
        return options.is_plain(groups[0]) or self._rest.holds(groups)

    # The kernels are NestedOptimizer's rule, on gradients as they are.
    @property
    def _has_kernels(self) -> bool:  # type: ignore[override]
        groups = self.__dict__.get("param_groups")
        return not groups or (self._nested and groups[0]["max_grad_norm"] is None)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # What is clipped must have been unscaled, and the host counts steps towards meta updates.
        first = self.param_groups[0]
        hosted = first["max_grad_norm"] is not None or not options.is_plain(first)
        return not hosted and super()._step_supports_amp_scaling

    # ------------------------------------------------------------------ state

    def _slow_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        if "mixing" not in learned.modules(group):
            return ()
        return options.SLOW_KEYS[: len(group["cms_frequencies"]) - 1]

    def _traces(self, group: dict[str, Any]) -> bool:
        """Whether updates leave behind what the next gradient is to be compared with."""
        return group["mode"] == "simple" and bool(learned.modules(group))

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        empty = partial(torch.zeros_like, param, memory_format=torch.preserve_format)
        if group["normalize"]:
            super()._init_state(param, group, state)
        elif "exp_avg" not in state:
            state["exp_avg"] = empty(dtype=self._state_dtype(param, group))
        learned.ensure(self.param_groups[0], self.param_groups[0]["params"][0].device)
        for key in self._slow_keys(group):
            if key not in state:
                state[key] = empty(dtype=self._window_dtype(param, group))
        if self._traces(group) and "update_trace" not in state:
            state["previous_grad"] = empty(dtype=self._kept_dtype(param, group))
            state["update_trace"] = simple.empty_trace(param)
        if long_run.is_on(group) and "initial_param" not in state:
            long_run.ensure(self.param_groups[0])
            began = empty(dtype=self._kept_dtype(param, group))
            state["initial_param"] = began.copy_(param.detach())

    def _kept_dtype(self, param: Tensor, group: dict[str, Any]) -> torch.dtype:
        """Of ``previous_grad`` and ``initial_param``: 8 bits are enough for products, and for a
        place near the start."""
        dtype = self._state_dtype(param, group)
        return torch.bfloat16 if dtype == torch.float32 else dtype

    def _counts_on_device(self, group: dict[str, Any]) -> bool:
        # A learned step is counted on the host, which tells the kernels.
        return self._nested and super()._counts_on_device(group)

    def _state_shape(
        self, param: Tensor, group: dict[str, Any], key: str
    ) -> tuple[int, ...] | None:
        same = key in ("previous_grad", "initial_param")
        return tuple(param.shape) if same else super()._state_shape(param, group, key)

    def _load_tensor(self, param: Tensor, group: dict[str, Any], key: str, value: Any) -> Any:
        if key in ("previous_grad", "initial_param"):
            dtype = self._kept_dtype(param, group)
            return super()._load_tensor(param, group, key, value).to(dtype)
        if key != "update_trace":
            return super()._load_tensor(param, group, key, value)
        value = simple.longer(value, group["betas"])
        if value.shape != (simple.TRACE,):
            raise ValueError(
                f"checkpoint's 'update_trace' has shape {tuple(value.shape)}, not {(simple.TRACE,)}"
            )
        return value.to(simple.empty_trace(param))

    # ------------------------------------------------------------------ step

    def step(self, closure: Callable[[], Any] | float | Tensor | None = None) -> Any:
        """One step on the current gradients; may be told the loss, which the controller then sees.

        Args:
            closure: None; a function that re-evaluates the model and returns the loss, as in torch
                (its loss is returned, and not looked at); or this step's loss, one number. It must
                be the same on all ranks, or their parameters drift apart: all-reduce it first.

        Returns:
            The closure's loss, or None; told a loss, a dict of ``global_step`` (steps so far),
            ``lr_multipliers`` (``(groups,)``, those of this step), ``meta_loss`` and
            ``controller_grad_norm`` (of the last meta update; None and 0 before one).

        Raises:
            TypeError: the loss is no number.
            RuntimeError: a gradient or a parameter that the rule cannot serve. Nothing has changed.
        """
        if told := closure is not None and not callable(closure):
            self._loss = as_loss(closure)
        try:
            result = super().step(None if told else closure)
        finally:
            self._told, self._loss = self._loss is not None, None
        if not told:
            return result
        return {
            "global_step": self.param_groups[0]["global_step"],
            "lr_multipliers": self.get_lr_multipliers(),
            "meta_loss": self.last_meta_loss,
            "controller_grad_norm": self.controller_grad_norm,
        }

    # torch would wrap it once more: hooks run in the step that this one calls.
    step.hooked = True  # type: ignore[attr-defined]

    def observe_loss(self, loss: float | Tensor | None) -> None:
        """Tell the loss of the next step, which forgets it; None withdraws it."""
        # The caller may go on adding to its tensor until then.
        self._loss = None if loss is None else as_loss(loss).clone()

    def _step(self, closure: Callable[[], Any] | None, fused: FusedSteps | None) -> Any:
        self._due, self._counted = [], False
        self._rest.settle(self.state, self._nested)
        result = super()._step(closure, fused)
        if fused is not None and not self._counted:
            self._counted = any(p.grad is not None for g in self.param_groups for p in g["params"])
        self._counted &= not self._amp_scaling()  # the device knows whether this step was one
        self._finish()
        return result

    @_use_grad_for_differentiable
    def _step_while_compiling(self, closure: Callable[[], Any] | None) -> Any:
        if not options.is_plain(self.param_groups[0]):
            return self._step_uncompiled(closure)
        return super()._step_while_compiling(closure)

    @outside_autocast
    @_use_grad_for_differentiable
    def flush(self) -> int:
        self._due, self._counted = [], False
        self._rest.settle(self.state, self._nested)
        updated = super().flush()
        self._finish()
        return updated

    flush.__doc__ = NestedOptimizer.flush.__doc__

    def _repeat_step(self) -> bool:
        if self._nested or self.param_groups[0]["max_grad_norm"] is not None:
            return False
        dues = self._learning.repeat(self)
        if dues is None:
            return False
        for at, group in enumerate(self.param_groups):
            self._check_edits(group, f"{self._group_label(at, group)}: ")
        self._due, self._counted = dues, True
        return True

    def _run_meta_update_hooks(self) -> None:
        self._finish()  # hooks find the step complete
        super()._run_meta_update_hooks()

    def _gather(self, skip: Any = ()) -> tuple[Work, bool]:
        work, fresh = super()._gather(skip)
        limit = self.param_groups[0]["max_grad_norm"]
        grads = [grad for _, _, some in work for grad in some]
        if limit is None or not grads:
            return work, fresh
        factor = clip_factor(grads, limit)
        clipped = [
            (group, params, [(g * factor.to(g.device)).to(g.dtype) for g in some])
            for group, params, some in work
        ]
        return clipped, fresh

    def _on_gradients(self, group: dict[str, Any], params: list[Tensor]) -> None:
        self._counted |= bool(params)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        if self._nested:
            super()._update(group, params, grads)
            return
        for state in map(self.state.__getitem__, params):
            if not state["step"].is_cpu:  # NestedOptimizer's paths have counted so far
                state["step"] = state["step"].cpu()
        self._due.append(Due(group, params, grads))  # all groups together, in _finish

    def _finish(self) -> None:
        """Learn from the gradients that have come, then update with them.

        In this order, and over all groups at a time: an update and what is learned from it then
        belong to the same weights of the networks.
        """
        due, self._due = self._due, []
        counted, self._counted = self._counted, False
        first = self.param_groups[0]
        learns = first["meta_lr"] > 0 and self._traces(first)
        update_of_networks = learns and counted
        update_of_networks &= (first["global_step"] + 1) % first["meta_update_freq"] == 0
        asked = all(options.wants_kernels(group) for group, _, _ in due)
        asked = asked and bool(due) and kernels.available(first["params"][0].device)
        plan = self._learning.find(self, due) if asked else None
        looks_back = learns and long_run.is_on(first)
        look = long_run.look(self.state, due) if looks_back else None
        if plan is not None:
            plan.begin(self, due)
            if update_of_networks:
                plan.learn_alone(first, look)
        elif learns and due:
            grads, length = simple.hypergradients(first, self.state, due, self._slow_keys(first))
            learned.gather(first, grads, length if first["meta_rule"] == "cosine" else None)
            if look is not None:
                long_run.learn(first, self.state, due, look)
        if counted:
            first["global_step"] += 1
        if update_of_networks:
            self._update_networks(first)
        if plan is not None:
            # Weights do not change between, so what this gradient teaches may be gathered late.
            late = learns and not update_of_networks
            self._inputs.update(plan.update(first, learn=late, look=look if late else None))
            self._learning.remember(self, due, plan)
        elif due:
            flats = learned.weights(first)
            for one in due:
                apply(self, one, flats)

    def _update_networks(self, first: dict[str, Any]) -> None:
        if long_run.is_on(first) and first["long_run"] is not None:
            long_run.join(first)
        self.controller_grad_norm = learned.meta_step(
            first, first["meta_update_freq"], first["meta_rule"]
        )
        self.last_meta_loss = None if self._loss is None else self._loss.clone()

    def _place(self, group: dict[str, Any]) -> tuple[int, float]:
        at = next(i for i, g in enumerate(self.param_groups) if g is group)
        return at, at / max(1, len(self.param_groups) - 1)
