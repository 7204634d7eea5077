"""RMSNorm and rotary embedding of q or k, turned and rounded to 8 bits; a program per token.

Of heads that are turned by the Hadamard matrix, `BITS` is the binary logarithm of their size and
`SIZE` the length of a row of signs; of others these are 0 and 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from wancompile.kernels.jit.hadamard import turn
from wancompile.kernels.jit.rotary import (
    grid_of,
    load_heads,
    read_token,
    rotate_heads,
    store_heads,
)
from wancompile.kernels.jit.rows import quantized_kind, saturate, to_8bit
from wancompile.quant.numerics import INT8, QMAX


@triton.jit(do_not_specialize=["tokens"])
def _per_head(
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
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
):
    """One token of q or k, whose heads have their scales from calibration."""
    row = tl.program_id(0)
    batch = row // tokens
    token = (row - batch * tokens).to(tl.int64)
    at = x + row.to(tl.int64) * x_stride
    values, c, s = read_token(
        at, cos, sin, token, eps, cos_strides, sin_strides, H, D, BLOCK_H, BLOCK_D
    )
    channel = tl.arange(0, BLOCK_D)[None, :]
    for i in tl.static_range(len(values)):
        head = i * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        inverse = 1 / tl.load(scales + head, mask=head < H, other=1.0)
        factor = inverse / SIZE
        rotated = rotate_heads(values[i], weight, c * factor, s * factor, i * BLOCK_H, H, D)
        steps = turn(rotated, BITS)
        if shift is not None:
            steps -= load_heads(shift, i * BLOCK_H, H, D, BLOCK_H, BLOCK_D) * inverse
        to = out + ((batch * H + head).to(tl.int64) * tokens + token) * D + channel
        store_heads(to, to_8bit(saturate(steps, QMAX), IS_INT8), i * BLOCK_H, H, D)


@triton.jit(do_not_specialize=["tokens"])
def _per_token(
    x,
    weight,
    cos,
    sin,
    out,
    scales,
    tokens,
    eps,
    x_stride,
    cos_strides,
    sin_strides,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """One token of q, whose heads find their own scales, as `quantize_row` does."""
    row = tl.program_id(0)
    batch = row // tokens
    token = (row - batch * tokens).to(tl.int64)
    at = x + row.to(tl.int64) * x_stride
    values, c, s = read_token(
        at, cos, sin, token, eps, cos_strides, sin_strides, H, D, BLOCK_H, BLOCK_D
    )
    channel = tl.arange(0, BLOCK_D)[None, :]
    for i in tl.static_range(len(values)):
        head = i * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        rotated = rotate_heads(values[i], weight, c / SIZE, s / SIZE, i * BLOCK_H, H, D)
        turned = turn(rotated, BITS)
        # As integers, the magnitudes of floats have the same order, with NaN above infinity.
        magnitude = tl.abs(turned).to(tl.int32, bitcast=True)
        largest = tl.max(magnitude, 1, keep_dims=True).to(tl.float32, bitcast=True)
        scale = largest * (1 / QMAX)
        scale = tl.where(scale < SMALLEST, SMALLEST, scale)
        rounded = to_8bit(turned * (1 / scale), IS_INT8)
        place = (batch * H + head).to(tl.int64) * tokens + token
        tl.store(scales + place, scale, mask=head < H)
        store_heads(out + place * D + channel, rounded, i * BLOCK_H, H, D)


def launch_per_head(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    is_turned: bool,
    out: Tensor,
) -> None:
    """Fill `out` with what `norm_rotate_quantize` computes.

    Args:
        x: as in `rotary.launch`.
        weight: as in `rotary.launch`.
        eps: as in `rotary.launch`.
        cos: as in `rotary.launch`.
        sin: as in `rotary.launch`.
        shift: `[H, D]` fp32, contiguous, or None.
        scale: `[H]` fp32, contiguous.
        is_turned: whether heads are turned; D is then a power of two.
        out: `[B, H, S, D]`, int8 or e4m3, contiguous.
    """
    grid, shape = grid_of(out)
    _per_head[grid](
        x,
        weight,
        cos,
        sin,
        shift,
        scale,
        out,
        out.shape[2],
        eps,
        x.stride(0),
        cos.stride(),
        sin.stride(),
        **shape,
        **_turning(out, is_turned),
        IS_INT8=out.dtype == INT8,
        QMAX=float(QMAX[out.dtype]),
    )


def launch_per_token(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    is_turned: bool,
    out: Tensor,
    scale: Tensor,
) -> None:
    """Fill `out` and `scale` with what `norm_rotate_quantize_per_token` computes.

    Args:
        x: as in `rotary.launch`.
        weight: as in `rotary.launch`.
        eps: as in `rotary.launch`.
        cos: as in `rotary.launch`.
        sin: as in `rotary.launch`.
        is_turned: as in `launch_per_head`.
        out: `[B, H, S, D]`, int8 or e4m3, contiguous.
        scale: `[B, H, S, 1]` fp32, contiguous.
    """
    grid, shape = grid_of(out)
    _per_token[grid](
        x,
        weight,
        cos,
        sin,
        out,
        scale,
        out.shape[2],
        eps,
        x.stride(0),
        cos.stride(),
        sin.stride(),
        **shape,
        **_turning(out, is_turned),
        **quantized_kind(out.dtype),
    )


def _turning(out: Tensor, is_turned: bool) -> dict[str, int | float]:
    """Return the constants that say how the heads of `out` are turned."""
    size = out.shape[3] if is_turned else 1
    return {"BITS": size.bit_length() - 1, "SIZE": size**0.5}
