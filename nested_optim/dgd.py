"""DGD: descent that also unlearns what a layer answers to the inputs it has just seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    _differentiable_doc,
    _foreach_doc,
    _maximize_doc,
    _use_grad_for_differentiable,
)

from . import dgd_options, inputs, kernels, rules
from .capture import Capture
from .descent import _multi_tensor_dgd, _single_tensor_dgd, subtracted_terms
from .fused import Work
from .inputs import Inputs
from .memory_argument import MemoryT
from .names import find_parameters
from .nested import NestedOptimizer, _is_narrow
from .optimizer import LevelOptimizer, ParamsT
from .pools import cast
from .tensors import is_dtensor

_PLAIN = {nn.Parameter}
_NO_STATE: dict[str, Any] = {}


class DGD(NestedOptimizer):
    def __init__(
        self,
        params: nn.Module | ParamsT | None = None,
        lr: float | Tensor = 1e-3,
        decay: float = 1.0,
        batch: str = "mean",
        base: str = "sgd",
        *,
        model: nn.Module | None = None,
        reduction: str = "mean",
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        frequency: int = 1,
        window: str = "mean",
        max_tokens: int = 1024,
        window_samples: int = 256,
        process_group: Any = None,
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
            "decay": decay,
            "batch": batch,
            "base": base,
            "reduction": reduction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "frequency": frequency,
            "window": window,
            "max_tokens": max_tokens,
            "window_samples": window_samples,
            "decoupled": decoupled,
            "state_dtype": state_dtype,
            "kahan_sum": kahan_sum,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise TypeError(
                    "DGD got two models: give the one that is trained as the first argument, or "
                    "parameters as the first argument and the model as `model=`"
                )
            model = params
            found = find_parameters(model, need_trainable=False)
            names = [name for name in found.names if name not in found.aliases]
            params = list(zip(names, model.parameters()))
        self._watch_nothing()
        if process_group is not None and model is None:
            raise ValueError("process_group= shares captured inputs: give the model they are from")
        if model is not None:
            self._capture = self._make_capture(model, process_group)
        # NestedOptimizer's constructor would only gather the same options under its own defaults.
        try:
            LevelOptimizer.__init__(
                self, params, defaults, param_groups=param_groups, memory=memory
            )
        except BaseException:
            self.remove_hooks()
            raise

    _has_kernels = False
    _capture: Capture | None

    def _watch_nothing(self) -> None:
        self._capture = None
        self._owners: dict[Tensor, dict[str, Any]] = {}
        self._owned: list[int] = []  # what the owners were made of; they keep it alive
        self._direct: dict[int, Inputs] = {}  # of this step's gradients, by their parameters' id()
        self._used: list[Inputs | None] = []  # by the update in progress

    # ------------------------------------------------------------------ options

    def _check_options(self, options: dict[str, Any], where: str) -> dict[str, Any]:
        canonical = super()._check_options(options, where)
        dgd_options.check(options, where)
        return canonical

    def _check_edits(self, group: dict[str, Any], where: str) -> None:
        super()._check_edits(group, where)
        dgd_options.check(group, where)

    def _check_other_groups(self, group: dict[str, Any], where: str) -> None:
        super()._check_other_groups(group, where)
        options = {**self.defaults, **group}
        if options["decay"] == 0:
            return
        if self._capture is None:
            raise ValueError(
                f"{where}decay={options['decay']} needs each layer's own input, and there is no "
                "model to take it from: pass the model, as DGD(model, lr=...) or "
                "DGD(groups, lr=..., model=model), or decay=0 for the plain base rule"
            )
        for entry in group["params"]:
            name, param = entry if isinstance(entry, tuple) else (None, entry)
            if isinstance(param, Tensor):
                label = repr(name) if name else f"one of shape {tuple(param.shape)}"
                self._check_servable(param, f"{where}parameter {label}", ValueError)

    def _check_servable(self, param: Tensor, label: str, error: type[Exception]) -> None:
        """Raise if a parameter with decay cannot be paired with the inputs of its layer."""
        capture = self._capture
        assert capture is not None
        if param not in capture.members:
            capture.survey()  # the model may have grown
        if is_dtensor(param) or hasattr(param, "ds_id"):
            raise error(
                f"{label} is sharded (FSDP, tensor parallelism or DeepSpeed ZeRO): each rank has "
                "a part of the weight and inputs of its own. Train it with decay=0, or use "
                "DistributedDataParallel"
            )
        if param not in capture.members:
            raise error(
                f"{label} is not a parameter of the model, so its inputs cannot be captured "
                "(DeepSpeed and FSDP replace parameters by flat ones): give it decay=0, or call "
                "attach(model) with the model that holds it"
            )
        if param.is_complex() and param in capture.layouts:
            raise error(f"{label} is complex, for which decay is not defined: give it decay=0")

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options it lacks take the defaults. The caller's dict stays as it is.

        Raises:
            ValueError: an option's value or name is wrong, a parameter is in another group, or one
                with decay is not the model's; the optimizer is as before.
        """
        super().add_param_group(param_group)
        self._own_parameters()

    def _import_group(self, group: dict[str, Any]) -> dict[str, Any]:
        group = super()._import_group(group)
        # torch.optim.SGD's options that are not ours.
        if group.get("momentum"):
            raise ValueError(
                "the checkpoint is torch.optim.SGD's with momentum, and DGD keeps none: load it "
                "into an optimizer with momentum"
            )
        dropped = ["momentum", "dampening", "nesterov"]
        params = group["params"]
        if isinstance(params, list) and params and isinstance(params[0], (int, str)):
            dropped += ["fused", "capturable"]  # of a checkpoint: how its steps were made
        for key in dropped:
            group.pop(key, None)
        return group

    # ------------------------------------------------------------------ the model's inputs

    def attach(self, model: nn.Module, process_group: Any = None) -> None:
        """Capture inputs in this model from now on, and in no other.

        For an optimizer that was copied or unpickled, whose copy watches no model, or whose
        parameters now belong to another module.

        Args:
            model: holds every parameter of the groups with decay.
            process_group: ranks whose gradients are averaged (default: those of the
                ``DistributedDataParallel`` around the model).

        Raises:
            ValueError: a parameter with decay is not the model's. Nothing has changed.
        """
        before, self._capture = self._capture, self._make_capture(model, process_group)
        try:
            for group in self.param_groups:
                if group["decay"] != 0:
                    for i, p in enumerate(group["params"]):
                        self._check_servable(p, self._param_label(group, i), ValueError)
        except BaseException:
            self._capture.remove()
            self._capture = before
            raise
        if before is not None:
            before.remove()
        self._own_parameters()

    def remove_hooks(self) -> None:
        """Take all hooks off the model and its parameters.

        Groups with decay then refuse to step until :meth:`attach`.
        """
        if self._capture is not None:
            self._capture.remove()
            self._capture = None
        self._direct.clear()

    def _make_capture(self, model: nn.Module, process_group: Any) -> Capture:
        if find_parameters(model, need_trainable=False).flattened:
            raise ValueError(
                "the model's parameters are flattened by FSDP, so no weight is its layer's matrix: "
                "use DistributedDataParallel, or decay=0 without a model"
            )
        return Capture(self, model, process_group)

    def _own_parameters(self) -> None:
        groups = self.param_groups
        # By identity: each step asks, and looking up every tensor takes longer.
        owned = [n for g in groups for n in (id(g), *map(id, g["params"]))]
        if owned != self._owned:
            self._owned = owned
            self._owners = {p: group for group in groups for p in group["params"]}
            if self._capture is not None:
                self._capture.regroup()

    def _group_of(self, weight: Tensor) -> dict[str, Any] | None:
        return self._owners.get(weight)

    def _sample_plan(self, weight: Tensor, group: Any) -> tuple[int, int, int]:
        # What seeds the choice is state, so a run that was resumed makes the same choices.
        state = self.state.get(weight, _NO_STATE)
        step = state["step"].item() if "step" in state else 0
        # Without a window its count is 0, and one read less at every layer.
        waiting = int(state["window_count"]) if "window_sum" in state else 0
        windowed = group["frequency"] > 1 or waiting > 0
        size = group["window_samples" if windowed else "max_tokens"]
        if type(size) is not int or size < 1:  # edited, and no step has refused it yet
            dgd_options.check_sizes(group, f"{self._label_of(group, weight)}: ")
        return size, int(step), waiting

    def _is_windowed(self, param: Tensor, group: dict[str, Any]) -> bool:
        return group["frequency"] > 1 or self._pending(param)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the inputs that came with them."""
        super().zero_grad(set_to_none)
        if self._capture is not None:
            self._capture.clear()

    # ------------------------------------------------------------------ step

    @_use_grad_for_differentiable
    def _step_while_compiling(self, closure: Any) -> Any:
        return self._step_uncompiled(closure)  # hooks have put the inputs where no trace sees them

    def _step(self, closure: Any, fused: Any) -> Any:
        try:
            loss = super()._step(closure, fused)
        finally:
            self._direct.clear()
        if self._capture is not None:
            self._capture.clear()
        return loss

    def _gather(self, skip: Any = ()) -> tuple[Work, bool]:
        work, fresh = super()._gather(skip)
        self._own_parameters()
        for group, params, _ in work:
            if group["base"] == "adamw":
                self._check_moments(group, params)
            if group["decay"] != 0 and not _is_zero(group["lr"]):
                self._check_inputs(group, params)
        return work, fresh

    def _check_moments(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            state = self.state.get(p)
            if state and "exp_avg" not in state:
                raise RuntimeError(
                    f"{self._label_of(group, p)} has been trained with base='sgd' and has no "
                    "moments for base='adamw': build a new optimizer"
                )

    def _check_inputs(self, group: dict[str, Any], params: list[Tensor]) -> None:
        capture = self._capture
        if params and capture is None:
            raise RuntimeError(
                f"{self._label_of(group, params[0])} has decay={group['decay']}, but this "
                "optimizer watches no model (it is a copy, or its hooks were removed): call "
                "attach(model), or set decay=0"
            )
        if capture is None:
            return
        if not capture.member_ids.issuperset(map(id, params)) or set(map(type, params)) != _PLAIN:
            for p in params:
                if p not in capture.members or is_dtensor(p):
                    self._check_servable(p, self._label_of(group, p), RuntimeError)
        # A layer's inputs may all have been another rank's.
        if capture.ranks() > 1 and capture.any_arrived():
            return
        for p in params:
            if id(p) in capture.layout_of and not capture.arrived(p):
                raise RuntimeError(
                    f"no input was captured for {self._label_of(group, p)}, although it has a "
                    "gradient. Was its layer in eval mode, its weight used without calling the "
                    "layer, the gradient assigned by hand, the decay raised from 0 after the "
                    "backward pass, or the model compiled or wrapped in DataParallel before this "
                    "optimizer was made? Correct that, or give the parameter decay=0"
                )

    def _label_of(self, group: dict[str, Any], param: Tensor) -> str:
        return self._param_label(
            group, next(i for i, p in enumerate(group["params"]) if p is param)
        )

    def _begin(
        self, param: Tensor, group: dict[str, Any], on_device: bool = False
    ) -> dict[str, Any]:
        state = super()._begin(param, group, on_device)
        capture = self._capture
        if group["decay"] == 0 or capture is None or param not in capture.layouts:
            return state
        if not self._is_windowed(param, group):
            return state
        features, dtype = capture.layouts[param].features(param), self._state_dtype(param, group)
        inputs.open_window(state, param, features, group["window_samples"], dtype)
        return state

    def _on_gradients(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Take the inputs that came with these gradients to their windows, or for this update."""
        capture = self._capture
        if capture is None or group["decay"] == 0:
            return
        direct: list[Tensor] = []
        windowed: list[Tensor] = []
        for p in params:
            if id(p) in capture.layout_of:
                (windowed if self._is_windowed(p, group) else direct).append(p)
        if direct:
            self._direct.update(inputs.of_one_gradient(capture, direct, group, self._state_dtype))
        if windowed:
            dtypes = [self._state_dtype(p, group) for p in windowed]
            taken = inputs.take(capture, windowed, dtypes, group["window_samples"], True)
            for p, sample in zip(windowed, taken):
                inputs.add_to_window(self._begin(p, group), sample)

    def _inputs_of_window(self, param: Tensor, group: dict[str, Any]) -> Inputs | None:
        window = inputs.read_window(self.state[param])
        if window is None or group["decay"] == 0 or self._capture is None:
            return None
        return inputs.for_update(self._capture, param, group, *window)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        states = list(map(self.state.__getitem__, params))
        given = [self._direct.pop(id(p), None) for p in params]
        windowed = [i for i, state in enumerate(states) if "samples" in state]
        for i in windowed:
            if given[i] is None:
                given[i] = self._inputs_of_window(params[i], group)
        if group["base"] == "adamw":
            cast(filter(None, given))
            self._used = given
            try:
                super()._update(group, params, grads)
            finally:
                self._used = []
        else:
            self._descend(group, params, grads, given, states)
        for i in windowed:
            inputs.empty_window(states[i])

    def _run(
        self,
        group: dict[str, Any],
        kept: list[list[Tensor]],
        grads: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        foreach = self._uses_foreach(group, kept[0])
        terms = subtracted_terms(kept[0], self._used, group, foreach) if self._used else []
        super()._run(group, kept, grads, steps)
        if terms:
            torch._foreach_sub_(*map(list, zip(*terms)))

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if group["base"] == "adamw":
            super()._init_state(param, group, state)
        elif group["kahan_sum"] and _is_narrow(param) and "kahan_comp" not in state:
            state["kahan_comp"] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def _descend(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        given: list[Inputs | None],
        states: list[dict[str, Any]],
    ) -> None:
        """The update of ``base="sgd"``, in the wider of the parameter's dtype and its state's."""
        work, comps = list(params), []
        if group["state_dtype"] is not None or group["kahan_sum"]:
            for i, (p, state) in enumerate(zip(params, states)):
                self._init_state(p, group, state)  # kahan_sum may have been switched on in mid-run
                dtype = torch.promote_types(p.dtype, self._state_dtype(p, group))
                comp = state.get("kahan_comp") if group["kahan_sum"] else None
                if comp is None:
                    work[i] = p.to(dtype)
                else:
                    dtype = torch.promote_types(dtype, torch.float32)
                    work[i] = rules.kahan_join(p, comp, dtype)
                comps.append(comp)
        steps = [state["step"] for state in states]
        grads = [g if g.dtype is p.dtype else g.to(p.dtype) for g, p in zip(grads, work)]
        if self._uses_foreach(group, work):
            _multi_tensor_dgd(work, grads, given, steps, group, self._kernels_of(group, work))
        else:
            _single_tensor_dgd(work, grads, given, steps, group)
        for p, new, comp in zip(params, work, comps):
            if comp is not None:
                comp.copy_(rules.kahan_split(new, comp.dtype)[1])
            if new is not p:
                p.copy_(new)

    _descent: Any = None

    def _kernels_of(self, group: dict[str, Any], params: list[Tensor]) -> Any:
        """What moves batches of weights in a few launches; None where torch's operations do."""
        if group["foreach"] is not None or not params or not kernels.available(params[0].device):
            return None
        if self._descent is None:
            from .descent_fused import FusedDescent  # Triton is there

            self._descent = FusedDescent()
        return self._descent

    # ------------------------------------------------------------------ checkpoints and copies

    def _load_tensor(self, param: Tensor, group: dict[str, Any], key: str, value: Any) -> Any:
        if key == "samples":
            return value.to(device=param.device, dtype=self._state_dtype(param, group))
        return super()._load_tensor(param, group, key, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_capture" not in self.__dict__:  # unpickled, or a copy: it watches no model
            self._watch_nothing()
        super().__setstate__(state)
        self._own_parameters()
        if self._capture is not None:
            self._capture.clear()


def _is_zero(lr: float | Tensor) -> bool:
    """Whether nothing can move; a tensor on a device is not waited for."""
    if isinstance(lr, Tensor):
        return lr.is_cpu and float(lr.detach()) == 0
    return lr == 0


DGD.__doc__ = rf"""Delta Gradient Descent: descent that also unlearns layers' answers to inputs.

    Plain descent on a layer :math:`y = W x` minimises :math:`\langle W x, g \rangle + |W - W_t|^2 /
    2\eta`, with :math:`g` the loss's gradient at the layer's output. Replacing the dot product by a
    regression of :math:`W x` on :math:`-g` (arXiv 2512.24695, Eq. 56) adds :math:`|W x|^2 / 2`;
    here it has a weight :math:`\lambda`, ``decay``. For one input the minimum is

    .. math::
        W \leftarrow W\,(I - \lambda e\, x x^\top) - e\, g x^\top, \qquad
        e = \frac{{\eta}}{{1 + \lambda \eta |x|^2}}

    and for a batch, with the gradient :math:`G` and :math:`S` the mean of :math:`x x^\top` over all
    inputs since the last step,

    .. math::
        \text{{mean:}}\quad & W \leftarrow W - e\,(G + \lambda W S), \qquad
            e = \frac{{\eta}}{{1 + \lambda \eta \operatorname{{tr}} S}} \\
        \text{{exact:}}\quad & W \leftarrow (W - \eta G)(I + \lambda \eta S)^{{-1}}

    **What it converges to.** Not to a zero gradient: a fixed point has :math:`W x = -g / \lambda`
    on the inputs seen. It is a bias, towards layers that answer nothing, along the directions of
    the inputs and nowhere else; on a regression it ends at :math:`1 / (1 + \lambda)` of the target.
    The paper uses it within a self-modifying memory, where it helps (perplexity 12.24 with it,
    13.41 without), not as a general optimizer.

    **What of the paper is not here.** Eq. 57's :math:`\eta / (1 + \eta)` is the case :math:`\lambda
    = |x| = 1`. Appendix C changes a sign and drops a square on the way there.

    **Which parameters.** The weights of ``nn.Linear``, of Hugging Face's ``Conv1D`` and of
    ``nn.Conv1d`` to ``nn.Conv3d`` without groups, whose inputs are the patches that the kernel
    covers. Everything else (biases, norms, embeddings and weights tied to them, grouped and
    transposed convolutions, parametrized weights, what ``nn.MultiheadAttention`` owns) takes the
    plain base rule.

    **Which inputs.** Those whose gradient has reached ``grad`` since the last step, of layers in
    training mode: padding too, since its outputs are outputs. A layer that is called several times,
    a weight that two layers share, micro-batches, ranks of ``DistributedDataParallel``: each input
    counts once. Inputs wait between backward pass and step, and are dropped by
    ``optimizer.zero_grad()``, or with gradients that are None when the next ones come; gradients
    that ``model.zero_grad(set_to_none=False)`` only zeroes leave theirs behind. If ``grad`` is left
    to accumulate over several steps, a step knows the inputs since the last one only. Copies and
    pickles of the optimizer watch no model: :meth:`attach` one. A ``torch.compile`` that comes
    after this optimizer is made works, and splits its graph at each layer watched; one that had
    compiled the layers before is noticed at the step, by the inputs that are missing.

    **What is not seen.** Only a layer's call shows its input: of ``F.linear(x, layer.weight)``
    beside ``layer(x)`` the gradient is used and the input is not, and a subclass of a layer that
    multiplies something else than its argument (a scaled ``x``) is taken at its argument. Nested
    tensors are refused. Between a forward pass under non-reentrant checkpointing and its backward
    pass the hooks must stay: after ``model.eval()``, ``decay=0``, :meth:`remove_hooks` or the
    optimizer's end in between, the recomputation saves less than the pass did, for which torch
    raises a ``CheckpointError``.

    **Cost.** At most two products of ``(outputs, inputs, n)`` for n inputs, beside three of the
    whole batch in the layer's own forward and backward pass; fewer where forming :math:`S` is less
    work (it is formed there, and has at most twice as many elements as :math:`W`).
    ``batch="exact"`` solves a linear system besides. From forward to backward pass a layer's input
    is kept as autograd keeps it, which takes no memory of its own; but under autocast the layer
    keeps a cast copy, and the input itself (4 bytes per float32 number) waits beside it. Between
    backward pass and step up to ``max_tokens`` inputs of each layer are kept (within the backward
    pass twice as many), in their own dtype or the one that the layer multiplied (autocast's, where
    that is on), which the step takes (on several ranks and in windows the parameter's, or
    ``state_dtype``). Of more, a uniform sample: its :math:`S` is right on average, and noisy.

    Args:
        params (nn.Module or iterable): the model, all of whose parameters are trained; or
            parameters, ``(name, parameter)`` pairs or dicts of groups, with the model as
            ``model=``. Groups may set every option below but ``model`` and ``process_group``.
        lr (float or Tensor): learning rate (default: 1e-3).
        decay (float): the weight :math:`\lambda` of :math:`|W x|^2 / 2`. 1 is Eq. 56; 0 is the base
            rule, bit for bit, and needs no model (default: 1.0).
        batch (str): ``"mean"``, which needs no linear system, or ``"exact"``, the minimum itself,
            in at least float32. They agree to first order in ``lr`` (default: ``"mean"``).
        base (str): ``"sgd"``, as ``torch.optim.SGD`` without momentum; or ``"adamw"``: AdamW's
            step, and :math:`e \lambda W S` subtracted beside it, of the weights before that step.
            No problem is known of which the sum is the minimum, so ``batch="exact"`` is refused
            (default: ``"sgd"``).
        model (nn.Module): whose layers' inputs are captured; wrapped or not.
        reduction (str): how the loss adds up its samples. ``"mean"`` takes the mean of :math:`x
            x^\top`; ``"sum"`` its sum, as a loss that is a sum asks for (default: ``"mean"``).
            Losses of micro-batches are divided by their number, as ever.
        betas, eps, amsgrad, decoupled: AdamW's, of ``base="adamw"``, as in ``NestedOptimizer``.
            With ``base="sgd"`` amsgrad is refused and the others mean nothing.
        weight_decay (float): as in the base rule: an L2 penalty, or AdamW's (default: 0).
        frequency (int), window (str): as in ``NestedOptimizer``. A window keeps a uniform sample of
            its inputs in ``state``; with ``"sum"``, :math:`S` adds up as the gradients do.
        max_tokens (int): inputs kept of a layer for one step, over all ranks (default: 1024).
        window_samples (int): inputs kept of a layer in a group of ``frequency > 1``: state of
            ``window_samples x inputs`` numbers per weight (default: 256).
        process_group: ranks whose gradients are averaged before the step, which share their inputs
            (default: those of the ``DistributedDataParallel`` that the model is found in).
        state_dtype, kahan_sum: as in ``NestedOptimizer``.
        {_maximize_doc} The decay stays a decay.
        {_foreach_doc} Here foreach is also the default on CPU, where it gives the same bits. On
            CUDA it takes weights of one shape in batches; the default there, with Triton, is
            kernels around the products of these.
        {_differentiable_doc} Needs ``decay=0``.
        capturable, fused: refused if True: shapes in a CUDA graph are fixed, and there is no fused
            kernel.
        param_groups (iterable): the same as ``params``.
        memory (str, tuple or dict): a :class:`WeightMemory` from the start: a preset's name, its
            frequencies, or a dict of its arguments (default: None).

    Raises:
        ValueError: an option's value or name is invalid, or parameters with decay are given without
            the model that they are in, or sharded or flattened (FSDP, DeepSpeed).
        RuntimeError: at a step, for a weight with decay whose gradient came without any input.

    Example:
        >>> optimizer = DGD(model, lr=0.1)
        >>> optimizer = DGD(build_param_groups(model, rules), lr=1e-3, base="adamw", model=model)
    """
