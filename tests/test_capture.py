"""Which inputs of which layers are captured, when they count, and what is left behind."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nested_optim import DGD

from .helpers import assert_same_tensors


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def captured(optimizer, weight):
    """The inputs that wait for the next step, and how many they stand for."""
    pool = optimizer._capture._pools.get(weight)
    if pool is None or not pool.parts:
        return None
    return pool.sample(keyed=False).rows, pool.total


def assert_captured(optimizer, weight, rows):
    found, total = captured(optimizer, weight)
    assert total == len(rows)
    torch.testing.assert_close(found, rows, rtol=0, atol=0)


def assert_nothing_captured(optimizer):
    pools = optimizer._capture._pools.values()
    assert not any(pool.parts or pool.arrived for pool in pools)


def mlp(dtype=torch.float64, inplace=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 4, dtype=dtype),
            nn.ReLU(inplace),
            nn.Linear(4, 4, dtype=dtype),
            nn.Tanh(),
            nn.Linear(4, 2, dtype=dtype),
        )


def train_step(model, optimizer, x, forward=None):
    (forward or model)(x).square().sum(-1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------- kinds of layers


@pytest.mark.parametrize("shape", [(4,), (7, 4), (2, 3, 4), (2, 3, 5, 4), (0, 4), (2, 0, 4)])
def test_leading_dimensions_are_a_batch_and_may_be_empty(shape):
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = DGD(layer, 0.1)
    x = randn(*shape)
    layer(x).square().sum().backward()
    assert_captured(optimizer, layer.weight, x.reshape(-1, 4) if x.numel() else x.new_zeros(0, 4))
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(before, layer.weight) == (x.numel() == 0)
    assert layer.weight.isfinite().all()


def test_an_input_may_be_given_by_keyword_and_refilled_after_the_backward_pass():
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = DGD(layer, 0.1)
    x = randn(5, 4)
    layer(input=x).sum().backward()
    kept = x.clone()
    x.fill_(7.0)
    assert_captured(optimizer, layer.weight, kept)


CONVOLUTIONS = [
    (nn.Conv1d, {"kernel_size": 3}, (9,)),
    (nn.Conv1d, {"kernel_size": 4, "padding": "same", "dilation": 3}, (9,)),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}, (7, 6)),
    (
        nn.Conv2d,
        {"kernel_size": 3, "dilation": 2, "padding": 2, "padding_mode": "circular"},
        (6, 7),
    ),
    (nn.Conv2d, {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"}, (5, 6)),
    (nn.Conv2d, {"kernel_size": (2, 4), "padding": "same"}, (5, 6)),
    (nn.Conv2d, {"kernel_size": 1}, (3, 3)),
    (nn.Conv3d, {"kernel_size": (2, 3, 1), "stride": (1, 2, 2), "padding": 1}, (4, 5, 4)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind, options, size", CONVOLUTIONS)
def test_a_convolution_is_a_linear_layer_on_the_patches_that_its_kernel_covers(
    kind, options, size, batched
):
    conv = kind(3, 5, **options, dtype=torch.float64)
    x = randn(*([2] if batched else []), 3, *size)
    # A convolution whose channels each copy one place of the kernel lists the patches.
    features = conv.weight[0].numel()
    lister = kind(3, features, **options, bias=False, dtype=torch.float64)
    with torch.no_grad():
        lister.weight.copy_(torch.eye(features).view_as(lister.weight))
        listed = lister(x)
        patches = listed.movedim(1 if batched else 0, -1).reshape(-1, features)
    linear = nn.Linear(features, 5, dtype=torch.float64)
    linear.load_state_dict({"weight": conv.weight.detach().flatten(1), "bias": conv.bias.detach()})
    optimizer, like = DGD(conv, 0.1), DGD(linear, 0.1)

    outputs = conv(x).movedim(1 if batched else 0, -1).reshape(-1, 5)
    outputs.square().sum(-1).mean().backward()
    linear(patches).square().sum(-1).mean().backward()
    assert_captured(optimizer, conv.weight, patches)
    optimizer.step()
    like.step()
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight, rtol=1e-12, atol=1e-12)


def test_a_thinned_convolution_takes_the_same_patches_as_the_linear_layer():
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False, dtype=torch.float64)
    linear = nn.Linear(27, 5, bias=False, dtype=torch.float64)
    x = randn(2, 3, 6, 5)
    optimizer, like = DGD(conv, max_tokens=7), DGD(linear, max_tokens=7)
    conv(x).sum().backward()
    linear(F.unfold(x, 3, padding=1).movedim(1, -1)).sum().backward()
    rows, total = captured(like, linear.weight)
    assert len(rows) == 7 and total == 60
    torch.testing.assert_close(captured(optimizer, conv.weight)[0], rows, rtol=0, atol=0)


def test_hugging_face_conv1d_is_a_linear_layer_transposed():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv, linear = Conv1D(5, 5).double(), nn.Linear(5, 5).double()
    nn.init.normal_(conv.bias)
    linear.load_state_dict({"weight": conv.weight.detach().t(), "bias": conv.bias.detach()})
    for options in ({}, {"batch": "exact"}, {"base": "adamw"}):
        optimizers = DGD(conv, 0.1, **options), DGD(linear, 0.1, **options)
        for layer, optimizer in zip((conv, linear), optimizers):
            train_step(layer, optimizer, randn(3, 4, 5))
        torch.testing.assert_close(conv.weight.t(), linear.weight, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(conv.weight, linear.weight)


class Plain(nn.Module):
    """Layers of every kind whose weights take the base rule."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.transposed = nn.ConvTranspose1d(4, 4, 1)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x)[0]
        x = self.transposed(self.grouped(x.mT)).mT
        return self.head(self.norm(self.normed(self.bilinear(x, x))))


def test_parameters_whose_inputs_are_not_seen_take_the_base_rule():
    torch.manual_seed(0)
    model = Plain()
    plain = copy.deepcopy(model)
    optimizer, theirs = DGD(model, 0.1), torch.optim.SGD(plain.parameters(), lr=0.1)
    assert not optimizer._capture.layouts
    tokens = torch.arange(6).view(2, 3)
    for _ in range(3):
        train_step(model, optimizer, tokens)
        train_step(plain, theirs, tokens)
    assert_same_tensors(list(model.parameters()), list(plain.parameters()))


def test_a_layer_that_is_called_twice_and_layers_that_share_a_weight_put_inputs_together():
    first, second = (nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in range(2))
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), first, nn.Tanh(), second)
    optimizer = DGD(model, 0.1)
    x = randn(4, 3)
    with torch.no_grad():
        middle = first(x).tanh()
        rows = [x, middle, first(middle).tanh()]
    model(x).square().sum(-1).mean().backward()
    found, total = captured(optimizer, first.weight)
    assert total == 12
    # The backward pass comes by the last call first.
    torch.testing.assert_close(found, torch.cat(rows[::-1]), rtol=0, atol=0)


def test_a_subclass_that_multiplies_something_else_is_not_captured_but_noticed():
    class Doubling(nn.Linear):
        def forward(self, x):
            return super().forward(torch.cat([x, x], -1))

    layer = Doubling(4, 2)
    optimizer = DGD(layer, 0.1)
    layer(torch.ones(3, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="no input was captured for parameter 'weight'"):
        optimizer.step()


# ---------------------------------------------------------------------- when an input counts


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_each_input_counts_once(reentrant):
    model, plain = mlp(inplace=True), mlp()
    optimizer, like = DGD(model, 0.1), DGD(plain, 0.1)
    for step in range(3):
        x = randn(5, 4, seed=step)

        def forward(x):
            x = x.clone().requires_grad_()
            middle = checkpoint(model[:3], x, use_reentrant=reentrant)
            return checkpoint(model[3:], middle, use_reentrant=reentrant)

        forward(x).square().sum(-1).mean().backward()
        assert captured(optimizer, model[2].weight)[1] == 5
        optimizer.step()
        optimizer.zero_grad()
        train_step(plain, like, x)
        assert_same_tensors(list(model.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("how", ["no checkpoint", "reentrant", "non-reentrant"])
def test_checkpointing_frees_the_inputs_inside_a_segment_though_they_are_wanted(how):
    model = mlp()
    optimizer = DGD(model, 0.1)
    alive = []
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args: alive.append(weakref.ref(args[0].untyped_storage()))
        )
        for layer in model
        if isinstance(layer, nn.Linear)
    ]
    x = randn(5, 4).requires_grad_()
    if how == "no checkpoint":
        output = model(x)
    else:
        output = checkpoint(model, x, use_reentrant=how == "reentrant")
    for handle in handles:
        handle.remove()
    inside = how == "no checkpoint"  # where the layers hold them for themselves
    assert [ref() is not None for ref in alive] == [True, inside, inside]
    output.sum().backward()
    assert captured(optimizer, model[4].weight)[1] == 5


def test_an_input_is_held_only_while_autograd_would_hold_it():
    layer = nn.Linear(4, 3)
    optimizer = DGD(layer, 0.1, max_tokens=2)
    refs = []

    def output():
        x = torch.ones(5, 4)
        refs.append(weakref.ref(x.untyped_storage()))
        return layer(x).sum()

    unused = output()
    assert refs[-1]() is not None
    del unused
    assert refs[-1]() is None  # the backward pass never ran
    loss = output()
    loss.backward()
    assert refs[-1]() is None  # though the loss, and so the graph, is alive
    assert len(captured(optimizer, layer.weight)[0]) == 2
    loss = output()
    loss.backward(retain_graph=True)
    assert refs[-1]() is not None
    loss.backward()
    assert refs[-1]() is None
    assert captured(optimizer, layer.weight)[1] == 15


def test_only_gradients_that_reach_grad_bring_inputs():
    model = mlp()
    optimizer = DGD(model, 0.1)
    x = randn(5, 4).requires_grad_()
    loss = model(x).square().sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert_nothing_captured(optimizer)
    # What such passes have staged went with them, and does not count when another gradient arrives.
    assert not optimizer._capture._pools[model[2].weight].staged
    F.linear(x, model[2].weight).sum().backward()
    assert_nothing_captured(optimizer)
    loss.backward(inputs=[model[2].weight], retain_graph=True)
    assert captured(optimizer, model[2].weight)[1] == 5
    assert captured(optimizer, model[0].weight) is None
    optimizer.zero_grad()
    # A gradient penalty goes through each layer twice, and is one gradient.
    loss = model(x).square().sum()
    (penalty,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + penalty.square().sum()).backward()
    assert captured(optimizer, model[2].weight)[1] == 5


def test_passes_without_grad_or_training_and_frozen_weights_bring_none():
    model = mlp()
    optimizer = DGD(model, 0.1)
    x = randn(5, 4)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    model.eval()
    model(x).sum().backward()
    assert_nothing_captured(optimizer)
    with pytest.raises(RuntimeError, match=r"no input was captured.*eval mode"):
        optimizer.step()
    model.train().zero_grad()
    model[0].weight.requires_grad_(False)
    model(x).sum().backward()
    assert captured(optimizer, model[0].weight) is None
    assert captured(optimizer, model[2].weight)[1] == 5
    optimizer.step()


def test_a_weight_that_is_unfrozen_later_is_captured_from_then_on():
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = DGD(model, 0.1)
    train_step(model, optimizer, randn(5, 4))
    model[0].weight.requires_grad_(True)
    model(randn(5, 4)).sum().backward()
    assert captured(optimizer, model[0].weight)[1] == 5


def test_inputs_go_where_their_gradients_go():
    model = mlp()
    optimizer = DGD(model, 0.1)
    weight = model[0].weight
    first, second = randn(5, 4, seed=1), randn(3, 4, seed=2)
    model(first).sum().backward()
    optimizer.zero_grad()
    assert_nothing_captured(optimizer)
    model(first).sum().backward()
    model.zero_grad()  # unseen by the optimizer, but grad is None when the next one comes
    model(second).sum().backward()
    assert_captured(optimizer, weight, second)
    model(first).sum().backward()
    assert_captured(optimizer, weight, torch.cat([second, first]))
    optimizer.step()
    assert_nothing_captured(optimizer)
    model.zero_grad()
    optimizer.step()
    assert_nothing_captured(optimizer)


def test_inputs_of_gradients_that_are_none_at_the_step_do_not_wait_for_the_next():
    model = mlp()
    optimizer = DGD(model, 0.1)
    model(randn(5, 4)).sum().backward()
    model[0].weight.grad = None
    optimizer.step()
    assert captured(optimizer, model[0].weight) is None


def test_a_loss_scale_leaves_inputs_alone_and_a_skipped_step_drops_them():
    model, plain = mlp(torch.float32), mlp(torch.float32)
    optimizer, like = DGD(model, 0.1, frequency=2), DGD(plain, 0.1, frequency=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    for step in range(6):
        x = randn(5, 4, seed=step, dtype=torch.float32)
        scaler.scale(model(x).square().sum(-1).mean()).backward()
        if step in (1, 4):
            model[0].bias.grad[0] = float("inf")
        before = copy.deepcopy(optimizer.state_dict())
        scaler.step(optimizer)
        scaler.update()
        if step in (1, 4):
            assert captured(optimizer, model[0].weight)[1] == 5
            after = optimizer.state_dict()["state"][0]
            assert all(torch.equal(t, after[k]) for k, t in before["state"][0].items())
        else:
            train_step(plain, like, x)
        optimizer.zero_grad()
        assert_nothing_captured(optimizer)
    assert_same_tensors(list(model.parameters()), list(plain.parameters()))


def test_a_gradient_without_inputs_is_refused_and_changes_nothing():
    model = mlp()
    optimizer = DGD(model, 0.1)
    start = copy.deepcopy(list(model.parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"no input was captured for parameter '0.weight'.*hand"):
        optimizer.step()
    assert_same_tensors(list(model.parameters()), start)
    assert not optimizer.state
    optimizer.param_groups[0]["decay"] = 0.0
    optimizer.step()
    assert not torch.equal(start[0], model[0].weight)


def test_groups_without_decay_capture_nothing():
    model = mlp()
    groups = [
        {"params": model[0].parameters(), "decay": 0.0},
        {"params": [p for m in model[1:] for p in m.parameters()]},
    ]
    optimizer = DGD(groups, 0.1, model=model)
    model(randn(5, 4)).sum().backward()
    assert captured(optimizer, model[0].weight) is None
    assert captured(optimizer, model[2].weight)[1] == 5
    optimizer.step()


def test_options_that_are_edited_between_passes_hold_for_the_next_one():
    model = mlp()
    optimizer = DGD(model, 0.1, max_tokens=100)
    group, x = optimizer.param_groups[0], randn(5, 4)
    for _ in range(2):
        train_step(model, optimizer, x)
        group["decay"] = 0.0
        model(x).sum().backward()
        assert_nothing_captured(optimizer)
        optimizer.step()
        model.zero_grad()
        group.update(decay=1.0, max_tokens=3)
        model(x).sum().backward()
        assert [len(captured(optimizer, model[i].weight)[0]) for i in (0, 2, 4)] == [3, 3, 3]
        optimizer.zero_grad()
        group["max_tokens"] = 100


def test_a_weight_s_new_group_and_a_layer_s_new_weight_are_noticed():
    model = mlp()
    first, rest = list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()]
    groups = [{"params": first, "decay": 0.0}, {"params": rest}]
    optimizer, x = DGD(groups, 0.1, model=model), randn(5, 4)
    train_step(model, optimizer, x)
    moved = optimizer.param_groups[1]["params"].pop(0)
    optimizer.param_groups[0]["params"].append(moved)
    assert moved is model[2].weight
    train_step(model, optimizer, x)  # a step looks where parameters are
    model(x).sum().backward()
    assert [captured(optimizer, model[i].weight) is None for i in (0, 2, 4)] == [True, True, False]
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())  # new groups, with the old options
    optimizer.param_groups[0]["decay"] = 1.0
    model(x).sum().backward()
    assert captured(optimizer, model[0].weight)[1] == 5
    optimizer.step()
    optimizer.zero_grad()

    old, model[4].weight = model[4].weight, nn.Parameter(model[4].weight.detach().clone())
    model(x).sum().backward()
    assert captured(optimizer, old) is None and captured(optimizer, model[4].weight) is None
    optimizer.zero_grad()
    model[4].weight = old
    train_step(model, optimizer, x)
    model.append(nn.Linear(2, 2, dtype=torch.float64))
    optimizer.add_param_group({"params": model[5].parameters()})
    model[5].tied = old  # used in a way that is not seen: no longer a weight with inputs
    optimizer._capture.survey()
    model(x).sum().backward()
    assert captured(optimizer, old) is None
    assert captured(optimizer, model[5].weight)[1] == 5


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_under_autocast_inputs_are_what_the_layer_multiplied(kind):
    layer = nn.Linear(4, 3) if kind == "linear" else nn.Conv1d(4, 3, 1)
    optimizer = DGD(layer, 0.1)
    x = randn(5, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x if kind == "linear" else x.T.unsqueeze(0))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert_captured(optimizer, layer.weight, x.bfloat16())
    before, grad = layer.weight.detach().clone().flatten(1), layer.weight.grad.flatten(1)
    optimizer.step()
    rows = x.bfloat16().float()
    moment = rows.T @ rows / 5
    expected = before - 0.1 / (1 + 0.1 * moment.trace()) * (grad + before @ moment)
    torch.testing.assert_close(layer.weight.flatten(1), expected, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("max_tokens", [3, 7, 100])
def test_calls_under_autocast_and_without_it_join_in_the_wider_dtype(max_tokens):
    layer = nn.Linear(4, 3)
    optimizer = DGD(layer, 0.1, max_tokens=max_tokens)
    x = randn(5, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)
    (narrow.float().sum() + layer(x).sum()).backward()
    rows, total = captured(optimizer, layer.weight)
    assert total == 10 and len(rows) == min(max_tokens, 10) and rows.dtype == torch.float32
    every = torch.cat([x, x.bfloat16().float()])
    assert (rows[:, None] == every).all(-1).sum(0).tolist().count(1) == len(rows)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_train(dtype):
    model, wide = mlp().to(dtype), mlp()
    optimizer, like = DGD(model, 0.1), DGD(wide, 0.1)
    start = wide[2].weight.detach().clone()
    for step in range(5):
        train_step(model, optimizer, randn(6, 4, seed=step).to(dtype))
        train_step(wide, like, randn(6, 4, seed=step))
    change = wide[2].weight - start
    assert (model[2].weight - wide[2].weight).norm() < 0.1 * change.norm()


# ---------------------------------------------------------------------- hooks and lifetimes


def test_a_copied_model_does_not_write_to_the_original_s_optimizer():
    model = mlp()
    optimizer = DGD(model, 0.1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(randn(5, 4)).sum().backward()
        train_step(twin, DGD(twin, 0.1), randn(5, 4))
    shallow = copy.copy(model[0])  # which shares weight and hooks
    shallow(randn(5, 4)).sum().backward()
    assert_nothing_captured(optimizer)
    assert optimizer._capture._pools == {}


def test_hooks_go_with_remove_hooks_and_with_the_optimizer():
    model = mlp()

    def hooks():
        found = [h for m in model.modules() for h in m._forward_hooks.values()]
        return found + [
            h for p in model.parameters() for h in (p._post_accumulate_grad_hooks or {}).values()
        ]

    optimizer = DGD(model, 0.1)
    model(randn(5, 4)).sum().backward()
    assert len(hooks()) == 6
    optimizer.remove_hooks()
    assert hooks() == []
    with pytest.raises(RuntimeError, match="hooks were removed"):
        optimizer.step()
    optimizer.attach(model)
    model(randn(5, 4)).sum().backward()
    assert len(hooks()) == 6
    optimizer.attach(model)  # once more does not watch twice
    model.zero_grad()
    model(randn(5, 4)).sum().backward()
    assert len(hooks()) == 6
    assert captured(optimizer, model[0].weight)[1] == 5

    loss = model(randn(5, 4)).sum()
    gone = weakref.ref(optimizer), weakref.ref(optimizer._capture)
    del optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert hooks() == []
    loss.backward()  # through a graph that was watched


def test_two_optimizers_may_watch_one_model():
    model = mlp()
    one = DGD(model[0].parameters(), 0.1, model=model)
    two = DGD(model[2].parameters(), 0.1, model=model)
    x = randn(5, 4)
    model(x).sum().backward()
    assert_captured(one, model[0].weight, x)
    one.step()
    one.zero_grad()
    assert captured(two, model[2].weight)[1] == 5
    assert captured(two, model[0].weight) is None
    two.step()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_compiled_afterwards_trains_as_an_eager_one(backend):
    torch._dynamo.reset()
    model, plain = mlp(torch.float32, inplace=True), mlp(torch.float32)
    optimizer, like = DGD(model, 0.1), DGD(plain, 0.1)
    compiled = torch.compile(model, backend=backend)
    step = torch.compile(optimizer.step, backend=backend)
    for seed in range(3):
        x = randn(5, 4, seed=seed, dtype=torch.float32)
        compiled(x).square().sum(-1).mean().backward()
        assert captured(optimizer, model[0].weight)[1] == 5
        step()
        optimizer.zero_grad()
        train_step(plain, like, x)
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_step_may_hold_the_whole_of_it():
    torch._dynamo.reset()
    model, plain = mlp(torch.float32), mlp(torch.float32)
    optimizer, like = DGD(model, 0.1), DGD(plain, 0.1)
    whole = torch.compile(train_step, backend="eager")
    for seed in range(3):
        x = randn(5, 4, seed=seed, dtype=torch.float32)
        whole(model, optimizer, x)
        train_step(plain, like, x)
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_compiled_before_is_noticed():
    torch._dynamo.reset()
    model = mlp(torch.float32)
    compiled = torch.compile(model, backend="eager")
    x = randn(5, 4, dtype=torch.float32)
    compiled(x).sum().backward()
    model.zero_grad()
    optimizer = DGD(compiled, 0.1)
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    compiled(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"'0.weight'.*compiled.*before this optimizer was made"):
        optimizer.step()
