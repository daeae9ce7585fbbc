"""Steps on the fused kernels: which parameters they serve, and when their tables are made anew.

A :class:`FusedSteps` belongs to one optimizer and holds nothing that a checkpoint needs: its tables
are made from the optimizer's state, and every step verifies that they still describe it (the same
parameters at the same addresses, the same state tensors, the same kind of options).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_not, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import kernels
from .kernels.tables import SETTINGS, Entry, LevelTable
from .tensors import capturing, is_dtensor, laid_out_like, local

if TYPE_CHECKING:
    from .optimizer import LevelOptimizer

#: What one step works on: groups with their parameters and gradients.
Work = list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]

# Options that decide which tables there are, and those that the tables hold.
_structure = itemgetter(
    "foreach", "fused", "capturable", "differentiable", "amsgrad", "state_dtype", "kahan_sum"
)
_SETTINGS = ("lr", "weight_decay", "betas", "eps", "frequency", "window", "decoupled", "maximize")
_settings = itemgetter(*_SETTINGS)

_COUNTERS = ("step", "window_count")

_dtype = attrgetter("dtype")
_params = itemgetter("params")


def serves(group: dict[str, Any], param: Tensor) -> bool:
    """Whether the kernels update this parameter: by default on CUDA, elsewhere never.

    What they do not know (complex numbers, gradients of the update, subclasses of tensors) is left
    to the other paths, as are groups that ask for one of those.
    """
    if group["foreach"] is not None and not group["fused"]:
        return False
    if group["fused"] is False or group["differentiable"]:
        return False
    if group.get("algorithm", "adamw") != "adamw":
        return False
    if not (type(param) in (Tensor, torch.nn.Parameter) or is_dtensor(param)):
        return False
    device = param.device
    if not kernels.available(device) or (device.type == "cpu" and not group["fused"]):
        return False
    options = (group["lr"], group["weight_decay"], *group["betas"])
    return param.dtype in kernels.DTYPES and not any(
        isinstance(x, Tensor) and x.requires_grad for x in options
    )


class _TensorsDiffer(Exception):
    """Two tensors that are not the same object were about to be compared."""


class _NoComparison(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _TensorsDiffer


@dataclass
class JoinedExchange:
    """What a weight memory asks of the step to come: to exchange weights with their first copies.

    Attributes:
        count: the number of the step.
        copies: by parameter the copy, the exchange's frequency, and its rates: how far the copy
            goes to the weights, and how far they then go to it.
        done: the parameters that have been served.
    """

    count: int
    copies: dict[Tensor, tuple[Tensor, int, float, float]]
    done: set[Tensor] = field(default_factory=set)


class _Table:
    """A kernel table with the parameters behind it."""

    def __init__(
        self,
        table: LevelTable,
        params: list[Tensor],
        states: list[Tensor],
        grad_dtype: torch.dtype,
    ) -> None:
        self.table = table
        self.params = params
        self.plain = not any(map(is_dtensor, params))
        self.grad_dtypes = {grad_dtype}
        shards = [local(p) for p in params]
        self.states = states
        self.addresses = [s.data_ptr() for s in chain(shards, self.states)]
        #: As the state is laid out.
        self.strides = [e.exp_avg.stride() for e in table.entries]
        self.contiguous = [e.exp_avg.is_contiguous() for e in table.entries]
        self.strided = [i for i, whole in enumerate(self.contiguous) if not whole]
        self.empty = [i for i, s in enumerate(shards) if s.numel() == 0]
        self.staged = [
            (s, e.param)
            for s, e in zip(shards, table.entries)
            if s.data_ptr() != e.param.data_ptr()
        ]
        self.grads: list[int] = []
        self.kept: list[Any] = []  # gradients' copies, until they have been used

    def moved(self) -> bool:
        """Whether a parameter or its state has other memory than it had (``p.data = ...``)."""
        shards: Iterable[Tensor] = self.params if self.plain else map(local, self.params)
        return list(map(Tensor.data_ptr, chain(shards, self.states))) != self.addresses

    def find_grads(self) -> bool:
        """Note where the gradients are; False if they are not what the table was made for."""
        grads: list[Any] = [p.grad for p in self.params]
        try:
            addresses = list(map(Tensor.data_ptr, grads))
        except (TypeError, RuntimeError):  # None, or of a layout without memory
            return self._find_one_by_one(grads)
        if (
            set(map(type, grads)) != {Tensor}
            or list(map(Tensor.is_contiguous, grads)) != self.contiguous
            or (self.strided and any(grads[i].stride() != self.strides[i] for i in self.strided))
        ):
            return self._find_one_by_one(grads)
        if set(map(_dtype, grads)) != self.grad_dtypes:
            return False
        for i in self.empty:
            addresses[i] = 16  # no memory, but a gradient
        self.grads = addresses
        return True

    def join(self, exchange: JoinedExchange) -> tuple[int, torch.dtype] | None:
        """Note what of an exchange the kernels can do here; None if that is nothing."""
        if self.table.kahan or not self.plain:
            return None
        wide = self.table.dtypes[-1]
        staged = {id(copied) for _, copied in self.staged}
        noted, served = [], []
        dtype: torch.dtype | None = None
        for p, e, stride in zip(self.params, self.table.entries, self.strides):
            copy, frequency, write, rate = exchange.copies.get(p) or (None, 1, 0.0, 0.0)
            if (
                copy is None
                or copy.device != e.param.device
                or copy.dtype not in kernels.DTYPES
                or copy.dtype != (dtype or copy.dtype)
                or torch.promote_types(copy.dtype, wide) != wide
                or id(e.param) in staged
                or (copy.stride() != stride and copy.numel() > 1)
            ):
                noted.append((0, 1, 0.0, 0.0))
                continue
            dtype = copy.dtype
            noted.append((copy.data_ptr(), frequency, write, rate))
            served.append(p)
        if dtype is None:
            return None
        self.table.join(noted)
        exchange.done.update(served)
        return exchange.count, dtype

    def _find_one_by_one(self, grads: list[Any]) -> bool:
        addresses = [0] * len(grads)
        kept = []
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            if grad.layout is not torch.strided or grad.dtype not in self.grad_dtypes:
                return False
            if type(grad) is not Tensor:
                grad = local(laid_out_like(grad, self.params[i]))
            if grad.stride() != self.strides[i] and grad.numel() > 1:
                grad = torch.empty_strided(
                    grad.shape, self.strides[i], dtype=grad.dtype, device=grad.device
                ).copy_(grad)
            kept.append(grad)
            addresses[i] = grad.data_ptr() or 16
        self.grads, self.kept = addresses, kept
        return True


class FusedSteps:
    """The tables of one optimizer. Made by its first step that the kernels serve."""

    def __init__(self) -> None:
        self._tables: list[_Table] = []
        self._members: list[list[Tensor]] = []  # the parameters of each group
        self._held: list[dict[str, Any]] = []  # the state of all parameters, in order
        self._structure: list[Any] = []
        self._waiting: list[Tensor] = []  # served, but never had a gradient
        self._values: list[tuple[Any, ...]] = []  # per group, what `_packed` was made from
        self._on_host = False
        self._packed: array[float] = array("d")
        self._from_device: list[tuple[int, int, Tensor]] = []  # row, column, value
        self._windowless: list[bool] = []
        self._captured: list[Any] = []  # what CUDA graphs read
        #: Whether any group may be captured in a CUDA graph.
        self.capturable = True
        self._forgotten: set[Tensor] = set()  # a step that only makes state gives them no gradient
        self.served: set[Tensor] = set()
        #: Whether some parameters are left to other paths.
        self.partial = True
        #: What the next launch is to do besides.
        self.exchange: JoinedExchange | None = None

    # ------------------------------------------------------------------ are the tables true?

    def ready(self, optimizer: LevelOptimizer) -> bool:
        """Verify the tables and find the gradients; changes nothing."""
        if not self._tables:
            return False
        groups = optimizer.param_groups
        if not self._same_tensors(optimizer):
            return False
        if list(map(_structure, groups)) != self._structure:
            return False
        if any(p.grad is not None for p in self._waiting):
            return False
        if not self._read_settings(optimizer):
            return False
        return not any(t.moved() for t in self._tables) and all(
            t.find_grads() for t in self._tables
        )

    def _same_tensors(self, optimizer: LevelOptimizer) -> bool:
        # Lists and dicts compare what they hold by identity first. Comparing tensors by value,
        # which would come next, is refused: it means that one has been replaced.
        try:
            with _NoComparison():
                return (
                    list(map(_params, optimizer.param_groups)) == self._members
                    and list(optimizer.state.values()) == self._held
                )
        except _TensorsDiffer:
            return False

    def _read_settings(self, optimizer: LevelOptimizer) -> bool:
        values = list(map(_settings, optimizer.param_groups))
        # The very objects that were read before cannot have changed, but for tensors on the host.
        if (
            len(values) == len(self._values)
            and not self._on_host
            and not any(any(map(is_not, new, old)) for new, old in zip(values, self._values))
        ):
            return True
        packed = array("d")
        from_device: list[tuple[int, int, Tensor]] = []
        for at, group in enumerate(optimizer.param_groups):
            optimizer._check_edits(group, f"{optimizer._group_label(at, group)}: ")
            if group["frequency"] > 1 and at < len(self._windowless) and self._windowless[at]:
                return False
            packed.extend(_pack(group, at, from_device))
        self._on_host = any(
            isinstance(x, Tensor) and x.is_cpu
            for lr, weight_decay, betas, *_ in values
            for x in (lr, weight_decay, *betas)
        )
        self._values, self._packed, self._from_device = values, packed, from_device
        return True

    # ------------------------------------------------------------------ making them

    def build(self, optimizer: LevelOptimizer, work: Work, probes: set[Tensor]) -> Work:
        """Make the tables for ``work``, which has been checked; return what the kernels leave."""
        if capturing() and any(serves(g, p) for g, params, _ in work for p in params):
            raise RuntimeError(
                "a CUDA graph capture needs the tables of an earlier step: run step() on these "
                "parameters before the capture"
            )
        left: Work = []
        with_grad: dict[Tensor, torch.dtype] = {}
        for group, params, grads in work:
            rest: tuple[list[Tensor], list[Tensor]] = ([], [])
            for p, grad in zip(params, grads):
                if serves(group, p):
                    with_grad[p] = grad.dtype
                else:
                    rest[0].append(p)
                    rest[1].append(grad)
            if rest[0]:
                left.append((group, *rest))
        self.partial = bool(left)

        sets: dict[Any, list[tuple[Tensor, Entry]]] = {}
        self._waiting, self._windowless = [], []
        self._forgotten, self.served = set(), set()
        for at, group in enumerate(optimizer.param_groups):
            windowless = False
            for p in group["params"]:
                if not serves(group, p):
                    self.partial = True
                    continue
                if p not in with_grad and not optimizer.state.get(p):
                    self._waiting.append(p)
                    continue
                entry = _entry(optimizer, group, at, p)
                self.served.add(p)
                windowless |= entry.window_sum is None
                if p in probes and entry.window_sum is not None:
                    entry.step.add_(1)
                    self._forgotten.add(p)
                grad_dtype = with_grad.get(p) or getattr(p, "grad_dtype", None) or p.dtype
                key = (
                    p.device,
                    p.dtype,
                    grad_dtype,
                    entry.exp_avg.dtype,
                    entry.max_exp_avg_sq is None,
                    entry.kahan_comp is None,
                )
                sets.setdefault(key, []).append((p, entry))
            self._windowless.append(windowless)

        groups = optimizer.param_groups
        self._tables = []
        for (_, _, grad_dtype, *_), members in sets.items():
            table = LevelTable([e for _, e in members], grad_dtype, len(groups))
            params = [p for p, _ in members]
            states = [local(optimizer.state[p]["exp_avg"]) for p in params]
            self._tables.append(_Table(table, params, states, grad_dtype))
        self._members = [list(group["params"]) for group in groups]
        self._structure = list(map(_structure, groups))
        self.capturable = any(group["capturable"] for group in groups)
        self._held = [dict(entries) for entries in optimizer.state.values()]
        self._values = []
        self._read_settings(optimizer)
        return left

    def find_grads(self) -> None:
        """Find the gradients that :meth:`build` made tables for."""
        for t in self._tables:
            if not t.find_grads():
                raise RuntimeError("gradients changed their dtype or layout within a step")
            for i, p in enumerate(t.params):
                if p in self._forgotten:
                    t.grads[i] = 0

    def forget(self) -> None:
        """Drop the tables: the optimizer's state has been replaced. Captured graphs keep theirs."""
        self._tables, self._members, self._held = [], [], []
        self.served = set()

    def serves_all(self, optimizer: LevelOptimizer) -> bool:
        """Whether no parameter is left to another path."""
        groups = optimizer.param_groups
        if (
            self._tables
            and list(map(_structure, groups)) == self._structure
            and self._same_tensors(optimizer)
        ):
            return not self.partial
        return all(serves(group, p) for group in groups for p in group["params"])

    # ------------------------------------------------------------------ using them

    def check_capture(self) -> None:
        """Raise if a step captured now would not be the one that the graph must replay."""
        if any(t.table.settings_differ(self._packed) for t in self._tables):
            raise RuntimeError(
                "options were edited since the last step, and a CUDA graph reads them from device "
                "memory: call upload_options() before the capture"
            )

    def launch(self, captured: bool = False, **scaling: Tensor) -> None:
        """Step every tensor whose gradient :meth:`ready` or :meth:`find_grads` found.

        ``scaling`` may hold ``grad_scale`` and ``found_inf``, of one element each.
        """
        asked, self.exchange = self.exchange, None
        for t in self._tables:
            with _on(t.table.device):
                t.table.upload(self._packed)
                if captured:
                    grads = t.table.addresses.give(t.grads)
                    self._captured.append((grads, t))
                else:
                    grads = t.table.addresses.write(t.grads)
                here: dict[str, Any] = {
                    k: x.to(t.table.device, non_blocking=True) for k, x in scaling.items()
                }
                if asked is not None and not (captured or scaling):
                    here["exchange"] = t.join(asked)
                self._run(t, grads, **here)

    def _bring_device_values(self, table: LevelTable) -> None:
        for row, column, value in self._from_device:
            if row >= table.n_groups:
                continue
            table.settings[row, column].copy_(value, non_blocking=True)
            if column in (2, 3):
                log = value.to(torch.float64).log()
                table.settings[row, column + 2].copy_(log, non_blocking=True)

    def _run(self, t: _Table, grads: Tensor, **how: Any) -> None:
        from .kernels import level_adamw

        self._bring_device_values(t.table)
        for shard, copied in t.staged:
            copied.copy_(shard)
        level_adamw.step(t.table, grads, **how)
        for shard, copied in t.staged:
            shard.copy_(copied)
        t.kept.clear()

    def flush(self) -> int:
        """Apply the running windows; return how many. Waits for the device."""
        pending = 0
        for t in self._tables:
            counts = [e.window_count for e in t.table.entries if e.window_sum is not None]
            here = int((torch.stack(counts) > 0).sum()) if counts else 0
            if here:
                with _on(t.table.device):
                    t.table.upload(self._packed)
                    nothing = t.table.addresses.write([0] * t.table.n_tensors)
                    self._run(t, nothing, flush=True)
            pending += here
        return pending

    def upload_options(self, optimizer: LevelOptimizer) -> None:
        """Bring the groups' options to the device, where captured graphs read them."""
        captured = [t for _, t in self._captured]
        tables = list(dict.fromkeys(t.table for t in (*self._tables, *captured)))
        if tables and not self._read_settings(optimizer):
            raise RuntimeError(
                "a frequency above 1 needs a window that captured graphs do not have: run step() "
                "once and capture again"
            )
        for table in tables:
            with _on(table.device):
                # Groups that were added later are not in it.
                table.upload(self._packed[: table.n_groups * SETTINGS])
                self._bring_device_values(table)


def _pack(group: dict[str, Any], row: int, from_device: list[tuple[int, int, Tensor]]) -> Any:
    """A group's row of the settings; tensors on a device are noted, to be copied there."""
    if group.get("algorithm", "adamw") != "adamw":
        return [0.0] * SETTINGS  # none of its parameters is served, and its betas may be others
    beta1, beta2 = group["betas"]
    numbers = []
    for column, value in enumerate((group["lr"], group["weight_decay"], beta1, beta2)):
        if isinstance(value, Tensor):
            if value.is_cpu:
                value = value.item()
            else:
                from_device.append((row, column, value.detach().reshape(())))
                value = 0.5
        numbers.append(float(value))
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in numbers[2:]]
    rest = [
        float(group["eps"]),
        float(group["frequency"]),
        float(group["window"] == "mean"),
        float(group["decoupled"]),
        -1.0 if group["maximize"] else 1.0,
    ]
    values = numbers + logs + rest
    return values + [0.0] * (SETTINGS - len(values))


def _entry(optimizer: LevelOptimizer, group: dict[str, Any], at: int, param: Tensor) -> Entry:
    """The parameter's state, completed and laid out as the kernels need it."""
    state = optimizer._begin(param, group, on_device=True)
    optimizer._init_state(param, group, state)  # what was switched on in mid-run
    shard = local(param)
    layout = torch.empty_like(shard, device="meta").stride()
    for key in _COUNTERS:
        state[key] = state[key].to(device=shard.device, dtype=torch.float32)

    moment = state["exp_avg"].dtype
    wide = torch.promote_types(torch.promote_types(param.dtype, moment), torch.float32)

    def found(key: str, dtype: torch.dtype, wanted: bool = True) -> Any:
        if not wanted or key not in state:
            return None
        if state[key].dtype != dtype:
            state[key] = state[key].to(dtype)
        tensor = local(state[key])
        if tensor.stride() != layout and tensor.numel() > 1:
            relaid = torch.empty_strided(shard.shape, layout, dtype=dtype, device=shard.device)
            tensor.set_(relaid.copy_(tensor))  # type: ignore[call-overload]
        return tensor.detach()  # which keeps the memory, whatever becomes of the tensor

    staged = shard.stride() != layout and shard.numel() > 1
    return Entry(
        torch.empty_strided(shard.shape, layout, dtype=shard.dtype, device=shard.device)
        if staged
        else shard.detach(),
        found("exp_avg", moment),
        found("exp_avg_sq", moment),
        found("max_exp_avg_sq", moment, group["amsgrad"]),
        found("kahan_comp", param.dtype, group["kahan_sum"]),
        found("window_sum", wide),
        state["step"],
        state["window_count"],
        at,
    )


def _on(device: torch.device) -> Any:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
