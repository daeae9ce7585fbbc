"""M3's passes around the orthogonalisation, each as one Triton launch for many matrices.

Before it, :class:`MomentumTable` moves both momenta on by one gradient and writes what is to be
orthogonalised, matrix after matrix, into one buffer, whatever part of a parameter a matrix is.
After it, :class:`MoveTable` reads the orthogonalised stack of one shape and moves the parameters.
All of it is computed in float32 and rounded where it is stored.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aligned, on
from .launcher import Launcher

#: Elements and warps per program: two 16-byte accesses of float32 per thread and tensor.
CHUNK = 1024
NUM_WARPS = 4

#: Parameters, gradients, fast momenta and orthogonalised matrices that the kernels can take.
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}

# Columns of the first table; the kernel knows them by number.
_ROW = 16


@triton.jit
def _places(start, lanes, columns, stride):
    """Where elements of a matrix lie whose rows are ``stride`` apart."""
    row = start // columns
    column = (start - row * columns).to(tl.int32) + lanes
    further = column // columns.to(tl.int32)
    return (row + further) * stride + (column - further * columns.to(tl.int32))


@triton.jit
def _lerp(a, b, weight):
    # The two forms of torch's: exact at either end.
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))


@triton.jit
def _momenta_chunk(
    row,
    g_address,
    stack,
    sums,
    start,
    lanes,
    left,
    weight,
    beta1,
    scale,
    share,
    GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SLOW: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FULL: tl.constexpr,
):
    m_address = tl.load(row + 2)
    s_address = tl.load(row + 3)
    out = tl.load(row + 5) + start
    if FULL:
        # What is rounded here is a multiple of 16 bytes already; the compiler learns it.
        g_at = tl.multiple_of((g_address // 16 * 16).to(tl.pointer_type(GRAD)), 16) + start + lanes
        m_at = tl.multiple_of((m_address // 16 * 16).to(tl.pointer_type(MOMENTUM)), 16)
        m_at += start + lanes
        out_at = tl.multiple_of(stack + out // 4 * 4, 16) + lanes
        mask = None
        g = tl.load(g_at).to(tl.float32)
        m = tl.load(m_at).to(tl.float32)
    else:
        at = _places(start, lanes, tl.load(row + 8), tl.load(row + 9))
        mask = lanes < left
        g_at = g_address.to(tl.pointer_type(GRAD)) + at
        m_at = m_address.to(tl.pointer_type(MOMENTUM)) + at
        out_at = stack + out + lanes
        g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_at, mask=mask, other=0.0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    m = _lerp(m, g, weight)
    if FULL:
        tl.store(m_at, m.to(MOMENTUM))
    else:
        tl.store(m_at, m.to(MOMENTUM), mask=mask)
    if SLOW:
        if FULL:
            s_at = tl.multiple_of((s_address // 16 * 16).to(tl.pointer_type(tl.float32)), 16)
            s_at += start + lanes
            tl.store(s_at, scale * tl.load(s_at) + share * g)
        else:
            s_at = s_address.to(tl.pointer_type(tl.float32)) + at
            s = tl.load(s_at, mask=mask, other=0.0)
            tl.store(s_at, scale * s + share * g, mask=mask)
    ahead = m
    if NESTEROV:
        ahead = _lerp(g, m, beta1)
    if FULL:
        tl.store(out_at, ahead)
    else:
        tl.store(out_at, ahead, mask=mask)
    tl.store(sums, tl.sum(ahead * ahead))  # of zeros past the end


@triton.jit
def momenta_kernel(
    chunks,
    rows,
    grads,
    stack,
    sums,
    weight,
    beta1,
    beta3,
    scale,
    share,
    GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SLOW: tl.constexpr,
    COUNTED: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one matrix; ``grads`` holds the addresses of the parameters' gradients.

    ``sums``, of every chunk, takes the sum of the squares of what goes to ``stack``.
    """
    pid = tl.program_id(0)
    row = rows + tl.load(chunks + pid).to(tl.int64) * 16
    start = (pid - tl.load(row + 7)) * CHUNK
    left = tl.load(row + 6) - start
    g_address = tl.load(grads + tl.load(row)) + tl.load(row + 1)
    if COUNTED:
        opens = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))) == 0
        scale = tl.where(opens, beta3, 1.0)
    lanes = tl.arange(0, CHUNK)
    if (left >= CHUNK) & (((tl.load(row + 10) | g_address) & 15) == 0):
        _momenta_chunk(
            row, g_address, stack, sums + pid, start, lanes, left, weight, beta1, scale, share,
            GRAD, MOMENTUM, SLOW, NESTEROV, MAXIMIZE, True,
        )  # fmt: skip
    else:
        _momenta_chunk(
            row, g_address, stack, sums + pid, start, lanes, left, weight, beta1, scale, share,
            GRAD, MOMENTUM, SLOW, NESTEROV, MAXIMIZE, False,
        )  # fmt: skip


@triton.jit
def _move_chunk(
    row,
    x,
    sums,
    offset,
    start,
    lanes,
    left,
    alpha,
    weight2,
    eps,
    size,
    decay,
    PARAM: tl.constexpr,
    UPDATE: tl.constexpr,
    SLOW: tl.constexpr,
    MOMENT: tl.constexpr,
    RATIO: tl.constexpr,
    MEASURE: tl.constexpr,
    FULL: tl.constexpr,
):
    """Move the parameter, or with MEASURE write the squared norms of ``O1`` and the direction."""
    if FULL:
        at = start + lanes
        fast = tl.load(tl.multiple_of(x + offset // 8 * 8, 16) + lanes).to(tl.float32)
    else:
        mask = lanes < left
        at = _places(start, lanes, tl.load(row + 4), tl.load(row + 5))
        fast = tl.load(x + offset + lanes, mask=mask, other=0.0).to(tl.float32)
    direction = fast
    if SLOW:
        o_address = tl.load(row + 1)
        if FULL:
            o_at = tl.multiple_of((o_address // 16 * 16).to(tl.pointer_type(UPDATE)), 16) + at
            direction += alpha * tl.load(o_at).to(tl.float32)
        else:
            o_at = o_address.to(tl.pointer_type(UPDATE)) + at
            direction += alpha * tl.load(o_at, mask=mask, other=0.0).to(tl.float32)
    if MOMENT:
        v_address = tl.load(row + 2)
        if FULL:
            v_at = tl.multiple_of((v_address // 16 * 16).to(tl.pointer_type(tl.float32)), 16) + at
            v = tl.load(v_at)
        else:
            v_at = v_address.to(tl.pointer_type(tl.float32)) + at
            v = tl.load(v_at, mask=mask, other=0.0)
        if MEASURE:  # and the pass that moves finds it done
            v = _lerp(v, direction * direction, weight2)
            if FULL:
                tl.store(v_at, v)
            else:
                tl.store(v_at, v, mask=mask)
        direction = direction / (tl.sqrt(v) + eps)
    if MEASURE:
        if not FULL:  # 0 / (0 + 0) is not 0
            direction = tl.where(mask, direction, 0.0)
        tl.store(sums, tl.sum(fast * fast))
        tl.store(sums + 1, tl.sum(direction * direction))
    else:
        if RATIO:
            norm = tl.maximum(tl.sqrt(tl.load(sums + 1)), 1.1754943508222875e-38)
            size = size * (tl.sqrt(tl.load(sums)) / norm)
        p_address = tl.load(row)
        if FULL:
            p_at = tl.multiple_of((p_address // 16 * 16).to(tl.pointer_type(PARAM)), 16) + at
            p = tl.load(p_at).to(tl.float32)
            tl.store(p_at, (decay * p - size * direction).to(PARAM))
        else:
            p_at = p_address.to(tl.pointer_type(PARAM)) + at
            p = tl.load(p_at, mask=mask, other=0.0).to(tl.float32)
            tl.store(p_at, (decay * p - size * direction).to(PARAM), mask=mask)


@triton.jit
def move_kernel(
    rows,
    x,
    sums,
    sizes,
    per_matrix,
    alpha,
    weight2,
    eps,
    size,
    decay,
    PARAM: tl.constexpr,
    UPDATE: tl.constexpr,
    SLOW: tl.constexpr,
    MOMENT: tl.constexpr,
    RATIO: tl.constexpr,
    MEASURE: tl.constexpr,
    SIZED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one matrix of a stack ``x``, of which each has ``per_matrix`` chunks."""
    pid = tl.program_id(0).to(tl.int64)
    matrix = pid // per_matrix
    row = rows + matrix * 8
    start = (pid - matrix * per_matrix) * CHUNK
    numel = tl.load(row + 3)
    left = numel - start
    offset = matrix * numel + start
    if SIZED:
        size = tl.load(sizes)
        decay = tl.load(sizes + 1)
    if MEASURE:
        sums += pid * 2
    else:
        sums += matrix * 2
    lanes = tl.arange(0, CHUNK)
    bits = tl.load(row + 6)
    if not ALIGNED:
        bits = bits | 1
    if (left >= CHUNK) & ((bits & 15) == 0):
        _move_chunk(
            row, x, sums, offset, start, lanes, left, alpha, weight2, eps, size, decay,
            PARAM, UPDATE, SLOW, MOMENT, RATIO, MEASURE, True,
        )  # fmt: skip
    else:
        _move_chunk(
            row, x, sums, offset, start, lanes, left, alpha, weight2, eps, size, decay,
            PARAM, UPDATE, SLOW, MOMENT, RATIO, MEASURE, False,
        )  # fmt: skip


_launch_momenta = Launcher(momenta_kernel, num_warps=NUM_WARPS)
_launch_move = Launcher(move_kernel, num_warps=NUM_WARPS)


class Matrix(NamedTuple):
    """Where one matrix lies in a parameter, and in its state, which is laid out alike."""

    param: int  # which parameter
    offset: int  # of the first element
    rows: int
    columns: int
    stride: int  # from row to row; columns lie side by side

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def dense(self) -> bool:
        return self.stride == self.columns or self.rows == 1


class MomentumTable:
    """Matrices of parameters that have their device and all their dtypes in common.

    In device memory: ``chunks``, int32: the matrix that each program works on; ``rows``, int64
    ``(matrices, 16)``: the parameter, the matrix's offset in its gradient (in bytes), addresses of
    the matrix in both momenta, of the count of the running chunk, the matrix's offset in the
    buffer of what is to be orthogonalised, elements, first chunk of the launch, columns, distance
    of the rows, and all addresses and offsets or-ed, whose low bits tell whether all is aligned.

    Args:
        matrices: at least one, none of them empty.
        offsets: of each in the buffer, in elements.
        grad_dtype: of all gradients.
        momenta, slow_momenta, counts: of the parameters; the last two may be empty.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        offsets: Sequence[int],
        grad_dtype: torch.dtype,
        momenta: Sequence[Tensor],
        slow_momenta: Sequence[Tensor],
        counts: Sequence[Tensor],
    ) -> None:
        self.device = momenta[0].device
        self._slow, self._counted = bool(slow_momenta), bool(counts)
        self._kinds = DTYPES[grad_dtype], DTYPES[momenta[0].dtype]
        rows, chunks = array("q"), array("i")
        for i, (matrix, offset) in enumerate(zip(matrices, offsets)):
            k = matrix.param
            in_grad = matrix.offset * grad_dtype.itemsize
            momentum = momenta[k].data_ptr() + matrix.offset * momenta[k].element_size()
            slow = slow_momenta[k].data_ptr() + matrix.offset * 4 if slow_momenta else 0
            count = counts[k].data_ptr() if counts else 0
            merged = in_grad | momentum | slow | offset * 4 | int(not matrix.dense)
            place = [len(chunks), matrix.columns, matrix.stride, merged]
            row = [k, in_grad, momentum, slow, count, offset, matrix.numel, *place]
            rows.extend(row + [0] * (_ROW - len(row)))
            chunks.extend(array("i", [i]) * (-(-matrix.numel // CHUNK)))
        #: Programs of a launch, matrix by matrix.
        self.chunks = len(chunks)
        self._rows = _upload(rows, self.device)
        self._chunks = _upload(chunks, self.device)

    def launch(
        self,
        grads: Tensor,
        stack: Tensor,
        sums: Tensor,
        *,
        beta1: float,
        beta3: float,
        opens: bool,
        share: float,
        nesterov: bool,
        maximize: bool,
    ) -> None:
        """Take in one gradient of each parameter.

        Args:
            grads: addresses of the gradients, int64, which the device can read.
            stack: float32, where the offsets point to.
            sums: float32 ``(chunks,)``, takes the squared length of each chunk in ``stack``.
            beta1, beta3: decay rates of the fast and the slow momentum.
            opens: whether chunks open, where no counts were given.
            share: of a gradient in the slow momentum.
            nesterov: look ahead.
            maximize: take the negative gradients.
        """
        numbers = 1 - beta1, beta1, beta3, beta3 if opens else 1.0, share
        constants = *self._kinds, self._slow, self._counted, nesterov, maximize, CHUNK
        args = self._chunks, self._rows, grads, stack, sums, *map(float, numbers), *constants
        kind = self.device, constants, aligned(grads, stack, sums)
        with on(self.device):
            _launch_momenta(kind, (self.chunks, 1, 1), args)


class MoveTable:
    """Matrices of one shape, of parameters that have their device and dtypes in common.

    In device memory ``rows``, int64 ``(matrices, 8)``: addresses of the matrix in the parameter,
    in the slow update and in the second moment, elements, columns, distance of the rows, and all
    addresses and the matrix's place in the stack or-ed.

    Args:
        matrices: at least one, none of them empty.
        params: the parameters.
        slow_updates: theirs, or nothing.
        second_moments: theirs, one number per element, or nothing.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        params: Sequence[Tensor],
        slow_updates: Sequence[Tensor],
        second_moments: Sequence[Tensor],
    ) -> None:
        self.device = params[0].device
        self._count = len(matrices)
        self._per_matrix = -(-matrices[0].numel // CHUNK)
        self._moment = bool(second_moments)
        self._slow = bool(slow_updates)
        update = slow_updates[0].dtype if slow_updates else torch.float32
        self._kinds = DTYPES[params[0].dtype], DTYPES[update]
        rows = array("q")
        for i, matrix in enumerate(matrices):
            addresses = [
                tensors[matrix.param].data_ptr()
                + matrix.offset * tensors[matrix.param].element_size()
                if tensors
                else 0
                for tensors in (params, slow_updates, second_moments)
            ]
            # Two bytes is the narrowest that a stack's elements can be.
            merged = i * matrix.numel * 2 | int(not matrix.dense)
            for address in addresses:
                merged |= address
            rows.extend([*addresses, matrix.numel, matrix.columns, matrix.stride, merged, 0])
        self._rows = _upload(rows, self.device)

    def launch(
        self,
        x: Tensor,
        *,
        alpha: float,
        beta2: float,
        eps: float,
        size: float,
        decay: float,
        sizes: Tensor | None = None,
        given: Tensor | None = None,
    ) -> None:
        """Move the parameters along the orthogonalised matrices, as :func:`rules.m3_direction`.

        Args:
            x: shape (matrices, rows, columns), contiguous.
            alpha: weight of the slow update.
            beta2, eps: of the second moment.
            size: what a parameter moves by, times a direction.
            decay: what it is multiplied by before.
            sizes: both of these, float32, on the device; then they are read there.
            given: squared norms that the direction is to have and has, float32, shape
                (matrices, 2); ``x`` is then the direction itself, which nothing is added to.
        """
        if given is not None:
            self._run(x, given, False, True, size, decay, sizes, (alpha, beta2, eps), False)
            return
        options = (alpha, beta2, eps)
        sums, ratio = x, self._slow or self._moment
        if ratio:
            shape = self._count, self._per_matrix, 2
            sums = torch.empty(shape, dtype=torch.float32, device=self.device)
            self._run(x, sums, True, False, size, decay, sizes, options, True)
            sums = sums.sum(1)
        self._run(x, sums, False, ratio, size, decay, sizes, options, True)

    def _run(
        self,
        x: Tensor,
        sums: Tensor,
        measure: bool,
        ratio: bool,
        size: float,
        decay: float,
        sizes: Tensor | None,
        options: tuple[float, float, float],
        joined: bool,
    ) -> None:
        # Of one type, whatever the numbers are: an integer would be compiled for.
        alpha, beta2, eps, size, decay = map(float, (*options, size, decay))
        sizes_at = sums if sizes is None else sizes
        flags = self._slow and joined, self._moment and joined, ratio, measure, sizes is not None
        constants = *self._kinds, *flags, aligned(x), CHUNK
        numbers = alpha, 1 - beta2, eps, size, decay
        args = self._rows, x, sums, sizes_at, self._per_matrix, *numbers, *constants
        kinds = x.dtype, sums.dtype, aligned(sums), sizes_at.dtype, aligned(sizes_at)
        kind = self.device, self._per_matrix, constants, *kinds
        with on(self.device):
            _launch_move(kind, (self._count * self._per_matrix, 1, 1), args)


def _upload(values: array[int], device: torch.device) -> Tensor:
    dtype = torch.int64 if values.typecode == "q" else torch.int32
    host = torch.frombuffer(values, dtype=dtype).clone()
    if device.type == "cuda":  # so that the copy waits for nothing
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
