"""RMSNorm, rotary embedding and rounding to 8 bits of q or k, one program per token."""

# A tuple of chunks changes its type as it grows.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from wancompile.kernels.jit.rows import row_shape, saturate, to_8bit
from wancompile.quant.numerics import INT8, QMAX


@triton.jit
def _load_heads(
    start,
    FIRST: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`BLOCK_H` heads from `FIRST` on of the `H * D` channels at `start`, 0 beyond."""
    head = FIRST + tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    if FIRST + BLOCK_H <= H and BLOCK_D == D:
        value = tl.load(start + head * D + channel)
    else:
        inside = (head < H) & (channel < D)
        value = tl.load(start + head * D + channel, mask=inside, other=0.0)
    return value


@triton.jit
def _load_token(
    start, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    chunks = ()
    for first in tl.static_range(0, H, BLOCK_H):
        chunks += (_load_heads(start, first, H, D, BLOCK_H, BLOCK_D).to(tl.float32),)
    return chunks


@triton.jit
def _rotate(value, cos, sin):
    """Turn channels 2i and 2i + 1 of every head by angle i."""
    heads: tl.constexpr = value.shape[0]
    channels: tl.constexpr = value.shape[1]
    even, odd = tl.split(value.reshape(heads, channels // 2, 2))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return turned.reshape(heads, channels)


@triton.jit(do_not_specialize=["tokens"])
def _norm_rotate_quantize(
    x,
    weight,
    cos,
    sin,
    shift,
    scales,
    out,
    tokens,
    eps,
    x_stride,
    cos_strides,
    sin_strides,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
):
    row = tl.program_id(0)
    batch = row // tokens
    token = (row - batch * tokens).to(tl.int64)
    at = x + row.to(tl.int64) * x_stride
    values = _load_token(at, H, D, BLOCK_H, BLOCK_D)
    pair = tl.arange(0, BLOCK_D // 2)
    c = tl.load(cos + token * cos_strides[0] + pair * cos_strides[1], mask=pair < D // 2, other=0.0)
    s = tl.load(sin + token * sin_strides[0] + pair * sin_strides[1], mask=pair < D // 2, other=0.0)
    root = tl.rsqrt(_sum_squares(values) / (H * D) + eps)
    channel = tl.arange(0, BLOCK_D)[None, :]
    for i in tl.static_range(len(values)):
        head = i * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        inverse = tl.div_rn(1.0, tl.load(scales + head, mask=head < H, other=1.0))
        normed = values[i]
        if weight is not None:
            normed *= _load_heads(weight, i * BLOCK_H, H, D, BLOCK_H, BLOCK_D).to(tl.float32)
        # Two channels share an angle: to scale the angle costs half of what scaling them does.
        factor = root * inverse
        steps = _rotate(normed, c[None, :] * factor, s[None, :] * factor)
        if shift is not None:
            steps -= _load_heads(shift, i * BLOCK_H, H, D, BLOCK_H, BLOCK_D) * inverse
        to = out + ((batch * H + head).to(tl.int64) * tokens + token) * D + channel
        rounded = to_8bit(saturate(steps, QMAX), IS_INT8)
        if i * BLOCK_H + BLOCK_H <= H and BLOCK_D == D:
            tl.store(to, rounded)
        else:
            tl.store(to, rounded, mask=(head < H) & (channel < D))


@triton.jit
def _sum_squares(chunks):
    total = chunks[0] * chunks[0]
    for i in tl.static_range(1, len(chunks)):
        total = tl.fma(chunks[i], chunks[i], total)
    return tl.sum(tl.sum(total, 1), 0)


def launch(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    out: Tensor,
) -> None:
    """Fill `out` with what `norm_rotate_quantize` computes.

    Args:
        x: `[B * S, H * D]`, any float dtype, no gaps inside rows, not empty.
        weight: `[H * D]`, any float dtype, contiguous, or None.
        eps: added to the mean square.
        cos: `[S, D / 2]` fp32, any strides.
        sin: `[S, D / 2]` fp32, any strides.
        shift: `[H, D]` fp32, contiguous, or None.
        scale: `[H]` fp32, contiguous.
        out: `[B, H, S, D]`, int8 or e4m3, contiguous.
    """
    _, heads, tokens, channels = out.shape
    block_d = triton.next_power_of_2(channels)
    shape = row_shape(heads * block_d)
    _norm_rotate_quantize[(x.shape[0],)](
        x,
        weight,
        cos,
        sin,
        shift,
        scale,
        out,
        tokens,
        eps,
        x.stride(0),
        cos.stride(),
        sin.stride(),
        H=heads,
        D=channels,
        BLOCK_H=max(1, shape.chunk // block_d),
        BLOCK_D=block_d,
        IS_INT8=out.dtype == INT8,
        QMAX=float(QMAX[out.dtype]),
        num_warps=shape.warps,
    )
