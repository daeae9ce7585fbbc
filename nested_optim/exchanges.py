"""The exchange of weight levels on lists of tensors: in place, on whatever path is fastest."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels, rules
from .levels import check_frequency
from .rules.exchange import narrower, pull_after_write
from .tensors import capturing, is_dtensor, local

#: Tables that are kept at once: a few per pair of levels.
_MAX_TABLES = 64


class Settings(NamedTuple):
    """When and how far neighbouring levels exchange: one entry per slow level."""

    frequencies: tuple[int, ...]
    write: tuple[float, ...]
    pull: tuple[float, ...]

    @property
    def levels(self) -> int:
        return len(self.frequencies)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the slow levels in a parameter's state."""
        return tuple(f"memory_{k + 1}" for k in range(len(self.frequencies)))


def check_settings(frequencies: Any, write: Any, pull: Any, where: str = "") -> Settings:
    """These options of a group in canonical form, or an error that says what is wrong.

    A single number serves as ``write`` or ``pull`` of every level.
    """
    if isinstance(frequencies, (str, Tensor)) or not isinstance(frequencies, Sequence):
        raise ValueError(
            f"{where}memory frequencies must be a sequence of integers, one per slow level, but "
            f"got {frequencies!r}; () switches the memory off"
        )
    checked = tuple(
        check_frequency(f, f"{where}memory frequencies[{i}]: ") for i, f in enumerate(frequencies)
    )
    rates = []
    for name, given in (("write", write), ("pull", pull)):
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            given = (given,) * len(checked)
        if isinstance(given, (str, Tensor)) or not isinstance(given, Sequence):
            raise ValueError(
                f"{where}memory {name} must be a number or a sequence of them, but got {given!r}"
            )
        if not checked:
            given = ()  # switched off: the rates are without meaning
        if len(given) != len(checked):
            raise ValueError(
                f"{where}memory {name} has {len(given)} entries for {len(checked)} frequencies: "
                "give one per slow level, or one number for all"
            )
        for i, rate in enumerate(given):
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
                raise ValueError(
                    f"{where}memory {name}[{i}] must be a number from 0 to 1, but is {rate!r}"
                )
        rates.append(tuple(map(float, given)))
    for i, (w, p) in enumerate(zip(*rates)):
        if w + p > 1 + 1e-9:
            raise ValueError(
                f"{where}memory write[{i}] + pull[{i}] = {w} + {p} exceeds 1: the two levels would "
                "overshoot each other; lower one of them"
            )
    return Settings(checked, rates[0], rates[1])


def exchange_(
    faster: Sequence[Tensor],
    slower: Sequence[Tensor],
    write: float,
    pull: float,
    comps: Sequence[Tensor | None] = (),
) -> None:
    """:func:`rules.exchange` of each pair in place, with torch's operations on lists."""
    plain: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for i, (u, v) in enumerate(zip(faster, slower)):
        u, v, comp = local(u), local(v), comps[i] if comps else None
        if comp is not None:
            comp = local(comp)
            joined = rules.kahan_join(u, comp, torch.float32)
            new, kept = rules.exchange(joined, v, write=write, pull=pull)
            rounded, left = rules.kahan_split(new, u.dtype)
            for tensor, value in ((u, rounded), (comp, left), (v, kept)):
                tensor.copy_(value)
            continue
        if u.is_complex():
            u, v = torch.view_as_real(u), torch.view_as_real(v)
        us, vs = plain.setdefault((u.device, u.dtype, v.dtype), ([], []))
        us.append(u)
        vs.append(v)
    rate = pull_after_write(write, pull)
    for (_, u_dtype, v_dtype), (us, vs) in plain.items():
        wide = torch.promote_types(torch.promote_types(u_dtype, v_dtype), torch.float32)
        if u_dtype == v_dtype == wide:
            torch._foreach_lerp_(vs, us, write)
            if rate == 1:
                torch._foreach_copy_(us, vs)
            elif rate:
                torch._foreach_lerp_(us, vs, rate)
            continue
        work_u, work_v = [u.to(wide) for u in us], [v.to(wide) for v in vs]
        new_v = torch._foreach_lerp(work_v, work_u, write)
        if rate:
            new_u = torch._foreach_lerp(work_u, new_v, rate)
            if narrower(v_dtype, u_dtype):
                # What rounds to its copy stays, though it is not the same number.
                new_u = tuple(
                    torch.where(u.to(v_dtype) == v, old, new)
                    for u, v, old, new in zip(us, vs, work_u, new_u)
                )
            torch._foreach_copy_(us, new_u)
        torch._foreach_copy_(vs, new_v)


#: The levels of some tensors, live first, with their settings and, where they have any, Kahan
#: compensations of the live ones.
Chains = tuple[Settings, Sequence[Sequence[Tensor]], Sequence[Tensor | None]]


class Exchanges:
    """Exchanges of whatever tensors, each on the fastest path that serves it.

    The kernels' tables are kept, and made anew when a tensor has moved. They hold addresses, and no
    tensor is kept alive but by a CUDA graph that reads it.
    """

    def __init__(self) -> None:
        self._tables: dict[Any, Any] = {}
        self._plans: dict[Any, _Plan] = {}
        self._all: _Plan | None = None
        self._captured: list[Any] = []

    def forget(self) -> None:
        """Drop the tables; captured graphs keep theirs."""
        self._tables.clear()
        self._plans.clear()
        self._all = None

    def renew(self) -> None:
        """:meth:`on_device` will be given other tensors, or other settings."""
        self._all = None

    def __call__(
        self,
        faster: Sequence[Tensor],
        slower: Sequence[Tensor],
        frequency: int,
        write: float,
        pull: float,
        *,
        comps: Sequence[Tensor | None] = (),
    ) -> None:
        """Apply :func:`rules.exchange` to each pair, in place.

        Args:
            comps: where given, Kahan compensations of the faster tensors (None for those without).
        """
        if not len(faster):
            return
        call = (frequency, write, pull, len(faster), id(slower[0]))
        plan = self._plans.get(call)
        if plan is None or any(c is not None for c in comps) or not plan.holds((faster, slower)):
            settings = Settings((frequency,), (write,), (pull,))
            plan = self._plan([(settings, (faster, slower), comps)])
            if plan.keeps:
                self._plans[call] = plan
        for table in plan.tables:
            table.launch()
        for u, v, own, *_ in plan.left:
            exchange_(u, v, write, pull, own)

    def on_device(
        self,
        chains: Callable[[], Iterable[Chains]],
        count: Tensor,
        found_inf: Tensor | None = None,
    ) -> None:
        """All exchanges that are due at a step whose number the host is not to wait for.

        Args:
            chains: what there is to exchange; asked for where it is not known from the last call.
            count: steps, int64, 0-d.
            found_inf: likewise (optional): nothing is exchanged if it is not 0.
        """
        plan = self._all
        if plan is None or not plan.holds():
            plan = self._plan(list(chains()))
            self._all = plan if plan.keeps else None
        for u, v, comps, frequency, write, pull in plan.left:
            gate: Tensor = torch.remainder(count, frequency) == 0
            if found_inf is not None:
                gate = gate & (found_inf.reshape(()).to(gate.device) == 0)
            exchange_where_(u, v, write, pull, gate, comps)
        for table in plan.tables:
            here = None if found_inf is None else found_inf.to(table.device)
            table.launch_due(count.to(table.device), here)
        if plan.tables and capturing():
            self._captured.append((plan.tables, list(chains())))

    def _plan(self, chains: list[Chains]) -> _Plan:
        left: list[Left] = []
        served: dict[Any, list[list[Tensor]]] = {}
        plain = True
        for settings, levels, comps in chains:
            numbers = list(zip(*settings))
            rest: list[tuple[list[Tensor], list[Tensor], list[Tensor | None]]]
            rest = [([], [], []) for _ in numbers]
            for i, tensors in enumerate(zip(*levels)):
                plain = plain and not any(map(is_dtensor, tensors))
                own = [local(t) for t in tensors]
                comp = comps[i] if comps else None
                first = 0 if comp is None else 1  # with a compensation, the live pair is torch's
                if not _kernels_serve(own[first:]):
                    first = len(numbers)
                for k in range(first):
                    rest[k][0].append(own[k])
                    rest[k][1].append(own[k + 1])
                    rest[k][2].append(comp if k == 0 else None)
                if first < len(numbers):
                    key = own[first].device, own[first].dtype, own[-1].dtype, first, settings
                    columns = served.setdefault(key, [[] for _ in own[first:]])
                    for column, tensor in zip(columns, own[first:]):
                        column.append(tensor)
            left += [(*rest[k], *numbers[k]) for k in range(len(numbers)) if rest[k][0]]
        tables = []
        for key, columns in served.items():
            first, settings = key[-2:]
            steps = zip(settings.write, settings.pull, settings.frequencies)
            rates = [(w, pull_after_write(w, p), f) for w, p, f in list(steps)[first:]]
            tables.append(self._table(key, columns, rates))
        everything = [levels for _, levels, _ in chains]
        return _Plan(list(chain.from_iterable(everything)), tables, left, plain and not left)

    def _table(
        self, bucket: Any, levels: list[list[Tensor]], numbers: list[tuple[float, float, int]]
    ) -> Any:
        key = (*bucket, len(levels[0]), id(levels[1][0]))
        addresses = [(t.data_ptr(), t.numel()) for t in chain(*levels)]
        known = self._tables.get(key)
        if known is None or known[0] != addresses:
            from .kernels.exchange import ExchangeTable  # Triton is there

            table = ExchangeTable(levels, numbers)
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
                self._plans.clear()
            known = self._tables[key] = (addresses, table)
        return known[1]


#: What torch's operations exchange: pairs, compensations, frequency, write and pull.
Left = tuple[list[Tensor], list[Tensor], list["Tensor | None"], int, float, float]


class _Plan:
    """What a call does with its tensors; it serves further ones if it ``keeps``, while it holds."""

    def __init__(
        self, levels: list[Sequence[Tensor]], tables: list[Any], left: list[Left], keeps: bool
    ) -> None:
        self.tables, self.left, self.keeps = tables, left, keeps
        if keeps:
            self._members = [weakref.ref(t) for t in chain(*levels)]
            self._addresses, self._layouts = _where(list(chain(*levels)))

    def holds(self, levels: Sequence[Sequence[Tensor]] | None = None) -> bool:
        """Whether the tensors (these, if they are given) are where they were and laid out alike."""
        tensors = [member() for member in self._members]
        if levels is not None and not all(map(is_, chain(*levels), tensors)):
            return False
        if any(t is None for t in tensors):
            return False
        return _where(tensors) == (self._addresses, self._layouts)


def _where(tensors: list[Any]) -> tuple[list[int], list[bool]]:
    return list(map(Tensor.data_ptr, tensors)), list(map(Tensor.is_contiguous, tensors))


def _kernels_serve(levels: Sequence[Tensor]) -> bool:
    """Whether all are walked through memory in one and the same order."""
    dtypes = {t.dtype for t in levels[1:]}
    if not kernels.available(levels[0].device) or len(dtypes) != 1:
        return False
    if not {levels[0].dtype, *dtypes} <= set(kernels.DTYPES):
        return False
    if all(t.is_contiguous() for t in levels):
        return True
    format = torch.channels_last
    return levels[0].ndim == 4 and all(t.is_contiguous(memory_format=format) for t in levels)


def exchange_where_(
    faster: Sequence[Tensor],
    slower: Sequence[Tensor],
    write: float,
    pull: float,
    gate: Tensor,
    comps: Sequence[Tensor | None] = (),
) -> None:
    """The same where ``gate`` (bool, 0-d, on a device that the host is not to wait for) is true."""
    olds = [[t.clone() for t in tensors if t is not None] for tensors in (faster, slower, comps)]
    exchange_(faster, slower, write, pull, comps)
    for tensors, old in zip((faster, slower, comps), olds):
        for tensor, before in zip((t for t in tensors if t is not None), old):
            here = local(tensor)
            here.copy_(torch.where(gate.to(here.device), here, local(before)))
