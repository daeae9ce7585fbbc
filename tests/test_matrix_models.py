"""Which parameters of whole models are hidden matrices: inputs and outputs by declaration and name.

Each table names every trainable parameter of two dimensions or more.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from nested_optim import matrix_groups

from .matrix_helpers import Holder, layouts, matrices, mlp

# ---------------------------------------------------------------- Hugging Face

SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 11,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GQA = {**SIZES, "num_key_value_heads": 1}
LLAMA_ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
BERT_LAYER = """attention.self.query attention.self.key attention.self.value attention.output.dense
    intermediate.dense output.dense"""
BERT_TABLES = """bert.embeddings.word_embeddings bert.embeddings.position_embeddings
    bert.embeddings.token_type_embeddings"""
TRANSPOSED, EXPERTS = {"out_dim": 1}, {"flatten": False}


def split(*sizes, **layout):
    return {**layout, "split_sizes": sizes}


def gpt2_config(**more):
    return hf.GPT2Config(**{**SIZES, "n_positions": 4, **more})


def gpt2_layer(*cross):
    return [
        ("attn.c_attn", split(8, 8, 8, **TRANSPOSED)),
        ("attn.c_proj", TRANSPOSED),
        *cross,
        ("mlp.c_fc mlp.c_proj", TRANSPOSED),
    ]


T5_SELF = "0.SelfAttention.q 0.SelfAttention.k 0.SelfAttention.v 0.SelfAttention.o"
T5_ENCODER = [(f"{T5_SELF} 1.DenseReluDense.wi 1.DenseReluDense.wo", {})]
T5_DECODER = [
    (
        f"{T5_SELF} {T5_SELF.replace('0.Self', '1.EncDec')} "
        "2.DenseReluDense.wi 2.DenseReluDense.wo",
        {},
    )
]

# name: (model, paths of its stacks of layers, each layer's (names, layout), other matrices, the
# rest). A name that is no parameter's is that of a module, whose "weight" is meant.
MODELS = {
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(gpt2_config()),
        "transformer.h",
        gpt2_layer(),
        "",
        "transformer.wte transformer.wpe",  # wte is the head too
    ),
    "gpt2 with cross attention": (
        lambda: hf.GPT2Model(gpt2_config(add_cross_attention=True)),
        "h",
        gpt2_layer(
            ("crossattention.c_attn", split(8, 8, **TRANSPOSED)),
            ("crossattention.q_attn crossattention.c_proj", TRANSPOSED),
        ),
        "",
        "wte wpe",
    ),
    "gpt2 classifier": (
        lambda: hf.GPT2ForSequenceClassification(gpt2_config()),
        "transformer.h",
        gpt2_layer(),
        "",
        "transformer.wte transformer.wpe score",
    ),
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA)),
        "model.layers",
        [(f"{LLAMA_ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj", {})],
        "",
        "model.embed_tokens lm_head",
    ),
    "llama with a tied head": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA, tie_word_embeddings=True)),
        "model.layers",
        [(f"{LLAMA_ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj", {})],
        "",
        "model.embed_tokens",
    ),
    "llama without a head": (
        lambda: hf.LlamaModel(hf.LlamaConfig(**GQA)),
        "layers",
        [(f"{LLAMA_ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj", {})],
        "",
        "embed_tokens",
    ),
    "bert masked lm": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
        "bert.encoder.layer",
        [(BERT_LAYER, {})],
        "",
        f"{BERT_TABLES} cls.predictions.transform.dense",
    ),
    "bert pretraining": (
        lambda: hf.BertForPreTraining(hf.BertConfig(**SIZES)),
        "bert.encoder.layer",
        [(BERT_LAYER, {})],
        "bert.pooler.dense",
        f"{BERT_TABLES} cls.predictions.transform.dense cls.seq_relationship",
    ),
    "bert classifier": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)),
        "bert.encoder.layer",
        [(BERT_LAYER, {})],
        "bert.pooler.dense",
        f"{BERT_TABLES} classifier",
    ),
    "bert without a head": (
        lambda: hf.BertModel(hf.BertConfig(**SIZES)),
        "encoder.layer",
        [(BERT_LAYER, {})],
        "pooler.dense",
        BERT_TABLES.replace("bert.", ""),
    ),
    "roberta classifier": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES)),
        "roberta.encoder.layer",
        [(BERT_LAYER, {})],
        "",
        f"{BERT_TABLES.replace('bert.', 'roberta.')} classifier.dense classifier.out_proj",
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**SIZES, image_size=4, patch_size=2, num_labels=3)
        ),
        "vit.layers",
        [
            (
                """attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1
                mlp.fc2""",
                {},
            )
        ],
        "",
        """vit.embeddings.cls_token vit.embeddings.position_embeddings
        vit.embeddings.patch_embeddings.projection classifier""",
    ),
    "clip": (
        lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config=SIZES, vision_config={**SIZES, "image_size": 4, "patch_size": 2}
            )
        ),
        "text_model.encoder.layers vision_model.encoder.layers",
        [
            (
                """self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj mlp.fc1
                mlp.fc2""",
                {},
            )
        ],
        "",
        """text_model.embeddings.token_embedding text_model.embeddings.position_embedding
        vision_model.embeddings.patch_embedding vision_model.embeddings.position_embedding
        visual_projection text_projection""",
    ),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GQA, num_local_experts=4)),
        "model.layers",
        [
            (LLAMA_ATTENTION, {}),
            ("mlp.experts.gate_up_proj", split(12, 12, **EXPERTS)),
            ("mlp.experts.down_proj", EXPERTS),
        ],
        "",
        "model.embed_tokens model.layers.0.mlp.gate model.layers.1.mlp.gate lm_head",
    ),
    "qwen3 moe": (
        lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(**GQA, num_experts=4, moe_intermediate_size=8, head_dim=4)
        ),
        "model.layers",
        [
            (LLAMA_ATTENTION, {}),
            ("mlp.experts.gate_up_proj", split(8, 8, **EXPERTS)),
            ("mlp.experts.down_proj", EXPERTS),
        ],
        "",
        "model.embed_tokens model.layers.0.mlp.gate model.layers.1.mlp.gate lm_head",
    ),
    "gpt-oss": (
        lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**GQA, num_local_experts=4, head_dim=4)),
        "model.layers",
        [
            (LLAMA_ATTENTION, {}),
            # Gates and ups are interleaved, so they stay together.
            ("mlp.experts.gate_up_proj mlp.experts.down_proj", {**EXPERTS, **TRANSPOSED}),
        ],
        "",
        """model.embed_tokens model.layers.0.mlp.router model.layers.1.mlp.router lm_head
        model.layers.0.mlp.experts.gate_up_proj_bias model.layers.0.mlp.experts.down_proj_bias
        model.layers.1.mlp.experts.gate_up_proj_bias model.layers.1.mlp.experts.down_proj_bias""",
    ),
    "phi3": (
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GQA)),
        "model.layers",
        [
            ("self_attn.o_proj mlp.down_proj", {}),
            ("self_attn.qkv_proj", split(8, 4, 4)),
            ("mlp.gate_up_proj", split(12, 12)),
        ],
        "",
        "model.embed_tokens lm_head",
    ),
    "gpt-neox": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
        "gpt_neox.layers",
        [("attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h", {})],
        "",
        "gpt_neox.embed_in lm_head",
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=8, d_ff=12, d_kv=4, num_layers=2, num_heads=2, vocab_size=11)
        ),
        {"encoder.block": T5_ENCODER, "decoder.block": T5_DECODER},
        None,
        "",
        """shared encoder.block.0.layer.0.SelfAttention.relative_attention_bias
        decoder.block.0.layer.0.SelfAttention.relative_attention_bias""",
    ),
}


def full_names(words, model, prefix=""):
    """Names of parameters: as they are, or with the "weight" of the module that they name."""
    known = dict(model.named_parameters())
    names = [prefix + word for word in words.split()]
    return [name if name in known else f"{name}.weight" for name in names]


@pytest.mark.parametrize("kind", MODELS)
def test_hugging_face_models(kind):
    build, paths, layer, matrices_outside, others = MODELS[kind]
    model = build()
    stacks = paths if isinstance(paths, dict) else {path: layer for path in paths.split()}
    expected = {name: {} for name in full_names(matrices_outside, model)}
    for path, parts in stacks.items():
        inner = "layer." if path.endswith(".block") else ""
        for i in range(2):
            for words, layout in parts:
                for name in full_names(words, model, f"{path}.{i}.{inner}"):
                    expected[name] = layout
    found = layouts(matrix_groups(model))
    assert {name: layout for name, (_, layout) in found.items()} == expected
    rest = [n for n, p in model.named_parameters() if p.ndim >= 2 and n not in found]
    assert sorted(rest) == sorted(full_names(others, model))


class Declares(Holder):
    """A model that says what its output is, under a name that says nothing, before other layers."""

    def __init__(self, error=None):
        super().__init__(words=nn.Linear(4, 8), body=nn.Linear(4, 4), extra=nn.Linear(4, 4))
        self.error = error

    def get_output_embeddings(self):
        if self.error:
            raise self.error
        return self.words


def test_a_model_in_a_model_that_declares_its_output_is_asked_too():
    assert matrices(Holder(inner=Declares(), last=nn.Linear(4, 4))) == [
        "inner.body.weight",
        "inner.extra.weight",
        "last.weight",
    ]


@pytest.mark.parametrize("error", [AttributeError(), NotImplementedError()])
def test_a_model_that_has_no_output_to_declare_is_read_by_its_names(error):
    assert matrices(Declares(error)) == ["words.weight", "body.weight"]


# ---------------------------------------------------------------- splits do what they say


def zero_block(model, name, index):
    """Zero one block of a fused projection, as M3 is told to see it."""
    layout = layouts(matrix_groups(model))[name][1]
    param = dict(model.named_parameters())[name]
    dim = param.ndim - 2 + layout.get("out_dim", 0)
    with torch.no_grad():
        param.split(layout["split_sizes"], dim)[index].zero_()


@pytest.mark.parametrize(
    ("kind", "path", "projection"),
    [
        ("gpt2", "transformer.h.0.attn", "c_attn.weight"),
        ("phi3", "model.layers.0.self_attn", "qkv_proj.weight"),
        ("phi3", "model.layers.0.mlp", "gate_up_proj.weight"),
        ("mixtral", "model.layers.0.mlp.experts", "gate_up_proj"),
        ("qwen3 moe", "model.layers.0.mlp.experts", "gate_up_proj"),
    ],
)
def test_the_last_block_is_the_values_or_the_gated_half(kind, path, projection):
    """Without values, or without the half that is gated, a module's output is zero."""
    model = MODELS[kind][0]().eval()
    torch.manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn_like(p) if p.ndim >= 2 else torch.zeros_like(p)
    module, x = model.get_submodule(path), torch.randn(1, 3, 8)
    calls = {
        "attn": lambda: module(x)[0],
        "self_attn": lambda: module(x, (torch.ones(1, 3, 4), torch.zeros(1, 3, 4)), None)[0],
        "mlp": lambda: module(x),
        "experts": lambda: module(x[0], torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)),
    }
    call = calls[path.rpartition(".")[2]]
    assert call().abs().max() > 0
    zero_block(model, f"{path}.{projection}", -1)
    assert call().abs().max() == 0


def test_the_last_block_of_attention_is_its_values():
    attention = nn.MultiheadAttention(8, 2, bias=False)
    x = torch.randn(3, 1, 8)
    zero_block(attention, "in_proj_weight", 0)
    assert attention(x, x, x)[0].abs().max() > 0
    zero_block(attention, "in_proj_weight", -1)
    assert attention(x, x, x)[0].abs().max() == 0


# ---------------------------------------------------------------- models by hand


class BasicBlock(Holder):
    def __init__(self, inputs, outputs):
        super().__init__(
            conv1=nn.Conv2d(inputs, outputs, 3),
            bn1=nn.BatchNorm2d(outputs),
            conv2=nn.Conv2d(outputs, outputs, 3),
            downsample=nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs)),
        )


class ResNet(Holder):
    def __init__(self):
        super().__init__(
            conv1=nn.Conv2d(3, 4, 7),
            bn1=nn.BatchNorm2d(4),
            layer1=nn.Sequential(BasicBlock(4, 4)),
            layer2=nn.Sequential(BasicBlock(4, 8)),
            fc=nn.Linear(8, 5),
        )


class ViTBlock(Holder):
    def __init__(self):
        super().__init__(
            norm1=nn.LayerNorm(8),
            attn=Holder(qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8)),
            mlp=Holder(fc1=nn.Linear(8, 16), fc2=nn.Linear(16, 8)),
        )


class ViT(Holder):
    def __init__(self):
        super().__init__(
            cls_token=(1, 1, 8),
            pos_embed=(1, 5, 8),
            patch_embed=Holder(proj=nn.Conv2d(3, 8, 2)),
            blocks=nn.Sequential(ViTBlock(), ViTBlock()),
            norm=nn.LayerNorm(8),
            head=nn.Linear(8, 5),
        )


class Decoder(Holder):
    def __init__(self, **end):
        block = nn.TransformerEncoderLayer(8, 2, 16)
        super().__init__(
            tokens=nn.Embedding(11, 8),
            positions=(4, 8),
            layers=nn.TransformerEncoder(block, 2, enable_nested_tensor=False),
            norm_f=nn.LayerNorm(8),
            **end,
        )


DECODER_LAYERS = [
    f"layers.layers.{i}.{name}"
    for i in range(2)
    for name in (
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    )
]


def test_a_resnet_s_stem_and_classifier_are_no_matrices():
    assert layouts(matrix_groups(ResNet())) == {
        f"layer{i}.0.{name}.weight": ("matrices_conv", {"flatten": True})
        for i in (1, 2)
        for name in ("conv1", "conv2", "downsample.0")
    }


def test_a_vit_s_patches_tokens_and_head_are_no_matrices():
    found = layouts(matrix_groups(ViT()))
    assert list(found) == [
        f"blocks.{i}.{name}.weight" for name in ("attn.qkv",) for i in range(2)
    ] + [
        f"blocks.{i}.{name}.weight"
        for i in range(2)
        for name in ("attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert found["blocks.0.attn.qkv.weight"] == ("matrices_qkv", {"split_sizes": (8, 8, 8)})


@pytest.mark.parametrize("end", [{"head": nn.Linear(8, 11)}, {"decode": nn.Linear(8, 11)}, {}])
def test_a_decoder_s_last_layer_is_its_head_under_any_name_but_a_block_s_is_none(end):
    assert sorted(matrices(Decoder(**end))) == sorted(DECODER_LAYERS)


def linear(*names):
    """A module with an ``nn.Linear`` at each of the dotted names, in plain containers."""
    root = nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.add_module(leaf, nn.Linear(4, 4))
    return root


# The names that are hidden, then those that are not.
NAMES = [
    ("blocks.0.a", "lm_head"),
    ("a b", "head.c head.d"),
    ("a b", "final_layer.linear final_layer.modulation.1"),
    ("a pooler.dense", "score"),
    ("a pooler", "out"),
    ("attn.out_proj mlp.fc self_attention.output sa.heads.0.key", "head"),
    ("a", "vision_head.attention.q_proj vision_head.mlp.fc1"),
    ("embed_tokens_extend.layers.0.attn.q embed_tokens_extend.mlp.fc", "embed.proj head"),
    ("attn.in_proj mixer.input_proj", "fc"),
    ("a", "stem.0 stem.1 patch_embed.proj input_proj fc"),
    ("layers.0.head layers.0.fc layers.0.in_proj", "output"),
    ("fc1 fc2", "fc3"),
    ("conv2 fc1", "conv1 fc2"),
    ("a.0 a.1 a.2", "z"),
    ("layers.0 layers.1", "layers.2"),
    ("layer1 layer2", "layer3"),
    ("layers.0.a layers.0.b layers.1.a layers.1.b", ""),
    ("stage1.a stage2.a", ""),
    ("a pooler.dense", ""),
]


@pytest.mark.parametrize(("hidden", "rest"), NAMES)
def test_names_tell_inputs_and_outputs(hidden, rest):
    model = linear(*hidden.split(), *rest.split())
    assert sorted(matrices(model)) == sorted(f"{name}.weight" for name in hidden.split())


HEADS = """head heads.0 aux_head classifier class_labels_classifier fc score logits to_logits output
    out_proj proj_out embed_out unembed qa_outputs cls.a predictor bbox_predictor.layers.0
    prediction predictions text_projection visual_projection final_layer.linear last_conv conv_out
    conv_last"""


@pytest.mark.parametrize("head", HEADS.split())
def test_a_head_need_not_be_the_last_layer(head):
    assert matrices(linear(head, "a", "b")) == ["a.weight", "b.weight"]


SEQUENTIAL = [
    (mlp(), ["0.weight", "2.weight"]),
    (
        nn.Sequential(mlp(), mlp()),
        ["0.0.weight", "0.2.weight", "0.4.weight", "1.0.weight", "1.2.weight"],
    ),
    (nn.ModuleDict({"classifier": mlp()}), ["classifier.0.weight", "classifier.2.weight"]),
    (
        nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), "x": mlp()[:1]}),
        ["x.0.weight"],
    ),
    (
        nn.ModuleDict({"head": nn.Sequential(mlp(), mlp()[:3], nn.ReLU())}),
        ["head.0.0.weight", "head.0.2.weight", "head.0.4.weight", "head.1.0.weight"],
    ),
    (
        nn.Sequential(
            nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2)
        ),
        ["0.weight", "2.weight"],
    ),
    (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), ["0.weight"]),
    (
        nn.ModuleDict(
            {"table": nn.Embedding(4, 4), "rnn": nn.RNN(4, 4), "decoder": nn.Linear(4, 4)}
        ),
        ["rnn.weight_ih_l0", "rnn.weight_hh_l0"],
    ),
    (
        nn.ModuleDict({"a": nn.Linear(4, 4), "loss": nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3, 6])}),
        ["a.weight"],
    ),
    (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
    (nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.MultiheadAttention(4, 2)}), ["a.weight"]),
    (
        nn.ModuleDict({"head": nn.Sequential(nn.MultiheadAttention(4, 2), nn.LSTM(4, 4))}),
        ["head.0.in_proj_weight", "head.0.out_proj.weight"],
    ),
    (
        nn.ModuleDict({"att": nn.MultiheadAttention(4, 2)}),
        ["att.in_proj_weight", "att.out_proj.weight"],
    ),
    (nn.Transformer(4, 2, 1, 1, 8), None),
]


@pytest.mark.parametrize(("model", "hidden"), SEQUENTIAL)
def test_of_a_sequential_the_last_layer_is_the_output(model, hidden):
    every = [name for name, p in model.named_parameters() if p.ndim >= 2]
    assert sorted(matrices(model)) == sorted(every if hidden is None else hidden)
