"""Param groups by rules, by depth and by role."""

from __future__ import annotations

import copy
import doctest
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from nested_optim import param_groups
from nested_optim.param_groups import (
    build_param_groups,
    count_layers,
    depth_groups,
    group_titans_params,
    strip_wrapper_prefixes,
)

from .named_models import GPT, Tree, ViT, mlp


def names_by_group(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def options(group):
    return {key: value for key, value in group.items() if key not in ("params", "name")}


# ---------------------------------------------------------------- rules


def test_first_match_wins_and_the_rest_goes_to_the_default_group():
    groups = build_param_groups(
        GPT(1),
        [
            {"match": "ln_", "frequency": 1, "name": "norms"},
            {"match": [r"\.h\.", "wte"], "frequency": 10, "weight_decay": 0.1, "name": "slow"},
        ],
    )
    assert names_by_group(groups) == {
        "norms": [
            "transformer.h.0.ln_1.weight",
            "transformer.h.0.ln_1.bias",
            "transformer.ln_f.weight",
            "transformer.ln_f.bias",
        ],
        "slow": [
            "transformer.wte.weight",
            "transformer.h.0.attn.weight",
            "transformer.h.0.attn.bias",
            "transformer.h.0.mlp.0.weight",
            "transformer.h.0.mlp.0.bias",
            "transformer.h.0.mlp.2.weight",
            "transformer.h.0.mlp.2.bias",
        ],
        "default": ["transformer.wpe.weight", "lm_head.weight"],
    }
    assert [options(g) for g in groups] == [
        {"frequency": 1},
        {"frequency": 10, "weight_decay": 0.1},
        {},
    ]


def test_groups_come_in_the_order_of_the_rules_not_of_the_model():
    rules = [{"match": name, "name": name} for name in ("4", "0")]
    assert list(names_by_group(build_param_groups(mlp(), rules))) == ["4", "0", "default"]


def test_params_are_name_and_parameter_pairs_of_the_model():
    model = mlp()
    (group,) = build_param_groups(model, [])
    assert group["name"] == "default"
    assert [name for name, _ in group["params"]] == [name for name, _ in model.named_parameters()]
    assert all(a is b for (_, a), b in zip(group["params"], model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("syntax", "pattern", "matched"),
    [
        ("regex", "0", ["0.weight", "0.bias", "10.weight"]),
        ("regex", r"^0\.", ["0.weight", "0.bias"]),
        ("regex", r"weight$", ["0.weight", "10.weight"]),
        ("glob", "*weight", ["0.weight", "10.weight"]),
        ("glob", "0.*", ["0.weight", "0.bias"]),
        ("glob", "?.[bw]*", ["0.weight", "0.bias"]),
    ],
)
def test_regexes_search_and_globs_match_the_whole_name(syntax, pattern, matched):
    model = Tree("0.weight", "0.bias", "10.weight")
    groups = build_param_groups(model, [{"match": pattern, "name": "it"}], syntax=syntax)
    assert names_by_group(groups)["it"] == matched


def test_globs_mind_the_case():
    model = Tree("Head.weight", "head.weight")
    groups = build_param_groups(model, [{"match": "H*", "name": "it"}], syntax="glob")
    assert names_by_group(groups)["it"] == ["Head.weight"]


def test_frozen_parameters_are_left_out():
    model = mlp()
    model[0].requires_grad_(False)
    assert names_by_group(build_param_groups(model, [])) == {
        "default": ["2.weight", "2.bias", "4.weight"]
    }


def test_tied_parameters_are_taken_once_under_their_first_name():
    model = GPT(1, tied=True)
    groups = build_param_groups(model, [{"match": "wte", "frequency": 10, "name": "embedding"}])
    names = names_by_group(groups)
    assert names["embedding"] == ["transformer.wte.weight"]
    assert "lm_head.weight" not in names["default"]


def test_a_module_used_twice_is_taken_once():
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert names_by_group(build_param_groups(model, [])) == {"default": ["a.weight", "a.bias"]}


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = GPT(2, tied=True)
    rules = [{"match": "weight"}, {"match": "mlp", "frequency": 3}, {"match": "attn"}]
    groups = build_param_groups(
        model, rules, defaults={"lr": 1.0}, no_decay_1d=True, layer_decay=0.5
    )
    grouped = [param for group in groups for _, param in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())


# ---------------------------------------------------------------- merging and names


@pytest.mark.parametrize("name", [{}, {"name": "slow"}], ids=["unnamed", "named"])
def test_rules_with_equal_options_share_a_group_in_the_model_s_order(name):
    rules = [
        {"match": "^4", "frequency": 10, "betas": (0.9, 0.95), **name},
        {"match": "^2", "frequency": 2},
        {"match": "^0", "frequency": 10, "betas": (0.9, 0.95), **name},
    ]
    first = name.get("name", "rule0")
    assert names_by_group(build_param_groups(mlp(), rules)) == {
        first: ["0.weight", "0.bias", "4.weight"],
        "rule1": ["2.weight", "2.bias"],
    }


def test_lr_mult_and_the_lr_that_it_comes_to_are_equal_options():
    rules = [{"match": "^0", "lr_mult": 0.5, "name": "x"}, {"match": "^2", "lr": 0.25, "name": "x"}]
    groups = build_param_groups(mlp(), rules, defaults={"lr": 0.5})
    assert list(names_by_group(groups)) == ["x", "default"]


def test_equal_options_under_different_names_stay_apart():
    rules = [{"match": "^0", "name": "a"}, {"match": "^2", "name": "b"}]
    assert list(names_by_group(build_param_groups(mlp(), rules))) == ["a", "b", "default"]


def test_a_rule_may_share_the_default_group():
    rules = [{"match": "^4", "name": "default"}]
    (group,) = build_param_groups(mlp(), rules)
    assert [name for name, _ in group["params"]] == [n for n, _ in mlp().named_parameters()]


def test_one_name_with_different_options_is_refused():
    rules = [
        {"match": "^0", "frequency": 2, "name": "slow"},
        {"match": "^2", "frequency": 3, "name": "slow"},
    ]
    with pytest.raises(ValueError, match=r"rule 1 .*rule 0 .*share the name 'slow'.*rename"):
        build_param_groups(mlp(), rules)


def test_a_name_that_collides_with_a_derived_one_is_refused():
    rules = [{"match": "^0", "name": "a"}, {"match": "^2", "name": "a_no_decay"}]
    with pytest.raises(ValueError, match="a group 'a_no_decay' already"):
        build_param_groups(mlp(), rules, no_decay_1d=True)


@given(
    st.lists(
        st.tuples(st.sampled_from(["weight", "bias", "h", "0", "2", "ln", "."]), st.integers(1, 3)),
        max_size=6,
    ),
    st.booleans(),
    st.sampled_from([None, 0.5, 1.0]),
)
def test_groups_partition_the_parameters_under_any_rules(rules, no_decay_1d, layer_decay):
    model = GPT(2)
    groups = build_param_groups(
        model,
        [{"match": f"[{match}]", "frequency": f} for match, f in rules],
        defaults={"lr": 1.0},
        no_decay_1d=no_decay_1d,
        layer_decay=layer_decay,
        on_unused_rule="ignore",
    )
    order = [name for name, _ in model.named_parameters()]
    seen = [name for group in groups for name, _ in group["params"]]
    assert sorted(seen) == sorted(order)
    for group in groups:
        positions = [order.index(name) for name, _ in group["params"]]
        assert positions == sorted(positions)
    assert len({group["name"] for group in groups}) == len(groups)


# ---------------------------------------------------------------- options


def test_defaults_are_options_of_every_group_unless_a_rule_sets_them():
    rules = [{"match": "^0", "lr_mult": 0.1, "name": "a"}, {"match": "^2", "lr": 5.0, "name": "b"}]
    groups = build_param_groups(mlp(), rules, defaults={"lr": 2.0, "weight_decay": 0.3})
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("a", 0.2, 0.3),
        ("b", 5.0, 0.3),
        ("default", 2.0, 0.3),
    ]


def test_other_keys_pass_through():
    rules = [{"match": "^0", "betas": (0.8, 0.9), "lr_scale": 2, "my_option": "x"}]
    group = build_param_groups(mlp(), rules)[0]
    assert options(group) == {"betas": (0.8, 0.9), "lr_scale": 2, "my_option": "x"}


def test_a_tensor_lr_is_multiplied_and_copied_per_group():
    lr = torch.tensor(0.5)
    rules = [{"match": "^0", "lr_mult": 0.5}]
    slow, rest = build_param_groups(mlp(), rules, defaults={"lr": lr})
    assert (slow["lr"].item(), rest["lr"].item()) == (0.25, 0.5)
    rest["lr"].fill_(7.0)
    assert lr.item() == 0.5


def test_rules_with_equal_tensor_lrs_share_a_group():
    rules = [{"match": "^0", "lr_mult": 0.5}, {"match": "^2", "lr_mult": 0.5}]
    groups = build_param_groups(mlp(), rules, defaults={"lr": torch.tensor(1.0)})
    assert list(names_by_group(groups)) == ["rule0", "default"]


def test_rules_and_defaults_are_not_changed():
    rules = [{"match": ["^0", "^2"], "lr_mult": 0.5, "frequency": 3}, {"match": "^4"}]
    defaults = {"lr": 1e-3, "weight_decay": 0.1}
    before = copy.deepcopy((rules, defaults))
    groups = build_param_groups(mlp(), rules, defaults=defaults, no_decay_1d=True, layer_decay=0.5)
    torch.optim.AdamW(groups)
    assert (rules, defaults) == before


def test_no_decay_1d_exempts_vectors_scalars_and_biases_whatever_the_rule_says():
    model = Tree("a.weight", "a.bias", "b.weight")
    model.gain = nn.Parameter(torch.zeros(()))
    model.a.norm = nn.LayerNorm(2, bias=False)
    rules = [{"match": r"^a\.", "weight_decay": 0.1, "name": "a"}]
    groups = build_param_groups(model, rules, defaults={"weight_decay": 0.2}, no_decay_1d=True)
    assert {g["name"]: (names_by_group([g])[g["name"]], g["weight_decay"]) for g in groups} == {
        "a": (["a.weight"], 0.1),
        "a_no_decay": (["a.bias", "a.norm.weight"], 0.0),
        "default_no_decay": (["gain"], 0.0),
        "default": (["b.weight"], 0.2),
    }


def test_no_decay_1d_splits_nothing_where_nothing_decays():
    groups = build_param_groups(mlp(), [], defaults={"weight_decay": 0}, no_decay_1d=True)
    assert list(names_by_group(groups)) == ["default"]


def test_layer_decay_scales_by_distance_from_the_head():
    groups = build_param_groups(ViT(4), [], defaults={"lr": 1.0}, layer_decay=0.5)
    lr = {name: g["lr"] for g in groups for name, _ in g["params"]}
    assert lr["cls_token"] == lr["pos_embed"] == lr["patch_embed.proj.weight"] == 0.5**5
    assert [lr[f"blocks.{i}.attn.weight"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert lr["norm.weight"] == lr["head.weight"] == 1.0
    assert [g["name"] for g in groups] == [f"default_layer{i}" for i in range(6)]


def test_layer_decay_multiplies_a_rule_s_own_lr():
    rules = [{"match": "head", "lr": 3.0}, {"match": r"blocks\.3", "lr_mult": 2.0}]
    groups = build_param_groups(ViT(4), rules, defaults={"lr": 1.0}, layer_decay=0.5)
    assert [(g["name"], g["lr"]) for g in groups[:2]] == [
        ("rule0_layer5", 3.0),
        ("rule1_layer4", 1),
    ]


def test_layer_decay_counts_a_sequential_s_layers_without_its_activations():
    groups = build_param_groups(mlp(), [], defaults={"lr": 1.0}, layer_decay=0.5)
    assert [g["lr"] for g in groups] == [0.125, 0.25, 0.5]


def test_layer_decay_leaves_what_it_does_not_recognise_at_full_lr():
    model = Tree("blocks.0.weight", "adapter.weight")
    groups = build_param_groups(model, [], defaults={"lr": 1.0}, layer_decay=0.5)
    assert [g["lr"] for g in groups] == [0.5, 1.0]


# ---------------------------------------------------------------- use in torch


def test_torch_adamw_takes_the_groups_and_keeps_names():
    model = mlp()
    rules = [{"match": "^0", "frequency": 10, "lr_mult": 0.1, "name": "slow"}]
    groups = build_param_groups(model, rules, defaults={"lr": 1e-2}, no_decay_1d=True)
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()["param_groups"]
    assert [(g["name"], g["param_names"], g["lr"]) for g in saved] == [
        ("slow", ["0.weight"], 1e-3),
        ("slow_no_decay", ["0.bias"], 1e-3),
        ("default", ["2.weight", "4.weight"], 1e-2),
        ("default_no_decay", ["2.bias"], 1e-2),
    ]


# ---------------------------------------------------------------- wrappers

WRAPPED_NAMES = [
    ("weight", "weight"),
    ("_orig_mod.h.0.weight", "h.0.weight"),
    ("module.h.0.weight", "h.0.weight"),
    ("module._orig_mod.h.0.weight", "h.0.weight"),
    ("_orig_mod.module.h.0.weight", "h.0.weight"),
    ("h.0._orig_mod.attn._checkpoint_wrapped_module.weight", "h.0.attn.weight"),
    ("_fsdp_wrapped_module.h.0._fsdp_wrapped_module.weight", "h.0.weight"),
    ("encoder.module.weight", "encoder.module.weight"),
    ("module.encoder.module.weight", "encoder.module.weight"),
    ("module", "module"),
    ("my_orig_mod.weight", "my_orig_mod.weight"),
    ("modules.weight", "modules.weight"),
]


@pytest.mark.parametrize(("name", "stripped"), WRAPPED_NAMES)
def test_wrapper_prefixes_are_stripped_from_names(name, stripped):
    assert strip_wrapper_prefixes(name) == stripped


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("name", [name for name, _ in WRAPPED_NAMES if name != "module"])
def test_wrapping_once_more_does_not_change_a_stripped_name(name, prefix):
    assert strip_wrapper_prefixes(prefix + name) == strip_wrapper_prefixes(name)


def compiled_blocks(model):
    for i, block in enumerate(model):
        model[i] = torch.compile(block)
    return model


def checkpointed_blocks(model):
    for i, block in enumerate(model):
        model[i] = checkpoint_wrapper(block)
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        checkpoint_wrapper,
        compiled_blocks,
        checkpointed_blocks,
        nn.DataParallel,
        lambda model: torch.compile(nn.DataParallel(model)),
        lambda model: nn.DataParallel(torch.compile(checkpointed_blocks(model))),
    ],
)
def test_names_match_and_come_without_wrapper_prefixes(wrap):
    plain = mlp()
    wanted = [name for name, _ in plain.named_parameters()]
    wrapped = wrap(plain)
    (group,) = build_param_groups(wrapped, [{"match": r"^[024]\."}], on_unmatched="error")
    assert [name for name, _ in group["params"]] == wanted
    assert [p for _, p in group["params"]] == list(wrapped.parameters())
    assert count_layers(wrapped) == 3


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_names_match_under_distributed_data_parallel(process_group):
    model = nn.parallel.DistributedDataParallel(nn.ModuleDict({"module": nn.Linear(2, 2)}))
    (group,) = build_param_groups(model, [{"match": r"^module\.weight"}, {"match": "bias"}])
    assert [name for name, _ in group["params"]] == ["module.weight", "module.bias"]


def test_names_and_shapes_survive_fully_shard(process_group):
    groups = build_param_groups(fully_shard(mlp()), [{"match": r"^0\."}], no_decay_1d=True)
    assert names_by_group(groups) == {
        "rule0": ["0.weight"],
        "rule0_no_decay": ["0.bias"],
        "default": ["2.weight", "4.weight"],
        "default_no_decay": ["2.bias"],
    }


def test_the_user_s_own_child_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.ModuleDict({"module": nn.Linear(2, 2)})})
    (group,) = build_param_groups(model, [])
    assert [name for name, _ in group["params"]] == ["module.module.weight", "module.module.bias"]
    (group,) = build_param_groups(nn.DataParallel(model), [])
    assert [name for name, _ in group["params"]] == ["module.module.weight", "module.module.bias"]


def test_two_parameters_that_stripping_makes_one_are_refused():
    with pytest.raises(ValueError, match=r"two parameters are 'a\.weight' without wrapper"):
        build_param_groups(Tree("a.weight", "a._orig_mod.weight"), [])


def test_parameters_that_fsdp_has_flattened_into_one_are_refused(process_group):
    model = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"flattened by FSDP.*use_orig_params"):
        build_param_groups(model, [])


def test_no_decay_1d_refuses_shapes_that_fsdp_has_flattened_but_names_still_work(process_group):
    model = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"), use_orig_params=True)
    groups = build_param_groups(model, [{"match": r"^[02]\."}])
    assert names_by_group(groups) == {
        "rule0": ["0.weight", "0.bias", "2.weight", "2.bias"],
        "default": ["4.weight"],
    }
    with pytest.raises(ValueError, match=r"no_decay_1d needs the shape of '0\.weight'.*FSDP"):
        build_param_groups(model, [], no_decay_1d=True)


def test_no_decay_1d_refuses_lazy_parameters():
    model = nn.Sequential(nn.LazyLinear(2, bias=False))
    assert len(build_param_groups(model, [])) == 1
    with pytest.raises(ValueError, match=r"needs the shape of '0.weight', which is not known yet"):
        build_param_groups(model, [], no_decay_1d=True)


# ---------------------------------------------------------------- errors

BAD_RULES = [
    ("head", r"rule 1 is 'head', of type str: write a dict"),
    ({}, r"rule 1 .*'match' is missing among its keys: none"),
    ({"mtach": "0"}, r"rule 1 .*'match' is missing among its keys: mtach"),
    ({"matches": "0"}, r"rule 1 .*unknown option 'matches': did you mean 'match'"),
    ({"match": ""}, r"rule 1 .*non-empty string, or a list"),
    ({"match": []}, r"rule 1 .*non-empty string, or a list"),
    ({"match": ["0", 3]}, r"rule 1 \(match=\['0', 3\]\).*non-empty string, or a list"),
    ({"match": 0}, r"rule 1 .*non-empty string, or a list"),
    ({"match": "*.bias"}, r"rule 1 \(match='\*\.bias'\).*not a valid regular.*syntax='glob'"),
    ({"match": "0", "frequency": 0}, r"rule 1 \(match='0'\): Invalid frequency: 0"),
    ({"match": "0", "frequency": -1}, r"rule 1 .*Invalid frequency: -1"),
    ({"match": "0", "frequency": 2.5}, r"rule 1 .*Invalid frequency: 2.5"),
    ({"match": "0", "frequency": True}, r"rule 1 .*Invalid frequency: True"),
    ({"match": "0", "lr": -1.0}, r"rule 1 \(match='0'\): lr must be finite and not negative.*-1"),
    ({"match": "0", "lr": math.nan}, r"rule 1 .*lr must be finite"),
    ({"match": "0", "lr": "1e-4"}, r"rule 1 .*lr must be a number, but is '1e-4' \(YAML reads"),
    ({"match": "0", "lr": True}, r"rule 1 .*lr must be a number, but is True"),
    ({"match": "0", "lr": torch.zeros(2)}, r"rule 1 .*lr as a tensor must have one element, not 2"),
    ({"match": "0", "lr": torch.tensor(-1.0)}, r"rule 1 .*lr must be finite and not negative"),
    ({"match": "0", "lr_mult": -1}, r"rule 1 .*lr_mult must be finite and not negative"),
    ({"match": "0", "weight_decay": -0.1}, r"rule 1 .*weight_decay must be finite and not neg"),
    ({"match": "0", "lr": 1.0, "lr_mult": 2.0}, r"rule 1 .*both 'lr' and 'lr_mult'"),
    ({"match": "0", "lr_mult": 2.0}, r"rule 1 .*'lr_mult' needs a base.*defaults=\{'lr'"),
    ({"match": "0", "name": ""}, r"rule 1 .*'name' must be a non-empty string"),
    ({"match": "0", "name": 3}, r"rule 1 .*'name' must be a non-empty string, but is 3"),
    ({"match": "0", "params": []}, r"rule 1 .*'params' cannot be set here"),
    ({"match": "0", 3: 1}, r"rule 1 .*option names are strings, but one is 3"),
    ({"match": "0", "frequnecy": 2}, r"rule 1 .*unknown option 'frequnecy'.*'frequency'"),
    ({"match": "0", "lr_multi": 2}, r"rule 1 .*unknown option 'lr_multi'.*'lr_mult'"),
    ({"match": "0", "freq": 2}, r"rule 1 .*unknown option 'freq'.*'frequency'"),
    ({"match": "0", "LR": 2}, r"rule 1 .*unknown option 'LR'.*'lr'"),
    ({"match": "0", "learning_rate": 2}, r"rule 1 .*unknown option 'learning_rate'.*'lr'"),
    ({"match": "0", "weight-decay": 2}, r"rule 1 .*unknown option 'weight-decay'.*'weight_decay'"),
]


@pytest.mark.parametrize(("rule", "message"), BAD_RULES, ids=[str(rule) for rule, _ in BAD_RULES])
def test_an_invalid_rule_is_an_error_that_names_it(rule, message):
    with pytest.raises(ValueError, match=message):
        build_param_groups(mlp(), [{"match": "2"}, rule])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": list(mlp().parameters())}, TypeError, "model must be an nn.Module.*not list"),
        ({"rules": {"match": "0"}}, TypeError, "rules must be a list of dicts, but got dict"),
        ({"rules": "0"}, TypeError, "rules must be a list of dicts, but got str"),
        ({"rules": None}, TypeError, "rules must be a list of dicts, but got NoneType"),
        ({"defaults": 1e-3}, TypeError, "defaults must be a dict of options, but got 0.001"),
        ({"defaults": {"lr": -1.0}}, ValueError, "defaults: lr must be finite and not negative"),
        ({"defaults": {"frequency": 0}}, ValueError, "defaults: Invalid frequency: 0"),
        ({"defaults": {"lr_mult": 2}}, ValueError, "defaults: 'lr_mult' cannot be set here"),
        ({"defaults": {"wd": 2}}, ValueError, "defaults: unknown option 'wd'.*'weight_decay'"),
        ({"layer_decay": 0.5}, ValueError, "layer_decay needs a base learning rate"),
        ({"layer_decay": 0}, ValueError, r"layer_decay must be in \(0, 1\], but is 0"),
        ({"layer_decay": 1.5}, ValueError, r"layer_decay must be in \(0, 1\], but is 1.5"),
        ({"layer_decay": True}, ValueError, "layer_decay must be a number, but is True"),
        ({"on_unmatched": "ignore"}, ValueError, "on_unmatched must be one of 'default', 'error'"),
        ({"on_unused_rule": "no"}, ValueError, "on_unused_rule must be one of 'error', 'warn', "),
        ({"syntax": "re"}, ValueError, "syntax must be one of 'regex', 'glob', but is 're'"),
    ],
)
def test_an_invalid_argument_is_an_error_that_names_it(arguments, error, message):
    arguments = {"model": mlp(), "rules": [], **arguments}
    with pytest.raises(error, match=message):
        build_param_groups(arguments.pop("model"), arguments.pop("rules"), **arguments)


@pytest.mark.parametrize(
    ("pattern", "suggestion"),
    [
        ("wtee", "wte"),
        (r"^transformer\.wtee", "wte"),
        (r"\.h\.\d+\.atn", "attn"),
        ("WTE", "wte"),
        ("lm_heads", "lm_head"),
        (r"^lm_head\.weigth$", r"lm_head\.weight"),
        (["wtee", "nothing"], "wte"),
    ],
)
def test_a_rule_that_matches_nothing_suggests_close_names(pattern, suggestion):
    message = rf"rule 0 .*matches no parameter\. Did you mean .*\b{suggestion}\b"
    with pytest.raises(ValueError, match=message):
        build_param_groups(GPT(2), [{"match": pattern}])


def test_a_rule_that_matches_nothing_and_resembles_nothing_shows_the_names():
    with pytest.raises(ValueError, match=r"no parameter\. The names are 0\.weight, 0\.bias, 2\."):
        build_param_groups(mlp(), [{"match": "zzzzz"}])


def test_a_glob_without_wildcards_is_told_about_them():
    with pytest.raises(ValueError, match=r"must match the whole name: did you mean '\*wte\*'"):
        build_param_groups(GPT(1), [{"match": "wte"}], syntax="glob")


def test_a_rule_whose_matches_were_taken_says_by_which_rule():
    rules = [{"match": "weight"}, {"match": "bias"}, {"match": r"^0\.", "frequency": 2}]
    message = (
        r"rule 2 \(match='\^0\\\\\.'\): all that it matches was taken by rule 0 \(match='weight'\) "
        r"and rule 1 \(match='bias'\): 0\.weight, 0\.bias\. The first match wins"
    )
    with pytest.raises(ValueError, match=message):
        build_param_groups(mlp(), rules)


def test_a_rule_that_matches_only_frozen_parameters_says_so():
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"rule 0 .*only frozen parameters: 0\.weight, 0\.bias"):
        build_param_groups(model, [{"match": "^0"}])


def test_a_rule_that_matches_only_a_tied_name_says_which_name_comes_first():
    message = r"only lm_head\.weight, tied to transformer\.wte\.weight\..*match that"
    with pytest.raises(ValueError, match=message):
        build_param_groups(GPT(1, tied=True), [{"match": "lm_head"}])


def test_an_unused_rule_can_warn_or_pass():
    rules = [{"match": "zzzzz"}]
    with pytest.warns(UserWarning, match="rule 0 .*matches no parameter") as caught:
        build_param_groups(mlp(), rules, on_unused_rule="warn")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_param_groups(mlp(), rules, on_unused_rule="ignore")


def test_unmatched_parameters_can_be_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"no rule matches 2\.bias, 4\.weight\. Add a rule"):
        build_param_groups(mlp(), [{"match": [r"^0", r"^2\.w"]}], on_unmatched="error")


def test_long_listings_are_cut():
    model = Tree(*(f"p{i}" for i in range(9)))
    with pytest.raises(ValueError, match="p0, p1, p2, p3, p4, p5 and 3 more"):
        build_param_groups(model, [], on_unmatched="error")


@pytest.mark.parametrize(
    "build",
    [lambda model: build_param_groups(model, []), depth_groups, group_titans_params],
    ids=["build_param_groups", "depth_groups", "group_titans_params"],
)
def test_a_model_without_trainable_parameters_is_an_error(build):
    with pytest.raises(ValueError, match=r"no trainable parameters \(5 frozen ones\)"):
        build(mlp().requires_grad_(False))
    with pytest.raises(ValueError, match=r"no trainable parameters \(0 frozen ones\)"):
        build(nn.ReLU())


# ---------------------------------------------------------------- Titans


def test_titans_parameters_split_into_core_and_memory():
    model = Tree("attn.weight", "layers.0.memory_bank.keys", "memory_bank", "memory_banks.weight")
    model.tied = model.layers._modules["0"].memory_bank
    model.attn.register_parameter("frozen", nn.Parameter(torch.zeros(2), requires_grad=False))
    core, memory = group_titans_params(model)
    by_param = {param: name for name, param in model.named_parameters()}
    assert [by_param[p] for p in core] == ["attn.weight", "memory_banks.weight"]
    assert [by_param[p] for p in memory] == ["memory_bank", "layers.0.memory_bank.keys"]


def test_a_model_without_memory_has_an_empty_memory_list():
    core, memory = group_titans_params(mlp())
    assert (len(core), memory) == (5, [])


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(param_groups)
    assert result.attempted > 0
    assert result.failed == 0
