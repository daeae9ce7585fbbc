"""The inputs of layers, gathered while their gradients are: what Delta Gradient Descent needs.

A :class:`Capture` belongs to one optimizer. It puts a forward hook on each layer whose weight the
optimizer wants inputs for. The hook saves the layer's input the way autograd saves tensors (so
activation checkpointing and offloading treat it as they treat the layer's own) and watches the
layer's node in the graph. When the backward pass comes by there, rows of the input are *staged*;
when the gradient reaches the weight's ``grad``, they are *committed*. So what is committed belongs
to what ``grad`` holds: a forward pass that is only recomputed counts once, and a gradient that goes
elsewhere (``torch.autograd.grad``) not at all.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .samples import Sample, smallest, stream_keys, stream_seed, thinned

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

#: Choices of rows that a capture keeps for other layers: more than any step has kinds of.
_MAX_CHOICES = 64


class Owner(Protocol):
    """The optimizer, as its capture sees it."""

    def _wants_inputs(self, weight: Tensor) -> bool:
        """Whether inputs of this weight's layers are of use."""

    def _sample_plan(self, weight: Tensor) -> tuple[int, tuple[int, ...]]:
        """How many rows to keep until the next step, and the numbers that seed their choice."""


@dataclass(frozen=True)
class Layout:
    """How a layer's weight is the matrix ``W`` of ``y = W x``."""

    transposed: bool = False

    def matrix(self, tensor: Tensor) -> Tensor:
        """``(outputs, inputs)``, for the weight or a tensor like it."""
        return tensor.t() if self.transposed else tensor.flatten(1)

    def unmatrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        return matrix.t() if self.transposed else matrix.reshape(weight.shape)

    def features(self, weight: Tensor) -> int:
        """The length of ``x``."""
        return weight.shape[0] if self.transposed else math.prod(weight.shape[1:])


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a layer whose inputs can be captured; None for any other module.

    These are ``nn.Linear``, Hugging Face's ``Conv1D`` (a linear layer with its weight transposed),
    and ``nn.Conv1d`` to ``nn.Conv3d`` without groups.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention reads its weight and never calls it
    if isinstance(module, nn.Linear):
        return Layout()
    if isinstance(module, _CONVOLUTIONS):
        return Layout() if module.groups == 1 else None
    if hasattr(module, "nf") and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__):
        return Layout(transposed=True)
    return None


class Capture:
    """Inputs of a model's layers since their weights' gradients were last used or cleared.

    Args:
        owner: the optimizer; only weakly referenced.
        model: its layers are watched until :meth:`remove`, or until the capture is gone.
        process_group: ranks whose gradients are averaged. None means that of the
            ``DistributedDataParallel`` around the model, as soon as it is seen.
    """

    def __init__(self, owner: Owner, model: nn.Module, process_group: Any = None) -> None:
        self.model = model
        self.process_group = process_group
        #: Weights whose inputs are captured, and how each is a matrix.
        self.layouts: dict[Tensor, Layout] = {}
        #: All parameters of the model.
        self.members: set[Tensor] = set()
        self._owner = weakref.ref(owner)
        self._pools: dict[Tensor, _Pool] = {}
        self._choices: dict[Any, tuple[Tensor, Tensor]] = {}
        self._modules: dict[nn.Module, Layout] = {}
        self._handles: list[RemovableHandle] = []
        # A tensor that needs a gradient, or autograd would save nothing.
        self._anchor = torch.zeros((), requires_grad=True)
        weakref.finalize(self, _remove, self._handles).atexit = False
        self.survey()

    def survey(self) -> None:
        """Find the model's layers (again), and watch those that are not watched yet."""
        claims: dict[Tensor, list[Layout | None]] = {}
        for module in self.model.modules():
            layout = layout_of(module)
            for name, param in module._parameters.items():
                if param is not None:
                    claims.setdefault(param, []).append(layout if name == "weight" else None)
            if layout is not None and module._parameters.get("weight") is not None:
                if module not in self._modules:
                    hook = _ForwardHook(self)
                    self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
                self._modules[module] = layout
            if isinstance(module, DistributedDataParallel) and self.process_group is None:
                self.process_group = module.process_group
        self.members = set(claims)
        # A weight that other modules use in ways not seen here has inputs that are not seen here.
        self.layouts = {
            param: found[0]
            for param, found in claims.items()
            if found[0] is not None and all(layout == found[0] for layout in found)
        }

    def remove(self) -> None:
        """Take all hooks off the model and forget all inputs."""
        _remove(self._handles)
        self._modules.clear()
        self._pools.clear()
        self._choices.clear()

    def clear(self, weights: Iterable[Tensor] | None = None) -> None:
        """Forget the inputs of these weights, or of all."""
        if weights is None:
            self._choices.clear()
        for pool in self._pools.values() if weights is None else map(self._pools.get, weights):
            if pool is not None:
                pool.clear()

    def arrived(self, weight: Tensor) -> bool:
        """Whether a layer of this weight has sent inputs (none at all, if its batch was empty)."""
        pool = self._pools.get(weight)
        return pool is not None and pool.arrived

    def any_arrived(self) -> bool:
        """Whether any layer has sent inputs."""
        return any(pool.arrived for pool in self._pools.values())

    def ranks(self) -> int:
        """How many ranks average their gradients."""
        return 1 if self.process_group is None else dist.get_world_size(self.process_group)

    def take(self, weight: Tensor, keyed: bool) -> Sample:
        """The committed inputs of a weight, which are forgotten; ``keyed`` if keys are needed."""
        pool = self._pools.get(weight)
        if pool is None or not pool.parts:
            features = self.layouts[weight].features(weight)
            nothing = torch.zeros(0, dtype=torch.int64, device=weight.device)
            return Sample(weight.detach().new_zeros(0, features), nothing, 0)
        sample = pool.sample(keyed)
        pool.clear()
        return sample

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """What the forward hook of a layer does."""
        if not (torch.is_grad_enabled() and module.training and module in self._modules):
            return
        weight: Any = module.weight
        owner = self._owner()
        if owner is None or weight not in self.layouts or not weight.requires_grad:
            return
        if not owner._wants_inputs(weight):
            return
        x = args[0] if args else next(iter(kwargs.values()), None)
        use = _Use.of(module, self._modules[module], x, output)
        if use is None or not isinstance(x, Tensor):
            return
        if self.process_group is None:
            around = getattr(DistributedDataParallel, "_active_ddp_module", None)
            self.process_group = around.process_group if around is not None else None

        pool = self._pools.get(weight)
        if pool is None:
            pool = self._pools[weight] = _Pool()
            commit = _Commit(weakref.ref(pool))
            self._handles.append(weight.register_post_accumulate_grad_hook(commit))
        # Not its node alone: some releases of torch free what a node saved with its output.
        saved = _Saved.apply(self._anchor, x.detach())
        output.grad_fn.register_prehook(_Arrival(weakref.ref(self), weight, use, saved))

    def _stage(self, weight: Tensor, use: _Use, x: Tensor) -> None:
        owner, pool = self._owner(), self._pools.get(weight)
        if owner is None or pool is None or not owner._wants_inputs(weight):
            return
        if weight.grad is None:
            pool.clear(staged=False)  # the gradient that those inputs belonged to was thrown away
        if pool.seed is None:
            pool.capacity, numbers = owner._sample_plan(weight)
            group = self.process_group
            rank = 0 if group is None else dist.get_rank(group)
            pool.seed = stream_seed(*numbers, rank)
        pool.stage(use, x, self._chosen)

    def _chosen(
        self, seed: int, start: int, count: int, size: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Which ``size`` of ``count`` rows to keep, and their keys.

        Layers of one seed that see as many inputs keep the same places, so most layers of a step
        share one choice. On a device it belongs to the stream that made it.
        """
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        name = (seed, start, count, size, device, stream)
        found = self._choices.get(name)
        if found is None:
            keys = stream_keys(seed, start, count, device)
            index = smallest(keys, size)
            found = (index, keys[index])
            if len(self._choices) >= _MAX_CHOICES:
                self._choices.clear()
            self._choices[name] = found
        return found


class _ForwardHook:
    """Tells its capture of a forward pass, if that still lives. A copy tells nobody."""

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = None if capture is None else weakref.ref(capture)

    @torch._disable_dynamo
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        capture = None if self._capture is None else self._capture()
        if capture is not None:
            capture._see(module, args, kwargs, output)

    def __reduce__(self) -> Any:  # copy.deepcopy asks here too
        return _ForwardHook, ()


@dataclass(eq=False)
class _Arrival:
    """Called when the backward pass reaches a layer."""

    capture: Callable[[], Capture | None]
    weight: Tensor
    use: _Use
    saved: Any  # output of the node that keeps the layer's input

    @torch._disable_dynamo
    def __call__(self, _: Any) -> None:
        capture = self.capture()
        if capture is not None and self.saved is not None:
            with torch.no_grad():
                capture._stage(self.weight, self.use, self.saved.grad_fn.saved_tensors[0])
        if not _graph_is_kept():
            self.saved = None


@dataclass(eq=False)
class _Commit:
    """Called when a gradient has been added to a weight's ``grad``."""

    pool: Callable[[], _Pool | None]

    @torch._disable_dynamo
    def __call__(self, weight: Tensor) -> None:
        pool = self.pool()
        if pool is not None:
            with torch.no_grad():
                pool.commit()


class _Saved(torch.autograd.Function):
    """Saves a tensor as a layer does for its backward pass; its output is of no use."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return anchor.new_empty(())


@dataclass
class _Use:
    """One call of a layer: how its input becomes rows ``x`` of ``y = W x``."""

    module: nn.Module
    count: int
    places: tuple[int, ...]  # of a convolution's output
    dtype: torch.dtype

    @staticmethod
    def of(module: nn.Module, layout: Layout, x: Any, output: Any) -> _Use | None:
        """None where this is not the layer's product of its weight with ``x``."""
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or output.grad_fn is None:
            return None
        weight: Any = module.weight
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        if isinstance(module, _CONVOLUTIONS):
            dims = weight.dim() - 2
            places = tuple(output.shape[-dims:])
            batch = x.shape[0] if x.dim() == dims + 2 else 1
            return _Use(module, batch * math.prod(places), places, dtype)
        if x.dim() == 0 or x.shape[-1] != layout.features(weight):
            return None
        return _Use(module, math.prod(x.shape[:-1]), (), dtype)

    def rows(self, x: Tensor, index: Tensor | None) -> Tensor:
        """The rows at ``index``, or all: a copy, as the layer multiplied them."""
        if isinstance(self.module, _CONVOLUTIONS):
            return self._patches(x, index).to(self.dtype)
        rows = x.reshape(self.count, x.shape[-1])
        if index is not None:
            return rows[index].to(self.dtype)
        return rows.to(self.dtype, copy=True)

    def _patches(self, x: Tensor, index: Tensor | None) -> Tensor:
        """What the kernel covered at these places of the output, each flattened to a row."""
        conv: Any = self.module
        dims = len(self.places)
        if x.dim() == dims + 1:
            x = x.unsqueeze(0)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        if any(conv._reversed_padding_repeated_twice):
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        if index is None:
            index = torch.arange(self.count, device=x.device)
        image = index // math.prod(self.places)
        where: list[Any] = [image.view(-1, *[1] * dims), slice(None)]
        rest = index % math.prod(self.places)
        for axis in reversed(range(dims)):
            corner = (rest % self.places[axis]) * conv.stride[axis]
            rest = rest // self.places[axis]
            covered = torch.arange(conv.kernel_size[axis], device=x.device) * conv.dilation[axis]
            shape = [-1 if i == axis else 1 for i in range(dims)]
            where.insert(2, corner.view(-1, *[1] * dims) + covered.view(1, *shape))
        patches = x[tuple(where)]  # (rows, *kernel, channels)
        return patches.movedim(-1, 1).flatten(1)


@dataclass
class _Part:
    """Rows of one use; without keys they are all of its rows, from ``start`` on."""

    task: int
    start: int
    count: int
    rows: Tensor
    keys: Tensor | None

    def keyed(self, seed: int) -> Tensor:
        if self.keys is None:
            self.keys = stream_keys(seed, self.start, self.count, self.rows.device)
        return self.keys


@dataclass(eq=False)
class _Pool:
    """The inputs of one weight."""

    capacity: int = 0
    seed: int | None = None
    total: int = 0  # committed
    arrived: bool = False
    parts: list[_Part] = field(default_factory=list)
    staged: list[_Part] = field(default_factory=list)

    def clear(self, staged: bool = True) -> None:
        """Forget what was committed; and what was staged."""
        self.total, self.arrived, self.parts = 0, False, []
        if staged:
            self.staged, self.seed = [], None

    def stage(self, use: _Use, x: Tensor, choose: Callable[..., tuple[Tensor, Tensor]]) -> None:
        """Take rows of a use whose backward pass has begun, those that ``choose`` says."""
        assert self.seed is not None
        task = torch._C._current_graph_task_id()
        self.staged = [part for part in self.staged if part.task == task]
        start = self.total + sum(part.count for part in self.staged)
        keys = index = None
        if use.count > self.capacity:
            index, keys = choose(self.seed, start, use.count, self.capacity, x.device)
        self.staged.append(_Part(task, start, use.count, use.rows(x, index), keys))

    def commit(self) -> None:
        """The gradient of what this backward pass has staged has arrived."""
        task = torch._C._current_graph_task_id()
        arrived = [part for part in self.staged if part.task == task]
        self.staged = []
        if not arrived:
            return
        self.arrived = True
        self.parts += arrived
        self.total += sum(part.count for part in arrived)
        if sum(len(part.rows) for part in self.parts) > self.capacity:
            rows, keys, _ = thinned(self.sample(keyed=True), self.capacity)
            self.parts = [_Part(task, 0, self.total, rows, keys)]

    def sample(self, keyed: bool) -> Sample:
        """All committed rows."""
        assert self.seed is not None
        rows = _joined([part.rows for part in self.parts])
        keys = [part.keyed(self.seed) for part in self.parts] if keyed else []
        return Sample(rows, _joined(keys) if keys else rows.new_empty(0), self.total)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Concatenated, in the widest of their dtypes."""
    if len(tensors) == 1:
        return tensors[0]
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.to(dtype) for tensor in tensors])


def _graph_is_kept() -> bool:
    """Whether the backward pass in progress keeps the graph, for another one."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is None or bool(kept())


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
