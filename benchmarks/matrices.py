"""``python -m benchmarks matrices``: M3's step and its Newton-Schulz beside torch's Muon.

On the hidden matrices of the models of the ``kernels`` suite, with random gradients. Contestants
are checked first and then take turns, so that what else the machine does hits all alike. Times are
medians, from an idle device to its last kernel; *host* is what ``step()`` keeps the host busy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Muon, Optimizer

from nested_optim import M3, kernels, rules
from nested_optim.orthogonalize import BACKENDS, orthogonalize

from .kernels import machine
from .kernels.shapes import MODELS
from .output import write_json
from .where import where

RESULTS = Path(__file__).resolve().parent / "results"
#: Steps of one sample: a whole chunk of M3's slow momentum.
CHUNK = 10
_EMBEDDINGS = ("wte", "embed_tokens")

#: M3's options, by the name of a contestant.
_OURS: dict[str, dict[str, Any]] = {
    "M3, alpha 0": {"alpha": 0.0},
    "M3, alpha .25": {"alpha": 0.25, "slow_frequency": CHUNK},
    "M3, alpha .25, row": {"alpha": 0.25, "slow_frequency": CHUNK, "second_moment": "row"},
}


def contestants(device: torch.device) -> dict[str, Callable[[list[Parameter]], Optimizer]]:
    """Muon and M3, the latter also on its kernels where there are any."""
    found: dict[str, Callable[[list[Parameter]], Optimizer]] = {
        "torch Muon": lambda p: Muon(p, adjust_lr_fn="match_rms_adamw")
    }
    ways: dict[str, dict[str, Any]] = {"": {"fused": False}}
    if kernels.available(device):
        ways[", fused"] = {"fused": True}
    for name, options in _OURS.items():
        for suffix, how in ways.items():
            found[name + suffix] = partial(M3, ns_dtype=torch.bfloat16, **options, **how)
    return found


def matrix_shapes(model: str, small: bool) -> list[tuple[int, ...]]:
    """The matrices of a model that are no token embeddings."""
    shapes = MODELS[model].quick() if small else MODELS[model].full()
    return [size for name, size in shapes if len(size) == 2 and name not in _EMBEDDINGS]


def random_parameters(shapes: list[tuple[int, ...]], device: torch.device) -> list[Parameter]:
    torch.manual_seed(0)
    params = [Parameter(0.02 * torch.randn(size, device=device)) for size in shapes]
    new_gradients(params)
    return params


def new_gradients(params: list[Parameter]) -> None:
    for p in params:
        p.grad = torch.randn_like(p)


def check(device: torch.device) -> dict[str, float]:
    """How far one contestant's steps are from what they should be, as a share of the movement.

    Raises:
        click.ClickException: one is too far; nothing it would take is worth measuring.
    """
    shapes = [*matrix_shapes("gpt2", True), (96, 40)]
    found = {}
    for name, build in contestants(device).items():
        if name == "torch Muon":
            continue
        params = random_parameters(shapes, device)
        exact = [Parameter(p.detach().double()) for p in params]
        start = [p.detach().clone() for p in exact]
        optimizer = build(params)
        options = {
            key: optimizer.param_groups[0][key]
            for key in ("alpha", "slow_frequency", "second_moment", "betas", "lr", "weight_decay")
        }
        rule = M3(exact, foreach=False, **options)
        for _ in range(CHUNK + 2):
            new_gradients(params)
            for p, q in zip(params, exact):
                assert p.grad is not None
                q.grad = p.grad.double()
            optimizer.step()
            rule.step()
        errors = [
            ((p.double() - q).norm() / (q - s).norm()).item()
            for p, q, s in zip(params, exact, start)
        ]
        found[name] = max(errors)
        if not found[name] < 0.1:  # bfloat16 products come to about a hundredth
            raise click.ClickException(
                f"{name} is {found[name]:.2g} of its movement away from the rule in float64"
            )
    return found


def spectra(shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Error and singular values of each form, for a Gaussian and an ill-conditioned matrix."""
    generator = torch.Generator(device).manual_seed(0)
    gaussian = torch.randn(shape, generator=generator, device=device)
    u, _, vh = torch.linalg.svd(gaussian, full_matrices=False)
    graded = (u * torch.logspace(0, -6, min(shape), device=device)) @ vh
    schedule = rules.ns_schedule("quintic", 5)
    found: dict[str, Any] = {}
    for kind, matrix in (("gaussian", gaussian), ("condition 1e6", graded)):
        truth = rules.newton_schulz(matrix.double(), schedule)
        for backend in _backends(device):
            [done] = orthogonalize([matrix[None]], schedule, dtype=torch.bfloat16, backend=backend)
            values = torch.linalg.svdvals(done[0].float())
            found.setdefault(kind, {})[backend] = {
                "error": ((done[0].double() - truth).norm() / truth.norm()).item(),
                "least": values.min().item(),
                "median": values.median().item(),
                "largest": values.max().item(),
            }
    return found


def _backends(device: torch.device) -> list[str]:
    return [b for b in BACKENDS if b != "symmetric" or device.type == "cuda"]


def in_turn(
    works: dict[str, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """(host, whole) seconds of each work, one of each in turn, after one that does not count."""

    def timed(work: Callable[[], Any]) -> tuple[float, float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        host = time.perf_counter() - started
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return host, time.perf_counter() - started

    for work in works.values():
        timed(work)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    started = time.perf_counter()
    while len(times[next(iter(works))]) < 3 or time.perf_counter() - started < seconds:
        for name, work in works.items():
            times[name].append(timed(work))
    return times


def measure_forms(
    shapes: list[tuple[int, ...]], device: torch.device, seconds: float
) -> dict[str, Any]:
    """All of a model's matrices through Newton-Schulz, by each form."""
    torch.manual_seed(0)
    matrices: list[Tensor] = [torch.randn(1, *size, device=device) for size in shapes]
    schedule = rules.ns_schedule("quintic", 5)

    def run(backend: str) -> None:
        orthogonalize(matrices, schedule, dtype=torch.bfloat16, backend=backend)

    works = {b: lambda b=b: run(b) for b in _backends(device)}  # type: ignore[misc]
    times = in_turn(works, device, seconds)
    medians = {b: statistics.median(whole for _, whole in times[b]) for b in works}
    return {b: {"ms": 1e3 * medians[b], "times_faster": medians["bmm"] / medians[b]} for b in works}


def measure_steps(
    shapes: list[tuple[int, ...]], device: torch.device, seconds: float
) -> dict[str, Any]:
    """Mean steps over a chunk, and how much memory state and a step take."""
    members = {}
    for name, build in contestants(device).items():
        params = random_parameters(shapes, device)
        members[name] = (params, build(params))

    def chunk(params: list[Parameter], optimizer: Optimizer) -> None:
        for _ in range(CHUNK):
            optimizer.step()

    works = {name: lambda m=m: chunk(*m) for name, m in members.items()}  # type: ignore[misc]
    times = in_turn(works, device, seconds)
    reference = statistics.median(whole for _, whole in times["torch Muon"])
    found = {}
    for name, samples in times.items():
        params, optimizer = members[name]
        whole = statistics.median(w for _, w in samples)
        elements = sum(p.numel() for p in params)
        state = [t for p in params for t in optimizer.state[p].values() if isinstance(t, Tensor)]
        found[name] = {
            "ms": 1e3 * whole / CHUNK,
            "host_ms": 1e3 * statistics.median(h for h, _ in samples) / CHUNK,
            "ratio": whole / reference,
            "state_bytes_per_parameter": sum(t.numel() * t.element_size() for t in state)
            / elements,
            "step_bytes": _peak(optimizer, device),
            "samples": len(samples),
            "where_ms": where(works[name], device, CHUNK),
        }
    return found


def _peak(optimizer: Optimizer, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    optimizer.step()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def tables(models: dict[str, Any]) -> list[Table]:
    drawn = []
    for name, model in models.items():
        steps = Table(title=f"{name}: {model['matrices']} matrices, mean step of {CHUNK}")
        for title in ("optimizer", "step", "of it on the host", "ratio", "state B/param"):
            steps.add_column(title, justify="left" if title == "optimizer" else "right")
        for contestant, row in model["steps"].items():
            steps.add_row(
                contestant,
                f"{row['ms']:.2f} ms",
                f"{row['host_ms']:.2f} ms",
                f"{row['ratio']:.3f}",
                f"{row['state_bytes_per_parameter']:.1f}",
            )
        forms = Table(title=f"{name}: Newton-Schulz alone, five quintic steps")
        for title in ("form", "time", "times as fast", "error, Gaussian", "error, condition 1e6"):
            forms.add_column(title, justify="left" if title == "form" else "right")
        for backend, row in model["forms"].items():
            errors = [
                max(kinds[kind][backend]["error"] for kinds in model["accuracy"].values())
                for kind in ("gaussian", "condition 1e6")
            ]
            forms.add_row(
                backend,
                f"{row['ms']:.2f} ms",
                f"{row['times_faster']:.2f}",
                *(f"{error:.1e}" for error in errors),
            )
        drawn += [steps, forms]
    return drawn


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(["gpt2", "llama"]))
@click.option("--seconds", type=click.FloatRange(min=0.0), default=10.0, show_default=True)
@click.option("--device", "device_name", default="auto", show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results of this checkout",
    help="Folder for matrices-<device's name>.json (with --small ...-small.json, with --quick "
    "matrices-quick.json).",
)
@click.option("--small", is_flag=True, help="Small matrices, which a CPU can take.")
@click.option("--quick", is_flag=True, help="Small matrices, three samples: a look.")
def matrices(
    models: tuple[str, ...], seconds: float, device_name: str, out: Path, small: bool, quick: bool
) -> None:
    """M3's step and its Newton-Schulz, beside torch's Muon; on a CPU with --small or --quick."""
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
        "largest_error_of_steps": check(device),
        "models": {},
    }
    for name in models or ("gpt2", "llama"):
        shapes = matrix_shapes(name, small or quick)
        document["models"][name] = {
            "matrices": len(shapes),
            "accuracy": {
                "x".join(map(str, size)): spectra(size, device) for size in sorted(set(shapes))
            },
            "forms": measure_forms(shapes, device, seconds),
            "steps": measure_steps(shapes, device, seconds),
        }
    name = f"matrices-{machine.slug(device)}" + ("-small" if small else "")
    name = "matrices-quick" if quick else name
    write_json(document, out / f"{name}.json")
    for table in tables(document["models"]):
        console.print(table)
    console.print(f"{out / name}.json written")
