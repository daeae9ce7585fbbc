"""Optimizers from configurations: dicts and YAML files."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("pydantic")
pytest.importorskip("yaml")

import yaml

from nested_optim import (
    DGD,
    M3,
    DeepMomentum,
    DeepNestedOptimizer,
    DeltaMomentum,
    NestedOptimizer,
    matrix_groups,
)
from nested_optim.integrations.build import OPTIMIZERS, optimizer_class, option_names
from nested_optim.integrations.config import (
    LearnedOptions,
    check_config,
    config_schema,
    load_config,
    optimizer_from_config,
)
from nested_optim.memory_levels import PRESETS

#: The block of the behaviour-cloning guide.
GUIDE = """
optimizer_type: nested
learning_rate:
  initial: 3e-4
rules:
  - {match: "0.weight", frequency: 4, lr_mult: "0.5", name: slow}
nested_optimizer:
  meta_lr: 1e-4
  k_unroll: 5
  cms_frequencies: [1, 10, 100]
  momentum_hidden_dim: 64
  controller_hidden_dim: 32
  use_gradient_checkpointing: false
  mode: simple
  meta_update_freq: 50
  weight_decay: 1e-2
"""


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def take_steps(optimizer: Any, model: nn.Module, steps: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :2].sin()).pow(2).mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


CLASSES: dict[str, Any] = {
    "nested": NestedOptimizer,
    "m3": M3,
    "muon": M3,
    "dgd": DGD,
    "delta": DeltaMomentum,
    "deep_momentum": DeepMomentum,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "deep_nested": DeepNestedOptimizer,
}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_type_is_built_and_trains(kind):
    model = make_model()
    optimizer = optimizer_from_config(
        {"optimizer_type": kind, "learning_rate": "1e-2", "weight_decay": "1e-3"}, model
    )
    assert type(optimizer) is CLASSES[kind]
    decays = {g["weight_decay"] for g in optimizer.param_groups}
    assert {g["lr"] for g in optimizer.param_groups} == {1e-2} and decays == {0.0, 1e-3}
    assert 0 < largest_difference(take_steps(optimizer, model), list(make_model().parameters())) < 1


def test_all_types_are_known_to_the_schema():
    allowed = config_schema()["properties"]["optimizer_type"]["enum"]
    assert sorted(allowed) == sorted(OPTIMIZERS)
    assert set(CLASSES) <= set(allowed)


def test_the_rules_of_a_configuration_are_those_of_build_param_groups():
    config = {
        "optimizer_type": "nested",
        "learning_rate": 1e-3,
        "rules": [{"match": r"^0\.", "frequency": 4, "lr_mult": "1e-1", "name": "slow"}],
        "no_decay_1d": False,
    }
    groups = optimizer_from_config(config, make_model()).param_groups
    assert [(g["name"], g["frequency"], g["lr"]) for g in groups] == [
        ("slow", 4, pytest.approx(1e-4)),
        ("default", 1, 1e-3),
    ]
    with pytest.raises(ValueError, match=r"rule 0 .*matches no"):
        optimizer_from_config({**config, "rules": [{"match": "typo"}]}, make_model())
    with pytest.raises(ValueError, match="did you mean 'frequency'"):
        rules = [{"match": "0", "frequencey": 4}]
        optimizer_from_config({**config, "rules": rules}, make_model())


def test_wrappers_make_no_difference_to_rules():
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.module = model

    config = {"rules": [{"match": r"^0\.", "frequency": 3, "name": "slow"}]}
    for model in (make_model(), torch.compile(make_model()), nn.DataParallel(make_model())):
        groups = {g["name"]: g for g in optimizer_from_config(config, model).param_groups}
        assert groups["slow"]["frequency"] == 3


def test_muon_is_torch_s_on_the_matrices():
    ours, theirs = make_model(), make_model()
    config = {
        "optimizer_type": "muon",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "options": {"ns_dtype": "bfloat16"},
    }
    after = take_steps(optimizer_from_config(config, ours), ours)
    options = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    by_kind = {g["algorithm"]: g for g in matrix_groups(theirs)}
    muon = torch.optim.Muon([p for _, p in by_kind["m3"]["params"]], **options)
    rest = [p for _, p in by_kind["adamw"]["params"]]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1]},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        weight_decay=0.1,
    )

    class Both:
        def zero_grad(self) -> None:
            theirs.zero_grad()

        def step(self) -> None:
            muon.step()
            adamw.step()

    assert largest_difference(after, take_steps(Both(), theirs)) == 0.0


def test_the_block_of_the_guide_makes_a_deep_nested_optimizer(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(GUIDE)
    optimizer = optimizer_from_config(path, make_model())
    assert type(optimizer) is DeepNestedOptimizer
    first = optimizer.param_groups[0]
    assert (first["name"], first["lr"], first["frequency"]) == ("slow", 1.5e-4, 4)
    expected = {
        "meta_lr": 1e-4,
        "k_unroll": 5,
        "cms_frequencies": (1, 10, 100),
        "momentum_hidden_dim": 64,
        "controller_hidden_dim": 32,
        "unroll": "exact",
        "mode": "simple",
        "meta_update_freq": 50,
        "weight_decay": 1e-2,
    }
    assert {key: first[key] for key in expected} == expected
    assert isinstance(first["meta_lr"], float) and isinstance(first["weight_decay"], float)
    assert optimizer.model is not None

    config = yaml.safe_load(GUIDE)
    config["nested_optimizer"]["use_gradient_checkpointing"] = True
    config["optimizer_type"] = "deep_nested"
    assert optimizer_from_config(config, make_model()).param_groups[0]["unroll"] == "stepwise"
    # The optimizer that it makes is the one that is made by hand.
    ours, theirs = make_model(), make_model()
    block = {"meta_lr": 1e-2, "meta_update_freq": 2, "cms_frequencies": [1, 2]}
    by_config = optimizer_from_config(
        {"learning_rate": 1e-2, "no_decay_1d": False, "nested_optimizer": block}, ours
    )
    by_hand = DeepNestedOptimizer(theirs, 1e-2, **block)
    assert largest_difference(take_steps(by_config, ours), take_steps(by_hand, theirs)) == 0.0


def test_yaml_s_numbers_in_strings_become_floats(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("learning_rate: 1e-4\nweight_decay: 1e-2\noptions: {eps: 1e-9}\n")
    assert yaml.safe_load(path.read_text())["learning_rate"] == "1e-4"  # which is why
    for source in (path, str(path)):
        (decayed, other) = optimizer_from_config(source, make_model()).param_groups
        assert (decayed["lr"], decayed["weight_decay"], decayed["eps"]) == (1e-4, 1e-2, 1e-9)
        assert other["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("kind", "options", "key", "value"),
    [
        ("deep_momentum", {"memory_lr": "1e-4"}, "memory_lr", 1e-4),
        ("deep_momentum", {"hidden": "8"}, "hidden", 8),
        ("nested", {"betas": ["0.9", "0.95"]}, "betas", (0.9, 0.95)),
        ("nested", {"window": "sum"}, "window", "sum"),
        ("nested", {"state_dtype": "float32"}, "state_dtype", "float32"),
        ("nested", {"amsgrad": True}, "amsgrad", True),
        ("m3", {"alpha": "5e-1"}, "alpha", 0.5),
    ],
)
def test_options_take_the_type_that_the_optimizer_expects(kind, options, key, value):
    config = {"optimizer_type": kind, "options": options}
    found = optimizer_from_config(config, make_model()).param_groups[0][key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimiser_type": "adam"}, "unknown key 'optimiser_type': did you mean 'optimizer_type'"),
        ({"learning_rat": 1.0}, "did you mean 'learning_rate'"),
        (
            {"nested_optimizer": {"k_unrol": 2}},
            "nested_optimizer.k_unrol: .*mean 'k_unroll'",
        ),
        ({"learning_rate": {"initial": 1e-3, "finl": 0}}, "finl"),
        ({"optimizer_type": "nestd"}, "optimizer_type: .*'nested'"),
        ({"optimizer_type": "adam", "options": {"amsgrd": True}}, "did you mean 'amsgrad'"),
        ({"learning_rate": "fast"}, "learning_rate.*'fast'"),
        ({"learning_rate": True}, "learning_rate.*True"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"learning_rate": {"initial": "-1e-3"}}, "initial"),
        ({"nested_optimizer": {"k_unroll": 2.5}}, "k_unroll.*2.5"),
        ({"nested_optimizer": {"k_unroll": True}}, "k_unroll.*True"),
        ({"nested_optimizer": {"cms_frequencies": [1, 0]}}, "cms_frequencies"),
        ({"nested_optimizer": {"cms_frequencies": [1, True]}}, "cms_frequencies"),
        ({"nested_optimizer": {"mode": "both"}}, "mode.*'simple'"),
        ({"optimizer_type": "adam", "nested_optimizer": {}}, "options are those of 'deep_nested'"),
        ({"optimizer_type": "adamw", "rules": [{"match": "0", "frequency": 2}]}, "no 'frequency'"),
        ({"optimizer_type": "muon", "options": {"alpha": 1.0}}, "alpha=0"),
        ({"weight_decay": 0.1, "nested_optimizer": {"weight_decay": 0.2}}, "give one of them"),
        ({"options": {"lr": 0.1}}, "'lr' is set by 'learning_rate'"),
        ({"options": {"eps": "tiny"}}, "options: eps must be a number, but is 'tiny'"),
        ({"options": {"frequency": "2.5"}}, "frequency must be an integer"),
        (
            {"nested_optimizer": {"unroll": "stepwise"}, "options": {"unroll": "exact"}},
            "set in options and in nested_optimizer",
        ),
        ({"rules": [{"match": "0", "freeze": True}]}, r"rules\[0\].*no option 'freeze'"),
        ({"rules": [{"match": "0", "lr_mult": "half"}]}, r"rules\[0\]: lr_mult must be a number"),
        ({"rules": [{"match": "0", "memory_write": 0.1}]}, "no option 'memory_write'"),
        ({"rules": {"match": "0"}}, "rules"),
    ],
)
def test_mistakes_are_named_with_their_place(config, message):
    before = copy.deepcopy(config)
    with pytest.raises(ValueError, match=message):
        optimizer_from_config(config, make_model())
    assert str(config) == str(before)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ValueError, match=r"(?s)learning_rate.*weight_decay.*rulez"):
        check_config({"learning_rate": "fast", "weight_decay": -1, "rulez": []})


def test_nothing_of_the_caller_s_is_changed():
    config = {
        "learning_rate": {"initial": "1e-3"},
        "rules": [{"match": ["0.weight", "2.weight"], "frequency": 2, "lr_mult": "0.5"}],
        "options": {"betas": [0.9, 0.95]},
    }
    before = copy.deepcopy(config)
    optimizers = [optimizer_from_config(config, make_model()) for _ in range(2)]
    assert config == before
    optimizers[0].param_groups[0]["lr"] = 7.0
    assert optimizers[1].param_groups[0]["lr"] == 5e-4
    loaded = load_config(config)
    loaded["rules"][0]["frequency"] = 99
    assert config == before


def test_files_that_hold_no_mapping_or_are_not_there_are_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="expected a mapping, but found list"):
        optimizer_from_config(path, make_model())
    with pytest.raises(FileNotFoundError):
        optimizer_from_config(tmp_path / "none.yaml", make_model())


def test_the_schema_is_json_and_names_every_key():
    schema = json.loads(json.dumps(config_schema()))
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) >= set(yaml.safe_load(GUIDE))
    block = schema["$defs"]["LearnedOptions"]
    assert set(block["properties"]) >= set(yaml.safe_load(GUIDE)["nested_optimizer"])
    assert block["additionalProperties"] is False


def test_the_block_s_defaults_are_the_optimizer_s():
    import inspect

    own = inspect.signature(DeepNestedOptimizer).parameters
    for name, field in LearnedOptions.model_fields.items():
        if name != "weight_decay":  # there it is the optimizer's where nothing sets one
            assert field.default == own[name].default, name


def test_a_memory_is_attached():
    model = make_model()
    config = {"memory": {"frequencies": ["2", 4], "write": "5e-1"}, "options": {"eps": "1e-9"}}
    config["rules"] = [{"match": "4", "memory_write": 0.25}]
    optimizer = optimizer_from_config(config, model)
    take_steps(optimizer, model)
    assert optimizer.param_groups[0]["memory_frequencies"] == (2, 4)
    short = optimizer_from_config(
        {"optimizer_type": "nested", "options": {"memory": "continual"}}, make_model()
    )
    assert short.param_groups[0]["memory_frequencies"] == PRESETS["continual"][0]
    own = optimizer_from_config(
        {"optimizer_type": "deep_momentum", "options": {"memory": "linear", "objective": "dot"}},
        make_model(),
    )
    assert own.param_groups[0]["memory"] == "linear"
    beside = optimizer_from_config(
        {"optimizer_type": "deep_momentum", "options": {"memory": "continual"}}, make_model()
    )
    assert beside.param_groups[0]["memory"] == "mlp"
    assert beside.param_groups[0]["memory_frequencies"] == PRESETS["continual"][0]
    with pytest.raises(ValueError, match="not both"):
        optimizer_from_config({"memory": {}, "options": {"memory": "continual"}}, make_model())
    with pytest.raises(ValueError, match=r"memory.frequencies"):
        optimizer_from_config({"memory": {"frequencies": [True]}}, make_model())


@pytest.mark.parametrize("kind", CLASSES)
def test_option_names_are_the_constructor_s(kind):
    names = option_names(kind)
    assert "weight_decay" in names and not {"lr", "params", "model", "self"} & set(names)
    assert optimizer_class(kind) is CLASSES[kind]


def test_a_scheduler_goes_on_top():
    optimizer = optimizer_from_config({"learning_rate": 1e-2}, make_model())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert {g["lr"] for g in optimizer.param_groups} == {5e-3}


def test_without_pydantic_the_error_says_what_to_install(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "pydantic", None)
    monkeypatch.delitem(sys.modules, "nested_optim.integrations.config")
    with pytest.raises(ImportError, match=r"nested_optim\[config\]"):
        importlib.import_module("nested_optim.integrations.config")
