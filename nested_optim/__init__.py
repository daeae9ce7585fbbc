"""Drop-in PyTorch optimizers whose parameters update at their own frequency.

After *Nested Learning: The Illusion of Deep Learning Architectures* (arXiv 2512.24695).
"""

from ._version import __version__
from .deep_momentum import DeepMomentum
from .deep_nested import DeepNestedOptimizer
from .delta_momentum import DeltaMomentum
from .describe import describe
from .dgd import DGD
from .m3 import M3
from .matrix_groups import matrix_groups
from .meta import (
    ContinuumMemoryState,
    L2RegressionMomentum,
    NestedController,
    SimplifiedMetaTrainer,
    UnrolledMetaTrainer,
    create_meta_trainer,
)
from .nested import NestedOptimizer
from .param_groups import (
    build_param_groups,
    count_layers,
    depth_groups,
    group_titans_params,
    infer_param_depth,
)
from .weight_memory import WeightMemory

__all__ = [
    "DGD",
    "M3",
    "ContinuumMemoryState",
    "DeepMomentum",
    "DeepNestedOptimizer",
    "DeltaMomentum",
    "L2RegressionMomentum",
    "NestedController",
    "NestedOptimizer",
    "SimplifiedMetaTrainer",
    "UnrolledMetaTrainer",
    "WeightMemory",
    "__version__",
    "build_param_groups",
    "count_layers",
    "create_meta_trainer",
    "depth_groups",
    "describe",
    "group_titans_params",
    "infer_param_depth",
    "matrix_groups",
]
