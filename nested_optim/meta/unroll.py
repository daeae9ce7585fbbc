"""The gradient of a validation loss after k real steps, by every learned weight.

Steps are those of ``DeepNestedOptimizer.step``: windows, clipping, what the networks see and the
rule are the same functions, on copies, under autograd. Three ways to go back through them:

- ``"exact"`` keeps the graph of all steps.
- ``"stepwise"`` keeps the state before every fourth step and the gradients of the others, and
  makes one step's graph at a time on the way back: the same gradient, in less memory, for a second
  forward and backward pass.
- ``"first_order"`` takes the model's gradients as constants, so that the model is never
  differentiated twice. It is biased: what an update does to later gradients is left out.

Steps are the real ones bit for bit where the model's operations are. Two of them may be others:
scaled-dot-product attention runs on its mathematical form, whose rounding is not that of other
kernels (and Adam makes as much of a rounding as of a gradient that small); and under autocast the
gradients of a weight that is used twice are summed in its own dtype, where a real step, which keeps
one narrow copy of the weight, sums them in the narrow one.

The model must be twice differentiable: the mathematical form of attention is, and ``torch.compile``
is bypassed; recurrent layers on cuDNN and sparse embeddings are not. Where
``torch.utils.checkpoint`` recomputes activations, of either kind, an unroll keeps them (so that a
buffer which a recomputation would write once more is written once); what recomputes them in another
way is refused. Random numbers are drawn as the next real steps would draw them,
from copies of torch's generators (a model that draws from others moves those). Forward hooks run.
Modules keep their mode, in validation too.

Under ``DistributedDataParallel`` each rank unrolls steps on its own batches, and the gradients are
averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.optimizer import _get_value

from ..levels import divisor, window_closes
from . import learned, together
from .features import clipped
from .isolation import isolated, no_calls_of, rng_state, set_rng_state
from .together import Due, Slot

if TYPE_CHECKING:
    from ..deep_nested import DeepNestedOptimizer

LossFn = Callable[[nn.Module, Any], Tensor]
#: Steps from one position that a stepwise unroll keeps to the next.
_SEGMENT = 4


class Position:
    """Where training stands: a slot and (updates, gradients in the window) of each parameter, and
    the model's buffers."""

    def __init__(
        self, slots: list[Slot], counts: list[tuple[float, float]], buffers: dict[str, Tensor]
    ) -> None:
        self.slots = slots
        self.counts = counts
        self.buffers = buffers

    def leaves(self) -> Position:
        """The same as new leaves of autograd, which share its memory."""
        slots = [
            {key: tensor.detach().requires_grad_() for key, tensor in slot.items()}
            for slot in self.slots
        ]
        return Position(slots, self.counts, self.fresh_buffers())

    def fresh_buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers, which a forward pass may write to."""
        return {name: buffer.clone() for name, buffer in self.buffers.items()}


class Came(NamedTuple):
    """What a step brings: a gradient for each parameter, the loss if it is told, buffers."""

    grads: Sequence[Tensor | None]
    loss: Tensor | None
    buffers: dict[str, Tensor]


class _Loss(nn.Module):
    """A model with its loss, so that both run with other parameters."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn or loss_of_output

    def forward(self, batch: Any) -> Tensor:
        loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"loss_fn must return a tensor of one element, but returned {loss!r}")
        return loss.reshape(())


def loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model returns of a batch: itself, its ``["loss"]`` or its ``.loss``.

    A mapping is given to the model as keywords, a tuple or list as arguments.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (tuple, list)):
        output = model(*batch)
    else:
        output = model(batch)
    if isinstance(output, Mapping) and "loss" in output:
        output = output["loss"]
    elif not isinstance(output, Tensor):
        output = getattr(output, "loss", None)
    if not isinstance(output, Tensor) or output.numel() != 1:
        raise TypeError(
            "the model's output has no loss: pass loss_fn(model, batch), which returns one"
        )
    return output


def unwrapped(model: nn.Module) -> tuple[nn.Module, Any]:
    """The module inside of wrappers by ``torch.compile`` and data parallelism, and the process
    group of the latter."""
    ranks = None
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            ranks = model.process_group
            model = model.module
        elif isinstance(model, nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model, ranks


class Rehearsal:
    """Steps of an optimizer on copies.

    Args:
        optimizer: whose steps; nothing of it is changed.
        loss_fn: ``loss_fn(model, batch)``, or None for the loss in the model's output.
        networks: sizes of other networks than the optimizer's, as options of a group.

    Raises:
        RuntimeError: the optimizer has no model.
        ValueError: it trains parameters that its model does not have.
    """

    def __init__(
        self,
        optimizer: DeepNestedOptimizer,
        loss_fn: LossFn | None,
        networks: Mapping[str, Any] | None = None,
    ) -> None:
        if optimizer.model is None:
            raise RuntimeError(
                "an unroll runs the model: build the optimizer with model=, or set its `model` "
                "(copies and loaded optimizers have none)"
            )
        self.optimizer = optimizer
        self.networks = networks or {}
        model, self.ranks = unwrapped(optimizer.model)
        self.loss = _Loss(model, loss_fn)
        self.modules = set(model.modules())
        names = {p: name for name, p in self.loss.named_parameters()}
        self.groups = optimizer.param_groups
        self.params: list[Tensor] = []
        self.names: list[str] = []
        self.members: list[list[int]] = []  # of each group
        for group in self.groups:
            members = []
            for i, p in enumerate(group["params"]):
                if not p.requires_grad:
                    continue
                if p not in names:
                    label = optimizer._param_label(group, i)
                    raise ValueError(f"{label} is not a parameter of the optimizer's model")
                members.append(len(self.params))
                self.params.append(p)
                self.names.append(names[p])
            self.members.append(members)
        if not self.params:
            raise RuntimeError(
                "an unroll updates nothing: all of the optimizer's parameters are frozen; set "
                "requires_grad of those that it is to train"
            )
        self.home = self.groups[0]["params"][0].device

    def start(self) -> Position:
        """Where training stands now; its tensors are the real ones, and not written to."""
        slots, counts = [], []
        for group, members in zip(self.groups, self.members):
            for i in members:
                p = self.params[i]
                state = self._completed(p, group, dict(self.optimizer.state.get(p, {})))
                slot = {k: state[k] for k in self._keys(group) if k in state}
                slots.append({"param": p.detach(), **slot})
                counts.append(
                    tuple(float(_get_value(state[key])) for key in ("step", "window_count"))
                )
        buffers = {name: b.detach().clone() for name, b in self.loss.named_buffers()}
        return Position(slots, counts, buffers)  # type: ignore[arg-type]

    def _keys(self, group: dict[str, Any]) -> list[str]:
        keys = ["exp_avg", *self.optimizer._slow_keys(group), "window_sum"]
        if group["normalize"]:
            keys += ["exp_avg_sq", "max_exp_avg_sq"][: 1 + group["amsgrad"]]
        return keys

    def _completed(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """State as the next step would make it."""
        state.setdefault("step", torch.zeros(()))
        state.setdefault("window_count", torch.zeros(()))
        dtype = self.optimizer._state_dtype(p, group)
        wide = self.optimizer._window_dtype(p, group)
        for key in self._keys(group):
            if key == "window_sum" and group["frequency"] == 1:
                continue
            if key not in state:
                narrow = key in self.optimizer._moment_keys
                state[key] = torch.zeros_like(p, dtype=dtype if narrow else wide)
        return state

    def loss_at(
        self, position: Position, batch: Any, params: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The loss of a batch, 0-d; the position's buffers move on."""
        if params is None:
            params = [slot["param"] for slot in position.slots]
        # Passed in one dict: what a module assigns to a buffer comes back in it.
        swapped = dict(zip(self.names, params))
        swapped.update(position.buffers)
        loss: Tensor = functional_call(self.loss, swapped, (batch,))
        position.buffers = {name: swapped[name].detach() for name in position.buffers}
        if not loss.requires_grad:
            raise RuntimeError(
                "the loss of a batch does not depend on the parameters in autograd: return it as "
                "it comes from the model that loss_fn is given, not detached, from item() or "
                "computed under no_grad"
            )
        return loss

    def derivatives(
        self,
        ends: Tensor | Sequence[Tensor],
        starts: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
        create_graph: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """``torch.autograd.grad`` through passes of the model, which must not run again."""
        with no_calls_of(self.modules):
            return torch.autograd.grad(
                ends, starts, cotangents, create_graph=create_graph, allow_unused=True
            )

    def gradients(self, position: Position, batch: Any, create_graph: bool) -> Came:
        """What a training step brings: the gradients of this batch's loss, clipped.

        Args:
            position: its parameters are in autograd, its buffers are written to.
            batch: the step's.
            create_graph: make the gradients differentiable.
        """
        # Aliases: the gradient of this loss by a parameter that an earlier step left as it was must
        # not go back through that step, whose other parameters depend on it.
        params = [slot["param"].view_as(slot["param"]) for slot in position.slots]
        loss = self.loss_at(position, batch, params)
        found = self.derivatives(loss, params, create_graph=create_graph)
        for name, g in zip(self.names, found):
            if g is not None and g.layout is not torch.strided:
                raise RuntimeError(
                    f"an unroll does not support sparse gradients, but {name.partition('.')[2]!r} "
                    f"has one ({g.layout}); build its module with sparse=False"
                )
        held = [None if g is None else (g if create_graph else g.detach()) for g in found]
        grads = clipped(held, self.groups[0]["max_grad_norm"])
        told = (loss if create_graph else loss.detach()) if self.optimizer._told else None
        return Came(grads, told, position.buffers)

    def applied(self, position: Position, came: Came, flats: dict[str, Tensor]) -> Position:
        """The position after a step that brought this, with the learned modules' weights."""
        slots, counts = list(position.slots), list(position.counts)
        for at, group in enumerate(self.groups):
            self._step_group(at, group, slots, counts, came.grads, flats, came.loss)
        return Position(slots, counts, came.buffers)

    def _step_group(
        self,
        at: int,
        group: dict[str, Any],
        slots: list[Slot],
        counts: list[tuple[float, float]],
        grads: Sequence[Tensor | None],
        flats: dict[str, Tensor],
        loss: Tensor | None,
    ) -> None:
        """Update a group's slots and counts in their lists."""
        direct, closing = [], []
        for i in self.members[at]:
            grad = grads[i]
            if grad is None:
                continue
            mean = self._into_window(group, i, slots, counts, grad)
            if mean is grad:
                direct.append((i, grad))
            elif mean is not None:
                closing.append((i, mean))
        due = [*direct, *closing]
        if not due:
            return
        work = [Due(slots[i], mean, counts[i][0] + 1) for i, mean in due]
        new, _ = together.update(
            work,
            {**group, **self.networks},
            flats,
            self.optimizer._slow_keys(group),
            place=self.optimizer._place(group)[1],
            home=self.home,
            loss=loss,
        )
        for (i, _), slot, one in zip(due, new, work):
            slots[i], counts[i] = slot, (one.step, counts[i][1])

    def _into_window(
        self,
        group: dict[str, Any],
        i: int,
        slots: list[Slot],
        counts: list[tuple[float, float]],
        grad: Tensor,
    ) -> Tensor | None:
        """Put a gradient in its window; what the window comes to if it closes."""
        frequency, (step, count) = group["frequency"], counts[i]
        count += 1
        if "window_sum" not in slots[i] or (count == 1 and frequency == 1):
            return grad
        total = slots[i]["window_sum"]
        total = grad.to(total.dtype) if count == 1 else total + grad
        slots[i] = {**slots[i], "window_sum": total}
        closes = window_closes(count, frequency)
        counts[i] = (step, 0.0 if closes else count)
        if not closes:
            return None
        n = divisor(count, group["window"])
        return total / n if n != 1 else total.clone()


def rehearse(
    optimizer: DeepNestedOptimizer, batches: Sequence[Any], loss_fn: LossFn | None = None
) -> Position:
    """Where training would stand after real steps on these batches; nothing is changed.

    ``loss_fn`` is the optimizer's, if None is given.
    """
    rehearsal = Rehearsal(optimizer, loss_fn or optimizer.loss_fn)
    flats = learned.weights(optimizer.param_groups[0])
    with isolated(rehearsal.params):
        return _advanced(rehearsal, rehearsal.start(), batches, flats)


def _advanced(
    rehearsal: Rehearsal, position: Position, batches: Iterable[Any], flats: dict[str, Tensor]
) -> Position:
    """The position after steps of which nothing is differentiated."""
    for batch in batches:
        came = rehearsal.gradients(position.leaves(), batch, create_graph=False)
        with torch.no_grad():
            position = rehearsal.applied(position, came, flats)
    return position


def meta_gradient(
    optimizer: DeepNestedOptimizer,
    val_batch: Any,
    train_batches: Sequence[Any],
    loss_fn: LossFn | None,
    how: str,
    *,
    flats: dict[str, Tensor] | None = None,
    networks: Mapping[str, Any] | None = None,
    differentiated: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The validation loss after a step on each batch, and its gradient by the learned weights.

    Args:
        optimizer: whose steps; nothing of it is changed.
        val_batch: of the loss.
        train_batches: one per step, at least one.
        loss_fn: ``loss_fn(model, batch)``, or None for the loss in the model's output.
        how: ``"exact"``, ``"stepwise"`` or ``"first_order"``.
        flats: weights of other networks than the optimizer's, in autograd.
        networks: sizes of these, see :class:`Rehearsal`.
        differentiated: of how many steps, the last ones; None means all.

    Returns:
        The loss, 0-d, and a tensor of each module's weights' shape.
    """
    if not train_batches:
        raise ValueError("an unroll needs at least one training batch")
    rehearsal = Rehearsal(optimizer, loss_fn, networks)
    if flats is None:
        flats = learned.weights(optimizer.param_groups[0], requires_grad=True)
    first = 0 if differentiated is None else max(0, len(train_batches) - differentiated)
    with isolated(rehearsal.params):
        start = _advanced(rehearsal, rehearsal.start(), train_batches[:first], flats)
        if how == "stepwise":
            loss, found = _stepwise(rehearsal, start, val_batch, train_batches[first:], flats)
        else:
            exact = how == "exact"
            position = start.leaves()
            for batch in train_batches[first:]:
                at = position if exact else position.leaves()
                came = rehearsal.gradients(at, batch, create_graph=exact)
                position = rehearsal.applied(position, came, flats)
            loss = rehearsal.loss_at(position, val_batch)
            found = list(rehearsal.derivatives(loss, list(flats.values())))
    result = {
        module: torch.zeros_like(flat) if grad is None else grad.detach()
        for (module, flat), grad in zip(flats.items(), found)
    }
    loss = loss.detach()
    if rehearsal.ranks is not None:
        loss = loss.clone()
        for tensor in (loss, *result.values()):
            torch.distributed.all_reduce(tensor, group=rehearsal.ranks)
            tensor.div_(torch.distributed.get_world_size(rehearsal.ranks))
    return loss, result


def _stepwise(
    rehearsal: Rehearsal,
    position: Position,
    val_batch: Any,
    train_batches: Sequence[Any],
    flats: dict[str, Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and its gradients by the weights, with one step's graph at a time.

    The position is kept every ``_SEGMENT`` steps. Between, it is made again from the gradients that
    came: one tensor per parameter instead of all of its state, for a few passes of the rule.
    """
    kept: list[tuple[Position | None, Came | None, Any]] = []
    for at, batch in enumerate(train_batches):
        whole = position if at % _SEGMENT == 0 else None
        rng = rng_state(rehearsal.params)
        came = rehearsal.gradients(position.leaves(), batch, create_graph=False)
        with torch.no_grad():
            position = rehearsal.applied(position, came, flats)
        # The last gradients of a segment lead to a position that is kept.
        last = at % _SEGMENT == _SEGMENT - 1 or at == len(train_batches) - 1
        kept.append((whole, None if last else came, rng))
        del came, whole
    end = position.leaves()
    loss = rehearsal.loss_at(end, val_batch)
    params = [slot["param"] for slot in end.slots]
    found = rehearsal.derivatives(loss, params)
    loss = loss.detach()
    # How the loss changes with each tensor of the state after the step that is gone through next.
    adjoint: list[dict[str, Tensor]] = [{} if g is None else {"param": g} for g in found]
    del position, end, params, found
    totals: list[Tensor | None] = [None] * len(flats)
    for at in reversed(range(len(train_batches))):
        start = _rebuilt(rehearsal, kept, at, flats).leaves()
        set_rng_state(kept.pop()[2])
        came = rehearsal.gradients(start, train_batches[at], create_graph=True)
        after = rehearsal.applied(start, came, flats)
        adjoint, grads = _backward(rehearsal, start, after, adjoint, list(flats.values()))
        del start, came, after
        for j, grad in enumerate(grads):
            if grad is not None:
                totals[j] = grad if totals[j] is None else totals[j] + grad  # type: ignore[operator]
    return loss, totals


def _rebuilt(rehearsal: Rehearsal, kept: list[Any], at: int, flats: dict[str, Tensor]) -> Position:
    """The position before this step, to the last bit."""
    first = at - at % _SEGMENT
    position: Position = kept[first][0]
    with torch.no_grad():
        for _, came, _ in kept[first:at]:
            position = rehearsal.applied(position, came, flats)
    return position


def _backward(
    rehearsal: Rehearsal,
    start: Position,
    after: Position,
    adjoint: list[dict[str, Tensor]],
    weights: list[Tensor],
) -> tuple[list[dict[str, Tensor]], Sequence[Tensor | None]]:
    """From how the loss changes with the state after a step to how with the state before it, and
    with the weights."""
    ends, cotangents = [], []
    for slot, wanted in zip(after.slots, adjoint):
        for key, cotangent in wanted.items():
            if slot[key].requires_grad:
                ends.append(slot[key])
                cotangents.append(cotangent)
    keys = [(i, key) for i, slot in enumerate(start.slots) for key in slot]
    leaves = [start.slots[i][key] for i, key in keys]
    grads = rehearsal.derivatives(ends, [*leaves, *weights], cotangents)
    before: list[dict[str, Tensor]] = [{} for _ in adjoint]
    for (i, key), grad in zip(keys, grads):
        if grad is not None:
            before[i][key] = grad
    return before, grads[len(keys) :]
