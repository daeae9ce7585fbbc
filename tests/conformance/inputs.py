"""How an optimizer's inputs are written down: options that it takes, input that it refuses."""

from __future__ import annotations

from typing import Any

from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInput,
)


def options(desc: str, **kwargs: Any) -> OptimizerInput:
    """An input without parameters, which the checks bring themselves."""
    return OptimizerInput(params=None, kwargs=kwargs, desc=desc)


def bad(
    desc: str,
    error_type: type[Exception],
    error_regex: str,
    *,
    params: Any = None,
    error_on: OptimizerErrorEnum = OptimizerErrorEnum.CONSTRUCTION_ERROR,
    **kwargs: Any,
) -> ErrorOptimizerInput:
    """An input that must be refused with this message."""
    return ErrorOptimizerInput(
        OptimizerInput(params=params, kwargs=kwargs, desc=desc),
        error_on=error_on,
        error_type=error_type,
        error_regex=error_regex,
    )
