"""Drop-in PyTorch optimizers whose parameters update at their own frequency.

After *Nested Learning: The Illusion of Deep Learning Architectures* (arXiv 2512.24695).
"""

from ._version import __version__
from .describe import describe
from .nested import NestedOptimizer

__all__ = ["NestedOptimizer", "__version__", "describe"]
