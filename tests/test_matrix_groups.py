"""Groups for M3: patterns, options, groups that are cut, wrappers, errors."""

from __future__ import annotations

import copy
import doctest
import importlib
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from nested_optim import NestedOptimizer, build_param_groups, depth_groups, matrix_groups
from nested_optim.names import find_parameters

from .matrix_helpers import (
    CONV,
    WHOLE,
    Conv1D,
    Holder,
    layouts,
    matrices,
    mlp,
    names_by_group,
    options,
    with_head,
)

# ---------------------------------------------------------------- include and exclude


def test_exclude_makes_matrices_into_others():
    assert matrices(mlp(), exclude=r"^0\.") == ["2.weight"]
    assert matrices(mlp(), exclude=[r"^0\.", "4"]) == ["2.weight"]  # 4 is the head already


def test_include_makes_others_into_matrices_laid_out_as_their_type_says():
    model = with_head(
        table=nn.Embedding(8, 4),
        form=nn.Bilinear(4, 4, 8),
        mine=Holder(w=(4, 8)),
        a=nn.Linear(8, 8),
    )
    assert layouts(
        matrix_groups(model, include=["table", "form.weight", "mine", "head.weight"])
    ) == {
        "table.weight": WHOLE,
        "form.weight": ("matrices_bilinear", CONV),
        "mine.w": WHOLE,
        "a.weight": WHOLE,
        "head.weight": WHOLE,
    }


def test_include_can_say_how_a_parameter_is_a_matrix():
    model = with_head(mine=Holder(a=(4, 8), b=(2, 4, 8), c=(2, 4, 8)), conv=nn.Conv2d(4, 8, 3))
    include = {
        r"mine\.a": {"out_dim": 1, "split_sizes": 2},
        r"mine\.b": {"flatten": False},
        r"mine\.c": {"flatten": True},
        "conv.weight": None,
    }
    before = copy.deepcopy(include)
    assert layouts(matrix_groups(model, include=include)) == {
        "mine.a": ("matrices_transposed_split", {"out_dim": 1, "split_sizes": (4, 4)}),
        "mine.b": ("matrices_batch", {"flatten": False}),
        "mine.c": ("matrices_flat", {"flatten": True}),
        "conv.weight": ("matrices_conv", CONV),
    }
    assert include == before


def test_globs_match_the_whole_name():
    assert matrices(mlp(), exclude="0.*", syntax="glob") == ["2.weight"]
    assert matrices(mlp(), include="*4.weight", syntax="glob") == [
        "0.weight",
        "2.weight",
        "4.weight",
    ]


# ---------------------------------------------------------------- options


def test_matrix_and_other_go_before_the_options_of_all_groups():
    groups = matrix_groups(
        mlp(), lr=1.0, weight_decay=0.1, matrix={"lr": 2.0, "alpha": 3}, other={"eps": 1e-9}
    )
    assert [options(g) for g in groups] == [
        {"lr": 2.0, "weight_decay": 0.1, "alpha": 3},
        {"lr": 1.0, "weight_decay": 0.1, "eps": 1e-9},
    ]


def test_lr_mult_multiplies_the_lr_of_all_groups():
    groups = matrix_groups(mlp(), lr=0.5, matrix={"lr_mult": 4}, other={"lr_mult": 0.5})
    assert [options(g) for g in groups] == [{"lr": 2.0}, {"lr": 0.25}]


def test_no_decay_1d_exempts_vectors_and_biases_but_no_matrices():
    model = with_head(a=nn.Linear(8, 8), mine=Holder(down_bias=(4, 8), token=(1, 1, 8)))
    groups = matrix_groups(model, weight_decay=0.1, no_decay_1d=True)
    assert [
        (*entry, g["weight_decay"]) for g, entry in zip(groups, names_by_group(groups).items())
    ] == [
        ("matrices", ["a.weight"], 0.1),
        ("other", ["mine.token", "head.weight"], 0.1),
        ("other_no_decay", ["a.bias", "mine.down_bias", "head.bias"], 0.0),
    ]


def test_no_decay_1d_splits_nothing_where_nothing_decays():
    groups = matrix_groups(mlp(), weight_decay=0.1, other={"weight_decay": 0}, no_decay_1d=True)
    assert list(names_by_group(groups)) == ["matrices", "other"]


def test_a_tensor_lr_is_copied_for_each_group():
    lr = torch.tensor(0.5)
    groups = matrix_groups(mlp(), lr=lr, matrix={"lr_mult": 2})
    groups[1]["lr"].fill_(7.0)
    assert (groups[0]["lr"].item(), lr.item()) == (1.0, 0.5)


def test_nothing_of_the_caller_s_is_changed():
    model = mlp()
    arguments = {
        "matrix": {"lr_mult": 2.0},
        "other": {"eps": 1e-9},
        "include": ["^4.weight"],
        "exclude": ["^0"],
        "split": {"^4": [1, 1]},
        "groups": depth_groups(model, (1, 10), lr=1e-3),
    }
    before = {key: copy.copy(value) for key, value in arguments.items()}
    before["groups"] = [dict(g, params=list(g["params"])) for g in arguments["groups"]]
    state = {name: p.clone() for name, p in model.state_dict().items()}
    torch.optim.AdamW(matrix_groups(model, no_decay_1d=True, weight_decay=0.1, **arguments))
    for key, value in before.items():
        if key != "groups":
            assert arguments[key] == value
    for group, old in zip(arguments["groups"], before["groups"], strict=True):
        assert group.keys() == old.keys()
        assert all(a[1] is b[1] for a, b in zip(group["params"], old["params"], strict=True))
        assert {k: group[k] for k in group if k != "params"} == {
            k: old[k] for k in old if k != "params"
        }
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, NestedOptimizer])
def test_optimizers_take_the_groups(optimizer_class):
    model = with_head(conv=nn.Conv2d(2, 4, 3), attn=nn.MultiheadAttention(8, 2))
    groups = matrix_groups(model, groups=depth_groups(model, (2,)), lr=1e-2, no_decay_1d=True)
    given = [(g["name"], [n for n, _ in g["params"]], g.get("split_sizes")) for g in groups]
    optimizer = optimizer_class(groups)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    saved = optimizer.state_dict()["param_groups"]
    assert [(g["name"], g["param_names"], g.get("split_sizes")) for g in saved] == given


# ---------------------------------------------------------------- groups that are cut


def test_groups_are_cut_into_matrices_and_others_that_keep_their_options():
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    rules = [{"match": r"^[01]\.", "frequency": 10, "lr": 0.5, "name": "slow"}, {"match": "^4"}]
    groups = build_param_groups(model, rules, defaults={"lr": 1.0})
    cut = matrix_groups(model, groups=groups, eps=1e-9, lr=7.0)
    assert names_by_group(cut) == {
        "slow/matrices": ["0.weight"],
        "slow/matrices_conv": ["1.weight"],
        "slow/other": ["0.bias", "1.bias"],
        "rule1/other": ["4.weight", "4.bias"],
        "default/matrices": ["2.weight", "3.weight"],
        "default/other": ["2.bias", "3.bias"],
    }
    slow = {"eps": 1e-9, "lr": 0.5, "frequency": 10}  # its own lr, not that of all groups
    assert [options(g) for g in cut] == [slow] * 3 + [{"eps": 1e-9, "lr": 1.0}] * 3


def test_groups_by_depth_keep_their_frequencies():
    model = mlp()
    cut = matrix_groups(model, groups=depth_groups(model, (1, 10, 100)), matrix={"lr": 0.02})
    assert [(g["name"], g["algorithm"], g["frequency"], g.get("lr")) for g in cut] == [
        ("depth0/matrices", "m3", 100, 0.02),
        ("depth0/other", "adamw", 100, None),
        ("depth1/matrices", "m3", 10, 0.02),
        ("depth1/other", "adamw", 10, None),
        ("depth2/other", "adamw", 1, None),
    ]


def test_lr_mult_multiplies_the_lr_of_each_group_that_is_cut():
    model = mlp()
    groups = build_param_groups(model, [], defaults={"lr": 1.0}, layer_decay=0.5)
    cut = matrix_groups(model, groups=groups, matrix={"lr_mult": 8})
    assert [(g["name"], g["lr"]) for g in cut] == [
        ("default_layer1/matrices", 1.0),
        ("default_layer1/other", 0.125),
        ("default_layer2/matrices", 2.0),
        ("default_layer2/other", 0.25),
        ("default_layer3/other", 0.5),
    ]


def test_no_decay_1d_of_the_groups_that_are_cut_is_kept():
    model = mlp()
    groups = build_param_groups(model, [], defaults={"weight_decay": 0.1}, no_decay_1d=True)
    cut = matrix_groups(model, groups=groups, no_decay_1d=True)
    assert [(g["name"], g["weight_decay"]) for g in cut] == [
        ("default/matrices", 0.1),
        ("default/other", 0.1),
        ("default_no_decay/other", 0.0),
    ]


def test_groups_may_hold_bare_parameters_and_have_no_name():
    model = mlp()
    cut = matrix_groups(model, groups=[{"params": list(model.parameters()), "lr": 0.5}])
    assert {g["name"]: g["lr"] for g in cut} == {"group0/matrices": 0.5, "group0/other": 0.5}
    assert names_by_group(cut)["group0/matrices"] == ["0.weight", "2.weight"]


def test_an_option_that_group_and_kind_set_alike_is_no_conflict():
    model = mlp()
    groups = depth_groups(model, (1,), lr=0.5, betas=(0.9, 0.95))
    cut = matrix_groups(model, groups=groups, matrix={"lr": 0.5, "betas": (0.9, 0.95)})
    assert [g["lr"] for g in cut] == [0.5, 0.5]


# ---------------------------------------------------------------- wrappers and shapes


def compiled_parts(model):
    for i in (0, 2, 4):
        model[i] = torch.compile(model[i])
    return model


def checkpointed_parts(model):
    for i in (0, 2, 4):
        model[i] = checkpoint_wrapper(model[i])
    return model


WRAPPERS = [
    torch.compile,
    checkpoint_wrapper,
    nn.DataParallel,
    compiled_parts,
    checkpointed_parts,
    copy.deepcopy,
    lambda model: torch.compile(nn.DataParallel(checkpointed_parts(model))),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_make_no_difference(wrap):
    def build():
        model = mlp()
        model[2] = Holder(qkv=nn.Linear(8, 24), moe=Holder(gate=nn.Linear(8, 4), experts=mlp()))
        return model

    plain, wrapped = build(), wrap(build())
    if wrap in (compiled_parts, checkpointed_parts):  # and one level further down
        inner = wrapped[2]._orig_mod if wrap is compiled_parts else wrapped[2]
        inner = getattr(inner, "_checkpoint_wrapped_module", inner)
        inner.qkv = torch.compile(inner.qkv)
        inner.moe.gate = checkpoint_wrapper(inner.moe.gate)
    groups = matrix_groups(wrapped)
    assert names_by_group(groups) == names_by_group(matrix_groups(plain))
    assert layouts(groups) == layouts(matrix_groups(plain))
    held = [param for group in groups for _, param in group["params"]]
    assert set(held) == set(wrapped.parameters())


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fully_shard_and_distributed_data_parallel_make_no_difference(process_group):
    expected = names_by_group(matrix_groups(mlp()))
    assert names_by_group(matrix_groups(fully_shard(mlp()))) == expected
    wrapped = nn.parallel.DistributedDataParallel(mlp())
    assert names_by_group(matrix_groups(wrapped)) == expected


def test_parameters_on_the_meta_device_have_shapes():
    with torch.device("meta"):
        model = mlp()
    assert names_by_group(matrix_groups(model)) == names_by_group(matrix_groups(mlp()))


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_what_fsdp_has_flattened_is_refused(process_group, use_orig_params):
    model = FullyShardedDataParallel(
        mlp(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    with pytest.raises(ValueError, match=r"flattened.*use.* fully_shard"):
        matrix_groups(model)


def test_what_deepspeed_has_partitioned_is_refused():
    model = mlp()
    for p in model.parameters():
        p.ds_shape, p.data = p.shape, torch.empty(0)
    with pytest.raises(ValueError, match=r"ZeRO-3 has partitioned '0\.weight'.*use fully_shard"):
        matrix_groups(model)


def test_lazy_modules_are_told_to_run_first():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet: run one batch"):
        matrix_groups(model)
    model(torch.randn(3, 8))
    assert matrices(model) == ["0.weight", "1.weight"]


def test_frozen_parameters_are_left_out_but_a_frozen_head_is_still_the_head():
    model = mlp()
    model[4].requires_grad_(False)
    model[0].requires_grad_(False)
    assert names_by_group(matrix_groups(model)) == {"matrices": ["2.weight"], "other": ["2.bias"]}


def test_a_model_without_hidden_matrices_is_a_warning():
    with pytest.warns(UserWarning, match="no trainable parameter is a hidden matrix") as caught:
        groups = matrix_groups(nn.Linear(4, 8))
    assert caught[0].filename == __file__
    assert names_by_group(groups) == {"other": ["weight", "bias"]}


# ---------------------------------------------------------------- errors


def qkv():
    return with_head(
        block=Holder(qkv=nn.Linear(8, 24), mine=Holder(w=(2, 4, 8)), b=nn.Linear(8, 8)),
        old=nn.Linear(8, 8).requires_grad_(False),
        table=nn.Embedding(2, 8),
    )


NAMES = r"block\.qkv\.weight, block\.qkv\.bias"
BAD = [
    # patterns that match nothing
    ({"exclude": "blokc"}, r"exclude 'blokc': matches no parameter\. Did you mean block"),
    ({"exclude": ["block", "zzzz"]}, rf"exclude 'zzzz': matches no .*The names are {NAMES}"),
    ({"include": {"zzzz": {"out_dim": 1}}}, r"include 'zzzz': matches no parameter"),
    ({"split": {"zzzz": 3}}, r"split 'zzzz': matches no parameter"),
    ({"exclude": "^old"}, r"exclude '\^old': matches only frozen parameters: old\.weight, old\.b"),
    ({"include": "qkv", "syntax": "glob"}, r"include 'qkv': .*did you mean '\*qkv\*'"),
    (
        {"split": {"bias": 2}},
        r"split 'bias': matches only what is not .*block\.qkv\.bias \(not real",
    ),
    ({"split": {"table": 2}}, r"split 'table': .*table\.weight \(embedding\)\. Name it in include"),
    ({"split": {"qkv": 3}, "exclude": "qkv"}, r"split 'qkv': .*block\.qkv\.weight \(excluded\)"),
    (
        {"split": {"qkv": 3, "k": 1, "v.w": 3}},
        r"split 'v\.w': all .* taken by patterns before it: bl",
    ),
    # patterns that match what they must not
    (
        {"include": "qkv", "exclude": "v.w"},
        r"block\.qkv\.weight matches both include 'qkv' and excl",
    ),
    (
        {"include": "qkv"},
        r"include 'qkv': block\.qkv\.bias of shape \(24,\) and .* is no matrix: na",
    ),
    (
        {"include": "mine"},
        r"include 'mine': say how block\.mine\.w of shape \(2, 4, 8\) is a matrix",
    ),
    ({"include": {"b.w": {"flatten": False}}}, r"include 'b\.w': block\.b\.weight is 2-D, so no b"),
    # patterns that are none
    ({"include": ""}, r"include: a pattern must be a non-empty string, but is ''"),
    ({"exclude": [3]}, r"exclude: a pattern must be a non-empty string, but is 3"),
    ({"exclude": "*.w"}, r"exclude: '\*\.w' is not a valid regular expression.*syntax='glob'"),
    ({"exclude": 3}, r"exclude must be a pattern or a list of them, but got 3"),
    ({"exclude": {"qkv": 3}}, r"exclude must be a pattern or a list of them, but got a dict"),
    ({"include": {"b.w": 3}}, r"include 'b\.w': must be given a dict.*not 3"),
    (
        {"include": {"b.w": {"flat": True}}},
        r"include 'b\.w': unknown option 'flat': only 'flatten'",
    ),
    (
        {"include": {"b.w": {"flatten": 1}}},
        r"include 'b\.w': flatten must be True or False, but is 1",
    ),
    ({"include": {"b.w": {"out_dim": 2}}}, r"include 'b\.w': out_dim must be 0 or 1, but is 2"),
    ({"include": {"b.w": {"out_dim": True}}}, r"out_dim must be 0 or 1, but is True"),
    ({"include": {"b.w": {"split_sizes": ()}}}, r"include 'b\.w': the blocks must be a tuple"),
    (
        {"include": {"b.w": {"split_sizes": (4, 5)}}},
        r"\(4, 5\) sum to 9, but block\.b\.weight has 8",
    ),
    # sizes
    (
        {"split": {"qkv": (8, 8)}},
        r"split 'qkv': \(8, 8\) sum to 16, but block\.qkv\.weight has 24 out",
    ),
    ({"split": {"qkv": 5}}, r"split 'qkv': block\.qkv\.weight has 24 outputs, not a multiple of 5"),
    (
        {"split": {"qkv": 0}},
        r"split 'qkv': the blocks must be a tuple of sizes or a number .* are 0",
    ),
    ({"split": {"qkv": True}}, r"split 'qkv': the blocks must be .* are True"),
    ({"split": {"qkv": (24.0,)}}, r"split 'qkv': the blocks must be .* are \(24\.0,\)"),
    ({"split": {"qkv": "8"}}, r"split 'qkv': the blocks must be .* are '8'"),
    ({"split": "qkv"}, r"split must be a dict of sizes by pattern, but got 'qkv'"),
    # options
    ({"matrix": 3}, r"matrix must be a dict of options, but got 3"),
    ({"matrix": {"lr": -1}}, r"matrix: lr must be finite and not negative"),
    ({"other": {"frequency": 0}}, r"other: Invalid frequency: 0"),
    ({"other": {"frequnecy": 1}}, r"other: unknown option 'frequnecy'.*'frequency'"),
    ({"matrix": {"flatten": True}}, r"matrix: 'flatten' cannot be set here"),
    ({"other": {"algorithm": "m3"}}, r"other: 'algorithm' cannot be set here"),
    ({"matrix": {"name": "x"}}, r"matrix: 'name' cannot be set here"),
    ({"matrix": {"lr_mult": 2}}, r"matrix: 'lr_mult' needs a learning rate to multiply"),
    ({"matrix": {"lr_mult": 2, "lr": 1.0}}, r"matrix: sets both 'lr' and 'lr_mult'"),
    ({"split_sizes": (8,)}, r"matrix_groups: 'split_sizes' cannot be set here"),
    ({"lr_mult": 2}, r"matrix_groups: 'lr_mult' cannot be set here"),
    ({"lr": "1e-4"}, r"matrix_groups: lr must be a number.*YAML"),
    ({"exlude": "qkv"}, r"matrix_groups: unknown option 'exlude': did you mean 'exclude'"),
    ({"on_unused": "no"}, r"on_unused must be one of 'error', 'warn', 'ignore'"),
    ({"syntax": "re"}, r"syntax must be one of 'regex', 'glob'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=[str(arguments) for arguments, _ in BAD]
)
def test_an_invalid_argument_is_an_error_that_names_it(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        matrix_groups(qkv(), **arguments)


def test_a_pattern_for_a_tied_name_says_which_name_comes_first():
    model = with_head(table=nn.Embedding(2, 8))
    model["head"].weight = model["table"].weight
    with pytest.raises(ValueError, match=r"only head\.weight, tied to table\.weight"):
        matrix_groups(model, exclude="head.weight")


def test_unused_patterns_can_warn_or_pass():
    with pytest.warns(UserWarning, match=r"exclude 'zzzz': matches no parameter") as caught:
        matrix_groups(qkv(), exclude="zzzz", on_unused="warn")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix_groups(qkv(), exclude="zzzz", split={"zzzz": 2}, on_unused="ignore")


def cut_whole(model, **group):
    return [{"params": list(model.named_parameters()), "name": "all", **group}]


GROUPS = [
    (lambda m: "all", r"groups must be a list of param groups, but got str"),
    (lambda m: {"params": []}, r"groups must be a list of param groups, but got dict"),
    (lambda m: [list(m.parameters())], r"groups\[0\] must be a dict with a list of 'params'"),
    (lambda m: [{"params": m.parameters()}], r"groups\[0\] must be a dict with a list of 'params'"),
    (lambda m: cut_whole(m) * 2, r"groups\[1\] \('all'\): there is a group of this name already"),
    (lambda m: [*cut_whole(m), {"params": [m[0].bias]}], r"0\.bias is in groups\[0\] already"),
    (lambda m: [{"params": [m[0].bias] * 2}], r"groups\[0\] .*: 0\.bias is in groups\[0\] already"),
    (lambda m: cut_whole(mlp()), r"groups\[0\] \('all'\): 0\.weight is not a trainable parameter"),
    (
        lambda m: [{"params": [nn.Parameter(torch.ones(1))]}],
        r"one of its parameters is not a train",
    ),
    (
        lambda m: cut_whole(m[:1]),
        r"groups lack 2\.weight, 2\.bias, 4\.weight, 4\.bias: build them of",
    ),
    (lambda m: cut_whole(m, algorithm="m3"), r"groups\[0\] .*: 'algorithm' cannot be set here"),
    (lambda m: matrix_groups(m), r"groups\[0\] \('matrices'\): 'algorithm' cannot be set here"),
    (lambda m: cut_whole(m, frequency=0), r"groups\[0\] \('all'\): Invalid frequency: 0"),
    (
        lambda m: cut_whole(m, lr=2.0),
        r"\('all'\): sets lr=2\.0, and matrix, 1\.0: leave one .*lr_mult",
    ),
    (
        lambda m: cut_whole(m, eps=2.0),
        r"\('all'\): sets eps=2\.0, and other, 1\.0: leave one of them out$",
    ),
]


@pytest.mark.parametrize(("build", "message"), GROUPS, ids=[message[:40] for _, message in GROUPS])
def test_groups_that_cannot_be_cut_are_errors_that_name_them(build, message):
    model = mlp()
    with pytest.raises((ValueError, TypeError), match=message):
        matrix_groups(model, groups=build(model), matrix={"lr": 1.0}, other={"eps": 1.0})


def test_a_model_without_trainable_parameters_is_an_error():
    with pytest.raises(ValueError, match=r"no trainable parameters \(6 frozen ones\)"):
        matrix_groups(mlp().requires_grad_(False))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        matrix_groups(list(mlp().parameters()))


# ---------------------------------------------------------------- in general

PARTS = {
    "linear": lambda: nn.Linear(4, 6),
    "qkv": lambda: nn.ModuleDict({"qkv": nn.Linear(2, 6)}),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "lstm": lambda: nn.LSTM(4, 3),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "table": lambda: nn.Embedding(4, 6),
    "experts": lambda: Holder(w=(3, 4, 6), num_experts=3),
    "free": lambda: Holder(w=(4, 6), token=(1, 1, 6), gain=()),
    "conv1d": lambda: Conv1D(6, 4),
    "nested": mlp,
    "frozen": lambda: nn.Linear(4, 6).requires_grad_(False),
}


@given(
    st.lists(st.sampled_from(list(PARTS)), min_size=1, max_size=6),
    st.sampled_from([nn.Sequential, lambda *parts: nn.ModuleList(parts)]),
    st.lists(st.sampled_from([r"^0\.", r"^1\.", "attn", "in_proj", "ih", "qkv"]), max_size=2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, (1,), (1, 10)]),
)
def test_groups_partition_the_trainable_parameters_in_order(
    parts, container, exclude, split_fused, no_decay_1d, frequencies
):
    model = nn.ModuleDict({"body": container(*(PARTS[part]() for part in parts))})
    model["tail"] = nn.LayerNorm(2)  # so that something is to be trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given_groups = frequencies and depth_groups(model, frequencies)
        arguments = {
            "groups": given_groups,
            "exclude": exclude,
            "split_fused": split_fused,
            "no_decay_1d": no_decay_1d,
            "on_unused": "ignore",
            "weight_decay": 0.1,
        }
        groups = matrix_groups(model, **arguments)
        again = matrix_groups(model, **arguments)
    trainable = find_parameters(model).trainable
    order = list(trainable)
    held = [(name, param) for group in groups for name, param in group["params"]]
    assert sorted(name for name, _ in held) == sorted(order)
    assert all(trainable[name] is param for name, param in held)
    assert names_by_group(again) == names_by_group(groups)
    assert len(names_by_group(groups)) == len(groups)
    for group in groups:
        positions = [order.index(name) for name, _ in group["params"]]
        assert positions == sorted(positions)
        for name, param in group["params"]:
            if group["algorithm"] == "m3":
                assert param.ndim >= 2
                assert not any(re.search(pattern, name) for pattern in exclude)
                if "split_sizes" in group:
                    outputs = param.flatten(1) if group.get("flatten") else param
                    dim = outputs.ndim - 2 + group.get("out_dim", 0)
                    assert sum(group["split_sizes"]) == outputs.shape[dim]


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(importlib.import_module("nested_optim.matrix_groups"))
    assert result.attempted > 0
    assert result.failed == 0
