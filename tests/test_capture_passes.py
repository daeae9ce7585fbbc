"""Inputs of backward passes within others, of compiled models, and of layers called many times."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nested_optim import DGD

from .test_capture import assert_captured, assert_nothing_captured, captured, mlp, randn


def staged(optimizer):
    return [part for pool in optimizer._capture._pools.values() for part in pool.staged]


# ---------------------------------------------------------------------- passes within passes


def shared_layer(**options):
    layer = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    return layer, DGD(layer, 0.1, **options)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_weight_shared_across_a_checkpoint_keeps_the_inputs_on_both_sides(reentrant):
    layer, optimizer = shared_layer()
    seen = []

    def call(x):
        seen.append(x.detach())
        return layer(x).tanh()

    h = call(randn(3, 4).requires_grad_())
    h = checkpoint(call, h, use_reentrant=reentrant)
    call(h).sum().backward()
    rows, total = captured(optimizer, layer.weight)
    assert total == len(rows) == 9
    expected = torch.cat(seen[:3]) if len(seen) == 4 else torch.cat(seen)
    assert {tuple(row) for row in rows.tolist()} == {tuple(row) for row in expected.tolist()}
    assert not staged(optimizer)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints_within_checkpoints_lose_nothing_either():
    layer, optimizer = shared_layer()

    def inner(x):
        return layer(x).tanh()

    def outer(x):
        x = checkpoint(inner, layer(x).tanh(), use_reentrant=True)
        return layer(x)

    for micro_batch in (1, 2):
        checkpoint(outer, randn(3, 4).requires_grad_(), use_reentrant=True).sum().backward()
        assert captured(optimizer, layer.weight)[1] == 9 * micro_batch
        assert not staged(optimizer)


def test_samples_across_a_checkpoint_are_of_all_inputs():
    """Places in the stream are given once: 4 of 9 rows, never one of them twice."""
    for seed in range(5):
        layer, optimizer = shared_layer(max_tokens=4)
        h = layer(randn(3, 4, seed=seed).requires_grad_()).tanh()
        h = checkpoint(lambda t, layer=layer: layer(t).tanh(), h, use_reentrant=True)
        layer(h).sum().backward()
        pool = optimizer._capture._pools[layer.weight]
        sample = pool.sample(keyed=True)
        assert (len(sample.rows), sample.total) == (4, 9)
        assert len(sample.keys.unique()) == 4 and len(sample.rows.unique(dim=0)) == 4


def test_a_gradient_that_goes_elsewhere_leaves_nothing_behind():
    model = mlp()
    optimizer = DGD(model, 0.1)
    x = randn(3, 4).requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    assert not staged(optimizer)
    # Nor one that is taken within another backward pass.
    y = model(x).sum()
    h = randn(3, 4).requires_grad_()
    out = model(h)
    out.register_hook(lambda _: torch.autograd.grad(y, x) and None)
    out.sum().backward()
    assert not staged(optimizer)
    assert captured(optimizer, model[0].weight)[1] == 3


def test_a_backward_pass_that_fails_brings_nothing_to_the_next():
    layer, optimizer = shared_layer()
    x = randn(3, 4).requires_grad_()

    def fail(_):
        raise ValueError("no gradient")

    x.register_hook(fail)
    h = layer(x)
    h.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match="no gradient"):
        h.sum().backward()
    layer.zero_grad()
    z = randn(2, 4, seed=1)
    layer(z).sum().backward()
    assert_captured(optimizer, layer.weight, z)
    optimizer.zero_grad()
    assert not staged(optimizer) and not optimizer._capture._tasks


# ---------------------------------------------------------------------- many calls


@pytest.mark.parametrize("max_tokens", [1, 16])
def test_a_layer_called_many_times_keeps_a_bounded_sample_within_a_backward_pass(max_tokens):
    layer, optimizer = shared_layer(max_tokens=max_tokens)
    twin, all_of_it = shared_layer(max_tokens=10_000)
    twin.load_state_dict(layer.state_dict())
    most = []
    for module in (layer, twin):
        h = randn(8, 4)
        for _ in range(60):
            h = module(h).tanh()
            h.register_hook(lambda _: most.append(sum(len(p.rows) for p in staged(optimizer))))
        h.sum().backward()
    assert max(most) <= 2 * max_tokens + 8
    sample = optimizer._capture._pools[layer.weight].sample(keyed=True)
    whole = all_of_it._capture._pools[twin.weight].sample(keyed=True)
    assert sample.total == whole.total == 480
    index = whole.keys.topk(max_tokens, largest=False).indices.sort().values
    assert torch.equal(sample.rows, whole.rows[index])  # as if they had all waited


# ---------------------------------------------------------------------- compiled models


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_in_eval_mode_is_not_captured(backend):
    torch._dynamo.reset()
    model = mlp()
    optimizer = DGD(model, 0.1)
    compiled = torch.compile(model, backend=backend)
    x, other = randn(5, 4), randn(7, 4, seed=1)
    model.eval()
    compiled(other).sum().backward()
    assert_nothing_captured(optimizer)
    optimizer.zero_grad()
    model.train()
    compiled(x).sum().backward()
    assert_captured(optimizer, model[0].weight, x)
    model.eval()
    with torch.no_grad():
        compiled(other)
    compiled(other).sum().backward()
    model.train()
    assert_captured(optimizer, model[0].weight, x)


# ---------------------------------------------------------------------- what is held, or refused


def test_under_autocast_the_input_itself_waits_beside_the_layer_s_cast_of_it():
    """The price that DGD's documentation names; without DGD only the cast is kept."""
    for watched in (False, True):
        layer = nn.Linear(4, 4)
        optimizer = DGD(layer, 0.1) if watched else None
        x = torch.ones(5, 4)
        storage = weakref.ref(x.untyped_storage())
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x).float().sum()
        del x
        gc.collect()
        assert (storage() is not None) == watched
        loss.backward()
        gc.collect()
        assert storage() is None
        assert optimizer is None or captured(optimizer, layer.weight)[0].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_inputs_are_refused_with_the_reason(layout):
    layer = nn.Linear(4, 2)
    optimizer = DGD(layer, 0.1)
    x = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=layout)
    with pytest.raises(RuntimeError, match=r"nested tensor.*decay=0"):
        layer(x)
    optimizer.param_groups[0]["decay"] = 0.0
    layer(x)
