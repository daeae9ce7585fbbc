"""The networks behind a learned update, forward and backward, for all tensors in few launches.

What :mod:`nested_optim.meta` computes with torch's operations, some hundred small ones per step,
is here :func:`inputs_kernel` before the pass over the parameters and :func:`learn_kernel` and
:func:`collect_kernel` after it. Sums are float64; the networks are computed in ``WIDE``, which is
float64 if the traces are, and else float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launcher import Launcher
from .learned_layers import (
    add_controller,
    add_matrix,
    add_to,
    as_kept,
    beta_at,
    bounded,
    finite,
    log_size,
    momentum_bounds,
    momentum_paces,
    network,
    number_at,
    power,
    slope,
    slow_weight,
)

#: Tensors per pass of a program's loop over a group, and spans per pass over a tensor's sums.
BLOCK = 128
NUM_WARPS = 8


@triton.jit
def _of_group(
    rows,
    steps,
    settings,
    controller,
    controller_start,
    multipliers,
    seen,
    pid,
    KEPT: tl.constexpr,
    WIDE: tl.constexpr,
    LEARN_LR: tl.constexpr,
    CONTROLLER: tl.constexpr,
    CONTROLLER_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A group's multiplier."""
    k = tl.arange(0, 8)
    setting = settings + pid * 24
    begin = tl.load(setting + 8).to(tl.int64)
    count = tl.load(setting + 9).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    g_g = tl.zeros([BLOCK], tl.float64)
    p_p = tl.zeros([BLOCK], tl.float64)
    latest = tl.zeros([BLOCK], tl.int64)
    for at in range(0, count, BLOCK):
        known = at + lanes < count
        tensor = begin + at + lanes
        trace = tl.load(rows + tensor * 16 + 7, mask=known, other=0)
        trace = trace.to(tl.pointer_type(KEPT))
        g = tl.load(trace + 12, mask=known, other=0.0).to(tl.float64)
        p = tl.load(trace + 15, mask=known, other=0.0).to(tl.float64)
        g_g += g * g
        p_p += p * p
        latest = tl.maximum(latest, tl.load(steps + tensor, mask=known, other=0))
    elements = tl.load(setting + 10)
    step = (tl.max(latest, axis=0) + 1).to(tl.float64)
    loss = tl.load(setting + 11)
    sign = tl.where(loss > 0, 1.0, tl.where(loss < 0, -1.0, loss))
    x = tl.where(k == 0, log_size(tl.sqrt(tl.sum(g_g)), elements), 0.0)
    x = tl.where(k == 1, log_size(tl.sqrt(tl.sum(p_p)), elements), x)
    x = tl.where(k == 2, 2 * tl.load(setting + 7) - 1, x)
    x = tl.where(k == 3, tl.log(1 + step) / 10, x)
    x = tl.where(k == 4, sign * tl.log(1 + tl.abs(loss)) / 10, x)
    x = tl.where(k == 5, tl.load(setting + 12), x)
    x = tl.where(k < 6, finite(x), 0.0)
    out = 1.0
    if LEARN_LR:
        tl.store(seen + pid * 8 + k, x.to(KEPT))
        x = as_kept(x, KEPT)
        _, _, moved = network(
            controller, controller_start, x, WIDE, 6, CONTROLLER, CONTROLLER_WIDTH, 1
        )
        raw = tl.load(setting + 17).to(WIDE) * number_at(moved, 0, tl.arange(0, 4))
        low = tl.load(setting + 13).to(WIDE)
        high = tl.load(setting + 14).to(WIDE)
        out = tl.exp(bounded(raw, low, high)).to(tl.float64)
    else:
        tl.store(seen + pid * 8 + k, tl.zeros([8], tl.float64).to(KEPT))
    tl.store(multipliers + pid, out)


@triton.jit
def _of_tensor(
    rows,
    steps,
    settings,
    momentum,
    momentum_start,
    mixing,
    seen,
    said,
    orders,
    tensor,
    n_groups,
    KEPT: tl.constexpr,
    WIDE: tl.constexpr,
    LEARN_MOMENTUM: tl.constexpr,
    LEARN_MIXING: tl.constexpr,
    MOMENTUM: tl.constexpr,
    MOMENTUM_WIDTH: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    N_SLOW: tl.constexpr,
):
    """What a tensor's update takes, but for the multiplier."""
    k = tl.arange(0, 8)
    row = rows + tensor * 16
    setting = settings + tl.load(row + 12) * 24
    lr = tl.load(setting)
    weight_decay = tl.load(setting + 1)
    beta1 = tl.load(setting + 2)
    beta2 = tl.load(setting + 3)
    decoupled = tl.load(setting + 5) != 0
    last = tl.load(steps + tensor)
    step = last + 1

    trace = tl.load(row + 7).to(tl.pointer_type(KEPT))
    last_beta2 = beta_at(trace + 17, beta2)

    scale, shift, damping = 1.0, 0.0, 0.0
    x = tl.zeros([8], tl.float64)
    if LEARN_MOMENTUM:
        o = tl.arange(0, 4)
        count = tl.load(row + 8).to(tl.float64)
        x = tl.load(trace + 12 + k, mask=k < 4, other=0.0).to(tl.float64)
        x = tl.where(k == 2, x, log_size(x, count))  # the third is a cosine
        x = as_kept(tl.where(k < 4, finite(x), 0.0), KEPT)
        _, _, moved = network(momentum, momentum_start, x, WIDE, 4, MOMENTUM, MOMENTUM_WIDTH, 3)
        low, high = momentum_bounds(setting, beta1, o, WIDE)
        outs = bounded(momentum_paces(setting, o, WIDE) * moved, low, high)
        outs = tl.where(o == 0, tl.exp(outs), outs).to(tl.float64)
        scale = number_at(outs, 0, o)
        shift = number_at(outs, 1, o)
        damping = number_at(outs, 2, o)
    tl.store(seen + (n_groups + tensor) * 8 + k, x.to(KEPT))
    tl.store(said + tensor * 4, scale)
    tl.store(said + tensor * 4 + 1, shift)
    tl.store(said + tensor * 4 + 2, damping)

    order = orders + tensor * 24
    # Of each decay rate the powers that are needed, at once.
    rates = tl.where(k == 1, beta2, tl.where(k == 2, last_beta2, beta1))
    powers = power(rates, tl.where(k == 2, last, step))
    correction = 1 - number_at(powers, 0, k)
    roots = tl.sqrt(1 - powers)
    w0 = 1.0
    if LEARN_MIXING:
        gain = tl.load(setting + 18)
        w0 += bounded(gain * tl.load(mixing).to(tl.float64), -1.0, 1.0)
        if tensor == 0:
            tl.store(said + (tl.num_programs(0) - n_groups) * 4, w0)
        if N_SLOW > 0:
            w1 = bounded(gain * tl.load(mixing + 1).to(tl.float64), -1.0, 1.0)
            if tensor == 0:
                tl.store(said + (tl.num_programs(0) - n_groups) * 4 + 1, w1)
            tl.store(order + 4, w1 * (correction / slow_weight(step, F1, beta1)))
            tl.store(order + 6, tl.where((step - 1) % F1 == 0, beta1, 1.0))
            tl.store(order + 8, (1 - beta1) / F1)
        if N_SLOW > 1:
            w2 = bounded(gain * tl.load(mixing + 2).to(tl.float64), -1.0, 1.0)
            if tensor == 0:
                tl.store(said + (tl.num_programs(0) - n_groups) * 4 + 2, w2)
            tl.store(order + 5, w2 * (correction / slow_weight(step, F2, beta1)))
            tl.store(order + 7, tl.where((step - 1) % F2 == 0, beta1, 1.0))
            tl.store(order + 9, (1 - beta1) / F2)
    tl.store(order, 1 - damping)
    tl.store(order + 1, 1 - beta1)
    tl.store(order + 2, w0 * scale)
    tl.store(order + 3, w0 * shift * correction)
    tl.store(order + 10, lr / correction)
    tl.store(order + 10 + k, roots, mask=(k == 1) | (k == 2))
    tl.store(order + 13, beta2)
    tl.store(order + 14, tl.load(setting + 4))
    tl.store(order + 15, tl.load(setting + 6))
    tl.store(order + 16, tl.where(decoupled, lr * weight_decay, 0.0))
    tl.store(order + 17, tl.where(decoupled, 0.0, weight_decay))


@triton.jit(do_not_specialize=["n_groups"])
def inputs_kernel(
    rows,
    steps,
    settings,
    controller,
    controller_start,
    momentum,
    momentum_start,
    mixing,
    multipliers,
    seen,
    said,
    orders,
    n_groups,
    KEPT: tl.constexpr,
    WIDE: tl.constexpr,
    LEARN_LR: tl.constexpr,
    LEARN_MOMENTUM: tl.constexpr,
    LEARN_MIXING: tl.constexpr,
    CONTROLLER: tl.constexpr,
    CONTROLLER_WIDTH: tl.constexpr,
    MOMENTUM: tl.constexpr,
    MOMENTUM_WIDTH: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    N_SLOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What an update takes beside gradients and state: of a group, or of a tensor.

    Args:
        rows: see :func:`.learned_adamw.pass_kernel`.
        steps: int64, updates so far.
        settings: float64 ``(groups, 24)``: lr, weight decay, beta1, beta2, eps, decoupled or not,
            sign of the gradient, place, first tensor, tensors, elements; and of all groups the
            loss, whether it is known, bounds of multipliers' logarithms, of scale's, of shift,
            the networks' gain, the mixture's gain, and the paces of scale, shift and damping.
        controller, momentum, mixing: flat float32 weights, ``*_start`` those of the start.
        multipliers: float64 ``(groups,)``, written here.
        seen: ``(groups + tensors, 8)``, what the networks see, in the trace's dtype; written here.
        said: float64 ``(tensors + 2, 4)``: scale, shift, damping; in the last two rows the
            mixture. Written here.
        orders: float64 ``(tensors, 24)``, written here: 1 - damping, 1 - beta1, factors of the
            momentum, the gradient and the slow momenta (each times the multiplier), what the slow
            momenta are multiplied by first and take of the gradient, lr over its correction, roots
            of the second moment's corrections, of this update and of the one before, beta2, eps,
            sign, lr times decoupled weight decay, L2 penalty.
    """
    pid = tl.program_id(0)
    if pid < n_groups:
        _of_group(
            rows, steps, settings, controller, controller_start, multipliers, seen, pid,
            KEPT, WIDE, LEARN_LR, CONTROLLER, CONTROLLER_WIDTH, BLOCK,
        )  # fmt: skip
    else:
        _of_tensor(
            rows, steps, settings, momentum, momentum_start, mixing, seen, said, orders,
            (pid - n_groups).to(tl.int64), n_groups, KEPT, WIDE, LEARN_MOMENTUM, LEARN_MIXING,
            MOMENTUM, MOMENTUM_WIDTH, F1, F2, N_SLOW,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_tensors", "n_groups", "total"])
def learn_kernel(
    rows,
    steps,
    settings,
    controller,
    controller_start,
    momentum,
    momentum_start,
    mixing,
    seen,
    sums,
    lengths,
    found,
    n_tensors,
    n_groups,
    total,
    KEPT: tl.constexpr,
    WIDE: tl.constexpr,
    LEARN: tl.constexpr,
    KEEP: tl.constexpr,
    LEARN_LR: tl.constexpr,
    LEARN_MOMENTUM: tl.constexpr,
    LEARN_MIXING: tl.constexpr,
    CONTROLLER: tl.constexpr,
    CONTROLLER_WIDTH: tl.constexpr,
    MOMENTUM: tl.constexpr,
    MOMENTUM_WIDTH: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    N_SLOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of every tensor: add up what the pass found, and with ``LEARN`` what it says about the
    weights behind the update before; with ``KEEP`` write the trace of this update.

    Args:
        lengths: float64 ``(tensors, 2)``, written here: the squared lengths of the gradient, and
            of what the update before moved.
        found: float64 ``(programs, total)``, written here: derivatives by all weights, of the
            controller's, then the momentum's, then the mixture's, summed over a program's tensors.
    """
    pid = tl.program_id(0)
    c = tl.arange(0, 16)
    k = tl.arange(0, 8)
    r = tl.arange(0, BLOCK)
    j = tl.arange(0, MOMENTUM_WIDTH)
    o = tl.arange(0, 4)
    out = found + pid.to(tl.int64) * total
    out_momentum = out
    if LEARN_LR:
        out_momentum += (CONTROLLER + 1) * (CONTROLLER + 1) + CONTROLLER * 7
    out_mixing = out_momentum
    if LEARN_MOMENTUM:
        out_mixing += (MOMENTUM + 3) * (MOMENTUM + 1) + MOMENTUM * 5
    for tensor in range(pid, n_tensors, tl.num_programs(0)):
        row = rows + tensor * 16
        group = tl.load(row + 12)
        setting = settings + group * 24
        first = tl.load(row + 10)
        spans = tl.load(row + 11)
        tile = tl.zeros([BLOCK, 16], tl.float64)
        # Several loads are on their way at once: an embedding has thousands of spans.
        for at in tl.range(0, spans, BLOCK, loop_unroll_factor=4):
            known = (at + r)[:, None] < spans
            tile += tl.load(sums + (first + at + r)[:, None] * 16 + c[None, :], known, 0.0)
        totals = tl.sum(tile, axis=0)
        g_g = number_at(totals, 0, c)
        g_m = number_at(totals, 1, c)
        m_m = number_at(totals, 2, c)
        p_p = number_at(totals, 3, c)
        sign = tl.load(setting + 6)
        trace = tl.load(row + 7).to(tl.pointer_type(KEPT))
        if LEARN:
            last = tl.load(steps + tensor)
            beta1 = beta_at(trace + 16, tl.load(setting + 2))
            correction = 1 - power(beta1, last)
            after = sign * number_at(totals, 4, c)
            fast = sign * number_at(totals, 5, c) / correction
            now = sign * number_at(totals, 6, c)
            lr = tl.load(trace).to(tl.float64)
            decay = tl.load(trace + 1).to(tl.float64) * lr
            multiplier, scale, shift, damping, w0 = 1.0, 1.0, 0.0, 0.0, 1.0
            x = tl.load(trace + 2 + k, mask=k < 6, other=0.0).to(tl.float64)
            y = tl.load(trace + 8 + k, mask=k < 4, other=0.0).to(tl.float64)
            gain = tl.load(setting + 17)
            if LEARN_LR:
                x1, x2, moved = network(
                    controller, controller_start, x, WIDE, 6, CONTROLLER, CONTROLLER_WIDTH, 1
                )
                raw = gain.to(WIDE) * number_at(moved, 0, o)
                low = tl.load(setting + 13).to(WIDE)
                high = tl.load(setting + 14).to(WIDE)
                multiplier = tl.exp(bounded(raw, low, high)).to(tl.float64)
                to_raw = multiplier * slope(raw, low, high).to(tl.float64) * gain
            if LEARN_MOMENTUM:
                y1, y2, turned = network(
                    momentum, momentum_start, y, WIDE, 4, MOMENTUM, MOMENTUM_WIDTH, 3
                )
                paces = momentum_paces(setting, o, WIDE)
                low, high = momentum_bounds(setting, beta1, o, WIDE)
                outs = bounded(paces * turned, low, high)
                to_raws = slope(paces * turned, low, high) * paces
                to_raws = tl.where(o == 0, tl.exp(outs) * to_raws, to_raws).to(tl.float64)
                outs = tl.where(o == 0, tl.exp(outs), outs).to(tl.float64)
                scale = number_at(outs, 0, o)
                shift = number_at(outs, 1, o)
                damping = number_at(outs, 2, o)
            direction = scale * fast + shift * now
            slow1, slow2 = 0.0, 0.0
            mixing_gain = tl.load(setting + 18)
            if LEARN_MIXING:
                raw_w = mixing_gain * tl.load(mixing + o, mask=o <= N_SLOW, other=0.0)
                raw_w = raw_w.to(tl.float64)
                mixture = bounded(raw_w, -1.0, 1.0) + tl.where(o == 0, 1.0, 0.0)
                w0 = number_at(mixture, 0, o)
                by_w = tl.where(o == 0, direction, 0.0)
                direction = w0 * direction
                if N_SLOW > 0:
                    slow1 = sign * number_at(totals, 8, c) / slow_weight(last, F1, beta1)
                    by_w = tl.where(o == 1, slow1, by_w)
                    direction += number_at(mixture, 1, o) * slow1
                if N_SLOW > 1:
                    slow2 = sign * number_at(totals, 9, c) / slow_weight(last, F2, beta1)
                    by_w = tl.where(o == 2, slow2, by_w)
                    direction += number_at(mixture, 2, o) * slow2
            # The loss after the update is before * (1 - decay) - size * direction, see
            # rules.deep_nested.next_loss.
            size = lr * multiplier
            decayed = decay * multiplier
            before = (after + size * direction) / (1 - decayed)
            length = lr * multiplier * scale * w0 / correction
            tl.store(lengths + tensor * 2, g_g)
            tl.store(lengths + tensor * 2 + 1, length * length * number_at(totals, 7, c))
            # Added up in memory: registers would have to hold a matrix of each network throughout.
            again = tensor > pid
            if LEARN_MIXING:
                mixed = -size * mixing_gain * slope(raw_w, -1.0, 1.0) * by_w
                add_to(out_mixing + o, mixed, 1.0, o <= N_SLOW, again)
            if LEARN_LR:
                d_out = -(before * decay + lr * direction) * to_raw
                add_controller(
                    out, controller, x, x1, x2, d_out, WIDE, CONTROLLER, CONTROLLER_WIDTH, again
                )
            if LEARN_MOMENTUM:
                new = (1 - beta1) / correction * now
                old = (fast - new) / (1 - damping)
                by_out = tl.where(o == 0, -fast, tl.where(o == 1, -now, scale * old))
                d_outs = tl.where(o < 3, size * w0 * by_out * to_raws, 0.0)
                largest = tl.max(tl.abs(d_outs))
                largest = tl.where(largest > 0, largest, 1.0)
                outs = (d_outs / largest).to(WIDE)
                row4 = momentum + MOMENTUM * 5 + MOMENTUM * (MOMENTUM + 1)
                inside = j < MOMENTUM
                weights3 = row4 + o[None, :] * (MOMENTUM + 1) + j[:, None]
                known = inside[:, None] & (o[None, :] < 3)
                matrix = tl.load(weights3, mask=known, other=0.0).to(WIDE)
                e2 = tl.sum(matrix * outs[None, :], axis=1) * (1 - y2 * y2)
                weights2 = momentum + MOMENTUM * 5 + j[:, None] * (MOMENTUM + 1) + j[None, :]
                both = inside[:, None] & inside[None, :]
                matrix = tl.load(weights2, mask=both, other=0.0).to(WIDE)
                e1 = tl.sum(matrix * e2[:, None], axis=0) * (1 - y1 * y1)
                at1 = out_momentum + j * 5
                add_matrix(at1, k, e1, y.to(WIDE), largest, inside, k < 4, again)
                add_to(at1 + 4, e1, largest, inside, again)
                at2 = out_momentum + MOMENTUM * 5 + j * (MOMENTUM + 1)
                add_matrix(at2, j, e2, y1, largest, inside, inside, again)
                add_to(at2 + MOMENTUM, e2, largest, inside, again)
                at3 = out_momentum + MOMENTUM * (MOMENTUM + 6) + o * (MOMENTUM + 1)
                add_matrix(at3, j, outs, y2, largest, o < 3, inside, again)
                add_to(at3 + MOMENTUM, outs, largest, o < 3, again)
        if KEEP:
            tl.debug_barrier()  # all threads have read the trace
            group_seen = tl.load(seen + group * 8 + k, mask=k < 6, other=0.0)
            tl.store(trace + 2 + k, group_seen, mask=k < 6)
            tensor_seen = tl.load(seen + (n_groups + tensor) * 8 + k, mask=k < 4, other=0.0)
            tl.store(trace + 8 + k, tensor_seen, mask=k < 4)
            tl.store(trace, tl.load(setting).to(KEPT))
            decoupled = tl.load(setting + 5) != 0
            tl.store(trace + 1, tl.where(decoupled, tl.load(setting + 1), 0.0).to(KEPT))
            length = tl.sqrt(g_g) * tl.sqrt(m_m)
            cosine = tl.where(length > 0, g_m / tl.where(length > 0, length, 1.0), 0.0)
            tl.store(trace + 12, tl.sqrt(g_g).to(KEPT))
            if LEARN_MOMENTUM:
                tl.store(trace + 13, tl.sqrt(m_m).to(KEPT))
                tl.store(trace + 14, (sign * cosine).to(KEPT))
            else:
                tl.store(trace + 13, (0.0 * sign).to(KEPT))
                tl.store(trace + 14, (0.0 * sign).to(KEPT))
            tl.store(trace + 15, tl.sqrt(p_p).to(KEPT))
            tl.store(trace + 16, (1 - tl.load(setting + 2)).to(KEPT))
            tl.store(trace + 17, (1 - tl.load(setting + 3)).to(KEPT))


@triton.jit(do_not_specialize=["n_tensors"])
def collect_kernel(found, lengths, modules, n_tensors, COSINE: tl.constexpr, BLOCK: tl.constexpr):
    """Add a module's derivatives to those gathered since the last meta update, if all are finite.

    Args:
        found: float64, the sum of :func:`learn_kernel`'s over programs.
        modules: int64 ``(modules, 3)``: the address of what a module has gathered, in float32,
            where its own begin in ``found``, and how many they are.
        COSINE: divide by the lengths of gradients and updates, over all tensors.
    """
    module = modules + tl.program_id(0) * 3
    kept = tl.load(module).to(tl.pointer_type(tl.float32))
    found += tl.load(module + 1)
    size = tl.load(module + 2)
    lanes = tl.arange(0, BLOCK)
    length = tl.full([], 1.0, tl.float64)
    if COSINE:
        g_g = tl.zeros([BLOCK], tl.float64)
        d_d = tl.zeros([BLOCK], tl.float64)
        for at in range(0, n_tensors, BLOCK):
            known = at + lanes < n_tensors
            g_g += tl.load(lengths + (at + lanes) * 2, mask=known, other=0.0)
            d_d += tl.load(lengths + (at + lanes) * 2 + 1, mask=known, other=0.0)
        length = tl.sqrt(tl.sum(g_g)) * tl.sqrt(tl.sum(d_d))
    wrong = tl.zeros([BLOCK], tl.int32)
    for at in range(0, size, BLOCK):
        known = at + lanes < size
        x = (tl.load(found + at + lanes, mask=known, other=0.0) / length).to(tl.float32)
        # What is not finite does not have itself as a difference of 0.
        wrong += tl.where(known & ((x - x) != 0), 1, 0)
    if tl.sum(wrong) == 0:
        for at in range(0, size, BLOCK):
            known = at + lanes < size
            x = tl.load(found + at + lanes, mask=known, other=0.0) / length
            old = tl.load(kept + at + lanes, mask=known, other=0.0)
            tl.store(kept + at + lanes, old + x.to(tl.float32), mask=known)


launch_inputs = Launcher(inputs_kernel, num_warps=NUM_WARPS)
launch_learn = Launcher(learn_kernel, num_warps=NUM_WARPS)
launch_collect = Launcher(collect_kernel, num_warps=NUM_WARPS)
