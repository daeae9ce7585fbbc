"""Param groups for M3: a model's hidden matrices, and everything else."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import Parameter, is_lazy

from .group_options import (
    check_choice,
    check_options,
    is_bias_or_1d,
    listing,
    matcher,
    same,
    why_unmatched,
    with_own_lr,
)
from .matrices import Layout, Role, can_be_matrix, find_roles
from .names import FoundParameters, find_parameters

__all__ = ["matrix_groups"]

_OWN_KEYS = ("algorithm", "flatten", "out_dim", "split_sizes")  # what matrix_groups decides


def matrix_groups(
    model: nn.Module,
    *,
    groups: Iterable[Mapping[str, Any]] | None = None,
    matrix: Mapping[str, Any] | None = None,
    other: Mapping[str, Any] | None = None,
    include: str | Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
    exclude: str | Sequence[str] = (),
    split: Mapping[str, int | Sequence[int]] | None = None,
    split_fused: bool = True,
    no_decay_1d: bool = False,
    on_unused: Literal["error", "warn", "ignore"] = "error",
    syntax: Literal["regex", "glob"] = "regex",
    **options: Any,
) -> list[dict[str, Any]]:
    r"""Sort a model's parameters into param groups for M3: hidden matrices, and everything else.

    Hidden matrices get ``algorithm="m3"``; the rest, ``algorithm="adamw"``. A wrong matrix costs
    more than a missing one, so what is not recognised is left to AdamW. Look at the result before
    training: every group lists its parameters by name, and ``describe(optimizer, model)`` counts
    them.

    **Matrices** are, by the type of the module that holds them:

    - the weight of an ``nn.Linear`` (subclasses and LoRA's included);
    - of a Hugging Face ``Conv1D``, which is (in, out): ``out_dim=1``;
    - of a convolution: ``flatten=True``, so (out, in * kernel). A transposed one is stored the
      other way round: (in, out * kernel), with ``out_dim=1`` too;
    - of ``nn.MultiheadAttention`` (its input projections), ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and
      their cells;
    - the 3-D parameters of fused experts, a batch of matrices: ``flatten=False``. Those are modules
      with a count of experts (``num_experts`` or the like) that is the first dimension, or with
      "Experts" in the name of their class. Where they are (experts, in, out), which the module says
      (``is_transposed``) or the shapes of ``gate_up_proj`` and ``down_proj`` show: ``out_dim=1``.

    ``out_dim`` counts the two dimensions of the matrix that M3 sees, after flattening.

    **Not hidden**, so everything else, are:

    - parameters of fewer than two dimensions, and complex ones;
    - matrices of one row or one column, and depthwise convolutions: vectors, not maps;
    - grouped transposed convolutions, whose groups are not blocks along an output dimension;
    - ``nn.Embedding`` and ``nn.EmbeddingBag``, and all that is tied to one;
    - **input layers**: convolutions of at most three input channels (pixels, samples), and layers
      outside of the numbered layers whose name :func:`infer_param_depth` places at the input
      (``patch_embed``, ``stem``, ``conv1``, ``input_proj``, ...), unless they are parts of an
      attention or MLP module. Another first layer, as of an MLP, cannot be told from a hidden one:
      it *is* sorted among the matrices unless it is excluded;
    - **output layers**: first, what ``get_output_embeddings()`` of any module returns, and all of
      ``nn.AdaptiveLogSoftmaxWithLoss``; second, modules outside of the numbered layers and of
      attention and MLP modules whose name :func:`infer_param_depth` places at the output
      (``lm_head``, ``classifier``, ``fc``, ``score``, ...), or is one of ``logits``, ``predictor``,
      ``text_projection``, ``final_layer``, ``conv_out`` and the like. Such a module is the head as
      a whole (BERT's ``cls.predictions.transform`` too), but of an ``nn.Sequential`` only the last
      layer; a ``pooler`` is hidden. Third, where neither finds one, the last layer in the model's
      order is taken for the output, unless it is in a numbered block of several modules, as in a
      transformer without a head: of an MLP the last ``nn.Linear``;
    - **routers** of mixtures of experts, classifiers over experts: an ``nn.Linear`` below a module
      called ``router``, one called ``gate`` beside ``experts``, or one with as many outputs as its
      parent counts experts;
    - what a parametrization (``torch.nn.utils.parametrize``) computes a weight from;
    - ``nn.Bilinear``'s weight, and parameters that are no known layer's matrix: tokens, tables,
      routers' own, hand-written layers. ``include`` adds those that are matrices.

    A tied parameter is a hidden matrix only if it is one in all its places.

    **Fused projections** hold several matrices, orthogonalised on their own: ``split_sizes``, along
    ``out_dim``. Recognised are, where name and shape or owner leave no doubt of the order: the
    input projection of ``nn.MultiheadAttention``; an ``nn.Linear`` of three times as many outputs
    as inputs called ``qkv``, ``Wqkv``, ``to_qkv`` or (nanoGPT) ``c_attn``; GPT-2's ``c_attn``, in
    cross attention too; Phi-3's ``qkv_proj``; ``gate_up_proj`` beside its ``down_proj``, and that
    of experts that are marked ``is_concatenated``; gates of recurrent layers; groups of a grouped
    convolution. All others stay whole, for example ``query_key_value``, whose heads GPT-NeoX
    interleaves: give it one block per head and role, ``split={"query_key_value": 3 * heads}``.
    ``num_heads``, by which M3 splits blocks further, is never set.

    Args:
        model: the module that is trained. Its wrappers (``torch.compile``, data parallelism,
            activation checkpointing, ``fully_shard``) make no difference.
        groups: param groups of this model, as :func:`build_param_groups` and :func:`depth_groups`
            return them, holding each trainable parameter once. Each is cut in two or more, named
            ``"<name>/matrices"``, ``"<name>/other"`` and so on, which keep its options. Without,
            there is one such group, of no name.
        matrix: options of the groups of matrices, e.g. ``{"lr": 0.02}``.
        other: options of the other groups. Here and in ``matrix``, ``lr_mult`` multiplies the lr
            that ``groups`` or ``options`` set.
        include: patterns of parameters that shall be matrices. With a dict, its values are how M3
            shall see them, ``{"flatten": ..., "out_dim": ..., "split_sizes": ...}``, each optional,
            instead of what the module's type says. ``flatten`` must be given for what has three
            dimensions or more and is no layer's weight.
        exclude: patterns of parameters that shall be no matrices.
        split: by pattern, the sizes of the blocks along ``out_dim``, or the number of equal blocks
            (1: keep it whole). The first pattern that matches counts, and goes before what is
            recognised.
        split_fused: whether to split what is recognised as fused. It is the default because the
            parts are maps of their own: orthogonalised as one they share a spectral norm, of which
            the part with the largest gradients takes most.
        no_decay_1d: of the others, parameters of at most one dimension, and biases, get weight
            decay 0, in a group ``"other_no_decay"``.
        on_unused: what to do about a pattern that matches nothing it could be for.
        syntax: of all patterns, as in :func:`build_param_groups`: ``"regex"`` or ``"glob"``.
        options: options of all groups, e.g. ``lr=1e-3``. A group's own, and those of ``matrix`` and
            ``other``, go before them. Where a group and ``matrix`` or ``other`` set one option to
            different values, that is an error: neither is more to the point.

    Returns:
        For each group of ``groups``: its groups of matrices, in the order of their first
        parameters, then the others. ``"params"`` is a list of ``(name, parameter)`` tuples in the
        group's order, names without wrappers' prefixes; every group has a ``"name"`` of its own:
        ``"matrices"``, with ``_conv``, ``_conv_transposed``, ``_transposed`` (``Conv1D``),
        ``_experts``, ``_experts_transposed``, ``_bilinear``, or what ``include`` says, ``_flat`` or
        ``_batch``; then ``_qkv``, ``_gate_up``, ``_gates``, ``_grouped`` or ``_split``, and, where
        two groups would have one name, the sizes of their blocks (``_3x64``: three of 64);
        ``"other"``; ``"other_no_decay"``. A tensor lr is copied for each. The model and the
        caller's dicts are not changed. A model without any hidden matrix gives a warning.

    Raises:
        ValueError: an invalid option or pattern; an unused pattern (with the close matches); a
            pattern of ``include`` that matches vectors or complex parameters; a parameter matched
            by ``include`` and ``exclude``; block sizes that do not sum up; groups that do not hold
            each trainable parameter once; parameters whose shapes are not to be seen, flattened by
            FSDP, partitioned by DeepSpeed's ZeRO-3 or not initialised; no trainable parameter.
        TypeError: ``model`` is not a module, or an argument not of the stated kind.

    Example::

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> for group in matrix_groups(model, matrix={"lr": 0.02}, other={"lr": 1e-3}):
        ...     print(group["name"], group["lr"], [name for name, _ in group["params"]])
        matrices 0.02 ['0.weight', '2.weight']
        other 0.001 ['0.bias', '2.bias', '3.weight', '3.bias']
    """
    check_choice("on_unused", on_unused, ("error", "warn", "ignore"))
    check_choice("syntax", syntax, ("regex", "glob"))
    reserved = (*_OWN_KEYS, "match", "name")
    arguments = ("matrix", "other", "include", "exclude", "split", "split_fused", "no_decay_1d")
    check_options(options, "matrix_groups: ", (*reserved, "lr_mult", *arguments))
    by_kind = {"matrix": _as_dict("matrix", matrix), "other": _as_dict("other", other)}
    for kind, kind_options in by_kind.items():
        check_options(kind_options, f"{kind}: ", reserved)
    patterns = _Patterns(include, exclude, split, syntax)
    found = find_parameters(model)
    _check_shapes_are_known(found)
    parents = _parents(groups, found, reserved)

    roles = find_roles(model, split_fused)
    layouts = patterns.apply(found, roles)
    for message in patterns.unused(found, roles, layouts):
        if on_unused == "error":
            raise ValueError(message)
        if on_unused == "warn":
            warnings.warn(message, stacklevel=2)
    if not layouts:
        warnings.warn(
            "matrix_groups: no trainable parameter is a hidden matrix, so all go to AdamW: name "
            "those that are in include=...",
            stacklevel=2,
        )
    result = []
    for parent in parents:
        sets = {
            kind: _merged(kind, options, parent, kind_options)
            for kind, kind_options in by_kind.items()
        }
        decays = no_decay_1d and not same(sets["other"].get("weight_decay"), 0)
        matrices: dict[Layout, list[tuple[str, Parameter]]] = {}
        others: dict[bool, list[tuple[str, Parameter]]] = {False: [], True: []}
        for name, param in parent.params:
            if name in layouts:
                matrices.setdefault(layouts[name], []).append((name, param))
            else:
                others[decays and is_bias_or_1d(name, param, found)].append((name, param))
        for layout, suffix in _suffixes(list(matrices)).items():
            own = {"algorithm": "m3", **layout.options()}
            result.append(parent.group(matrices[layout], suffix, {**sets["matrix"], **own}))
        for no_decay, params in others.items():
            own = {"algorithm": "adamw", **({"weight_decay": 0.0} if no_decay else {})}
            if params:
                suffix = "other_no_decay" if no_decay else "other"
                result.append(parent.group(params, suffix, {**sets["other"], **own}))
    return result


# ---------------------------------------------------------------- the groups that are cut


@dataclass
class _Parent:
    label: str  # for errors
    name: str | None
    params: list[tuple[str, Parameter]]
    options: dict[str, Any]

    def group(
        self, params: list[tuple[str, Parameter]], suffix: str, options: dict[str, Any]
    ) -> dict[str, Any]:
        name = suffix if self.name is None else f"{self.name}/{suffix}"
        return {"params": params, "name": name, **with_own_lr(options)}


def _parents(
    groups: Iterable[Mapping[str, Any]] | None, found: FoundParameters, reserved: Sequence[str]
) -> list[_Parent]:
    if groups is None:
        return [_Parent("", None, list(found.trainable.items()), {})]
    if isinstance(groups, (Mapping, str)) or not isinstance(groups, Iterable):
        raise TypeError(f"groups must be a list of param groups, but got {type(groups).__name__}")
    names = {param: name for name, param in found.trainable.items()}
    parents: list[_Parent] = []
    owners: dict[str, str] = {}
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise TypeError(f"groups[{i}] must be a dict with a list of 'params'")
        name = group.get("name", f"group{i}")
        label = f"groups[{i}] ({name!r}): "
        if any(name == parent.name for parent in parents):
            raise ValueError(f"{label}there is a group of this name already: rename one")
        options = {key: value for key, value in group.items() if key not in ("params", "name")}
        check_options(options, label, reserved)
        params = []
        for entry in group["params"]:
            param = entry[1] if isinstance(entry, (tuple, list)) else entry
            if param not in names:
                given = entry[0] if isinstance(entry, (tuple, list)) else "one of its parameters"
                raise ValueError(f"{label}{given} is not a trainable parameter of this model")
            if names[param] in owners:
                raise ValueError(f"{label}{names[param]} is in {owners[names[param]]} already")
            owners[names[param]] = f"groups[{i}]"
            params.append((names[param], param))
        parents.append(_Parent(label, name, params, options))
    if missing := [name for name in found.trainable if name not in owners]:
        raise ValueError(
            f"groups lack {listing(missing)}: build them of this model, as it is trained now"
        )
    return parents


def _merged(
    kind: str, common: dict[str, Any], parent: _Parent, kind_options: dict[str, Any]
) -> dict[str, Any]:
    """The options of a group's matrices or others: its own, and those of the kind."""
    merged = {**common, **parent.options}
    for key, value in kind_options.items():
        if key == "lr_mult":
            continue
        if key in parent.options and not same(parent.options[key], value):
            hint = ", or use lr_mult" if key == "lr" else ""
            raise ValueError(
                f"{parent.label}sets {key}={parent.options[key]!r}, and {kind}, {value!r}: leave "
                f"one of them out{hint}"
            )
        merged[key] = value
    if "lr_mult" in kind_options:
        if "lr" in kind_options:
            raise ValueError(f"{kind}: sets both 'lr' and 'lr_mult': keep one of them")
        if "lr" not in merged:
            raise ValueError(f"{kind}: 'lr_mult' needs a learning rate to multiply: pass lr=...")
        merged["lr"] = merged["lr"] * kind_options["lr_mult"]
    return merged


def _suffixes(layouts: list[Layout]) -> dict[Layout, str]:
    """A name for the group of each layout, with the sizes of blocks where it takes them."""
    plain = {layout: _joined("matrices", layout.kind, layout.blocks) for layout in layouts}
    names = list(plain.values())
    return {
        layout: name if names.count(name) == 1 else _joined(name, _sizes(layout))
        for layout, name in plain.items()
    }


def _joined(*parts: str) -> str:
    return "_".join(filter(None, parts))


def _sizes(layout: Layout) -> str:
    runs = [(size, len(list(run))) for size, run in itertools.groupby(layout.split_sizes or ())]
    return "_".join(f"{count}x{size}" for size, count in runs)


def _check_shapes_are_known(found: FoundParameters) -> None:
    if found.flattened:
        raise ValueError(
            "FSDP has flattened the parameters, so no matrix is left to see: use fully_shard, "
            "which keeps their shapes"
        )
    for name, param in found.trainable.items():
        if hasattr(param, "ds_shape"):
            raise ValueError(
                f"DeepSpeed's ZeRO-3 has partitioned {name!r}, so M3 would not see the matrix: use "
                "fully_shard, which keeps shapes"
            )
        if is_lazy(param):
            raise ValueError(
                f"{name!r} has no shape yet: run one batch through the model first, which "
                "initialises its lazy modules"
            )


def _as_dict(key: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{key} must be a dict of options, but got {value!r}")
    return dict(value or {})


# ---------------------------------------------------------------- patterns


@dataclass
class _Pattern:
    argument: str  # which of include, exclude and split it belongs to
    text: str
    matches: Callable[[str], Any]
    value: Any = None

    @property
    def label(self) -> str:
        return f"{self.argument} {self.text!r}"


class _Patterns:
    """The patterns of ``include``, ``exclude`` and ``split``."""

    def __init__(self, include: Any, exclude: Any, split: Any, syntax: str) -> None:
        if split is not None and not isinstance(split, Mapping):
            raise TypeError(f"split must be a dict of sizes by pattern, but got {split!r}")
        if isinstance(exclude, Mapping):
            raise TypeError("exclude must be a pattern or a list of them, but got a dict")
        self.syntax = syntax
        self.include = _parse("include", include, syntax)
        self.exclude = _parse("exclude", exclude, syntax)
        self.split = _parse("split", split or {}, syntax)
        for pattern in self.include:
            pattern.value = _check_view(pattern.value, pattern.label)
        for pattern in self.split:
            pattern.value = _check_sizes(pattern.value, pattern.label)
        self.splits_used: set[str] = set()

    def apply(self, found: FoundParameters, roles: dict[Parameter, Role]) -> dict[str, Layout]:
        """The layouts of the parameters that are to be matrices, by name."""
        layouts = {}
        for name, param in found.trainable.items():
            role = _role(param, roles)
            excluded = next((p for p in self.exclude if p.matches(name)), None)
            included = next((p for p in self.include if p.matches(name)), None)
            if included and excluded:
                raise ValueError(f"{name} matches both {included.label} and {excluded.label}")
            if excluded or (role.why_other and not included):
                continue
            layout = role.layout or Layout()
            if included:
                layout = _viewed(included, name, param, role)
            if split := next((p for p in self.split if p.matches(name)), None):
                self.splits_used.add(split.text)
                layout = _with_blocks(layout, split.value, name, param, split.label)
            layouts[name] = layout
        return layouts

    def unused(
        self, found: FoundParameters, roles: dict[Parameter, Role], layouts: dict[str, Layout]
    ) -> Iterable[str]:
        """What to say of each pattern that changes nothing, nor could."""
        for pattern in (*self.include, *self.exclude, *self.split):
            matched = [name for name in found.trainable if pattern.matches(name)]
            if not matched:
                yield why_unmatched(
                    pattern.label, [pattern.text], pattern.matches, found, self.syntax
                )
            elif pattern.argument != "split" or pattern.text in self.splits_used:
                continue
            elif taken := [name for name in matched if name in layouts]:
                yield (
                    f"{pattern.label}: all that it matches was taken by patterns before it: "
                    f"{listing(taken)}"
                )
            else:
                reasons = [
                    f"{name} ({_role(found.trainable[name], roles).why_other or 'excluded'})"
                    for name in matched
                ]
                yield (
                    f"{pattern.label}: matches only what is not among the matrices: "
                    f"{listing(reasons)}. Name it in include too, or remove the pattern"
                )


def _role(param: Parameter, roles: dict[Parameter, Role]) -> Role:
    return roles.get(param) or Role(None, "in no module")  # as of an own named_parameters()


def _parse(argument: str, value: Any, syntax: str) -> list[_Pattern]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Iterable):
        raise TypeError(f"{argument} must be a pattern or a list of them, but got {value!r}")
    values = dict(value) if isinstance(value, Mapping) else dict.fromkeys(value)
    for text in values:
        if not (isinstance(text, str) and text):
            raise ValueError(f"{argument}: a pattern must be a non-empty string, but is {text!r}")
    return [
        _Pattern(argument, text, matcher(text, syntax, argument), values[text]) for text in values
    ]


def _check_view(value: Any, label: str) -> dict[str, Any]:
    """How ``include`` says that M3 shall see a parameter, in its final types."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(
            f"{label}: must be given a dict, such as {{'flatten': True}}, not {value!r}"
        )
    view = dict(value or {})
    if unknown := [key for key in view if key not in ("flatten", "out_dim", "split_sizes")]:
        raise ValueError(
            f"{label}: unknown option {unknown[0]!r}: only 'flatten', 'out_dim' and 'split_sizes' "
            "can be set here"
        )
    if "flatten" in view and not isinstance(view["flatten"], bool):
        raise ValueError(f"{label}: flatten must be True or False, but is {view['flatten']!r}")
    if "out_dim" in view and (isinstance(view["out_dim"], bool) or view["out_dim"] not in (0, 1)):
        raise ValueError(f"{label}: out_dim must be 0 or 1, but is {view['out_dim']!r}")
    if "split_sizes" in view:
        view["split_sizes"] = _check_sizes(view["split_sizes"], label)
    return view


def _check_sizes(value: Any, label: str) -> int | tuple[int, ...]:
    sizes = [value] if isinstance(value, int) else value
    if (
        not isinstance(sizes, (list, tuple))
        or not sizes
        or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes)
    ):
        raise ValueError(
            f"{label}: the blocks must be a tuple of sizes or a number of equal blocks, all "
            f"integers >= 1, but are {value!r}"
        )
    return value if isinstance(value, int) else tuple(sizes)


def _viewed(pattern: _Pattern, name: str, param: Parameter, role: Role) -> Layout:
    """The layout of an included parameter: by its module's type, as far as no option says more."""
    if not can_be_matrix(param):
        raise ValueError(
            f"{pattern.label}: {name} of shape {tuple(param.shape)} and dtype {param.dtype} is no "
            "matrix: narrow the pattern"
        )
    base, view = role.layout or Layout(), pattern.value
    layout = replace(
        base,
        flatten=view.get("flatten", base.flatten),
        out_dim=view.get("out_dim", base.out_dim),
    )
    if layout != base:
        many = {None: "", True: "flat", False: "batch"}[layout.flatten]
        kind = _joined(many, "transposed" * layout.out_dim)
        layout = replace(layout, kind=kind, blocks="", split_sizes=None)
    if param.ndim > 2 and layout.flatten is None:
        raise ValueError(
            f"{pattern.label}: say how {name} of shape {tuple(param.shape)} is a matrix: "
            f"include={{{pattern.text!r}: {{'flatten': True}}}} for (d0, d1 * d2 * ...), False for "
            "a batch of matrices"
        )
    if param.ndim == 2 and layout.flatten is False:
        raise ValueError(f"{pattern.label}: {name} is 2-D, so no batch of matrices: drop flatten")
    if "split_sizes" in view:
        layout = _with_blocks(layout, view["split_sizes"], name, param, pattern.label)
    return layout


def _with_blocks(
    layout: Layout, sizes: int | tuple[int, ...], name: str, param: Parameter, label: str
) -> Layout:
    outputs = layout.outputs(param.shape)
    if isinstance(sizes, int):
        if outputs % sizes:
            raise ValueError(f"{label}: {name} has {outputs} outputs, not a multiple of {sizes}")
        sizes = (outputs // sizes,) * sizes
    if sum(sizes) != outputs:
        raise ValueError(f"{label}: {sizes} sum to {sum(sizes)}, but {name} has {outputs} outputs")
    if len(sizes) == 1:
        return replace(layout, blocks="", split_sizes=None)
    return replace(layout, blocks="split", split_sizes=sizes)
