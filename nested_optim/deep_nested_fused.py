"""The learned step on the kernels: one pass over all tensors, and a few launches around it.

A :class:`FusedLearning` belongs to one optimizer and holds nothing that a checkpoint needs. Its
plans are made from parameters and their state, and every step verifies that they still describe
them: the same tensors, at the same addresses, with the same options.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_value

from . import kernels
from .meta import learned, long_run, networks, options
from .meta.features import GROUP_FEATURES, TENSOR_FEATURES
from .meta.long_run import Look
from .meta.momentum import LIMITS, PACES
from .meta.simple import Due
from .nested import _count
from .repeats import Roster, same_objects
from .rules.deep_nested import Inputs

if TYPE_CHECKING:
    from .deep_nested import DeepNestedOptimizer

#: Plans that are kept at once: one for each set of parameters that are updated together.
_MAX_PLANS = 32
#: And sets of groups that a plan keeps on the device for looks.
_MAX_LOOKS = 256
#: Programs of the launch that goes back through the networks; each keeps sums of its own.
_PROGRAMS = 256
_SETTINGS = 24

_dtype, _version, _pointer = attrgetter("dtype"), attrgetter("_version"), Tensor.data_ptr
_grad, _layout = attrgetter("grad"), attrgetter("layout")


def _state_keys(group: dict[str, Any], slow_keys: Sequence[str]) -> tuple[str, ...]:
    """Where a parameter's state keeps what the pass goes over: the last gradient and where it
    began, moments, then slow momenta."""
    moments = ["exp_avg"]
    if group["normalize"]:
        moments.append("exp_avg_sq")
        moments += ["max_exp_avg_sq"] if group["amsgrad"] else []
    began = ("initial_param",) if long_run.is_on(group) else ()
    return ("previous_grad", *began, *moments, *slow_keys)


def _serves(optimizer: DeepNestedOptimizer, dues: Sequence[Due]) -> bool:
    """Whether the kernels can do this step as a whole; otherwise other paths do.

    They leave the first updates of parameters, sharded, complex, empty and overlapping ones, and
    parameters that are not all on the device of the networks.
    """
    first = optimizer.param_groups[0]
    device = first["params"][0].device
    if not kernels.available(device):
        return False
    flats = [
        first[f"{module}_{part}"] for module in learned.modules(first) for part in learned.PARTS
    ]
    flats += [first["long_run"]] if long_run.is_on(first) else []
    if any(t is None or t.dtype != torch.float32 or t.device != device for t in flats):
        return False
    slow_keys = optimizer._slow_keys(first)
    traces = set()
    for group, params, grads in dues:
        keys = _state_keys(group, slow_keys)
        n_kept = 1 + ("initial_param" in keys)
        for param, grad in zip(params, grads):
            state = optimizer.state[param]
            if not state.keys() >= {"update_trace", *keys} or _get_value(state["step"]) < 1:
                return False
            tensors = [state[key] for key in keys]
            dense = torch.empty_like(param, device="meta").stride()
            n_moments = len(keys) - len(slow_keys)
            if (
                type(param) not in (Tensor, torch.nn.Parameter)
                or type(grad) is not Tensor
                or param.numel() == 0
                or any(t.device != device for t in (param, grad, state["update_trace"], *tensors))
                or any(t.dtype not in kernels.DTYPES for t in (param, grad, *tensors))
                or any(t.stride() != dense for t in (param, *tensors))
                or len(set(map(_dtype, tensors[:n_kept]))) > 1
                or len(set(map(_dtype, tensors[n_kept:n_moments]))) > 1
                or len(set(map(_dtype, tensors[n_moments:]))) > 1
            ):
                return False
            traces.add(state["update_trace"].dtype)
    return len(traces) == 1


class _Launch:
    """Tensors of a plan that have all their dtypes in common: one launch of the pass."""

    def __init__(self, plan: _Plan, at: list[int], kinds: tuple[torch.dtype, ...]) -> None:
        from .kernels.learned_adamw import KINDS, SPAN

        param, _, moment, _, _ = kinds
        wide = torch.promote_types(torch.promote_types(param, moment), torch.float32)
        self.kinds = [KINDS[dtype] for dtype in (*kinds, wide)]
        spans = array("i")
        for i in at:
            plan.first_span[i] = len(spans)
            spans.extend(array("i", [i]) * (-(-plan.params[i].numel() // SPAN)))
        self.count = len(spans)
        self.spans = _upload(torch.frombuffer(spans, dtype=torch.int32), plan.device)


class _Plan:
    """What one step does with its parameters, and what it was made for."""

    def __init__(self, optimizer: DeepNestedOptimizer, dues: Sequence[Due]) -> None:
        from .kernels.learned_adamw import ORDER, ROW, SPAN, SUMS
        from .kernels.look_back import PART
        from .kernels.tables import AddressRing

        first = optimizer.param_groups[0]
        self.device = first["params"][0].device
        self.slow_keys = optimizer._slow_keys(first)
        self.groups = [due.group for due in dues]
        self.params = [p for due in dues for p in due.params]
        self.grad_dtypes = [grad.dtype for due in dues for grad in due.grads]
        self.structure = _structure(self.groups)
        self.places = [optimizer._place(group) for group in self.groups]
        keys = _state_keys(self.groups[0], self.slow_keys)
        self._of_state = itemgetter("step", "update_trace", *keys)
        self._states = states = [optimizer.state[p] for p in self.params]
        self.tensors = self._tensors(states)
        self.memory = self._memory()
        self.steps = [state["step"] for state in states]
        # How often each has been written to, and what it was then; nobody counts inference tensors.
        self._counted: tuple[list[int], list[int]] | None = None
        self._versioned = not any(map(Tensor.is_inference, self.steps))
        self.strides = [p.stride() for p in self.params]
        traces = [state["update_trace"] for state in states]
        self.kept = traces[0].dtype

        count, n_groups = len(self.params), len(self.groups)
        sizes = [len(due.params) for due in dues]
        self.starts = [sum(sizes[:d]) for d in range(n_groups + 1)]
        self.elements = [sum(p.numel() for p in due.params) for due in dues]
        split: dict[tuple[torch.dtype, ...], list[int]] = {}
        for i, (param, grad_dtype, state) in enumerate(zip(self.params, self.grad_dtypes, states)):
            moment = state["exp_avg"].dtype
            slow = state[self.slow_keys[0]].dtype if self.slow_keys else moment
            last = state["previous_grad"].dtype
            split.setdefault((param.dtype, grad_dtype, moment, last, slow), []).append(i)
        self.first_span = [0] * count
        self.launches = [_Launch(self, at, kinds) for kinds, at in split.items()]

        rows, bounds, n_spans = array("q"), array("q"), 0
        begins = set(self.starts[:-1])
        group_of = [d for d, size in enumerate(sizes) for _ in range(size)]
        for i, (param, state) in enumerate(zip(self.params, states)):
            columns = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "previous_grad", *self.slow_keys]
            own = [param, *(state[key] if key in keys else None for key in columns)]
            addresses = [0 if t is None else t.data_ptr() for t in own]
            addresses += [0] * (7 - len(addresses))
            began = state["initial_param"].data_ptr() if "initial_param" in keys else 0
            merged = began
            for address in addresses:
                merged |= address
            spans = -(-param.numel() // SPAN)
            numbers = [param.numel(), self.first_span[i], n_spans, spans, group_of[i], merged]
            numbers.append(began)
            if i in begins:
                bounds.append(n_spans)
            row = [*addresses, traces[i].data_ptr(), *numbers]
            rows.extend(row + [0] * (ROW - len(row)))
            n_spans += spans
        bounds.append(n_spans)
        # Parts of groups that a program of its own adds up.
        parts, begins_at = array("q", [0]), array("q")
        for begin, end in pairwise(bounds):
            begins_at.extend(range(begin, end, PART))
            parts.append(len(begins_at))
        begins_at.append(n_spans)
        self.rows = _upload(torch.frombuffer(rows, dtype=torch.int64), self.device)
        self.bounds = _upload(torch.frombuffer(begins_at, dtype=torch.int64), self.device)
        self.parts = _upload(torch.frombuffer(parts, dtype=torch.int64), self.device)

        def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.ring = AddressRing(2 * count, self.device)
        self.upload = empty(2 * count, dtype=torch.int64)
        self.settings = empty(n_groups, _SETTINGS)
        self.multipliers = empty(n_groups)
        self.seen = empty(n_groups + count, 8, dtype=self.kept)
        self.said = empty(count + 2, 4)
        self.orders = empty(count, ORDER)
        self.sums = empty(n_spans, SUMS)
        self.lengths = empty(count, 2)
        self.ways = empty(parts[-1], 3)
        self.modules = learned.modules(first)
        self.total = sum(first[f"{module}_weights"].numel() for module in self.modules)
        self.found = empty(min(count, _PROGRAMS), self.total)
        self._packed: array[float] | None = None
        self._gathered: tuple[list[int], Tensor] | None = None
        self._looked: dict[tuple[tuple[int, int], ...], Tensor] = {}
        self._held: list[Tensor] = []  # gradients' copies, until they have been used

    def _tensors(self, states: Iterable[dict[str, Any]]) -> list[Tensor]:
        """All state that a step reads or writes; nothing if some of it is missing."""
        try:
            return list(chain.from_iterable(map(self._of_state, states)))
        except KeyError:
            return []

    def _memory(self) -> list[int]:
        """Where parameters lie; state is another tensor where it lies elsewhere."""
        return list(map(_pointer, self.params))

    def _counts(self) -> list[int]:
        """Updates of each parameter so far. What has not been written to is not read again."""
        if not self._versioned:
            return [int(step.item()) for step in self.steps]
        versions = list(map(_version, self.steps))
        if self._counted is None or versions != self._counted[0]:
            self._counted = versions, [int(step.item()) for step in self.steps]
        return self._counted[1]

    def _count(self) -> None:
        _count(self.steps)
        if self._counted is not None:
            counts = [count + 1 for count in self._counted[1]]
            self._counted = list(map(_version, self.steps)), counts

    def fits(
        self, optimizer: DeepNestedOptimizer, dues: Sequence[Due], *, states_known: bool
    ) -> bool:
        """Whether these are the tensors and options that the plan was made for.

        With ``states_known`` the dicts that hold the state are those of then.
        """
        states: Iterable[dict[str, Any]] = self._states
        if not states_known:  # a tensor's hash takes longer than all else here
            states = map(optimizer.state.__getitem__, self.params)
        tensors = self._tensors(states)
        grads = [grad for due in dues for grad in due.grads]
        return (
            len(tensors) == len(self.tensors)
            and all(map(is_, tensors, self.tensors))
            and list(map(_dtype, grads)) == self.grad_dtypes
            and set(map(type, grads)) == {Tensor}
            and len(dues) == len(self.groups)
            and all(due.group is group for due, group in zip(dues, self.groups))
            and [optimizer._place(group) for group in self.groups] == self.places
            and _structure(self.groups) == self.structure
            and self._memory() == self.memory
        )

    # ------------------------------------------------------------------ launches

    def learn_alone(self, first: dict[str, Any], look: Look | None) -> None:
        """Gather what the gradients teach, for a meta update before the update."""
        self._launch(first, learn=True, update=False, look=look)

    def update(
        self, first: dict[str, Any], *, learn: bool, look: Look | None = None
    ) -> dict[int, Inputs]:
        """Update, and gather on the way; of each group's place, what the networks said."""
        self._launch(first, learn=learn, update=True, look=look)
        self._count()  # the device works already
        self._held = []
        return self._said()

    def _launch(
        self, first: dict[str, Any], *, learn: bool, update: bool, look: Look | None
    ) -> None:
        networks_ = self._networks(first)
        with kernels.on(self.device):
            self._inputs(*networks_)
            self._run(first, measure=learn, update=update, way=look is not None)
            if look is not None:
                self._look_back(first, *networks_, look)
            self._learn(first, *networks_, learn=learn, keep=update)

    def begin(self, optimizer: DeepNestedOptimizer, dues: Sequence[Due]) -> None:
        """Bring gradients' addresses, counts and options to the device."""
        grads = [grad for due in dues for grad in due.grads]
        if list(map(Tensor.stride, grads)) != self.strides:
            for i, (grad, strides) in enumerate(zip(grads, self.strides)):
                if grad.stride() != strides:
                    grads[i] = torch.empty_strided(
                        grad.shape, strides, dtype=grad.dtype, device=grad.device
                    ).copy_(grad)
        self._held = grads
        numbers_ = [*map(_pointer, grads), *self._counts()]
        self.upload.copy_(self.ring.write(numbers_), non_blocking=True)
        loss = optimizer._loss
        on_device: list[tuple[Any, Tensor]] = []
        if loss is not None and not loss.is_cpu:
            on_device.append((slice(None), loss.detach().reshape(())))
        told = 0.0 if loss is None or on_device else float(loss)
        packed = array("d")
        for d, group in enumerate(self.groups):
            rates = []
            for column, key in enumerate(("lr", "weight_decay")):
                value = group[key]
                if isinstance(value, Tensor) and not value.is_cpu:
                    on_device.append(((d, column), value.detach().reshape(())))
                    value = 0.0
                rates.append(float(value))
            beta1, beta2 = map(float, group["betas"])
            numbers = [*rates, beta1, beta2, group["eps"], float(group["decoupled"])]
            numbers += [-1.0 if group["maximize"] else 1.0, self.places[d][1]]
            numbers += [self.starts[d], self.starts[d + 1] - self.starts[d], self.elements[d]]
            numbers += [told, float(loss is not None)]
            numbers += [math.log(group["min_lr_mult"]), math.log(group["max_lr_mult"]), *LIMITS]
            numbers += [networks.GAIN, learned.MIXING_GAIN, *PACES, 0.0, 0.0]
            packed.extend(map(float, numbers))
        if packed != self._packed:
            host = torch.frombuffer(packed, dtype=torch.float64).view(-1, _SETTINGS)
            self.settings.copy_(_pinned(host, self.device), non_blocking=True)
            # What a tensor on the device said is overwritten, and has to be said again.
            self._packed = packed
        for where, value in on_device:
            target = self.settings[:, 11] if isinstance(where, slice) else self.settings[where]
            target.copy_(value, non_blocking=True)

    def _networks(self, first: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
        """What the launches around the pass take in common: weights, and what is known of them."""
        hidden = {"controller": first["controller_hidden_dim"]}
        hidden["momentum"] = first["momentum_hidden_dim"]
        flats: list[Tensor] = []
        for module, ends in (
            ("controller", (GROUP_FEATURES, 1)),
            ("momentum", (TENSOR_FEATURES, 3)),
        ):
            if module in self.modules:
                shape = ends[0], hidden[module], ends[1], learned.LAYERS
                start = networks.start_on(*shape, self.device, torch.float32)
                flats += [first[f"{module}_weights"], start]
            else:
                flats += [self.lengths, self.lengths]
                hidden[module] = 16
        flats.append(first["mixing_weights"] if "mixing" in self.modules else self.lengths)
        frequencies = [*first["cms_frequencies"][1:], 1, 1] if self.slow_keys else [1, 1]
        from .kernels.learned_adamw import KINDS

        known = {
            "KEPT": KINDS[self.kept],
            "WIDE": KINDS[self.kept],  # of the networks
            "LEARN_LR": "controller" in self.modules,
            "LEARN_MOMENTUM": "momentum" in self.modules,
            "LEARN_MIXING": "mixing" in self.modules,
            "CONTROLLER": hidden["controller"],
            "CONTROLLER_WIDTH": max(16, 1 << (hidden["controller"] - 1).bit_length()),
            "MOMENTUM": hidden["momentum"],
            "MOMENTUM_WIDTH": max(16, 1 << (hidden["momentum"] - 1).bit_length()),
            "F1": frequencies[0],
            "F2": frequencies[1],
            "N_SLOW": len(self.slow_keys),
        }
        return flats, known

    def _inputs(self, flats: list[Tensor], known: dict[str, Any]) -> None:
        """What multiplies what in the pass, by the networks' present weights."""
        from .kernels import learned_networks as source

        count, n_groups = len(self.params), len(self.groups)
        steps, constants = self.upload[count:], (*known.values(), source.BLOCK)
        args = (
            self.rows, steps, self.settings, *flats, self.multipliers, self.seen, self.said,
            self.orders, n_groups, *constants,
        )  # fmt: skip
        kind = self.device, constants, kernels.aligned(steps), tuple(map(kernels.aligned, flats))
        source.launch_inputs(kind, (n_groups + count, 1, 1), args)

    def _run(self, first: dict[str, Any], *, measure: bool, update: bool, way: bool) -> None:
        """The pass over all tensors: products with the update before, the update, or both."""
        from .kernels import learned_adamw as source

        amsgrad = first["normalize"] and self.groups[0]["amsgrad"]
        for launch in self.launches:
            flags = len(self.slow_keys), first["normalize"], amsgrad, measure, update
            constants = *launch.kinds, *flags, way, source.CHUNK, source.SPAN
            args = (
                launch.spans, self.rows, self.upload, self.orders, self.multipliers, self.sums,
                *constants,
            )  # fmt: skip
            source.launch_pass((self.device, constants), (launch.count, 1, 1), args)

    def _look_back(
        self, first: dict[str, Any], flats: list[Tensor], known: dict[str, Any], look: Look
    ) -> None:
        """``long_run.learn``, between the pass and what overwrites the traces."""
        from .kernels import look_back as source

        long_run.ensure(first)
        args: tuple[Any, ...] = self.sums, self.bounds, self.ways, source.PART
        source.launch_way((self.device, source.PART), (len(self.ways), 1, 1), args)
        looked = tuple(zip(look.at, look.steps))
        if looked not in self._looked:
            if len(self._looked) >= _MAX_LOOKS:
                self._looked.clear()
            host = torch.tensor(looked, dtype=torch.int64)
            self._looked[looked] = _upload(host, self.device)
        kept, controller = first["long_run"], flats[:2]
        widths = known["CONTROLLER"], known["CONTROLLER_WIDTH"]
        constants = long_run.FADES, known["KEPT"], known["WIDE"], *widths, source.BLOCK
        args = (
            self.rows, self.settings, *controller, self.ways, self.parts, self._looked[looked],
            kept, self.found, len(looked), *constants,
        )  # fmt: skip
        kind = self.device, constants, tuple(map(kernels.aligned, (kept, *controller)))
        source.launch_look(kind, (1, 1, 1), args)

    def _learn(
        self,
        first: dict[str, Any],
        flats: list[Tensor],
        known: dict[str, Any],
        *,
        learn: bool,
        keep: bool,
    ) -> None:
        """After the pass: gather what it says about the weights; write the traces."""
        from .kernels import learned_networks as source

        count = len(self.params)
        kept_in, wide, *others = known.values()
        constants = kept_in, wide, learn, keep, *others, source.BLOCK
        steps = self.upload[count:]
        args: tuple[Any, ...] = (
            self.rows, steps, self.settings, *flats, self.seen, self.sums, self.lengths,
            self.found, count, len(self.groups), self.total, *constants,
        )  # fmt: skip
        kind = self.device, constants, kernels.aligned(steps), tuple(map(kernels.aligned, flats))
        source.launch_learn(kind, (len(self.found), 1, 1), args)
        if not learn:
            return
        kept = [first[f"{module}_grad"] for module in self.modules]
        constants = first["meta_rule"] == "cosine", 1024
        args = self.found.sum(0), self.lengths, self._places_of(kept), count, *constants
        source.launch_collect((self.device, constants), (len(kept), 1, 1), args)

    def _places_of(self, kept: list[Tensor]) -> Tensor:
        """Of each module: where it gathers, where its derivatives begin, how many they are."""
        addresses = list(map(_pointer, kept))
        if self._gathered is None or self._gathered[0] != addresses:
            table, begin = array("q"), 0
            for tensor in kept:
                table.extend([tensor.data_ptr(), begin, tensor.numel()])
                begin += tensor.numel()
            host = torch.frombuffer(table, dtype=torch.int64)
            self._gathered = addresses, _upload(host, self.device)
        return self._gathered[1]

    def _said(self) -> dict[int, Inputs]:
        found = {}
        mixing = self.said[len(self.params), : 1 + len(self.slow_keys)]
        for d, (at, _) in enumerate(self.places):
            scale, shift, damping, _ = self.said[self.starts[d] : self.starts[d + 1]].unbind(1)
            learns = "momentum" in self.modules
            found[at] = Inputs(
                self.multipliers[d : d + 1] if "controller" in self.modules else None,
                scale if learns else None,
                shift if learns else None,
                damping if learns else None,
                mixing if "mixing" in self.modules else None,
            )
        return found


def _structure(groups: Sequence[dict[str, Any]]) -> list[Any]:
    return [(options.shared(group), group["amsgrad"], group["fused"]) for group in groups]


class _LastStep:
    """All that decided which parameters a step without windows updated, and with which plan."""

    def __init__(self, optimizer: DeepNestedOptimizer, dues: Sequence[Due], plan: _Plan) -> None:
        self.plan = plan
        self._roster = Roster(optimizer, (p for due in dues for p in due.params))
        self._parts = [(due.group, list(due.params)) for due in dues]
        self._states = list(optimizer.state.values())
        self._sizes = list(map(len, self._states))

    def dues(self, optimizer: DeepNestedOptimizer) -> list[Due] | None:
        """Those of this step, if the same parameters have gradients and nothing else has changed.

        Options and memory are the plan's to compare.
        """
        states = list(optimizer.state.values())
        if not (
            self._roster.holds(optimizer)
            and same_objects(states, self._states)
            and list(map(len, states)) == self._sizes
            and all(group["frequency"] == 1 for group in optimizer.param_groups)
        ):
            return None
        found = []
        for group, params in self._parts:
            grads: list[Any] = list(map(_grad, params))
            if set(map(type, grads)) != {Tensor} or set(map(_layout, grads)) != {torch.strided}:
                return None
            found.append(Due(group, params, grads))
        return found


class FusedLearning:
    """The plans of one optimizer."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._last: _LastStep | None = None
        self._verified: _Plan | None = None  # whose state's dicts have been compared in this step
        self._like_last = False  # whether this step was found to be

    def find(self, optimizer: DeepNestedOptimizer, dues: Sequence[Due]) -> _Plan | None:
        """The plan for a step on these, or None if the kernels leave it to other paths."""
        verified, self._verified = self._verified, None
        self._like_last = verified is not None and verified.fits(optimizer, dues, states_known=True)
        if self._like_last:
            return verified
        key = tuple(id(p) for due in dues for p in due.params)
        plan = self._plans.get(key)
        if plan is not None and plan.fits(optimizer, dues, states_known=False):
            return plan
        self._plans.pop(key, None)
        self._last = None
        if len({due.group["amsgrad"] for due in dues}) > 1 or not _serves(optimizer, dues):
            return None
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        plan = self._plans[key] = _Plan(optimizer, dues)
        return plan

    def repeat(self, optimizer: DeepNestedOptimizer) -> list[Due] | None:
        """What is due in a step like the last one, found without a look at every parameter; None
        where it has to be found out otherwise."""
        if self._last is None or (dues := self._last.dues(optimizer)) is None:
            return None
        self._verified = self._last.plan
        return dues

    def remember(self, optimizer: DeepNestedOptimizer, dues: Sequence[Due], plan: _Plan) -> None:
        """Note a step that this plan has made, if the next one may be like it."""
        if self._like_last:
            return
        groups = optimizer.param_groups
        self._last = None
        if any(group["frequency"] != 1 for group in groups):
            return
        params = [p for one in dues for p in one.params]
        with_grads = {id(p) for g in groups for p in g["params"] if p.grad is not None}
        windows = any("window_sum" in optimizer.state[p] for p in params)
        if not windows and set(map(id, params)) == with_grads:
            self._last = _LastStep(optimizer, dues, plan)

    def forget(self) -> None:
        """Drop the plans: the optimizer's state has been replaced."""
        self._plans.clear()
        self._last = self._verified = None


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    host = host.clone()
    return host.pin_memory() if device.type == "cuda" else host


def _upload(host: Tensor, device: torch.device) -> Tensor:
    return _pinned(host, device).to(device, non_blocking=True)
