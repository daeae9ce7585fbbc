"""The update rules as pure functions of tensors: the truth that every fast path is tested against.

Nothing here owns state, mutates its arguments or knows of optimizers; this package imports only
torch.
"""

from .adamw import adamw, bias_corrections
from .deep_momentum import deep_momentum
from .deep_nested import deep_nested
from .delta_momentum import as_matrix, delta_momentum, delta_term
from .dgd import dgd, input_decay, sgd
from .exchange import exchange
from .kahan import kahan_join, kahan_split
from .m3 import ADJUST_LR, lr_factor, m3, m3_direction, m3_momenta, m3_paper
from .matrix_form import MatrixForm
from .momentum import momentum
from .momentum_memory import (
    MEMORY_SCALES,
    MEMORY_SLICE,
    OBJECTIVES,
    advance_scales,
    correction,
    initial_memory,
    mean_square,
    memory_loss,
    memory_output,
    memory_size,
    memory_units,
    prediction_loss,
    trusted_direction,
)
from .newton_schulz import newton_schulz, ns_schedule

__all__ = [
    "ADJUST_LR",
    "MEMORY_SCALES",
    "MEMORY_SLICE",
    "OBJECTIVES",
    "MatrixForm",
    "adamw",
    "advance_scales",
    "as_matrix",
    "bias_corrections",
    "correction",
    "deep_momentum",
    "deep_nested",
    "delta_momentum",
    "delta_term",
    "dgd",
    "exchange",
    "initial_memory",
    "input_decay",
    "kahan_join",
    "kahan_split",
    "lr_factor",
    "m3",
    "m3_direction",
    "m3_momenta",
    "m3_paper",
    "mean_square",
    "memory_loss",
    "memory_output",
    "memory_size",
    "memory_units",
    "momentum",
    "newton_schulz",
    "ns_schedule",
    "prediction_loss",
    "sgd",
    "trusted_direction",
]
