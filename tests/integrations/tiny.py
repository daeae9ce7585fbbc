"""What the integrations' tests train: a model, its data, an optimizer that takes losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

from nested_optim import NestedOptimizer

FREQUENCIES = {"body": 3, "head": 1}


class Net(nn.Module):
    """Dropout and BatchNorm, which show any difference in random numbers and in buffers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8)
            )
            self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(x)))
        return y


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """A regression whose inputs get new noise each time, as augmentation does."""

    def __init__(self, size: int = 24, noise: float = 0.1, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, 4, generator=generator)
        self.y = self.x.sum(1, keepdim=True).sin()
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + self.noise * torch.randn(4), self.y[index]


def loader(size: int = 24, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(size), batch_size=batch_size, **{"shuffle": True, **options})


def held_out() -> DataLoader[Any]:
    return DataLoader(Noisy(12, seed=2), batch_size=4)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x).float(), y)


def levels(model: nn.Module, frequencies: dict[str, int] = FREQUENCIES) -> list[dict[str, Any]]:
    return [
        {
            "params": [(n, p) for n, p in model.named_parameters() if n.startswith(f"{name}.")],
            "frequency": frequency,
            "name": name,
        }
        for name, frequency in frequencies.items()
    ]


class LossAware(NestedOptimizer):
    """AdamW whose rate shrinks with the loss, times a multiplier that meta updates learn."""

    _learned_keys = ("log_multiplier",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        *,
        model: nn.Module,
        meta_lr: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, **options)
        self.param_groups[0]["log_multiplier"] = torch.zeros(1)
        self.param_groups[0]["k_unroll"] = 2
        self.model, self.meta_lr = model, meta_lr
        self._loss: Tensor | None = None
        self.last_meta_loss: Tensor | None = None
        self.used: list[float | None] = []  # the loss of each step
        self.unrolled: list[int] = []  # how many training batches each meta update had
        self.register_step_post_hook(lambda *_: self._forget())

    def observe_loss(self, loss: Tensor | None) -> None:
        self._loss = loss

    def _forget(self) -> None:
        self.used.append(None if self._loss is None else float(self._loss))
        self._loss = None

    def multiplier(self) -> Tensor:
        learned: Tensor = self.param_groups[0]["log_multiplier"].exp()
        return learned if self._loss is None else learned / (1 + self._loss)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr = float(group["lr"]) * float(self.multiplier())
        super()._update({**group, "lr": lr}, params, grads)

    @torch.enable_grad()
    def meta_update(
        self,
        val_batch: Any,
        train_batches: Iterable[Any],
        loss_fn: Callable[[Any, Any], Tensor],
    ) -> Tensor:
        """Descend on the loss after steps of plain SGD, in the logarithm of the multiplier."""
        learned = self.param_groups[0]["log_multiplier"].detach().clone().requires_grad_()
        params = dict(self.model.named_parameters())
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}

        def loss_at(params: dict[str, Tensor], batch: Any) -> Tensor:
            def model(*inputs: Any) -> Any:
                return functional_call(self.model, {**params, **buffers}, inputs)

            return loss_fn(model, batch)

        batches = list(train_batches)
        for batch in batches:
            grads = torch.autograd.grad(
                loss_at(params, batch), list(params.values()), create_graph=True
            )
            rate = self.param_groups[0]["lr"] * learned.exp()
            params = {n: p - rate * g for (n, p), g in zip(params.items(), grads)}
        loss = loss_at(params, val_batch)
        (slope,) = torch.autograd.grad(loss, learned)
        self.param_groups[0]["log_multiplier"] -= self.meta_lr * slope
        self.last_meta_loss = loss.detach()
        self.unrolled.append(len(batches))
        return self.last_meta_loss

    def metrics(self) -> dict[str, float]:
        found = {f"lr_multiplier/{g['name']}": float(self.multiplier()) for g in self.param_groups}
        if self.last_meta_loss is not None:
            found["meta_loss"] = float(self.last_meta_loss)
        return found


def largest_difference(left: nn.Module, right: nn.Module) -> float:
    """Between parameters and buffers of two models; NaN counts as infinite."""
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    found = [float((a.double() - b.double()).abs().max()) for a, b in pairs]
    return max(d if d == d else float("inf") for d in found)
