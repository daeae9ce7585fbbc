"""The optimizers that are timed, all with the same hyperparameters.

Everything goes through public constructors. A package that is not installed is named in the
results and left out.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from nested_optim import M3, NestedOptimizer

from .shapes import split_evenly

Options = dict[str, Any]
ADAMW: Options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
#: Frequencies of the mix, each for a third of the bytes.
MIX = (1, 10, 100)
MIX_LABEL = "/".join(map(str, MIX))

Make = Callable[[list[Parameter], list[int], Options], Optimizer]


def every_tensor(shapes: Sequence[Sequence[int]]) -> list[int]:
    return list(range(len(shapes)))


def matrices(shapes: Sequence[Sequence[int]]) -> list[int]:
    return [i for i, size in enumerate(shapes) if len(size) == 2]


@dataclass(frozen=True)
class Contestant:
    key: str
    label: str
    make: Make
    own: bool = False
    mixed: bool = False
    #: Its rule is AdamW's, so it is checked against the reference.
    is_adamw: bool = True
    #: Its eps acts as in torch's AdamW, not only in being small.
    eps_is_added: bool = True
    select: Callable[[Sequence[Sequence[int]]], list[int]] = every_tensor
    #: Distribution and module that it comes in, for a peer that is not part of torch.
    distribution: str = "torch"
    module: str = "torch"
    device_type: str | None = None  # None: any
    most_tensors: int | None = None
    note: str = ""

    def frequencies(self, params: Sequence[Parameter]) -> list[int]:
        if not self.mixed:
            return [1] * len(params)
        chosen = split_evenly([p.numel() * p.element_size() for p in params], len(MIX))
        return [MIX[part] for part in chosen]

    def missing(self) -> str | None:
        """Why it cannot take part on this machine, or None."""
        if self.key == "torch-muon" and not hasattr(torch.optim, "Muon"):
            return f"not installed: torch {torch.__version__} has no Muon"
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: pip install {self.distribution}"
        return None

    def unfit(self, shapes: Sequence[Sequence[int]]) -> str | None:
        """Why it cannot take part on these shapes, or None."""
        if not self.select(shapes):
            return "not applicable: no matrices"
        if self.most_tensors is not None and len(shapes) > self.most_tensors:
            return f"not run: it compiles all tensors into one graph, here {len(shapes):,}"
        return None

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def nested(**flags: Any) -> Make:
    def make(params: list[Parameter], frequencies: list[int], options: Options) -> Optimizer:
        groups = [
            {"params": [p for p, g in zip(params, frequencies) if g == f], "frequency": f}
            for f in sorted(set(frequencies))
        ]
        return NestedOptimizer(groups, **options, **flags)

    return make


def torch_adamw(**flags: Any) -> Make:
    return lambda params, frequencies, options: AdamW(params, **options, **flags)


def m3(params: list[Parameter], frequencies: list[int], options: Options) -> Optimizer:
    return M3(params, lr=options["lr"], weight_decay=options["weight_decay"])


def torch_muon(params: list[Parameter], frequencies: list[int], options: Options) -> Optimizer:
    muon: Any = getattr(torch.optim, "Muon")  # noqa: B009  (older releases have none)
    return muon(params, lr=options["lr"], weight_decay=options["weight_decay"])


def heavyball_adamw(params: list[Parameter], frequencies: list[int], options: Options) -> Optimizer:
    heavyball = importlib.import_module("heavyball")
    optimizer: Optimizer = heavyball.AdamW(params, **options)
    # It would clear p.grad in step(), and setting it again would be part of what is timed.
    optimizer.consume_grad = False  # type: ignore[attr-defined]
    return optimizer


def optimi_adamw(params: list[Parameter], frequencies: list[int], options: Options) -> Optimizer:
    optimi = importlib.import_module("optimi")
    on_cuda = params[0].is_cuda
    # Without Kahan summation, so that the state is that of the others in bfloat16 too.
    optimizer: Optimizer = optimi.AdamW(params, **options, kahan_sum=False, triton=on_cuda)
    return optimizer


def flash_adamw(params: list[Parameter], frequencies: list[int], options: Options) -> Optimizer:
    package = importlib.import_module("pytorch_optimizer")
    optimizer: Optimizer = package.FlashAdamW(params, **options, quantize=False)
    return optimizer


BASELINE = "torch-fused"

OWN = (
    Contestant("nested", "NestedOptimizer, f = 1", nested(), own=True),
    Contestant("nested-mix", f"NestedOptimizer, f = {MIX_LABEL}", nested(), own=True, mixed=True),
    # foreach is the default on a CPU, so there the other path is torch's fused kernel.
    Contestant(
        "nested-foreach",
        "NestedOptimizer foreach, f = 1",
        nested(foreach=True),
        own=True,
        device_type="cuda",
    ),
    Contestant(
        "nested-foreach-mix",
        f"NestedOptimizer foreach, f = {MIX_LABEL}",
        nested(foreach=True),
        own=True,
        mixed=True,
        device_type="cuda",
    ),
    Contestant(
        "nested-fused",
        "NestedOptimizer fused, f = 1",
        nested(fused=True),
        own=True,
        device_type="cpu",
    ),
    Contestant(
        "nested-fused-mix",
        f"NestedOptimizer fused, f = {MIX_LABEL}",
        nested(fused=True),
        own=True,
        mixed=True,
        device_type="cpu",
    ),
    Contestant(
        "m3",
        "M3, matrices only",
        m3,
        own=True,
        is_adamw=False,
        select=matrices,
        note="another rule, on the matrices only, checked and taken apart by the suite `matrices`",
    ),
)

PEERS = (
    Contestant(BASELINE, "torch AdamW fused", torch_adamw(fused=True)),
    Contestant("torch-foreach", "torch AdamW foreach", torch_adamw(foreach=True)),
    Contestant("torch-loop", "torch AdamW for-loop", torch_adamw(foreach=False, fused=False)),
    Contestant(
        "torch-muon",
        "torch Muon, matrices only",
        torch_muon,
        is_adamw=False,
        select=matrices,
        note="another rule, on the matrices only",
    ),
    Contestant(
        "optimi",
        "optimi AdamW",
        optimi_adamw,
        distribution="torch-optimi",
        module="optimi",
        note="its Triton kernel on CUDA; without Kahan summation",
    ),
    Contestant(
        "pytorch_optimizer",
        "pytorch_optimizer FlashAdamW",
        flash_adamw,
        distribution="pytorch_optimizer",
        module="pytorch_optimizer",
        note="unquantized; this package's AdamW is torch.optim.AdamW itself",
    ),
    # Last: what it compiles may leave processes at work.
    Contestant(
        "heavyball",
        "heavyball AdamW",
        heavyball_adamw,
        eps_is_added=False,
        distribution="heavyball",
        module="heavyball",
        most_tensors=1000,
        note="compiled by torch.compile; float32 moments, stochastic rounding; max(sqrt(v), eps)",
    ),
)

BY_KEY = {c.key: c for c in (*OWN, *PEERS)}


def field(device: torch.device, peers: Sequence[str]) -> list[Contestant]:
    """Who takes part: the baseline, NestedOptimizer on its paths, the peers that were asked for."""
    own = [c for c in OWN if c.device_type in (None, device.type)]
    return [BY_KEY[BASELINE], *own, *(c for c in PEERS if c.key in peers and c.key != BASELINE)]
