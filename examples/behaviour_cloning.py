"""Behaviour cloning of a scripted expert in CartPole, with the optimizer chosen by a YAML file.

    python examples/behaviour_cloning.py examples/behaviour_cloning_adam.yaml
    python examples/behaviour_cloning.py examples/behaviour_cloning_nested.yaml --logdir runs
    tensorboard --logdir runs

A small network learns from demonstrations which way the expert pushes the cart. The task's reward,
which training never sees, is measured before and after. Needs gymnasium, tensorboard, pyyaml,
pydantic and tqdm.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import gymnasium
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset, random_split
from torch.utils.tensorboard import SummaryWriter

from nested_optim.integrations.config import optimizer_from_config
from nested_optim.integrations.loop import Run, fit
from nested_optim.integrations.optimizers import logged_metrics


class Settings(BaseModel):
    """What a configuration file holds; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")

    optimizer: dict[str, Any]  # for optimizer_from_config
    seed: int = 0
    episodes: int = Field(20, ge=1)  # demonstrations
    steps_per_episode: int = Field(100, ge=1)
    noise: float = Field(0.3, ge=0, le=1)  # how often a demonstration is disturbed
    hidden: int = Field(32, ge=1)
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(64, ge=1)
    schedule: Literal["constant", "cosine"] = "cosine"
    clip: float | None = None
    meta_every: int | None = None  # steps, for optimizers with explicit meta updates
    log_every: int = Field(10, ge=1)  # steps
    evaluation_episodes: int = Field(10, ge=1)


class Policy(nn.Module):
    """Observations (batch, 4) to logits of the two actions (batch, 2)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        )
        self.head = nn.Linear(hidden, 2)

    def forward(self, observations: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(observations))
        return logits


def expert(observation: Tensor) -> int:
    """Push to the side to which the pole is about to fall, and a little towards the middle."""
    position, velocity, angle, turning = observation.tolist()
    return int(angle + 0.3 * turning + 0.02 * position + 0.05 * velocity > 0)


def demonstrate(settings: Settings) -> TensorDataset:
    """Observations (n, 4) and the expert's actions (n,).

    Some actions that are carried out are random, so that there is something to recover from; the
    label is always the expert's.
    """
    environment = gymnasium.make("CartPole-v1")
    generator = torch.Generator().manual_seed(settings.seed)
    observations, actions = [], []
    for episode in range(settings.episodes):
        state, _ = environment.reset(seed=settings.seed + episode)
        for _ in range(settings.steps_per_episode):
            observation = torch.from_numpy(state)
            action = expert(observation)
            observations.append(observation)
            actions.append(action)
            if torch.rand((), generator=generator) < settings.noise:
                action = int(torch.randint(2, (), generator=generator))
            state, _, ended, cut, _ = environment.step(action)
            if ended or cut:
                break
    environment.close()
    return TensorDataset(torch.stack(observations), torch.tensor(actions))


@torch.no_grad()
def mean_return(act: Callable[[Tensor], int], settings: Settings) -> float:
    """The mean reward of an episode (500 is the most), in episodes unlike the demonstrated."""
    environment = gymnasium.make("CartPole-v1")
    total = 0.0
    for episode in range(settings.evaluation_episodes):
        state, _ = environment.reset(seed=1_000_000 + settings.seed + episode)
        over = False
        while not over:
            state, reward, ended, cut, _ = environment.step(act(torch.from_numpy(state)))
            total += float(reward)
            over = ended or cut
    environment.close()
    return total / settings.evaluation_episodes


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    observations, actions = batch
    return nn.functional.cross_entropy(model(observations), actions)


def train(settings: Settings, logdir: Path, progress: bool = True) -> dict[str, float]:
    """Returns before and after, and of the expert; writes the curves for TensorBoard."""
    torch.manual_seed(settings.seed)
    policy = Policy(settings.hidden)
    optimizer = optimizer_from_config(settings.optimizer, policy)

    data = demonstrate(settings)
    held_out, trained = random_split(data, [0.1, 0.9])
    loader = DataLoader(trained, settings.batch_size, shuffle=True)
    val_loader = DataLoader(held_out, settings.batch_size)
    scheduler = None
    if settings.schedule == "cosine":
        scheduler = CosineAnnealingLR(optimizer, settings.epochs * len(loader))

    def act(observation: Tensor) -> int:
        return int(policy(observation[None]).argmax())

    with SummaryWriter(str(logdir)) as writer:

        def log(run: Run) -> None:
            if run.event == "epoch" and run.val_loss is not None:
                writer.add_scalar("loss/held_out", run.val_loss, run.step)
            elif run.step % settings.log_every == 0 and run.loss is not None:
                writer.add_scalar("loss/train", float(run.loss), run.step)
                for i, group in enumerate(optimizer.param_groups):
                    writer.add_scalar(f"lr/{group.get('name', i)}", float(group["lr"]), run.step)
                for name, value in logged_metrics(optimizer).items():
                    writer.add_scalar(name, value, run.step)

        found = {"expert": mean_return(expert, settings), "before": mean_return(act, settings)}
        run = fit(
            policy,
            loader,
            optimizer,
            loss_fn,
            scheduler=scheduler,
            epochs=settings.epochs,
            clip=settings.clip,
            val_loader=val_loader,
            meta_every=settings.meta_every,
            callbacks=[log],
            progress=progress,
        )
        if hasattr(optimizer, "flush"):
            optimizer.flush()  # what windows still hold
        found["after"] = mean_return(act, settings)
        found["held_out_loss"] = float(run.val_loss or 0.0)
        for name in ("before", "after"):
            writer.add_scalar("return", found[name], 0 if name == "before" else run.step)
    return found


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, help="a YAML file")
    parser.add_argument("--logdir", type=Path, default=Path("runs"), help="for TensorBoard")
    parser.add_argument("--epochs", type=int, help="instead of the file's")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)
    settings = Settings.model_validate(yaml.safe_load(given.config.read_text()))
    if given.epochs is not None:
        settings = Settings.model_validate({**settings.model_dump(), "epochs": given.epochs})
    found = train(settings, given.logdir / given.config.stem, progress=not given.quiet)
    print(f"{given.config.stem}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
