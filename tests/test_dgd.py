"""DGD on models: each layer's own inputs, the old weights, all samples since the last step."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW

from nested_optim import DGD, build_param_groups

from .helpers import assert_same_tensors, assert_unchanged, snapshot

LR = 0.1


class Net(nn.Module):
    """Two layers of one shape and a last one; in float64, where formulas can be told apart."""

    def __init__(self, dtype=torch.float64, seed=0, width=5):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(width, width, dtype=dtype)
            self.second = nn.Linear(width, width, dtype=dtype)
            self.norm = nn.LayerNorm(width, dtype=dtype)
            self.last = nn.Linear(width, 2, dtype=dtype)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.second(torch.tanh(self.first(x))))))

    def inputs(self, x):
        """What each layer's weight multiplies, as rows."""
        with torch.no_grad():
            second = torch.tanh(self.first(x))
            last = torch.tanh(self.norm(self.second(second)))
        layers = {"first.weight": x, "second.weight": second, "last.weight": last}
        return {name: t.flatten(0, -2) for name, t in layers.items()}


def batch(seed, size=8, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 + seed)
    return tuple(torch.randn(size, n, generator=generator, dtype=dtype) for n in (width, 2))


def backward(model, x, y, reduction="mean"):
    losses = ((model(x) - y) ** 2).sum(-1)
    (losses.mean() if reduction == "mean" else losses.sum()).backward()


def run(model, optimizer, steps):
    for step in steps:
        backward(model, *batch(step, dtype=model.first.weight.dtype))
        optimizer.step()
        optimizer.zero_grad()


def formula(weight, grad, inputs, lr=LR, decay=1.0, rule="mean", scale=1.0):
    """What becomes of a weight, with the second moment of its inputs formed."""
    moment = scale * inputs.T @ inputs / len(inputs)
    if rule == "exact":
        eye = torch.eye(len(moment), dtype=moment.dtype)
        return (weight / lr - grad) @ torch.linalg.inv(eye / lr + decay * moment)
    size = lr / (1 + lr * decay * moment.trace())
    return weight - size * (grad + decay * weight @ moment)


def expected_step(model, inputs, **options):
    """Where each parameter must be after a step on the gradients that it has."""
    return {
        name: formula(p.detach(), p.grad, inputs[name], **options)
        if name in inputs
        else p.detach() - LR * p.grad
        for name, p in model.named_parameters()
    }


def assert_at(model, expected, tolerance=1e-13):
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.detach(), expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


# ---------------------------------------------------------------------- which inputs, which weights


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("rule", ["mean", "exact"])
def test_each_layer_uses_its_own_input_and_its_old_weight(rule, foreach):
    model = Net()
    optimizer = DGD(model, LR, 0.7, rule, foreach=foreach)
    for step in range(3):
        x, y = batch(step)
        inputs = model.inputs(x)
        backward(model, x, y)
        expected = expected_step(model, inputs, decay=0.7, rule=rule)
        optimizer.step()
        optimizer.zero_grad()
        assert_at(model, expected)
    # The shapes of the first two layers agree, so another's inputs would have fitted too.
    assert not torch.allclose(inputs["first.weight"], inputs["second.weight"])


@pytest.mark.parametrize("rule", ["mean", "exact"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_are_one_batch(reduction, rule):
    model = Net()
    whole = copy.deepcopy(model)
    x, y = batch(0)
    options = {"lr": 0.01, "batch": rule, "reduction": reduction}
    optimizer, at_once = DGD(model, **options), DGD(whole, **options)
    for part_x, part_y in zip(x.chunk(4), y.chunk(4)):
        loss = ((model(part_x) - part_y) ** 2).sum(-1)
        (loss.mean() / 4 if reduction == "mean" else loss.sum()).backward()
    backward(whole, x, y, reduction)
    inputs = whole.inputs(x)
    scale = 1.0 if reduction == "mean" else len(x)
    expected = formula(
        whole.second.weight.detach(),
        whole.second.weight.grad,
        inputs["second.weight"],
        lr=0.01,
        rule=rule,
        scale=scale,
    )
    optimizer.step()
    at_once.step()
    torch.testing.assert_close(whole.second.weight.detach(), expected, rtol=1e-13, atol=1e-13)
    for p, q in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_adamw_takes_its_own_step_and_the_decay_of_the_old_weight():
    model = Net()
    plain = copy.deepcopy(model)
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizer, theirs = (
        DGD(model, base="adamw", decay=0.5, **options),
        AdamW(plain.parameters(), **options),
    )
    for step in range(4):
        x, y = batch(step)
        with torch.no_grad():
            for p, q in zip(model.parameters(), plain.parameters()):
                q.copy_(p)
        inputs = model.inputs(x)
        backward(model, x, y)
        backward(plain, x, y)
        terms = {}
        for name, rows in inputs.items():
            moment, weight = rows.T @ rows / len(rows), model.get_parameter(name).detach()
            terms[name] = 0.005 / (1 + 0.005 * moment.trace()) * weight @ moment
        optimizer.step()
        theirs.step()
        expected = {n: p.detach() - terms.get(n, 0.0) for n, p in plain.named_parameters()}
        assert_at(model, expected, 1e-14)
        optimizer.zero_grad()
        theirs.zero_grad()


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_decay_a_model_trains_as_with_torch_to_the_last_bit(weight_decay, dtype, foreach):
    for base, torch_class in (("sgd", SGD), ("adamw", AdamW)):
        model = Net(dtype)
        plain = copy.deepcopy(model)
        options = {"lr": 0.01, "weight_decay": weight_decay, "foreach": foreach}
        optimizer = DGD(model, decay=0.0, base=base, **options)
        theirs = torch_class(plain.parameters(), **options)
        for step in range(5):
            for net, optim in ((model, optimizer), (plain, theirs)):
                backward(net, *batch(step, dtype=dtype))
                optim.step()
                optim.zero_grad()
        assert_same_tensors(list(model.parameters()), list(plain.parameters()))


def test_groups_have_their_own_decay_batch_base_and_parameters_without_decay_need_no_model():
    model = Net()
    outside = nn.Parameter(torch.ones(3).double())
    groups = [
        {"params": [model.first.weight], "decay": 0.2},
        {"params": [model.second.weight], "batch": "exact"},
        {"params": [model.last.weight, model.last.bias], "base": "adamw", "decay": 0},
        {"params": [outside], "decay": 0},
    ]
    optimizer = DGD(groups, LR, model=model)
    x, y = batch(0)
    inputs = model.inputs(x)
    backward(model, x, y)
    outside.grad = torch.ones_like(outside)
    first, second = model.first.weight, model.second.weight
    expected = [
        formula(first.detach(), first.grad, inputs["first.weight"], decay=0.2),
        formula(second.detach(), second.grad, inputs["second.weight"], rule="exact"),
        model.last.weight.detach() - LR * model.last.weight.grad.sign(),
        torch.full((3,), 0.9).double(),
    ]
    optimizer.step()
    for p, value in zip((first, second, model.last.weight, outside), expected):
        torch.testing.assert_close(p.detach(), value, rtol=1e-6, atol=1e-6)


def test_groups_of_build_param_groups_train():
    model = Net()
    rules = [{"match": "norm|bias", "decay": 0.0, "weight_decay": 0.0}]
    groups = build_param_groups(model, rules, defaults={"lr": LR})
    optimizer = DGD(groups, model=model)
    x, y = batch(0)
    inputs = model.inputs(x)
    backward(model, x, y)
    expected = expected_step(model, inputs)
    optimizer.step()
    assert_at(model, expected)


# ---------------------------------------------------------------------- where it goes


def test_it_descends_on_p_squared():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 4.0)
    optimizer = DGD(layer, lr=0.1)
    values = [4.0]
    for _ in range(30):
        optimizer.zero_grad()
        layer(torch.ones(1, 1)).square().sum().backward()
        optimizer.step()
        values.append(layer.weight.item())
    assert all(0 <= later < earlier for earlier, later in itertools.pairwise(values))
    assert values[-1] < 0.01


@pytest.mark.parametrize("rule", ["mean", "exact"])
@pytest.mark.parametrize("decay", [0.25, 1.0])
def test_it_ends_where_the_output_is_minus_the_gradient_by_decay_and_not_at_the_optimum(
    decay, rule
):
    x, y = batch(0, size=30)
    layer = nn.Linear(5, 2, bias=False, dtype=torch.float64)
    optimizer = DGD(layer, lr=0.3, decay=decay, batch=rule)
    for _ in range(600):
        optimizer.zero_grad()
        (0.5 * (layer(x) - y) ** 2).sum(-1).mean().backward()
        optimizer.step()
    least_squares = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(layer.weight.detach(), least_squares / (1 + decay))
    (0.5 * (layer(x) - y) ** 2).sum(-1).mean().backward()
    assert layer.weight.grad.norm() > 0.05  # so this is no stationary point of the loss
    moment = x.T @ x / len(x)
    torch.testing.assert_close(layer.weight.grad / 2, -decay * layer.weight.detach() @ moment)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_directions_that_no_input_has_are_left_alone(base):
    layer = nn.Linear(5, 2, bias=False)
    start = layer.weight.detach().clone()
    optimizer = DGD(layer, lr=0.1, base=base)
    for step in range(5):
        x, y = batch(step, dtype=torch.float32)
        x[:, 3:] = 0
        optimizer.zero_grad()
        backward(layer, x, y)
        optimizer.step()
    assert torch.equal(layer.weight[:, 3:], start[:, 3:])
    assert not torch.isclose(layer.weight[:, :3], start[:, :3]).any()


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_lr_zero_moves_nothing(base):
    model = Net()
    start = copy.deepcopy(list(model.parameters()))
    optimizer = DGD(model, lr=0.0, base=base)
    for step in range(3):
        backward(model, *batch(step))
        optimizer.step()
    assert_same_tensors(list(model.parameters()), start)


@pytest.mark.parametrize("base, lr", [("sgd", 0.1), ("adamw", 3e-3)])
def test_a_gpt2_trains(base, lr):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, attn_pdrop=0,
        embd_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()
    optimizer = DGD(model, lr=lr, decay=0.1, base=base, max_tokens=40)
    assert len(optimizer._capture.layouts) == 8  # c_attn, c_proj, c_fc, c_proj of two layers
    tokens = torch.arange(64).reshape(4, 16) % 7
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5
    assert losses[-1] < 0.6 * losses[0]


# ---------------------------------------------------------------------- precision


def test_kahan_sum_keeps_what_bfloat16_weights_would_lose():
    exact = Net(torch.float64)
    nets = {kahan: copy.deepcopy(exact).bfloat16() for kahan in (False, True)}
    options = {"lr": 1e-4, "decay": 0.5}
    runs = [(exact, DGD(exact, **options), torch.float64)]
    runs += [(n, DGD(n, kahan_sum=k, **options), torch.bfloat16) for k, n in nets.items()]
    for step in range(40):
        for net, optimizer, dtype in runs:
            backward(net, *(t.to(dtype) for t in batch(step)))
            optimizer.step()
            optimizer.zero_grad()
    wanted = exact.second.weight.detach() - Net().second.weight.detach()
    moved = {}
    for kahan, net in nets.items():
        state = runs[1 + kahan][1].state[net.second.weight]
        value = net.second.weight.detach().double()
        if kahan:
            value = value + state["kahan_comp"].double()
        start = Net().second.weight.detach().bfloat16().double()
        moved[kahan] = (value - start - wanted).norm() / wanted.norm()
    assert moved[True] < 0.1 < 0.5 < moved[False]


def test_a_tensor_lr_does_what_a_number_does():
    for base in ("sgd", "adamw"):
        models = [Net() for _ in range(2)]
        for model, lr in zip(models, (2.0**-6, torch.tensor(2.0**-6).double())):
            run(model, DGD(model, lr, base=base), range(4))
        for p, q in zip(*(model.parameters() for model in models)):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- errors


def test_parameters_without_their_model_are_refused_with_the_fix():
    model = Net()
    with pytest.raises(ValueError, match=r"own input.*DGD\(model, lr=.*decay=0"):
        DGD(model.parameters(), LR)
    with pytest.raises(ValueError, match=r"not a parameter of the model.*decay=0"):
        DGD(Net().parameters(), LR, model=model)
    with pytest.raises(ValueError, match="process_group= shares captured inputs"):
        DGD(model.parameters(), LR, decay=0.0, process_group=object())
    with pytest.raises(TypeError, match="two models"):
        DGD(model, LR, model=Net())
    with pytest.raises(ValueError, match="Invalid decay"):
        DGD(model, LR, decay=-1.0)
    assert not any(module._forward_hooks for module in model.modules())
    optimizer = DGD(model.first.parameters(), LR, model=model)
    with pytest.raises(ValueError, match="not a parameter of the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="not a parameter of the model"):
        optimizer.attach(Net())
    run(model, optimizer, range(1))  # still attached to its own


def test_layers_that_are_added_later_are_captured_too():
    model = Net()
    optimizer = DGD(model, LR)
    model.last = nn.Sequential(model.last, nn.Linear(2, 2, bias=False).double())
    optimizer.add_param_group({"params": [("last.1.weight", model.last[1].weight)]})
    x, y = batch(0)
    backward(model, x, y)
    with torch.no_grad():
        inputs = model.last[0](torch.tanh(model.norm(model.second(torch.tanh(model.first(x))))))
    new = model.last[1].weight
    expected = formula(new.detach(), new.grad, inputs)
    optimizer.step()
    torch.testing.assert_close(new.detach(), expected, rtol=1e-13, atol=1e-13)


def test_complex_weights_and_sharded_ones_are_refused():
    layer = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="'weight' is complex"):
        DGD(layer, LR)
    layer = nn.Linear(2, 2)
    layer.weight.ds_id = 0  # as DeepSpeed's ZeRO marks a parameter
    with pytest.raises(ValueError, match=r"'weight' is sharded.*DeepSpeed"):
        DGD(layer, LR)
    DGD(layer, LR, decay=0.0)


def test_flat_parameters_that_replace_the_model_s_are_refused_at_the_step():
    model = Net()
    optimizer = DGD(model, LR)
    flat = nn.Parameter(torch.zeros(10))
    flat.grad = torch.ones(10)
    optimizer.param_groups[0]["params"] = [flat]
    del optimizer.param_groups[0]["param_names"]
    with pytest.raises(RuntimeError, match="DeepSpeed and FSDP replace parameters"):
        optimizer.step()
    assert not flat.any()


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"decay": -1.0}, "Invalid decay"),
        ({"batch": "all"}, "Invalid batch"),
        ({"reduction": None}, "Invalid reduction"),
        ({"max_tokens": 0}, "Invalid max_tokens"),
        ({"max_tokens": 2.5}, "Invalid max_tokens"),
        ({"window_samples": 0}, "Invalid window_samples"),
        ({"fused": True}, "`fused` is not supported"),
        ({"capturable": True}, "`capturable` is not supported"),
    ],
)
@pytest.mark.parametrize("frequency", [1, 2])
def test_edits_to_nonsense_are_refused_at_the_step(edit, message, frequency):
    model = Net()
    optimizer = DGD(model, LR, frequency=frequency)
    for _ in range(2):
        run(model, optimizer, [0])
        optimizer.param_groups[0].update(edit)
        before = snapshot(optimizer)
        with pytest.raises((ValueError, RuntimeError), match=f"param group 0: {message}"):
            backward(model, *batch(0))
            optimizer.step()
        assert_unchanged(optimizer, before)
        optimizer.param_groups[0].update({key: optimizer.defaults[key] for key in edit})
        optimizer.zero_grad()


def test_names_are_those_of_the_model():
    optimizer = DGD(nn.Sequential(Net(), nn.Linear(2, 2)), LR)
    assert optimizer.param_groups[0]["param_names"][:2] == ["0.first.weight", "0.first.bias"]
    assert not {"train", "eval"} & set(dir(optimizer))


def test_a_convolution_weight_in_channels_last_memory_stays_there():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last).double()
    optimizer = DGD(conv, LR)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    conv(x).square().mean().backward()
    patches = F.unfold(x, 3).movedim(1, -1).flatten(0, 1)
    expected = formula(conv.weight.detach().flatten(1), conv.weight.grad.flatten(1), patches)
    optimizer.step()
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv.weight.detach().flatten(1), expected, rtol=1e-13, atol=1e-13)
