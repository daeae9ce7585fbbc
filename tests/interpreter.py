"""Kernels as Triton's interpreter runs them: on the host, on CPU tensors."""

import importlib
from contextlib import contextmanager

import pytest
import torch

from nested_optim import kernels

#: Every module of kernels: one of them may call another's.
MODULES = (
    "delta",
    "descend",
    "exchange",
    "learned_adamw",
    "learned_layers",
    "learned_networks",
    "level_adamw",
    "look_back",
    "momenta",
    "normalize",
    "symmetric",
)


def _language():
    """Triton's modules that kernels take their functions from."""
    names = ("", ".core", ".math", ".standard", ".random")
    return [importlib.import_module(f"triton.language{name}") for name in names]


def _reload():
    """All kernels, and Triton's own functions, as they are made for what is set now."""
    language = importlib.import_module("triton.language")
    standard = importlib.import_module("triton.language.standard")
    shared = [name for name, value in vars(standard).items() if vars(language).get(name) is value]
    standard = importlib.reload(standard)
    for name in shared:
        setattr(language, name, getattr(standard, name))
    names = [f"nested_optim.kernels.{name}" for name in MODULES]
    return dict(zip(MODULES, (importlib.reload(importlib.import_module(n)) for n in names)))


def _cast(interpreter):
    """The interpreter's casts, but float32 is rounded to bfloat16 as a GPU does, and not cut."""
    real, language = (
        interpreter.InterpreterBuilder.cast_impl,
        importlib.import_module("triton.language"),
    )

    def cast(self, src, kind):
        if (src.dtype.scalar, kind.scalar) != (language.float32, language.bfloat16):
            return real(self, src, kind)
        rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy(), kind.scalar)

    return cast


def _patch(interpreter):
    """The interpreter's patch of Triton's language, once in a launch.

    It makes one for every function that a kernel calls, which takes as long as all else.
    """
    real, known = interpreter._patch_lang, set()

    def patch(fn):
        language = importlib.import_module("triton.language")
        wanted = {m.__name__ for m in fn.__globals__.values() if m in (language, language.core)}
        if known and wanted <= known:
            return None  # within a function of a kernel, where nobody looks at it
        of_launch, scope = not known, real(fn)
        known.update(wanted)
        if of_launch:
            restore = scope.restore
            scope.restore = lambda: (known.clear(), restore())
        return scope

    return patch


@contextmanager
def interpreted():
    """The modules of kernels by name, interpreted whoever has imported them; afterwards as ever."""
    pytest.importorskip("triton")
    before = [(module, dict(vars(module))) for module in _language()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        interpreter = importlib.import_module("triton.runtime.interpreter")
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", _cast(interpreter))
        if hasattr(interpreter, "_LangPatchScope"):  # older ones do not say when a launch is over
            patch.setattr(interpreter, "_patch_lang", _patch(interpreter))
        try:
            assert kernels.available(torch.device("cpu"))
            yield _reload()
        finally:
            patch.undo()
            for module, names in before:  # the interpreter leaves some of its own there
                vars(module).update(names)
            _reload()
