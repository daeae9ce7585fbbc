"""Learning an update rule while it is used: the pieces of ``DeepNestedOptimizer``."""

from .continuum import ContinuumMemoryState
from .controller import NestedController
from .momentum import L2RegressionMomentum
from .trainers import SimplifiedMetaTrainer, UnrolledMetaTrainer, create_meta_trainer

__all__ = [
    "ContinuumMemoryState",
    "L2RegressionMomentum",
    "NestedController",
    "SimplifiedMetaTrainer",
    "UnrolledMetaTrainer",
    "create_meta_trainer",
]
