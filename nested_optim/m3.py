"""M3: multi-scale momentum Muon for matrices, AdamW for everything else, in one optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import (
    _capturable_doc,
    _differentiable_doc,
    _foreach_doc,
    _maximize_doc,
    _use_grad_for_differentiable,
)

from . import kernels, rules
from .fused import FusedSteps
from .group_options import check_betas
from .levels import check_frequency
from .m3_fused import FusedMatrices, wanted
from .m3_steps import (
    _multi_tensor_m3,
    _single_tensor_m3,
    matrix_form,
    ns_dtype,
    reads_in_place,
)
from .memory_argument import MemoryT
from .nested import NestedOptimizer, _count, _is_narrow
from .optimizer import LevelOptimizer, ParamsT
from .tensors import resolve_dtype

ALGORITHMS = ("m3", "adamw")
MODES = ("ema", "paper")
SECOND_MOMENTS = ("row", "element")

# Options that change from step to step, and are right as long as they are not negative.
_SCHEDULED = ("lr", "weight_decay")

_M3_BETAS = (0.95, 0.95, 0.9)
_ADAMW_BETAS = (0.9, 0.999)
#: Of each mode. In "ema" the slow momentum earned nothing (docs/benchmarks.md, training compare).
_ALPHAS = {"ema": 0.0, "paper": 0.25}
#: Options of the default mode that Algorithm 1 has no place for, with what they are in paper mode.
_PAPER = {"second_moment": "element", "adjust_lr": None, "nesterov": False}


class M3(NestedOptimizer):
    def __init__(
        self,
        params: ParamsT | None = None,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | None = None,
        alpha: float | None = None,
        slow_frequency: int = 10,
        ns_steps: int = 5,
        ns_coefficients: str | Sequence[Any] = "quintic",
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        mode: str = "ema",
        *,
        algorithm: str = "m3",
        second_moment: str | None = None,
        adjust_lr: str | None = "match_rms_adamw",
        nesterov: bool = True,
        flatten: bool | None = None,
        out_dim: int = 0,
        split_sizes: Sequence[int] | None = None,
        num_heads: int | Sequence[int] | None = None,
        ns_dtype: torch.dtype | str | None = None,
        max_batch_bytes: int = 2**31,
        frequency: int = 1,
        window: str = "mean",
        amsgrad: bool = False,
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
        if mode == "paper":
            # What was left at the other mode's defaults; the rest is refused below.
            second_moment = second_moment or "element"
            adjust_lr = None if adjust_lr == "match_rms_adamw" else adjust_lr
            nesterov = False
        defaults = {
            "lr": lr,
            "betas": betas if betas is not None else _default_betas(algorithm, mode),
            "alpha": alpha if alpha is not None else _ALPHAS.get(mode, 0.0),
            "slow_frequency": slow_frequency,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "weight_decay": weight_decay,
            "mode": mode,
            "algorithm": algorithm,
            "second_moment": second_moment,
            "adjust_lr": adjust_lr,
            "nesterov": nesterov,
            "flatten": flatten,
            "out_dim": out_dim,
            "split_sizes": split_sizes,
            "num_heads": num_heads,
            "ns_dtype": ns_dtype,
            "max_batch_bytes": max_batch_bytes,
            "frequency": frequency,
            "window": window,
            "amsgrad": amsgrad,
            "decoupled": decoupled,
            "state_dtype": state_dtype,
            "kahan_sum": kahan_sum,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        LevelOptimizer.__init__(self, params, defaults, param_groups=param_groups, memory=memory)

    _matrices: FusedMatrices | None = None  # made by the first step that goes by the kernels
    #: Groups, and the options they had when these were checked.
    _checked: tuple[tuple[dict[str, Any], tuple[Any, ...]], ...] = ()

    _moment_keys = (*NestedOptimizer._moment_keys, "momentum_buffer")
    _wide_keys = (*NestedOptimizer._wide_keys, "slow_momentum_buffer")
    _counter_keys = (*NestedOptimizer._counter_keys, "slow_count")

    # ------------------------------------------------------------------ options

    def _check_options(self, options: dict[str, Any], where: str) -> dict[str, Any]:
        algorithm = options["algorithm"]
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"{where}Invalid algorithm: {algorithm!r}. Choose one of {', '.join(ALGORITHMS)}"
            )
        if algorithm == "adamw":
            return super()._check_options(options, where)
        canonical = super()._check_options({**options, "betas": (0.0, 0.0)}, where)
        paper = _check_choice(options, "mode", MODES, where) == "paper"
        canonical["betas"] = _check_betas(options["betas"], paper, where)
        alpha = options["alpha"]
        if not isinstance(alpha, (int, float)) or not 0.0 <= alpha < math.inf:
            raise ValueError(f"{where}Invalid alpha value: {alpha}")
        frequency = check_frequency(options["slow_frequency"], f"{where}slow_frequency: ")
        canonical["slow_frequency"] = frequency
        steps = options["ns_steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps < 100:
            raise ValueError(f"{where}Invalid ns_steps: {steps!r}. Give an integer from 1 to 99")
        if steps == 0 and not paper:
            raise ValueError(
                f"{where}Invalid ns_steps: 0. Without Newton-Schulz steps nothing is "
                "orthogonalised; only mode='paper' defines that"
            )
        try:
            rules.ns_schedule(options["ns_coefficients"], max(1, steps))
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        canonical["ns_coefficients"] = _plain(options["ns_coefficients"])
        _check_choice(options, "second_moment", (None, *SECOND_MOMENTS), where)
        _check_choice(options, "adjust_lr", (None, *rules.ADJUST_LR), where)
        if paper:
            for key, needed in _PAPER.items():
                if options[key] != needed:
                    raise ValueError(
                        f"{where}{key}={options[key]!r} has no place in mode='paper', which is "
                        f"Algorithm 1 to the letter: leave it out (it is {needed!r} there)"
                    )
        _check_choice(options, "out_dim", (0, 1), where)
        if options["flatten"] not in (None, True, False):
            raise ValueError(f"{where}Invalid flatten: {options['flatten']!r}. True, False or None")
        for key in ("split_sizes", "num_heads"):
            canonical[key] = _check_sizes(options[key], key, where)
        if options["ns_dtype"] is not None:
            try:
                dtype = resolve_dtype(options["ns_dtype"])
            except ValueError as error:
                raise ValueError(where + str(error).replace("state_dtype", "ns_dtype")) from None
            canonical["ns_dtype"] = str(dtype).removeprefix("torch.")
        room = options["max_batch_bytes"]
        if isinstance(room, bool) or not isinstance(room, int) or room < 1:
            raise ValueError(f"{where}Invalid max_batch_bytes: {room!r}. Give an integer >= 1")
        for key, wrong, why in (
            ("amsgrad", True, "is AdamW's: set it on groups with algorithm='adamw'"),
            ("decoupled", False, "would orthogonalise the weight decay away: leave it at True"),
        ):
            if options[key] is wrong:
                raise ValueError(f"{where}{key}={wrong} {why}")
        if paper and (options["foreach"] or options["capturable"] or options["fused"]):
            raise ValueError(
                f"{where}mode='paper' runs tensor by tensor, its chunks counted on the host: leave "
                "foreach, capturable and fused off"
            )
        return canonical

    def _check_edits(self, group: dict[str, Any], where: str) -> None:
        if group["algorithm"] == "adamw":
            if len(group["betas"]) != 2:
                raise RuntimeError(f"{where}algorithm='adamw' needs betas of two numbers")
            super()._check_edits(group, where)
            return
        values = tuple(group.get(key) for key in self.defaults)
        for known, checked in self._checked:
            if known is group and all(
                new is old or (key in _SCHEDULED and type(new) is float and new >= 0)
                for key, new, old in zip(self.defaults, values, checked)
            ):
                return
        super()._check_edits({**group, "betas": ()}, where)
        self._check_options(group, where)
        # The very objects that were checked need no second look, unless they can be edited.
        others = [g for g in self.param_groups if g is not group]
        kept = tuple(entry for entry in self._checked if any(entry[0] is g for g in others))
        self._checked = (*kept, (group, values)) if all(map(_is_fixed, values)) else kept

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            algorithm = param_group.get("algorithm", self.defaults["algorithm"])
            mode = param_group.get("mode", self.defaults["mode"])
            if (algorithm, mode) != (self.defaults["algorithm"], self.defaults["mode"]):
                param_group.setdefault("betas", _default_betas(algorithm, mode))
                paper = mode == "paper"
                for key, value in (_PAPER if paper else {}).items():
                    param_group.setdefault(key, value)
                own = self.defaults["mode"]
                if self.defaults["alpha"] == _ALPHAS[own]:  # not chosen: each mode its default
                    param_group.setdefault("alpha", _ALPHAS.get(mode, 0.0))
        super().add_param_group(param_group)

    def _check_other_groups(self, group: dict[str, Any], where: str) -> None:
        super()._check_other_groups(group, where)
        merged = {**self.defaults, **group}
        for i, entry in enumerate(group["params"]):
            name, param = entry if isinstance(entry, tuple) else (None, entry)
            if isinstance(param, Tensor) and not is_lazy(param):
                label = f"parameter {name!r}" if name else f"parameter {i}"
                _check_matrix(merged, param, f"{where}{label} of shape {tuple(param.shape)} ")

    def _check_parameter(self, param: Tensor, group: dict[str, Any], where: str) -> None:
        super()._check_parameter(param, group, where)
        _check_matrix(group, param, f"{where} ")
        if group["algorithm"] == "m3" and group["fused"] and not kernels.available(param.device):
            raise RuntimeError(
                f"`fused=True` for matrices needs Triton and a CUDA device, but {where} is on "
                f"{param.device}; leave `fused` at None, or set it on groups of algorithm='adamw'"
            )

    def _import_group(self, group: dict[str, Any]) -> dict[str, Any]:
        group = super()._import_group(group)
        if "adjust_lr_fn" in group and "momentum" in group:  # torch.optim.Muon's
            group["betas"] = (group.pop("momentum"), *_default_betas("m3", "ema")[1:])
            group["adjust_lr"] = group.pop("adjust_lr_fn") or "original"
        return group

    def _uses_foreach(self, group: dict[str, Any], params: Any) -> bool:
        if group["algorithm"] == "m3" and group["mode"] == "paper":
            return False
        return super()._uses_foreach(group, params)

    def _fused_steps(self) -> FusedSteps | None:
        # For AdamW's kernels there is nothing in groups of matrices.
        if all(group["algorithm"] == "m3" for group in self.param_groups):
            return None
        return super()._fused_steps()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._checked = ()
        if self._matrices is not None:
            self._matrices.forget()

    @_use_grad_for_differentiable
    def _step_while_compiling(self, closure: Any) -> Any:
        return self._step_uncompiled(closure)

    # ------------------------------------------------------------------ state

    def _state_shape(
        self, param: Tensor, group: dict[str, Any], key: str
    ) -> tuple[int, ...] | None:
        if key == "slow_update":
            return tuple(param.shape)
        if key == "second_moment":
            by_row = group["second_moment"] == "row"
            return matrix_form(group).row_shape(param.shape) if by_row else tuple(param.shape)
        return super()._state_shape(param, group, key)

    def _load_tensor(self, param: Tensor, group: dict[str, Any], key: str, value: Any) -> Any:
        if key == "second_moment" and group["second_moment"] == "row":
            return value.to(device=param.device, dtype=self._window_dtype(param, group))
        value = super()._load_tensor(param, group, key, value)
        if key == "slow_update":
            return value.to(dtype=ns_dtype(param, group))
        if key == "second_moment":
            return value.to(dtype=self._window_dtype(param, group))
        return value

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if group["algorithm"] == "adamw":
            super()._init_state(param, group, state)
            return

        def zeros(key: str, dtype: torch.dtype) -> None:
            if key not in state:
                state[key] = torch.zeros_like(
                    param, dtype=dtype, memory_format=torch.preserve_format
                )

        wide = self._window_dtype(param, group)
        zeros("momentum_buffer", self._state_dtype(param, group))
        if group["alpha"] or group["mode"] == "paper":
            zeros("slow_momentum_buffer", wide)
            zeros("slow_update", ns_dtype(param, group))
            if "slow_count" not in state:
                device = param.device if group["capturable"] else "cpu"
                state["slow_count"] = torch.zeros((), dtype=torch.float32, device=device)
        if group["second_moment"] == "element":
            zeros("second_moment", wide)
        elif group["second_moment"] == "row" and "second_moment" not in state:
            shape = matrix_form(group).row_shape(param.shape)
            state["second_moment"] = torch.zeros(shape, dtype=wide, device=param.device)
        if group["kahan_sum"] and _is_narrow(param):
            zeros("kahan_comp", param.dtype)

    # ------------------------------------------------------------------ update

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        if group["algorithm"] == "adamw":
            super()._update(group, params, grads)
            return
        states = list(map(self.state.__getitem__, params))
        if not wanted(group) or not kernels.available(params[0].device):
            self._complete(group, params, states)
            _count([state["step"] for state in states])
            self._run_on_torch(group, params, grads, states)
            return
        if self._matrices is None:
            self._matrices = FusedMatrices()
        plan = self._matrices.find(group, params, states, grads)
        if plan is None:
            self._complete(group, params, states)
            plan = self._matrices.make(group, params, states, grads)
        _count(plan.steps)
        self._matrices.run(plan, group, grads)
        if left := plan.left:
            lists: Any = ([its[i] for i in left] for its in (params, grads, states))
            self._run_on_torch(group, *lists)

    def _complete(
        self, group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        """Give each state what it lacks, with counters where the group's options want them."""
        needed = {"momentum_buffer"}
        if group["alpha"] or group["mode"] == "paper":
            needed |= {"slow_momentum_buffer", "slow_update", "slow_count"}
        if group["second_moment"] is not None:
            needed.add("second_moment")
        for i, (p, state) in enumerate(zip(params, states)):
            if group["kahan_sum"] or not needed <= state.keys():
                self._init_state(p, group, state)  # for what was switched on in mid-run
            if group["second_moment"] is not None:
                second = state["second_moment"]
                shape = self._state_shape(p, group, "second_moment")
                if tuple(second.shape) != shape:
                    raise RuntimeError(
                        f"parameter {i} has a second moment of shape {tuple(second.shape)}, and "
                        f"second_moment={group['second_moment']!r} needs {shape}: it cannot be "
                        "changed while training; delete 'second_moment' from the parameter's "
                        "state to start a new one"
                    )
            if group["capturable"]:
                for key in self._counter_keys:
                    if key in state and state[key].device != p.device:
                        state[key] = state[key].to(p.device)
            elif "slow_count" in state and not state["slow_count"].is_cpu:
                state["slow_count"] = state["slow_count"].cpu()
            if group["fused"] and state["step"].device != p.device:
                state["step"] = state["step"].to(p.device)

    def _run_on_torch(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        """The rule with torch's operations, on parameters whose state is complete."""
        # The rule works in one dtype: the wider of the parameter's and its momentum's.
        kahan = [bool(group["kahan_sum"]) and "kahan_comp" in state for state in states]
        work, wide_grads = [], []
        for p, state, grad, compensated in zip(params, states, grads, kahan):
            dtype = state["momentum_buffer"].dtype
            if not compensated and p.dtype == dtype == grad.dtype:
                work.append(p)
                wide_grads.append(grad)
                continue
            dtype = torch.promote_types(p.dtype, dtype)
            if compensated:
                dtype = torch.promote_types(dtype, torch.float32)
                work.append(rules.kahan_join(p, state["kahan_comp"], dtype))
            else:
                work.append(p.to(dtype))
            wide_grads.append(grad.to(dtype))
        foreach = self._uses_foreach(group, params)
        together = [
            i for i, p in enumerate(work) if foreach and reads_in_place(p, states[i], group)
        ]
        alone = sorted(set(range(len(work))) - set(together))
        for indices, path in ((alone, _single_tensor_m3), (together, _multi_tensor_m3)):
            if indices:
                path(
                    [work[i] for i in indices],
                    [wide_grads[i] for i in indices],
                    [states[i] for i in indices],
                    group,
                )
        for p, state, result, compensated in zip(params, states, work, kahan):
            if compensated:
                state["kahan_comp"].copy_(rules.kahan_split(result, p.dtype)[1])
            if result is not p:
                p.copy_(result)


def _is_fixed(value: Any) -> bool:
    """Whether an option's value stays what it is, or cannot be looked at without waiting."""
    if isinstance(value, (Tensor, tuple)):
        return all(map(_is_fixed, value)) if isinstance(value, tuple) else not value.is_cpu
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _default_betas(algorithm: str, mode: str) -> tuple[float, ...]:
    if algorithm == "adamw":
        return _ADAMW_BETAS
    return (1.0, 1.0, 1.0) if mode == "paper" else _M3_BETAS


def _check_choice(options: dict[str, Any], key: str, choices: Sequence[Any], where: str) -> Any:
    if options[key] not in choices or isinstance(options[key], bool):
        names = ", ".join(map(str, choices))
        raise ValueError(f"{where}Invalid {key}: {options[key]!r}. Choose one of {names}")
    return options[key]


def _check_betas(betas: Any, paper: bool, where: str) -> tuple[float, ...]:
    check_betas(betas, where)
    if len(betas) != 3:
        raise ValueError(
            f"{where}Invalid betas: {betas}. M3 takes three: (beta1, beta2, beta3), of the fast "
            "momentum, the second moment and the slow momentum; groups with algorithm='adamw' take "
            "two"
        )
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            raise ValueError(f"{where}betas[{i}] as a Tensor is not supported by algorithm='m3'")
        if not 0.0 <= beta < (math.inf if paper else 1.0):
            raise ValueError(f"{where}Invalid beta parameter at index {i}: {beta}")
    return tuple(map(float, betas))


def _check_sizes(value: Any, key: str, where: str) -> Any:
    if value is None:
        return None
    single = key == "num_heads" and isinstance(value, int) and not isinstance(value, bool)
    sizes = (value,) if single else tuple(value) if isinstance(value, Iterable) else ()
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"{where}Invalid {key}: {value!r}. Give integers >= 1")
    return value if single else sizes


def _plain(coefficients: Any) -> Any:
    """As checkpoints hold it: a name, or numbers in tuples."""
    if isinstance(coefficients, str):
        return coefficients
    return tuple(_plain(x) if isinstance(x, Iterable) else float(x) for x in coefficients)


def _check_matrix(group: dict[str, Any], param: Tensor, label: str) -> None:
    if group["algorithm"] != "m3" or (group["mode"] == "paper" and group["ns_steps"] == 0):
        return
    why = matrix_form(group).why_not(param.shape)
    if param.is_complex():
        why = "is complex, which M3 does not support: put it in a group with algorithm='adamw'"
    if why is not None:
        raise ValueError(label + why)


M3.__doc__ = rf"""Multi-scale momentum Muon for matrices and AdamW for the rest, on levels.

    A group with ``algorithm="m3"`` holds matrices, which move along an orthogonalised momentum, as
    Muon's do, to which with ``alpha`` a second, slow momentum adds its own: it takes in a chunk of
    ``slow_frequency`` updates at a time, and is orthogonalised where a chunk ends.

    .. math::
        M_1 &\leftarrow \beta_1 M_1 + (1-\beta_1)\, g, \qquad
            O_1 = \mathrm{{NS}}\big((1-\beta_1)\, g + \beta_1 M_1\big) \\
        U &= O_1 + \alpha O_2, \qquad
            \theta \leftarrow (1 - \eta\lambda)\,\theta - \eta\, s\, \frac{{\|O_1\|}}{{\|U\|}} U \\
        M_2 &\leftarrow \beta_3 M_2 + (1-\beta_3) \bar g, \quad
            O_2 \leftarrow \mathrm{{NS}}(M_2) \quad\text{{where a chunk ends}}

    with the factor ``s`` of ``adjust_lr``. A group with ``algorithm="adamw"`` follows
    :class:`NestedOptimizer`'s rule, with all its options. Both have levels (``frequency``), one
    scheduler and one checkpoint. :func:`matrix_groups` sorts a model's parameters::

        optimizer = M3(matrix_groups(model), lr=1e-3)

    With ``alpha=0``, the default, matrices follow ``torch.optim.Muon``, bit for bit at the same
    ``ns_dtype`` and options; its checkpoints load.

    This is Algorithm 1 of Nested Learning (arXiv 2512.24695, section 7.2) in a form to train with.
    ``mode="paper"`` is the algorithm to the letter, for study: its momenta are sums that never
    decay, so that the fast and the slow one grow into the same direction (Newton-Schulz cancels
    their write rates), and it divides an update of fixed size by the root of a sum of squared
    gradients, so that the first step grows as 1 / \|g\| and later ones shrink as AdaGrad's. Do not
    train with it.

    Args:
        params (iterable): parameters, ``(name, parameter)`` pairs, or dicts of groups, each of
            which may set every option below.
        lr (float or Tensor): learning rate. With the default ``adjust_lr`` one that suits AdamW
            suits matrices, too (default: 1e-3).
        betas (tuple): decay rates of the fast momentum, the second moment and the slow momentum
            (default: {_M3_BETAS}). Groups with ``algorithm="adamw"`` have two (default:
            {_ADAMW_BETAS}). In paper mode they are write rates (default: (1.0, 1.0, 1.0)).
        alpha (float): weight of the slow momentum; with 0 it is neither kept nor computed. It is
            off by default, as no measurement so far has it earn its cost; the paper gives no value,
            and 0.25 is a start (default: {_ALPHAS["ema"]}; in paper mode {_ALPHAS["paper"]}).
        slow_frequency (int): updates of the parameter per chunk of the slow momentum (default: 10).
            What a chunk leaves serves from the update after it.
        ns_steps (int): Newton-Schulz steps (default: 5). 0 leaves momenta as they are, in paper
            mode only.
        ns_coefficients (str or tuple): ``"quintic"``, ``"polar_express"``, ``"cubic"`` (three steps
            of which are far from orthogonal), ``(a, b, c)``, or such a triple per step (default:
            ``"quintic"``).
        eps (float): a momentum of a smaller Frobenius norm is not scaled up to 1; also added to the
            second moment's root, and AdamW's eps (default: 1e-8).
        weight_decay (float): decoupled weight decay, by ``lr * weight_decay`` per update (default:
            1e-2).
        mode (str): ``"ema"`` or ``"paper"`` (default: ``"ema"``).
        algorithm (str): the rule of groups that do not name theirs: ``"m3"`` or ``"adamw"``
            (default: ``"m3"``).
        second_moment (str): divide the update by the root of its own mean square over time, kept
            per ``"row"`` (output) or per ``"element"``, and restore its norm; None for neither
            (default: None).
        adjust_lr (str): what the learning rate is multiplied by, depending on the matrix's shape.
            ``"match_rms_adamw"``: 0.2 sqrt(max(rows, columns)), which gives updates the RMS of
            AdamW's; ``"original"``: sqrt(max(1, out / in)); ``"spectral"``: sqrt(out / in); None: 1
            (default: ``"match_rms_adamw"``).
        nesterov (bool): orthogonalise ``(1 - beta1) g + beta1 M1`` instead of ``M1`` (default:
            True).
        flatten (bool): read a parameter of more than two dimensions as (first, all others), as fits
            convolutions, or (False) one of three as a batch of matrices, as fits experts. None
            flattens four dimensions and more, and refuses three (default: None).
        out_dim (int): the dimension of a matrix that is the layer's output: 0, or 1 where a weight
            is stored as (in, out) (default: 0).
        split_sizes (tuple): lengths along ``out_dim`` of the projections that a fused weight holds,
            such as query, key and value; each is orthogonalised on its own (default: None).
        num_heads (int or tuple): into how many heads each projection divides further (default:
            None).
        ns_dtype (torch.dtype or str): dtype of the orthogonalised momenta. None means bfloat16 on
            accelerators and float32 on CPUs (float64 for float64 parameters). Where kernels compute
            in float16 instead of bfloat16, they are the more exact for it (default: None).
        max_batch_bytes (int): bound of the temporary memory of matrices that are orthogonalised
            together; one matrix may exceed it (default: 2 GiB).
        frequency (int): gradients per update, as in :class:`NestedOptimizer` (default: 1).
        window (str): ``"mean"`` or ``"sum"`` (default: ``"mean"``).
        amsgrad (bool): for groups with ``algorithm="adamw"`` (default: False).
        decoupled (bool): likewise; matrices have decoupled weight decay only (default: True).
        state_dtype (torch.dtype or str): dtype of the fast momentum and of AdamW's moments; None
            means the parameter's. The slow momentum and second moment are float32 or wider in any
            case (default: None).
        kahan_sum (bool): keep what rounding takes from bfloat16 and float16 parameters (default:
            False).
        {_maximize_doc}
        {_foreach_doc} Here it is the default wherever it can serve: matrices of one shape are
            orthogonalised together.
        {_capturable_doc} The slow momentum is then orthogonalised at every update and the result
            kept where a chunk ends: right in every replay, but twice the work.
        {_differentiable_doc}
        fused (bool, optional): for groups with ``algorithm="adamw"``, as in
            :class:`NestedOptimizer`. For matrices, Triton kernels around the orthogonalisation.
            The default on CUDA, for both, unless ``foreach`` is given. Sharded, float64 and
            non-contiguous matrices, and with ``kahan_sum`` narrow ones, go through torch's
            operations all the same.
        param_groups (iterable): the same as ``params``.
        memory (str, tuple or dict): a :class:`WeightMemory` from the start: a preset's name, its
            frequencies, or a dict of its arguments (default: None).

    Per parameter, ``state`` holds ``momentum_buffer`` (M1, as torch's Muon), and with ``alpha``
    ``slow_momentum_buffer`` (M2), ``slow_update`` (O2, in ``ns_dtype``) and ``slow_count`` (updates
    in the running chunk); ``second_moment`` where there is one.

    Raises:
        ValueError: an option is invalid, a parameter is in two groups, or one in a group with
            ``algorithm="m3"`` is no matrix.

    Note:
        Sharded parameters (DTensors) are gathered, and every rank orthogonalises all of them:
        right, not fast.
    """
