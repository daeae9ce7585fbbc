"""What all optimizers of this package share: options, windows, steps, checkpoints, hooks.

A subclass declares its options in ``defaults``, checks them in
:meth:`LevelOptimizer._check_options`, creates its per-parameter tensors in
:meth:`LevelOptimizer._init_state` and applies its rule in :meth:`LevelOptimizer._update`. When that
rule runs is decided here.
"""

from __future__ import annotations

import abc
import difflib
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    _foreach_supported_types,
    _get_scalar_dtype,
    _use_grad_for_differentiable,
)
from torch.utils.hooks import RemovableHandle

from . import checkpoint, kernels, windows
from .fused import FusedSteps, Work, serves
from .group_options import check_betas, check_real
from .levels import check_frequency, check_window
from .memory_argument import MemoryT, attach_memory
from .memory_levels import MEMORY_OPTIONS
from .step_hooks import export_groups, hooked_when_needed, outside_autocast
from .tensors import capturing, laid_out_like, resolve_dtype
from .weight_memory import WeightMemory, memory_of

#: what ``torch.optim`` optimizers accept
ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

#: dtypes in which additions are lost
NARROW = (torch.bfloat16, torch.float16)

#: Options of any optimizer that are numbers or tensors.
_NUMBERS = {"lr", "weight_decay", "eps", "momentum"}

_EXTRA_GROUP_KEYS = frozenset(
    {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr", "lr_scale"}
) | set(MEMORY_OPTIONS)


class LevelOptimizer(Optimizer, abc.ABC):
    """Base of the optimizers whose parameter groups update at their own frequency.

    Per parameter, ``state`` holds ``step`` (updates applied, as in ``torch.optim``),
    ``window_count`` (gradients in the running window), ``window_sum`` (their sum, in at least
    float32; where a window of more than one gradient has been open) and what the subclass adds. All
    are tensors; nothing that a checkpoint must carry lives elsewhere but in ``param_groups``.

    Args:
        params: parameters, groups, or ``(name, parameter)`` pairs, as ``torch.optim`` takes them.
        defaults: every option with its default value, ``frequency`` and ``window`` among them.
        param_groups: the same as ``params``, by keyword.
        memory: of the weights, attached from the start: a preset of :class:`WeightMemory`, its
            frequencies, or a dict of its arguments.
    """

    #: State tensors of the parameter's shape that are kept in ``state_dtype``.
    _moment_keys: tuple[str, ...] = ()
    #: State tensors of the parameter's shape that are kept as wide as windows.
    _wide_keys: tuple[str, ...] = ("window_sum",)
    #: State that counts: numbers in float32, beside the parameter where a host must not look.
    _counter_keys: tuple[str, ...] = ("step", "window_count")
    #: Entries of ``param_groups[0]`` that training changes: the flat tensors of a learned module
    #: and its counter. In ``defaults`` they are None or 0; a class checks and moves loaded ones in
    #: ``_check_options``.
    _learned_keys: tuple[str, ...] = ()
    #: Whether the level-AdamW kernels are this class's rule.
    _has_kernels = False

    def __init__(
        self,
        params: ParamsT | None,
        defaults: dict[str, Any],
        *,
        param_groups: ParamsT | None = None,
        memory: MemoryT = None,
    ) -> None:
        if (params is None) == (param_groups is None):
            given = "neither" if params is None else "both"
            raise TypeError(
                f"{type(self).__name__} takes its parameters as `params` or as `param_groups=`, "
                f"but got {given}"
            )
        given_params: Any = params if params is not None else param_groups
        defaults = {**defaults, "meta_step": 0}
        self._meta_update_hooks: OrderedDict[int, tuple[Callable[..., Any], int]] = OrderedDict()
        self._fused: FusedSteps | None = None
        super().__init__(given_params, {**defaults, **self._check_options(defaults, "")})
        self.register_state_dict_post_hook(export_groups)
        if memory is not None:
            attach_memory(self, memory)

    @property
    def weight_memory(self) -> WeightMemory | None:
        """The :class:`WeightMemory` of this optimizer, if it has one. Copies have none."""
        return memory_of(self)

    # ------------------------------------------------------------------ what a subclass provides

    def _check_options(self, options: dict[str, Any], where: str) -> dict[str, Any]:
        """Validate a group's options; return those that need a canonical form.

        Called before anything changes, with ``where`` naming the group ("" for the constructor's
        defaults). A subclass extends it.
        """
        for key in _NUMBERS & options.keys():
            check_real(options[key], key, where)
        check_betas(options.get("betas", ()), where)
        lr, weight_decay = options["lr"], options["weight_decay"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"{where}Tensor lr must be 1-element")
            if options["foreach"] and not options["capturable"]:
                raise ValueError(
                    f"{where}lr as a Tensor is not supported for capturable=False and foreach=True"
                )
        if not 0.0 <= lr:
            raise ValueError(f"{where}Invalid learning rate: {lr}")
        if not 0.0 <= weight_decay:
            raise ValueError(f"{where}Invalid weight_decay value: {weight_decay}")
        if options["fused"]:
            if options["differentiable"]:
                raise RuntimeError(f"{where}`fused` does not support `differentiable`")
            if options["foreach"]:
                raise RuntimeError(f"{where}`fused` and `foreach` cannot be `True` together.")
        elif options["foreach"] and options["differentiable"]:
            raise RuntimeError(f"{where}`foreach` does not support `differentiable`")
        return {
            "frequency": check_frequency(options["frequency"], where),
            "window": check_window(options["window"], where),
        }

    def _check_edits(self, group: dict[str, Any], where: str) -> None:
        """Raise for options edited in ``param_groups`` to what a step cannot do; before each step.

        A subclass extends it.
        """
        if type(group["frequency"]) is not int or group["frequency"] < 1:
            check_frequency(group["frequency"], where)
        check_window(group["window"], where)

    def _check_parameter(self, param: Tensor, group: dict[str, Any], where: str) -> None:
        """Raise if the rule cannot serve this parameter; ``where`` names it."""
        if group["fused"] and not param.is_floating_point():
            raise RuntimeError(
                f"`fused=True` requires all the params to be floating point Tensors, but {where} "
                f"is {param.dtype}; leave `fused` at None for its group"
            )

    @abc.abstractmethod
    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Create the tensors that ``state`` lacks, other than the counters and the window."""

    @abc.abstractmethod
    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Apply the rule once to each parameter, whose state is complete.

        ``grads`` are what the windows came to: gradients of the parameters' shape, in the
        parameter's dtype or a wider one, not to be written to.
        """

    def _on_gradients(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """A gradient of each of these is about to enter its window.

        For a subclass to note what came with it. Not called where the fused kernels run.
        """

    def _repeat_step(self) -> bool:
        """Make the whole step as the last one was made, if that is still right; whether it was.

        For a subclass that finds out sooner than by going through all parameters.
        """
        return False

    def _remember_step(self, work: Work) -> None:
        """What groups, parameters and gradients the step had that has just been made."""

    def _state_dtype(self, param: Tensor, group: dict[str, Any]) -> torch.dtype:
        """The dtype of a parameter's moments: its own, or the group's ``state_dtype``."""
        name = group.get("state_dtype")
        if name is None:
            return param.dtype
        dtype = resolve_dtype(name)
        return dtype.to_complex() if param.is_complex() else dtype

    def _window_dtype(self, param: Tensor, group: dict[str, Any]) -> torch.dtype:
        wide = torch.promote_types(param.dtype, torch.float32)
        return torch.promote_types(wide, self._state_dtype(param, group))

    def _uses_foreach(self, group: dict[str, Any], params: Sequence[Tensor]) -> bool:
        """Whether the group runs on ``torch._foreach_*``: the default wherever these are exact."""
        if group["foreach"] is not None:
            return bool(group["foreach"])
        if group["differentiable"] or (isinstance(group["lr"], Tensor) and not group["capturable"]):
            return False
        # On a CPU, _foreach_mul_ rounds its factor to the tensors' dtype: 0.999 becomes 1.
        return all(
            type(p) in _foreach_supported_types and not (p.is_cpu and p.dtype in NARROW)
            for p in params
        )

    # ------------------------------------------------------------------ groups

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options it lacks take the defaults. The caller's dict stays as it is.

        Raises:
            ValueError: an option's value or name is wrong, or a parameter is in another group; the
                optimizer is as before.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            param_group = self._import_group(dict(param_group))
            if isinstance(param_group["params"], Tensor):
                param_group["params"] = [param_group["params"]]
            elif not isinstance(param_group["params"], set):
                param_group["params"] = list(param_group["params"])
            where = f"{self._group_label(len(self.param_groups), param_group)}: "
            self._check_group_keys(param_group, where)
            canonical = self._check_options({**self.defaults, **param_group}, where)
            param_group.update((k, v) for k, v in canonical.items() if k in param_group)
            self._check_other_groups(param_group, where)
        super().add_param_group(param_group)

    def _check_group_keys(self, group: dict[str, Any], where: str) -> None:
        known = self.defaults.keys() | _EXTRA_GROUP_KEYS
        for key in group.keys() - known:
            close = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.8)
            if close:
                raise ValueError(f"{where}unknown option {key!r}; did you mean {close[0]!r}?")

    def _check_other_groups(self, group: dict[str, Any], where: str) -> None:
        owners = {p: i for i, other in enumerate(self.param_groups) for p in other["params"]}
        for entry in group["params"]:
            name, param = entry if isinstance(entry, tuple) else (None, entry)
            if isinstance(param, Tensor) and param in owners:
                label = repr(name) if name else f"one of shape {tuple(param.shape)}"
                raise ValueError(
                    f"{where}some parameters appear in more than one parameter group: {label} is "
                    f"already in group {owners[param]}; list each parameter once"
                )

    def _import_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """Rename the keys under which ``torch.optim`` knows an option of this class."""
        return group

    def _export_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """The inverse, for checkpoints that ``torch.optim`` is to read; not in place."""
        return group

    @staticmethod
    def _group_label(index: int, group: dict[str, Any]) -> str:
        name = group.get("name")
        return f"param group {index}" + (f" ({name!r})" if name is not None else "")

    def _param_label(self, group: dict[str, Any], index: int) -> str:
        names = group.get("param_names")
        at = next((i for i, g in enumerate(self.param_groups) if g is group), 0)
        label = self._group_label(at, group)
        if names and index < len(names):
            return f"parameter {names[index]!r} of {label}"
        return f"parameter {index} of {label}, of shape {tuple(group['params'][index].shape)}"

    # ------------------------------------------------------------------ step

    @hooked_when_needed
    @outside_autocast
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Put the current gradients in their windows and update every parameter whose window
        closes.

        A parameter whose ``grad`` is None is passed over and keeps its phase. Gradients are read,
        never written, and may be cleared after each step. Nothing but the closure sees autocast.

        Args:
            closure: re-evaluates the model and returns the loss (optional); called once, with
                gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient or a parameter that the rule cannot serve. Nothing has changed.
        """
        if torch.compiler.is_compiling():
            return self._step_while_compiling(closure)
        # As torch's decorator does, in less time.
        grad_mode = torch.is_grad_enabled()
        torch._C._set_grad_enabled(self.defaults["differentiable"])
        try:
            return self._step(closure, self._fused_steps())
        finally:
            torch._C._set_grad_enabled(grad_mode)

    @_use_grad_for_differentiable
    def _step_while_compiling(self, closure: Callable[[], Any] | None) -> Any:
        if self._may_fuse():
            return self._step_uncompiled(closure)
        return self._step(closure, None)

    @torch._disable_dynamo
    def _step_uncompiled(self, closure: Callable[[], Any] | None) -> Any:
        # The kernels are as fast as what a compiler would make of the rule, and know all phases.
        return self._step(closure, self._fused_steps())

    def _step(self, closure: Callable[[], Any] | None, fused: FusedSteps | None) -> Any:
        captured = self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        scaling = self._amp_scaling()
        if not captured and self._repeat_step():
            if self._meta_update_hooks:
                self._run_meta_update_hooks()
            return loss
        ready = fused is not None and fused.ready(self)
        work: Work = []
        fresh = False
        if fused is None or not ready:
            work, fresh = self._gather()
        elif fused.partial:
            work, fresh = self._gather(fused.served)
        probes = checkpoint.find_state_probes(self.state, work) if fresh else set()
        real = not probes or any(p not in probes for _, params, _ in work for p in params)
        if fused is not None and not ready:
            work = fused.build(self, work, probes)
            fused.find_grads()
        if fused is not None:
            if captured:
                fused.check_capture()
            fused.launch(captured, **scaling)
        for group, params, grads in work:
            windows.advance(self, group, params, grads, probes)
        self._remember_step(work)
        if self._meta_update_hooks and real:
            self._run_meta_update_hooks()
        return loss

    @outside_autocast
    @_use_grad_for_differentiable
    def flush(self) -> int:
        """Apply every partly filled window now, as if it were complete, and open new ones.

        A mean divides by the gradients that the window holds. Call it before the last evaluation,
        or before ``frequency`` no longer matters. On an accelerator with ``capturable=True`` this
        waits for the device.

        Returns:
            How many parameters were updated.
        """
        updated = 0
        fused = self._fused_steps()
        if fused is not None:
            if not fused.ready(self):
                fused.build(self, [], set())
            updated = fused.flush()
        for group in self.param_groups:
            pending = [p for p in group["params"] if self._pending(p)]
            if pending:
                self._update(group, pending, windows.close(self, group, pending))
                updated += len(pending)
        return updated

    def upload_options(self) -> None:
        """Bring the options in ``param_groups`` to where captured CUDA graphs read them.

        ``step()`` does so itself. A graph that holds a step reads learning rate, weight decay,
        betas, eps and frequency from device memory: after editing them between two replays, call
        this. Options that are tensors on the device are read by every replay as they are. Where no
        kernel has tables (on the CPU, or before the first step) there is nothing to bring.

        Raises:
            RuntimeError: a frequency was raised above 1 for parameters that have no window; step
                once and capture again.
        """
        fused = self._fused_steps()
        if fused is not None:
            fused.upload_options(self)

    def _check_capture(self) -> bool:
        """Whether this step is being captured; raises if it must not be."""
        captured = capturing()
        if captured or self._fused is None or self._fused.capturable:
            check = getattr(self, "_accelerator_graph_capture_health_check", None)
            (check or self._cuda_graph_capture_health_check)()
        if captured and self._meta_update_hooks:
            raise RuntimeError(
                "meta update hooks run on the host and cannot be captured in a CUDA graph: remove "
                "them, or call step() outside the capture"
            )
        return captured

    def _may_fuse(self) -> bool:
        """Whether this class has kernels, and there may be a device for them."""
        return self._has_kernels and (torch.cuda.is_initialized() or kernels.interpreted())

    def _fused_steps(self) -> FusedSteps | None:
        if not self._may_fuse():
            return None
        if self._fused is None:
            self._fused = FusedSteps()
        return self._fused

    def _gather(self, skip: Container[Tensor] = ()) -> tuple[Work, bool]:
        """The groups with the parameters that have a gradient, checked before anything changes.

        And whether some of them have no state yet.
        """
        work = []
        fresh = False
        state_of, strided = self.state.get, torch.strided
        for at, group in enumerate(self.param_groups):
            self._check_edits(group, f"{self._group_label(at, group)}: ")
            params, grads = [], []
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None or (skip and p in skip):
                    continue
                if grad.layout is not strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients, but "
                        f"{self._param_label(group, i)} has one ({grad.layout}); build its module "
                        "with sparse=False, or give that parameter torch.optim.SparseAdam"
                    )
                if not state_of(p):
                    fresh = True
                    self._check_parameter(p, group, self._param_label(group, i))
                params.append(p)
                # Tensor parallelism may leave a gradient's sum over the ranks to its user.
                plain = type(grad) is Tensor
                grads.append(grad if plain else laid_out_like(grad, p))
            work.append((group, params, grads))
        return work, fresh

    # ------------------------------------------------------------------ windows

    def _begin(
        self, param: Tensor, group: dict[str, Any], on_device: bool = False
    ) -> dict[str, Any]:
        """The parameter's state, created or completed.

        ``on_device``: its counters live beside it, as they also do with ``capturable=True``.
        """
        state: dict[str, Any] = self.state[param]
        on_device = on_device or group["capturable"]
        if "window_count" not in state:
            if "step" not in state:
                state["step"] = torch.zeros(
                    (),
                    dtype=_get_scalar_dtype(is_fused=on_device or self._counts_on_device(group)),
                    device=param.device if on_device or self._counts_on_device(group) else "cpu",
                )
            state["window_count"] = torch.zeros(
                (), dtype=torch.float32, device=param.device if on_device else "cpu"
            )
            self._init_state(param, group, state)
        elif not on_device and not state["window_count"].is_cpu:
            # They come from the kernels; read there, each would be a wait for the device.
            state["window_count"] = state["window_count"].cpu()
            if not self._counts_on_device(group):
                state["step"] = state["step"].cpu()
        if group["frequency"] > 1 and "window_sum" not in state:
            state["window_sum"] = torch.zeros_like(
                param, dtype=self._window_dtype(param, group), memory_format=torch.preserve_format
            )
        return state

    def _counts_on_device(self, group: dict[str, Any]) -> bool:
        """Whether ``fused`` keeps ``step`` beside the parameter, as torch's fused operators ask."""
        return bool(group["fused"])

    def _pending(self, param: Tensor) -> bool:
        state = self.state.get(param, {})
        return "window_sum" in state and bool(state["window_count"].item() > 0)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``step`` unscales and skips on the device, as ``torch.amp.GradScaler`` asks.

        The fused kernels do, if they serve every parameter. torch's do where there is no window.
        Otherwise the scaler unscales and skips itself, so that neither a window nor a hook sees a
        step that did not happen.
        """
        if self._meta_update_hooks:
            return False
        fused = self._fused_steps()
        if fused is not None and fused.serves_all(self):
            return True
        return all(
            g["fused"] and g["frequency"] == 1 and g.get("algorithm", "adamw") == "adamw"
            for g in self.param_groups
        ) and not any(self._pending(p) for g in self.param_groups for p in g["params"])

    def _amp_scaling(self) -> dict[str, Tensor]:
        """``grad_scale`` and ``found_inf`` as the scaler left them on the optimizer."""
        scaling: dict[str, Tensor] = {
            key: value
            for key in ("grad_scale", "found_inf")
            if (value := getattr(self, key, None)) is not None
        }
        if scaling and not self._step_supports_amp_scaling:
            raise RuntimeError(
                "grad_scale and found_inf are taken by fused kernels only; let "
                "torch.amp.GradScaler.step() unscale and skip for this optimizer"
            )
        return scaling

    # ------------------------------------------------------------------ hooks

    def register_meta_update_hook(
        self, hook: Callable[[LevelOptimizer], Any], every: int = 1
    ) -> RemovableHandle:
        """Run ``hook(optimizer)`` after every ``every``-th step, with gradients enabled.

        Steps are counted in ``param_groups[0]["meta_step"]`` while a hook is registered, so the
        count survives checkpoints; hooks themselves are, as torch's, not saved. A step that
        ``torch.amp.GradScaler`` skips does not count, nor one that only creates state. Hooks run on
        the host: a step inside a CUDA graph capture is refused while one is registered.

        Returns:
            A handle whose ``remove()`` unregisters the hook.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Invalid every: {every!r}. It is a number of steps, an integer >= 1")
        if not callable(hook):
            raise TypeError(f"a meta update hook is called as hook(optimizer), but got {hook!r}")
        handle = RemovableHandle(self._meta_update_hooks)
        self._meta_update_hooks[handle.id] = (hook, every)
        return handle

    def _run_meta_update_hooks(self) -> None:
        group = self.param_groups[0]
        group["meta_step"] += 1
        for hook, every in list(self._meta_update_hooks.values()):
            if group["meta_step"] % every == 0:
                with torch.enable_grad():
                    hook(self)

    # ------------------------------------------------------------------ checkpoints

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, or of the torch optimizer it replaces.

        Group options that the checkpoint lacks keep their present values; where both differ the
        checkpoint wins and one warning names them (``lr`` excepted, which schedulers move). Moments
        take ``state_dtype`` (or the parameter's dtype), windows theirs. As in torch, tensors that
        need no conversion are shared with ``state_dict``.

        Raises:
            ValueError: the checkpoint's groups, names or shapes are not this optimizer's. Nothing
                has changed.
        """
        state_dict = state_dict.copy()  # hooks may write to it
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        loaded = checkpoint.load(self, state_dict)
        self.__setstate__(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _state_shape(
        self, param: Tensor, group: dict[str, Any], key: str
    ) -> tuple[int, ...] | None:
        """The shape that this state tensor must have; None where any will do."""
        return tuple(param.shape) if key in (*self._moment_keys, *self._wide_keys) else None

    def _load_tensor(self, param: Tensor, group: dict[str, Any], key: str, value: Any) -> Any:
        """A state entry of a checkpoint as this optimizer keeps it."""
        if key in self._counter_keys:
            fused = key == "step" and self._counts_on_device(group)
            on_device = group["capturable"] or fused
            on_device = on_device or (self._has_kernels and serves(group, param))
            dtype = _get_scalar_dtype(is_fused=fused) if key == "step" else torch.float32
            value = torch.as_tensor(value, dtype=torch.float32 if on_device else dtype)
            return value.to(param.device if on_device else "cpu")
        if not isinstance(value, Tensor):
            return value
        value = laid_out_like(value, param)
        if key in self._wide_keys:
            return value.to(device=param.device, dtype=self._window_dtype(param, group))
        if key in self._moment_keys:
            return value.to(device=param.device, dtype=self._state_dtype(param, group))
        return value.to(device=param.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_meta_update_hooks", OrderedDict())
        self.__dict__.setdefault("_fused", None)
        if self._fused is not None:
            self._fused.forget()
        if export_groups not in self._optimizer_state_dict_post_hooks.values():  # unpickled
            self.register_state_dict_post_hook(export_groups)
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)
