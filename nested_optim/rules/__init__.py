"""The update rules as pure functions of tensors: the truth that every fast path is tested against.

Nothing here owns state, mutates its arguments or knows of optimizers; this package imports only
torch.
"""

from .adamw import adamw, bias_corrections
from .dgd import dgd, input_decay, sgd
from .kahan import kahan_join, kahan_split

__all__ = ["adamw", "bias_corrections", "dgd", "input_decay", "kahan_join", "kahan_split", "sgd"]
