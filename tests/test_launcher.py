"""Kernels that are launched again: what was compiled for a kind of arguments, and only for it."""

import pytest

pytest.importorskip("triton")

from nested_optim.kernels import launcher


class Compiled:
    def __init__(self, calls, name):
        self.calls, self.name = calls, name

    def run(self):
        """What tells a compiled kernel from the interpreter's None."""

    def __getitem__(self, grid):
        return lambda *args: self.calls.append((self.name, grid, args))


class Kernel:
    """Compiles anew at every launch, as far as one can tell."""

    def __init__(self, interpreted=False):
        self.calls, self.interpreted = [], interpreted

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.calls.append(("kernel", grid, args, options))
            return None if self.interpreted else Compiled(self.calls, len(self.calls))

        return launch


def test_a_kind_is_compiled_once_and_given_all_arguments_again():
    kernel = Kernel()
    launch = launcher.Launcher(kernel, num_warps=4)
    launch("a", (2, 1, 1), (1.0, True), num_stages=3)
    launch("a", (3, 1, 1), (2.0, True), num_stages=3)
    launch("b", (3, 1, 1), (2.0, False))
    launch("a", (1, 1, 1), (3.0, True))
    assert kernel.calls == [
        ("kernel", (2, 1, 1), (1.0, True), {"num_warps": 4, "num_stages": 3}),
        (1, (3, 1, 1), (2.0, True)),
        ("kernel", (3, 1, 1), (2.0, False), {"num_warps": 4}),
        (1, (1, 1, 1), (3.0, True)),
    ]


def test_what_cannot_be_launched_again_goes_through_triton_every_time(monkeypatch):
    interpreted, old = Kernel(interpreted=True), Kernel()
    launch = launcher.Launcher(interpreted)
    for _ in range(2):
        launch("a", (1, 1, 1), ())
    monkeypatch.setattr(launcher, "_CONSTANTS_ARE_GIVEN", False)
    launch = launcher.Launcher(old)
    for _ in range(2):
        launch("a", (1, 1, 1), ())
    for kernel in (interpreted, old):
        assert [call[0] for call in kernel.calls] == ["kernel", "kernel"]
