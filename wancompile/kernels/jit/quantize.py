"""Floats to 8 bits, bit for bit as `numerics.quantize` does it on a CPU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from wancompile.kernels.jit.rows import (
    load_row,
    quantize_row,
    quantized_kind,
    row_shape,
    saturate,
    smooth_row,
    to_8bit,
    widen_row,
)
from wancompile.quant.numerics import INT8, QMAX

_HEAD_TOKENS = 64


@triton.jit
def _per_token(
    x,
    inv_smooth,
    out,
    scales,
    x_stride,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """One program quantizes one row, which it reads once."""
    row = tl.program_id(0).to(tl.int64)
    values = widen_row(load_row(x + row * x_stride, K, CHUNK))
    values = smooth_row(values, inv_smooth, K, CHUNK)
    quantize_row(values, out + row * K, scales + row, K, CHUNK, IS_INT8, QMAX, SMALLEST)


@triton.jit
def _per_tensor(
    x,
    inv_smooth,
    out,
    scale,
    x_stride,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
):
    """One program quantizes one row by the scale of all."""
    row = tl.program_id(0).to(tl.int64)
    values = widen_row(load_row(x + row * x_stride, K, CHUNK))
    values = smooth_row(values, inv_smooth, K, CHUNK)
    inverse = tl.div_rn(1.0, tl.load(scale))
    for i in tl.static_range(len(values)):
        column = i * CHUNK + tl.arange(0, CHUNK)
        rounded = to_8bit(saturate(values[i] * inverse, QMAX), IS_INT8)
        tl.store(out + row * K + column, rounded, mask=column < K)


@triton.jit(do_not_specialize=["tokens"])
def _per_head(
    x,
    scales,
    out,
    tokens,
    heads,
    strides,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
):
    """One program quantizes `BLOCK_S` tokens of one head; `strides` are those of x."""
    both = tl.program_id(1)
    batch, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    token = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None].to(tl.int64)
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = (token < tokens) & (channel < D)
    start = x + batch * strides[0] + head * strides[1]
    value = tl.load(start + token * strides[2] + channel * strides[3], mask=inside, other=0.0)
    steps = value.to(tl.float32) * tl.div_rn(1.0, tl.load(scales + head))
    to = out + both.to(tl.int64) * tokens * D + token * D + channel
    tl.store(to, to_8bit(saturate(steps, QMAX), IS_INT8), mask=inside)


def launch_per_token(x: Tensor, inv_smooth: Tensor | None, out: Tensor, scale: Tensor) -> None:
    """Fill `out` and `scale` with what `quantize_per_token` computes.

    Args:
        x: `[M, K]`, any float dtype, its rows without gaps inside them; M > 0.
        inv_smooth: `[K]` fp32, contiguous.
        out: `[M, K]`, int8 or e4m3, contiguous.
        scale: M fp32 numbers, contiguous.
    """
    rows, columns = x.shape
    shape = row_shape(columns)
    _per_token[(rows,)](
        x,
        inv_smooth,
        out,
        scale,
        x.stride(0),
        K=columns,
        CHUNK=shape.chunk,
        num_warps=shape.warps,
        enable_fp_fusion=False,  # a product that is not rounded would move ties
        **quantized_kind(out.dtype),
    )


def launch_per_tensor(x: Tensor, inv_smooth: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Fill `out` with what `quantize_per_tensor` computes.

    Args:
        x: `[M, K]`, any float dtype, its rows without gaps inside them; M > 0.
        inv_smooth: `[K]` fp32, contiguous, or None.
        scale: `[1]` fp32.
        out: M rows of K, int8 or e4m3, contiguous.
    """
    rows, columns = x.shape
    shape = row_shape(columns)
    _per_tensor[(rows,)](
        x,
        inv_smooth,
        out,
        scale,
        x.stride(0),
        K=columns,
        CHUNK=shape.chunk,
        IS_INT8=out.dtype == INT8,
        QMAX=float(QMAX[out.dtype]),
        num_warps=shape.warps,
        enable_fp_fusion=False,
    )


def launch_per_head(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """Fill `out` with what `quantize_per_head` computes.

    Args:
        x: `[B, H, S, D]`, any float dtype, any strides, not empty.
        scale: `[H]` fp32, contiguous.
        out: `[B, H, S, D]`, int8 or e4m3, contiguous.
    """
    batch, heads, tokens, channels = x.shape
    _per_head[(triton.cdiv(tokens, _HEAD_TOKENS), batch * heads)](
        x,
        scale,
        out,
        tokens,
        heads,
        x.stride(),
        D=channels,
        BLOCK_D=triton.next_power_of_2(channels),
        BLOCK_S=_HEAD_TOKENS,
        IS_INT8=out.dtype == INT8,
        QMAX=float(QMAX[out.dtype]),
        enable_fp_fusion=False,
    )
