"""WeightMemory: slow copies of the weights that exchange with them, for any torch optimizer."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .exchanges import Exchanges, Settings, check_settings
from .fused import JoinedExchange
from .joined import ask, withdraw
from .memory_buffers import BUFFERS, BufferAverages
from .memory_checkpoints import Loading, look_at, restore_copies, restore_settings, take_over
from .memory_levels import (
    COUNT,
    PRESETS,
    Default,
    dtype_name,
    group_label,
    is_memory_key,
    is_probe,
    level_key,
    make_copy,
    resolve_level,
)
from .memory_reading import read_params, refusing, swapped
from .memory_settings import GroupSettings
from .tensors import capturing

_FREQUENCIES, _RATES = Default((10, 50)), Default((0.5, 0.5))


class WeightMemory:
    """A continuum memory over the weights: levels of slow copies that exchange with the live ones.

    Attached to an optimizer, it keeps for every parameter the copies u_1, u_2, ... beside the live
    weights u_0, each with a frequency in optimizer steps. After a step whose number is a multiple
    of ``frequencies[k]``, levels k and k + 1 exchange, the fastest pair first::

        d = u[k+1] - u[k];   u[k] += pull[k] * d;   u[k+1] -= write[k] * d

    It works with any ``torch.optim.Optimizer``, through its public hooks. The chain of levels with
    knowledge transfer is that of *Nested Learning* (arXiv 2512.24695, Eq. 70-74), here over the
    weights; with ``write = pull`` it is the cascade of Benna and Fusi (Nature Neuroscience 2016).
    One level with ``write = a, pull = 1 - a`` is Lookahead (Zhang et al. 2019); with ``pull = 0``
    and frequency 1 an exponential moving average of decay ``1 - write``.

    A copy is made right before the first step that moves its parameter. Steps count for all
    parameters alike, whether or not they had a gradient; one that ``torch.amp.GradScaler`` skips
    does not count. All state lies in the optimizer's ``state`` (``memory_count``, ``memory_1``,
    ``memory_2``, ...) and in ``param_groups``, so ``optimizer.state_dict()`` holds it and
    ``load_state_dict`` brings it back; attach a memory before loading (torch rounds what it does
    not know; where that has cost something, attaching afterwards is refused). A checkpoint without
    it is loaded as well, and the copies are made anew by the next step. Pickles and deep copies of
    an optimizer keep the state, but not the attached memory: attach one to the copy.

    Args:
        optimizer: the optimizer; wrappers (as Accelerate's) are looked through.
        frequencies: steps between two exchanges of each pair, fastest pair first. Default (10, 50),
            or a preset's.
        write: per level, how far the slower copy goes to the faster weights. One number serves all
            levels. Default 0.5 for each, or a preset's.
        pull: per level, how far the faster weights go to the slower copy; ``write + pull <= 1``.
            Default 0.5 for each, or a preset's.
        dtype: of the copies. Default: the parameter's, but at least float32. With ``bfloat16`` they
            take half the memory, and small writes are lost to rounding.
        buffers_from: the module whose floating-point buffers (BatchNorm's statistics) are averaged
            too: they are written, but never pulled, with the frequencies and rates of the first
            group that has any. :meth:`read_out` then swaps them together with the weights.
        preset: ``"continual"`` (for streams without replay) or ``"replay"``: settings for what is
            not given above, and what :meth:`read_out` reads by default. Its rates are those of two
            levels: with another number of frequencies, give ``write`` and ``pull`` too.
        capturable: count steps on the accelerator from the start, for CUDA graphs. Default: if a
            group of the optimizer is ``capturable``.

    A group's own ``memory_frequencies``, ``memory_write``, ``memory_pull`` and ``memory_dtype``
    come before these, and may be edited in ``param_groups`` at any time; ``memory_frequencies=()``
    switches a group off and frees its copies.

    Raises:
        TypeError: no ``torch.optim.Optimizer``.
        ValueError: a setting is invalid (with the group's name), the optimizer has a memory, or its
            state has one that was loaded without this class and rounded.

    Example::

        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> memory = WeightMemory(optimizer, frequencies=(10, 50))
        >>> model(torch.randn(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> with memory.read_out(level=-1):  # evaluate the slowest copy
        ...     loss = model(torch.randn(8, 4)).sum()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        frequencies: Sequence[int] | None = _FREQUENCIES,
        write: float | Sequence[float] | None = _RATES,
        pull: float | Sequence[float] | None = _RATES,
        *,
        dtype: torch.dtype | str | None = None,
        buffers_from: nn.Module | None = None,
        preset: str | None = None,
        capturable: bool | None = None,
    ) -> None:
        while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "WeightMemory attaches to a torch.optim.Optimizer, but got "
                f"{type(optimizer).__name__}"
            )
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, but is {preset!r}")
        if memory_of(optimizer) is not None:
            raise ValueError(
                f"this {type(optimizer).__name__} has a WeightMemory already: detach() it first"
            )
        base = PRESETS[preset][:3] if preset is not None else ((10, 50), 0.5, 0.5)
        given = [None if isinstance(x, Default) else x for x in (frequencies, write, pull)]
        chosen = [b if g is None else g for g, b in zip(given, base)]
        own = check_settings(chosen[0], chosen[1], chosen[2])
        # Rates that are the same for all levels also serve groups with another number of levels.
        rates = [r[0] if len(set(r)) == 1 else r for r in own[1:]]
        defaults: dict[str, Any] = {
            "memory_frequencies": own.frequencies,
            "memory_write": rates[0],
            "memory_pull": rates[1],
            "memory_dtype": None if dtype is None else dtype_name(dtype),
        }
        self._read = PRESETS[preset].read if preset is not None else -1
        self.optimizer = optimizer
        self._capturable = capturable
        self._buffers = BufferAverages(buffers_from, optimizer)
        self._settings = GroupSettings(optimizer, defaults)
        self._pending: dict[Tensor, dict[str, Tensor]] = {}
        self._params: list[Tensor] = []
        self._seen: list[Any] = []
        self._count: Tensor | None = None
        self._run = Exchanges()
        self._joined: JoinedExchange | None = None
        self._probe = False
        self._settled = False  # whether what follows is true of the optimizer
        #: Parameters without a copy, which have had no gradient: the keys they lack, and the dtype.
        self._waiting: dict[Tensor, tuple[list[str], str | None]] = {}
        #: By key the copies in the optimizer's state, in its order.
        self._held: dict[str, list[Callable[[], Tensor | None]]] = {}
        self._reading = False
        self._loading: Loading | None = None

        found = [self._settings.of(i, g) for i, g in enumerate(optimizer.param_groups)]
        if buffers_from is not None and not any(settings.levels for settings in found):
            raise ValueError("buffers_from needs frequencies: there is no level to average them in")
        self._buffers.follow(found)
        take_over(optimizer, found, self._settings.defaults["memory_dtype"])
        self._settings.write(list(zip(optimizer.param_groups, found)))
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(self._before_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def detach(self) -> None:
        """Leave the optimizer: no more exchanges, and copies and settings are removed.

        Options that a group had before the memory stay. There is nothing to read out any more.
        """
        self._refuse_while_reading("detach()")
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._settings.remove()
        for group in self.optimizer.param_groups:
            group.pop(BUFFERS, None)
            for p in group["params"]:
                state = self.optimizer.state.get(p, {})
                for key in list(filter(is_memory_key, state)):
                    del state[key]
        self._let_go()

    def _let_go(self) -> None:
        """Keep nothing of copies that the optimizer's state no longer has."""
        self._pending, self._waiting, self._held = {}, {}, {}
        self._settled, self._count, self._joined = False, None, None
        self._run.forget()
        if (fused := withdraw(self.optimizer)) is not None:
            fused.forget()  # it remembers what the state was

    def __reduce__(self) -> Any:
        raise TypeError(
            "a WeightMemory is neither copied nor pickled: the copies of the weights lie in its "
            "optimizer's state. Copy that, and attach a WeightMemory to the copy"
        )

    def _refuse_if_detached(self, what: str) -> None:
        if not self._handles:
            raise RuntimeError(
                f"{what}: this WeightMemory was detached, and its copies are gone; attach a new one"
            )

    # ------------------------------------------------------------------ steps

    @torch._disable_dynamo
    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._refuse_while_reading("optimizer.step()")
        params = [p for group in optimizer.param_groups for p in group["params"]]
        same = len(params) == len(self._params) and all(map(is_, params, self._params))
        closure = any(map(callable, (*args[1:], *kwargs.values())))
        if same and self._settled and self._settings.raw() == self._seen and self._intact():
            self._pending = {
                p: self._copies(p, keys, dtype)
                for p, (keys, dtype) in self._waiting.items()
                if p.grad is not None or (closure and p.requires_grad)
            }
            self._joined = ask(optimizer, self._count, self._settings.all())
        else:
            self._look_again(params, closure)

    def _look_again(self, params: list[Tensor], closure: bool) -> None:
        """Make what copies are lacking: at first, and where settings or state have changed."""
        optimizer = self.optimizer
        groups = self._settings.all()  # all of them are checked before anything changes
        pending: dict[Tensor, dict[str, Tensor]] = {}
        work = []
        known = False
        for group, settings in groups:
            fresh = []
            for i, p in enumerate(group["params"]):
                state = optimizer.state.get(p, {})
                known = known or COUNT in state
                for key in settings.keys:
                    if key in state and state[key].shape != p.shape:
                        raise RuntimeError(
                            f"parameter {i} of the group {group.get('name', '')!r} has shape "
                            f"{tuple(p.shape)}, but its copy {key!r} has {tuple(state[key].shape)}:"
                            " delete that entry of the optimizer's state to begin anew"
                        )
                lacking = [key for key in settings.keys if key not in state]
                if lacking and (p.grad is not None or (closure and p.requires_grad)):
                    dtype = group.get("memory_dtype", self._settings.defaults["memory_dtype"])
                    pending[p] = self._copies(p, lacking, dtype)
                    fresh.append(p)
            work.append((group, fresh, [p.grad for p in fresh]))
        self._settings.write(groups)
        self._buffers.follow(settings for _, settings in groups)
        self._buffers.make()
        withdraw(optimizer)
        self._run.forget()
        self._joined = None
        self._params, self._seen = params, self._settings.raw()
        self._pending, self._settled = pending, False
        self._probe = bool(pending) and not (known or closure) and is_probe(work)

    def _copies(self, p: Tensor, keys: list[str], dtype: str | None) -> dict[str, Tensor]:
        comp = self.optimizer.state.get(p, {}).get("kahan_comp")
        return {key: make_copy(p, dtype, comp) for key in keys}

    def _intact(self) -> bool:
        """Whether every copy is where it was: nobody has cleared, filled or replaced a state."""
        entries = [own for own in self.optimizer.state.values() if isinstance(own, dict)]
        return all(
            len(entries) == len(copies)
            and all(map(is_, [own.get(key) for own in entries], [copy() for copy in copies]))
            for key, copies in self._held.items()
        )

    @torch._disable_dynamo
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        state = optimizer.state
        if not self._settled or any(p.grad is not None or state.get(p) for p in self._pending):
            self._adopt()
        self._pending = {}
        if self._probe or self._count is None:
            self._probe = False
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.is_cpu:
            if found_inf.item():
                return
            found_inf = None
        if self._count.is_cpu and found_inf is None and not capturing():
            self._count += 1
            self._exchange(int(self._count))
        else:
            self._exchange_on_device(found_inf)

    def _adopt(self) -> None:
        """Hand the new copies to the state that the optimizer has made, and one counter for all."""
        state = self.optimizer.state
        pending, self._pending = self._pending, {}
        for p, copies in pending.items():
            # torch takes a parameter with any state for one that it has initialised.
            if p.grad is not None or state.get(p):
                state[p].update(copies)
        self._run.renew()
        self._count = None
        self._waiting = {}
        on_device = None
        members = []
        slow: set[str] = set()
        for group, settings in self._settings.all():
            for p in group["params"]:
                own = state.get(p, {})
                slow.update(settings.keys)
                kept = (COUNT, *settings.keys) if settings.levels else ()
                for key in [k for k in own if is_memory_key(k) and k not in kept]:
                    del own[key]
                if lacking := [key for key in settings.keys if key not in own]:
                    self._waiting[p] = lacking, group["memory_dtype"]
                if settings.levels and settings.keys[0] in own:
                    members.append(own)
                    self._count = own.get(COUNT) if self._count is None else self._count
                    if self._capturable or (self._capturable is None and group.get("capturable")):
                        on_device = on_device or p.device
        if members and self._count is None:
            self._count = torch.zeros((), dtype=torch.int64)
        if self._count is not None and on_device is not None and self._count.is_cpu:
            self._count = self._count.to(on_device)
        for own in members:
            own[COUNT] = self._count
        entries = [own for own in state.values() if isinstance(own, dict)]
        self._held = {key: [_reference(own.get(key)) for own in entries] for key in slow}
        # Before there is any copy, the step to come may still only serve to create state.
        self._settled = self._count is not None or not self._waiting

    def _pairs(self) -> Iterator[tuple[Settings, list[list[Tensor]], list[Tensor | None]]]:
        """Per setting the levels of its parameters (live first), and Kahan compensations."""
        state = self.optimizer.state
        found: dict[Settings, tuple[list[list[Tensor]], list[Tensor | None]]] = {}
        for group, settings in self._settings.all():
            if not settings.levels:
                continue
            keys = settings.keys
            levels, comps = found.setdefault(settings, ([[] for _ in range(len(keys) + 1)], []))
            for p in group["params"]:
                own = state.get(p, {})
                if keys[-1] in own:
                    levels[0].append(p)
                    comps.append(own.get("kahan_comp"))
                    for level, key in zip(levels[1:], keys):
                        level.append(own[key])
        for settings, (levels, comps) in found.items():
            yield settings, levels, comps

    def _exchange(self, count: int) -> None:
        """The exchanges that are due after step ``count``, fastest pair first."""
        if not any(count % f == 0 for options in self._seen for f in options[0] or ()):
            return
        done = self._joined.done if self._joined is not None else ()
        for settings, levels, comps in self._pairs():
            for k, (frequency, write, pull) in enumerate(zip(*settings)):
                if count % frequency == 0:
                    u, v = levels[k], levels[k + 1]
                    own = comps if k == 0 else []
                    if k == 0 and done:
                        left = [i for i, p in enumerate(u) if p not in done]
                        u, v = [u[i] for i in left], [v[i] for i in left]
                        own = [comps[i] for i in left]
                    self._run(u, v, frequency, write, pull, comps=own)
        self._buffers.exchange(count)

    def _exchange_on_device(self, found_inf: Tensor | None) -> None:
        """The same where the host must not look at the counter, or at ``found_inf``."""
        assert self._count is not None
        if self._count.is_cpu:
            if capturing():
                raise RuntimeError(
                    "this WeightMemory counts steps on the host, which a CUDA graph cannot do: "
                    "attach it with capturable=True"
                )
            device = found_inf.device if found_inf is not None else self._params[0].device
            self._count = self._count.to(device)
            for p in self._params:
                if COUNT in self.optimizer.state.get(p, {}):
                    self.optimizer.state[p][COUNT] = self._count
        happened = None
        if found_inf is not None:
            found_inf = found_inf.reshape(()).to(self._count.device)
            happened = found_inf == 0
        self._count += 1 if happened is None else happened
        self._run.on_device(self._pairs, self._count, found_inf)
        self._buffers.exchange_on_device(self._count, happened)

    # ------------------------------------------------------------------ reading out

    def weights(self, level: int = -1) -> list[Tensor]:
        """The weights of one level, in the order of the optimizer's parameters.

        Args:
            level: 0 for the live weights, 1, 2, ... for the slow copies, -1 for a group's slowest.

        Returns:
            The tensors themselves, not copies of them. Where a parameter has no copy (its group is
            switched off, or no step has moved it) it is the parameter.

        Raises:
            ValueError: a group has no such level.
            RuntimeError: the memory was detached, and these are not the live weights.
        """
        if level != 0:
            self._refuse_if_detached(f"weights({level!r})")
        found = []
        for at, (group, settings) in enumerate(self._settings.all()):
            level_here = resolve_level(level, settings.levels, group_label(at, group))
            key = level_key(level_here)
            for p in group["params"]:
                own = self.optimizer.state.get(p, {})
                found.append(own.get(key, p) if level_here else p)
        return found

    @contextmanager
    def read_out(
        self,
        level: int | str | Sequence[float] | None = None,
        *,
        update_bn: Iterable[Any] | None = None,
        device: torch.device | int | None = None,
    ) -> Iterator[WeightMemory]:
        """Put read-out weights in the parameters for the body; then the live ones come back.

        They come back, bit for bit, if the body raises, too. In the body the optimizer refuses
        ``step()``, ``state_dict()``, ``load_state_dict()``, ``add_param_group()`` and, where it has
        them, ``flush()`` and ``meta_update()``. The model's own ``state_dict()`` shares the
        parameters' memory, so it is the read-out in the body only: see :meth:`model_state_dict`.

        Args:
            level: 0 for the live weights, 1, 2, ... for the slow copies, -1 for the slowest,
                ``"mean"`` for the mean of all levels, the live one among them, or one weight per
                level, live first, that sum to 1. Default: the slowest, or what the preset says.
            update_bn: a loader of inputs from which BatchNorm's statistics are computed anew for
                the read-out weights (``torch.optim.swa_utils.update_bn``). Needs ``buffers_from``;
                the live statistics come back with the weights.
            device: where ``update_bn`` takes its inputs to.

        Raises:
            ValueError: a group has no such level, or the weights do not sum to 1.
            RuntimeError: inside another ``read_out``, or the memory was detached.
        """
        model = self._buffers.model
        if update_bn is not None and model is None:
            raise ValueError("update_bn needs the model: attach the memory with buffers_from=model")
        with self._reading_out(level, model, update_bn, device):
            yield self

    def model_state_dict(
        self,
        model: nn.Module,
        level: int | str | Sequence[float] | None = None,
        *,
        update_bn: Iterable[Any] | None = None,
        device: torch.device | int | None = None,
    ) -> OrderedDict[str, Any]:
        """``model.state_dict()`` with the weights of :meth:`read_out`, in memory of its own.

        Args:
            model: the module whose parameters the optimizer has.
            level: as for :meth:`read_out`.
            update_bn: a loader of inputs, from which the statistics of the model's BatchNorms are
                computed anew for these weights. The model itself keeps those that it has.
            device: where ``update_bn`` takes its inputs to.
        """
        with self._reading_out(level, model, update_bn, device):
            return OrderedDict(
                (key, value.detach().clone() if isinstance(value, Tensor) else value)
                for key, value in model.state_dict().items()
            )

    def average_buffers(
        self, level: int | str | Sequence[float] | None = None
    ) -> OrderedDict[str, Tensor]:
        """The averages of the buffers of ``buffers_from``, by the buffers' names.

        They come without a pass over data, as :meth:`read_out` puts them in the module; statistics
        computed anew (its ``update_bn``) fit the weights better. Before the first step these are
        the live buffers.

        Args:
            level: as for :meth:`read_out`.

        Returns:
            Copies: to change them changes nothing.

        Raises:
            ValueError: the memory was attached without ``buffers_from``, or has no such level.
        """
        if self._buffers.model is None:
            raise ValueError("no buffers are averaged: attach the memory with buffers_from=model")
        self._refuse_if_detached("average_buffers()")
        self._buffers.follow(settings for _, settings in self._settings.all())
        with torch.no_grad():
            return self._buffers.named(self._read if level is None else level)

    @contextmanager
    def _reading_out(
        self, level: Any, model: nn.Module | None, update_bn: Any, device: Any
    ) -> Iterator[None]:
        self._refuse_while_reading("read_out()")
        self._refuse_if_detached("read_out()")
        level = self._read if level is None else level
        self._buffers.follow(settings for _, settings in self._settings.all())
        with torch.no_grad():
            swaps = read_params(self.optimizer, self._settings.all(), level) + self._buffers.read(
                level
            )
        self._reading = True
        try:
            refused = refusing(self.optimizer, self._refuse_while_reading)
            with refused, swapped(swaps, model, update_bn, device):
                yield
        finally:
            self._reading = False

    def _refuse_while_reading(self, what: str) -> None:
        if self._reading:
            raise RuntimeError(
                f"{what} inside read_out() would work on the read-out weights as if they were the "
                "live ones: leave the `with` block first"
            )

    # ------------------------------------------------------------------ checkpoints

    def _before_state_dict(self, optimizer: Optimizer) -> None:
        self._refuse_while_reading("optimizer.state_dict()")

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._refuse_while_reading("optimizer.load_state_dict()")
        self._loading = None
        loading = look_at(optimizer, state_dict, self._settings.of)
        self._buffers.check(loading.rows, loading.settings)
        self._loading = loading

    @torch.no_grad()
    def _after_load(self, optimizer: Optimizer) -> None:
        loading, self._loading = self._loading, None
        if loading is not None:
            restore_settings(optimizer, loading)
        self._settings.write(self._settings.all())
        if loading is not None:
            restore_copies(optimizer, loading)
        self._buffers.settle(loaded=loading is not None and loading.rows is not None)
        self._buffers.follow(settings for _, settings in self._settings.all())
        self._let_go()


def _reference(copy: Tensor | None) -> Callable[[], Tensor | None]:
    """What gives this very copy for as long as others keep it."""
    return (lambda: None) if copy is None else weakref.ref(copy)


def memory_of(optimizer: Optimizer) -> WeightMemory | None:
    """The memory that is attached to an optimizer, if there is one."""
    for hook in optimizer._optimizer_step_post_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, WeightMemory):
            return owner
    return None
