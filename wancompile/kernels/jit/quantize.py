"""Floats to 8 bits, bit for bit as `numerics.quantize` does it on a CPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wancompile.quant.numerics import INT8, QMAX, SMALLEST_SCALE

_HEAD_TOKENS = 64


@triton.jit
def _to_8bit(steps, QMAX: tl.constexpr, IS_INT8: tl.constexpr):
    """Saturate and round half to even; e4m3 keeps NaN, int8 makes it 0."""
    steps = tl.clamp(steps, -QMAX, QMAX, propagate_nan=tl.PropagateNan.ALL)
    if IS_INT8:
        # Around 1.5 * 2**23 the step of fp32 is 1: the sum is rounded, its low byte is the integer.
        rounded = (steps + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        rounded = steps.to(tl.float8e4nv)
    return rounded


@triton.jit
def _per_token(
    x,
    inv_smooth,
    out,
    scales,
    x_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """One program quantizes one row, which it reads once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
    if HAS_SMOOTH:
        value *= tl.load(inv_smooth + column, mask=column < K, other=0.0)
    # As integers, the magnitudes of floats have the same order, with NaN above infinity.
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.div_rn(tl.max(magnitude, 0).to(tl.float32, bitcast=True), QMAX)
    scale = tl.where(scale < SMALLEST, SMALLEST, scale)
    steps = tl.div_rn(value, tl.broadcast_to(scale, (BLOCK,)))
    tl.store(out + row * K + column, _to_8bit(steps, QMAX, IS_INT8), mask=column < K)
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["tokens"])
def _per_head(
    x,
    scales,
    out,
    tokens,
    heads,
    batch_stride,
    head_stride,
    token_stride,
    channel_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
):
    """One program quantizes `BLOCK_S` tokens of one head."""
    both = tl.program_id(1)
    batch, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    token = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None].to(tl.int64)
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = (token < tokens) & (channel < D)
    start = x + batch * batch_stride + head * head_stride
    value = tl.load(start + token * token_stride + channel * channel_stride, mask=inside, other=0.0)
    scale = tl.broadcast_to(tl.load(scales + head), (BLOCK_S, BLOCK_D))
    steps = tl.div_rn(value.to(tl.float32), scale)
    to = out + both.to(tl.int64) * tokens * D + token * D + channel
    tl.store(to, _to_8bit(steps, QMAX, IS_INT8), mask=inside)


def launch_per_token(x: Tensor, inv_smooth: Tensor | None, out: Tensor, scale: Tensor) -> None:
    """Fill `out` and `scale` with what `quantize_per_token` computes.

    Args:
        x: `[M, K]`, any float dtype, its rows without gaps inside them; M > 0.
        inv_smooth: `[K]` fp32, contiguous.
        out: `[M, K]`, int8 or e4m3, contiguous.
        scale: M fp32 numbers, contiguous.
    """
    rows, columns = x.shape
    block = triton.next_power_of_2(columns)
    _per_token[(rows,)](
        x,
        scale if inv_smooth is None else inv_smooth,
        out,
        scale,
        x.stride(0),
        K=columns,
        BLOCK=block,
        HAS_SMOOTH=inv_smooth is not None,
        SMALLEST=SMALLEST_SCALE,
        num_warps=min(16, max(1, block // 1024)),
        **_kind(out.dtype),
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
        *x.stride(),
        D=channels,
        BLOCK_D=triton.next_power_of_2(channels),
        BLOCK_S=_HEAD_TOKENS,
        **_kind(out.dtype),
    )


def _kind(dtype: torch.dtype) -> dict[str, bool | float]:
    return {"IS_INT8": dtype == INT8, "QMAX": float(QMAX[dtype])}
