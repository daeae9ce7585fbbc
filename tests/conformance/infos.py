"""What the conformance suite knows of each optimizer: one `Info` per class.

A new class joins with an entry in `INFOS`: its input function, its error inputs and, where one
exists, the torch optimizer that it must equal to the last bit. Everything else has defaults that
fit the optimizers of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    optim_db,
    optim_error_inputs_func_adam,
    optim_inputs_func_adam,
)

from nested_optim import (
    DGD,
    M3,
    DeepMomentum,
    DeepNestedOptimizer,
    DeltaMomentum,
    NestedOptimizer,
    kernels,
)
from nested_optim.meta import learned

from .inputs import bad, options
from .learning import PlainDeepNested, learning_errors, learning_inputs

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
        narrow_state: state keys that are bfloat16 where moments are float32.
        counters: state keys of scalars that count, in float32.
        differentiable_options: options that may be tensors with a gradient.
        unrolled_updates: how many updates in a row autograd can go back through.
        strided: implementations that serve parameters and gradients with gaps in memory.
        keeps_absent_options: a checkpoint that lacks an option leaves the live value alone.
        matrices_only: parameters must have rows and columns, of real numbers.
        exact_foreach: foreach on a CPU gives the for-loop's bits.
        updates_from_four: updates at lr 0.1 that take p from 4 to less than 1.
        narrow_options: options under which float16 loses nothing that matters.
        elementwise: whether each number of a tensor is updated on its own, so that a complex one
            is a pair of real ones.
        learned: entries of the first group that steps change: a learned module, which all
            parameters of an optimizer share.
        steep_options: options under which steps on a steep slope stay finite.
        monotonic_updates: how many updates take p**2 straight down from p = 4; a momentum goes
            past 0 after a few.
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
        narrow_state: tuple[str, ...] = (),
        counters: tuple[str, ...] = ("step", "window_count"),
        differentiable_options: tuple[str, ...] = ("lr", "weight_decay"),
        unrolled_updates: int = 2,
        strided: tuple[str, ...] = ("forloop", "foreach", "fused"),
        keeps_absent_options: bool = True,
        matrices_only: bool = False,
        exact_foreach: bool = True,
        updates_from_four: int = 100,
        narrow_options: dict[str, Any] | None = None,
        elementwise: bool = True,
        learned: tuple[str, ...] = (),
        steep_options: dict[str, Any] | None = None,
        monotonic_updates: int = 20,
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
        self.narrow_state = narrow_state
        self.counters = counters
        self.differentiable_options = differentiable_options
        self.unrolled_updates = unrolled_updates
        self.strided = strided
        self.keeps_absent_options = keeps_absent_options
        self.matrices_only = matrices_only
        self.exact_foreach = exact_foreach
        self.updates_from_four = updates_from_four
        self.narrow_options = {"eps": 0.1} if narrow_options is None else narrow_options
        self.elementwise = elementwise
        self.learned = learned
        self.steep_options = steep_options or {}
        self.monotonic_updates = monotonic_updates

    def vector(self, *shape: int) -> tuple[int, ...]:
        """This shape, or if the class must have matrices one that holds as many numbers."""
        return (*shape, 1) if self.matrices_only and len(shape) < 2 else shape

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether the class takes parameters of this dtype."""
        return not (self.matrices_only and dtype.is_complex)

    def has_kernels_on(self, device: str) -> bool:
        """Whether the class has kernels of its own that run on this type of device."""
        if self.kernels is None or (device == "cuda" and not torch.cuda.is_available()):
            return False
        return kernels.available(torch.device(device))


ADAM: OptimizerInfo = next(info for info in optim_db if info.optim_cls is Adam)

Inputs = Callable[..., list[OptimizerInput]]


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


def momentum_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """For the classes that are SGD with another momentum."""
    return [
        options("default"),
        options("non-default lr", lr=0.01),
        options("no momentum", momentum=0.0),
        options("weight_decay", weight_decay=0.1),
        options("decoupled weight_decay", weight_decay=0.1, decoupled=True),
        options("maximize, weight_decay", weight_decay=0.1, maximize=True),
        options("mean of 3, decoupled, maximize", frequency=3, decoupled=True, maximize=True),
        options("float32 state", state_dtype=torch.float32, weight_decay=0.1),
    ]


def delta_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    own = [
        options("normalized", normalized=True, momentum=0.95),
        options("plain momentum", delta_rate=0.0, weight_decay=0.1),
        options("float32 products", product_dtype=torch.float32, state_dtype=torch.float64),
    ]
    inputs = [*momentum_inputs(device), *window_inputs(device), *own]
    if torch.device(device).type == "cuda" and dtype != torch.float64:
        # By default products are in bfloat16 there, and paths are compared more closely.
        for entry in inputs:
            entry.kwargs.setdefault("product_dtype", "float32")
    return inputs


def linear_memory_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    return [*momentum_inputs(device), *window_inputs(device)]


def mlp_memory_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    own = [
        options("dot", objective="dot", memory_lr=0.01),
        options("fast learner", memory_lr=0.1, hidden=4, memory_decays=(0.5, 0.9)),
    ]
    inputs = [*momentum_inputs(device), *window_inputs(device), *own]
    return [i for i in inputs if not i.kwargs.get("capturable")]


def few_adam_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    wanted = ("default", "maximize", "amsgrad")
    return [i for i in optim_inputs_func_adam(device, dtype) if i.desc in wanted]


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


def inherited_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """A few of NestedOptimizer's, for classes that inherit its rule."""
    inputs = [*few_adam_inputs(device, dtype), *window_inputs(device)]
    for entry in inputs if dtype == torch.float16 else ():
        entry.kwargs["eps"] = 0.1
    return inputs


class M3WithoutMatrices(M3):
    """M3 whose groups follow AdamW's rule unless they say otherwise."""

    def __init__(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **{"algorithm": "adamw", **kwargs})


def m3_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    half = {"eps": 1e-4} if dtype == torch.float16 else {}
    inputs = [
        options("default", **half),
        options("no slow momentum", alpha=0.0, weight_decay=0.1, **half),
        options("row", second_moment="row", slow_frequency=2, alpha=0.5, maximize=True, **half),
        options(
            "element", second_moment="element", slow_frequency=2, alpha=0.25, nesterov=False, **half
        ),
        options("polar express, spectral", ns_coefficients="polar_express", adjust_lr="spectral"),
        options(
            "mean of 2, chunks of 2", frequency=2, slow_frequency=2, alpha=0.25, weight_decay=0.1
        ),
        options("sum of 2", frequency=2, window="sum", ns_steps=3, adjust_lr=None),
        options("float32 state", state_dtype=torch.float32, slow_frequency=1, alpha=0.25),
    ]
    if torch.device(device).type == "cuda":
        inputs.append(options("capturable", capturable=True, slow_frequency=2, alpha=0.25, lr=0.01))
    return inputs


def m3_error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    vector = torch.nn.Parameter(torch.ones(3, device=device, dtype=dtype))
    return [
        *(e for e in level_error_inputs(device, dtype) if e.optimizer_error_input.params is None),
        bad("two betas", ValueError, "Invalid betas.*takes three", betas=(0.9, 0.99)),
        bad("beta3 of 1", ValueError, "parameter at index 2: 1.0", betas=(0.9, 0.9, 1.0)),
        bad("a vector", ValueError, "no rows and columns.*matrix_groups", params=[vector]),
    ]


def momentum_error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    return [
        *level_error_inputs(device, dtype),
        bad("negative momentum", ValueError, "Invalid momentum value: -0.5", momentum=-0.5),
        bad("momentum of 2", ValueError, "Invalid momentum value: 2.0", momentum=2.0),
        bad("negative decay", ValueError, "Invalid weight_decay value: -1.0", weight_decay=-1.0),
        bad("integer state", ValueError, "Invalid state_dtype", state_dtype=torch.int32),
        bad("fused", RuntimeError, "has no fused kernel", fused=True),
        bad(
            "foreach, differentiable",
            RuntimeError,
            "`foreach` does not support `differentiable`",
            foreach=True,
            differentiable=True,
        ),
    ]


def delta_error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    return [
        *momentum_error_inputs(device, dtype),
        bad("negative rate", ValueError, "Invalid delta_rate value: -1.0", delta_rate=-1.0),
        bad(
            "float8 products",
            ValueError,
            "Invalid product_dtype: torch.float8_e4m3fn. Choose one",
            product_dtype=torch.float8_e4m3fn,
        ),
        bad(
            "integer products", ValueError, "Invalid product_dtype: 'int32'", product_dtype="int32"
        ),
        bad("nan rate", ValueError, "Invalid delta_rate value: nan", delta_rate=float("nan")),
    ]


def deep_error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    return [
        *momentum_error_inputs(device, dtype),
        bad("unknown memory", ValueError, "Invalid memory: 'rnn'.*linear, mlp", memory="rnn"),
        bad("unknown objective", ValueError, "Invalid objective: 'l1'.*l2, dot", objective="l1"),
        bad("linear l2", ValueError, "is DeltaMomentum", memory="linear", objective="l2"),
        bad("momentum of 1", ValueError, "Invalid momentum value: 1.0; below 1", momentum=1.0),
        bad("no hidden units", ValueError, "Invalid hidden: 0", hidden=0),
        bad("negative memory_lr", ValueError, "Invalid memory_lr: -1.0", memory_lr=-1.0),
        bad("decay of 1", ValueError, "Invalid memory_decays.*two", memory_decays=(0.5, 1.0)),
        bad("capturable", RuntimeError, "does not support `capturable`", capturable=True),
        bad("differentiable", RuntimeError, "not support `differentiable`", differentiable=True),
        bad(
            "hidden units of a linear memory",
            ValueError,
            "hidden: a linear memory has no such option",
            memory="linear",
            objective="dot",
            hidden=4,
        ),
    ]


class LinearDeepMomentum(DeepMomentum):
    """DeepMomentum with the memory that serves what an MLP refuses; here a class of its own."""

    def __init__(self, params: Any = None, **kwargs: Any) -> None:
        super().__init__(params, **{"memory": "linear", "objective": "dot", **kwargs})


#: What the classes with SGD's options have in common.
MOMENTUM: dict[str, Any] = {
    "supported_impls": ("foreach", "differentiable"),
    "supports_fused_on": (),
    "default_path": {"cpu": "_multi_tensor_", "cuda": "_multi_tensor_"},
    "narrow_options": {},
    "steep_options": {"lr": 1e-5},
    "monotonic_updates": 4,
}


class PlainDGD(DGD):
    """DGD without decay unless told otherwise.

    The checks write gradients by hand and copy optimizers without a model. With decay both are
    refused: what it does to layers, and to parameters beside them, is in ``tests/test_dgd*.py``.
    """

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


def learning_error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    return [*level_error_inputs(device, dtype), *learning_errors()]


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
        M3,
        optim_inputs_func=explicit(m3_inputs, weight_decay=0.0),
        optim_error_inputs_func=m3_error_inputs,
        shapes=((10, 5), (5, 10), (1, 6), (6, 1), (4, 4), (0, 3)),
        supported_impls=("foreach", "differentiable"),
        supports_fused_on=(),
        default_path={"cpu": "_multi_tensor_", "cuda": "_multi_tensor_"},
        wide_state=("window_sum", "slow_momentum_buffer", "second_moment", "slow_update"),
        counters=("step", "window_count", "slow_count"),
        matrices_only=True,
        exact_foreach=False,
        updates_from_four=400,
    ),
    Info(
        M3WithoutMatrices,
        kernels="nested_optim.kernels.level_adamw",
        optim_inputs_func=explicit(inherited_inputs, weight_decay=0.0),
        optim_error_inputs_func=nested_error_inputs,
        references=(Reference(AdamW, {}),),
        functional=("nested_optim.nested", "nestedoptimizer"),
        differentiable_options=("lr", "weight_decay", "betas"),
    ),
    Info(
        DeltaMomentum,
        optim_inputs_func=explicit(delta_inputs, weight_decay=0.0),
        optim_error_inputs_func=delta_error_inputs,
        elementwise=False,  # a complex parameter is a complex matrix
        **MOMENTUM,
    ),
    Info(
        DeepMomentum,
        optim_inputs_func=explicit(mlp_memory_inputs, weight_decay=0.0),
        optim_error_inputs_func=deep_error_inputs,
        wide_state=("window_sum", "scales"),
        elementwise=False,  # a tensor's numbers share a scale
        learned=("memory_weights", "memory_exp_avg", "memory_exp_avg_sq", "memory_step"),
        **{**MOMENTUM, "supported_impls": ("foreach",), "has_capturable_arg": False},
    ),
    Info(
        LinearDeepMomentum,
        optim_inputs_func=explicit(linear_memory_inputs, weight_decay=0.0),
        optim_error_inputs_func=momentum_error_inputs,
        functional=("nested_optim.deep_momentum", "deepmomentum"),
        **MOMENTUM,
    ),
    Info(
        PlainDGD,
        optim_inputs_func=explicit(dgd_inputs, weight_decay=0.0),
        optim_error_inputs_func=dgd_error_inputs,
        references=(Reference(SGD, {}),),
        supported_impls=("foreach", "differentiable"),
        supports_fused_on=(),
        has_capturable_arg=False,
        default_path={"cpu": "_multi_tensor_", "cuda": "_multi_tensor_"},
        functional=("nested_optim.dgd", "dgd"),
        strided=("forloop", "foreach"),
    ),
    Info(
        AdamWDGD,
        optim_inputs_func=explicit(without_capture(inherited_inputs), weight_decay=0.0),
        optim_error_inputs_func=dgd_error_inputs,
        references=(Reference(AdamW, {}),),
        supported_impls=("foreach", "differentiable"),
        supports_fused_on=(),
        has_capturable_arg=False,
        default_path={"cpu": "_multi_tensor_", "cuda": "_multi_tensor_"},
        functional=("nested_optim.nested", "nestedoptimizer"),
        differentiable_options=("lr", "weight_decay", "betas"),
        strided=("forloop", "foreach"),
    ),
    Info(
        DeepNestedOptimizer,
        optim_inputs_func=explicit(learning_inputs, weight_decay=0.0),
        optim_error_inputs_func=learning_error_inputs,
        supported_impls=("foreach",),
        supports_fused_on=(),
        has_capturable_arg=False,
        default_path={"cpu": "_multi_tensor_", "cuda": "_multi_tensor_"},
        functional=("nested_optim.deep_nested_steps", "deepnestedoptimizer"),
        wide_state=("window_sum", "exp_avg_slow1", "exp_avg_slow2", "update_trace"),
        narrow_state=("previous_grad", "initial_param"),
        elementwise=False,  # tensors and groups share what they learn
        learned=learned.KEYS,
        strided=("forloop", "foreach"),
        monotonic_updates=6,  # steps grow while they go the right way, and pass 0 sooner
    ),
    Info(
        PlainDeepNested,
        kernels="nested_optim.kernels.level_adamw",
        optim_inputs_func=explicit(inherited_inputs, weight_decay=0.0),
        optim_error_inputs_func=nested_error_inputs,
        references=(Reference(AdamW, {}),),
        functional=("nested_optim.nested", "nestedoptimizer"),
        differentiable_options=("lr", "weight_decay", "betas"),
        learned=("global_step",),
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
