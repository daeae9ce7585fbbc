"""The unroll on a CUDA device: one gradient in its forms, real steps, and what it leaves alone."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nested_optim import DeepNestedOptimizer, NestedOptimizer, kernels
from nested_optim.meta import learned, unroll

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Block(nn.Module):
    """Scaled-dot-product attention with dropout, and batch normalization."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens):
        hidden = self.layer(self.embed(tokens))
        logits = self.head(self.norm(hidden.flatten(0, 1)))
        return nn.functional.cross_entropy(logits, tokens.roll(1, 1).flatten())


def tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (4, 6), generator=generator).cuda()


def build(model, steps=2, noise=0.02, **options):
    optimizer = DeepNestedOptimizer(
        model, **{"lr": 1e-2, "mode": "explicit", "weight_decay": 0.1, **options}
    )
    train(optimizer, model, range(steps))
    generator = torch.Generator().manual_seed(0)
    first = optimizer.param_groups[0]
    for module in learned.modules(first):
        flat = first[f"{module}_weights"]
        flat.add_(noise * torch.randn(flat.shape, generator=generator).to(flat))
    return optimizer


def train(optimizer, model, seeds, loss_fn=None):
    for seed in seeds:
        optimizer.zero_grad()
        loss = model(tokens(seed)) if loss_fn is None else loss_fn(model, tokens(seed))
        loss.backward()
        optimizer.step()


def in_bfloat16(model, given):
    with torch.autocast("cuda", torch.bfloat16):
        return model(given)


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "dtype, loss_fn, bound",
    [(torch.float64, None, 1e-9), (torch.float32, None, 1e-3), (torch.float32, in_bfloat16, 0.05)],
    ids=["float64", "float32", "autocast"],
)
def test_stepwise_is_exact_by_another_way(dtype, loss_fn, bound):
    torch.manual_seed(0)
    model = Block().cuda().to(dtype)
    optimizer = build(model)
    given = tokens(50), [tokens(i) for i in range(5)], loss_fn
    exact = unroll.meta_gradient(optimizer, *given, "exact")
    stepwise = unroll.meta_gradient(optimizer, *given, "stepwise")
    # Sums of an embedding's gradients are in no fixed order on a device.
    torch.testing.assert_close(exact[0], stepwise[0], rtol=bound, atol=0)
    for module in exact[1]:
        assert exact[1][module].is_cuda and exact[1][module].norm() > 0
        assert relative_error(stepwise[1][module], exact[1][module]) <= bound, module


@pytest.mark.parametrize(
    "dtype, loss_fn, bound",
    [(torch.float64, None, 1e-9), (torch.float32, None, 1e-3), (torch.float32, in_bfloat16, 0.02)],
    ids=["float64", "float32", "autocast"],
)
def test_unrolled_steps_are_real_steps_to_rounding(dtype, loss_fn, bound):
    torch.manual_seed(0)
    model = Block().cuda().to(dtype)
    # A large eps: what Adam makes of a rounding is no more than what it makes of a gradient.
    optimizer = build(model, eps=1e-2, loss_fn=loss_fn)
    position = unroll.rehearse(optimizer, [tokens(i) for i in range(2, 7)])
    before = [p.detach().clone() for p in unroll.Rehearsal(optimizer, None).params]
    with sdpa_kernel(SDPBackend.MATH):
        train(optimizer, model, range(2, 7), loss_fn)
    rehearsal = unroll.Rehearsal(optimizer, None)
    # By the largest: batch normalization leaves a bias before it no gradient but rounding.
    moved = max((p.detach() - old).norm() for p, old in zip(rehearsal.params, before))
    for name, slot, p in zip(rehearsal.names, position.slots, rehearsal.params):
        assert (slot["param"] - p.detach()).norm() <= bound * moved, name
    for name, buffer in rehearsal.loss.named_buffers():
        torch.testing.assert_close(position.buffers[name], buffer, rtol=bound, atol=bound)


def everything(optimizer, model):
    first = optimizer.param_groups[0]
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "grads": [p.grad for p in model.parameters()],
            "state": optimizer.state_dict()["state"],
            "options": {k: v for k, v in first.items() if k != "params" and k not in learned.KEYS},
            "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        }
    )


def assert_same(a, b):
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("how", ["exact", "stepwise", "first_order"])
def test_a_meta_update_leaves_everything_but_what_is_learned_untouched(how):
    torch.manual_seed(0)
    model = Block().cuda()
    optimizer = build(model, unroll=how, meta_lr=0.01)
    model(tokens(3)).backward()
    first = optimizer.param_groups[0]
    weights = {m: first[f"{m}_weights"].clone() for m in learned.modules(first)}
    before = everything(optimizer, model)
    loss = optimizer.meta_update(tokens(50), [tokens(i) for i in range(3)])
    assert_same(everything(optimizer, model), before)
    assert loss.is_cuda and torch.isfinite(loss)
    assert all(not torch.equal(first[f"{m}_weights"], flat) for m, flat in weights.items())


@pytest.mark.skipif(not kernels.available(torch.device("cuda")), reason="needs Triton")
@pytest.mark.parametrize("options", [{}, {"frequency": 2}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("mode", ["simple", "explicit"])
def test_at_meta_lr_zero_steps_are_nested_optimizer_s_bit_for_bit(mode, options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((64, 33), (7,), ())]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    deep = DeepNestedOptimizer(params, meta_lr=0.0, mode=mode, **options)
    nested = NestedOptimizer(twins, weight_decay=0.0, **options)
    for _ in range(6):
        for p, q in zip(params, twins):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        deep.step()
        nested.step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins))
    assert deep._fused is not None and deep._fused.served == set(params)
    # And learning begins where it is switched on.
    for group in deep.param_groups:
        group["meta_lr"] = 1e-3
    for _ in range(3):
        deep.step(1.0)
    assert all(state["step"].is_cpu for state in deep.state.values())
    assert all(torch.isfinite(p).all() for p in params)
