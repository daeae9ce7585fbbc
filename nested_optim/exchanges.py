"""The exchange of weight levels on lists of tensors: in place, on whatever path is fastest."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels, rules
from .levels import check_frequency
from .rules.exchange import pull_after_write
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
            torch._foreach_copy_(us, torch._foreach_lerp(work_u, new_v, rate))
        torch._foreach_copy_(vs, new_v)


class Exchanges:
    """Exchanges of whatever tensors, each on the fastest path that serves it.

    The kernels' tables are kept, and made anew when a tensor has moved. They hold addresses, and no
    tensor is kept alive but by a CUDA graph that reads it.
    """

    def __init__(self) -> None:
        self._tables: dict[Any, Any] = {}
        self._plans: dict[Any, _Plan] = {}
        self._captured: list[Any] = []

    def forget(self) -> None:
        """Drop the tables; captured graphs keep theirs."""
        self._tables.clear()
        self._plans.clear()

    def __call__(
        self,
        faster: Sequence[Tensor],
        slower: Sequence[Tensor],
        frequency: int,
        write: float,
        pull: float,
        *,
        comps: Sequence[Tensor | None] = (),
        count: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Apply :func:`rules.exchange` to each pair, in place.

        Args:
            comps: where given, Kahan compensations of the faster tensors (None for those without).
            count: steps, int64, 0-d, on a device that the host is not to wait for; then only if it
                is a multiple of ``frequency`` and ``found_inf`` (likewise, optional) is 0.
        """
        if not len(faster):
            return
        call = (frequency, write, pull, len(faster), id(slower[0]))
        plan = self._plans.get(call)
        if plan is None or not plan.fits(faster, slower, comps):
            plan = self._plan(faster, slower, comps, frequency, write, pull)
            if plan.keeps:
                self._plans[call] = plan
        for table in plan.tables:
            if count is not None:
                count_here = count.to(table.device)
                skipped = found_inf.to(table.device) if found_inf is not None else None
                table.launch(count_here, skipped)
            else:
                table.launch()
        if plan.tables and capturing():
            self._captured.append((plan.tables, list(faster), list(slower)))
        left = plan.left
        if not left[0]:
            return
        if count is None:
            exchange_(left[0], left[1], write, pull, left[2])
        else:
            gate: Tensor = torch.remainder(count, frequency) == 0
            if found_inf is not None:
                gate = gate & (found_inf.reshape(()).to(gate.device) == 0)
            exchange_where_(left[0], left[1], write, pull, gate, left[2])

    def _plan(
        self,
        faster: Sequence[Tensor],
        slower: Sequence[Tensor],
        comps: Sequence[Tensor | None],
        frequency: int,
        write: float,
        pull: float,
    ) -> _Plan:
        left: tuple[list[Tensor], list[Tensor], list[Tensor | None]] = ([], [], [])
        served: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        plain = True
        for i, (u, v) in enumerate(zip(faster, slower)):
            plain = plain and not (is_dtensor(u) or is_dtensor(v))
            u, v, comp = local(u), local(v), comps[i] if comps else None
            if comp is None and _kernels_serve(u, v):
                us, vs = served.setdefault((u.device, u.dtype, v.dtype), ([], []))
                us.append(u)
                vs.append(v)
            else:
                left[0].append(u)
                left[1].append(v)
                left[2].append(comp)
        tables = []
        for bucket, (us, vs) in served.items():
            key = (*bucket, frequency, write, pull, len(us), id(vs[0]))
            tables.append(self._table(key, us, vs, frequency, write, pull))
        return _Plan(list(faster), list(slower), tables, left, plain and not left[0])

    def _table(
        self,
        key: Any,
        us: list[Tensor],
        vs: list[Tensor],
        frequency: int,
        write: float,
        pull: float,
    ) -> Any:
        addresses = [(t.data_ptr(), t.numel()) for t in chain(us, vs)]
        known = self._tables.get(key)
        if known is None or known[0] != addresses:
            from .kernels.exchange import ExchangeTable  # Triton is there

            table = ExchangeTable(us, vs, write, pull_after_write(write, pull), frequency)
            if len(self._tables) >= _MAX_TABLES:
                self.forget()
            known = self._tables[key] = (addresses, table)
        return known[1]


class _Plan:
    """What one call does with its tensors; it serves further ones while ``keeps`` and they fit."""

    def __init__(
        self,
        faster: list[Tensor],
        slower: list[Tensor],
        tables: list[Any],
        left: tuple[list[Tensor], list[Tensor], list[Tensor | None]],
        keeps: bool,
    ) -> None:
        self.tables, self.left, self.keeps = tables, left, keeps
        if keeps:
            self._members = [weakref.ref(t) for t in chain(faster, slower)]
            self._memory = list(map(_where, chain(faster, slower)))

    def fits(
        self, faster: Sequence[Tensor], slower: Sequence[Tensor], comps: Sequence[Tensor | None]
    ) -> bool:
        """Whether these are the same tensors, where they were and laid out as they were."""
        return (
            not any(c is not None for c in comps)
            and all(map(is_, chain(faster, slower), (member() for member in self._members)))
            and list(map(_where, chain(faster, slower))) == self._memory
        )


def _where(tensor: Tensor) -> tuple[int, torch.dtype, bool]:
    return tensor.data_ptr(), tensor.dtype, tensor.is_contiguous()


def _kernels_serve(u: Tensor, v: Tensor) -> bool:
    """Whether both are walked through memory in one and the same order."""
    if not kernels.available(u.device) or not {u.dtype, v.dtype} <= set(kernels.DTYPES):
        return False
    if u.is_contiguous() and v.is_contiguous():
        return True
    format = torch.channels_last
    return u.ndim == 4 and all(t.is_contiguous(memory_format=format) for t in (u, v))


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
