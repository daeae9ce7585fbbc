"""Optimizers from configurations: a dict or a YAML file, checked before anything is built."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from nested_optim.memory_levels import MEMORY_OPTIONS

from .build import _LEVEL_KEYS, _hint, build_optimizer, optimizer_class, option_names

try:
    from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
except ImportError as error:
    raise ImportError(
        "configurations are validated by pydantic: pip install 'nested_optim[config]'"
    ) from error

OptimizerType = Literal[
    "nested", "deep_nested", "m3", "dgd", "delta", "deep_momentum", "adam", "adamw", "muon"
]


def _no_truth_value(value: Any) -> Any:
    """YAML reads ``yes`` as True, and pydantic True as 1."""
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


_Number = Annotated[float, BeforeValidator(_no_truth_value)]
_Count = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1)]


class _Strict(BaseModel):
    # Numbers in strings become numbers: YAML reads 1e-4 as a string.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LearningRate(_Strict):
    """A learning rate with a place for what else a configuration may say of it."""

    initial: _Number = Field(ge=0, description="The learning rate that the optimizer begins with.")


class LearnedOptions(_Strict):
    """The block ``nested_optimizer``: options of ``DeepNestedOptimizer``."""

    meta_lr: _Number = Field(1e-4, ge=0)
    k_unroll: _Count = 5
    cms_frequencies: tuple[_Count, ...] = (1, 10, 100)
    momentum_hidden_dim: _Count = 64
    controller_hidden_dim: _Count = 32
    use_gradient_checkpointing: bool = False
    mode: Literal["simple", "explicit"] = "simple"
    meta_update_freq: _Count = 100
    meta_rule: Literal["cosine", "adam"] | None = None
    horizon: Literal["step", "run"] | None = None
    unroll: Literal["exact", "stepwise", "first_order"] = "exact"
    min_lr_mult: _Number = Field(0.01, gt=0, lt=1)
    max_lr_mult: _Number = Field(100.0, gt=1)
    max_grad_norm: _Number | None = Field(None, gt=0)
    weight_decay: _Number | None = Field(None, ge=0)


class MemoryOptions(_Strict):
    """The block ``memory``: a :class:`nested_optim.WeightMemory` on the optimizer."""

    frequencies: tuple[_Count, ...] | None = None
    write: _Number | tuple[_Number, ...] | None = None
    pull: _Number | tuple[_Number, ...] | None = None
    dtype: str | None = None
    preset: Literal["continual", "replay"] | None = None


class OptimizerConfig(_Strict):
    """A configuration of an optimizer."""

    optimizer_type: OptimizerType = Field(
        "nested",
        description="'nested' with a block `nested_optimizer` is 'deep_nested'; 'muon' is M3 with "
        "no alpha but 0: torch's Muon, and AdamW for what is no matrix.",
    )
    learning_rate: Annotated[_Number, Field(ge=0)] | LearningRate = Field(
        1e-3, description="Or {initial: ...}."
    )
    weight_decay: _Number | None = Field(None, ge=0, description="Default: the optimizer's own.")
    rules: list[dict[str, Any]] = Field(
        default_factory=list, description="Of build_param_groups: match, frequency, lr_mult, ..."
    )
    no_decay_1d: bool = Field(True, description="No weight decay for biases and 1-d parameters.")
    nested_optimizer: LearnedOptions | None = None
    memory: MemoryOptions | None = None
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further options of the optimizer's constructor."
    )


def config_schema() -> dict[str, Any]:
    """The JSON schema of configurations, for editors and other validators."""
    return OptimizerConfig.model_json_schema()


def load_config(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A configuration as a dict of one's own, from a mapping or a YAML file.

    Raises:
        ValueError: the file holds no mapping.
        ImportError: a file was given, and PyYAML is not installed.
    """
    if isinstance(config, Mapping):
        return deepcopy(dict(config))
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "YAML files are read by PyYAML: pip install 'nested_optim[config]'"
        ) from error
    found = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{config}: expected a mapping, but found {type(found).__name__}")
    return found


def check_config(config: Mapping[str, Any] | str | Path) -> OptimizerConfig:
    """The configuration with every value checked and converted.

    Raises:
        ValueError: something is unknown (with close matches) or has a wrong value; all of it is
            listed.
    """
    given = load_config(config)
    try:
        checked = OptimizerConfig.model_validate(given)
    except ValidationError as error:
        raise ValueError(_explained(error)) from None
    kind, learned = checked.optimizer_type, checked.nested_optimizer
    if learned is not None and kind not in ("nested", "deep_nested"):
        raise ValueError(
            f"nested_optimizer: its options are those of 'deep_nested', but optimizer_type is "
            f"{kind!r}: remove the block, or change the type"
        )
    own = learned.weight_decay if learned is not None else None
    if own is not None and checked.weight_decay not in (None, own):
        raise ValueError(
            f"weight_decay is {checked.weight_decay}, and nested_optimizer.weight_decay {own}: "
            "give one of them"
        )
    resolved = _kind(checked)
    known = option_names(resolved)
    for key in checked.options:
        if key in _ELSEWHERE:
            raise ValueError(f"options: {key!r} is set by {_ELSEWHERE[key]!r}: remove it")
        if key not in known:
            raise ValueError(f"options: {resolved!r} has no option {key!r}{_hint(key, known)}")
        if learned is not None and key in learned.model_fields_set:
            raise ValueError(f"{key} is set in options and in nested_optimizer: keep one of them")
    for i, rule in enumerate(checked.rules):
        in_rules = {*known, *_RULE_KEYS, *(MEMORY_OPTIONS if checked.memory is not None else ())}
        for key in rule:
            # Levels that torch's optimizers lack have a message of their own.
            if key not in in_rules and key not in _LEVEL_KEYS:
                raise ValueError(
                    f"rules[{i}] (match={rule.get('match')!r}): {resolved!r} has no option "
                    f"{key!r}{_hint(str(key), in_rules)}"
                )
    return checked


#: What else a rule may say.
_RULE_KEYS = ("match", "name", "lr", "lr_mult")
#: Options that have keys of their own.
_ELSEWHERE = {"lr": "learning_rate", "base_lr": "learning_rate", "weight_decay": "weight_decay"}


def _kind(checked: OptimizerConfig) -> str:
    return "deep_nested" if checked.nested_optimizer is not None else checked.optimizer_type


def optimizer_from_config(config: Mapping[str, Any] | str | Path, model: nn.Module) -> Optimizer:
    """The optimizer that a configuration describes, for a model's trainable parameters.

    Args:
        config: a mapping, which stays as it is, or the path of a YAML file.
        model: the module that is trained.

    Raises:
        ValueError: the configuration is wrong somewhere; the message says where and lists close
            matches of unknown names.

    Example::

        >>> config = {"optimizer_type": "nested", "learning_rate": "1e-3",
        ...           "rules": [{"match": "0", "frequency": 10}]}
        >>> optimizer_from_config(config, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        NestedOptimizer ...
    """
    checked = check_config(config)
    kind, rate = _kind(checked), checked.learning_rate
    types = _types(kind)
    options = _typed(checked.options, types, "options")
    weight_decay = checked.weight_decay
    if checked.nested_optimizer is not None:
        learned = checked.nested_optimizer.model_dump()
        own = learned.pop("weight_decay")
        weight_decay = own if own is not None else weight_decay
        options = {**learned, **options}
    memory: Any = options.pop("memory", None)
    if checked.memory is not None:
        if memory is not None:
            raise ValueError("give memory or options: memory, not both")
        memory = {k: v for k, v in checked.memory.model_dump().items() if v is not None}
    return build_optimizer(
        model,
        kind,
        lr=rate.initial if isinstance(rate, LearningRate) else rate,
        weight_decay=weight_decay,
        rules=[_typed(rule, types, f"rules[{i}]") for i, rule in enumerate(checked.rules)],
        no_decay_1d=checked.no_decay_1d,
        memory=memory,
        **options,
    )


def _types(kind: str) -> dict[str, type]:
    """Of options that are numbers, or sequences of them: which numbers the constructor expects."""
    found: dict[str, type] = {"lr": float, "lr_mult": float}
    for key, parameter in inspect.signature(optimizer_class(kind)).parameters.items():
        words = set(re.findall(r"\w+", str(parameter.annotation)))
        if "str" not in words and words & {"float", "int"}:
            found[key] = float if "float" in words else int
    return found


def _typed(options: dict[str, Any], types: dict[str, type], where: str) -> dict[str, Any]:
    """Options with their numbers as numbers (YAML reads ``1e-4`` as a string), lists as tuples.

    The patterns of a rule, ``match``, may stay a list.
    """
    found: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, list) and key != "match":
            value = tuple(value)
        if key in types:
            convert = types[key]
            try:
                if isinstance(value, tuple):
                    value = tuple(convert(x) if isinstance(x, str) else x for x in value)
                elif isinstance(value, str):
                    value = convert(value)
            except ValueError:
                raise ValueError(
                    f"{where}: {key} must be {'a number' if convert is float else 'an integer'}, "
                    f"but is {options[key]!r}"
                ) from None
        found[key] = value
    return found


def _explained(error: ValidationError) -> str:
    lines = []
    for entry in error.errors():
        *path, key = entry["loc"] or ("",)
        where = ".".join(map(str, (*path, key)))
        if entry["type"] == "extra_forbidden":
            known = _fields_at(path)
            lines.append(f"{where}: unknown key {key!r}{_hint(str(key), known)}")
        else:
            given = "" if isinstance(entry["input"], Mapping) else f", but is {entry['input']!r}"
            lines.append(f"{where}: {entry['msg']}{given}")
    return "the configuration is wrong: " + "; ".join(lines)


def _fields_at(path: list[Any]) -> list[str]:
    """The keys that belong at a place of the configuration."""
    found: type[BaseModel] = OptimizerConfig
    for step in path:
        if step in found.model_fields:
            annotation = found.model_fields[str(step)].annotation
            for candidate in (annotation, *get_args(annotation)):
                if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                    found = candidate
    return list(found.model_fields)
