"""The learned pieces by themselves: controller, momentum, momenta, trainers."""

import math

import pytest
import torch
from torch import nn

from nested_optim import (
    ContinuumMemoryState,
    DeepNestedOptimizer,
    L2RegressionMomentum,
    NestedController,
    SimplifiedMetaTrainer,
    UnrolledMetaTrainer,
    create_meta_trainer,
)
from nested_optim.meta import networks

from .meta_helpers import Net, batch, loss_of, relative_error, step_on


def stats(rows, columns=3, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moved(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.weights.add_(0.5 * torch.randn(module.weights.shape, generator=generator))
    return module


# -------------------------------------------------------------------- networks


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 257])
@pytest.mark.parametrize("hidden", [1, 3, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_begin_as_exact_constants_with_a_gradient_everywhere(rows, hidden, dtype):
    for outputs, layers in ((1, 1), (3, 2)):
        weights = networks.initial(4, hidden, outputs, layers).to(dtype).requires_grad_()
        x = stats(rows, 4).to(dtype)
        out = networks.mlp(weights, x, hidden, outputs, layers)
        assert not out.any()
        (grad,) = torch.autograd.grad(out.square().sum() + out.sum(), weights)
        assert (grad != 0).all()


def test_the_bounded_map_is_smooth_and_keeps_its_gradient():
    x = torch.linspace(-3, 3, 601, dtype=torch.float64).requires_grad_()
    y = networks.bounded(x, -0.5, 2.0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (y > -0.5).all() and (y < 2.0).all() and (slope > 0).all()
    assert y[300].abs() < 1e-15 and slope[300] == 1
    assert networks.bounded(torch.zeros(1), -0.5, 2.0) == 0
    far = torch.tensor([-1e2, 1e2]).requires_grad_()
    assert torch.autograd.grad(networks.bounded(far, -0.5, 2.0).sum(), far)[0].all()
    assert slope.diff().abs().max() < 0.04
    assert torch.autograd.gradcheck(lambda x: networks.bounded(x, -0.5, 2.0), (x[1::60],))


def test_networks_begin_the_same_on_every_machine():
    start = networks.initial(3, 2, 1, 1)
    expected = [0.3444, 0.2580, -0.0794, -0.2411, 0.0113, -0.0951, 0.2838, -0.1966]
    torch.testing.assert_close(start[:8], torch.tensor(expected), atol=1e-4, rtol=0)


# -------------------------------------------------------------------- controller


@pytest.mark.parametrize(("sign", "bound"), [(-1.0, 2.0), (1.0, 0.1)])
def test_multipliers_begin_at_one_exactly_and_move_within_their_bounds(sign, bound):
    controller = NestedController(hidden_dim=8, min_lr_mult=0.1, max_lr_mult=2.0)
    x = stats(5)
    assert torch.equal(controller(x), torch.ones(5))
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.3)
    for _ in range(150):
        optimizer.zero_grad()
        (sign * controller(x)).sum().backward()
        optimizer.step()
    found = controller(x)
    assert (found >= 0.1).all() and (found <= 2.0).all()
    assert (found - bound).abs().max() < 0.05
    controller.zero_grad()
    controller(x).sum().backward()
    assert controller.weights.grad.any()  # there is a way back


def test_the_controller_s_gradient_is_true():
    controller = moved(NestedController(hidden_dim=3).double())
    x = stats(4).double().requires_grad_()

    def run(weights, x):
        return torch.func.functional_call(controller, {"weights": weights}, (x,))

    assert torch.autograd.gradcheck(run, (controller.weights, x))


def test_the_controller_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="0 < min_lr_mult < 1 < max_lr_mult"):
        NestedController(min_lr_mult=1.0)
    with pytest.raises(ValueError, match="Invalid hidden_dim: 0"):
        NestedController(hidden_dim=0)
    controller = NestedController(n_groups=2)
    assert controller(stats(2)).shape == (2,)
    with pytest.raises(ValueError, match=r"must be \(2, 3\), but are \(3, 3\)"):
        controller(stats(3))
    with pytest.raises(ValueError, match=r"must be \(2, 3\), but are \(2, 4\)"):
        controller(stats(2, 4))


# -------------------------------------------------------------------- momentum


def test_the_momentum_begins_as_a_plain_average():
    momentum = L2RegressionMomentum(hidden_dim=8, beta=0.8)
    m = torch.zeros(4, 3)
    expected = torch.zeros(4, 3)
    for seed in range(5):
        grad = stats(4, seed=seed)
        m, direction = momentum.update(m, grad)
        expected = 0.8 * expected + 0.2 * grad
        assert torch.equal(m, direction)
        torch.testing.assert_close(m, expected)


@pytest.mark.parametrize("damping", [0.0, 0.3, -0.05])
def test_the_momentum_is_a_descent_step_on_its_l2_objective(damping):
    momentum = L2RegressionMomentum(beta=0.9)
    m, grad = stats(4).double().requires_grad_(), stats(4, seed=1).double()
    (slope,) = torch.autograd.grad(momentum.objective(m, grad, damping), m)
    expected = 0.9 * (1 - damping) * m + 0.1 * grad
    torch.testing.assert_close(m - slope, expected, rtol=1e-12, atol=1e-14)


def test_a_trained_momentum_takes_the_step_that_its_damping_says():
    momentum = moved(L2RegressionMomentum(hidden_dim=4).double())
    m, grad, param = (stats(4, seed=s).double() for s in range(3))
    scale, shift, damping = momentum(momentum.statistics(m, grad, param))
    assert damping.abs() > 1e-3 and (scale - 1).abs() > 1e-3 and shift.abs() > 1e-3
    m.requires_grad_()
    (slope,) = torch.autograd.grad(momentum.objective(m, grad, damping.detach()), m)
    new, direction = momentum.update(m, grad, param)
    torch.testing.assert_close(new, m - slope)
    torch.testing.assert_close(direction, scale * new + shift * grad)


def test_the_momentum_s_network_trains_on_what_its_direction_leads_to():
    torch.manual_seed(0)
    momentum = L2RegressionMomentum(hidden_dim=8)
    optimizer = torch.optim.Adam(momentum.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        m, signal = torch.randn(50), torch.randn(50)
        grad = signal + 0.1 * torch.randn(50)
        _, direction = momentum.update(m, grad)  # m is noise here, the gradient is not
        loss = (direction - signal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


# -------------------------------------------------------------------- momenta


def test_a_slow_momentum_averages_the_means_of_chunks():
    state = ContinuumMemoryState((3,), num_levels=2, base_frequency=4, beta=0.8)
    assert state.frequencies == (1, 4) and state.num_levels == 2
    average, seen = torch.zeros(3), []
    for i in range(1, 21):
        grad = stats(1, seed=i)[0]
        seen.append(grad)
        state.update(grad)
        if i <= 4:  # within its first chunk it is the mean so far
            torch.testing.assert_close(state.get_momentum(1), torch.stack(seen).mean(0))
        if i % 4 == 0:
            average = 0.8 * average + 0.2 * torch.stack(seen[-4:]).mean(0)
            torch.testing.assert_close(state.momenta[1], average)
            corrected = average / (1 - 0.8 ** (i // 4))
            torch.testing.assert_close(state.get_momentum(1), corrected)
    mixed = state.mix([0.5, 2.0])
    torch.testing.assert_close(mixed, 0.5 * state.get_momentum(0) + 2 * state.get_momentum(1))


def test_every_average_of_equal_gradients_is_that_gradient():
    state = ContinuumMemoryState((2,), frequencies=(1, 3, 7), dtype=torch.float64)
    for _ in range(25):
        state.update(torch.ones(2, dtype=torch.float64))
        for level in range(3):
            torch.testing.assert_close(
                state.get_momentum(level), torch.ones(2, dtype=torch.float64)
            )


def test_frequencies_are_used_as_given():
    assert ContinuumMemoryState((1,), frequencies=[1, 4, 7]).frequencies == (1, 4, 7)
    for wrong in ((), (2, 4), (1, 1), (1, 2.5), (1, True)):
        with pytest.raises(ValueError, match="cms_frequencies"):
            ContinuumMemoryState((1,), frequencies=wrong)
    with pytest.raises(ValueError, match="shape"):
        ContinuumMemoryState((2,)).update(torch.ones(3))


# -------------------------------------------------------------------- trainers


def test_the_simplified_meta_loss_has_the_derivative_of_the_model_s_loss():
    model = Net()
    groups = [list(model.first.parameters()), list(model.last.parameters())]
    flat = [p for group in groups for p in group]
    updates = [[torch.sin(p.detach()) for p in group] for group in groups]
    start = [p.detach().clone() for p in flat]
    lrs = [0.1, 0.02]

    def after(multipliers):
        with torch.no_grad():
            for p, value in zip(flat, start):
                p.copy_(value)
            for lr, m, group, us in zip(lrs, multipliers, groups, updates):
                for p, u in zip(group, us):
                    p.sub_(lr * m * u)
        return loss_of(model, batch(0))

    h = 1e-6
    one = torch.tensor([1.3, 0.7], dtype=torch.float64)
    unit = torch.eye(2, dtype=torch.float64)
    expected = [(after(one + h * e) - after(one - h * e)).detach() / (2 * h) for e in unit]
    loss = after(one)
    grads = torch.autograd.grad(loss, flat)
    per_group = [grads[: len(groups[0])], grads[len(groups[0]) :]]
    multipliers = one.clone().requires_grad_()
    SimplifiedMetaTrainer().compute_meta_loss(multipliers, lrs, per_group, updates).backward()
    assert relative_error(multipliers.grad, torch.stack(expected)) < 1e-8
    with pytest.raises(ValueError, match="groups disagree"):
        SimplifiedMetaTrainer().compute_meta_loss(multipliers, lrs[:1], per_group, updates)


def test_the_simplified_trainer_keeps_a_record():
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(model, lr=0.01)
    trainer = create_meta_trainer("simplified", window_size=4, improvement_threshold=0.0)
    assert isinstance(trainer, SimplifiedMetaTrainer) and trainer.get_statistics() == {}
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_of(model, batch(0, torch.float32))
        loss.backward()
        result = trainer.step(optimizer, loss.detach())
    assert result["global_step"] == 10
    found = trainer.get_statistics()
    assert len(trainer.loss_history) == 4 and found["meta/loss_improvement"] > 0
    assert found["meta/improved"] == 1.0 and trainer.improved()
    assert found["meta/avg_lr_multiplier"] == 1.0
    trainer.record_step(1.0, torch.tensor([4.0, 6.0]), 0.0)
    assert trainer.get_statistics()["meta/avg_lr_multiplier"] == (3 + 5) / 4
    trainer.improvement_threshold = 10.0
    assert not trainer.improved()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_unrolled_meta_loss_has_true_gradients(checkpointing, accumulate):
    model = Net()
    controller = moved(NestedController(hidden_dim=1).double())
    momentum = moved(L2RegressionMomentum(hidden_dim=1, num_layers=1).double())
    components = {"controller": controller, "momentum_mlp": momentum}
    batches = [batch(i) for i in range(4)]
    before = [p.detach().clone() for p in model.parameters()]

    def compute(trainer):
        return trainer.compute_meta_loss(
            model, components, batches, batch(9), loss_of, base_lr=0.05, weight_decay=0.1
        )

    trainer = create_meta_trainer(
        "unrolled", k_steps=3, use_checkpointing=checkpointing, accumulate_grad=accumulate
    )
    assert isinstance(trainer, UnrolledMetaTrainer)
    (2 * compute(trainer)).backward()
    for module in components.values():
        rows = []
        for i in range(module.weights.numel()):
            values = []
            for h in (1e-5, -1e-5):
                with torch.no_grad():
                    module.weights[i] += h
                values.append(compute(trainer).item())
                with torch.no_grad():
                    module.weights[i] -= h
            rows.append((values[0] - values[1]) / 1e-5)
        error = relative_error(module.weights.grad, torch.tensor(rows, dtype=torch.float64))
        assert (error < 1e-6) if accumulate else (error > 1e-3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())


def test_the_unrolled_trainer_teaches_a_controller():
    model = Net(torch.float32)
    controller = NestedController(hidden_dim=8)
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.02)
    trainer = UnrolledMetaTrainer(k_steps=3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = trainer.compute_meta_loss(
            model,
            {"controller": controller},
            [batch(i, torch.float32) for i in range(3)],
            batch(9, torch.float32),
            loss_of,
            base_lr=1e-3,
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and math.isfinite(losses[-1])
    assert (controller(torch.zeros(1, 3)) > 1.5).all()


def test_trainers_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match=r"Invalid mode: 'both'.*simplified, unrolled"):
        create_meta_trainer("both")
    with pytest.raises(ValueError, match="Invalid window_size"):
        SimplifiedMetaTrainer(window_size=0)
    trainer = UnrolledMetaTrainer(k_steps=3)
    batches = [batch(0)] * 3
    with pytest.raises(ValueError, match="needs as many batches, not 2"):
        trainer.compute_meta_loss(Net(), {}, batches[:2], batch(9), loss_of)
    with pytest.raises(ValueError, match="nothing to train"):
        trainer.compute_meta_loss(Net(), {}, batches, batch(9), loss_of)
    with pytest.raises(ValueError, match=r"unknown component 'controller'.*NestedController"):
        trainer.compute_meta_loss(
            Net(), {"controller": nn.Linear(1, 1)}, batches, batch(9), loss_of
        )
    with pytest.raises(ValueError, match="at most 6 features"):
        wide = NestedController(n_features=7)
        trainer.compute_meta_loss(Net(), {"controller": wide}, batches, batch(9), loss_of)
    twice = {"momentum": L2RegressionMomentum(), "momentum_mlp": L2RegressionMomentum()}
    with pytest.raises(ValueError, match="'momentum' and 'momentum_mlp' are one component"):
        trainer.compute_meta_loss(Net(), twice, batches, batch(9), loss_of)


def test_the_modules_train_an_optimizer_s_own_model():
    model = Net(torch.float32)
    optimizer = DeepNestedOptimizer(model, lr=0.01)
    step_on(optimizer, model, batch(0, torch.float32))
    first = optimizer.param_groups[0]
    assert first["controller_weights"].shape == NestedController(n_features=6).weights.shape
    assert first["momentum_weights"].shape == L2RegressionMomentum().weights.shape
