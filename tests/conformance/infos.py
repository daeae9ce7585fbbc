"""What the conformance suite knows of each optimizer: one `Info` per class.

A new class joins with an entry in `INFOS`: its input function, its error inputs and, where one
exists, the torch optimizer that it must equal to the last bit. Everything else has defaults that
fit the optimizers of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim import Adam, AdamW, Optimizer
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    optim_db,
    optim_error_inputs_func_adam,
    optim_inputs_func_adam,
)

from nested_optim import DGD, NestedOptimizer, kernels

#: The name under which a class's own kernels count among its functional paths.
KERNELS = "kernels"


class Reference(NamedTuple):
    """A torch optimizer, and the options with which a class here is the same optimizer."""

    optim_cls: type[Optimizer]
    options: dict[str, Any]


class Info(OptimizerInfo):
    """An `OptimizerInfo` with what torch's own suite has no word for.

    Args:
        optim_cls: the class under test.
        references: torch optimizers that it equals to the last bit under the given options.
        shapes: the parameters' shapes.
        kernels: the module whose ``step`` launches the class's own kernels; where they run,
            they are what ``fused=True`` asks for.
        default_path: the functional path a float parameter takes by default, per device type
            (default: foreach, but on CUDA the class's kernels).
        functional: module and suffix of `_single_tensor_*`, `_multi_tensor_*`, `_fused_*`
            (default: the class's own module, and its name in lower case).
        wide_state: state keys that are float32 or wider whatever the parameter's dtype.
        counters: state keys of scalars that count, in float32.
        differentiable_options: options that may be tensors with a gradient.
        unrolled_updates: how many updates in a row autograd can go back through.
        strided: implementations that serve parameters and gradients with gaps in memory.
        keeps_absent_options: a checkpoint that lacks an option leaves the live value alone.
        torch_options: what `OptimizerInfo` takes.
    """

    def __init__(
        self,
        optim_cls: type[Optimizer],
        *,
        references: tuple[Reference, ...] = (),
        shapes: tuple[tuple[int, ...], ...] = ((10, 5), (10,), (), (3, 2, 4), (0, 3)),
        kernels: str | None = None,
        default_path: dict[str, str] | None = None,
        functional: tuple[str, str] | None = None,
        wide_state: tuple[str, ...] = ("window_sum",),
        counters: tuple[str, ...] = ("step", "window_count"),
        differentiable_options: tuple[str, ...] = ("lr", "weight_decay"),
        unrolled_updates: int = 2,
        strided: tuple[str, ...] = ("forloop", "foreach", "fused"),
        keeps_absent_options: bool = True,
        **torch_options: Any,
    ) -> None:
        torch_options.setdefault("scheduler_inputs", ADAM.scheduler_inputs)
        torch_options.setdefault("supported_impls", ("foreach", "differentiable", "fused"))
        torch_options.setdefault("supports_fused_on", ("cpu", "cuda"))
        torch_options.setdefault("has_capturable_arg", True)
        super().__init__(optim_cls, **torch_options)
        self.references = references
        self.shapes = shapes
        self.kernels = kernels
        on_cuda = KERNELS if self.has_kernels_on("cuda") else "_multi_tensor_"
        self.default_path = default_path or {"cpu": "_multi_tensor_", "cuda": on_cuda}
        self.functional = functional or (optim_cls.__module__, optim_cls.__name__.lower())
        self.wide_state = wide_state
        self.counters = counters
        self.differentiable_options = differentiable_options
        self.unrolled_updates = unrolled_updates
        self.strided = strided
        self.keeps_absent_options = keeps_absent_options

    def has_kernels_on(self, device: str) -> bool:
        """Whether the class has kernels of its own that run on this type of device."""
        if self.kernels is None or (device == "cuda" and not torch.cuda.is_available()):
            return False
        return kernels.available(torch.device(device))


ADAM: OptimizerInfo = next(info for info in optim_db if info.optim_cls is Adam)

Inputs = Callable[..., list[OptimizerInput]]


def options(desc: str, **kwargs: Any) -> OptimizerInput:
    """An input without parameters, which the checks bring themselves."""
    return OptimizerInput(params=None, kwargs=kwargs, desc=desc)


def explicit(inputs: Inputs, **values: Any) -> Inputs:
    """The same inputs with these options spelled out where they were left to the defaults.

    torch's inputs leave weight decay to Adam's default of 0; a check for "no weight decay" then
    misreads a class whose default is another.
    """

    def spelled_out(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
        return [
            OptimizerInput(params=i.params, kwargs={**values, **i.kwargs}, desc=i.desc)
            for i in inputs(device, dtype)
        ]

    return spelled_out


def window_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """Windows of more than one gradient, for any class with levels."""
    inputs = [
        options("mean of 2", frequency=2, weight_decay=0.0),
        options("sum of 2, weight_decay", frequency=2, window="sum", weight_decay=0.1),
    ]
    if torch.device(device).type == "cuda":
        inputs.append(options("capturable mean of 2", frequency=2, capturable=True, lr=0.01))
    return inputs


def nested_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    own = [
        options("coupled weight_decay", decoupled=False, weight_decay=0.1),
        options("mean of 3, coupled, maximize", frequency=3, decoupled=False, maximize=True),
        options("float32 state", state_dtype=torch.float32, weight_decay=0.1),
    ]
    inputs = [*optim_inputs_func_adam(device, dtype), *window_inputs(device), *own]
    if dtype == torch.float16:  # where 1e-8 is 0
        for entry in inputs:
            entry.kwargs["eps"] = 0.1
    return inputs


def few_adam_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    wanted = ("default", "maximize", "amsgrad")
    return [i for i in optim_inputs_func_adam(device, dtype) if i.desc in wanted]


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


def level_error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """What every class with levels refuses."""
    embedding = torch.nn.Embedding(4, 3, sparse=True, device=device, dtype=dtype)
    embedding(torch.zeros(1, dtype=torch.long, device=device)).sum().backward()
    weight = torch.nn.Parameter(torch.ones(1, 1, device=device, dtype=dtype))
    return [
        bad("negative lr", ValueError, "Invalid learning rate: -0.1", lr=-0.1),
        bad("nan lr", ValueError, "Invalid learning rate: nan", lr=float("nan")),
        bad("zero frequency", ValueError, "Invalid frequency: 0.*integer", frequency=0),
        bad("negative frequency", ValueError, "Invalid frequency: -1.*integer", frequency=-1),
        bad("fractional frequency", ValueError, "Invalid frequency: 2.5.*integer", frequency=2.5),
        bad("boolean frequency", ValueError, "Invalid frequency: True.*integer", frequency=True),
        bad("unknown window", ValueError, "Invalid window: 'median'.*mean, sum", window="median"),
        bad(
            "bad option of a group",
            ValueError,
            "param group 0.*Invalid frequency: 0",
            params=[{"params": [weight], "frequency": 0}],
        ),
        bad(
            "sparse gradient",
            RuntimeError,
            "does not support sparse gradients.*param group 0.*sparse=False",
            params=list(embedding.parameters()),
            error_on=OptimizerErrorEnum.STEP_ERROR,
        ),
    ]


def nested_error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    return [
        *optim_error_inputs_func_adam(device, dtype),
        *level_error_inputs(device, dtype),
        bad("negative eps", ValueError, "Invalid epsilon value: -1.0", eps=-1.0),
        bad("beta2 of 1", ValueError, "Invalid beta parameter at index 1: 1.0", betas=(0.9, 1.0)),
        bad("integer state", ValueError, "Invalid state_dtype", state_dtype=torch.int32),
        bad("fused, foreach", RuntimeError, "`fused` and `foreach`", fused=True, foreach=True),
        bad(
            "fused, differentiable",
            RuntimeError,
            "`fused` does not support `differentiable`",
            fused=True,
            differentiable=True,
        ),
    ]


class PlainDGD(DGD):
    """DGD without decay unless told otherwise: the checks have parameters, but no layers."""

    def __init__(self, *args: Any, decay: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, decay=decay, **kwargs)


class AdamWDGD(PlainDGD):
    """The same on AdamW's step."""

    def __init__(self, *args: Any, base: str = "adamw", **kwargs: Any) -> None:
        super().__init__(*args, base=base, **kwargs)


def dgd_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    return [
        options("default"),
        options("non-default lr", lr=2e-3),
        options("weight_decay, maximize", weight_decay=0.1, maximize=True),
        options("mean of 2", frequency=2, weight_decay=0.0),
        options("sum of 2, weight_decay", frequency=2, window="sum", weight_decay=0.1),
        options("float32 state", state_dtype=torch.float32, weight_decay=0.1),
    ]


def dgd_error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    return [
        *level_error_inputs(device, dtype),
        bad("negative decay", ValueError, "Invalid decay: -1.0", decay=-1.0),
        bad("infinite decay", ValueError, "Invalid decay: inf", decay=float("inf")),
        bad("decay from YAML", ValueError, "Invalid decay: '1e-4'", decay="1e-4"),
        bad("boolean decay", ValueError, "Invalid decay: True", decay=True),
        bad("decay without a model", ValueError, "pass the model.*or decay=0", decay=0.5),
        bad("unknown base", ValueError, "Invalid base: 'lion'.*sgd, adamw", base="lion"),
        bad("unknown batch", ValueError, "Invalid batch: 'all'.*mean, exact", batch="all"),
        bad("unknown reduction", ValueError, "Invalid reduction", reduction="none"),
        bad("exact AdamW", ValueError, "needs base='sgd'", base="adamw", batch="exact"),
        bad("amsgrad without moments", ValueError, "amsgrad", base="sgd", amsgrad=True),
        bad("no tokens", ValueError, "Invalid max_tokens: 0", max_tokens=0),
        bad("no samples", ValueError, "Invalid window_samples: 1.5", window_samples=1.5),
        bad("capturable", RuntimeError, "shapes in a CUDA graph are fixed", capturable=True),
        bad("fused", RuntimeError, "no fused kernel", fused=True),
        bad(
            "differentiable decay",
            RuntimeError,
            "`differentiable` needs decay=0",
            differentiable=True,
            decay=1.0,
        ),
    ]


def without_capture(inputs: Inputs) -> Inputs:
    """The same inputs less those for CUDA graphs."""

    def eager(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
        return [i for i in inputs(device, dtype) if not i.kwargs.get("capturable")]

    return eager


INFOS: list[Info] = [
    Info(
        NestedOptimizer,
        kernels="nested_optim.kernels.level_adamw",
        optim_inputs_func=explicit(nested_inputs, weight_decay=0.0),
        optim_error_inputs_func=nested_error_inputs,
        references=(Reference(AdamW, {}), Reference(Adam, {"decoupled": False})),
        differentiable_options=("lr", "weight_decay", "betas"),
    ),
    Info(
        PlainDGD,
        optim_inputs_func=explicit(dgd_inputs, weight_decay=0.0),
        optim_error_inputs_func=dgd_error_inputs,
        supported_impls=("foreach", "differentiable"),
        supports_fused_on=(),
        has_capturable_arg=False,
        default_path={"cpu": "_multi_tensor_", "cuda": "_multi_tensor_"},
        functional=("nested_optim.dgd", "dgd"),
        strided=("forloop", "foreach"),
    ),
    Info(
        AdamWDGD,
        optim_inputs_func=explicit(without_capture(nested_inputs), weight_decay=0.0),
        optim_error_inputs_func=dgd_error_inputs,
        references=(Reference(AdamW, {}), Reference(Adam, {"decoupled": False})),
        supported_impls=("foreach", "differentiable"),
        supports_fused_on=(),
        has_capturable_arg=False,
        default_path={"cpu": "_multi_tensor_", "cuda": "_multi_tensor_"},
        functional=("nested_optim.nested", "nestedoptimizer"),
        differentiable_options=("lr", "weight_decay", "betas"),
        strided=("forloop", "foreach"),
    ),
    # The suite's own check: what torch's optimizer fails is no conformance.
    Info(
        AdamW,
        optim_inputs_func=explicit(few_adam_inputs, weight_decay=0.0),
        optim_error_inputs_func=optim_error_inputs_func_adam,
        default_path={"cpu": "_single_tensor_", "cuda": "_multi_tensor_"},
        functional=("torch.optim.adam", "adam"),
        unrolled_updates=1,
        strided=("forloop", "foreach"),  # fused reads and writes what lies in the gaps
        keeps_absent_options=False,
    ),
]
