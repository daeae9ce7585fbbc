"""What the models are trained on: bytes of text, images of CIFAR-100."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: Validation and test, of the text's end.
TEXT_SHARES = (0.05, 0.05)


@dataclass(frozen=True)
class Text:
    """Bytes of text, cut once into three pieces.

    Attributes:
        name: tells what it is, with a digest of the bytes.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor


def standard_library() -> bytes:
    """The source files of Python's standard library, less its tests, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not skipped & set(path.relative_to(root).parts)
    )
    return b"\n".join(path.read_bytes() for _, path in files)


def text(path: Path | None) -> Text:
    """A file's bytes, or the standard library's.

    Raises:
        ValueError: the file is not there, or too short to be cut.
    """
    if path is not None and not path.is_file():
        raise ValueError(f"there is no text at {path}")
    content = standard_library() if path is None else path.read_bytes()
    if len(content) < 100_000:
        raise ValueError(f"{len(content)} bytes of text are too few: give 100,000 or more")
    name = "standard library" if path is None else path.name
    digest = hashlib.sha256(content).hexdigest()[:12]
    everything = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    held_out = [int(share * len(everything)) for share in TEXT_SHARES]
    train, validation, test = everything.split([len(everything) - sum(held_out), *held_out])
    return Text(f"{name} ({len(content)} bytes, sha256 {digest})", train, validation, test)


def starts(of: Tensor, length: int, batch: int, generator: torch.Generator) -> Tensor:
    """Where ``batch`` windows of ``length`` bytes begin, at random; on the host."""
    return torch.randint(len(of) - length + 1, (batch,), generator=generator)


def windows(of: Tensor, length: int, starts: Tensor) -> Tensor:
    """``length`` bytes from each start, as int64; all on one device."""
    return of[starts[:, None] + torch.arange(length, device=of.device)].long()


@dataclass(frozen=True)
class Images:
    """Labelled images, uint8 of shape (n, 3, 32, 32); validation is cut from the training set."""

    name: str
    classes: int
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def images(path: Path) -> Images:
    """CIFAR-100, or half of it, with a tenth of the training images held out.

    Raises:
        ValueError: there are no such images at ``path``.
    """
    from ..retention.data import CIFAR_MEAN, CIFAR_STD, cifar100

    if not path.exists():
        raise ValueError(f"there is nothing at {path}")
    found = cifar100(path)
    inputs, labels = found.train
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(order) // 10], order[len(order) // 10 :]
    return Images(
        found.name,
        found.classes,
        (inputs[kept], labels[kept]),
        (inputs[held], labels[held]),
        found.test,
        CIFAR_MEAN,
        CIFAR_STD,
    )
