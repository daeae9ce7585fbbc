"""One run: a model, an optimizer, a budget of steps, and the validation loss on the way."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .data import Images, Text, starts, windows
from .methods import METHODS
from .models import VOCABULARY, ResNet, Transformer

#: Raised when runs come out differently for the same job.
PROTOCOL = 1
WARMUP = 0.05  # of the steps, linear; then half a cosine down to FLOOR
FLOOR = 0.1
EVALUATIONS = 40  # along a run
HELD_OUT_SEED = 12345
#: Batches whose numbers are drawn, and go to a GPU, at a time.
AHEAD = 100


@dataclass(frozen=True)
class Size:
    """A model and its budget; ``length`` is bytes of context, 0 for images."""

    width: int
    layers: int
    heads: int
    batch: int
    steps: int
    length: int = 0
    evaluation_batches: int = 16


#: By task, then by size. ``full`` and ``small``, the same models on a smaller budget, want a GPU;
#: ``tiny`` is for a CPU.
SIZES = {
    "lm": {
        "full": Size(width=384, layers=6, heads=6, batch=64, steps=2000, length=256),
        "small": Size(384, 6, 6, 16, 1000, length=256),
        "tiny": Size(96, 3, 3, 12, 400, length=96, evaluation_batches=8),
        "test": Size(16, 1, 2, 4, 8, length=16, evaluation_batches=1),
    },
    "vit": {
        "full": Size(width=192, layers=6, heads=3, batch=128, steps=3000),
        "small": Size(192, 6, 3, 128, 1000),
        "tiny": Size(48, 2, 2, 32, 300, evaluation_batches=8),
        "test": Size(16, 1, 2, 4, 8, evaluation_batches=1),
    },
    "resnet": {
        "full": Size(width=32, layers=3, heads=0, batch=128, steps=3000),
        "small": Size(32, 3, 0, 128, 1000),
        "tiny": Size(8, 1, 0, 32, 300, evaluation_batches=8),
        "test": Size(4, 1, 0, 4, 8, evaluation_batches=1),
    },
}


@dataclass(frozen=True)
class Job:
    task: str
    size: str
    data: str
    method: str
    lr: float
    weight_decay: float
    seed: int

    def identity(self) -> dict[str, Any]:
        size = asdict(SIZES[self.task][self.size])
        return {**asdict(self), "settings": METHODS[self.method].settings, "model": size}


class Task:
    """A model with its data on a device: batches by seed, losses, and held-out batches."""

    def __init__(self, job: Job, data: Text | Images, device: torch.device) -> None:
        self.size, self.device, self.data = SIZES[job.task][job.size], device, data
        size = self.size
        torch.manual_seed(job.seed)
        if isinstance(data, Text):
            model: nn.Module = Transformer(
                size.width, size.layers, size.heads, size.length, VOCABULARY
            )
            parts = [data.train, data.validation, data.test]
            self.parts: list[Any] = [part.to(device) for part in parts]
        else:
            patches = (32 // 4) ** 2
            if job.task == "vit":
                model = Transformer(
                    size.width, size.layers, size.heads, patches, data.classes, patch=4
                )
            else:
                model = ResNet(size.width, size.layers, data.classes)
            self.parts = [
                tuple(t.to(device) for t in part)
                for part in (data.train, data.validation, data.test)
            ]
            shape = (1, 3, 1, 1)
            self.mean = torch.tensor(data.mean, device=device).view(shape) * 255
            self.std = torch.tensor(data.std, device=device).view(shape) * 255
        if device.type == "cuda":
            # What torch 2.11 takes by default on an H200. At a high learning rate it returned
            # gradients of NaN, where every other implementation trained on.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.model = model.to(device)
        self.generator = torch.Generator().manual_seed(1000 + job.seed)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.device.type == "cuda":
            # No weight is used twice, and casts that are kept have no place in a CUDA graph.
            return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
        return nullcontext()  # bfloat16 gains nothing on most CPUs

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """What chooses the next training batch, and how its images are changed; on the host.

        Args:
            generator: of another series of batches than the one that is trained on.

        Returns:
            a row of integers per sample.
        """
        size, part = self.size, self.parts[0]
        generator = generator or self.generator
        if size.length:
            return starts(part, size.length + 1, size.batch, generator)[:, None]
        at = torch.randint(len(part[0]), (size.batch, 1), generator=generator)
        return torch.cat([at, changes(size.batch, generator)], dim=1)

    def drawn(self) -> Iterator[Tensor]:
        """What :meth:`draw` gives, on the device. An upload is of many batches there."""
        on_device = self.device.type == "cuda"
        while True:
            block = torch.stack([self.draw() for _ in range(AHEAD if on_device else 1)])
            if on_device:
                block = block.pin_memory().to(self.device, non_blocking=True)
            yield from block

    def loss_of(self, drawn: Tensor) -> Tensor:
        """The training loss of what :meth:`draw` chose, which lies on the device."""
        with self.autocast():
            if self.size.length:
                found = windows(self.parts[0], self.size.length + 1, drawn[:, 0])
                return self._loss(found[:, :-1], found[:, 1:])
            images, labels = self.parts[0]
            at = drawn[:, 0]
            return self._loss(self._prepare(images[at], drawn[:, 1:]), labels[at])

    def train_loss(self) -> Tensor:
        return self.loss_of(self.draw().to(self.device))

    def _prepare(self, images: Tensor, changed: Tensor | None) -> Tensor:
        """Normalised; and with ``changes`` also shifted by up to 4 pixels and mirrored."""
        x = (images.float() - self.mean) / self.std
        if changed is None:
            return x
        padded = F.pad(x, (4, 4, 4, 4))
        down, right, mirrored = changed.split(1, dim=1)
        pixels = torch.arange(32, device=self.device)
        rows, columns = down + pixels, right + pixels
        columns = torch.where(mirrored.bool(), columns.flip(1), columns)
        index = torch.arange(len(x), device=self.device)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
        # Contiguous: on channels-last images of three channels torch 2.13's CPU convolutions crash.
        return moved.permute(0, 3, 1, 2).contiguous()

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.model(x)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), y.reshape(-1))

    @torch.no_grad()
    def held_out(self, part: int) -> dict[str, float]:
        """Mean loss, and accuracy of images, on the same batches in every run."""
        self.model.eval()
        generator = torch.Generator().manual_seed(HELD_OUT_SEED + part)
        losses, right = [], []
        for x, y in self._held_out_batches(part, generator):
            with self.autocast():
                logits = self.model(x).float()
            losses.append(F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1)))
            right.append((logits.argmax(-1) == y).float().mean())
        self.model.train()
        found = {"loss": float(torch.stack(losses).mean())}
        if not self.size.length:
            found["accuracy"] = float(torch.stack(right).mean())
        return found

    def _held_out_batches(self, part: int, generator: torch.Generator) -> Any:
        if self.size.length:
            length, of = self.size.length + 1, self.parts[part]
            for _ in range(self.size.evaluation_batches):
                at = starts(of, length, self.size.batch, generator)
                found = windows(of, length, at.to(self.device))
                yield found[:, :-1], found[:, 1:]
            return
        images, labels = self.parts[part]
        everything = len(images) if self.size.evaluation_batches >= 16 else self.size.batch * 8
        for start in range(0, min(len(images), everything), 500):
            taken = slice(start, min(start + 500, everything))
            yield self._prepare(images[taken], None), labels[taken]


def changes(samples: int, generator: torch.Generator) -> Tensor:
    """How images are shifted down and to the right, from 0 to 8, and whether they are mirrored."""
    shifts = [torch.randint(9, (samples, 1), generator=generator) for _ in range(2)]
    mirrored = torch.rand(samples, 1, generator=generator) < 0.5
    return torch.cat([*shifts, mirrored.long()], dim=1)


def schedule(steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at a step."""
    warmup = max(1, round(WARMUP * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = (step - warmup) / max(1, steps - warmup)
        return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1.0, share))) / 2

    return factor


def optimizers(job: Job, model: nn.Module) -> list[Optimizer]:
    steps = SIZES[job.task][job.size].steps
    return METHODS[job.method].build(model, job.lr, job.weight_decay, steps)


def run(job: Job, data: Text | Images, device: torch.device) -> dict[str, Any]:
    """Train, and measure the validation loss on the way and the test loss at the end.

    A run whose loss is no number any more ends there: its losses are infinite from then on.
    """
    task = Task(job, data, device)
    opts = optimizers(job, task.model)
    steps = task.size.steps
    schedulers = [LambdaLR(opt, schedule(steps)) for opt in opts]
    every = max(1, steps // EVALUATIONS)
    at, losses = [0], [task.held_out(1)["loss"]]
    training: list[Tensor] = []
    began = time.perf_counter()
    for step in range(1, steps + 1):
        loss = task.train_loss()
        loss.backward()
        for opt, scheduler in zip(opts, schedulers):
            opt.step()
            scheduler.step()
            opt.zero_grad()
        training.append(loss.detach())
        if step % every == 0 or step == steps:
            at.append(step)
            losses.append(task.held_out(1)["loss"])
            if not math.isfinite(losses[-1]):
                losses[-1] = math.inf
                break
    diverged = not math.isfinite(losses[-1])
    return {
        "steps": at,
        "validation": [str(x) if math.isinf(x) else x for x in losses],
        "training": float(torch.stack(training[-every:]).mean()) if not diverged else "inf",
        "final_validation": "inf" if diverged else task.held_out(1),
        "test": "inf" if diverged else task.held_out(2),
        "seconds": time.perf_counter() - began,
        "parameters": sum(p.numel() for p in task.model.parameters()),
    }


@functools.lru_cache(maxsize=2)
def load(path: str, device: str = "cpu") -> Text | Images:
    """Data that the command has saved for its workers, kept where they need it."""
    found: Text | Images = torch.load(path, map_location=device, weights_only=False)
    return found


def work(job: Job, path: str, device: str) -> dict[str, Any]:
    return run(job, load(path), torch.device(device))


def time_steps(job: Job, data: Text | Images, device: torch.device, repeats: int = 60) -> Any:
    """Milliseconds of forward and backward, and of the optimizer's step, this run alone."""
    task = Task(job, data, device)
    opts = optimizers(job, task.model)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    passes, steps = [], []
    for repeat in range(repeats + 10):
        start = wait()
        task.train_loss().backward()
        middle = wait()
        for opt in opts:
            opt.step()
        end = wait()
        for opt in opts:
            opt.zero_grad()
        if repeat >= 10:  # warmed up
            passes.append((middle - start) * 1e3)
            steps.append((end - middle) * 1e3)
    return {
        "forward_backward_ms": float(torch.tensor(passes).median()),
        # A mean, because M3's step is dearer where a chunk ends.
        "step_ms": float(torch.tensor(steps).mean()),
    }
