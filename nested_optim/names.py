"""Parameters by name: what a module calls them, less what its wrappers add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import Parameter

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def strip_wrapper_prefixes(name: str) -> str:
    """A parameter's name without what wrappers of modules add to it, for comparing names.

    ``_orig_mod.``, ``_fsdp_wrapped_module.`` and ``_checkpoint_wrapped_module.`` go wherever they
    are. ``module.`` goes at the front only, as often as it is there: a name alone does not tell a
    data-parallel wrapper from a model's own child called ``module``, whose name is cut as well. So
    strip both names before comparing: then wrapping makes no difference. (:func:`find_parameters`,
    given a model, looks at the wrapper's type instead, and keeps such a child's name.)

    Example::

        >>> strip_wrapper_prefixes("module._orig_mod.blocks.0._checkpoint_wrapped_module.weight")
        'blocks.0.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


@dataclass
class FoundParameters:
    """What :func:`find_parameters` returns."""

    names: list[str] = field(default_factory=list)  # all, with frozen ones and aliases
    trainable: dict[str, Parameter] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)  # a tied parameter's other names -> first
    flattened: bool = False  # by FSDP1, which keeps names but not shapes


def find_parameters(model: nn.Module, need_trainable: bool = True) -> FoundParameters:
    """A model's parameters in its order, frozen and tied ones told apart.

    Raises:
        ValueError: names that FSDP hides or that clash without their prefixes, or (with
            ``need_trainable``) no trainable parameter.
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module (for its names), not {type(model).__name__}")
    clean = _cleaner(model)
    found = FoundParameters()
    owners: dict[str, Parameter] = {}
    first_names: dict[Parameter, str] = {}
    for raw_name, param in model.named_parameters(remove_duplicate=False):
        raw = raw_name.split(".")
        if raw[-1] == "_flat_param":
            raise ValueError(
                f"parameter {raw_name!r} is flattened by FSDP, which hides the names: wrap with "
                "use_orig_params=True, or use fully_shard"
            )
        name = clean(raw_name)
        if owners.setdefault(name, param) is not param:
            raise ValueError(f"two parameters are {name!r} without wrapper prefixes: rename one")
        first = first_names.setdefault(param, name)
        found.flattened |= "_fsdp_wrapped_module" in raw
        found.names.append(name)
        if first != name:
            found.aliases[name] = first
        elif param.requires_grad:
            found.trainable[name] = param
        else:
            found.frozen.append(name)
    if need_trainable and not found.trainable:
        raise ValueError(
            f"the model has no trainable parameters ({len(found.frozen)} frozen ones): set "
            "requires_grad on those to train first"
        )
    return found


def unwrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules in its order, less wrappers, by paths as in :func:`find_parameters`.

    A module that is used in several places is there under each of its paths.
    """
    clean = _cleaner(model)
    # A wrapper comes before what it wraps, and both have one path: the last one written stays.
    return {clean(path): module for path, module in model.named_modules(remove_duplicate=False)}


def _cleaner(model: nn.Module) -> Callable[[str], str]:
    """A function that takes what wrappers add out of this model's paths."""
    # Only under a data-parallel wrapper is "module" not the user's own word.
    wrapped = {
        f"{path}.module".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _PARALLEL)
    }

    def clean(path: str) -> str:
        parts = path.split(".")
        return ".".join(
            part
            for i, part in enumerate(parts, start=1)
            if part not in _WRAPPERS and ".".join(parts[:i]) not in wrapped
        )

    return clean
