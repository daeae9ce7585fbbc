"""Depth in a model, read from names, and param groups by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nested_optim import count_layers, depth_groups, infer_param_depth

from .named_models import GPT, Tree, ViT, mlp

DEPTHS = {
    0.0: """transformer.wte.weight wpe.weight model.embed_tokens.weight tok_embeddings.weight
        cls_token pos_embed patch_embed.proj.bias patch_embed.norm.weight class_token
        bert.embeddings.LayerNorm.weight vit.embeddings.patch_embeddings.projection.weight
        encoder.pos_embedding transformer.word_embeddings_layernorm.weight shared.weight
        stem.0.weight conv1.weight bn1.bias gpt_neox.embed_in.weight conv_proj.weight
        visual.ln_pre.weight module.model.decoder.embed_positions.weight""",
    1 / 4: """transformer.h.0.attn.c_attn.weight model.layers.0.mlp.gate_proj.weight
        blocks.0.norm1.weight bert.encoder.layer.0.output.LayerNorm.bias layer1.0.conv1.weight
        layer1.1.downsample.0.weight encoder.layers.encoder_layer_0.ln_1.weight
        encoder.block.0.layer.1.DenseReluDense.wi.weight features.0.weight 0.weight
        model.layers.0.mlp.experts.7.w1.weight _orig_mod.h.0.fc.weight
        layers.0.rel_pos_embed layers.0.input_layernorm.weight""",
    3 / 4: "h.2.attn.weight layer3.0.bn1.weight stages.2.blocks.1.weight",
    1.0: """h.3.attn.weight layer4.0.weight lm_head.weight head.weight head.fc.weight
        classifier.weight classifier.6.weight fc.bias score.weight output.weight
        transformer.ln_f.weight norm.weight model.norm.weight encoder.ln.bias fc_norm.weight
        decoder.final_layer_norm.weight cls.predictions.transform.dense.weight
        bert.pooler.dense.weight embed_out.weight qa_outputs.weight mc_head.weight
        transformer.norm_f.weight h.9.attn.weight heads.head.weight""",
    0.5: "h.1.attn.weight adapter.weight weight gamma conv2.weight",
}


@pytest.mark.parametrize(
    ("name", "depth"), [(name, depth) for depth, names in DEPTHS.items() for name in names.split()]
)
def test_depth_is_read_from_usual_names(name, depth):
    assert infer_param_depth(name, 4) == depth


@pytest.mark.parametrize("n_layers", [0, -1, 2.0, True, None])
def test_an_invalid_number_of_layers_is_an_error(n_layers):
    with pytest.raises(ValueError, match="n_layers must be an integer >= 1"):
        infer_param_depth("h.0.weight", n_layers)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (GPT(3), 3),
        (ViT(4), 4),
        (mlp(), 3),
        (Tree("encoder.block.0.w", "encoder.block.1.w", "decoder.block.0.w"), 2),
        (Tree("fc1.weight", "fc2.weight", "fc3.weight"), 3),
        (Tree("net.fc1.weight", "net.fc2.weight"), 2),
        (Tree("conv1.weight", "layer1.0.w", "layer2.0.w", "layer3.0.w", "fc.weight"), 3),
        (Tree("wte.weight", "lm_head.weight"), 0),
        (nn.Linear(2, 2), 1),
        (nn.ReLU(), 0),
        (mlp().requires_grad_(False), 3),
    ],
)
def test_layers_are_counted(model, layers):
    assert count_layers(model) == layers


def levels(groups):
    return {name: g["frequency"] for g in groups for name, _ in g["params"]}


def test_depth_groups_of_a_gpt():
    groups = depth_groups(GPT(3), lr=1e-3)
    level = levels(groups)
    assert level["transformer.wte.weight"] == level["transformer.h.0.attn.weight"] == 100
    assert level["transformer.h.1.attn.weight"] == level["transformer.h.1.mlp.0.weight"] == 10
    assert level["transformer.h.2.attn.weight"] == level["transformer.ln_f.weight"] == 1
    assert level["lm_head.weight"] == 1
    assert [(g["name"], g["frequency"], g["lr"]) for g in groups] == [
        ("depth0", 100, 1e-3),
        ("depth1", 10, 1e-3),
        ("depth2", 1, 1e-3),
    ]


def test_depth_groups_of_a_vit_with_two_levels():
    level = levels(depth_groups(ViT(4), frequencies=(2, 7)))
    assert level["cls_token"] == level["blocks.1.attn.weight"] == 7
    assert level["blocks.2.attn.weight"] == level["head.weight"] == 2


@pytest.mark.parametrize(
    "model",
    [
        mlp(),
        nn.ModuleDict({"net": mlp()}),
        torch.compile(mlp()),
        Tree("fc1.weight", "fc2.weight", "fc3.weight"),
        Tree("first.weight", "second.weight", "fc.weight", "second.bias"),
    ],
)
def test_depth_groups_of_plain_stacks_use_their_order(model):
    if isinstance(model, Tree) and "first" in model._modules:
        assert list(levels(depth_groups(model, (1, 8))).values()) == [8, 1, 1, 1]
    else:
        groups = depth_groups(model)
        assert [g["frequency"] for g in groups] == [100, 10, 1]
        assert [g["params"][0][0].split(".")[-2] for g in groups] in (
            ["0", "2", "4"],
            ["fc1", "fc2", "fc3"],
        )


def test_slow_deep_gives_the_largest_frequency_to_the_deep_end():
    assert [g["frequency"] for g in depth_groups(mlp(), slow="deep")] == [1, 10, 100]


def test_depth_groups_copy_a_tensor_lr_per_group():
    lr = torch.tensor(0.5)
    groups = depth_groups(mlp(), lr=lr)
    groups[0]["lr"].fill_(7.0)
    assert [g["lr"].item() for g in groups] == [7.0, 0.5, 0.5]
    assert lr.item() == 0.5


@pytest.mark.parametrize("frequencies", [(1, 4, 7), (7, 1, 4), [4, 7, 1]])
def test_frequencies_are_used_as_given_in_any_order(frequencies):
    before = list(frequencies)
    assert [g["frequency"] for g in depth_groups(mlp(), frequencies)] == [7, 4, 1]
    assert list(frequencies) == before


@given(st.integers(1, 60))
def test_as_many_levels_as_layers_give_each_layer_its_own(n):
    model = Tree(*(f"layers.{i}.weight" for i in range(n)))
    groups = depth_groups(model, frequencies=range(1, n + 1))
    assert [len(g["params"]) for g in groups] == [1] * n


def test_tied_embeddings_count_as_embeddings():
    assert levels(depth_groups(GPT(3, tied=True)))["transformer.wte.weight"] == 100


def test_depth_does_not_change_when_layers_are_frozen():
    model = GPT(4)
    model.transformer["h"][0].requires_grad_(False)
    before, after = levels(depth_groups(GPT(4))), levels(depth_groups(model))
    assert after == {name: f for name, f in before.items() if ".h.0." not in name}


def test_a_level_without_parameters_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="as deep as frequency 100, 10 is for") as caught:
        groups = depth_groups(nn.Linear(2, 2))
    assert [(g["name"], g["frequency"]) for g in groups] == [("depth2", 1)]
    assert caught[0].filename == __file__


def test_torch_adamw_takes_depth_groups():
    model = GPT(3)
    optimizer = torch.optim.AdamW(depth_groups(model, weight_decay=0.1))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"frequencies": ()}, ValueError, "frequencies is empty"),
        ({"frequencies": (1, 0)}, ValueError, r"frequencies\[1\]: Invalid frequency: 0"),
        ({"frequencies": (True,)}, ValueError, r"frequencies\[0\]: Invalid frequency: True"),
        ({"frequencies": (1, 2.5)}, ValueError, r"frequencies\[1\]: Invalid frequency: 2.5"),
        ({"frequencies": 10}, TypeError, "must be a sequence of integers, but got 10"),
        ({"frequencies": "10"}, TypeError, "must be a sequence of integers, but got '10'"),
        ({"slow": "top"}, ValueError, "slow must be one of 'shallow', 'deep', but is 'top'"),
        ({"frequency": 3}, ValueError, "depth_groups: 'frequency' cannot be set here"),
        ({"lr_mult": 3}, ValueError, "depth_groups: 'lr_mult' cannot be set here"),
        (
            {"frequnecies": 3},
            ValueError,
            "depth_groups: unknown option 'frequnecies'.*'frequencies'",
        ),
        ({"lr": -3}, ValueError, "depth_groups: lr must be finite and not negative"),
        ({"realise": "lr"}, ValueError, "realise='lr' divides lr by the frequency: pass lr="),
        ({"realise": "slow"}, ValueError, "realise must be one of 'window', 'lr', 'both'"),
    ],
)
def test_invalid_arguments_of_depth_groups_are_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        depth_groups(mlp(), **arguments)


@pytest.mark.parametrize("realise", ["window", "lr", "both"])
def test_slow_levels_are_windows_or_learning_rates(realise):
    groups = depth_groups(mlp(), (1, 10, 100), realise=realise, lr=0.5)
    windows, divided = realise != "lr", realise != "window"
    assert [g["frequency"] for g in groups] == ([100, 10, 1] if windows else [1, 1, 1])
    assert [g["lr"] for g in groups] == ([0.005, 0.05, 0.5] if divided else [0.5] * 3)


def test_a_divided_tensor_lr_is_each_groups_own():
    lr = torch.tensor(0.5)
    groups = depth_groups(mlp(), (1, 2, 5), realise="lr", lr=lr)
    torch.testing.assert_close([g["lr"].item() for g in groups], [0.1, 0.25, 0.5])
    groups[2]["lr"].fill_(3.0)
    assert lr.item() == 0.5
