"""AdamW on windows of gradients, for any number of tensors on any levels, as two Triton kernels.

:func:`advance` looks at every tensor once: it moves the tensor's counters and writes down what is
to happen to it (nothing, one more gradient in its window, or an update) with the update's
coefficients. :func:`apply` is one launch over the elements of all tensors, each program on one
chunk of one tensor. All they need lies in device memory, in the tables of :mod:`.tables`, so a CUDA
graph that holds them stays right when learning rates, counters and frequencies change.

Counting in the same launch would need a ticket per chunk, for the last program to move the counter
that all others have read: on an H200 every variant of that took longer than the second launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exchange import exchanged
from .launcher import repeatable
from .tables import CHUNK, LevelTable

#: Warps per program of ``apply``: two 16-byte accesses of float32 per thread. The best of 256 to
#: 2048 elements and 2 to 8 warps on an H200.
NUM_WARPS = 2
#: Tensors per program of ``advance``.
ADVANCE_BLOCK = 128

# What `advance` decided for a tensor.
_SKIP: tl.constexpr = tl.constexpr(0)
_ACCUMULATE: tl.constexpr = tl.constexpr(1)
_UPDATE: tl.constexpr = tl.constexpr(2)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr):
    return address.to(tl.pointer_type(DTYPE))


@triton.jit(do_not_specialize=["n_tensors"])
def advance(
    rows,
    counters,
    grads,
    settings,
    orders,
    grad_scale,
    found_inf,
    n_tensors,
    SCALED: tl.constexpr,
    FLUSH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the counters of ``BLOCK`` tensors and write their orders and gradients' addresses."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = tensor < n_tensors
    grad = tl.load(grads + tensor, mask=known, other=0)
    entry = counters + tensor * 4
    step_at = _pointer(tl.load(entry, mask=known, other=0), tl.float32)
    count_at = _pointer(tl.load(entry + 1, mask=known, other=0), tl.float32)
    group = settings + tl.load(entry + 2, mask=known, other=0) * 16
    step = tl.load(step_at, mask=known, other=0.0).to(tl.float64)
    count = tl.load(count_at, mask=known, other=0.0).to(tl.float64)
    lr = tl.load(group, mask=known, other=0.0)
    weight_decay = tl.load(group + 1, mask=known, other=0.0)
    beta1 = tl.load(group + 2, mask=known, other=0.0)
    beta2 = tl.load(group + 3, mask=known, other=0.0)
    log_beta1 = tl.load(group + 4, mask=known, other=-1.0)
    log_beta2 = tl.load(group + 5, mask=known, other=-1.0)
    eps = tl.load(group + 6, mask=known, other=0.0)
    frequency = tl.load(group + 7, mask=known, other=1.0)
    takes_mean = tl.load(group + 8, mask=known, other=0.0) != 0
    decoupled = tl.load(group + 9, mask=known, other=0.0) != 0
    sign = tl.load(group + 10, mask=known, other=0.0)

    if FLUSH:
        live = known & (count > 0)
        closes = live
    else:
        live = known & (grad != 0)
        count = count + 1
        closes = live & (count >= frequency)
    scale = tl.full([BLOCK], 1.0, tl.float64)
    if SCALED:
        scale = scale * tl.load(grad_scale).to(tl.float64)
        overflow = tl.load(found_inf + tensor * 0)  # one for each lane
        live = live & (overflow == 0)
        closes = closes & (overflow == 0)
    step = step + 1

    tl.store(count_at, tl.where(closes, 0.0, count).to(tl.float32), mask=live)
    tl.store(step_at, step.to(tl.float32), mask=closes)

    action = tl.where(closes, 2.0, tl.where(live, 1.0, 0.0))
    step_size = lr / (1 - tl.exp(step * log_beta1))
    root = 1 / tl.sqrt(1 - tl.exp(step * log_beta2))
    decay = tl.where(decoupled, 1 - lr * weight_decay, 1.0)
    penalty = tl.where(decoupled, 0.0, weight_decay)
    order = orders + tensor * 16
    kind = orders.dtype.element_ty
    tl.store(order, action.to(kind), mask=known)
    tl.store(order + 1, count.to(kind), mask=known)
    tl.store(order + 2, tl.where(takes_mean, count, 1.0).to(kind), mask=known)
    tl.store(order + 3, decay.to(kind), mask=known)
    tl.store(order + 4, step_size.to(kind), mask=known)
    tl.store(order + 5, root.to(kind), mask=known)
    tl.store(order + 6, beta1.to(kind), mask=known)
    tl.store(order + 7, (1 - beta1).to(kind), mask=known)
    tl.store(order + 8, beta2.to(kind), mask=known)
    tl.store(order + 9, (1 - beta2).to(kind), mask=known)
    tl.store(order + 10, eps.to(kind), mask=known)
    tl.store(order + 11, penalty.to(kind), mask=known)
    tl.store(order + 12, sign.to(kind), mask=known)
    tl.store(order + 13, scale.to(kind), mask=known)
    tl.store(rows + tensor * 16, grad, mask=known)


@triton.jit
def _divide(a, b):
    """Rounded to nearest, in either precision."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _root(a):
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def _aligned(address, DTYPE: tl.constexpr):
    """The pointer, known to be a multiple of 16 bytes. What is rounded here already is one."""
    # The hint goes on the cast itself: on the result of a call some versions of Triton lose it.
    return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _load(address, start, lanes, mask, DTYPE: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        return tl.load(_aligned(address, DTYPE) + start + lanes)
    else:
        return tl.load(_pointer(address, DTYPE) + start + lanes, mask=mask, other=0.0)


@triton.jit
def _store(address, start, lanes, mask, value, DTYPE: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        tl.store(_aligned(address, DTYPE) + start + lanes, value.to(DTYPE))
    else:
        tl.store(_pointer(address, DTYPE) + start + lanes, value.to(DTYPE), mask=mask)


@triton.jit
def _exchange_chunk(
    row,
    order,
    slower_at,
    start,
    lanes,
    mask,
    PARAM: tl.constexpr,
    SLOWER: tl.constexpr,
    COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):
    """The exchange of a chunk that is not updated."""
    param_at = tl.load(row + 1)
    u = _load(param_at, start, lanes, mask, PARAM, FULL).to(COMPUTE)
    v = _load(slower_at, start, lanes, mask, SLOWER, FULL).to(COMPUTE)
    u, v = exchanged(u, v, tl.load(order + 14), tl.load(order + 15), SLOWER)
    _store(param_at, start, lanes, mask, u, PARAM, FULL)
    _store(slower_at, start, lanes, mask, v, SLOWER, FULL)


@triton.jit
def _apply_chunk(
    row,
    order,
    action,
    slower_at,
    start,
    lanes,
    mask,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    KAHAN: tl.constexpr,
    WINDOWS: tl.constexpr,
    SCALED: tl.constexpr,
    FLUSH: tl.constexpr,
    EXCHANGE: tl.constexpr,
    SLOWER: tl.constexpr,
    FULL: tl.constexpr,
):
    """One chunk of one tensor. ``FULL``: no mask, and every address is a multiple of 16."""
    window_at = tl.load(row + 6)
    if FLUSH:
        grad = _load(window_at, start, lanes, mask, COMPUTE, FULL)
    else:
        grad = _load(tl.load(row), start, lanes, mask, GRAD, FULL).to(COMPUTE)
        if SCALED:
            grad = _divide(grad, tl.load(order + 13))
        if WINDOWS:  # noqa: SIM102 (one condition is known when compiling)
            if tl.load(order + 1) > 1:
                grad += _load(window_at, start, lanes, mask, COMPUTE, FULL)
    if action == _ACCUMULATE:
        if WINDOWS:
            _store(window_at, start, lanes, mask, grad, COMPUTE, FULL)
        if EXCHANGE:  # noqa: SIM102
            if slower_at != 0:
                _exchange_chunk(
                    row, order, slower_at, start, lanes, mask, PARAM, SLOWER, COMPUTE, FULL
                )  # fmt: skip
    else:
        param_at = tl.load(row + 1)
        exp_avg_at = tl.load(row + 2)
        exp_avg_sq_at = tl.load(row + 3)
        param = _load(param_at, start, lanes, mask, PARAM, FULL).to(COMPUTE)
        exp_avg = _load(exp_avg_at, start, lanes, mask, MOMENT, FULL).to(COMPUTE)
        exp_avg_sq = _load(exp_avg_sq_at, start, lanes, mask, MOMENT, FULL).to(COMPUTE)
        if KAHAN:
            comp_at = tl.load(row + 5)
            param += _load(comp_at, start, lanes, mask, PARAM, FULL).to(COMPUTE)
        decay = tl.load(order + 3)
        step_size = tl.load(order + 4)
        root = tl.load(order + 5)
        beta1 = tl.load(order + 6)
        weight1 = tl.load(order + 7)
        beta2 = tl.load(order + 8)
        weight2 = tl.load(order + 9)
        eps = tl.load(order + 10)
        penalty = tl.load(order + 11)
        sign = tl.load(order + 12)

        if WINDOWS:
            grad = _divide(grad, tl.load(order + 2))
        grad *= sign
        if penalty != 0:
            grad += penalty * param
        # The two forms of a lerp: exact at either end.
        change = grad - exp_avg
        exp_avg = tl.where(weight1 < 0.5, exp_avg + weight1 * change, grad - change * beta1)
        exp_avg_sq = exp_avg_sq * beta2 + weight2 * grad * grad
        second = exp_avg_sq
        if AMSGRAD:
            max_at = tl.load(row + 4)
            second = tl.maximum(second, _load(max_at, start, lanes, mask, MOMENT, FULL).to(COMPUTE))
            _store(max_at, start, lanes, mask, second, MOMENT, FULL)
        update = _divide(exp_avg, _root(second) * root + eps)
        # At lr 0 nothing may move, not even by 0 / 0.
        new = param * decay - tl.where(step_size == 0, 0.0, step_size * update)
        if EXCHANGE:  # noqa: SIM102
            if slower_at != 0:
                slower = _load(slower_at, start, lanes, mask, SLOWER, FULL).to(COMPUTE)
                write, rate = tl.load(order + 14), tl.load(order + 15)
                new, slower = exchanged(new.to(PARAM).to(COMPUTE), slower, write, rate, SLOWER)
                _store(slower_at, start, lanes, mask, slower, SLOWER, FULL)
        _store(param_at, start, lanes, mask, new, PARAM, FULL)
        _store(exp_avg_at, start, lanes, mask, exp_avg, MOMENT, FULL)
        _store(exp_avg_sq_at, start, lanes, mask, exp_avg_sq, MOMENT, FULL)
        if KAHAN:
            rounded = new.to(PARAM).to(COMPUTE)
            # What rounding took; of an overflow nothing can be kept.
            left = tl.where(rounded - rounded == 0, new - rounded, 0.0)
            _store(comp_at, start, lanes, mask, left, PARAM, FULL)


@triton.jit(do_not_specialize=["count"])
def apply(
    chunks,
    rows,
    orders,
    count,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    KAHAN: tl.constexpr,
    WINDOWS: tl.constexpr,
    SCALED: tl.constexpr,
    FLUSH: tl.constexpr,
    EXCHANGE: tl.constexpr,
    SLOWER: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What ``advance`` ordered, on one chunk of ``CHUNK`` elements of one tensor.

    With ``EXCHANGE`` the chunk's weights then exchange with a copy of them, if the tensor has one
    and its frequency divides ``count``.
    """
    pid = tl.program_id(0)
    tensor = tl.load(chunks + pid).to(tl.int64)
    row = rows + tensor * 16
    order = orders + tensor * 16
    action = tl.load(order)
    start = (pid - tl.load(row + 8)) * CHUNK
    left = tl.load(row + 7) - start
    bits = tl.load(row) | tl.load(row + 9)
    slower_at = tl.load(row + 10)
    if EXCHANGE:
        due = count % tl.maximum(tl.load(row + 11), 1) == 0
        slower_at = tl.where(due, slower_at, 0)
        bits = bits | slower_at
    lanes = tl.arange(0, CHUNK)
    # Whole chunks of aligned tensors are read and written 16 bytes at a time.
    full = (left >= CHUNK) & ((bits & 15) == 0)
    if action != _SKIP:
        if full:
            _apply_chunk(
                row, order, action, slower_at, start, lanes, None,
                PARAM, GRAD, MOMENT, COMPUTE, AMSGRAD, KAHAN, WINDOWS, SCALED, FLUSH,
                EXCHANGE, SLOWER, True,
            )  # fmt: skip
        else:
            _apply_chunk(
                row, order, action, slower_at, start, lanes, lanes < left,
                PARAM, GRAD, MOMENT, COMPUTE, AMSGRAD, KAHAN, WINDOWS, SCALED, FLUSH,
                EXCHANGE, SLOWER, False,
            )  # fmt: skip
    elif EXCHANGE:  # noqa: SIM102
        if slower_at != 0:
            if full:
                _exchange_chunk(
                    row, order, slower_at, start, lanes, None, PARAM, SLOWER, COMPUTE, True
                )  # fmt: skip
            else:
                _exchange_chunk(
                    row, order, slower_at, start, lanes, lanes < left, PARAM, SLOWER, COMPUTE, False
                )  # fmt: skip


_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def step(
    table: LevelTable,
    grads: Tensor,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    flush: bool = False,
    exchange: tuple[int, torch.dtype] | None = None,
) -> None:
    """One step of every tensor in ``table``, on the current stream of its device.

    Args:
        table: the tensors and the settings of their groups.
        grads: from ``table.addresses``: the address of each gradient; 0 passes a tensor over.
        grad_scale: what the gradients were multiplied by, one element (optional).
        found_inf: nonzero for the whole step to be skipped, one element (optional).
        flush: apply the running windows as if they were complete, without gradients.
        exchange: the number of this step, and the dtype of the copies in ``table`` that weights
            exchange with at steps that their frequencies divide (optional).
    """
    scaled = grad_scale is not None or found_inf is not None
    ordinary = not (scaled or flush or exchange)
    if ordinary and table.launch is not None:
        table.launch(grads.data_ptr())
        return
    if scaled:
        grad_scale = torch.ones((), device=table.device) if grad_scale is None else grad_scale
        found_inf = torch.zeros((), device=table.device) if found_inf is None else found_inf
    blocks = (table.n_tensors + ADVANCE_BLOCK - 1) // ADVANCE_BLOCK
    advance_args = (
        table.rows,
        table.counters,
        grads,
        table.settings,
        table.orders,
        grad_scale,
        found_inf,
        table.n_tensors,
        scaled,
        flush,
        ADVANCE_BLOCK,
    )
    apply_args = (
        table.chunks,
        table.rows,
        table.orders,
        exchange[0] if exchange else 0,
        *(_DTYPES[dtype] for dtype in table.dtypes),
        table.amsgrad,
        table.kahan,
        table.windows,
        scaled,
        flush,
        exchange is not None,
        _DTYPES[exchange[1] if exchange else torch.float32],
        CHUNK,
    )
    first = advance[(blocks,)](*advance_args, num_warps=4, enable_fp_fusion=True)
    second = None
    if table.n_chunks:
        second = apply[(table.n_chunks,)](*apply_args, num_warps=NUM_WARPS, enable_fp_fusion=True)
    if ordinary and repeatable(first):
        table.launch = _relaunch(first, blocks, advance_args, second, table.n_chunks, apply_args)


def _relaunch(
    first: Any, blocks: int, first_args: Any, second: Any, chunks: int, second_args: Any
) -> Any:
    """The same two launches again, without Triton's look at every argument's type each time."""
    first_args, second_args = (
        tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in args)
        for args in (first_args, second_args)
    )
    before, after = first_args[:2], first_args[3:]
    run_first = first[(blocks, 1, 1)]
    run_second = second[(chunks, 1, 1)] if second is not None else None

    def launch(grads: int) -> None:
        run_first(*before, grads, *after)
        if run_second is not None:
            run_second(*second_args)

    return launch
