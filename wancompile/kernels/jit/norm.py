"""Norms of tokens, what modulates them and how they come to be 8 bits, one program per token."""

# A tuple of chunks changes its type as it grows.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from wancompile.kernels.jit.rows import (
    load_chunk,
    load_row,
    quantize_row,
    quantized_kind,
    row_shape,
    smooth_row,
    store_row,
    sum_row,
    sum_squares,
    widen_row,
)


@triton.jit
def _read_row(rows, row, tokens):
    """Batch of a row and the token whose modulation it reads, int64."""
    batch = row // tokens
    token = row - batch * tokens if rows is None else tl.load(rows + row)
    return batch.to(tl.int64), token.to(tl.int64)


@triton.jit
def _modulation(values, offset, FIRST: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk of `values + offset`, fp32."""
    operand = load_chunk(values, FIRST, K, CHUNK, False).to(tl.float32)
    if offset is not None:
        operand += load_chunk(offset, FIRST, K, CHUNK, False)
    return operand


@triton.jit
def _add_gated_row(x, y, gate, offset, dtype: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """`x + y * (gate + offset)` of two rows in memory, rounded to `dtype` and widened again."""
    stream, branch = load_row(x, K, CHUNK), load_row(y, K, CHUNK)
    total = ()
    for i in tl.static_range(len(stream)):
        added = branch[i].to(tl.float32)
        if gate is not None:
            added *= _modulation(gate, offset, i * CHUNK, K, CHUNK)
        total += ((stream[i].to(tl.float32) + added).to(dtype),)
    return total


@triton.jit
def _normalize_row(values, eps, K: tl.constexpr, CHUNK: tl.constexpr):
    """LayerNorm of an fp32 row: the mean, then the variance from the differences to it."""
    mean = sum_row(values) / K
    centred = ()
    for i in tl.static_range(len(values)):
        difference = values[i] - mean
        if i * CHUNK + CHUNK > K:
            difference = tl.where(i * CHUNK + tl.arange(0, CHUNK) < K, difference, 0.0)
        centred += (difference,)
    factor = tl.rsqrt(sum_squares(centred) / K + eps)
    normed = ()
    for i in tl.static_range(len(values)):
        normed += (centred[i] * factor,)
    return normed


@triton.jit
def _modulate_row(
    values, weight, weight_offset, bias, bias_offset, K: tl.constexpr, CHUNK: tl.constexpr
):
    """`values * (weight + its offset) + (bias + its offset)`; what is beyond the row stays 0."""
    out = ()
    for i in tl.static_range(len(values)):
        value = values[i]
        if weight is not None:
            value *= _modulation(weight, weight_offset, i * CHUNK, K, CHUNK)
        if bias is not None:
            value += _modulation(bias, bias_offset, i * CHUNK, K, CHUNK)
        out += (value,)
    return out


@triton.jit(do_not_specialize=["tokens"])
def _norm_quantize(
    x,
    y,
    total,
    gate,
    gate_offset,
    weight,
    weight_offset,
    bias,
    bias_offset,
    rows,
    inv_smooth,
    out,
    scales,
    tokens,
    eps,
    x_stride,
    y_stride,
    gate_strides,
    weight_strides,
    bias_strides,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """`norm_quantize`, of the sum with `y` where there is one; strides of (batch, token)."""
    row = tl.program_id(0)
    batch, token = _read_row(rows, row, tokens)
    row = row.to(tl.int64)
    if gate is not None:
        gate += batch * gate_strides[0] + token * gate_strides[1]
    if weight is not None:
        weight += batch * weight_strides[0] + token * weight_strides[1]
    if bias is not None:
        bias += batch * bias_strides[0] + token * bias_strides[1]
    if y is None:
        values = load_row(x + row * x_stride, K, CHUNK)
    else:
        values = _add_gated_row(
            x + row * x_stride, y + row * y_stride, gate, gate_offset,
            total.dtype.element_ty, K, CHUNK,
        )  # fmt: skip
        store_row(values, total + row * K, K, CHUNK)
    values = _normalize_row(widen_row(values), eps, K, CHUNK)
    values = _modulate_row(values, weight, weight_offset, bias, bias_offset, K, CHUNK)
    values = smooth_row(values, inv_smooth, K, CHUNK)
    quantize_row(values, out + row * K, scales + row, K, CHUNK, IS_INT8, QMAX, SMALLEST)


@triton.jit(do_not_specialize=["tokens"])
def _add_gated(
    x,
    y,
    gate,
    gate_offset,
    rows,
    out,
    tokens,
    x_stride,
    y_stride,
    gate_strides,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    batch, token = _read_row(rows, row, tokens)
    row = row.to(tl.int64)
    if gate is not None:
        gate += batch * gate_strides[0] + token * gate_strides[1]
    values = _add_gated_row(
        x + row * x_stride, y + row * y_stride, gate, gate_offset, out.dtype.element_ty, K, CHUNK
    )
    store_row(values, out + row * K, K, CHUNK)


@triton.jit
def _rms_norm(x, weight, out, eps, x_stride, K: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values = widen_row(load_row(x + row * x_stride, K, CHUNK))
    factor = tl.rsqrt(sum_squares(values) / K + eps)
    normed = ()
    for i in tl.static_range(len(values)):
        value = values[i] * factor
        if weight is not None:
            value *= load_chunk(weight, i * CHUNK, K, CHUNK, False).to(tl.float32)
        normed += (value,)
    store_row(normed, out + row * K, K, CHUNK)


def launch_norm_quantize(
    x: Tensor,
    y: Tensor | None,
    total: Tensor | None,
    operands: Sequence[Tensor | None],
    offsets: Sequence[Tensor | None],
    rows: Tensor | None,
    eps: float,
    inv_smooth: Tensor | None,
    out: Tensor,
    scale: Tensor,
) -> None:
    """Fill `out` and `scale` with what `norm_quantize` computes of x, or of `total`, filled too.

    Args:
        x: `[B * S, C]`, any float dtype, no gaps inside rows, not empty.
        y: like x, or None: then x is what is normed.
        total: `[B, S, C]`, contiguous; where `add_gated(x, y, ...)` goes, None without y.
        operands: gate, weight and bias: each `[C]`, `[B, 1, C]` or `[B, S, C]` without gaps inside
            rows, any float dtype, or None.
        offsets: of the three, each `[C]` fp32, contiguous, or None.
        rows: `[B, S]` int32, contiguous, or None, see `norm_quantize`.
        eps: added to the variance.
        inv_smooth: `[C]` fp32, contiguous, or None.
        out: `[B, S, C]`, int8 or e4m3, contiguous.
        scale: `[B, S, 1]` fp32, contiguous.
    """
    _, tokens, channels = out.shape
    shape = row_shape(channels)
    (gate, weight, bias), (gate_offset, weight_offset, bias_offset) = operands, offsets
    _norm_quantize[(x.shape[0],)](
        x,
        y,
        total,
        gate,
        gate_offset,
        weight,
        weight_offset,
        bias,
        bias_offset,
        rows,
        inv_smooth,
        out,
        scale,
        tokens,
        eps,
        x.stride(0),
        0 if y is None else y.stride(0),
        *map(_strides, operands),
        K=channels,
        CHUNK=shape.chunk,
        num_warps=shape.warps,
        enable_fp_fusion=False,  # the sum is the plain body's, bit for bit
        **quantized_kind(out.dtype),
    )


def launch_add_gated(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    gate_offset: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out` with what `add_gated` computes.

    Args:
        x: `[B * S, C]`, any float dtype, no gaps inside rows, not empty.
        y: like x.
        gate: `[C]`, `[B, 1, C]` or `[B, S, C]` without gaps inside rows, any float dtype, or None.
        gate_offset: `[C]` fp32, contiguous, or None.
        rows: `[B, S]` int32, contiguous, or None.
        out: `[B, S, C]`, of the dtype of x, contiguous.
    """
    _, tokens, channels = out.shape
    shape = row_shape(channels)
    _add_gated[(x.shape[0],)](
        x,
        y,
        gate,
        gate_offset,
        rows,
        out,
        tokens,
        x.stride(0),
        y.stride(0),
        _strides(gate),
        K=channels,
        CHUNK=shape.chunk,
        num_warps=shape.warps,
        enable_fp_fusion=False,
    )


def launch_rms_norm(x: Tensor, weight: Tensor | None, eps: float, out: Tensor) -> None:
    """Fill `out` with the RMSNorm of every row of x (Zhang & Sennrich 2019).

    Args:
        x: `[M, C]`, any float dtype, no gaps inside rows, not empty.
        weight: `[C]`, any float dtype, contiguous, or None.
        eps: added to the mean square.
        out: M rows of C, contiguous, any float dtype.
    """
    shape = row_shape(x.shape[1])
    _rms_norm[(x.shape[0],)](
        x,
        weight,
        out,
        eps,
        x.stride(0),
        K=x.shape[1],
        CHUNK=shape.chunk,
        num_warps=shape.warps,
    )


def _strides(operand: Tensor | None) -> tuple[int, int]:
    """How far the rows of two videos and of two tokens lie apart; 0 where they share one."""
    if operand is None or operand.dim() == 1:
        return 0, 0
    return operand.stride(0), operand.stride(1) if operand.shape[1] > 1 else 0
