"""Samples of inputs: bounded, uniform, the same however a batch is cut."""

import itertools

import torch
from torch import nn

from nested_optim import DGD
from nested_optim.samples import EMPTY, Sample, padded, stream_keys, stream_seed, thinned

from .test_capture import captured, randn


def test_memory_is_bounded_over_micro_batches_and_no_generator_is_touched():
    layer = nn.Linear(4, 3)
    optimizer = DGD(layer, 0.1, max_tokens=6)
    before = torch.get_rng_state()
    for step in range(5):
        layer(randn(4, 4, seed=step, dtype=torch.float32)).sum().backward()
        rows, total = captured(optimizer, layer.weight)
        assert total == 4 * (step + 1)
        assert len(rows) == min(total, 6)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_does_not_depend_on_how_the_batch_was_cut():
    layers = [nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)]
    x = randn(24, 4, dtype=torch.float32)
    found = []
    for layer, parts in zip(layers, (1, 3, 12)):
        optimizer = DGD(layer, 0.1, max_tokens=6)
        for part in x.chunk(parts):
            layer(part).sum().backward()
        rows, _ = captured(optimizer, layer.weight)
        found.append(sorted((x == row).all(1).nonzero().item() for row in rows))
    assert found[0] == found[1] == found[2]
    assert found[0] != list(range(6))


def test_steps_sample_other_places_and_over_them_all_places_alike():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = DGD(layer, lr=1e-9, max_tokens=8)
    places = torch.zeros(32)
    draws = []
    for _ in range(400):
        layer(torch.arange(32.0).unsqueeze(1)).sum().backward()
        rows, total = captured(optimizer, layer.weight)
        assert total == 32
        draws.append(tuple(rows.flatten().int().tolist()))
        places[rows.flatten().long()] += 1
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(draws)) > 390
    # 100 expected at each place, with a standard deviation of 8.7.
    assert places.sum() == 3200
    assert places.min() > 60 and places.max() < 140
    assert ((places - 100) ** 2).mean().sqrt() < 13


def test_the_estimated_second_moment_is_right_on_average():
    layer = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    optimizer = DGD(layer, lr=1e-9, max_tokens=5)
    x = randn(40, 4)
    moments = []
    for _ in range(300):
        layer(x).sum().backward()
        rows, _ = captured(optimizer, layer.weight)
        moments.append(rows.T @ rows / len(rows))
        optimizer.step()
        optimizer.zero_grad()
    true, moments = x.T @ x / 40, torch.stack(moments)
    error = moments.mean(0) - true
    assert (error.abs() < 4 * moments.std(0) / 300**0.5).all()
    assert (moments[0] - true).norm() > 3 * error.norm()


def test_keys_are_those_of_the_stream_however_it_is_read():
    whole = stream_keys(stream_seed(3, 1), 0, 1000, torch.device("cpu"))
    parts = [
        stream_keys(stream_seed(3, 1), at, 100, torch.device("cpu")) for at in range(0, 1000, 100)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert len(whole.unique()) == 1000
    others = [stream_keys(stream_seed(*n), 0, 1000, torch.device("cpu")) for n in ((1, 3), (3, 2))]
    for a, b in itertools.combinations([whole, *others], 2):
        assert not (a == b).any()
        orders = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
        assert abs(torch.corrcoef(orders)[0, 1]) < 0.1
    # Successive places are unrelated too.
    order = whole.argsort().argsort().double()
    assert abs(torch.corrcoef(torch.stack([order[1:], order[:-1]]))[0, 1]) < 0.1


def test_thinning_and_padding():
    keys = torch.tensor([5, -3, 9, 0])
    sample = Sample(torch.arange(8.0).view(4, 2), keys, 4)
    kept = thinned(sample, 2)
    assert kept.keys.tolist() == [-3, 0] and kept.rows[:, 0].tolist() == [2.0, 6.0]
    assert thinned(sample, 4) is sample
    full = padded(sample, 6)
    assert full.keys.tolist() == [5, -3, 9, 0, EMPTY, EMPTY]
    assert not full.rows[4:].any()
    again = thinned(full, 4)
    assert again.keys.tolist() == keys.tolist()
