"""The unroll of models that recompute their activations: the same as without, or refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from nested_optim import DeepNestedOptimizer
from nested_optim.meta import learned, unroll

from .meta_helpers import in_float64, relative_error

KINDS = [
    pytest.param(partial(checkpoint, use_reentrant=reentrant), id=name)
    for reentrant, name in ((False, "saved tensors"), (True, "reentrant"))
]


class Stack(nn.Module):
    """Layers of which the middle one, with dropout, is recomputed."""

    def __init__(self, recompute=None):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3))
        self.last = nn.Linear(6, 1)
        self.recompute = recompute  # as a model of a library holds it

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        run = self.middle if self.recompute is None else partial(self.recompute, self.middle)
        return (self.last(run(hidden)) - 1).square().mean()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=generator, dtype=torch.float64)


def build(model, steps=2, **options):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(0.6 * torch.randn_like(p))
    optimizer = DeepNestedOptimizer(model, lr=0.05, mode="explicit", **options)
    train(optimizer, [batch(i) for i in range(steps)])
    in_float64(optimizer)
    return optimizer


def train(optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        optimizer.model(x).backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["exact", "stepwise", "first_order"])
@pytest.mark.parametrize("recompute", KINDS)
def test_the_meta_gradient_is_that_of_the_model_without_checkpoints(recompute, how):
    found = []
    for model in (Stack(), Stack(recompute)):
        optimizer = build(model)
        given = batch(9), [batch(10 + i) for i in range(5)], None, how
        found.append(unroll.meta_gradient(optimizer, *given))
    (loss, expected), (same_loss, actual) = found
    assert torch.equal(loss, same_loss)
    for module in expected:
        assert relative_error(actual[module], expected[module]) <= 1e-12, module


@pytest.mark.parametrize("recompute", KINDS)
def test_unrolled_steps_are_the_real_steps_with_checkpoints(recompute):
    optimizer = build(Stack(recompute))
    batches = [batch(10 + i) for i in range(4)]
    before = vars(checkpoints).copy()
    rng = torch.get_rng_state()
    position = unroll.rehearse(optimizer, batches)
    assert torch.equal(torch.get_rng_state(), rng)
    assert vars(checkpoints) == before and "apply" not in vars(checkpoints.CheckpointFunction)
    train(optimizer, batches)
    for slot, p in zip(position.slots, optimizer.model.parameters()):
        assert torch.equal(slot["param"], p)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("recompute", KINDS)
def test_a_segment_without_a_gradient_at_its_inputs_learns_as_in_real_steps(recompute):
    class First(Stack):
        def forward(self, x):
            # Of the reentrant kind, the first layer then has no gradient.
            hidden = self.recompute(self.first, x)
            return (self.last(self.middle(hidden)) - 1).square().mean()

    optimizer = build(First(recompute))
    reentrant = recompute.keywords["use_reentrant"]
    assert (next(optimizer.model.parameters()).grad is None) == reentrant
    batches = [batch(10 + i) for i in range(3)]
    position = unroll.rehearse(optimizer, batches)
    train(optimizer, batches)
    for slot, p in zip(position.slots, optimizer.model.parameters()):
        assert torch.equal(slot["param"], p)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_library_model_and_a_sequence_of_segments_are_unrolled(reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, attn_implementation="eager"
    )
    tokens = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": tokens, "labels": tokens}
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        optimizer = DeepNestedOptimizer(model, lr=0.01, mode="explicit")
        model(**given).loss.backward()
        optimizer.step()
        in_float64(optimizer)
        found.append(unroll.meta_gradient(optimizer, given, [given] * 3, None, "exact"))
    assert torch.equal(found[0][0], found[1][0])
    for module, expected in found[0][1].items():
        assert relative_error(found[1][1][module], expected) <= 1e-10, module

    class Segments(Stack):
        def forward(self, x):
            hidden = torch.tanh(self.first(x))
            hidden = checkpoint_sequential(self.middle, 2, hidden, use_reentrant=reentrant)
            return (self.last(hidden) - 1).square().mean()

    losses = [
        unroll.meta_gradient(build(model), batch(9), [batch(10)] * 2, None, "stepwise")[0]
        for model in (Stack(), Segments())
    ]
    assert torch.equal(*losses)


class Recomputing(torch.autograd.Function):
    """A checkpoint of somebody else's."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.run(x), grad)
        return None, x.grad


@pytest.mark.parametrize("how", ["exact", "stepwise", "first_order"])
def test_another_recomputation_is_refused_before_anything_changes(how):
    optimizer = build(Stack(Recomputing.apply), unroll=how)
    model, first = optimizer.model, optimizer.param_groups[0]
    before = copy.deepcopy((model.state_dict(), {k: first[k] for k in learned.KEYS}))
    grads = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"calls the model again.*torch\.utils\.checkpoint"):
        optimizer.meta_update(batch(9), [batch(10)] * 2)
    after = model.state_dict(), {k: first[k] for k in learned.KEYS}
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for p, grad in zip(model.parameters(), grads):
        assert torch.equal(p.grad, grad)
    train(optimizer, [batch(10)])  # and the model runs again wherever it likes
