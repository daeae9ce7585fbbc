"""The inputs of layers, gathered while their gradients are: what Delta Gradient Descent needs.

A :class:`Capture` belongs to one optimizer. It puts a forward hook on each layer whose weight the
optimizer wants inputs for. The hook saves the layer's input the way autograd saves tensors (so
activation checkpointing and offloading treat it as they treat the layer's own; it is the same
tensor, except under autocast, where the layer keeps a cast of it) and watches the
layer's node in the graph. When the backward pass comes by there, rows of the input are *staged*;
when the gradient reaches the weight's ``grad``, they are *committed*; what is left when the pass
ends is dropped. So what is committed belongs to what ``grad`` holds: a forward pass that is only
recomputed counts once, and a gradient that goes elsewhere (``torch.autograd.grad``) not at all. A
pass may run within another (checkpointing that is reentrant): each has its own.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .pools import Pool, cast
from .samples import Sample

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# What hooks ask torch at every layer, where each microsecond counts; None where a release lacks it.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class Owner(Protocol):
    """The optimizer, as its capture sees it."""

    def _group_of(self, weight: Tensor) -> dict[str, Any] | None:
        """The group of this weight, if it is in one; inputs are of use where that has decay."""

    def _sample_plan(self, weight: Tensor, group: Any) -> tuple[int, int, int]:
        """How many rows to keep until the next step, and two numbers that seed their choice."""


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
        self._self = weakref.ref(self)
        self._pools: dict[Tensor, Pool] = {}
        self._pool_at: dict[int, Pool] = {}  # the same by identity
        self._choices: dict[Any, tuple[Tensor, Tensor]] = {}
        self._tasks: set[int] = set()  # backward passes at whose ends this will be told
        self._modules: dict[nn.Module, _ForwardHook] = {}
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
            weight = module._parameters.get("weight")
            if layout is not None and weight is not None and module not in self._modules:
                hook = self._modules[module] = _ForwardHook(self, module)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
            if isinstance(module, DistributedDataParallel) and self.process_group is None:
                self.process_group = module.process_group
        self.members = set(claims)
        # A weight that other modules use in ways not seen here has inputs that are not seen here.
        self.layouts = {
            param: found[0]
            for param, found in claims.items()
            if found[0] is not None and all(layout == found[0] for layout in found)
        }
        #: By identity, since steps ask for all parameters and a tensor's hash takes longer.
        self.member_ids = set(map(id, claims))
        self.layout_of = {id(param): layout for param, layout in self.layouts.items()}
        for hook in self._modules.values():
            hook.pool = _nobody

    def remove(self) -> None:
        """Take all hooks off the model and forget all inputs."""
        _remove(self._handles)
        self._modules.clear()
        self._pools.clear()
        self._pool_at.clear()
        self._choices.clear()
        self._tasks.clear()

    def clear(self) -> None:
        """Forget all inputs."""
        self._choices.clear()
        self._tasks.clear()
        for pool in self._pools.values():
            if pool.seed is not None:  # else it is empty
                pool.clear()

    def end_pass(self, task: int) -> None:
        """A backward pass has ended: forget what it staged for gradients that went elsewhere."""
        self._tasks.discard(task)
        for pool in self._pools.values():
            if pool.staged:
                pool.forget(task)

    def arrived(self, weight: Tensor) -> bool:
        """Whether a layer of this weight has sent inputs (none at all, if its batch was empty)."""
        pool = self._pool_at.get(id(weight))
        return pool is not None and pool.arrived

    def any_arrived(self) -> bool:
        """Whether any layer has sent inputs."""
        return any(pool.arrived for pool in self._pools.values())

    def ranks(self) -> int:
        """How many ranks average their gradients."""
        return 1 if self.process_group is None else dist.get_world_size(self.process_group)

    def regroup(self) -> None:
        """The owner's parameters are in other groups than they were."""
        for pool in self._pools.values():
            pool.group = None

    def take(self, weights: list[Tensor], keyed: bool) -> list[Sample]:
        """Committed inputs of these weights, which are forgotten; ``keyed`` if keys are needed.

        Rows are in the dtypes in which their layers multiplied them.
        """
        pools = [self._pool_at.get(id(weight)) for weight in weights]
        cast([part for pool in pools if pool is not None for part in pool.parts])
        return [self._taken(*pair, keyed) for pair in zip(weights, pools)]

    def take_uncast(self, weights: list[Tensor]) -> list[tuple[Sample, torch.dtype]]:
        """The same without keys, and with dtypes that the rows may have yet to be cast to."""
        found = []
        for weight in weights:
            pool = self._pool_at.get(id(weight))
            parts = [] if pool is None else pool.parts
            if len(parts) > 1:
                cast(parts)
            sample = self._taken(weight, pool, keyed=False)
            found.append((sample, parts[0].dtype if len(parts) == 1 else sample.rows.dtype))
        return found

    def _taken(self, weight: Tensor, pool: Pool | None, keyed: bool) -> Sample:
        if pool is not None and pool.parts:
            sample = pool.joined(keyed)
            pool.clear()
            return sample
        features = self.layouts[weight].features(weight)
        nothing = torch.zeros(0, dtype=torch.int64, device=weight.device)
        return Sample(weight.detach().new_zeros(0, features), nothing, 0)

    def _pool_of(self, weight: Tensor) -> Pool:
        """The pool of a weight, made when its first input comes."""
        pool = self._pools.get(weight)
        if pool is None:
            pool = self._pools[weight] = self._pool_at[id(weight)] = Pool(self, weight)
            self._handles.append(weight.register_post_accumulate_grad_hook(_Commit(pool.ref)))
        return pool


# Hooks run at every layer of every pass. What ``torch._disable_dynamo`` wraps costs several
# microseconds more to call, so it is called only where there is something to keep from tracing.


@torch._disable_dynamo
def _untraced(call: Callable[..., None], *args: Any) -> None:
    call(*args)


def _nobody() -> None:
    """In place of a weak reference whose object is gone."""


class _ForwardHook:
    """Tells a capture of its module's forward passes, if both live. A copy tells nobody."""

    __slots__ = ("capture", "module", "pool")

    def __init__(self, capture: Capture | None = None, module: nn.Module | None = None) -> None:
        self.capture = _nobody if capture is None else capture._self
        self.module = _nobody if module is None else weakref.ref(module)
        #: Of the weight last seen, until the next survey: so long its inputs are wanted.
        self.pool: Callable[[], Pool | None] = _nobody

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        if is_compiling():
            _untraced(self._see, module, args, kwargs, output)
        else:
            self._see(module, args, kwargs, output)

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.module() is not module:
            return
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return
        node, pool = output.grad_fn, self.pool()
        weight = module._parameters.get("weight")
        if node is None or weight is None:
            return
        if pool is None or pool.weight is not weight or pool.group is None:
            pool = self._pool_of(weight)
            if pool is None:
                return
        if pool.group["decay"] == 0 or not weight.requires_grad:  # type: ignore[index]
            return
        if x.is_nested:
            raise RuntimeError(
                f"a layer's input is a nested tensor ({x.layout}), whose rows DGD cannot sample: "
                "give the layer a padded or packed tensor, or its weight decay=0"
            )
        if not pool.conv:
            shape = x.shape
            if not shape or (shape[-1] != pool.features and shape[-1] != pool.measure()):
                return  # not the layer's product of its weight with x
        around = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if around is not None:
            capture = self.capture()
            if capture is not None and capture.process_group is None:
                capture.process_group = around.process_group

        # Not x itself: after x += layer(x) its graph holds this node, a cycle that nothing frees.
        held = x.detach()
        packed = _saved_tensors_hooks is None or _saved_tensors_hooks(True) is not None
        if packed:
            # Checkpointing and offloading are to see it. A node of its own, since some releases of
            # torch free what the layer's node saved with its output.
            held = _Saved.apply(pool.anchor, held)
        if pool.conv:
            use = _PatchesUse(pool.ref, held, packed, _multiplied_dtype(x))
            use.conv, use.places = module, tuple(output.shape[2 - weight.dim() :])
            node.register_prehook(use)
        else:
            node.register_prehook(_Use(pool.ref, held, packed, _multiplied_dtype(x)))

    def _pool_of(self, weight: Tensor) -> Pool | None:
        """The pool of a weight whose inputs are wanted, with the weight's group."""
        capture = self.capture()
        if capture is None or weight not in capture.layouts:
            return None
        owner = capture._owner()
        group = None if owner is None else owner._group_of(weight)
        if group is None or group["decay"] == 0 or not weight.requires_grad:
            return None
        pool = capture._pool_of(weight)
        pool.group, self.pool = group, pool.ref
        return pool

    def __reduce__(self) -> Any:  # copy.deepcopy asks here too
        return _ForwardHook, ()


class _Commit:
    """Called when a gradient has been added to a weight's ``grad``."""

    __slots__ = ("pool",)

    def __init__(self, pool: Callable[[], Pool | None]) -> None:
        self.pool = pool

    def __call__(self, weight: Tensor) -> None:
        if is_compiling():
            _untraced(self._commit)
        else:
            self._commit()

    def _commit(self) -> None:
        pool = self.pool()
        if pool is not None and pool.staged:
            pool.commit()


class _Saved(torch.autograd.Function):
    """Saves a tensor as a layer does for its backward pass; its output is of no use."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return anchor.new_empty(())


class _Use:
    """One call of a layer ``y = W x``. Called when the backward pass reaches it."""

    __slots__ = ("dtype", "packed", "pool", "version", "x")

    def __init__(
        self, pool: Callable[[], Pool | None], x: Any, packed: bool, dtype: torch.dtype
    ) -> None:
        self.pool = pool
        self.x = x  # the input, or the output of the node that saved it
        self.packed, self.dtype = packed, dtype
        self.version = None if packed or x.is_inference() else x._version

    def __call__(self, _: Any) -> None:
        if is_compiling():
            _untraced(self._arrive)
        else:
            self._arrive()

    def _arrive(self) -> None:
        pool, x = self.pool(), self.x
        if _graph_is_kept is not None and not _graph_is_kept():
            self.x = None
        if pool is None or x is None:
            return
        if self.packed:
            x = x.grad_fn.saved_tensors[0]
        elif self.version is not None and x._version != self.version:
            raise RuntimeError(
                f"the input of a layer, of shape {tuple(x.shape)}, has been modified by an inplace "
                "operation since the layer's forward pass: DGD needs it as it was. Clone it "
                "before, or give that layer's weight decay=0"
            )
        if torch.is_grad_enabled():
            with torch.no_grad():
                pool.stage(self, x)
        else:
            pool.stage(self, x)

    def count(self, x: Tensor, features: int) -> int:
        """How many rows this input has."""
        return x.numel() // features if features else math.prod(x.shape[:-1])

    def rows(self, x: Tensor, count: int, features: int, index: Tensor | None) -> Tensor:
        """A copy of the rows at ``index``, or of all ``count``."""
        if x.dim() != 2:
            x = x.reshape(count, features)
        return x.to(self.dtype, copy=True) if index is None else x.index_select(0, index)


class _PatchesUse(_Use):
    """One call of a convolution ``conv``, whose output had ``places``."""

    __slots__ = ("conv", "places")
    conv: Any
    places: tuple[int, ...]

    def count(self, x: Tensor, features: int) -> int:
        batch = x.shape[0] if x.dim() == len(self.places) + 2 else 1
        return batch * math.prod(self.places)

    def rows(self, x: Tensor, count: int, features: int, index: Tensor | None) -> Tensor:
        """What the kernel covered at these places of the output, each flattened to a row."""
        conv = self.conv
        dims = len(self.places)
        if x.dim() == dims + 1:
            x = x.unsqueeze(0)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        if any(conv._reversed_padding_repeated_twice):
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        if index is None:
            index = torch.arange(count, device=x.device)
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


def _multiplied_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies this input: autocast's, where that is on."""
    dtype = x.dtype
    kind = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(kind) and dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return dtype


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
