"""Which parameters of a model are hidden matrices, and how each of them is laid out as one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from .depth import HEAD, is_numbered, place
from .names import unwrapped_modules

# Names of output layers: depth.py's heads, less poolers (which feed a head), and a few more.
_OUTPUT = re.compile(
    rf"(?!poolers?$)({HEAD.pattern}|(.*_)?logits|(.*_)?(pred|prediction|predictor)s?"
    r"|(text|visual|vision|image|audio)_projection|conv_(out|last|final)"
    r"|(final|last)_(layer|linear|fc|conv|proj|projection))"
)
# Below these, "out_proj", "fc", "heads" or "in_proj" are parts of a block, not ends of the model.
_BLOCK = re.compile(r".*(attn|attention|mlp|ffn|feed_?forward|mixer)(_.*|\d+)?|sa|ff|se|moe")
_FORWARD = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS = (*_FORWARD, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Whose `qkv_proj` holds all queries, then all keys, then all values. Under the same name CodeGen
# and MiniMax, for two, interleave them.
_QKV_PROJ_OWNERS = ("Phi3Attention", "Phi4MultimodalAttention")


@dataclass(frozen=True)
class Layout:
    """How a parameter is one matrix, or several: what M3 is told by its group's options."""

    kind: str = ""  # for the group's name
    flatten: bool | None = None  # True: to (d0, d1 * d2 * ...); False: a batch of matrices
    out_dim: int = 0  # the outputs' dimension, of the two that the matrix has
    blocks: str = ""  # for the group's name
    split_sizes: tuple[int, ...] | None = None  # along out_dim

    def options(self) -> dict[str, Any]:
        """The options that differ from those of a plain 2-D weight of shape (out, in)."""
        options: dict[str, Any] = {}
        if self.flatten is not None:
            options["flatten"] = self.flatten
        if self.out_dim:
            options["out_dim"] = self.out_dim
        if self.split_sizes is not None:
            options["split_sizes"] = self.split_sizes
        return options

    def matrix_shape(self, shape: torch.Size) -> tuple[int, int]:
        """(rows, columns) of the matrix, or of each one of a batch."""
        if self.flatten:
            return shape[0], math.prod(shape[1:])
        return shape[-2], shape[-1]

    def outputs(self, shape: torch.Size) -> int:
        """How many outputs the matrix, or each one of a batch, has."""
        return self.matrix_shape(shape)[self.out_dim]


@dataclass
class Role:
    """What a parameter is in its model."""

    layout: Layout | None  # None: no layer that is known has it as its matrix
    why_other: str  # why it is no hidden matrix; empty if it is one


@dataclass
class _Use:
    """A parameter in one of the places that hold it."""

    path: str
    key: str
    module: nn.Module
    parent: nn.Module | None
    param: Parameter
    layout: Layout | None = None
    why_other: str = ""

    @property
    def place(self) -> str:
        """The path whose words say where in the model it is; an attention's parts share one."""
        if isinstance(self.parent, nn.MultiheadAttention):
            return self.path.rpartition(".")[0]
        return self.path

    @property
    def is_layer(self) -> bool:
        """Whether this is the weight of a layer that may be a model's last."""
        return self.key == "weight" and not isinstance(self.parent, nn.MultiheadAttention)


def find_roles(model: nn.Module, split_fused: bool) -> dict[Parameter, Role]:
    """The role of every parameter; a tied one is a hidden matrix only if it is one in every use."""
    modules = unwrapped_modules(model)
    uses = [
        _Use(path, key, module, modules.get(path.rpartition(".")[0]) if path else None, param)
        for path, module in modules.items()
        for key, param in module._parameters.items()
        if param is not None and not is_lazy(param)
    ]
    for use in uses:
        _classify(use, split_fused)
    outputs = _outputs(uses, modules)

    roles: dict[Parameter, Role] = {}
    for use in uses:
        role = roles.setdefault(use.param, Role(use.layout, use.why_other))
        if use.layout not in (None, role.layout):
            if role.layout is not None and not role.why_other:
                role.why_other = "tied, and laid out differently"
            role.layout = role.layout or use.layout
        role.why_other = role.why_other or use.why_other
        if use.param in outputs:
            role.why_other = "output layer"
    return roles


def can_be_matrix(param: Parameter) -> bool:
    """Whether M3 can orthogonalise a parameter at all."""
    return param.ndim >= 2 and param.is_floating_point()


def _classify(use: _Use, split_fused: bool) -> None:
    """Note what the module's type, and for inputs and routers the names, say of a parameter."""
    if isinstance(use.module, ParametrizationList):
        use.why_other = "computes a weight, by torch.nn.utils.parametrize"
    elif not can_be_matrix(use.param):
        use.why_other = "not real, or not 2-D at least"
    elif (layout := _layout(use)) is None:
        use.why_other = "not the matrix of a known layer"
    else:
        use.layout = layout if split_fused else replace(layout, blocks="", split_sizes=None)
        if isinstance(use.module, _EMBEDDINGS):
            use.why_other = "embedding"
        elif isinstance(use.module, nn.Bilinear):
            use.why_other = "bilinear form"
        elif _is_depthwise(use.module):
            use.why_other = "one small filter per channel"
        elif 1 in use.layout.matrix_shape(use.param.shape):
            use.why_other = "a single row or column"
        elif _is_input(use):
            use.why_other = "input layer"
        elif isinstance(use.module, nn.Linear) and _is_router(use):
            use.why_other = "router"


def _layout(use: _Use) -> Layout | None:
    """How a parameter is laid out, from the type of its module alone."""
    module, key, shape = use.module, use.key, use.param.shape
    if isinstance(module, nn.MultiheadAttention):
        if key == "in_proj_weight":
            return _split(Layout(), "qkv", 3, shape)
        return Layout() if key in ("q_proj_weight", "k_proj_weight", "v_proj_weight") else None
    if isinstance(module, _RECURRENT):
        if key.startswith(("weight_ih", "weight_hh")):  # one block per gate
            return _split(Layout(), "gates", shape[0] // module.hidden_size, shape)
        return Layout() if key.startswith("weight_hr") else None
    if key == "weight":
        if isinstance(module, _EMBEDDINGS):
            return Layout()
        if isinstance(module, nn.Linear) and len(shape) == 2:
            return _linear_layout(use)
        if isinstance(module, _CONVOLUTIONS):
            if module.transposed:  # (in, out / groups, ...)
                return Layout("conv_transposed", flatten=True, out_dim=1)
            return _split(Layout("conv", flatten=True), "grouped", module.groups, shape)
        if isinstance(module, nn.Bilinear):
            return Layout("bilinear", flatten=True)
        if _is_hf_conv1d(module) and len(shape) == 2:  # (in, out)
            layout = Layout("transposed", out_dim=1)
            parts, rest = divmod(shape[1], shape[0])
            fused = use.path.split(".")[-1] == "c_attn" and not rest and parts in (2, 3)
            return _split(layout, "qkv", parts, shape) if fused else layout
    if len(shape) == 3 and _is_experts(module, shape[0]):
        return _experts_layout(module, key, shape)
    return None


def _linear_layout(use: _Use) -> Layout:
    """Fused projections are recognised only where name and owner leave no doubt of their order."""
    parent, shape, word = use.parent, use.param.shape, use.path.split(".")[-1]
    outputs, inputs = shape
    if outputs == 3 * inputs and (
        word in ("qkv", "Wqkv", "to_qkv")
        # GPT-BigCode's interleaves them by head unless its `multi_query` is set.
        or (word == "c_attn" and not hasattr(parent, "multi_query"))
    ):
        return _split(Layout(), "qkv", 3, shape)
    if word == "qkv_proj" and _has_class(parent, *_QKV_PROJ_OWNERS):
        kv = getattr(parent, "num_key_value_heads", 0) * getattr(parent, "head_dim", 0)
        if 0 < 2 * kv < outputs:
            return Layout(blocks="qkv", split_sizes=(outputs - 2 * kv, kv, kv))
    if word == "gate_up_proj":
        down = getattr(parent, "down_proj", None)
        if isinstance(down, nn.Linear) and outputs == 2 * down.in_features:
            return _split(Layout(), "gate_up", 2, shape)
    return Layout()


def _experts_layout(module: nn.Module, key: str, shape: torch.Size) -> Layout:
    """A batch of one matrix per expert: (experts, out, in), or (experts, in, out) if transposed."""
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:  # then a gated pair of projections tells by its shapes, never by both
        up: Any = getattr(getattr(module, "gate_up_proj", None), "shape", ())
        down: Any = getattr(getattr(module, "down_proj", None), "shape", ())
        transposed = len(up) == len(down) == 3 and up[1] == down[2] and up[2] == 2 * down[1]
    layout = Layout("experts", flatten=False)
    if transposed:
        layout = Layout("experts_transposed", flatten=False, out_dim=1)
    # GPT-OSS interleaves gates and ups, which is_concatenated denies; without it nothing is known.
    if key == "gate_up_proj" and getattr(module, "is_concatenated", False) is True:
        return _split(layout, "gate_up", 2, shape)
    return layout


def _split(layout: Layout, blocks: str, parts: int, shape: torch.Size) -> Layout:
    """The layout with this many equal blocks along its outputs."""
    size, rest = divmod(layout.outputs(shape), parts)
    if parts < 2 or rest:
        return layout
    return replace(layout, blocks=blocks, split_sizes=(size,) * parts)


def _is_hf_conv1d(module: nn.Module) -> bool:
    return _has_class(module, "Conv1D") and hasattr(module, "nf")


def _has_class(module: nn.Module | None, *names: str) -> bool:
    return any(cls.__name__ in names for cls in type(module).__mro__)


def _is_depthwise(module: nn.Module) -> bool:
    """Also for grouped transposed convolutions, whose groups no option of M3 tells apart."""
    if not isinstance(module, _CONVOLUTIONS) or module.groups == 1:
        return False
    return module.transposed or 1 in (
        module.in_channels // module.groups,
        module.out_channels // module.groups,
    )


def _is_experts(module: nn.Module, first: int) -> bool:
    return _expert_count(module) == first or any(
        "Experts" in cls.__name__ for cls in type(module).__mro__
    )


def _expert_count(module: nn.Module | None) -> int:
    counts = [getattr(module, name, None) for name in _EXPERT_COUNTS]
    return next((count for count in counts if isinstance(count, int)), 0)


def _is_router(use: _Use) -> bool:
    """Whether a linear layer chooses among experts."""
    parts = use.path.split(".")
    return (
        any(part == "router" or part.endswith("_router") for part in parts)
        or (parts[-1] == "gate" and hasattr(use.parent, "experts"))
        or use.param.shape[0] == _expert_count(use.parent)
    )


def _is_input(use: _Use) -> bool:
    """Whether a layer reads what is fed to the model, as far as can be told."""
    if isinstance(use.module, _FORWARD) and use.module.in_channels <= 3:
        return True  # pixels or samples: no hidden features are that few
    # Some models keep a whole encoder below a name of this kind.
    return _place(use.place)[0] == "embedding" and not _has_block(use.place.split("."))


def _place(path: str) -> tuple[str, int]:
    """What the words of a module's path say: the kind, and how many words follow the one."""
    kind, _, following = place(f"{path}.weight" if path else "weight", _OUTPUT)
    return kind, following - 1


def _has_block(parts: list[str]) -> bool:
    return any(_BLOCK.fullmatch(part.lower()) for part in parts)


def _outputs(uses: list[_Use], modules: dict[str, nn.Module]) -> set[Parameter]:
    """The matrices of output layers: what models declare, what names say, else the last layer."""
    outputs: set[Parameter] = set()
    for module in modules.values():
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            outputs.update(module.parameters())
        declared = getattr(module, "get_output_embeddings", None)
        if callable(declared):
            try:
                head = declared()
            except (AttributeError, NotImplementedError):  # as models without one do
                continue
            if isinstance(head, nn.Module):
                outputs.update(head.parameters())
    matrices = [
        use for use in uses if use.layout is not None and not isinstance(use.module, _EMBEDDINGS)
    ]
    named = {use.param for use in matrices if _is_named_output(use, matrices, modules)}
    if outputs or named:
        return outputs | named
    layers = [use for use in matrices if use.is_layer]
    return {layers[-1].param} if layers and _ends_the_model(layers[-1], modules) else set()


def _is_named_output(use: _Use, matrices: list[_Use], modules: dict[str, nn.Module]) -> bool:
    """Whether a matrix is in a module that is called a head, and not before the end of it."""
    kind, following = _place(use.place)
    parts = use.place.split(".")
    depth = len(parts) - following  # of the module that is called a head
    if kind != "head" or _has_block(parts[: depth - 1]):
        return False
    while depth < len(parts) and isinstance(modules[".".join(parts[:depth])], nn.Sequential):
        # Of a Sequential only the last layer counts.
        below = [other.place.split(".") for other in matrices]
        last = [other for other in below if other[:depth] == parts[:depth]][-1]
        if last[depth : depth + 1] != parts[depth : depth + 1]:
            return False
        depth += 1
    return True


def _ends_the_model(use: _Use, modules: dict[str, nn.Module]) -> bool:
    """Whether a model's last layer, of a name that says nothing, is taken for its output.

    Not so in one of several numbered blocks, as of a transformer without a head; what a Sequential
    or a list of layers numbers is a layer, and may be the last.
    """
    parts = use.path.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    first = next((i for i, part in enumerate(parts) if is_numbered(part)), len(parts))
    return not any(part.startswith("pooler") for part in parts) and all(
        isinstance(modules[path], nn.Sequential) for path in paths[first:-1]
    )
