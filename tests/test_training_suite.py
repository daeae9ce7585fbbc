"""The training suite: its data, how rates are chosen, and the controls it compares with."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks.jobs import Pool, Store
from benchmarks.training import data, run, sweep
from benchmarks.training.cli import training
from benchmarks.training.controls import AdEMAMix, StaleM3, scheduled
from benchmarks.training.methods import METHODS
from nested_optim import M3

from .helpers import make_params, random_grads, step_with

# ---------------------------------------------------------------------- data


def test_the_standard_library_is_one_text_on_this_machine():
    text = data.text(None)
    assert "sha256" in text.name and len(text.train) > 5_000_000
    assert bytes(text.train[:200].tolist()).decode()
    total = len(text.train) + len(text.validation) + len(text.test)
    assert f"({total} bytes" in text.name
    assert len(text.validation) == len(text.test) == int(0.05 * total)


def test_a_text_of_ones_own_is_cut_without_overlap(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"%07d\n" % i for i in range(20_000)))
    text = data.text(path)
    joined = torch.cat([text.train, text.validation, text.test])
    assert bytes(joined.tolist()) == path.read_bytes()
    path.write_bytes(b"too short")
    with pytest.raises(ValueError, match="9 bytes of text are too few"):
        data.text(path)
    with pytest.raises(ValueError, match="there is no text"):
        data.text(tmp_path / "missing")


def test_windows_are_pieces_of_the_text_drawn_by_the_seed():
    of = torch.arange(100, dtype=torch.uint8)
    at, again = (data.starts(of, 10, 50, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(at, again)
    drawn = data.windows(of, 10, at)
    assert torch.equal(drawn[:, 0], at)
    assert torch.equal(drawn, drawn[:, :1] + torch.arange(10))
    assert drawn[:, 0].min() >= 0 and drawn.max() <= 99


def images():
    generator = torch.Generator().manual_seed(0)

    def part(n):
        pixels = torch.randint(256, (n, 3, 32, 32), generator=generator).to(torch.uint8)
        return pixels, torch.arange(n) % 4

    return data.Images("made", 4, part(40), part(16), part(16), (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("task", ["vit", "resnet"])
def test_images_are_shifted_and_mirrored_pieces_of_themselves(task):
    job = run.Job(task, "test", "made", "adamw", 1e-3, 0.1, 0)
    made = run.Task(job, images(), torch.device("cpu"))
    originals = made.parts[0][0][:6]
    plain = made._prepare(originals, None)
    changed = run.changes(len(originals), torch.Generator().manual_seed(1))
    augmented = made._prepare(originals, changed)
    padded = torch.nn.functional.pad(plain, (4, 4, 4, 4))
    for one, pad in zip(augmented, padded):
        found = [
            torch.equal(one, candidate)
            for down in range(9)
            for right in range(9)
            for piece in [pad[:, down : down + 32, right : right + 32]]
            for candidate in (piece, piece.flip(-1))
        ]
        assert any(found)
    assert not torch.equal(augmented, plain)
    still = torch.tensor([[4, 4, 0], [4, 4, 1]])
    same, mirrored = made._prepare(originals[:2], still)
    assert torch.equal(same, plain[0]) and torch.equal(mirrored, plain[1].flip(-1))


@pytest.mark.parametrize("task", list(run.SIZES))
def test_batches_drawn_ahead_are_those_drawn_one_by_one(task):
    of = images() if task != "lm" else data.Text("", *(torch.arange(99, dtype=torch.uint8),) * 3)
    job = run.Job(task, "test", "made", "adamw", 1e-2, 0.1, 0)
    one, other = (run.Task(job, of, torch.device("cpu")) for _ in range(2))
    for drawn, _ in zip(one.drawn(), range(3)):
        assert len(drawn) == one.size.batch
        assert one.loss_of(drawn) == other.train_loss()


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("task", list(run.SIZES))
@pytest.mark.parametrize("method", ["adamw", "muon", "m3", "nested", "ademamix"])
def test_a_run_is_decided_by_its_job(task, method):
    made = data.Text("made", *(torch.arange(4000).remainder(251).to(torch.uint8),) * 3)
    of = made if task == "lm" else images()
    job = run.Job(task, "test", "made", method, 1e-2, 0.1, 0)
    results = [run.run(job, of, torch.device("cpu")) for _ in range(2)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    losses = results[0]["validation"]
    assert len(losses) == len(results[0]["steps"]) == 9
    if task == "lm":  # the images are noise
        assert losses[-1] < losses[0]


def test_all_methods_start_from_the_same_weights_and_batches():
    made = data.Text("made", *(torch.arange(4000).remainder(251).to(torch.uint8),) * 3)
    starts = set()
    for method in METHODS:
        job = run.Job("lm", "test", "made", method, 1e-2, 0.1, 3)
        task = run.Task(job, made, torch.device("cpu"))
        starts.add(float(task.train_loss()))
    assert len(starts) == 1


def test_every_parameter_has_exactly_one_optimizer():
    for task in run.SIZES:
        of = images() if task != "lm" else data.Text("", *(torch.zeros(99, dtype=torch.uint8),) * 3)
        for method in METHODS:
            job = run.Job(task, "test", "made", method, 1e-2, 0.1, 0)
            model = run.Task(job, of, torch.device("cpu")).model
            held = [
                p for o in run.optimizers(job, model) for g in o.param_groups for p in g["params"]
            ]
            # Their memory, since one of them has matrices that are views.
            ours, theirs = ([p.data_ptr() for p in ps] for ps in (model.parameters(), held))
            assert sorted(theirs) == sorted(ours), (task, method)


def test_muon_on_flattened_convolutions_is_m3():
    """M3's default is torch's Muon, so it shows that the views are trained, and each step once."""
    made = images()
    weights = {}
    for method in ("m3", "muon_flat", "muon", "adamw"):
        job = run.Job("resnet", "test", "made", method, 1e-2, 0.1, 0)
        task = run.Task(job, made, torch.device("cpu"))
        opts = run.optimizers(job, task.model)
        for _ in range(3):
            task.train_loss().backward()
            for opt in opts:
                opt.step()
            for opt in opts:
                opt.zero_grad()
        assert all(p.grad is None for p in task.model.parameters())
        weights[method] = torch.cat([p.detach().flatten() for p in task.model.parameters()])
    # torch's Newton-Schulz is in bfloat16 on a CPU, too.
    moved = (weights["m3"] - weights["adamw"]).norm()
    assert (weights["m3"] - weights["muon_flat"]).norm() < 0.05 * moved
    assert torch.equal(weights["muon"], weights["adamw"])  # it takes no convolution


def test_a_run_that_diverges_ends_with_infinite_losses():
    made = data.Text("made", *(torch.arange(4000).remainder(251).to(torch.uint8),) * 3)
    job = run.Job("lm", "test", "made", "adamw", 1e30, 0.1, 0)
    result = run.run(job, made, torch.device("cpu"))
    assert result["validation"][-1] == "inf" and result["final_validation"] == "inf"
    assert sweep.final_loss(result) == math.inf


def test_the_rate_warms_up_and_falls_to_its_floor():
    factor = run.schedule(200)
    assert [factor(0), factor(9), factor(10)] == [0.1, 1.0, 1.0]
    assert factor(200) == pytest.approx(run.FLOOR)
    falling = [factor(t) for t in range(10, 201)]
    assert falling == sorted(falling, reverse=True)


# ---------------------------------------------------------------------- choosing rates


class Made:
    """A sweep whose final loss is a known function of method and rate."""

    def __init__(self, tmp_path, loss):
        self.store = Store(tmp_path / "runs.jsonl")
        self.loss = loss
        self.jobs = []

    def work(self, job):
        self.jobs.append(job)
        loss = self.loss(job.method, job.lr) + 0.01 * job.seed
        return {
            "steps": [0, 50, 100],
            "validation": [6.0, 4.0, loss],
            "final_validation": {"loss": loss},
            "test": {"loss": loss + 1},
        }

    def measure(self, **options):
        plan = sweep.Plan("lm", "test", "made", ("adamw", "m3"), **options)
        pool = Pool(self.work, self.store, 1)
        return sweep.measure(plan, self.store, pool)


def bowl(best):
    return lambda method, lr: 2.0 + abs(math.log10(lr) - math.log10(best[method]))


def test_the_grid_grows_until_the_best_is_inside_and_is_refined(tmp_path):
    made = Made(tmp_path, bowl({"adamw": 1e-3, "m3": 0.05}))
    rows = made.measure()
    assert [row.lr for row in rows] == [1e-3, 0.057]
    assert not any(row.at_edge for row in rows)
    assert [lr for lr, _ in rows[0].sweep] == [3e-4, 5.6e-4, 1e-3, 1.8e-3, 3e-3, 1e-2]
    assert [len(row.runs) for row in rows] == [3, 3]
    # Only the chosen rate is trained with further seeds.
    assert {(j.method, j.lr) for j in made.jobs if j.seed} == {("adamw", 1e-3), ("m3", 0.057)}


def test_a_best_that_is_never_inside_is_said_to_be_at_the_edge(tmp_path):
    rows = Made(tmp_path, lambda method, lr: 5 - math.log10(lr)).measure(refine=False)
    assert all(row.at_edge for row in rows)
    assert len(rows[0].sweep) == 4 + sweep.GROWTH


def test_what_has_been_run_is_not_run_again(tmp_path):
    first = Made(tmp_path, bowl({"adamw": 1e-3, "m3": 3e-3}))
    rows = first.measure()
    again = Made(tmp_path, lambda method, lr: pytest.fail("run twice"))
    assert [row.test_losses for row in again.measure()] == [row.test_losses for row in rows]


def test_the_summary_compares_with_adamws_end(tmp_path):
    rows = Made(tmp_path, bowl({"adamw": 1e-3, "m3": 1e-3})).measure(refine=False)
    rows[1].runs = [{**r, "validation": [6.0, 2.0, 1.5]} for r in rows[1].runs]
    table = {entry["method"]: entry for entry in sweep.summary(rows)}
    assert table["adamw"]["share_of_steps"] == 1.0
    assert table["m3"]["share_of_steps"] == pytest.approx(0.5 * (6 - 2.01) / 4)
    assert table["adamw"]["test_loss"] == pytest.approx(3.01)
    difference = sweep.differences(rows, "m3", "adamw")
    assert difference == {"mean": 0.0, "standard_error": 0.0}


def test_steps_to_a_loss_that_is_never_reached_are_none():
    assert sweep.steps_to([0, 10], [3.0, 2.0], 1.0) is None
    assert sweep.steps_to([0, 10], [3.0, 2.0], 3.5) == 0
    assert sweep.steps_to([0, 10], [math.inf, 2.0], 2.5) == 10


# ---------------------------------------------------------------------- controls


def test_ademamix_is_its_formula():
    params = make_params((3, 2), dtype=torch.float64)
    p = params[0].detach().clone()
    optimizer = AdEMAMix(params, 0.1, (0.9, 0.99, 0.999), 2.0, 1e-8, 0.1, warmup=4)
    m1 = m2 = v = torch.zeros_like(p)
    for t in range(1, 8):
        grad = random_grads(params, t)[0]
        step_with(optimizer, params, [grad])
        share = min(1, t / 4)
        alpha = 2.0 * share
        steps = share * (math.log(0.5) / math.log(0.999) - 1)
        steps += (1 - share) * (math.log(0.5) / math.log(0.9) - 1)
        beta3 = 0.5 ** (1 / (steps + 1))
        assert scheduled(t, 4, 2.0, 0.9, 0.999) == pytest.approx((alpha, beta3), rel=1e-4)
        m1 = 0.9 * m1 + 0.1 * grad
        m2 = beta3 * m2 + (1 - beta3) * grad
        v = 0.99 * v + 0.01 * grad * grad
        update = (m1 / (1 - 0.9**t) + alpha * m2) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        p = p - 0.1 * update - 0.1 * 0.1 * p
        torch.testing.assert_close(params[0].detach(), p, rtol=1e-5, atol=1e-6)


def test_the_stale_control_keeps_the_fast_update_of_the_chunks_end():
    """Its slow part is what M3 without one would have applied there."""
    params, plain_params = make_params((6, 4)), make_params((6, 4))
    options = {"lr": 1.0, "weight_decay": 0.0, "adjust_lr": None}
    stale = StaleM3(params, alpha=0.25, slow_frequency=3, **options)
    plain = M3(plain_params, alpha=0.0, **options)
    for t in range(1, 4):
        grads = random_grads(params, t)
        before = plain_params[0].detach().clone()
        step_with(stale, params, grads)
        step_with(plain, plain_params, grads)
        applied = before - plain_params[0].detach()
        slow = stale.state[params[0]]["slow_update"]
        if t < 3:
            assert not slow.any()
    torch.testing.assert_close(slow.float(), applied, rtol=1e-4, atol=1e-4)
    M3_own = M3(make_params((6, 4)), alpha=0.25, slow_frequency=3, **options)
    own = [p for g in M3_own.param_groups for p in g["params"]]
    for t in range(1, 4):
        step_with(M3_own, own, random_grads(own, t))
    assert not torch.allclose(M3_own.state[own[0]]["slow_update"].float(), applied, atol=1e-2)


# ---------------------------------------------------------------------- the command


def test_the_command_writes_a_table_a_figure_and_can_go_on(tmp_path):
    arguments = ["compare", "--size", "test", "--method", "adamw", "--method", "m3"]
    arguments += ["--lr", "0.003", "--lr", "0.01", "--seeds", "2", "--no-refine"]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path), "--device", "cpu"]
    done = CliRunner().invoke(training, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "training-lm-test.json").read_text())
    assert {entry["method"] for entry in found["table"]} == {"adamw", "m3"}
    assert found["differences"]["m3 - adamw"]["standard_error"] >= 0
    assert found["time"]["m3"]["step_ms"] > 0
    assert (tmp_path / "training-lm-test.png").stat().st_size > 10_000
    lines = (tmp_path / "work" / "runs.jsonl").read_text().count("\n")
    again = CliRunner().invoke(training, [*arguments, "--no-timing"], catch_exceptions=False)
    assert again.exit_code == 0
    assert (tmp_path / "work" / "runs.jsonl").read_text().count("\n") == lines
    assert str(tmp_path) not in (tmp_path / "training-lm-test.json").read_text()


def test_images_need_a_path():
    done = CliRunner().invoke(training, ["compare", "--task", "vit", "--size", "test"])
    assert done.exit_code == 2 and "give --data" in done.output


def test_residual_networks_halve_their_images_twice():
    model = run.ResNet(4, 1, 7)
    shapes = []
    for layer in model.layers:
        layer.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[1:])))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8)]
    assert isinstance(model.head, nn.Linear)
