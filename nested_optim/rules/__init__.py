"""The update rules as pure functions of tensors: the truth that every fast path is tested against.

Nothing here owns state, mutates its arguments or knows of optimizers; this package imports only
torch.
"""

from .adamw import adamw, bias_corrections
from .kahan import kahan_join, kahan_split
from .m3 import ADJUST_LR, lr_factor, m3, m3_direction, m3_momenta, m3_paper
from .matrix_form import MatrixForm
from .newton_schulz import newton_schulz, ns_schedule

__all__ = [
    "ADJUST_LR",
    "MatrixForm",
    "adamw",
    "bias_corrections",
    "kahan_join",
    "kahan_split",
    "lr_factor",
    "m3",
    "m3_direction",
    "m3_momenta",
    "m3_paper",
    "newton_schulz",
    "ns_schedule",
]
