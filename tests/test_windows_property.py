"""Random lives of an optimizer against a model of windows in plain Python numbers."""

import copy
import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nested_optim import NestedOptimizer

EPS, BETA1, BETA2 = 1e-3, 0.8, 0.9


class Scalar:
    """One scalar parameter, its AdamW and its window, as the definition says."""

    def __init__(self, value, group):
        self.value, self.group = value, group
        self.step, self.first, self.second = 0, 0.0, 0.0
        self.window = []

    def see(self, gradient):
        self.window.append(gradient)
        if len(self.window) >= self.group["frequency"]:
            self.update()

    def update(self):
        gradient = sum(self.window)
        if self.group["window"] == "mean":
            gradient /= len(self.window)
        self.window = []
        lr, decay = self.group["lr"], self.group["weight_decay"]
        if self.group["decoupled"]:
            self.value *= 1 - lr * decay
        else:
            gradient += decay * self.value
        self.step += 1
        self.first = BETA1 * self.first + (1 - BETA1) * gradient
        self.second = BETA2 * self.second + (1 - BETA2) * gradient**2
        first = self.first / (1 - BETA1**self.step)
        second = self.second / (1 - BETA2**self.step)
        self.value -= lr * first / (math.sqrt(second) + EPS)


numbers = st.integers(-8, 8).map(lambda i: i / 2)
frequencies = st.integers(1, 5)
options = st.fixed_dictionaries(
    {
        "frequency": frequencies,
        "window": st.sampled_from(["mean", "sum"]),
        "lr": st.sampled_from([0.0, 0.01, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decoupled": st.booleans(),
    }
)


class OptimizerLife(RuleBasedStateMachine):
    @initialize(
        flags=st.sampled_from([{"foreach": True}, {"foreach": False}, {"fused": True}]),
        group=options,
        values=st.lists(numbers, min_size=1, max_size=3),
    )
    def begin(self, flags, group, values):
        self.flags = {"betas": (BETA1, BETA2), "eps": EPS, **flags}
        self.model, self.params = [], []
        self.optimizer = self.build([self.new_group(group, values)])

    def new_group(self, group, values):
        self.model.append([Scalar(value, dict(group)) for value in values])
        params = [torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in values]
        self.params.append(params)
        return {"params": params, **group}

    def build(self, groups):
        return NestedOptimizer(groups, **self.flags)

    @rule(data=st.data())
    def step(self, data):
        for scalars, params in zip(self.model, self.params):
            for scalar, param in zip(scalars, params):
                gradient = data.draw(st.none() | numbers)
                fresh = param not in self.optimizer.state
                if gradient == 0 and fresh and scalar.group["lr"] == 0:
                    gradient = 1.0  # a probe for state by definition: tested elsewhere
                param.grad = None if gradient is None else torch.full_like(param, gradient)
                if gradient is not None:
                    scalar.see(gradient)
        self.optimizer.step()

    @rule(group=st.integers(0, 3), frequency=frequencies)
    def edit_frequency(self, group, frequency):
        group %= len(self.model)
        self.optimizer.param_groups[group]["frequency"] = frequency
        for scalar in self.model[group]:
            scalar.group["frequency"] = frequency

    @rule(group=st.integers(0, 3), lr=st.sampled_from([0.0, 0.02, 0.2]))
    def edit_lr(self, group, lr):
        group %= len(self.model)
        self.optimizer.param_groups[group]["lr"] = lr
        for scalar in self.model[group]:
            scalar.group["lr"] = lr

    @rule()
    def flush(self):
        pending = [s for scalars in self.model for s in scalars if s.window]
        for scalar in pending:
            scalar.update()
        assert self.optimizer.flush() == len(pending)

    @rule()
    def save_and_load(self):
        saved = copy.deepcopy(self.optimizer.state_dict())
        self.params = [
            [torch.nn.Parameter(p.detach().clone()) for p in params] for params in self.params
        ]
        groups = [
            {"params": params, **scalars[0].group}
            for scalars, params in zip(self.model, self.params)
        ]
        self.optimizer = self.build(groups)
        self.optimizer.load_state_dict(saved)

    @precondition(lambda self: len(self.model) < 4)
    @rule(group=options, values=st.lists(numbers, min_size=1, max_size=2))
    def add_param_group(self, group, values):
        self.optimizer.add_param_group(self.new_group(group, values))

    @invariant()
    def parameters_and_windows_are_the_model_s(self):
        for scalars, params in zip(self.model, self.params):
            for scalar, param in zip(scalars, params):
                assert math.isclose(param.item(), scalar.value, rel_tol=1e-9, abs_tol=1e-9)
                state = self.optimizer.state.get(param)
                if state:
                    assert state["step"].item() == scalar.step
                    assert state["window_count"].item() == len(scalar.window)
                    if scalar.window:
                        assert math.isclose(
                            state["window_sum"].item(), sum(scalar.window), abs_tol=1e-12
                        )


TestOptimizerLife = OptimizerLife.TestCase
TestOptimizerLife.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
