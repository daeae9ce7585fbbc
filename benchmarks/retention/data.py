"""Data sets for the streams: scikit-learn's digits, half of CIFAR-100, CLINC150 by domain.

They are read and prepared once, into one file that every worker process maps.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.model_selection import train_test_split
from torch import Tensor

TEST_SHARE = 0.3  # of the digits, which come without a split of their own
TEST_SPLIT_SEED = 0
TILE = 32  # pixels
TILES_IN_A_ROW = 25
CIFAR_MEAN = (0.50708, 0.48655, 0.44092)
CIFAR_STD = (0.26733, 0.25644, 0.27615)
TEXT_FEATURES = 2048


@dataclass(frozen=True)
class Dataset:
    """Samples with labels 0, 1, ..., C - 1.

    Attributes:
        groups: the classes of each task where the data fixes them (their order is drawn); None
            where classes are drawn, ``classes_per_task`` at a time.
        validation: samples to choose learning rates on, where the data has some beside training
            and test; otherwise None.
        mean, std: per channel of images that are kept as bytes; empty where inputs are ready.
        epochs: passes over each task if nothing else is asked for.
    """

    name: str
    model: str
    classes: int
    classes_per_task: int
    epochs: int
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor] | None
    test: tuple[Tensor, Tensor]
    groups: tuple[tuple[int, ...], ...] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def tasks(self) -> int:
        return self.classes // self.classes_per_task

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part")
        torch.save(self.__dict__, part)
        part.replace(path)  # a run that is stopped here leaves no half of a file

    @classmethod
    def load(cls, path: Path) -> Dataset:
        return cls(**torch.load(path, mmap=True, weights_only=True))


def digits() -> Dataset:
    """1,797 digits of 8 x 8 pixels: 5 tasks of 2 classes."""
    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (images / 16).astype(np.float32),
        labels.astype(np.int64),
        test_size=TEST_SHARE,
        stratify=labels,
        random_state=TEST_SPLIT_SEED,
    )
    return Dataset(
        name="digits",
        model="mlp",
        classes=10,
        classes_per_task=2,
        epochs=10,
        train=(torch.from_numpy(x_train), torch.from_numpy(y_train)),
        validation=None,
        test=(torch.from_numpy(x_test), torch.from_numpy(y_test)),
    )


def cifar100(path: Path, classes: range | None = None) -> Dataset:
    """50 classes of CIFAR-100: 10 tasks of 5 classes.

    Args:
        path: ``.npz`` with ``x_train`` (uint8, n x 3 x 32 x 32), ``y_train``, ``x_test`` and
            ``y_test``; a ``.tar`` of image sheets, one per class and split; or a folder of such.
        classes: the classes to take, where the data has more than 50.

    Raises:
        ValueError: the data has another number of classes, or is none of these.
    """
    if path.suffix == ".npz":
        with np.load(path) as file:
            arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    else:
        archives = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not archives or any(a.suffix != ".tar" for a in archives):
            raise ValueError(f"{path.name}: expected .npz, .tar, or a folder that holds .tar files")
        arrays = _read_sheets(archives, classes)
    found = np.unique(arrays["y_train"])
    taken = found if classes is None else found[np.isin(found, list(classes))]
    if len(taken) != 50:
        raise ValueError(
            f"{path.name} gives {len(taken)} classes where the stream takes 50: choose them with "
            "--classes, such as --classes 0-49"
        )
    number = {int(c): i for i, c in enumerate(taken)}

    def part(split: str) -> tuple[Tensor, Tensor]:
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        kept = np.isin(labels, taken)
        renamed = np.array([number[int(c)] for c in labels[kept]], np.int64)
        return torch.from_numpy(np.ascontiguousarray(images[kept])), torch.from_numpy(renamed)

    return Dataset(
        name=f"cifar100-{taken[0]}-{taken[-1]}",
        model="conv",
        classes=50,
        classes_per_task=5,
        epochs=1,
        train=part("train"),
        validation=None,
        test=part("test"),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    )


def _read_sheets(archives: list[Path], classes: range | None) -> dict[str, Any]:
    """Images from archives of ``train/CC*`` and ``test/CC*``: sheets of tiles, CC the class."""
    from PIL import Image

    images: dict[str, dict[int, Any]] = {"train": {}, "test": {}}
    for archive in archives:
        with tarfile.open(archive) as tar:
            for member in tar:
                split, _, name = member.name.partition("/")
                if split not in images or not name[:2].isdecimal():
                    continue  # the original order of the training images
                if classes is not None and int(name[:2]) not in classes:
                    continue
                stored = tar.extractfile(member)
                assert stored is not None
                sheet = np.asarray(Image.open(io.BytesIO(stored.read())).convert("RGB"))
                rows = len(sheet) // TILE
                tiles = sheet.reshape(rows, TILE, TILES_IN_A_ROW, TILE, 3).swapaxes(1, 2)
                tiles = tiles.reshape(-1, TILE, TILE, 3).transpose(0, 3, 1, 2)
                images[split][int(name[:2])] = tiles
    arrays = {}
    for split, of_class in images.items():
        if not of_class:
            raise ValueError(f"no {split} images of these classes in {archives[0].name}")
        order = sorted(of_class)
        arrays[f"x_{split}"] = np.concatenate([of_class[c] for c in order])
        arrays[f"y_{split}"] = np.repeat(order, [len(of_class[c]) for c in order])
    return arrays


def clinc150(folder: Path) -> Dataset:
    """Queries of 150 intents in 10 domains (Larson et al. 2019): one task per domain.

    Features are hashed counts of words and pairs of words, scaled so that their mean square is 1.

    Args:
        folder: holds ``data_full.json`` and ``domains.json``.
    """
    queries = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    number = {
        intent: i for i, intent in enumerate(intent for d in domains.values() for intent in d)
    }
    hashing = HashingVectorizer(n_features=TEXT_FEATURES, ngram_range=(1, 2))

    def part(split: str) -> tuple[Tensor, Tensor]:
        texts, intents = zip(*queries[split])
        features = hashing.transform(texts).toarray() * TEXT_FEATURES**0.5
        # Half precision: what is lost is far below what hashing loses.
        inputs = torch.from_numpy(features.astype(np.float16))
        return inputs, torch.tensor([number[intent] for intent in intents])

    return Dataset(
        name="clinc150",
        model="text",
        classes=len(number),
        classes_per_task=len(number) // len(domains),
        epochs=1,
        train=part("train"),
        validation=part("val"),
        test=part("test"),
        groups=tuple(tuple(number[intent] for intent in intents) for intents in domains.values()),
    )


def find(path: Path | None, classes: range | None = None) -> Dataset:
    """The data set at ``path``; the digits where there is none.

    Raises:
        ValueError: there is nothing at ``path`` that a stream can be made of.
    """
    if path is None:
        if classes is not None:
            raise ValueError("--classes chooses among the classes of CIFAR-100: give --data too")
        return digits()
    if not path.exists():
        raise ValueError(f"there is nothing at {path}")
    if (path / "data_full.json").is_file():
        if classes is not None:
            raise ValueError("--classes does not apply to CLINC150, which is taken whole")
        return clinc150(path)
    return cifar100(path, classes)
