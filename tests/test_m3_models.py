"""M3 on whole models, sorted by matrix_groups: everything trains, each part by its rule."""

import pytest
import torch
import transformers as hf
from torch import nn

from nested_optim import depth_groups, describe, matrix_groups

from .helpers import slow_m3

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 17,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def tokens(**more):
    ids = torch.randint(1, 17, (4, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, **more}


def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(6) % 2}


MODELS = {
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**SIZES, n_positions=8)), tokens),
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=1)),
        tokens,
    ),
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), tokens),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=8, patch_size=4)),
        images,
    ),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3)
        ),
        tokens,
    ),
    "resnet": (
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
        ),
        images,
    ),
}


@pytest.mark.parametrize("second_moment", [None, "row"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains(name, second_moment):
    torch.manual_seed(0)
    build, batch = MODELS[name]
    model = build().train()
    optimizer = slow_m3(
        matrix_groups(model), lr=3e-3, slow_frequency=3, second_moment=second_moment
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(0)
    losses = []
    for _ in range(25):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    rules = {p: g["algorithm"] for g in optimizer.param_groups for p in g["params"]}
    for n, p in model.named_parameters():
        # No gradient reaches a bias of keys, which the softmax takes out.
        moved = not torch.equal(p, before[n])
        assert moved or n.endswith("key.bias"), n
        key = "momentum_buffer" if rules[p] == "m3" else "exp_avg"
        assert key in optimizer.state[p], n
    assert set(rules.values()) == {"m3", "adamw"}


def test_levels_by_depth_and_matrices_by_type_in_one_optimizer():
    torch.manual_seed(0)
    model = MODELS["llama"][0]()
    groups = matrix_groups(
        model, groups=depth_groups(model, (1, 4), lr=1e-3), matrix={"lr_mult": 2}
    )
    optimizer = slow_m3(groups)
    for _ in range(8):
        model(**tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for row, group in zip(describe(optimizer, model), optimizer.param_groups):
        assert row["updates"] == (8 // group["frequency"],) * 2
        assert group["lr"] == (2e-3 if group["algorithm"] == "m3" else 1e-3)
    assert {g["frequency"] for g in optimizer.param_groups} == {1, 4}
    assert {g["algorithm"] for g in optimizer.param_groups} == {"m3", "adamw"}


def test_a_transposed_convolution_is_read_by_its_columns():
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 6, 3), "head": nn.Linear(6, 2)})
    [group] = [g for g in matrix_groups(model) if g["algorithm"] == "m3"]
    assert (group["flatten"], group["out_dim"]) == (True, 1)
    optimizer = slow_m3([group], second_moment="row", adjust_lr="spectral")
    weight = model["up"].weight
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["second_moment"].shape == (1, 6, 3, 3)
