"""AdamW with learned momenta, and the products that teach them, in one pass over memory.

:func:`pass_kernel` is one launch over the elements of all tensors, each program on one span of one
tensor. It multiplies the gradient with the parts of the update before, measures what the networks
are to see next, and updates. What multiplies what comes from :mod:`.learned_networks`, through
device memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launcher import Launcher

#: Elements per pass of a program's loop, and per program: few programs leave few sums to add up.
CHUNK, SPAN = 512, 8192
NUM_WARPS = 4
#: Slow momenta that a parameter may have here.
MAX_SLOW = 2
#: Numbers per tensor in rows, in orders, and per program in the sums.
ROW, ORDER, SUMS = 16, 24, 16

KINDS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _lerp(a, b, weight):
    # The two forms of torch's: exact at either end.
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))


@triton.jit
def _base(address, start, KIND: tl.constexpr, FULL: tl.constexpr):
    if FULL:  # what is rounded here is a multiple of 16 bytes already; the compiler learns it
        pointer = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(KIND)), 16)
    else:
        pointer = address.to(tl.pointer_type(KIND))
    return pointer + start


@triton.jit
def _read(pointer, mask, WIDE: tl.constexpr, FULL: tl.constexpr):
    x = tl.load(pointer) if FULL else tl.load(pointer, mask=mask, other=0.0)
    return x.to(WIDE)


@triton.jit
def _write(pointer, x, mask, KIND: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer, x.to(KIND))
    else:
        tl.store(pointer, x.to(KIND), mask=mask)


@triton.jit
def _folded(x, CHUNK: tl.constexpr):
    # Of the four elements that a thread has: a sum takes a register instead of four, without which
    # there are too few for all loads to be on their way at once.
    return tl.sum(tl.reshape(x, [CHUNK // 4, 4]), axis=1)


@triton.jit
def _span(
    row,
    order,
    g_address,
    multiplier,
    sums,
    start,
    left,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    LAST: tl.constexpr,
    SLOWKIND: tl.constexpr,
    WIDE: tl.constexpr,
    N_SLOW: tl.constexpr,
    NORMALIZE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MEASURE: tl.constexpr,
    UPDATE: tl.constexpr,
    WAY: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
):
    """One span; ``row`` and ``order`` are its tensor's."""
    g_at = _base(g_address, start, GRAD, FULL)
    p_at = _base(tl.load(row), start, PARAM, FULL)
    m_at = _base(tl.load(row + 1), start, MOMENT, FULL)
    l_at = _base(tl.load(row + 4), start, LAST, FULL)
    v_at, x_at = m_at, m_at
    if NORMALIZE:
        v_at = _base(tl.load(row + 2), start, MOMENT, FULL)
    if AMSGRAD:
        x_at = _base(tl.load(row + 3), start, MOMENT, FULL)
    s_at = m_at
    if WAY:
        s_at = _base(tl.load(row + 14), start, LAST, FULL)
    a_at, b_at = m_at, m_at
    if N_SLOW > 0:
        a_at = _base(tl.load(row + 5), start, SLOWKIND, FULL)
    if N_SLOW > 1:
        b_at = _base(tl.load(row + 6), start, SLOWKIND, FULL)

    keep = tl.load(order).to(WIDE)
    weight = tl.load(order + 1).to(WIDE)
    fast = (tl.load(order + 2) * multiplier).to(WIDE)
    now = (tl.load(order + 3) * multiplier).to(WIDE)
    a_weight = (tl.load(order + 4) * multiplier).to(WIDE)
    b_weight = (tl.load(order + 5) * multiplier).to(WIDE)
    a_scale = tl.load(order + 6).to(WIDE)
    b_scale = tl.load(order + 7).to(WIDE)
    a_share = tl.load(order + 8).to(WIDE)
    b_share = tl.load(order + 9).to(WIDE)
    size = tl.load(order + 10).to(WIDE)
    root = tl.load(order + 11).to(WIDE)
    last_root = tl.load(order + 12).to(WIDE)
    beta2 = tl.load(order + 13).to(WIDE)
    weight2 = (1 - tl.load(order + 13)).to(WIDE)
    eps = tl.load(order + 14).to(WIDE)
    sign = tl.load(order + 15).to(WIDE)
    decay = (1 - tl.load(order + 16) * multiplier).to(WIDE)
    penalty = tl.load(order + 17).to(WIDE)

    lanes = tl.arange(0, CHUNK)
    zero = tl.zeros([CHUNK // 4], WIDE)
    g_p, g_g, g_m, m_m, p_p = zero, zero, zero, zero, zero
    h_m, h_l, h_a, h_b, d_d = zero, zero, zero, zero, zero
    g_w, w_w = zero, zero
    for at in range(0, left, CHUNK):
        here = at + lanes
        mask = here < left
        g = _read(g_at + here, mask, WIDE, FULL)
        p = _read(p_at + here, mask, WIDE, FULL)
        m = _read(m_at + here, mask, WIDE, FULL)
        v, x, a, b = m, m, m, m
        if NORMALIZE:
            v = _read(v_at + here, mask, WIDE, FULL)
        if AMSGRAD:
            x = _read(x_at + here, mask, WIDE, FULL)
        if N_SLOW > 0:
            a = _read(a_at + here, mask, WIDE, FULL)
        if N_SLOW > 1:
            b = _read(b_at + here, mask, WIDE, FULL)
        g_g += _folded(g * g, CHUNK)
        g_m += _folded(g * m, CHUNK)
        m_m += _folded(m * m, CHUNK)
        p_p += _folded(p * p, CHUNK)
        if WAY:
            gone = p - _read(s_at + here, mask, WIDE, FULL)
            g_w += _folded(g * gone, CHUNK)
            w_w += _folded(gone * gone, CHUNK)
        if MEASURE:
            last = _read(l_at + here, mask, WIDE, FULL)
            h, direction = g, m
            if NORMALIZE:
                second = v
                if AMSGRAD:
                    second = x
                denominator = tl.sqrt(second) / last_root + eps
                if not FULL:  # 0 / (0 + 0) is not 0
                    denominator = tl.where(mask, denominator, 1.0)
                h = g / denominator
                direction = m / denominator
            g_p += _folded(g * p, CHUNK)
            h_m += _folded(h * m, CHUNK)
            h_l += _folded(h * last, CHUNK)
            d_d += _folded(direction * direction, CHUNK)
            if N_SLOW > 0:
                h_a += _folded(h * a, CHUNK)
            if N_SLOW > 1:
                h_b += _folded(h * b, CHUNK)
        if UPDATE:
            g = g * sign + penalty * p
            _write(l_at + here, g, mask, LAST, FULL)
            m = _lerp(m * keep, g, weight)
            _write(m_at + here, m, mask, MOMENT, FULL)
            n = m * fast + g * now
            if N_SLOW > 0:
                a = a * a_scale + g * a_share
                _write(a_at + here, a, mask, SLOWKIND, FULL)
                n += a * a_weight
            if N_SLOW > 1:
                b = b * b_scale + g * b_share
                _write(b_at + here, b, mask, SLOWKIND, FULL)
                n += b * b_weight
            if NORMALIZE:
                v = v * beta2 + weight2 * (g * g)
                _write(v_at + here, v, mask, MOMENT, FULL)
                if AMSGRAD:
                    x = tl.maximum(x, v)
                    _write(x_at + here, x, mask, MOMENT, FULL)
                    v = x
                n = n / (tl.sqrt(v) / root + eps)
            _write(p_at + here, p * decay - size * n, mask, PARAM, FULL)

    # A gradient, momentum and parameter as the update found them; then what MEASURE adds.
    kind: tl.constexpr = sums.dtype.element_ty
    tl.store(sums, tl.sum(g_g.to(kind)))
    tl.store(sums + 1, tl.sum(g_m.to(kind)))
    tl.store(sums + 2, tl.sum(m_m.to(kind)))
    tl.store(sums + 3, tl.sum(p_p.to(kind)))
    if MEASURE:
        tl.store(sums + 4, tl.sum(g_p.to(kind)))
        tl.store(sums + 5, tl.sum(h_m.to(kind)))
        tl.store(sums + 6, tl.sum(h_l.to(kind)))
        tl.store(sums + 7, tl.sum(d_d.to(kind)))
        if N_SLOW > 0:
            tl.store(sums + 8, tl.sum(h_a.to(kind)))
        if N_SLOW > 1:
            tl.store(sums + 9, tl.sum(h_b.to(kind)))
    if WAY:
        tl.store(sums + 10, tl.sum(g_w.to(kind)))
        tl.store(sums + 11, tl.sum(w_w.to(kind)))


@triton.jit
def pass_kernel(
    spans,
    rows,
    addresses,
    orders,
    multipliers,
    sums,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    LAST: tl.constexpr,
    SLOWKIND: tl.constexpr,
    WIDE: tl.constexpr,
    N_SLOW: tl.constexpr,
    NORMALIZE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MEASURE: tl.constexpr,
    UPDATE: tl.constexpr,
    WAY: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One span of one tensor.

    Args:
        spans: int32 ``(programs,)``, which tensor; a tensor's follow each other.
        rows: int64 ``(tensors, ROW)``: addresses of parameter, momentum, second moment, largest
            second moment, last gradient, two slow momenta and trace; elements, the tensor's first
            span here, its first sums, how many spans, its group, all addresses or-ed, and the
            address of where the parameter began, kept as the last gradient is (with WAY).
        addresses: int64, of gradients.
        orders: float64 ``(tensors, ORDER)``, see :func:`.learned_networks.inputs_kernel`.
        multipliers: float64 ``(groups,)``.
        sums: float64 ``(spans, SUMS)``, of all launches.
    """
    pid = tl.program_id(0)
    tensor = tl.load(spans + pid).to(tl.int64)
    row = rows + tensor * 16
    order = orders + tensor * 24
    g_address = tl.load(addresses + tensor)
    within = pid - tl.load(row + 9)
    start = within * SPAN
    left = tl.minimum(tl.load(row + 8) - start, SPAN).to(tl.int32)
    multiplier = tl.load(multipliers + tl.load(row + 12))
    sums += (tl.load(row + 10) + within) * 16
    if (left % CHUNK == 0) & (((tl.load(row + 13) | g_address) & 15) == 0):
        _span(
            row, order, g_address, multiplier, sums, start, left, PARAM, GRAD, MOMENT, LAST,
            SLOWKIND, WIDE, N_SLOW, NORMALIZE, AMSGRAD, MEASURE, UPDATE, WAY, CHUNK, True,
        )  # fmt: skip
    else:
        _span(
            row, order, g_address, multiplier, sums, start, left, PARAM, GRAD, MOMENT, LAST,
            SLOWKIND, WIDE, N_SLOW, NORMALIZE, AMSGRAD, MEASURE, UPDATE, WAY, CHUNK, False,
        )  # fmt: skip


launch_pass = Launcher(pass_kernel, num_warps=NUM_WARPS)
