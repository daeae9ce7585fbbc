"""What people read: the tables in the terminal and the JSON of every number."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..demo import report as demo_report
from . import aggregate, models, stream, sweep, training
from .data import Dataset
from .methods import LIVE, PRESET_READ_OUT
from .sweep import Row, Settings

READING_TITLES = {
    "task_il": "task-IL: only the task's own {own} logits compete (chance {chance:.0%})",
    "class_il": "class-IL: all classes seen so far compete",
}
COLUMNS = {
    "final_accuracy": "final",
    "average_incremental_accuracy": "avg. incremental",
    "learning_accuracy": "LA",
    "backward_transfer": "BWT",
    "forgetting": "forgetting",
    "stability_gap": "stability gap",
    "min_accuracy": "min",
}
LEGEND = (
    "R[i][j]: accuracy on task j after task i of T. final: mean of R[T][j]. avg. incremental: mean "
    "over i of the mean of R[i][j], j <= i. LA, learning accuracy: mean of R[j][j]. BWT: mean of "
    "R[T][j] - R[j][j], j < T. forgetting: mean of max over l < T of R[l][j] - R[T][j]. stability "
    "gap: what earlier tasks lose for a while during a task and have again at its end. min: lowest "
    "accuracy of a task after the next one began. In %, mean ± standard deviation over seeds."
)


def document(rows: list[Row], data: Dataset, settings: Settings, device: str) -> dict[str, Any]:
    """Everything that tables and figures are made of."""
    chosen = headline(rows)
    drawn = {id(row) for row in to_draw(rows, settings)}
    records = []
    for row in rows:
        joint = row.method.joint
        record: dict[str, Any] = {
            "method": row.method.key,
            "label": row.method.label,
            "kind": row.method.kind,
            "settings": row.method.settings,
            "read_out": row.read_out,
            "headline": row in chosen,
            "lr": row.lr,
            "lr_at_edge_of_grid": row.at_edge,
            "selection": row.sweep,
            "figures": aggregate.over_seeds(row.runs, row.read_out, joint=joint),
            "accuracy_matrix": {
                reading: aggregate.mean_matrix(row.runs, row.read_out, reading)
                for reading in training.READINGS
            },
            "seconds_per_run": statistics.fmean(run["seconds"] for run in row.runs),
        }
        if id(row) in drawn and not joint:
            record["curve"] = aggregate.mean_curve(row.runs, row.read_out)
        records.append(record)
    return {
        "config": config(data, settings),
        "machine": {
            **demo_report.machine(),
            "device": device,
            "runs_on": sorted({run["device"] for row in rows for run in row.runs}),
            "gpu_of_this_process": (
                torch.cuda.get_device_name(device) if device.startswith("cuda") else None
            ),
        },
        "rows": records,
        "comparisons": comparisons(rows, settings),
    }


def config(data: Dataset, settings: Settings) -> dict[str, Any]:
    return {
        "stream": data.name,
        "tasks": data.tasks,
        "classes_per_task": data.classes_per_task,
        "train_samples": len(data.train[1]),
        "test_samples": len(data.test[1]),
        "model": models.describe(data.model),
        "lr_divisors_and_window_frequencies": models.LEVELS[models.DEPTHS[data.model]],
        "weight_decay": 0.0,
        "epochs": settings.epochs,
        "batch": settings.batch,
        "replay": settings.replay,
        "replayed_per_batch": settings.batch if settings.replay else 0,
        "criterion": f"final accuracy, {settings.criterion}",
        "seeds": list(range(settings.seeds)),
        "selection_seeds": [
            sweep.FIRST_SELECTION_SEED + i for i in range(settings.selection_seeds)
        ],
        "selection_samples": (
            "the data's own validation samples"
            if data.validation is not None
            else f"{stream.VALIDATION_SHARE:.0%} of each class's training samples, not trained on"
        ),
        "grid_may_grow_by": settings.growth,
    }


def headline(rows: list[Row]) -> list[Row]:
    """One row for each method: a preset's own read-out, else the best on the selection seeds."""
    found: dict[str, Row] = {}
    for row in rows:
        held = found.get(row.method.key)
        if held is None or _rank(row) > _rank(held):
            found[row.method.key] = row
    return list(found.values())


def _rank(row: Row) -> tuple[bool, float]:
    return row.read_out == PRESET_READ_OUT, row.score


def to_draw(rows: list[Row], settings: Settings) -> list[Row]:
    """AdamW, the best control, the best of what else there is, the best memory: with curves."""
    found = [row for row in rows if row.method.key == "adamw" and row.read_out == LIVE]
    for kind in ("control", "other", "memory"):
        of_kind = [row for row in headline(rows) if row.method.kind == kind and row not in found]
        if of_kind:
            found.append(max(of_kind, key=lambda row: row.score))
    return found


def final(row: Row, reading: str) -> list[float]:
    runs = [
        aggregate.run_metrics(run, row.read_out, joint=row.method.joint)[reading]
        for run in row.runs
    ]
    return [run["final_accuracy"] for run in runs]


def comparisons(rows: list[Row], settings: Settings) -> list[dict[str, Any]]:
    """Each memory beside the control that ends best on the reported seeds, paired by seed."""
    reading = settings.criterion
    controls = [row for row in rows if row.method.kind == "control"]
    if not controls:
        return []
    best = max(controls, key=lambda row: statistics.fmean(final(row, reading)))
    found = []
    for row in headline(rows):
        if row.method.kind != "memory":
            continue
        gaps = [a - b for a, b in zip(final(row, reading), final(best, reading))]
        learning = [
            aggregate.run_metrics(a, row.read_out)["task_il"]["learning_accuracy"]
            - aggregate.run_metrics(b, best.read_out)["task_il"]["learning_accuracy"]
            for a, b in zip(row.runs, best.runs)
        ]
        found.append(
            {
                "memory": _name(row),
                "best_control": _name(best),
                "reading": reading,
                "gap": statistics.fmean(gaps),
                "standard_error": standard_error(gaps),
                "learning_accuracy_gap": statistics.fmean(learning),
                "learning_accuracy_standard_error": standard_error(learning),
            }
        )
    return found


def standard_error(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def _name(row: Row) -> str:
    return row.method.label if row.read_out == LIVE else f"{row.method.label}, {row.read_out}"


def name_of(record: dict[str, Any]) -> str:
    """The name of a row in the JSON."""
    if record["read_out"] == LIVE:
        return str(record["label"])
    return f"{record['label']}, {record['read_out']}"


def show(console: Console, results: dict[str, Any]) -> None:
    settings = results["config"]
    replay = f"reservoir of {settings['replay']}" if settings["replay"] else "no replay"
    chance = 1 / settings["classes_per_task"]
    for reading, title in READING_TITLES.items():
        heading = title.format(own=settings["classes_per_task"], chance=chance)
        table = Table(title=f"{settings['stream']}, {replay}; {heading}", title_justify="left")
        table.add_column("method")
        table.add_column("read-out")
        table.add_column("lr", justify="right", no_wrap=True)
        for column in COLUMNS.values():
            table.add_column(column, justify="right", no_wrap=True)
        before = None
        for row in results["rows"]:
            if row["kind"] != before:
                table.add_section()
            before = row["kind"]
            figures = row["figures"][reading]
            cells = [percent(figures.get(name)) for name in COLUMNS]
            edge = "*" if row["lr_at_edge_of_grid"] else ""
            style = "bold" if row["headline"] else ""
            table.add_row(
                row["label"], row["read_out"], f"{row['lr']:g}{edge}", *cells, style=style
            )
        console.print(table)
    console.print(LEGEND, markup=False)
    console.print(
        f"Each read-out at the lr of the best {settings['criterion']} over "
        f"{len(settings['selection_seeds'])} other seed(s), on {settings['selection_samples']}. "
        "Bold: the preset's read-out, or the method's best on those seeds. *: the best lr is at "
        "the edge of the grid."
    )
    for each in results["comparisons"]:
        console.print(
            f"{each['memory']}: {_points(each['gap'], each['standard_error'])} final "
            f"{each['reading'].replace('_il', '-IL')} against the best control "
            f"({each['best_control']}), at "
            + _points(each["learning_accuracy_gap"], each["learning_accuracy_standard_error"])
            + " learning accuracy (points ± standard error, paired by seed)"
        )


def percent(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    mean, spread = figure["mean"], figure["std"]
    return f"{mean * 100:.1f}" + ("" if spread is None else f" ±{spread * 100:.1f}")


def _points(value: float, error: float | None) -> str:
    return f"{value * 100:+.1f}" + ("" if error is None else f" ±{error * 100:.1f}")
