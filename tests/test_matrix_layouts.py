"""What is a hidden matrix by the type of its module, and how M3 is told to see it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from nested_optim import matrix_groups

from .matrix_helpers import (
    CONV,
    WHOLE,
    Conv1D,
    Holder,
    layouts,
    matrices,
    mlp,
    names_by_group,
    with_head,
)

# ---------------------------------------------------------------- module types


def test_hidden_matrices_go_to_m3_and_the_rest_to_adamw():
    groups = matrix_groups(mlp())
    assert [(g["name"], g["algorithm"]) for g in groups] == [("matrices", "m3"), ("other", "adamw")]
    assert names_by_group(groups) == {
        "matrices": ["0.weight", "2.weight"],
        "other": ["0.bias", "2.bias", "4.weight", "4.bias"],
    }
    assert set(groups[0]) == {"params", "name", "algorithm"}  # a plain matrix needs no options


class MyLinear(nn.Linear):
    pass


TYPES = {
    "linear": (nn.Linear(4, 8), {"weight": ("matrices", {})}),
    "subclass": (MyLinear(4, 8), {"weight": ("matrices", {})}),
    "one output": (nn.Linear(4, 1), {}),
    "one input": (nn.Linear(1, 4), {}),
    "conv1d": (nn.Conv1d(4, 8, 3), {"weight": ("matrices_conv", CONV)}),
    "conv2d": (nn.Conv2d(4, 8, 3), {"weight": ("matrices_conv", CONV)}),
    "conv3d": (nn.Conv3d(4, 8, 3), {"weight": ("matrices_conv", CONV)}),
    "conv of one channel": (nn.Conv2d(1, 8, 3), {}),
    "conv of pixels": (nn.Conv2d(3, 8, 3), {}),
    "conv of samples": (nn.Conv1d(2, 8, 3), {}),
    "transposed conv of three channels": (
        nn.ConvTranspose1d(3, 8, 3),
        {"weight": ("matrices_conv_transposed", {**CONV, "out_dim": 1})},
    ),
    "conv to one channel": (nn.Conv2d(4, 1, 3), {}),
    "transposed conv": (
        nn.ConvTranspose2d(4, 8, 3),
        {"weight": ("matrices_conv_transposed", {**CONV, "out_dim": 1})},
    ),
    "grouped conv": (
        nn.Conv2d(4, 8, 3, groups=2),
        {"weight": ("matrices_conv_grouped", {**CONV, "split_sizes": (4, 4)})},
    ),
    "grouped transposed conv": (nn.ConvTranspose2d(4, 8, 3, groups=2), {}),
    "depthwise conv": (nn.Conv2d(4, 4, 3, groups=4), {}),
    "depthwise conv that widens": (nn.Conv2d(4, 8, 3, groups=4), {}),
    "embedding": (nn.Embedding(4, 8), {}),
    "embedding bag": (nn.EmbeddingBag(4, 8), {}),
    "layer norm over two dimensions": (nn.LayerNorm((4, 8)), {}),
    "batch norm": (nn.BatchNorm2d(4), {}),
    "prelu": (nn.PReLU(4), {}),
    "bilinear": (nn.Bilinear(4, 4, 8), {}),
    "attention": (
        nn.MultiheadAttention(8, 2),
        {
            "in_proj_weight": ("matrices_qkv", {"split_sizes": (8, 8, 8)}),
            "out_proj.weight": ("matrices", {}),
        },
    ),
    "attention of three widths": (
        nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True),
        {
            "q_proj_weight": ("matrices", {}),
            "k_proj_weight": ("matrices", {}),
            "v_proj_weight": ("matrices", {}),
            "out_proj.weight": ("matrices", {}),
        },
    ),
    "rnn": (
        nn.RNN(4, 3),
        {"weight_ih_l0": ("matrices", {}), "weight_hh_l0": ("matrices", {})},
    ),
    "lstm": (
        nn.LSTM(4, 3, proj_size=2),
        {
            "weight_ih_l0": ("matrices_gates", {"split_sizes": (3, 3, 3, 3)}),
            "weight_hh_l0": ("matrices_gates", {"split_sizes": (3, 3, 3, 3)}),
            "weight_hr_l0": ("matrices", {}),
        },
    ),
    "gru": (
        nn.GRU(4, 3),
        {
            "weight_ih_l0": ("matrices_gates", {"split_sizes": (3, 3, 3)}),
            "weight_hh_l0": ("matrices_gates", {"split_sizes": (3, 3, 3)}),
        },
    ),
    "lstm cell": (
        nn.LSTMCell(4, 3),
        {
            "weight_ih": ("matrices_gates", {"split_sizes": (3, 3, 3, 3)}),
            "weight_hh": ("matrices_gates", {"split_sizes": (3, 3, 3, 3)}),
        },
    ),
    "hugging face conv1d": (Conv1D(8, 4), {"weight": ("matrices_transposed", {"out_dim": 1})}),
    "conv1d without nf": (type("Conv1D", (Holder,), {})(weight=(4, 8)), {}),
    "unknown module": (Holder(weight=(4, 8), table=(1, 4, 8)), {}),
    "scalar": (Holder(gain=()), {}),
    "weight norm": (parametrizations.weight_norm(nn.Linear(4, 8)), {}),
    "old weight norm": (torch.nn.utils.weight_norm(nn.Linear(4, 8)), {}),
    "spectral norm": (parametrizations.spectral_norm(nn.Linear(4, 8)), {}),
    "complex": (nn.Linear(4, 8, dtype=torch.complex64), {}),
    "bfloat16": (nn.Linear(4, 8, dtype=torch.bfloat16), {"weight": ("matrices", {})}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:matrix_groups. no trainable parameter")
@pytest.mark.parametrize("kind", TYPES)
def test_the_type_of_a_module_decides(kind):
    module, expected = TYPES[kind]
    found = layouts(matrix_groups(with_head(it=module)))
    assert found == {f"it.{name}": layout for name, layout in expected.items()}


def test_the_matrices_of_lora_are_matrices():
    lora = Holder(
        base_layer=nn.Linear(8, 8).requires_grad_(False),
        lora_A=nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)}),
        lora_B=nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)}),
    )
    model = with_head(layers=nn.ModuleList([Holder(q_proj=lora)]))
    assert layouts(matrix_groups(model)) == {
        "layers.0.q_proj.lora_A.default.weight": WHOLE,
        "layers.0.q_proj.lora_B.default.weight": WHOLE,
    }


def test_two_layers_that_are_tied_are_a_matrix_unless_they_are_laid_out_differently():
    model = with_head(a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    model["b"].weight = model["a"].weight
    assert matrices(model) == ["a.weight"]
    model["b"] = Conv1D(8, 8)
    model["b"].weight = model["a"].weight
    assert matrices(model) == []


def test_what_computes_a_weight_is_no_matrix_and_the_reason_is_told():
    model = with_head(a=parametrizations.weight_norm(nn.Linear(4, 8)), b=nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"a\.parametrizations\.weight\.original1 \(computes a we"):
        matrix_groups(model, split={"original1": 2})


@pytest.mark.parametrize("order", [("table", "words"), ("words", "table")])
def test_what_is_tied_to_an_embedding_is_no_matrix_whichever_comes_first(order):
    parts = {"table": nn.Embedding(8, 4), "words": nn.Linear(4, 8)}
    parts["words"].weight = parts["table"].weight
    model = with_head(**{name: parts[name] for name in order}, body=nn.Linear(4, 4))
    assert matrices(model) == ["body.weight"]


# ---------------------------------------------------------------- experts


class PairedExperts(Holder):
    """Gated experts of 6 units for 8 features, as they are stored in either order."""

    def __init__(self, transposed, **attributes):
        up, down = ((4, 8, 12), (4, 6, 8)) if transposed else ((4, 12, 8), (4, 8, 6))
        super().__init__(**{"gate_up_proj": up, "down_proj": down, **attributes})


EXPERTS = {
    "by class": (PairedExperts(False), {"flatten": False}, None),
    "transposed, by shapes": (PairedExperts(True), {"flatten": False, "out_dim": 1}, None),
    "transposed, by attribute": (
        Holder(down_proj=(4, 6, 8), num_experts=4, is_transposed=True),
        {"flatten": False, "out_dim": 1},
        None,
    ),
    "concatenated": (PairedExperts(False, is_concatenated=True), {"flatten": False}, (6, 6)),
    "concatenated, transposed": (
        PairedExperts(True, is_concatenated=True),
        {"flatten": False, "out_dim": 1},
        (6, 6),
    ),
    "interleaved": (PairedExperts(False, is_concatenated=False), {"flatten": False}, None),
    "neither order, by shapes": (
        PairedExperts(False, gate_up_proj=(4, 6, 8)),
        {"flatten": False},
        None,
    ),
    "of an odd number": (
        PairedExperts(False, gate_up_proj=(4, 7, 8), is_concatenated=True),
        {"flatten": False},
        None,
    ),
    "by count": (Holder(w1=(4, 6, 8), n_routed_experts=4), {"flatten": False}, None),
    "another count": (Holder(w1=(4, 6, 8), num_experts=3), None, None),
    "vectors": (Holder(w1=(4, 1, 8), bias=(4, 8), num_experts=4), None, None),
}


@pytest.mark.filterwarnings("ignore:matrix_groups. no trainable parameter")
@pytest.mark.parametrize("kind", EXPERTS)
def test_fused_experts_are_a_batch_of_matrices(kind):
    module, expected, split_sizes = EXPERTS[kind]
    found = layouts(matrix_groups(with_head(experts=module)))
    assert len(found) == (0 if expected is None else len(list(module.parameters())))
    for name, (group, layout) in found.items():
        split = split_sizes is not None and name.endswith("gate_up_proj")
        assert layout == {**expected, **({"split_sizes": split_sizes} if split else {})}
        suffix = "_transposed" * ("out_dim" in expected) + "_gate_up" * split
        assert group == f"matrices_experts{suffix}"


ROUTERS = [
    Holder(router=nn.Linear(8, 4)),
    Holder(my_router=nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))),
    Holder(gate=nn.Linear(8, 4), experts=nn.ModuleList([nn.Linear(8, 8)])),
    Holder(wg=nn.Linear(8, 4), num_local_experts=4),
]


@pytest.mark.parametrize("module", ROUTERS, ids=["router", "path", "gate", "outputs"])
def test_routers_are_no_matrices(module):
    expected = [f"moe.{n}" for n, _ in module.named_parameters() if n == "experts.0.weight"]
    assert matrices(with_head(moe=module)) == expected


def test_a_gate_that_routes_nothing_is_a_matrix():
    assert matrices(with_head(mlp=Holder(gate=nn.Linear(8, 4)))) == ["mlp.gate.weight"]


# ---------------------------------------------------------------- fused projections

PHI = {"num_key_value_heads": 1, "head_dim": 4}
Phi3Attention = type("Phi3Attention", (Holder,), {})
LINEAR_QKV = ("matrices_qkv", {"split_sizes": (8, 8, 8)})
FUSED = [
    ({"qkv": nn.Linear(8, 24)}, LINEAR_QKV),
    ({"Wqkv": nn.Linear(8, 24)}, LINEAR_QKV),
    ({"to_qkv": nn.Linear(8, 24)}, LINEAR_QKV),
    ({"c_attn": nn.Linear(8, 24)}, LINEAR_QKV),
    ({"c_attn": nn.Linear(8, 24), "multi_query": False}, WHOLE),
    ({"qkv": nn.Linear(8, 16)}, WHOLE),
    ({"query_key_value": nn.Linear(8, 24)}, WHOLE),
    ({"qkv_proj": nn.Linear(8, 24)}, WHOLE),
    ({"qkv_proj": nn.Linear(8, 16), **PHI}, WHOLE),
    ({"proj": nn.Linear(8, 24)}, WHOLE),
    ({"gate_up_proj": nn.Linear(8, 12)}, WHOLE),
    ({"gate_up_proj": nn.Linear(8, 12), "down_proj": nn.Linear(4, 8)}, WHOLE),
    (
        {"gate_up_proj": nn.Linear(8, 12), "down_proj": nn.Linear(6, 8)},
        ("matrices_gate_up", {"split_sizes": (6, 6)}),
    ),
    (
        {"c_attn": Conv1D(24, 8)},
        ("matrices_transposed_qkv", {"out_dim": 1, "split_sizes": (8, 8, 8)}),
    ),
    (
        {"c_attn": Conv1D(16, 8)},
        ("matrices_transposed_qkv", {"out_dim": 1, "split_sizes": (8, 8)}),
    ),
    ({"c_attn": Conv1D(32, 8)}, ("matrices_transposed", {"out_dim": 1})),
    ({"c_attn": Conv1D(30, 8)}, ("matrices_transposed", {"out_dim": 1})),
    ({"c_fc": Conv1D(24, 8)}, ("matrices_transposed", {"out_dim": 1})),
]


@pytest.mark.parametrize(("members", "expected"), FUSED, ids=lambda x: "-".join(map(str, x))[:40])
def test_fused_projections_are_split_where_their_order_is_certain(members, expected):
    owner, (name, *_) = Holder(**members), members
    assert layouts(matrix_groups(with_head(block=owner)))[f"block.{name}.weight"] == expected


def test_phi_3_s_projection_is_split_by_its_numbers_of_heads():
    model = with_head(attn=Phi3Attention(qkv_proj=nn.Linear(8, 16), **PHI))
    assert layouts(matrix_groups(model)) == {
        "attn.qkv_proj.weight": ("matrices_qkv", {"split_sizes": (8, 4, 4)})
    }


def test_split_fused_false_keeps_everything_whole():
    model = with_head(
        qkv=nn.Linear(8, 24),
        lstm=nn.LSTM(8, 4),
        conv=nn.Conv2d(4, 8, 3, groups=2),
        a=nn.Linear(8, 8),
    )
    assert layouts(matrix_groups(model, split_fused=False)) == {
        "qkv.weight": WHOLE,
        "lstm.weight_ih_l0": WHOLE,
        "lstm.weight_hh_l0": WHOLE,
        "conv.weight": ("matrices_conv", CONV),
        "a.weight": WHOLE,
    }


def test_groups_of_one_name_are_told_apart_by_their_sizes():
    attention = Phi3Attention(qkv_proj=nn.Linear(8, 16), **PHI)
    model = with_head(a=nn.ModuleDict({"qkv": nn.Linear(8, 24)}), b=attention, c=nn.Linear(8, 8))
    assert names_by_group(matrix_groups(model)) == {
        "matrices_qkv_3x8": ["a.qkv.weight"],
        "matrices_qkv_1x8_2x4": ["b.qkv_proj.weight"],
        "matrices": ["c.weight"],
        "other": ["a.qkv.bias", "b.qkv_proj.bias", "c.bias", "head.weight", "head.bias"],
    }


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (3, ("matrices_split", {"split_sizes": (8, 8, 8)})),
        ((16, 8), ("matrices_split", {"split_sizes": (16, 8)})),
        ([16, 8], ("matrices_split", {"split_sizes": (16, 8)})),
        (1, WHOLE),
        ((24,), WHOLE),
    ],
)
@pytest.mark.parametrize("name", ["qkv", "query_key_value"])
def test_split_says_the_blocks_and_goes_before_what_is_recognised(name, sizes, expected):
    groups = matrix_groups(with_head(**{name: nn.Linear(8, 24)}), split={name: sizes})
    assert layouts(groups) == {f"{name}.weight": expected}


def test_split_counts_along_the_outputs_of_the_matrix():
    model = with_head(a=Conv1D(6, 8), b=nn.ConvTranspose2d(4, 6, 3), c=nn.Conv2d(4, 6, 3))
    assert layouts(matrix_groups(model, split={".": 3})) == {
        "a.weight": ("matrices_transposed_split", {"out_dim": 1, "split_sizes": (2, 2, 2)}),
        "b.weight": (
            "matrices_conv_transposed_split",
            {**CONV, "out_dim": 1, "split_sizes": (18, 18, 18)},
        ),
        "c.weight": ("matrices_conv_split", {**CONV, "split_sizes": (2, 2, 2)}),
    }


def test_the_first_pattern_of_split_counts():
    model = with_head(a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    found = layouts(matrix_groups(model, split={"^a": 2, ".": 4}))
    assert [layout["split_sizes"] for _, layout in found.values()] == [(4, 4), (2, 2, 2, 2)]
