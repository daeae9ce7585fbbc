"""Meta-trainers: objects that train learned parts of an update rule, by themselves or beside an
optimizer."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .controller import NestedController, check_count
from .features import GROUP_FEATURES, dot
from .momentum import L2RegressionMomentum
from .unroll import meta_gradient

if TYPE_CHECKING:
    from ..deep_nested import DeepNestedOptimizer


class SimplifiedMetaTrainer:
    r"""Learning without an extra forward pass: first-order hypergradients, and a record of losses.

    What an update :math:`\theta \leftarrow \theta - \eta\mu u` did to the loss shows in the next
    gradient: :math:`dL/d\mu = -\eta \langle g, u \rangle` (Baydin et al. 2018).
    :meth:`compute_meta_loss` is a loss with these derivatives, for a controller of your own.
    ``DeepNestedOptimizer(mode="simple")`` does this itself, for all its parts; :meth:`step` steps
    one and keeps the record.

    Args:
        window_size: how many steps the record goes back (default: 50).
        improvement_threshold: by how much, as a share of the earlier half's mean loss, the record's
            later half must be better for :meth:`improved` (default: 0.001).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, window_size: int = 50, improvement_threshold: float = 0.001) -> None:
        self.window_size = check_count("window_size", window_size)
        if not improvement_threshold >= 0:
            raise ValueError(
                f"Invalid improvement_threshold: {improvement_threshold!r}. Give a number >= 0"
            )
        self.improvement_threshold = improvement_threshold
        self.loss_history: deque[float] = deque(maxlen=window_size)
        self.multiplier_history: deque[Tensor] = deque(maxlen=window_size)
        self.momentum_history: deque[float] = deque(maxlen=window_size)

    def step(self, optimizer: DeepNestedOptimizer, loss: float | Tensor) -> dict[str, Any]:
        """``optimizer.step(loss)``, recorded; reading the loss waits for the device.

        Returns:
            What the optimizer's step returned.
        """
        result: dict[str, Any] = optimizer.step(loss)
        norm = optimizer.get_momentum_stats()["momentum_avg_norm"]
        self.record_step(float(loss), result["lr_multipliers"], norm)
        return result

    def record_step(
        self, loss: float, multipliers: Tensor | None = None, momentum_norm: float = 0.0
    ) -> None:
        """Add a step to the record; its oldest one goes when it is full."""
        self.loss_history.append(float(loss))
        if multipliers is not None:
            self.multiplier_history.append(multipliers.detach().clone())
        self.momentum_history.append(float(momentum_norm))

    def compute_meta_loss(
        self,
        multipliers: Tensor,
        lrs: Sequence[float],
        grads: Sequence[Sequence[Tensor]],
        updates: Sequence[Sequence[Tensor]],
    ) -> Tensor:
        """A loss whose derivative by each multiplier is that of the model's loss.

        Args:
            multipliers: ``(groups,)``, those of the last step, in autograd.
            lrs: that step's learning rate of each group.
            grads: the gradients that have come since, of each group's parameters.
            updates: the directions u that the step subtracted, times ``lr * multiplier``.

        Returns:
            0-d.
        """
        if not len(multipliers) == len(lrs) == len(grads) == len(updates):
            raise ValueError(
                f"groups disagree: {len(multipliers)} multipliers, {len(lrs)} learning rates, "
                f"{len(grads)} lists of gradients, {len(updates)} of updates"
            )
        slopes = []
        for lr, group_grads, group_updates in zip(lrs, grads, updates):
            pairs = zip(group_grads, group_updates, strict=True)
            products = [dot(grad.detach(), update.detach()) for grad, update in pairs]
            slopes.append(-lr * torch.stack(products).sum())
        return (multipliers * torch.stack(slopes).to(multipliers)).sum()

    def improved(self) -> bool:
        """Whether the record's later half is better than its earlier one by the threshold."""
        losses = list(self.loss_history)
        half = len(losses) // 2
        if half == 0:
            return False
        earlier, later = statistics.fmean(losses[:half]), statistics.fmean(losses[-half:])
        return earlier - later > self.improvement_threshold * abs(earlier)

    def get_statistics(self) -> dict[str, float]:
        """Numbers for a logger; empty before the second step."""
        if len(self.loss_history) < 2:
            return {}
        found = {
            "meta/loss_improvement": self.loss_history[0] - self.loss_history[-1],
            "meta/loss_variance": statistics.stdev(self.loss_history),
            "meta/avg_momentum_norm": statistics.fmean(self.momentum_history),
            "meta/improved": float(self.improved()),
        }
        if self.multiplier_history:
            means = [multipliers.float().mean() for multipliers in self.multiplier_history]
            found["meta/avg_lr_multiplier"] = float(torch.stack(means).mean())
        return found


class UnrolledMetaTrainer:
    """The validation loss after k steps, as a loss that trains a controller or a momentum.

    Steps are ``DeepNestedOptimizer``'s, on copies of the model's parameters, with the modules given
    in place of its own. The model, its gradients, buffers and random numbers are left alone; see
    :mod:`nested_optim.meta.unroll`.

    Args:
        k_steps: steps to unroll (default: 5).
        use_checkpointing: keep one step's graph at a time, for less memory (default: True). Of no
            effect with ``second_order=False``, where the model's graphs are not kept.
        accumulate_grad: False differentiates the last of the steps only (default: True).
        second_order: False takes the model's gradients as constants, which is cheaper and biased
            (default: True).

    Raises:
        ValueError: an argument is out of its range.

    Example::

        >>> controller = NestedController()
        >>> trainer = UnrolledMetaTrainer(k_steps=2)
        >>> loss = trainer.compute_meta_loss(
        ...     model, {"controller": controller}, train_batches, val_batch, loss_fn
        ... )
        >>> loss.backward()  # controller.weights.grad is its true gradient
    """

    def __init__(
        self,
        k_steps: int = 5,
        use_checkpointing: bool = True,
        accumulate_grad: bool = True,
        second_order: bool = True,
    ) -> None:
        self.k_steps = check_count("k_steps", k_steps)
        self.use_checkpointing = use_checkpointing
        self.accumulate_grad = accumulate_grad
        self.second_order = second_order

    def compute_meta_loss(
        self,
        model: nn.Module,
        optimizer_components: Mapping[str, nn.Module],
        train_batches: Sequence[Any],
        val_batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        base_lr: float = 1e-3,
        **options: Any,
    ) -> Tensor:
        """The validation loss after ``k_steps`` steps from the model's parameters.

        Args:
            model: stays as it is.
            optimizer_components: ``"controller"``, a :class:`NestedController` of at most 6
                features (it sees sizes of gradients and parameters, the group's place, updates so
                far, the loss and whether it is known; so the first ones of these), and
                ``"momentum"`` (or ``"momentum_mlp"``), an :class:`L2RegressionMomentum`.
            train_batches: at least ``k_steps``, of which the first are used.
            val_batch: of the loss.
            loss_fn: ``loss_fn(model, batch)``; None takes the loss in the model's output.
            base_lr: learning rate of the steps.
            options: further ones of ``DeepNestedOptimizer``.

        Returns:
            0-d; its ``backward()`` brings the modules' gradients, computed already.

        Raises:
            ValueError: there are too few batches, or no or unknown components.
        """
        if len(train_batches) < self.k_steps:
            raise ValueError(
                f"an unroll of {self.k_steps} steps needs as many batches, not {len(train_batches)}"
            )
        from ..deep_nested import DeepNestedOptimizer

        flats, networks = _networks_of(optimizer_components)
        betas = (networks.pop("beta", 0.9), 0.999)
        optimizer = DeepNestedOptimizer(
            model,
            lr=base_lr,
            **{
                "mode": "explicit",
                "betas": betas,
                "learn_lr": "controller" in flats,
                "learn_momentum": "momentum" in flats,
                "learn_mixing": False,
                **options,
            },
        )
        how = "first_order"
        if self.second_order:
            how = "stepwise" if self.use_checkpointing else "exact"
        wide = {m: flat.detach().double().requires_grad_() for m, flat in flats.items()}
        loss, grads = meta_gradient(
            optimizer,
            val_batch,
            list(train_batches[: self.k_steps]),
            loss_fn,
            how,
            flats=wide,
            networks=networks,
            differentiated=None if self.accumulate_grad else 1,
        )
        given = [grads[m].to(flat) for m, flat in flats.items()]
        attached: Tensor = _WithGradient.apply(loss, *flats.values(), *given)
        return attached


class _WithGradient(torch.autograd.Function):
    """A number whose derivatives are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *weights_and_grads: Tensor) -> Tensor:
        ctx.save_for_backward(*weights_and_grads[len(weights_and_grads) // 2 :])
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.saved_tensors
        return (None, *(grad.to(g) * g for g in found), *(None for _ in found))


def _networks_of(
    components: Mapping[str, nn.Module],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and sizes of the modules given."""
    flats: dict[str, Tensor] = {}
    networks: dict[str, Any] = {}
    for name, module in components.items():
        if name == "controller" and isinstance(module, NestedController):
            if module.n_features > GROUP_FEATURES:
                raise ValueError(
                    f"a controller sees at most {GROUP_FEATURES} features here, not "
                    f"{module.n_features}"
                )
            flats["controller"] = module.weights
            networks.update(
                controller_hidden_dim=module.hidden_dim,
                controller_num_layers=module.num_layers,
                controller_features=module.n_features,
                min_lr_mult=module.min_lr_mult,
                max_lr_mult=module.max_lr_mult,
            )
        elif name in ("momentum", "momentum_mlp") and isinstance(module, L2RegressionMomentum):
            if "momentum" in flats:
                raise ValueError(
                    "'momentum' and 'momentum_mlp' are one component: give one of them"
                )
            flats["momentum"] = module.weights
            networks.update(
                momentum_hidden_dim=module.hidden_dim,
                momentum_num_layers=module.num_layers,
                beta=module.beta,
            )
        else:
            raise ValueError(
                f"unknown component {name!r} ({type(module).__name__}): give 'controller', a "
                "NestedController, and 'momentum', an L2RegressionMomentum"
            )
    if not flats:
        raise ValueError("optimizer_components is empty: there is nothing to train")
    return flats, networks


def create_meta_trainer(
    mode: str = "simplified", **kwargs: Any
) -> SimplifiedMetaTrainer | UnrolledMetaTrainer:
    """A :class:`SimplifiedMetaTrainer` (``"simplified"``) or an :class:`UnrolledMetaTrainer`
    (``"unrolled"``), with these arguments."""
    if mode == "simplified":
        return SimplifiedMetaTrainer(**kwargs)
    if mode == "unrolled":
        return UnrolledMetaTrainer(**kwargs)
    raise ValueError(f"Invalid mode: {mode!r}. Choose one of simplified, unrolled")
