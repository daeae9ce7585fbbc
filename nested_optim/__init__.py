"""Drop-in PyTorch optimizers whose parameters update at their own frequency.

After *Nested Learning: The Illusion of Deep Learning Architectures* (arXiv 2512.24695).
"""

from ._version import __version__
from .describe import describe
from .dgd import DGD
from .nested import NestedOptimizer
from .param_groups import (
    build_param_groups,
    count_layers,
    depth_groups,
    group_titans_params,
    infer_param_depth,
)

__all__ = [
    "DGD",
    "NestedOptimizer",
    "__version__",
    "build_param_groups",
    "count_layers",
    "depth_groups",
    "describe",
    "group_titans_params",
    "infer_param_depth",
]
