"""The retention suite's streams: which samples a run sees, and when, and where they come from."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

import numpy as np
import torch

from benchmarks.retention import data
from benchmarks.retention.stream import Reservoir, make_stream, plan


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.digits()


# Streams


@pytest.mark.parametrize("selection", [False, True])
def test_tasks_of_a_stream_are_disjoint_and_complete(digits, selection):
    stream = make_stream(digits, seed=3, selection=selection)
    assert sorted(c for task in stream.classes for c in task) == list(range(10))
    taken = np.concatenate(stream.train)
    assert len(np.unique(taken)) == len(taken)
    held_out = len(stream.test_labels) if selection else 0
    assert len(taken) == len(digits.train[1]) - held_out
    for task, (classes, samples) in enumerate(zip(stream.classes, stream.train)):
        assert set(digits.train[1][samples].tolist()) == set(classes)
        assert set(stream.train_labels[samples].tolist()) == {2 * task, 2 * task + 1}
    assert torch.equal(stream.class_tasks[stream.test_labels], stream.test_tasks)


def test_selection_runs_never_see_what_they_are_measured_on_nor_the_test_samples(digits):
    stream = make_stream(digits, seed=1000, selection=True)
    trained = {tuple(x.tolist()) for x in digits.train[0][np.concatenate(stream.train)]}
    assert not trained & {tuple(x.tolist()) for x in stream.test_inputs}
    assert not {tuple(x.tolist()) for x in digits.test[0]} & {
        tuple(x.tolist()) for x in stream.test_inputs
    }


def test_labels_are_renamed_to_the_order_of_the_stream(digits):
    stream = make_stream(digits, seed=5)
    order = [c for task in stream.classes for c in task]
    assert stream.train_labels.tolist() == [order.index(int(c)) for c in digits.train[1]]
    assert stream.test_labels.tolist() == [order.index(int(c)) for c in digits.test[1]]


def test_order_of_classes_is_drawn_by_the_seed(digits):
    orders = [make_stream(digits, seed).classes for seed in range(5)]
    assert len(set(orders)) == 5
    assert make_stream(digits, 2).classes == orders[2]


TASKS = (np.arange(0, 25), np.arange(100, 130), np.arange(200, 220))


def test_one_pass_gives_each_sample_once_in_an_order_of_the_seed():
    planned = plan(TASKS, 0, epochs=1, batch=10)
    assert [len(batches) for batches in planned] == [3, 3, 2]
    for samples, batches in zip(TASKS, planned):
        assert sorted(np.concatenate(batches)) == list(samples)
        assert list(np.concatenate(batches)) != list(samples)
    again, other = plan(TASKS, 0, epochs=1, batch=10), plan(TASKS, 1, epochs=1, batch=10)
    flat = [np.concatenate(list(itertools.chain(*p))).tolist() for p in (planned, again, other)]
    assert flat[0] == flat[1] != flat[2]


def test_several_passes_are_shuffled_anew():
    [batches] = plan(TASKS[:1], 0, epochs=2, batch=5)
    first, second = np.concatenate(batches[:5]), np.concatenate(batches[5:])
    assert sorted(first) == sorted(second) == list(TASKS[0])
    assert list(first) != list(second)


def test_replay_adds_old_samples_and_leaves_the_new_ones_as_they_are():
    plain = plan(TASKS, 0, epochs=2, batch=10)
    replayed = plan(TASKS, 0, epochs=2, batch=10, replay=15)
    before: set[int] = set()
    for batches, with_old in zip(plain, replayed):
        for new, both in zip(batches, with_old):
            assert list(both[: len(new)]) == list(new)
            old = both[len(new) :]
            assert len(old) == min(10, len(before), 15)
            assert len(set(old)) == len(old)
            assert set(old) <= before
            before |= set(new)


def test_reservoir_holds_every_sample_with_the_same_chance():
    trials, offered, capacity = 2000, 40, 10
    counts = np.zeros(offered)
    for seed in range(trials):
        reservoir = Reservoir(capacity, np.random.default_rng(seed))
        for part in np.arange(offered).reshape(-1, 8):
            reservoir.offer(part)
        held = reservoir.draw(capacity)
        assert len(set(held)) == capacity
        counts[held] += 1
    expected = trials * capacity / offered
    deviation = (trials * capacity / offered * (1 - capacity / offered)) ** 0.5
    assert np.abs(counts - expected).max() < 4 * deviation


# Data files


def sheets(path: Path, classes: range) -> dict[tuple[str, int], np.ndarray]:
    """An archive of two rows of training tiles and one of test tiles for each class."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    written = {}
    with tarfile.open(path, "w") as tar:
        for split, rows in (("train", 2), ("test", 1)):
            for c in classes:
                tiles = generator.integers(0, 256, (rows * 25, 3, 32, 32), dtype=np.uint8)
                grid = tiles.reshape(rows, 25, 3, 32, 32).transpose(0, 3, 1, 4, 2)
                stored = io.BytesIO()
                image.fromarray(grid.reshape(rows * 32, 800, 3)).save(stored, "png")
                member = tarfile.TarInfo(f"{split}/{c:02d}.png")
                member.size = stored.tell()
                stored.seek(0)
                tar.addfile(member, stored)
                written[split, c] = tiles
    return written


def test_cifar_is_read_from_sheets_and_from_arrays_alike(tmp_path):
    written = sheets(tmp_path / "half.tar", range(50, 100))
    read = data.cifar100(tmp_path / "half.tar")
    assert read.name == "cifar100-50-99"
    assert read.train[0].shape == (2500, 3, 32, 32) and read.test[0].shape == (1250, 3, 32, 32)
    for c in (50, 77, 99):
        assert np.array_equal(read.train[0][read.train[1] == c - 50], written["train", c])
        assert np.array_equal(read.test[0][read.test[1] == c - 50], written["test", c])
    arrays = {
        f"{kind}_{split}": np.concatenate(
            [
                t if kind == "x" else np.full(len(t), c)
                for (s, c), t in written.items()
                if s == split
            ]
        )
        for split in ("train", "test")
        for kind in "xy"
    }
    np.savez(tmp_path / "half.npz", **arrays)
    same = data.cifar100(tmp_path / "half.npz")
    assert torch.equal(same.train[0], read.train[0]) and torch.equal(same.test[1], read.test[1])
    with pytest.raises(ValueError, match=r"gives 10 classes .* --classes"):
        data.cifar100(tmp_path / "half.npz", range(60, 70))


def test_clinc_is_read_as_one_task_per_domain(tmp_path):
    domains = {"money": ["pay", "owe"], "food": ["eat", "cook"], "road": ["go", "park"]}
    intents = [intent for d in domains.values() for intent in d]
    queries = {
        split: [[f"please {intent} {n} times", intent] for intent in intents for n in range(count)]
        for split, count in (("train", 6), ("val", 2), ("test", 3))
    }
    (tmp_path / "data_full.json").write_text(json.dumps(queries))
    (tmp_path / "domains.json").write_text(json.dumps(domains))
    read = data.find(tmp_path)
    assert (read.name, read.tasks, read.classes_per_task) == ("clinc150", 3, 2)
    assert read.groups == ((0, 1), (2, 3), (4, 5))
    assert read.train[0].shape == (36, data.TEXT_FEATURES)
    assert read.train[0].float().square().mean().item() == pytest.approx(1, abs=0.01)
    stream = make_stream(read, 1)
    assert sorted(stream.classes) == sorted(read.groups)
    assert len(make_stream(read, 1, selection=True).test_labels) == 12  # its own validation
    assert sum(map(len, make_stream(read, 1, selection=True).train)) == 36


def test_a_saved_data_set_comes_back(digits, tmp_path):
    digits.save(tmp_path / "d.pt")
    loaded = data.Dataset.load(tmp_path / "d.pt")
    assert loaded.name == "digits" and loaded.tasks == 5
    assert all(map(torch.equal, loaded.train + loaded.test, digits.train + digits.test))


def test_what_no_stream_can_be_made_of_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing at"):
        data.find(tmp_path / "missing.tar")
    with pytest.raises(ValueError, match=r"expected \.npz, \.tar"):
        data.find(tmp_path)
    with pytest.raises(ValueError, match="give --data"):
        data.find(None, range(5))
