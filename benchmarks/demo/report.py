"""What people read: the tables in the terminal and the JSON of every number."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import nested_optim

from . import methods, stream
from .analysis import (
    CONFIDENCE,
    LEARNING_SPAN,
    LESS_LEARNING,
    LR_RULES,
    standard_errors_needed,
)
from .run import Run, Settings

READING_TITLES = {
    "known": "Task known: only its five logits compete (task-IL, chance 20%)",
    "unknown": "Task unknown: all ten logits compete (class-IL, chance 10%)",
}
COLUMNS = {
    "learning_accuracy": "LA",
    "old_digits": "old digits",
    "new_digits": "new digits",
    "forgetting": "forgetting",
}


def percent(figure: dict[str, float | None]) -> str:
    mean, spread = figure["mean"], figure["std"]
    assert mean is not None
    return f"{mean * 100:.1f}" + ("" if spread is None else f" ±{spread * 100:.1f}")


def print_identity(console: Console, identity: dict[str, Any]) -> None:
    console.print("\n[bold]1. AdamW replaced in one line[/bold]")
    console.print("[red]- optimizer = torch.optim.AdamW(model.parameters(), lr=lr)[/red]")
    console.print("[green]+ optimizer = NestedOptimizer(model.parameters(), lr=lr)[/green]")
    exact = "identical to the last bit" if identity["bit_identical"] else "not identical"
    console.print(
        f"{identity['steps']} steps, {exact}: max |difference| of the losses "
        f"{identity['max_abs_loss_difference']}, of the parameters "
        f"{identity['max_abs_parameter_difference']}"
    )


def print_levels(console: Console, results: dict[str, Any]) -> None:
    seeds = len(results["config"]["seeds"])
    console.print("\n[bold]2. Three levels[/bold]")
    console.print(
        f"From input to output the layers update every f = {methods.LEVELS} steps (windows of "
        "NestedOptimizer), or at every step with lr / f. The loop knows of no windows, so nothing "
        "is flushed between tasks; all windows close on a task's last step. Test accuracy in %, "
        f"mean ± standard deviation over {seeds} seeds. LA, learning accuracy: right after each "
        "task. Old and new digits: at the end. Forgetting: of the old digits, from right after "
        "their training to the end; -BWT, as there are two tasks. The lr is chosen on validation "
        "digits with the task known: learns best = LA, ends best = mean of old and new at the end."
    )
    for reading, title in READING_TITLES.items():
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("method")
        table.add_column("lr", justify="right", no_wrap=True)
        for heading in COLUMNS.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for rule in LR_RULES:
            block = results["by_lr_rule"][rule]
            table.add_section()
            table.add_row(f"[italic]{block['description']}:[/italic]")
            for row in block["methods"].values():
                edge = "*" if row["lr_at_edge_of_grid"] else ""
                cells = [percent(row[reading][name]) for name in COLUMNS]
                table.add_row(row["label"], f"{row['lr']:g}{edge}", *cells)
        console.print(table)
    if any(
        row["lr_at_edge_of_grid"]
        for block in results["by_lr_rule"].values()
        for row in block["methods"].values()
    ):
        console.print("* the edge of the lr grid: a better lr may lie beyond it.")
    _print_equal_learning(console, results)


def _print_equal_learning(console: Console, results: dict[str, Any]) -> None:
    equal = results["equal_learning"]
    table = Table(
        title="Old digits kept (task known) at equal learning accuracy, in %",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("method")
    for target in equal["learning_accuracy_targets"]:
        table.add_column(f"{target:.0%}", justify="right")
    for key, kept in equal["old_digits_kept"].items():
        cells = ["-" if value is None else f"{value * 100:.1f}" for value in kept]
        table.add_row(methods.BY_KEY[key].label, *cells)
    console.print(table)
    console.print(
        "Linear between the points of the lr grid, at the smallest lr that reaches this LA; -: the "
        "grid does not pass it."
    )
    table = Table(
        title="Old digits kept by the three levels minus those kept by",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("control")
    table.add_column(f"at LA {LESS_LEARNING:.0%}", justify="right", no_wrap=True)
    table.add_column("near the most learned", justify="right", no_wrap=True)
    for less, near in zip(equal["less_learned"], equal["near_most_learned"], strict=True):
        where = ""
        if near["gap"] is not None:
            low, high = near["learning_accuracy_range"]
            where = f" (LA {low * 100:.1f}-{high * 100:.1f})"
        table.add_row(methods.BY_KEY[near["control"]].label, _gap(less), _gap(near) + where)
    console.print(table)
    seeds = len(results["config"]["seeds"])
    rule = "one seed gives no standard error"
    if seeds > 1:
        rule = (
            f"± standard error; more than {standard_errors_needed(seeds):.1f} of them make a "
            f"difference ({CONFIDENCE:.0%} confidence)"
        )
    console.print(
        f"In points, {rule}. Near the most learned: the mean over the {LEARNING_SPAN * 100:.0f} "
        "points of LA below the most that both reach."
    )


def _gap(comparison: dict[str, Any]) -> str:
    if comparison["gap"] is None:
        return "-"
    error = comparison["standard_error"]
    return f"{comparison['gap'] * 100:+.1f}" + ("" if error is None else f" ±{error * 100:.1f}")


def print_timing(console: Console, timing: dict[str, Any]) -> None:
    console.print("\n[bold]3. Time spent in the optimizer[/bold]")
    table = Table()
    for heading in ("optimizer", "µs per step", "ratio to AdamW", "quartiles"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for row in timing.values():
        if isinstance(row, dict):
            low, high = row["ratio_quartiles"]
            table.add_row(
                row["label"],
                f"{row['microseconds_per_step']:.0f}",
                f"{row['ratio_to_adamw']:.2f}",
                f"{low:.2f}-{high:.2f}",
            )
    console.print(table)
    console.print(
        f"Medians over {timing['rounds']} rounds of {timing['steps_per_block']} steps, the "
        "optimizers taking turns, one thread. Tensors this small measure Python's share of a step "
        "more than arithmetic."
    )


def config(settings: Settings) -> dict[str, Any]:
    return {
        **asdict(settings),
        "tasks": list(stream.TASK_NAMES),
        "model": "MLP " + "-".join(map(str, stream.WIDTHS)) + ", ReLU",
        "test_share": stream.TEST_SHARE,
        "validation_share_of_rest": stream.VALIDATION_SHARE,
        "test_split_seed": stream.TEST_SPLIT_SEED,
        "frequencies_by_layer": list(methods.FREQUENCIES),
        "accumulation": methods.ACCUMULATE,
        "other_hyperparameters": "torch's defaults of AdamW (weight decay 0.01)",
        "flush_between_tasks": False,
    }


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nested_optim": nested_optim.__version__,
        "threads_per_process": 1,
    }


def run_records(runs: list[Run]) -> list[dict[str, Any]]:
    """R[i][j] of every single run."""
    return [{**asdict(run.job), "test": run.test, "validation": run.validation} for run in runs]
