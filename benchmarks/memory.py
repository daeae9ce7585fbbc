"""``python -m benchmarks memory``: what a weight memory adds to the step of an optimizer.

On the parameters of the models of the ``kernels`` suite, with random gradients. A sample is as many
steps as the slowest level's frequency, so that it holds every exchange as often as training does.
Contestants are checked first and then take turns. Times are medians, from an idle device to its
last kernel; *host* is what ``step()`` keeps the host busy.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nested_optim import NestedOptimizer, WeightMemory
from nested_optim.weight_memory import memory_of

from .kernels import machine
from .kernels.shapes import MODELS
from .matrices import in_turn, new_gradients, random_parameters
from .output import write_json

RESULTS = Path(__file__).resolve().parent / "results"
FREQUENCIES = (10, 50)
CYCLE = FREQUENCIES[-1]
LR = 1e-4

Build = Callable[[list[Parameter]], Optimizer]


def _adamw(params: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=LR, fused=True)


def _foreach(params: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=LR, foreach=True)


def _nested(params: list[Parameter]) -> Optimizer:
    return NestedOptimizer(params, lr=LR)


def _with(build: Build, **options: Any) -> Build:
    def built(params: list[Parameter]) -> Optimizer:
        optimizer = build(params)
        WeightMemory(optimizer, FREQUENCIES, **options)
        return optimizer

    return built


def _apart(build: Build) -> Build:
    """Without the exchanges that our kernels do on the way."""

    def built(params: list[Parameter]) -> Optimizer:
        optimizer = _with(build)(params)

        def forget(optimizer: Any, *_: Any) -> None:
            if optimizer._fused is not None:
                optimizer._fused.exchange = None

        optimizer.register_step_pre_hook(forget)  # after the memory's own, which asks
        return optimizer

    return built


def _with_unused(build: Build) -> Build:
    """With a further parameter that never gets a gradient, as a frozen layer's."""

    def built(params: list[Parameter]) -> Optimizer:
        return build([*params, Parameter(torch.zeros(8, device=params[0].device))])

    return built


def _with_average(build: Build) -> Build:
    """torch's own average of the weights at every step, for comparison."""

    def built(params: list[Parameter]) -> Optimizer:
        optimizer = build(params)
        model = torch.nn.ParameterList(params)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(model))
        return optimizer

    return built


#: Each beside the optimizer that it is a share of.
CONTESTANTS: dict[str, tuple[str, Build]] = {
    "AdamW, fused": ("AdamW, fused", _adamw),
    "... with a memory": ("AdamW, fused", _with(_adamw)),
    "... and a parameter without gradients": ("AdamW, fused", _with_unused(_with(_adamw))),
    "... counted on the device": ("AdamW, fused", _with(_adamw, capturable=True)),
    "... with bfloat16 copies": ("AdamW, fused", _with(_adamw, dtype=torch.bfloat16)),
    "... with torch's EMA": ("AdamW, fused", _with_average(_adamw)),
    "AdamW, foreach": ("AdamW, foreach", _foreach),
    "... foreach, with a memory": ("AdamW, foreach", _with(_foreach)),
    "NestedOptimizer": ("NestedOptimizer", _nested),
    "NestedOptimizer with a memory": ("NestedOptimizer", _with(_nested)),
    "... and with one without gradients": ("NestedOptimizer", _with_unused(_with(_nested))),
    "... exchanged apart": ("NestedOptimizer", _apart(_nested)),
}


def check(device: torch.device) -> float:
    """The largest difference, after a cycle, of a memory on this device from one in float64.

    Raises:
        click.ClickException: it is too large for the times to mean anything.
    """
    params = random_parameters([(300, 70), (129,), (5,)], device)
    exact = [Parameter(p.detach().cpu().double()) for p in params]
    optimizers = [_with(_adamw)(params), _with(_adamw)(exact)]
    for _ in range(CYCLE):
        new_gradients(params)
        for p, q in zip(params, exact):
            assert p.grad is not None
            q.grad = p.grad.cpu().double()
        for optimizer in optimizers:
            optimizer.step()
    worst = 0.0
    for level in range(len(FREQUENCIES) + 1):
        found, wanted = (memory_of(o).weights(level) for o in optimizers)  # type: ignore[union-attr]
        for a, b in zip(found, wanted):
            worst = max(worst, float((a.cpu().double() - b).detach().abs().max()))
    if not worst < 1e-5:
        raise click.ClickException(f"the levels are up to {worst:.2g} away from float64")
    return worst


def measure(
    shapes: list[tuple[int, ...]], device: torch.device, seconds: float
) -> dict[str, dict[str, Any]]:
    """Mean times of a step over a cycle, and state, of every contestant."""
    members = {}
    for name, (_, build) in CONTESTANTS.items():
        params = random_parameters(shapes, device)
        members[name] = (params, build(params))

    def cycle(optimizer: Optimizer) -> None:
        for _ in range(CYCLE):
            optimizer.step()

    works = {name: lambda o=o: cycle(o) for name, (_, o) in members.items()}  # type: ignore[misc]
    times = in_turn(works, device, seconds)
    whole = {name: statistics.median(w for _, w in samples) for name, samples in times.items()}
    found = {}
    for name, samples in times.items():
        params, optimizer = members[name]
        elements = sum(p.numel() for p in params)
        kept = (k for p in params for k in optimizer.state[p].items() if isinstance(k[1], Tensor))
        sizes = [t.numel() * t.element_size() for key, t in kept if key.startswith("memory_")]
        found[name] = {
            "ms": 1e3 * whole[name] / CYCLE,
            "host_ms": 1e3 * statistics.median(h for h, _ in samples) / CYCLE,
            "share_added": whole[name] / whole[CONTESTANTS[name][0]] - 1,
            "memory_bytes_per_parameter": sum(sizes) / elements,
            "samples": len(samples),
        }
    return found


def table(name: str, model: dict[str, Any]) -> Table:
    drawn = Table(title=f"{name}: {model['parameters'] / 1e6:.0f}M parameters, mean of {CYCLE}")
    for title in ("optimizer", "step", "of it on the host", "added", "copies, B/param"):
        drawn.add_column(title, justify="left" if title == "optimizer" else "right")
    for contestant, row in model["steps"].items():
        drawn.add_row(
            contestant,
            f"{row['ms']:.3f} ms",
            f"{row['host_ms']:.3f} ms",
            f"{100 * row['share_added']:+.1f} %" if row["share_added"] else "",
            f"{row['memory_bytes_per_parameter']:.1f}",
        )
    return drawn


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)))
@click.option("--seconds", type=click.FloatRange(min=0.0), default=10.0, show_default=True)
@click.option("--device", "device_name", default="auto", show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for memory-<device's name>.json (with --quick memory-quick.json).",
)
@click.option("--quick", is_flag=True, help="Small models, three samples: a look.")
def memory(
    models: tuple[str, ...], seconds: float, device_name: str, out: Path, quick: bool
) -> None:
    """What a weight memory adds to a step."""
    try:
        device = machine.pick_device(device_name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from None
    seconds = 0.0 if quick else seconds
    console = Console() if Console().is_terminal else Console(width=120)
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "machine": machine.describe(device),
        "versions": machine.versions([]),
        "frequencies": FREQUENCIES,
        "largest_error": check(device),
        "models": {},
    }
    for name in models or ("gpt2",):
        named = MODELS[name].quick() if quick else MODELS[name].full()
        shapes = [size for _, size in named]
        parameters = sum(torch.Size(size).numel() for size in shapes)
        steps = measure(shapes, device, seconds)
        document["models"][name] = {"parameters": parameters, "steps": steps}
    name = "memory-quick" if quick else f"memory-{machine.slug(device)}"
    write_json(document, out / f"{name}.json")
    for model_name, model in document["models"].items():
        console.print(table(model_name, model))
    console.print(f"{out / name}.json written")
