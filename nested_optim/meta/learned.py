"""The learned parts of ``DeepNestedOptimizer``: where a param group holds them, how they train.

Each of three modules is one flat float32 tensor of weights in the first group, with what its Adam
needs, and the gradient gathered since the last meta update, beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import rules
from ..group_options import flat_option
from ..rules.deep_nested import Inputs
from . import networks
from .controller import multipliers
from .features import GROUP_FEATURES, TENSOR_FEATURES
from .momentum import corrections

#: module -> the option that switches it on
SWITCHES = {"controller": "learn_lr", "momentum": "learn_momentum", "mixing": "learn_mixing"}
PARTS = ("weights", "exp_avg", "exp_avg_sq", "grad")
#: Entries of the first group that training changes.
KEYS = (
    *(f"{module}_{part}" for module in SWITCHES for part in PARTS),
    "long_run",
    "global_step",
    "meta_updates",
)
#: Hidden layers of both networks.
LAYERS = 2

_BETAS, _EPS = (0.9, 0.99), 1e-8

#: What mixing weights' parameters are multiplied by; see ``networks.GAIN``.
MIXING_GAIN = networks.GAIN / 2

#: How far a step down a sum of cosines' gradients may take a module's weights. The derivative of a
#: multiplier's log by these weights has a length of 27 to 45 at the start, so that a multiplier
#: changes by a factor of about two at most.
TRUST = 0.02


def modules(group: Mapping[str, Any]) -> list[str]:
    """The learned modules that these options switch on."""
    found = [module for module, switch in SWITCHES.items() if group[switch]]
    if len(group["cms_frequencies"]) < 2 and "mixing" in found:
        found.remove("mixing")  # nothing to mix
    return found


def _network(group: Mapping[str, Any], module: str) -> tuple[int, int, int, int]:
    if module == "controller":
        return GROUP_FEATURES, group["controller_hidden_dim"], 1, LAYERS
    return TENSOR_FEATURES, group["momentum_hidden_dim"], 3, LAYERS


def size(group: Mapping[str, Any], module: str) -> int:
    """How many weights a module has."""
    if module == "mixing":
        return len(group["cms_frequencies"])
    return networks.size(*_network(group, module))


def start(first: Mapping[str, Any], module: str, like: Tensor) -> Tensor:
    """The weights that a module begins with: like this tensor, and not to be written to."""
    if module == "mixing":
        return torch.zeros(size(first, module), dtype=like.dtype, device=like.device)
    return networks.start_on(*_network(first, module), like.device, like.dtype)


def ensure(first: dict[str, Any], device: torch.device) -> None:
    """Make the tensors of the modules that are switched on, where there are none."""
    for module in modules(first):
        if first[f"{module}_weights"] is not None:
            continue
        like = torch.empty(0, dtype=torch.float32, device=device)
        weights = first[f"{module}_weights"] = start(first, module, like).clone()
        for part in PARTS[1:]:
            first[f"{module}_{part}"] = torch.zeros_like(weights)


def checked(options: dict[str, Any], where: str) -> dict[str, Any]:
    """The tensors as a group keeps them: all or none of a module, float32, beside its parameters.

    Raises:
        ValueError: one is missing or of another size.
    """
    canonical: dict[str, Any] = {}
    for module in SWITCHES:
        found = {f"{module}_{part}": options[f"{module}_{part}"] for part in PARTS}
        if all(value is None for value in found.values()):
            continue
        count = size(options, module)
        canonical.update((key, as_kept(options, key, count, where)) for key in found)
    return canonical


def as_kept(options: Mapping[str, Any], key: str, count: int, where: str) -> Tensor:
    """:func:`flat_option` of so many numbers."""
    return flat_option(options, key, count, "these sizes of networks and cms_frequencies", where)


def check_sizes(first: Mapping[str, Any], where: str) -> None:
    """Raise if the options do not fit the weights that there are."""
    for module in modules(first):
        flat = first[f"{module}_weights"]
        if flat is not None and flat.numel() != size(first, module):
            raise ValueError(
                f"{where}cms_frequencies, controller_hidden_dim and momentum_hidden_dim do not fit "
                f"the {module} that is there; choose them when building the optimizer"
            )


def weights(first: dict[str, Any], requires_grad: bool = False) -> dict[str, Tensor]:
    """The modules' weights in the dtype in which networks are computed, as new tensors.

    They are made first, where there are none.
    """
    ensure(first, first["params"][0].device)
    found = {}
    for module in modules(first):
        flat = first[f"{module}_weights"].detach()
        flat = flat.to(networks.wide_dtype(flat.device), copy=True)
        found[module] = flat.requires_grad_(requires_grad)
    return found


def inputs(
    options: dict[str, Any],
    flats: dict[str, Tensor],
    beta: float | Tensor,
    of_group: Tensor | None,
    of_tensors: Tensor | None,
) -> Inputs:
    """What the learned parts say to updates.

    Args:
        options: a group's; ``*_num_layers`` and ``controller_features`` where they are not ours.
        flats: the modules' weights.
        beta: decay rate of the fastest momentum, or ``(rows,)`` of them.
        of_group: ``(rows, GROUP_FEATURES)``, where there is a controller.
        of_tensors: ``(rows, TENSOR_FEATURES)``, where there is a learned momentum.

    Returns:
        ``(rows,)`` of each, ``mixing`` as ``(momenta,)``; None for what is switched off.
    """
    multiplier = scale = shift = damping = mixing = None
    if "controller" in flats:
        assert of_group is not None
        low, high = options["min_lr_mult"], options["max_lr_mult"]
        hidden = options["controller_hidden_dim"]
        layers = options.get("controller_num_layers", LAYERS)
        seen = of_group[:, : options.get("controller_features", GROUP_FEATURES)]
        multiplier = multipliers(flats["controller"], seen, hidden, layers, low, high)
    if "momentum" in flats:
        assert of_tensors is not None
        hidden = options["momentum_hidden_dim"]
        layers = options.get("momentum_num_layers", LAYERS)
        scale, shift, damping = corrections(flats["momentum"], of_tensors, hidden, layers, beta)
    if "mixing" in flats:
        flat = flats["mixing"]
        first = torch.arange(len(flat), device=flat.device) == 0
        mixing = networks.bounded(MIXING_GAIN * flat, -1.0, 1.0) + first
    return Inputs(multiplier, scale, shift, damping, mixing)


def inputs_of(
    options: dict[str, Any],
    flats: dict[str, Tensor],
    beta: float,
    of_group: Tensor | None,
    of_tensors: Tensor | None,
) -> Inputs:
    """The same for tensors of one group; the multiplier, of which there is one, is ``(1,)``."""
    like = next(iter(flats.values()), None)
    return inputs(
        options,
        flats,
        beta,
        None if of_group is None else of_group.to(like).unsqueeze(0),
        None if of_tensors is None else of_tensors.to(like),
    )


def gather(
    first: dict[str, Any], grads: Mapping[str, Tensor], length: Tensor | None = None
) -> None:
    """Add to the gradients gathered since the last meta update; one that is not finite is left
    out.

    Args:
        first: the group that holds them.
        grads: for each module one of its weights' shape.
        length: what they are divided by, 0-d; None divides by nothing.
    """
    for module, grad in grads.items():
        kept = first[f"{module}_grad"]
        grad = (grad.detach() if length is None else grad.detach() / length).to(kept)
        kept.add_(torch.where(torch.isfinite(grad).all(), grad, torch.zeros_like(grad)))


def meta_step(first: dict[str, Any], count: int, rule: str) -> Tensor:
    """One step of every module on the gradient gathered in ``count`` steps, which returns to 0.

    ``rule="adam"``: Adam on their mean. ``"cosine"``: down their sum, by ``TRUST`` at most.

    Returns:
        The norm of the controller's (or, without one, of all modules') mean gradient, 0-d.
    """
    first["meta_updates"] += 1
    norms: dict[str, Tensor] = {}
    for module in modules(first):
        flat, exp_avg, exp_avg_sq, total = (first[f"{module}_{part}"] for part in PARTS)
        grad = total / count
        norms[module] = torch.linalg.vector_norm(grad)
        if rule == "cosine":
            length = torch.linalg.vector_norm(total) * first["meta_lr"]
            flat.addcmul_(total, (TRUST / length).clamp(max=1.0), value=-first["meta_lr"])
            total.zero_()
            continue
        new = rules.adamw(
            flat,
            grad,
            exp_avg,
            exp_avg_sq,
            step=first["meta_updates"],
            lr=first["meta_lr"],
            betas=_BETAS,
            eps=_EPS,
            weight_decay=0.0,
        )
        for tensor, result in zip((flat, exp_avg, exp_avg_sq), new):
            tensor.copy_(result)  # type: ignore[arg-type]
        total.zero_()
    if "controller" in norms:
        return norms["controller"]
    total_norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return total_norm
