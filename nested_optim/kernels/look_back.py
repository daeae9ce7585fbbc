"""What gradients say of the way from where training began, see :mod:`nested_optim.meta.long_run`.

Two launches between the pass over the parameters, which sums up over the spans of tensors, and
:func:`.learned_networks.learn_kernel`, which overwrites what the controller saw.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launcher import Launcher
from .learned_layers import add_controller, network, number_at, slope

#: Spans per program that adds them up, and numbers per pass of the other's loops.
PART, BLOCK = 256, 1024


@triton.jit
def way_kernel(sums, bounds, ways, PART: tl.constexpr):
    """What the gradients of a part of a group say of the way that its parameters have come.

    Args:
        sums: float64 ``(spans, SUMS)``, as :func:`.learned_adamw.pass_kernel` left them.
        bounds: int64 ``(parts + 1,)``, where each part's sums begin, at most ``PART`` of them.
        ways: float64 ``(parts, 3)``, written here: the product of gradient and way, and the
            squared lengths of both.
    """
    pid = tl.program_id(0)
    at = tl.load(bounds + pid) + tl.arange(0, PART)
    known = at < tl.load(bounds + pid + 1)
    row = sums + at * 16
    tl.store(ways + pid * 3, tl.sum(tl.load(row + 10, mask=known, other=0.0)))
    tl.store(ways + pid * 3 + 1, tl.sum(tl.load(row, mask=known, other=0.0)))
    tl.store(ways + pid * 3 + 2, tl.sum(tl.load(row + 11, mask=known, other=0.0)))


@triton.jit
def _of_group(ways, parts, group, column, BLOCK: tl.constexpr):
    """The sum of a column of ``ways`` over a group's parts."""
    end = tl.load(parts + group + 1)
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.float64)
    for at in range(tl.load(parts + group), end, BLOCK):
        found += tl.load(ways + (at + lanes) * 3 + column, mask=at + lanes < end, other=0.0)
    return tl.sum(found)


@triton.jit(do_not_specialize=["n_looked"])
def look_kernel(
    rows,
    settings,
    controller,
    controller_start,
    ways,
    parts,
    looked,
    kept,
    found,
    n_looked,
    FADES: tl.constexpr,
    KEPT: tl.constexpr,
    WIDE: tl.constexpr,
    CONTROLLER: tl.constexpr,
    CONTROLLER_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather what the ways of the groups looked at say, if all of it is finite; one program.

    Args:
        rows: see :func:`.learned_adamw.pass_kernel`.
        settings, controller, controller_start: see :func:`.learned_networks.inputs_kernel`.
        ways: float64 ``(parts, 3)``, see :func:`way_kernel`.
        parts: int64 ``(groups + 1,)``, where each group's parts begin.
        looked: int64 ``(n_looked, 2)``: which group, and how many steps the look stands for.
        kept: float32, as ``meta.long_run`` keeps it; written to.
        found: float64 ``(controller's weights,)``, written over.
    """
    k = tl.arange(0, 8)
    g_g = tl.full([], 0.0, tl.float64)
    w_w = tl.full([], 0.0, tl.float64)
    for n in range(n_looked):
        group = tl.load(looked + n * 2)
        g_g += _of_group(ways, parts, group, 1, BLOCK)
        w_w += _of_group(ways, parts, group, 2, BLOCK)
    length = tl.sqrt(g_g * w_w)
    against = tl.full([], 0.0, tl.float64)
    for n in range(n_looked):
        group = tl.load(looked + n * 2)
        setting = settings + group * 24
        cosine = tl.load(setting + 6) * _of_group(ways, parts, group, 0, BLOCK) / length
        against -= cosine
        row = rows + tl.load(setting + 8).to(tl.int64) * 16
        trace = tl.load(row + 7).to(tl.pointer_type(KEPT))
        x = tl.load(trace + 2 + k, mask=k < 6, other=0.0).to(tl.float64)
        first, second, moved = network(
            controller, controller_start, x, WIDE, 6, CONTROLLER, CONTROLLER_WIDTH, 1
        )
        gain = tl.load(setting + 17)
        raw = gain.to(WIDE) * number_at(moved, 0, tl.arange(0, 4))
        low = tl.load(setting + 13).to(WIDE)
        high = tl.load(setting + 14).to(WIDE)
        of_log = slope(raw, low, high).to(tl.float64) * gain
        d_out = cosine * tl.load(looked + n * 2 + 1).to(tl.float64) * of_log
        add_controller(
            found, controller, x, first, second, d_out, WIDE, CONTROLLER, CONTROLLER_WIDTH, n > 0
        )
    tl.debug_barrier()  # all threads have written

    count = FADES * tl.load(kept).to(tl.float64) + 1
    mean = tl.load(kept + 1).to(tl.float64)
    off = against - mean
    squares = FADES * tl.load(kept + 2).to(tl.float64) + off * (off - off / count)
    mean += off / count
    size: tl.constexpr = (CONTROLLER + 1) * (CONTROLLER + 1) + CONTROLLER * 7
    lanes = tl.arange(0, BLOCK)
    wrong = tl.zeros([BLOCK], tl.int32)
    for at in range(0, size, BLOCK):
        known = at + lanes < size
        x = tl.load(found + at + lanes, mask=known, other=0.0).to(tl.float32)
        # What is not finite does not have itself as a difference of 0.
        wrong += tl.where(known & ((x - x) != 0), 1, 0)
    said = (mean + squares).to(tl.float32)
    if (tl.sum(wrong) == 0) & ((said - said) == 0):
        tl.debug_barrier()  # all threads have read
        tl.store(kept, count.to(tl.float32))
        tl.store(kept + 1, mean.to(tl.float32))
        tl.store(kept + 2, squares.to(tl.float32))
        for at in range(0, size, BLOCK):
            known = at + lanes < size
            x = tl.load(found + at + lanes, mask=known, other=0.0)
            old = tl.load(kept + 3 + at + lanes, mask=known, other=0.0).to(tl.float64)
            tl.store(kept + 3 + at + lanes, (old + x).to(tl.float32), mask=known)


launch_way = Launcher(way_kernel)
launch_look = Launcher(look_kernel)
