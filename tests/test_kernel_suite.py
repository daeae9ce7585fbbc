"""The kernel suite: shapes, bytes and checks against figures by hand, and the whole in small."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("matplotlib")
pytest.importorskip("numpy")
pytest.importorskip("rich")

import torch
from click.testing import CliRunner
from rich.console import Console
from torch.optim import AdamW

from benchmarks.kernels import accounting, cli, contestants, figure, machine, report, run, timing
from benchmarks.kernels.contestants import ADAMW, BASELINE, BY_KEY, MIX, OWN, PEERS, Contestant
from benchmarks.kernels.correctness import Check, check
from benchmarks.kernels.shapes import MODELS, elements, split_evenly
from benchmarks.kernels.workload import Runner, Workload
from benchmarks.output import write_json
from nested_optim import NestedOptimizer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALL = [("matrix", (64, 50)), ("bias", (50,)), ("long", (7000,)), ("weight", (30, 40))]
ON_CPU = [c for c in (*OWN, *PEERS) if c.device_type in (None, "cpu") and not c.missing()]
FEW = timing.Sampling(seconds=1e-9, fewest=3, most=5, periods=1)


def small_workload(dtype: torch.dtype = torch.float32) -> Workload:
    return Workload(SMALL, dtype, CPU)


def runner_of(contestant: Contestant, dtype: torch.dtype = torch.float32) -> Runner:
    return Runner(contestant, small_workload(dtype), ADAMW)


def contestant_of(make: Any, **flags: Any) -> Contestant:
    return Contestant("made-up", "made up", make, **flags)


def settings_of(**changes: Any) -> run.Settings:
    base = run.Settings(CPU, ("gpt2",), (), "float32", FEW, quick=True)
    return replace(base, **changes)


def silent_console() -> Console:
    return Console(file=io.StringIO(), width=150)


def printed(console: Console) -> str:
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


# Shapes


@pytest.mark.parametrize(
    ("model", "tensors", "low", "high"),
    [
        ("gpt2", 148, 124_439_808, 124_439_808),
        ("llama", 146, 1.03e9, 1.05e9),
        ("resnet", 144, 33.5e6, 34.5e6),
        ("tiny", 5000, 12.0e6, 13.0e6),
    ],
)
def test_models_have_the_tensors_they_promise(model: str, tensors: int, low: float, high: float):
    shapes = MODELS[model].full()
    assert len(shapes) == len({name for name, _ in shapes}) == tensors
    assert low <= elements(shapes) <= high
    assert shapes == MODELS[model].full()
    assert elements(MODELS[model].quick()) < 1e6


def test_the_tensors_of_the_models():
    gpt2 = dict(MODELS["gpt2"].full())
    assert gpt2["wte"] == (50257, 768) and gpt2["wpe"] == (1024, 768)
    assert gpt2["h.11.attn.c_attn.weight"] == (768, 2304)
    assert gpt2["h.0.mlp.c_proj.bias"] == (768,)
    llama = dict(MODELS["llama"].full())
    assert llama["embed_tokens"] == (32000, 2048)
    assert llama["layers.15.k_proj"] == (512, 2048)
    assert llama["layers.0.down_proj"] == (2048, 8192)
    resnet = MODELS["resnet"].full()
    assert sum(len(size) == 4 for _, size in resnet) == 48
    assert all(1000 <= size[0] <= 4000 for _, size in MODELS["tiny"].full())


@pytest.mark.parametrize("model", list(MODELS))
def test_the_mix_has_a_third_of_the_bytes_each(model: str):
    sizes = [math.prod(size) for _, size in MODELS[model].full()]
    parts = split_evenly(sizes, len(MIX))
    for part in range(len(MIX)):
        share = sum(s for s, p in zip(sizes, parts, strict=True) if p == part) / sum(sizes)
        assert share == pytest.approx(1 / 3, abs=0.005)


def test_frequencies_of_a_mix():
    mixed = runner_of(BY_KEY["nested-mix"])
    assert sorted(set(mixed.frequencies)) == sorted(MIX)
    assert mixed.period == 100
    held = {p: g["frequency"] for g in mixed.optimizer.param_groups for p in g["params"]}
    assert [held[p] for p in mixed.params] == mixed.frequencies
    assert runner_of(BY_KEY["nested"]).period == 1


# Bytes


def test_bytes_of_a_step_by_hand():
    # float32: read p, g, m, v and write p, m, v.
    assert accounting.step_bytes(1, param=4, grad=4, state=8) == [28]
    # Opening reads g and writes the sum; then g and the sum are read and the sum is written.
    assert accounting.step_bytes(4, param=4, grad=4, state=8) == [8, 12, 12, 32]
    assert accounting.step_bytes(2, param=4, grad=4, state=8) == [8, 32]
    # bfloat16 with moments like it, and with float32 moments.
    assert accounting.step_bytes(1, param=2, grad=2, state=4) == [14]
    assert accounting.step_bytes(3, param=2, grad=2, state=8) == [6, 10, 26]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_come_from_the_state_that_is_there(dtype: torch.dtype):
    width = dtype.itemsize
    for key in ("nested", "nested-mix", BASELINE):
        runner = runner_of(BY_KEY[key], dtype)
        check(runner)
        expected = moments = windows = 0.0
        for p, f in zip(runner.params, runner.frequencies, strict=True):
            update = 7 * width  # p, m and v twice, g once
            window = 0 if f == 1 else (width + 4) + (f - 2) * (width + 8) + 4
            expected += p.numel() * (window + update) / f
            moments += p.numel() * 2 * width
            windows += p.numel() * 4 * (f > 1)
        assert accounting.mean_step_bytes(runner) == round(expected)
        counters = accounting.state_bytes(runner) - moments - windows
        assert 0 < counters <= 8 * len(runner.params)


def test_wider_moments_are_counted():
    wide = contestant_of(
        lambda params, frequencies, options: NestedOptimizer(
            params, **options, state_dtype="float32"
        )
    )
    runner = runner_of(wide, torch.bfloat16)
    check(runner)
    assert accounting.mean_step_bytes(runner) == elements(SMALL) * (2 + 2 * (2 + 8))


# The check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "contestant", [c for c in ON_CPU if c.is_adamw and c.key != "heavyball"], ids=lambda c: c.key
)
def test_every_adamw_passes_with_room(contestant: Contestant, dtype: torch.dtype):
    seen = check(runner_of(contestant, dtype))
    assert seen.passed
    assert 0 < seen.error < seen.tolerance / 3
    assert seen.steps == (100 if contestant.mixed else 10)


def adamw_with(**changes: Any) -> Any:
    return lambda params, frequencies, options: AdamW(params, **{**options, **changes})


class _Spoilt(AdamW):
    """AdamW, and then something happens to the parameters."""

    def __init__(self, params: Any, spoil: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.spoil = spoil

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = self.param_groups[0]["params"]
        before = [p.clone() for p in params]
        super().step()
        for p, old in zip(params, before, strict=True):
            self.spoil(p.view(-1), old.view(-1))


def spoilt(spoil: Any) -> Any:
    return lambda params, frequencies, options: _Spoilt(params, spoil, **options)


def keep_last(p: torch.Tensor, old: torch.Tensor) -> None:
    p[-1] = old[-1]


def poison_first(p: torch.Tensor, old: torch.Tensor) -> None:
    p[0] = math.nan


def nested_with(change_frequency: Any = lambda f: f, **flags: Any) -> Any:
    def make(params: Any, frequencies: list[int], options: Any) -> NestedOptimizer:
        groups = [
            {"params": [p], "frequency": change_frequency(f)}
            for p, f in zip(params, frequencies, strict=True)
        ]
        return NestedOptimizer(groups, **options, **flags)

    return make


WRONG = {
    "no weight decay": (adamw_with(weight_decay=0.0), False),
    "another beta": (adamw_with(betas=(0.9, 0.99)), False),
    "another eps": (adamw_with(eps=1e-7), False),
    "the last element forgotten": (spoilt(keep_last), False),
    "a NaN": (spoilt(poison_first), False),
    "nothing at all": (spoilt(lambda p, old: p.copy_(old)), False),
    "windows summed": (nested_with(window="sum"), True),
    "windows one too long": (nested_with(lambda f: f + (f > 1)), True),
    "no windows": (nested_with(lambda f: 1), True),
}


@pytest.mark.parametrize(("make", "mixed"), WRONG.values(), ids=WRONG)
def test_a_wrong_optimizer_is_caught(make: Any, mixed: bool):
    seen = check(runner_of(contestant_of(make, mixed=mixed)))
    assert not seen.passed
    assert seen.error > 2 * seen.tolerance


def test_gross_errors_are_caught_in_bfloat16_too():
    for name in ("the last element forgotten", "a NaN", "windows summed", "windows one too long"):
        make, mixed = WRONG[name]
        assert not check(runner_of(contestant_of(make, mixed=mixed), torch.bfloat16)).passed
    assert not Check(math.nan, 1.0, 0.0, 1, 0.0).passed


# Who takes part


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch):
    there = contestants.importlib.util.find_spec
    gone = ("optimi", "heavyball", "pytorch_optimizer")
    monkeypatch.setattr(
        contestants.importlib.util, "find_spec", lambda name: None if name in gone else there(name)
    )
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    results = run.measure(settings_of(peers=cli.PEER_KEYS), run.silent)
    assert set(results["missing"]) == {"torch-muon", "optimi", "pytorch_optimizer", "heavyball"}
    assert results["missing"]["optimi"] == "not installed: pip install torch-optimi"
    assert "has no Muon" in results["missing"]["torch-muon"]
    rows = results["models"]["gpt2"]["results"]
    assert rows["optimi"] == {"status": "not installed: pip install torch-optimi"}
    assert {rows[key]["status"] for key in (BASELINE, "nested", "m3")} == {"timed"}
    console = silent_console()
    report.print_results(console, {"machine": {}, **results})
    assert "heavyball AdamW: not installed: pip install heavyball" in printed(console)


def test_what_does_not_fit_a_model_is_said():
    sizes = [size for _, size in MODELS["tiny"].full()]
    assert BY_KEY["torch-muon"].unfit(sizes) == "not applicable: no matrices"
    assert "one graph, here 5,000" in str(BY_KEY["heavyball"].unfit(sizes))
    assert BY_KEY["torch-foreach"].unfit(sizes) is None
    muon = BY_KEY["torch-muon"].select([(3,), (3, 4), (3, 4, 1, 1)])
    assert muon == [1]


def run_with(contestant: Contestant, **changes: Any) -> dict[str, Any]:
    suite = run.Suite(settings_of(**changes), bandwidth=1e10)
    return suite.run("small", SMALL, [BY_KEY[BASELINE], contestant], run.silent)


def test_a_wrong_or_broken_optimizer_is_not_timed():
    wrong = run_with(contestant_of(adamw_with(weight_decay=0.0)))
    assert wrong["made-up"]["status"].startswith("wrong: error ")
    assert wrong["made-up"]["check"]["error"] > wrong["made-up"]["check"]["tolerance"]
    assert "time" not in wrong["made-up"]

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    failed = run_with(contestant_of(broken))
    assert failed["made-up"]["status"] == "failed: RuntimeError: no such kernel"
    assert wrong[BASELINE]["status"] == failed[BASELINE]["status"] == "timed"


def test_patience_ends(monkeypatch: pytest.MonkeyPatch):
    def slow(*arguments: Any) -> Any:
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("the alarm was swallowed")
        except BaseException as error:
            raise ValueError("wrapped by a compiler") from error

    begin = time.perf_counter()
    results = run_with(contestant_of(slow), patience=0.2)
    assert time.perf_counter() - begin < 10
    assert (
        results["made-up"]["status"] == "not timed: building and checking it took more than 0.2 s"
    )
    monkeypatch.setattr(run, "SLOW_STEP", 0.0)
    slow_steps = run_with(BY_KEY["torch-loop"])
    assert slow_steps["torch-loop"]["status"].startswith("not timed: a step takes")


def test_too_little_memory_skips_a_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.kernels.workload.available_bytes", lambda device: 1e6)
    results = run.measure(settings_of(scaling=True), run.silent)
    assert results["models"]["gpt2"]["skipped"].endswith("0.0 GB are free")
    assert all("skipped" in point for point in results["scaling"]["parameters"])
    console = silent_console()
    report.print_results(console, {"machine": {}, **results})
    assert "skipped: needs" in printed(console)


# Clocks


def test_steps_come_in_whole_periods():
    sampling = timing.Sampling(seconds=1.0, fewest=10, most=60, periods=3)
    assert timing.steps_to_time(0.02, 1, sampling) == 50
    assert timing.steps_to_time(1e-6, 1, sampling) == 60
    assert timing.steps_to_time(9.0, 1, sampling) == 10
    assert timing.steps_to_time(1e-6, 100, sampling) == 300
    assert timing.steps_to_time(0.005, 100, sampling) == 200
    assert timing.steps_to_time(9.0, 100, sampling) == 100
    assert timing.per_period([1.0, 3.0, 2.0, 6.0], 2) == [2.0, 4.0]
    assert timing.by_phase([1.0, 3.0, 2.0, 6.0], 2) == [1.5, 4.5]
    assert timing.by_phase([1.0], 1) is None


def test_spread():
    assert timing.spread([2.0]) == {"median": 2.0, "p10": None, "p90": None, "samples": 1}
    figure_of = timing.spread([float(i) for i in range(11)])
    assert figure_of == {"median": 5.0, "p10": 1.0, "p90": 9.0, "samples": 11}


def test_all_take_turns():
    runners = {key: runner_of(BY_KEY[key]) for key in (BASELINE, "nested", "nested-mix")}
    rounds, joins = timing.plan_turns(runners, dict.fromkeys(runners, 1e-3), BASELINE, FEW)
    assert rounds == 100
    assert {key: len(turns) for key, turns in joins.items()} == {
        BASELINE: 100,
        "nested": 3,
        "nested-mix": 100,
    }
    assert joins["nested"] == {0, 49, 99}
    advanced: list[int] = []
    measured = timing.measure_in_turns(runners, joins, rounds, BASELINE, lambda: advanced.append(1))
    assert len(advanced) == rounds
    assert measured[BASELINE]["ratio_to_baseline"]["p90"] == 1.0
    assert measured["nested"]["time"]["samples"] == 3
    assert measured["nested-mix"]["time"]["samples"] == 1
    assert len(measured["nested-mix"]["time_by_phase"]) == 100


class _Event:
    """A CUDA event that has passed when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = math.nan

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return not math.isnan(self.at)

    def synchronize(self) -> None:
        assert self.query()

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """CUDA's clocks on a CPU: the sleeps that were asked for."""
    sleeps: list[int] = []

    def sleep(cycles: int) -> None:
        sleeps.append(cycles)
        time.sleep(1e-4)

    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 150)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    yield sleeps


def test_the_clocks_of_a_device(stand_in: list[int]):
    clock = timing.CudaClock(CPU)
    for key, period in ((BASELINE, 1), ("nested-mix", 100)):
        runner = runner_of(BY_KEY[key])
        assert check(runner).passed
        del stand_in[:]
        measured = clock.measure(runner, FEW)
        samples = 3 if period == 1 else 1
        assert measured["time"]["samples"] == samples
        assert measured["host_new_gradients"]["samples"] == samples
        assert measured["host_same_gradients"]["samples"] == samples
        # Without a device's queue no host is ever ahead, and that is said.
        assert measured["host_was_ahead"] == 0
        assert report.is_upper_bound(measured)
        assert measured["peak_extra_bytes"] == 50
        assert len(stand_in) == samples * period
        longest = timing.LONGEST_SLEEP * clock.cycles_per_second
        assert all(0 < cycles <= longest for cycles in stand_in)
        # Whole periods, so that every window is where it was.
        held = [s.get("window_count", torch.zeros(())) for s in runner.optimizer.state.values()]
        assert all(float(count) == 0 for count in held)


def test_gradients_move_from_step_to_step():
    runner = runner_of(BY_KEY[BASELINE])
    addresses = []
    for turn in range(3):
        runner.use_gradients(turn)
        addresses.append([p.grad.data_ptr() for p in runner.params])  # type: ignore[union-attr]
    assert addresses[0] == addresses[2]
    assert not set(addresses[0]) & set(addresses[1])


def test_the_report_of_a_device(stand_in: list[int], tmp_path: Path):
    suite = run.Suite(settings_of(), bandwidth=1e10)
    suite.clock = timing.CudaClock(CPU)
    chosen = [BY_KEY[key] for key in (*run.SCALED, "nested-mix", "torch-loop")]
    model = suite.run("small", SMALL, chosen, run.silent)
    assert model[BASELINE]["time_again"]["median"] > 0
    assert model["nested"]["ratio_to_baseline"]["median"] == pytest.approx(
        model["nested"]["time"]["median"] / model[BASELINE]["time"]["median"]
    )
    points = [{"parameters": n, "tensors": 10 * n, "results": model} for n in (1, 2)]
    results = {
        "machine": {"gpu": {"name": "A GPU"}},
        "versions": {"torch": "2"},
        "settings": {"dtype": "float32"},
        "copy_bandwidth": {"bytes_per_second": timing.spread([1e10])},
        "missing": {},
        "models": {
            "small": {
                "summary": "small",
                "parameters": 1,
                "tensors": 4,
                "results": model,
                "copy_limit_seconds": {"every_step": 1e-5, "mix": 6e-6},
            }
        },
        "scaling": {"parameters": points, "tensors": points},
    }
    console = silent_console()
    report.print_results(console, results)
    said = printed(console)
    assert "torch AdamW fused, timed again at the end:" in said
    assert "<= " in said and "host, same" in said and "50 B" in said
    figure.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


# The command


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("kernels") / "new"
    arguments = ["--quick", "--device", "cpu", "--scaling", "--out", str(out)]
    arguments += ["--shapes", "gpt2", "--shapes", "tiny"]
    peers = [key for key in cli.PEER_KEYS if key != "heavyball"]  # compiles for long
    arguments += [word for key in peers for word in ("--peers", key)]
    result = CliRunner().invoke(cli.kernels, arguments)
    assert result.exit_code == 0, result.output
    path = out / f"kernels-{machine.slug(CPU)}-quick.json"
    return result, out, json.loads(path.read_text("utf-8"))


def test_quick_takes_seconds_and_writes_both_files(quick: Any):
    result, out, written = quick
    assert written["seconds"] < 30
    names = sorted(path.name for path in out.iterdir())
    stem = f"kernels-{machine.slug(CPU)}-quick"
    assert names == [f"{stem}.json", f"{stem}.png"]
    picture = (out / f"{stem}.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) > 20_000
    for label in ("NestedOptimizer, f = 1/10/100", "torch AdamW fused", "ratio", "Copy bandwidth"):
        assert label in result.output


def test_the_json_holds_what_was_measured(quick: Any):
    written = quick[2]
    assert written["machine"]["cpu"] == machine.cpu_name()
    assert written["machine"]["cores"] >= 1
    assert written["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "triton", "cuda", "torch-optimi"} <= set(written["versions"])
    assert written["date"].startswith("20") and written["command"].startswith(
        "python -m benchmarks"
    )
    assert written["settings"]["hyperparameters"] == {**ADAMW, "betas": list(ADAMW["betas"])}
    assert written["settings"]["mix_of_frequencies"] == list(MIX)
    assert set(written["models"]) == {"gpt2", "tiny"}
    bandwidth = written["copy_bandwidth"]["bytes_per_second"]["median"]
    for name, model in written["models"].items():
        assert model["parameters"] == elements(MODELS[name].quick())
        for key in (BASELINE, "nested", "nested-mix", "nested-fused", "nested-fused-mix"):
            row = model["results"][key]
            assert row["status"] == "timed"
            assert row["check"]["passed"] and row["check"]["error"] < row["check"]["tolerance"]
            assert set(row["time"]) == {"median", "p10", "p90", "samples"}
            assert row["ratio_to_baseline"]["median"] > 0
            share = row["bytes_per_step"] / row["time"]["median"] / bandwidth
            assert row["share_of_copy_bandwidth"] == pytest.approx(share, rel=1e-4)
        plain = model["results"]["nested"]
        assert plain["bytes_per_step"] == 28 * model["parameters"]
        assert model["results"]["nested-mix"]["bytes_per_step"] < plain["bytes_per_step"]
        assert model["copy_limit_seconds"]["every_step"] == pytest.approx(
            plain["bytes_per_step"] / bandwidth, rel=1e-4
        )
        assert model["results"]["nested-mix"]["state_bytes"] > plain["state_bytes"]
    assert [p["tensors"] for p in written["scaling"]["tensors"]] == [10, 100]
    for points in written["scaling"].values():
        assert all(set(point["results"]) == set(run.SCALED) for point in points)


def test_a_wrong_path_of_ours_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Wrong(NestedOptimizer):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **{**options, "weight_decay": 0.0})

    monkeypatch.setattr(contestants, "NestedOptimizer", Wrong)
    arguments = ["--quick", "--device", "cpu", "--shapes", "resnet", "--peers", "none"]
    result = CliRunner().invoke(cli.kernels, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "NestedOptimizer, f = 1 on resnet: wrong: error" in result.output
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text("utf-8"))["models"]["resnet"]["results"]
    assert set(rows) == {BASELINE, *(c.key for c in OWN if c.device_type in (None, "cpu"))}
    assert "time" in rows[BASELINE] and "time" not in rows["nested"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "vit"], "'vit' is not one of"),
        (["--peers", "lion"], "'lion' is not one of"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--device", "tpu"], "'tpu' is no device"),
        (["--device", "cuda:999"], "'cuda:999'"),
        (["--periods", "0"], "0 is not in the range"),
    ],
)
def test_what_is_unknown_is_refused(arguments: list[str], words: str):
    result = CliRunner().invoke(cli.kernels, arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_help_names_shapes_and_peers():
    shown = CliRunner().invoke(cli.kernels, ["--help"])
    assert shown.exit_code == 0
    for word in (*MODELS, *cli.PEER_KEYS, "--scaling", "--dtype", "--device", "--quick", "--out"):
        assert word in shown.output


def test_defaults_of_a_cpu_and_of_cuda():
    assert cli.default_models(CPU, quick=False) == ("resnet", "tiny")
    assert cli.default_models(torch.device("cuda", 0), quick=False) == tuple(MODELS)
    on_cuda = {c.key for c in contestants.field(torch.device("cuda", 0), ())}
    ours = {"nested", "nested-mix", "nested-foreach", "nested-foreach-mix", "m3"}
    assert on_cuda == {BASELINE, *ours}


def test_no_infinity_reaches_the_json(tmp_path: Path):
    write_json({"a": math.inf, "b": [1.23456789, math.nan]}, tmp_path / "x.json", digits=6)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "inf", "b": [1.23457, "nan"]}


def test_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks/kernels", "--benchmark-only", "-q"]
    command += ["-p", "no:cacheprovider", "-k", "resnet and (torch-fused or nested-mix)"]
    # Of its own, whatever run this test is part of: xdist's workers disable benchmarks.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "test_step[resnet-nested-mix]" in done.stdout
