"""Continual-learning metrics of one run.

``accuracy[i][j]`` is the accuracy on task j after training on task i, for T tasks in order. Low
forgetting can be bought by learning less, so learning accuracy belongs beside every figure of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

AccuracyMatrix = Sequence[Sequence[float]] | NDArray[np.float64]


def _square(accuracy: AccuracyMatrix) -> NDArray[np.float64]:
    matrix = np.asarray(accuracy, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"accuracy needs one row and one column per task, not {matrix.shape}")
    return matrix


def final_accuracy(accuracy: AccuracyMatrix) -> float:
    """Mean over all tasks after the last one."""
    return float(_square(accuracy)[-1].mean())


def average_incremental_accuracy(accuracy: AccuracyMatrix) -> float:
    """Mean over training stages of the mean over the tasks seen so far."""
    matrix = _square(accuracy)
    return float(np.mean([row[: i + 1].mean() for i, row in enumerate(matrix)]))


def learning_accuracy(accuracy: AccuracyMatrix) -> float:
    """Mean over tasks of the accuracy right after each was trained (LA)."""
    return float(np.diagonal(_square(accuracy)).mean())


def backward_transfer(accuracy: AccuracyMatrix) -> float:
    """Mean change of the earlier tasks from right after training to the end (BWT)."""
    matrix = _square(accuracy)
    if len(matrix) == 1:
        return 0.0
    return float((matrix[-1] - np.diagonal(matrix))[:-1].mean())


def forgetting(accuracy: AccuracyMatrix) -> float:
    """Mean drop of the earlier tasks from their best before the last stage (Chaudhry et al. 2018).

    With two tasks there is one such stage, and this is minus the backward transfer.
    """
    matrix = _square(accuracy)
    if len(matrix) == 1:
        return 0.0
    return float((matrix[:-1].max(axis=0) - matrix[-1])[:-1].mean())


METRICS = {
    "learning_accuracy": learning_accuracy,
    "final_accuracy": final_accuracy,
    "average_incremental_accuracy": average_incremental_accuracy,
    "backward_transfer": backward_transfer,
    "forgetting": forgetting,
}
