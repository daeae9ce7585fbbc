"""The bytes that a step has to move, whatever moves them."""

from __future__ import annotations

from statistics import fmean

from torch import Tensor

from .workload import Runner

WINDOW_BYTES = 4  # windows are float32


def update_bytes(param: int, grad: int, state: int) -> int:
    """Per parameter: read the gradient, read and write the parameter and its state."""
    return grad + 2 * (param + state)


def step_bytes(frequency: int, param: int, grad: int, state: int) -> list[int]:
    """The same for each step of a window, given the bytes of each per parameter.

    Opening it writes the gradient to the sum, the steps between read and write the sum, and the
    step that closes it reads the sum and updates. A window of one gradient needs no sum.
    """
    if frequency == 1:
        return [update_bytes(param, grad, state)]
    opening = grad + WINDOW_BYTES
    between = grad + 2 * WINDOW_BYTES
    closing = WINDOW_BYTES + update_bytes(param, grad, state)
    return [opening, *[between] * (frequency - 2), closing]


def mean_step_bytes(runner: Runner) -> int:
    """Bytes per step over a period, from the dtypes that the optimizer keeps its state in.

    Call it after a step. State counts where it is as large as the parameter; windows and counters
    are no part of it.
    """
    state: dict[Tensor, int] = dict.fromkeys(runner.params, 0)
    for p, tensor in runner.state_tensors():
        if tensor.numel() == p.numel() and not _is_window(runner, p, tensor):
            state[p] += tensor.element_size()
    total = 0.0
    for p, frequency in zip(runner.params, runner.frequencies):
        assert p.grad is not None
        each = step_bytes(frequency, p.element_size(), p.grad.element_size(), state[p])
        total += p.numel() * fmean(each)
    return round(total)


def state_bytes(runner: Runner) -> int:
    return sum(t.numel() * t.element_size() for _, t in runner.state_tensors())


def _is_window(runner: Runner, param: Tensor, tensor: Tensor) -> bool:
    return runner.optimizer.state[param].get("window_sum") is tensor
