"""The nested trainer: its network follows the true gradient, and both networks learn."""

import copy
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks.training import digits, one_step
from benchmarks.training.cli import training
from benchmarks.training.one_step import LOSS, RICH, MetaNetwork, OneStepTrainer
from benchmarks.training.several_steps import NestedTrainer


def make(seed=0, dtype=torch.float64, statistics=RICH, perturb=True, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    network = MetaNetwork(statistics, lr=0.2, momentum=0.8, hidden=3).to(dtype)
    if perturb:  # a head of zeros hides the body's gradient
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
    return NestedTrainer(model, F.cross_entropy, network, **options)


def batches(count, seed=0, dtype=torch.float64, size=12):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, size, 5, generator=generator, dtype=dtype)
    labels = (2 * inputs[..., 0]).round().clamp(-1, 1).long() + 1
    return list(zip(inputs, labels))


def differences(trainer, given, meta_batch, step=1e-5):
    """Central differences of the loss after the steps, weight by weight."""
    slopes = []
    for weight in trainer.network.parameters():
        slope, flat = torch.zeros_like(weight), weight.detach().view(-1)
        for j in range(weight.numel()):
            ends = []
            for shift in (step, -step):
                flat[j] += shift
                ends.append(trainer.gradient(given, meta_batch)[0].item())
                flat[j] -= shift
            slope.view(-1)[j] = (ends[0] - ends[1]) / (2 * step)
        slopes.append(slope)
    return slopes


def relative_error(found, true):
    found, true = (torch.cat([t.reshape(-1) for t in ts]) for ts in (found, true))
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize(
    ("statistics", "checkpointed", "unroll"),
    [(LOSS, False, 1), (RICH, False, 1), (RICH, True, 1), (RICH, False, 4), (RICH, True, 4)],
)
def test_the_meta_gradient_agrees_with_finite_differences(statistics, checkpointed, unroll):
    trainer = make(statistics=statistics, checkpointed=checkpointed)
    trainer.step(batches(2, seed=9), batches(1, seed=8)[0])  # so that the momentum is not zero
    *given, meta_batch = batches(unroll + 1)
    _, found, _, _ = trainer.gradient(given, meta_batch)
    true = differences(trainer, given, meta_batch)
    assert all(t.any() for t in true)
    assert relative_error(found, true) <= 1e-6


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_truncated_gradient_is_that_of_the_last_steps(checkpointed):
    *given, meta_batch = batches(6)
    truncated = make(truncate=2, checkpointed=checkpointed)
    loss, found, carry, _ = truncated.gradient(given, meta_batch)
    # The first three steps as they come, then the last two on their own.
    reference = make()
    reference.carry = reference.gradient(given[:3], meta_batch)[2]
    expected_loss, expected, expected_carry, _ = reference.gradient(given[3:], meta_batch)
    assert torch.equal(loss, expected_loss)
    assert relative_error(found, expected) < 1e-12
    assert relative_error(found, make().gradient(given, meta_batch)[1]) > 1e-3
    assert all(torch.equal(carry[0][k], p) for k, p in expected_carry[0].items())
    # More than there are is all there are.
    whole = make(truncate=9, checkpointed=checkpointed).gradient(given, meta_batch)[1]
    assert relative_error(whole, make().gradient(given, meta_batch)[1]) < 1e-12


def test_checkpointing_changes_the_gradient_by_rounding_and_the_steps_not_at_all():
    *given, meta_batch = batches(6)
    plain, checkpointed = make(), make(checkpointed=True)
    results = [t.gradient(given, meta_batch) for t in (plain, checkpointed)]
    assert relative_error(results[1][1], results[0][1]) < 1e-12
    assert torch.equal(results[0][0], results[1][0])
    for k, p in results[0][2][0].items():
        assert torch.equal(results[1][2][0][k], p)


def peak_saved_bytes(trainer, unroll):
    """The most that autograd's graphs hold at a time while the gradient is computed."""
    live = peak = 0
    *given, meta_batch = batches(unroll + 1, size=64)

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def release(size):
        nonlocal live
        live -= size

    def pack(tensor):
        nonlocal live, peak
        held, size = Held(tensor), tensor.numel() * tensor.element_size()
        live += size
        peak = max(peak, live)
        weakref.finalize(held, release, size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        trainer.gradient(given, meta_batch)
    return peak


def test_checkpointing_holds_one_step_s_graph_whatever_the_unroll():
    plain = [peak_saved_bytes(make(), k) for k in (4, 12)]
    checkpointed = [peak_saved_bytes(make(checkpointed=True), k) for k in (4, 12)]
    assert plain[1] > 2.5 * plain[0]
    assert checkpointed[1] < 1.1 * checkpointed[0] < 0.5 * plain[0]


@pytest.mark.parametrize("unroll", [1, 3])
def test_a_step_moves_the_network_s_weights_against_the_true_gradient(unroll):
    trainer = make(meta_lr=1e-3)
    # One step on the model alone: before it, gradient and momentum have no angle.
    trainer.carry = trainer.gradient(batches(1, seed=9), batches(1, seed=8)[0])[2]
    *given, meta_batch = batches(unroll + 1)
    true = differences(trainer, given, meta_batch)
    before = [w.detach().clone() for w in trainer.network.parameters()]
    trainer.step(given, meta_batch)
    for old, new, slope in zip(before, trainer.network.parameters(), true):
        moved = new.detach() - old
        assert moved.all()  # every weight
        # The first step of AdamW is as long in every coordinate.
        torch.testing.assert_close(moved, -1e-3 * slope.sign(), rtol=1e-3, atol=0)


def test_before_it_has_learnt_it_is_sgd_with_momentum_and_stays_so_at_meta_lr_zero():
    trainer = make(perturb=False, meta_lr=0.0)
    model = trainer.model
    twin = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    twin.load_state_dict(model.state_dict())
    sgd = torch.optim.SGD(twin.parameters(), lr=0.2, momentum=0.8)
    for seed in range(5):
        *given, meta_batch = batches(3, seed)
        metrics = trainer.step(given, meta_batch)
        for inputs, labels in given:
            sgd.zero_grad()
            loss = F.cross_entropy(twin(inputs), labels)
            loss.backward()
            sgd.step()
        torch.testing.assert_close(metrics["loss"], loss.detach())
    assert metrics["lr"].item() == pytest.approx(0.2)
    assert metrics["momentum"].item() == pytest.approx(0.8)
    untouched = [p.detach().clone() for p in model.parameters()]
    assert any(not torch.equal(p, q) for p, q in zip(untouched, twin.parameters()))
    trainer.write_back()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unroll", [1, 3])
def test_the_loss_falls_and_a_learning_rate_that_is_too_small_grows(unroll):
    def run(meta_lr):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
        network = MetaNetwork(LOSS, lr=1e-3)
        trainer = NestedTrainer(model, F.cross_entropy, network, meta_lr)
        stream = batches(120 * (unroll + 1), dtype=torch.float32)
        metrics = []
        for start in range(0, len(stream), unroll + 1):
            *given, meta_batch = stream[start : start + unroll + 1]
            metrics.append({k: v.item() for k, v in trainer.step(given, meta_batch).items()})
        return metrics

    learnt, fixed = run(0.03), run(0.0)
    mean = lambda rows, key: sum(row[key] for row in rows) / len(rows)  # noqa: E731
    assert mean(learnt[-20:], "meta_loss") < 0.7 * mean(learnt[:20], "meta_loss")
    assert mean(learnt[-20:], "meta_loss") < 0.8 * mean(fixed[-20:], "meta_loss")
    assert max(row["lr"] for row in learnt) > 1e-2 and fixed[-1]["lr"] == pytest.approx(1e-3)


def test_the_example_is_the_trainer_with_one_step_to_the_last_bit_and_short():
    whole = make(dtype=torch.float32)
    example = OneStepTrainer(whole.model, whole.loss_fn, copy.deepcopy(whole.network))
    stream = batches(12, dtype=torch.float32)
    for batch, later in zip(stream[::2], stream[1::2]):
        found, expected = example.step(batch, later), whole.step([batch], later)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    for name, p in whole.carry[0].items():
        assert torch.equal(example.carry[0][name], p)
    for p, q in zip(example.network.parameters(), whole.network.parameters()):
        assert torch.equal(p, q)
    example.write_back()
    assert torch.equal(whole.model[0].weight, whole.carry[0]["0.weight"])
    # It is there to be read.
    assert len(Path(one_step.__file__).read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("trainer", [OneStepTrainer, NestedTrainer])
@pytest.mark.parametrize(
    ("layer", "name"), [(nn.BatchNorm1d(7), "1 "), (nn.SyncBatchNorm(7), r"1 \(SyncBatchNorm")]
)
def test_running_statistics_are_refused(trainer, layer, name):
    model = nn.Sequential(nn.Linear(5, 7), layer, nn.Tanh(), nn.Linear(7, 3))
    with pytest.raises(ValueError, match=rf"^{name}.*running statistics.*GroupNorm"):
        trainer(model, F.cross_entropy, MetaNetwork())
    before = {name: b.clone() for name, b in layer.named_buffers()}
    model.eval()
    made = trainer(model, F.cross_entropy, MetaNetwork())
    batch, later = batches(2, dtype=torch.float32)
    if layer._get_name() == "BatchNorm1d":  # the other one wants a GPU
        made.step([batch] if trainer is NestedTrainer else batch, later)
    model.train()  # the mode may change on the way
    with pytest.raises(ValueError, match=r"running statistics.*eval\(\)"):
        made.step([batch] if trainer is NestedTrainer else batch, later)
    assert all(torch.equal(b, before[name]) for name, b in layer.named_buffers())
    plain = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7, track_running_stats=False))
    trainer(plain, F.cross_entropy, MetaNetwork())


def test_the_learning_rate_is_bounded_smoothly():
    network = MetaNetwork(LOSS, lr=0.1, reach=10.0)
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([50.0, -50.0]))
    lr, momentum = network(torch.zeros(1))
    assert lr.item() == pytest.approx(1.0, rel=1e-4) and 0 <= momentum.item() < 1e-6
    with torch.no_grad():
        network.head.bias.fill_(math.log(10.0))
    lr, _ = network(torch.zeros(1))
    (slope,) = torch.autograd.grad(lr, network.head.bias)
    assert slope[0] > 0.05


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match=r"unknown statistics \['speed'\]: choose of loss"):
        MetaNetwork(("loss", "speed"))
    with pytest.raises(ValueError, match="truncate is a number of steps, at least 1"):
        make(truncate=0)


def test_passes_are_counted_with_the_hessian_vector_products():
    passes = {key: variant.passes for key, variant in digits.VARIANTS.items()}
    # Five steps and a later loss, and four products, or one, of two passes each.
    assert passes == {
        "one": 2.0, "one-rich": 2.0, "five": (5 + 1 + 8) / 5, "five-truncated": (5 + 1 + 2) / 5
    }  # fmt: skip


def test_a_diverged_run_is_a_large_number():
    assert digits.run_fixed(1e8, 0.9, 0, 5)["loss"] == digits.DIVERGED
    spread = digits.spread([{"loss": x, "accuracy": 1.0, "ms_per_step": 1.0} for x in (1, 100)])
    assert spread["loss"] == pytest.approx(10.0)


def test_the_command_writes_its_numbers_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "LRS", (0.01, 0.1))
    monkeypatch.setattr(digits, "SELECTION_LRS", (0.01,))
    monkeypatch.setattr(digits, "META_LRS", (1e-2,))
    monkeypatch.setattr(digits, "MOMENTA", (0.0, 0.9))
    variants = {key: digits.VARIANTS[key] for key in ("one", "five")}
    monkeypatch.setattr(digits, "VARIANTS", variants)
    arguments = ["one-step", "--seeds", "2", "--selection", "1", "--steps", "10"]
    result = CliRunner().invoke(training, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "training-one-step.json").read_text())
    results = document["results"]
    assert str(tmp_path) not in json.dumps(document)
    assert list(results["fixed"]) == list(results["cosine"]) == ["10", "20", "28"]
    for row in results["nested"].values():
        assert row["lr"] in (0.01, 0.1) and len(row["by_lr"]["0.1"]["losses"]) == 2
    # The same batches and start: a tuned learning rate beats one that is too small.
    by_lr = results["fixed"]["10"]["momentum 0.9, by lr"]
    assert by_lr["0.1"]["loss"] < by_lr["0.01"]["loss"]
    assert (tmp_path / "training-one-step.png").stat().st_size > 10_000
    refused = CliRunner().invoke(training, ["one-step", "--steps", "7", "--out", str(tmp_path)])
    assert refused.exit_code == 2 and "multiple of 5" in refused.output
