"""What the kernels around a learned update are made of: networks, bounds, sums in memory.

A launch of these programs takes as long as one of them, and that is by and large the number of its
instructions: so what float32 can hold is computed in it, unless parameters are float64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # Exact to rounding, and 1 or -1 where the exponential overflows or is 0.
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def log_size(norm, count):
    return tl.log(norm / tl.sqrt(count) + 1e-12) / 10


@triton.jit
def finite(x):
    # A feature that is no number counts as 0, one that is infinite as its bound.
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -3.0), 3.0)


@triton.jit
def as_kept(x, KEPT: tl.constexpr):
    # As the trace keeps it, from which its derivative will be taken.
    return x.to(KEPT).to(tl.float64)


@triton.jit
def bounded(x, low, high):
    bound = tl.where(x < 0, -low, high)
    return x / tl.sqrt(1 + (x / bound) * (x / bound))


@triton.jit
def slope(x, low, high):
    """The derivative of ``bounded``."""
    bound = tl.where(x < 0, -low, high)
    root = tl.sqrt(1 + (x / bound) * (x / bound))
    return 1 / (root * root * root)


@triton.jit
def number_at(vector, k, lanes):
    """The k-th number of a vector."""
    return tl.sum(tl.where(lanes == k, vector, 0.0))


@triton.jit
def network(
    flat,
    start,
    x,
    WIDE: tl.constexpr,
    IN: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
):
    """A network for one row of 8 features: how far its outputs are from those at the start.

    Both sets of weights go side by side, since each layer waits for the one before.

    Returns:
        ``(WIDTH,)`` twice, the hidden layers at the present weights, and ``(4,)``; all in ``WIDE``.
    """
    which = tl.arange(0, 2)
    f = tl.arange(0, 8)
    i = tl.arange(0, WIDTH)
    o = tl.arange(0, 4)
    weights = tl.where(which == 0, flat.to(tl.int64), start.to(tl.int64))
    weights = weights.to(tl.pointer_type(tl.float32))
    layer = weights[:, None] + i[None, :] * (IN + 1)
    inside = (which[:, None] < 2) & (i[None, :] < HIDDEN)
    known = inside[:, :, None] & (f[None, None, :] < IN)
    matrix = tl.load(layer[:, :, None] + f[None, None, :], mask=known, other=0.0).to(WIDE)
    bias = tl.load(layer + IN, mask=inside, other=0.0).to(WIDE)
    first = tanh(tl.sum(matrix * x.to(WIDE)[None, None, :], axis=2) + bias)

    layer = weights[:, None] + HIDDEN * (IN + 1) + i[None, :] * (HIDDEN + 1)
    known = inside[:, :, None] & (i[None, None, :] < HIDDEN)
    matrix = tl.load(layer[:, :, None] + i[None, None, :], mask=known, other=0.0).to(WIDE)
    bias = tl.load(layer + HIDDEN, mask=inside, other=0.0).to(WIDE)
    second = tanh(tl.sum(matrix * first[:, None, :], axis=2) + bias)

    layer = weights[:, None] + HIDDEN * (IN + HIDDEN + 2) + o[None, :] * (HIDDEN + 1)
    inside = (which[:, None] < 2) & (o[None, :] < OUT)
    known = inside[:, :, None] & (i[None, None, :] < HIDDEN)
    matrix = tl.load(layer[:, :, None] + i[None, None, :], mask=known, other=0.0).to(WIDE)
    bias = tl.load(layer + HIDDEN, mask=inside, other=0.0).to(WIDE)
    out = tl.sum(matrix * second[:, None, :], axis=2) + bias

    now = which[:, None] == 0
    difference = tl.sum(tl.where(now, out, -out), axis=0)
    first = tl.sum(tl.where(now, first, 0.0), axis=0)
    second = tl.sum(tl.where(now, second, 0.0), axis=0)
    return first, second, difference


@triton.jit
def beta_at(trace, now):
    """The beta of the update before, of which the trace keeps 1 - beta; 0 is none."""
    decay = tl.load(trace).to(tl.float64)
    return tl.where(decay > 0, 1 - decay, now)


@triton.jit
def longest_memory(beta):
    """``meta.momentum.longest_memory``."""
    return tl.where(beta > 0, 0.5 * (1 - beta) / tl.where(beta > 0, beta, 1.0), 1.0)


@triton.jit
def momentum_bounds(setting, beta, o, WIDE: tl.constexpr):
    """``(4,)`` twice: of the logarithm of scale, of shift, and of damping."""
    widest = tl.load(setting + 15)
    furthest = tl.load(setting + 16)
    low = tl.where(o == 0, -widest, tl.where(o == 1, -furthest, -longest_memory(beta)))
    high = tl.where(o == 0, widest, tl.where(o == 1, furthest, 1.0))
    return low.to(WIDE), high.to(WIDE)


@triton.jit
def momentum_paces(setting, o, WIDE: tl.constexpr):
    """``(4,)``: what the momentum network's outputs are multiplied by."""
    paces = tl.load(setting + 17) * tl.load(setting + 19 + o, mask=o < 3, other=0.0)
    return paces.to(WIDE)


@triton.jit
def slow_weight(step, frequency, beta):
    """``rules.deep_nested.slow_weight``."""
    chunks = (step - 1) // frequency
    inside = (step - chunks * frequency).to(tl.float64)
    old = 1 - power(beta, chunks)
    return beta * old + (1 - beta) * inside / frequency


@triton.jit
def power(beta, step):
    return tl.where(step == 0, 1.0, tl.exp(step.to(tl.float64) * tl.log(beta)))


@triton.jit
def add_to(at, values, factor, mask, again):
    """Add to what lies at these addresses, or without ``again`` write over it.

    What may be of any size is the float64 ``factor``.
    """
    before = tl.load(at, mask=tl.where(again, mask, False), other=0.0)
    tl.store(at, before + values.to(tl.float64) * factor, mask=mask)


@triton.jit
def add_matrix(at, columns, left, right, factor, left_mask, right_mask, again):
    """Add the outer product of two vectors to a matrix whose rows begin at ``at``."""
    mask = left_mask[:, None] & right_mask[None, :]
    add_to(at[:, None] + columns[None, :], left[:, None] * right[None, :], factor, mask, again)


@triton.jit
def add_controller(
    out,
    flat,
    x,
    first,
    second,
    d_out,
    WIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    again,
):
    """Back through the controller: add to ``out`` its output's derivatives by all weights.

    Args:
        out: float64, where the derivatives by ``flat`` lie.
        x: the features.
        first, second: the hidden layers, see :func:`network`.
        d_out: float64, what the derivatives are multiplied by.
    """
    k = tl.arange(0, 8)
    o = tl.arange(0, 4)
    i = tl.arange(0, WIDTH)
    inside = i < HIDDEN
    weights3 = flat + HIDDEN * 7 + HIDDEN * (HIDDEN + 1) + i
    d2 = tl.load(weights3, mask=inside, other=0.0).to(WIDE) * (1 - second * second)
    weights2 = flat + HIDDEN * 7 + i[:, None] * (HIDDEN + 1) + i[None, :]
    both = inside[:, None] & inside[None, :]
    matrix = tl.load(weights2, mask=both, other=0.0).to(WIDE)
    d1 = tl.sum(matrix * d2[:, None], axis=0) * (1 - first * first)
    at1 = out + i * 7
    add_matrix(at1, k, d1, x.to(WIDE), d_out, inside, k < 6, again)
    add_to(at1 + 6, d1, d_out, inside, again)
    at2 = out + HIDDEN * 7 + i * (HIDDEN + 1)
    add_matrix(at2, i, d2, first, d_out, inside, inside, again)
    add_to(at2 + HIDDEN, d2, d_out, inside, again)
    at3 = out + HIDDEN * (HIDDEN + 8)
    add_to(at3 + i, second, d_out, inside, again)
    add_to(at3 + HIDDEN + o, tl.full([4], 1.0, WIDE), d_out, o == 0, again)
