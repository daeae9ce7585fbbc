r"""What the whole way says: does the loss still fall along the way from where training began?

The next loss says what the last update was worth, and there every rate that makes progress along
flat directions is too large for the steep ones, which dominate the product of a gradient with one
update. Over many updates steps along steep directions cancel, and progress adds up. So the
controller is also taught by the derivative of the loss by the length of the way,

.. math::
    \frac{\partial}{\partial \alpha} L(\theta_0 + e^\alpha (\theta - \theta_0))
        = \langle g, \theta - \theta_0 \rangle \quad (\alpha = 0),

which is what a multiplier of all updates so far would have changed, if it had changed no gradient.
Lengths divide it, as they do what the next loss says: it is the cosine of gradient and way, and
only every :data:`EVERY` steps are looked at, each for as many.

It counts by how sure it is, c = t^2 / (t^2 + DOUBT^2), where t is the mean of the cosines of late
over its standard error; and where the two disagree, the next losses count by 1 - c. So multipliers
do not fall on one step's word while the way is clearly a good one, and do where it leads nowhere.
Momentum and mixture go by the next loss alone: it speaks of the shape of updates there, too, and
what it takes from their length multipliers can give back.

Of all this one flat float32 tensor is kept, ``long_run`` of the first group: count, mean and sum of
squares of the cosines, which fade, and the gradient gathered for the controller since the last meta
update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _get_value

from ..rules.deep_nested import way
from . import learned
from .controller import log_multipliers
from .features import beside
from .networks import wide_dtype
from .simple import Due, seen_of_group

#: Steps per look.
EVERY = 5
#: What earlier looks count for after one more.
FADES = 0.98
#: How many standard errors from 0 a mean is half sure.
DOUBT = 2.0
#: Count, mean, sum of squares; the count that a standard error takes.
_STATISTICS, _ENOUGH = 3, 3.5


class Look(NamedTuple):
    """The groups that are looked at in a step, in their order.

    Attributes:
        at: their places among the step's.
        steps: how many steps each look stands for.
    """

    at: list[int]
    steps: list[int]


def is_on(first: Mapping[str, Any]) -> bool:
    """Whether these options ask for it, and have a controller to teach."""
    return (
        first["horizon"] == "run"
        and first["mode"] == "simple"
        and first["meta_rule"] == "cosine"
        and "controller" in learned.modules(first)
    )


def size(first: Mapping[str, Any]) -> int:
    """How many numbers are kept."""
    return _STATISTICS + learned.size(first, "controller")


def ensure(first: dict[str, Any]) -> None:
    """Make the tensor beside the controller's, where there is none."""
    if first["long_run"] is None:
        first["long_run"] = first["controller_weights"].new_zeros(size(first))


def checked(options: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The tensor as a group keeps it, if it is there.

    Raises:
        ValueError: it is of another size.
    """
    if options["long_run"] is None:
        return {}
    return {"long_run": learned.as_kept(options, "long_run", size(options), where)}


def look(state: Any, dues: Sequence[Due]) -> Look | None:
    """Which groups are looked at now, before they are updated; None for none.

    A group of frequency f every ``EVERY // f`` updates, at least at each.
    """
    found = Look([], [])
    for d, (group, params, _) in enumerate(dues):
        kept = state[params[0]]
        every = max(1, EVERY // group["frequency"])
        known = kept.keys() >= {"initial_param", "update_trace"}
        if not known or (count := int(_get_value(kept["step"]))) < 1 or (count + 1) % every:
            continue
        found.at.append(d)
        found.steps.append(every * group["frequency"])
    return found if found.at else None


def _measure(first: Mapping[str, Any], state: Any, due: Due) -> Tensor:
    """``(3,)``: sums over a group's parameters of :func:`way`."""
    home = first["params"][0].device
    rows = [
        way(grad, p.detach(), state[p]["initial_param"])
        for p, grad in zip(due.params, due.grads)
        if "initial_param" in state[p]
    ]
    return torch.stack([row.to(home, wide_dtype(home)) for row in rows]).sum(0)


def learn(first: dict[str, Any], state: Any, dues: Sequence[Due], seen: Look) -> None:
    """Gather what the ways of these groups say, before they are updated.

    What is not finite is left out. ``kernels.look_back`` does the same on a device.

    Args:
        first: the group that holds what is learned.
        state: of the parameters.
        dues: the step's groups.
        seen: which of them are looked at.
    """
    ensure(first)
    kept = first["long_run"]
    looked = [dues[at] for at in seen.at]
    sums = torch.stack([_measure(first, state, due) for due in looked])
    # What the controller saw at the groups' last updates.
    traces = [state[due.params[0]]["update_trace"] for due in looked]
    features = torch.stack([seen_of_group(trace).to(sums) for trace in traces])
    signs = [-1.0 if due.group["maximize"] else 1.0 for due in looked]
    along = sums[:, 0] * beside(sums, signs)
    cosines = along / sums[:, 1:].sum(0).prod().sqrt()
    flat = first["controller_weights"].detach().to(sums).requires_grad_()
    with torch.enable_grad():
        logs = log_multipliers(
            flat,
            features,
            first["controller_hidden_dim"],
            learned.LAYERS,
            first["min_lr_mult"],
            first["max_lr_mult"],
        )
        said = cosines * beside(sums, list(map(float, seen.steps)))
        (grad,) = torch.autograd.grad(logs, flat, said)
    count, mean, squares = kept[:_STATISTICS].to(sums).unbind()
    count = FADES * count + 1
    off = -cosines.sum() - mean
    later = mean + off / count
    statistics = torch.stack([count, later, FADES * squares + off * (off - off / count)])
    new = torch.cat([statistics, kept[_STATISTICS:].to(sums) + grad])
    # A gradient of zeros, or a way of none, has no angle.
    kept.copy_(torch.where(torch.isfinite(new).all(), new.to(kept), kept))


def shares(first: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What share of what the ways and of what the next losses said counts now, 0-d each."""
    kept = first["long_run"].to(wide_dtype(first["long_run"].device))
    count, mean, squares = kept[:_STATISTICS].unbind()
    known = mean.square()
    total = known + DOUBT**2 * squares / count.square()
    # Cosines of exactly 0 have no error, and say nothing.
    sure = torch.where((count > _ENOUGH) & (total > 0), known / total, 0.0)
    along = torch.dot(kept[_STATISTICS:], first["controller_grad"].to(kept))
    return sure, torch.where(along < 0, 1 - sure, 1.0)


def join(first: dict[str, Any]) -> None:
    """Before a meta update: the controller's gathered gradient becomes that of both."""
    gathered, of_next = first["long_run"][_STATISTICS:], first["controller_grad"]
    sure, rest = (share.to(of_next) for share in shares(first))
    of_next.mul_(rest).add_(sure * gathered)
    gathered.zero_()
