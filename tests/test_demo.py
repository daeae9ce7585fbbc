"""The demo: its metrics against figures worked out by hand, and the whole of it in small."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import numpy as np
import torch
from click.testing import CliRunner
from rich.console import Console

from benchmarks import __main__ as suites
from benchmarks import metrics
from benchmarks.demo import analysis, cli, methods, run, sentence, stream, training
from nested_optim import NestedOptimizer

TINY = run.Settings(
    seeds=(0,),
    lrs=(1e-3, 1e-2),
    steps_per_task=32,
    evaluate_every=16,
    timing_rounds=3,
    workers=1,
)
THREE_TASKS = [
    [0.90, 0.10, 0.20],
    [0.95, 0.80, 0.10],
    [0.50, 0.70, 0.96],
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these small tensors do."""
    with run.one_thread():
        yield


# Metrics


def test_metrics_of_three_tasks_by_hand():
    assert metrics.final_accuracy(THREE_TASKS) == pytest.approx((0.50 + 0.70 + 0.96) / 3)
    assert metrics.learning_accuracy(THREE_TASKS) == pytest.approx((0.90 + 0.80 + 0.96) / 3)
    assert metrics.average_incremental_accuracy(THREE_TASKS) == pytest.approx(
        (0.90 + (0.95 + 0.80) / 2 + (0.50 + 0.70 + 0.96) / 3) / 3
    )
    assert metrics.backward_transfer(THREE_TASKS) == pytest.approx(
        ((0.50 - 0.90) + (0.70 - 0.80)) / 2
    )
    # Task 0 was best after task 1, not after its own training.
    assert metrics.forgetting(THREE_TASKS) == pytest.approx(((0.95 - 0.50) + (0.80 - 0.70)) / 2)


def test_with_two_tasks_forgetting_is_minus_backward_transfer():
    accuracy = [[0.9, 0.2], [0.6, 0.8]]
    assert metrics.forgetting(accuracy) == pytest.approx(0.3)
    assert metrics.backward_transfer(accuracy) == pytest.approx(-0.3)


def test_one_task_forgets_nothing():
    assert metrics.forgetting([[0.9]]) == metrics.backward_transfer([[0.9]]) == 0.0


@pytest.mark.parametrize("accuracy", [[], [0.5, 0.5], [[0.5, 0.5]]])
def test_metrics_refuse_what_is_no_square(accuracy: Any):
    with pytest.raises(ValueError, match="one row and one column per task"):
        metrics.final_accuracy(accuracy)


# Equal learning accuracy


def test_retention_is_read_where_learning_first_reaches_the_target():
    learning, kept = np.array([0.80, 0.90, 0.98, 0.95]), np.array([0.60, 0.80, 0.40, 0.10])
    assert analysis.retention_at(learning, kept, 0.90) == pytest.approx(0.80)
    assert analysis.retention_at(learning, kept, 0.94) == pytest.approx(0.60)
    assert analysis.retention_at(learning, kept, 0.99) is None
    assert analysis.retention_at(learning, kept, 0.70) is None


def test_mean_gap_is_taken_over_the_shared_range():
    learning_a, kept_a = np.array([0.85, 0.95]), np.array([0.8, 0.8])
    learning_b, kept_b = np.array([0.80, 0.99]), np.array([0.5, 0.5])
    assert analysis.shared_range(learning_a, learning_b) == pytest.approx((0.90, 0.95))
    assert analysis.mean_gap(learning_a, kept_a, learning_b, kept_b) == pytest.approx(0.3)
    too_low = np.array([0.5, 0.8])
    assert analysis.mean_gap(learning_a, kept_a, too_low, kept_b) is None


def test_verdict_needs_more_than_chance():
    # Student's t of 5 degrees of freedom: 2.571 standard errors.
    assert analysis.standard_errors_needed(6) == pytest.approx(2.5706, abs=1e-4)
    assert analysis.verdict(0.03, 0.01, 6) == "more"
    assert analysis.verdict(-0.03, 0.01, 6) == "less"
    assert analysis.verdict(0.02, 0.01, 6) == "equal"
    assert analysis.verdict(0.03, None, 1) == analysis.verdict(None, None, 6) == "unknown"


def synthetic_run(method: str, lr: float, seed: int, first: float, old: float, new: float):
    result = run.Run(run.Job(method, lr, seed))
    for split in (result.test, result.validation):
        for reading in run.READINGS:
            split[reading] = [(first, 0.0), (old, new)]
    result.steps = [0]
    for reading in run.READINGS:
        result.curves[reading] = [(0.0, 0.0)]
    return result


def synthetic_results(kept_by_ours: float) -> dict[str, Any]:
    settings = replace(TINY, seeds=(0, 1, 2))
    runs = []
    for method in methods.METHODS:
        base = kept_by_ours if method.key == analysis.OURS else 0.6
        for seed in settings.seeds:
            # The spread of the controls only, or the differences would have none.
            kept = base + (0.0 if method.key == analysis.OURS else 0.01 * (seed - 1))
            runs += [
                synthetic_run(method.key, settings.lrs[0], seed, 0.8, kept, 0.8),
                synthetic_run(method.key, settings.lrs[1], seed, 0.98, kept, 0.98),
            ]
    results = analysis.analyse(runs, settings)
    results["identity"] = {"bit_identical": True, "steps": 64}
    ratio = {"ratio_to_adamw": 1.25}
    results["timing"] = {"nested": ratio, "nested_levels": {"ratio_to_adamw": 1.5}}
    return results


@pytest.mark.parametrize(
    ("kept", "gap", "words"),
    [
        (0.9, 0.3, "keep more of the old digits than plain AdamW (+30.0 ± 0.6 points),"),
        (0.3, -0.3, "keep less of the old digits than plain AdamW (-30.0 ± 0.6 points),"),
        (0.6, 0.0, "cannot be told from plain AdamW"),
    ],
)
def test_sentence_follows_the_numbers(kept: float, gap: float, words: str):
    results = synthetic_results(kept)
    equal = results["equal_learning"]
    for comparison in equal["near_most_learned"] + equal["less_learned"]:
        assert comparison["gap"] == pytest.approx(gap, abs=1e-9)
        # The jackknife of a mean is its standard error: 0.01 / sqrt(3).
        assert comparison["standard_error"] == pytest.approx(0.01 / math.sqrt(3))
        assert comparison["learning_accuracy_range"] == pytest.approx((0.93, 0.98))
    said = sentence.conclude(results)
    assert words in said
    assert "bit for bit over 64 steps" in said
    assert f"at most {max(kept, 0.6):.1%} of them are kept" in said
    assert "1.25 times AdamW's time at frequency 1, 1.50 times" in said


def test_lr_is_chosen_on_validation_digits():
    runs = [
        synthetic_run(method.key, lr, 0, first, 0.5, 0.5)
        for method in methods.METHODS
        for lr, first in zip(TINY.lrs, (0.9, 0.7), strict=True)
    ]
    for each in runs:  # on the test digits the other lr is the better one
        for reading in run.READINGS:
            each.test[reading] = [(1.6 - each.test[reading][0][0], 0.0), (0.5, 0.5)]
    assert analysis.Grid(runs, TINY).choose_lr("adamw", "learning") == TINY.lrs[0]


# The stream


def test_no_digit_is_in_two_parts_and_the_test_digits_are_the_same_for_every_seed():
    first, second = stream.make_stream(0), stream.make_stream(1)

    def rows(part: tuple[stream.Samples, ...]) -> list[bytes]:
        return [row.numpy().tobytes() for task in part for row in task.inputs]

    parts = [set(rows(part)) for part in (first.train, first.validation, first.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert sum(len(rows(part)) for part in (first.train, first.validation, first.test)) == 1797
    assert rows(first.test) == rows(second.test)
    assert rows(first.train) != rows(second.train)
    for task, samples in zip(stream.TASKS, first.train, strict=True):
        assert set(samples.labels.tolist()) == set(task)


def test_batches_come_task_by_task_and_depend_on_the_seed_alone():
    data = stream.make_stream(0)
    drawn = list(stream.batches(data, 3, steps_per_task=70, batch_size=16))
    again = list(stream.batches(data, 3, steps_per_task=70, batch_size=16))
    assert len(drawn) == 140
    assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn, again, strict=True))
    assert all(int(labels.max()) <= 4 for _, labels in drawn[:70])
    assert all(int(labels.min()) >= 5 for _, labels in drawn[70:])


def test_the_model_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    stream.build_model(0)
    assert torch.equal(before, torch.get_rng_state())


# The runs


def test_the_loop_knows_nothing_of_the_package():
    assert "nested" not in Path(training.__file__).read_text(encoding="utf-8").lower()


def test_replacing_adamw_changes_no_bit():
    identity = run.check_identity(TINY)
    assert identity["bit_identical"] is True
    assert identity["losses_adamw"] == identity["losses_nested"]
    assert len(identity["losses_adamw"]) == identity["steps"] == TINY.steps
    assert identity["max_abs_parameter_difference"] == 0.0


def test_a_difference_stops_the_demo(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        methods, "nested", lambda model, lr: NestedOptimizer(model.parameters(), lr, eps=1e-7)
    )
    with pytest.raises(RuntimeError, match=r"left AdamW's path within 64 steps"):
        run.check_identity(TINY)


def test_accumulation_is_one_frequency_for_all_groups():
    """The loop's accumulation and a window of 4 agree to the bit: dividing by 4 is exact."""
    job = run.Job("adamw_accumulation", 1e-2, 0)
    in_loop = run.train_on_stream(job, methods.adamw, TINY, accumulate=4)
    in_window = run.train_on_stream(
        job, lambda model, lr: NestedOptimizer(model.parameters(), lr=lr, frequency=4), TINY
    )
    assert in_loop.losses == in_window.losses
    for a, b in zip(in_loop.parameters, in_window.parameters, strict=True):
        assert torch.equal(a, b)


def test_knowing_the_task_never_hurts():
    for method in methods.METHODS:
        each = run.run_job(run.Job(method.key, 1e-2, 0), TINY)
        for with_task, without in zip(each.curves["known"], each.curves["unknown"], strict=True):
            assert all(a >= b for a, b in zip(with_task, without, strict=True))
        assert each.curves["known"][-1] == each.test["known"][-1]
        assert each.steps == [0, 16, 32, 48, 64]


def test_steps_per_task_must_close_every_window():
    with pytest.raises(ValueError, match="multiple of 16"):
        replace(TINY, steps_per_task=40)


# The command


def test_demo_end_to_end_writes_what_it_measured(tmp_path: Path):
    console = Console(file=io.StringIO(), width=100)
    results = cli.run_demo(TINY, tmp_path / "new" / "folder", "digits", console)
    written = json.loads((tmp_path / "new" / "folder" / "digits.json").read_text("utf-8"))
    assert (tmp_path / "new" / "folder" / "digits.png").read_bytes()[:4] == b"\x89PNG"
    assert written["sentence"] == results["sentence"]
    assert len(written["runs"]) == len(methods.METHODS) * len(TINY.lrs)
    assert written["config"]["seeds"] == [0]
    # Rounded to what tells float32 apart, so the bits are all there.
    losses = np.array(results["identity"]["losses_nested"], dtype=np.float32)
    assert np.array_equal(np.array(written["identity"]["losses_adamw"], dtype=np.float32), losses)
    assert written["machine"]["torch"] == torch.__version__
    one = written["runs"][0]["test"]["known"]
    summary = written["lr_grid"]["adamw"][0]["known"]
    assert summary["forgetting"]["mean"] == pytest.approx(one[0][0] - one[1][0])
    assert summary["forgetting"]["std"] is None
    # One seed has no standard error, and no claim is made without one.
    equal = written["equal_learning"]
    assert {c["verdict"] for c in equal["near_most_learned"] + equal["less_learned"]} == {"unknown"}
    assert "cannot be compared" in written["sentence"]
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "64 steps, identical to the last bit: max |difference| of the losses 0.0" in " ".join(
        printed.split()
    )
    for method in methods.METHODS:
        assert method.label in printed


def test_processes_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods, "METHODS", methods.METHODS[-1:])  # one job: one process to start
    settings = replace(TINY, lrs=(1e-2,))
    (alone,) = run.run_grid(settings, lambda: None)
    (elsewhere,) = run.run_grid(replace(settings, workers=2), lambda: None)
    assert alone.losses == elsewhere.losses
    assert (alone.test, alone.curves) == (elsewhere.test, elsewhere.curves)


def test_threads_are_given_back():
    torch.set_num_threads(2)
    run.check_identity(TINY)
    assert torch.get_num_threads() == 2


def test_help_lists_the_suites_and_the_flags():
    listed = CliRunner().invoke(suites.main, ["--help"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in suites.SUITES)
    flags = CliRunner().invoke(suites.main, ["demo", "--help"])
    assert flags.exit_code == 0
    assert all(flag in flags.output for flag in ("--seeds", "--out", "--quick", "--workers"))
    assert CliRunner().invoke(suites.main, ["nothing"]).exit_code == 2
