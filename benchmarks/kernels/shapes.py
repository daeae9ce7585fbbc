"""The models whose tensors the optimizers update: shapes only, no modules."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Name and size of one parameter.
NamedShape = tuple[str, tuple[int, ...]]


def gpt2(
    layers: int = 12, hidden: int = 768, vocabulary: int = 50257, context: int = 1024
) -> list[NamedShape]:
    """GPT-2 (124M): output tied to the embedding."""
    shapes: list[NamedShape] = [("wte", (vocabulary, hidden)), ("wpe", (context, hidden))]
    for i in range(layers):
        for name, size in (
            ("ln_1", (hidden,)),
            ("attn.c_attn", (hidden, 3 * hidden)),
            ("attn.c_proj", (hidden, hidden)),
            ("ln_2", (hidden,)),
            ("mlp.c_fc", (hidden, 4 * hidden)),
            ("mlp.c_proj", (4 * hidden, hidden)),
        ):
            shapes += [(f"h.{i}.{name}.weight", size), (f"h.{i}.{name}.bias", size[-1:])]
    return [*shapes, ("ln_f.weight", (hidden,)), ("ln_f.bias", (hidden,))]


def llama(
    layers: int = 16,
    hidden: int = 2048,
    intermediate: int = 8192,
    key_value: int = 512,
    vocabulary: int = 32000,
) -> list[NamedShape]:
    """A Llama-like model (1.04B): grouped-query attention, no biases, tied embedding."""
    shapes: list[NamedShape] = [("embed_tokens", (vocabulary, hidden))]
    for i in range(layers):
        for name, size in (
            ("q_proj", (hidden, hidden)),
            ("k_proj", (key_value, hidden)),
            ("v_proj", (key_value, hidden)),
            ("o_proj", (hidden, hidden)),
            ("gate_proj", (intermediate, hidden)),
            ("up_proj", (intermediate, hidden)),
            ("down_proj", (hidden, intermediate)),
            ("input_norm", (hidden,)),
            ("post_attention_norm", (hidden,)),
        ):
            shapes.append((f"layers.{i}.{name}", size))
    return [*shapes, ("norm", (hidden,))]


def resnet(depths: Sequence[int] = (1, 3, 6, 6), width: int = 64) -> list[NamedShape]:
    """The bottleneck blocks of a ResNet (34M), each convolution with its BatchNorm."""
    shapes: list[NamedShape] = []
    channels = width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        for block in range(depth):
            sizes = (
                (inner, channels, 1, 1),
                (inner, inner, 3, 3),
                (4 * inner, inner, 1, 1),
            )
            for i, size in enumerate(sizes, start=1):
                name = f"layer{stage + 1}.{block}"
                shapes.append((f"{name}.conv{i}.weight", size))
                shapes.append((f"{name}.bn{i}.weight", size[:1]))
                shapes.append((f"{name}.bn{i}.bias", size[:1]))
            channels = 4 * inner
    return shapes


def tiny(tensors: int = 5000) -> list[NamedShape]:
    """Many tensors so small that what a step costs per tensor is all that matters."""
    sizes = random.Random(0)
    return [(f"tensor.{i}", (sizes.randint(1000, 4000),)) for i in range(tensors)]


def equal(parameters: int, tensors: int) -> list[NamedShape]:
    """``tensors`` tensors of one size, for the scaling curves."""
    return [(f"tensor.{i}", (parameters // tensors,)) for i in range(tensors)]


@dataclass(frozen=True)
class Model:
    summary: str
    full: Callable[[], list[NamedShape]]
    quick: Callable[[], list[NamedShape]]  # of the same structure, for a look only


MODELS = {
    "gpt2": Model(
        "GPT-2 124M, 148 tensors",
        gpt2,
        lambda: gpt2(layers=2, hidden=64, vocabulary=1000, context=64),
    ),
    "llama": Model(
        "Llama-like 1.04B, 146 tensors",
        llama,
        lambda: llama(layers=2, hidden=64, intermediate=256, key_value=16, vocabulary=1000),
    ),
    "resnet": Model(
        "ResNet-like 34M, 144 tensors", resnet, lambda: resnet(depths=(1, 1, 1, 1), width=16)
    ),
    "tiny": Model("5,000 tensors of 1,000 to 4,000 elements", tiny, lambda: tiny(60)),
}


def elements(shapes: Sequence[NamedShape]) -> int:
    return sum(math.prod(size) for _, size in shapes)


def split_evenly(sizes: Sequence[int], parts: int) -> list[int]:
    """The part of each size, so that the sums of the parts are near each other.

    The largest first, each into the part that holds least so far.
    """
    held = [0] * parts
    chosen = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        chosen[i] = held.index(min(held))
        held[chosen[i]] += sizes[i]
    return chosen
