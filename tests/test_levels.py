import numpy as np
import pytest

from nested_optim import levels


@pytest.mark.parametrize("value", [1, 2, 100, np.int64(7), 2**24])
def test_integers_from_one_are_frequencies(value):
    assert levels.check_frequency(value) == int(value)
    assert type(levels.check_frequency(value)) is int


@pytest.mark.parametrize(
    "value", [0, -1, 2.5, 2.0, True, False, "3", None, 2**24 + 1, float("nan")]
)
def test_nothing_else_is_a_frequency(value):
    with pytest.raises(ValueError, match=r"group 1: Invalid frequency: .* gradients per update"):
        levels.check_frequency(value, "group 1: ")


def test_windows_are_mean_or_sum():
    assert levels.check_window("sum") == "sum"
    with pytest.raises(ValueError, match=r"Invalid window: 'max'\. Choose one of mean, sum"):
        levels.check_window("max")


def test_windows_are_disjoint_and_close_at_multiples_of_the_frequency():
    closed, count = [], 0
    for gradient in range(1, 13):
        count += 1
        if levels.window_closes(count, 4):
            closed.append(gradient)
            count = 0
    assert closed == [4, 8, 12]
    assert levels.updates_expected(12, 4) == 3
    assert levels.gradients_seen(updates=3, count=2, frequency=4) == 14


def test_the_mean_divides_by_the_gradients_seen_and_the_sum_by_one():
    assert levels.divisor(3, "mean") == 3
    assert levels.divisor(3, "sum") == 1
