"""How deep in its model a parameter is, read from its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from .names import find_parameters, strip_wrapper_prefixes

# What a component of a name says about depth: matched in lower case against the whole component.
HEAD = re.compile(
    r"(.*_)?(heads?|classifiers?)(_.*|\d+)?|fc|scores?|logits|output|out|out_proj|proj_out|project_out"
    r"|output_(proj|projection|layer)|embed_out|unembed|unembedding|cls|predictions?|pooler|qa_outputs"
    r"|(final_|post_|fc_)?(ln|norm|layer_?norm|rms_?norm)(_f|_final|_post)?"
)
_EMBEDDING = re.compile(
    r"(.*_)?(embed|embeds|embedding|embeddings|embedder|emb|wte|wpe)(_.*|\d+)?|shared"
    r"|(cls|class|dist|mask|reg|register|pos)_tokens?|(.*_)?stem|conv_proj|conv1|bn1"
    r"|input|in_proj|proj_in|project_in|input_(proj|projection|layer)"
    r"|ln_pre|norm_pre|pre_(layernorm|layrnorm|norm)"  # norms that come before the first layer
)
_NUMBERED = re.compile(r"(?P<word>\w*?(layer|block|stage))(?P<joint>_?)(?P<index>\d+)")


def infer_param_depth(name: str, n_layers: int) -> float:
    """How deep in its model a parameter of this name is: 0 at the input, 1 at the output.

    The name is read from the left, and the first component that says something decides:

    - a layer's number i gives ``(i + 1) / n_layers``: a component that is a number (``layers.3.``,
      ``h.3.``, ``blocks.3.``, a ``Sequential``'s ``3.``), or one that ends in a number after
      *layer*, *block* or *stage* (``encoder_layer_3`` is i = 3; ``layer1``, as in ResNets, i = 0);
    - embeddings, class tokens and stems give 0.0: ``wte``, ``embed_tokens``, ``patch_embed``,
      ``cls_token``, ``conv1``, ...;
    - heads, output projections and norms outside of the layers give 1.0: ``lm_head``,
      ``classifier``, ``fc``, ``score``, ``ln_f``, ``norm``, ``final_layer_norm``, ...;
    - any other name gives 0.5.

    Args:
        name: a parameter's name; prefixes of wrappers do not matter.
        n_layers: the number of layers, as by :func:`count_layers`; a higher i counts as the last.

    Raises:
        ValueError: ``n_layers`` is not an integer >= 1.

    Example::

        >>> [infer_param_depth(n, 4) for n in ("wte.weight", "h.1.ln_1.bias", "lm_head.weight")]
        [0.0, 0.5, 1.0]
    """
    if isinstance(n_layers, bool) or not isinstance(n_layers, int) or n_layers < 1:
        raise ValueError(f"n_layers must be an integer >= 1, but is {n_layers!r}")
    kind, _, index = place(name)
    if kind == "layer":
        return min(1.0, max(0, index + 1) / n_layers)
    return {"embedding": 0.0, "head": 1.0}.get(kind, 0.5)


def count_layers(model: nn.Module) -> int:
    """The number of layers of a model, for :func:`infer_param_depth`; 0 if it has none.

    Layers are the outermost numbered modules that hold parameters; of several stacks (an encoder
    and a decoder, say) the largest counts. Without any, they are the first children that differ,
    less embeddings, heads and norms: ``fc1``, ``fc2`` and ``fc3`` are three layers.

    Example::

        >>> count_layers(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        2
    """
    return layer_ids(find_parameters(model, need_trainable=False).names)[1]


def place(
    name: str, head: re.Pattern[str] = HEAD
) -> tuple[Literal["embedding", "layer", "head", "unknown"], str, int]:
    """Where a name says that it is; for a layer also its stack (the numbers' path) and number.

    For embeddings and heads, instead of a number, how many components follow the deciding one.
    """
    parts = strip_wrapper_prefixes(name).lower().split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return "layer", ".".join(parts[:i]), int(part)
        if numbered := _NUMBERED.fullmatch(part):
            stack = ".".join([*parts[:i], numbered["word"]])
            # torchvision counts layer1 to layer4, but encoder_layer_0 and up.
            return "layer", stack, int(numbered["index"]) - (not numbered["joint"])
        if head.fullmatch(part):  # before embeddings: GPT-NeoX's head is `embed_out`
            return "head", "", len(parts) - i - 1
        if _EMBEDDING.fullmatch(part):
            return "embedding", "", len(parts) - i - 1
    return "unknown", "", 0


def is_numbered(part: str) -> bool:
    """Whether a component of a name numbers a layer: ``3``, ``layer3``, ``block_3``."""
    return part.isdecimal() or _NUMBERED.fullmatch(part.lower()) is not None


def layer_ranks(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(rank of its layer, layers in its stack) for each parameter that is in a layer."""
    places = {name: place(name) for name in names}
    in_layers: dict[str, tuple[Any, Any]] = {
        name: (stack, index) for name, (kind, stack, index) in places.items() if kind == "layer"
    }
    if not in_layers:
        paths = {n: n.split(".")[:-1] for n, place in places.items() if place[0] == "unknown"}
        cuts = range(max(map(len, paths.values()), default=0) + 1)
        children = [{n: tuple(path[:cut]) for n, path in paths.items()} for cut in cuts]
        differing = next((c for c in children if len(set(c.values())) > 1), children[-1])
        order = list(dict.fromkeys(differing.values()))
        in_layers = {name: ("", order.index(child)) for name, child in differing.items()}
    # Ranks instead of numbers, because a Sequential counts its activations too.
    stacks: dict[str, set[int]] = {}
    for stack, index in in_layers.values():
        stacks.setdefault(stack, set()).add(index)
    ranks = {s: {index: r for r, index in enumerate(sorted(stacks[s]))} for s in stacks}
    return {name: (ranks[s][index], len(ranks[s])) for name, (s, index) in in_layers.items()}


def layer_ids(names: Sequence[str]) -> tuple[dict[str, int], int]:
    """Layer ids as ``layer_decay`` counts them, and the number of layers."""
    ranks = layer_ranks(names)
    num_layers = max((size for _, size in ranks.values()), default=0)
    outside = {n: 0 if place(n)[0] == "embedding" else num_layers + 1 for n in names}
    return {**outside, **{name: rank + 1 for name, (rank, _) in ranks.items()}}, num_layers
