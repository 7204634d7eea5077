"""RMSNorm and rotary embedding of q or k, rounded to a float; a program per token."""

# A tuple of chunks changes its type as it grows.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from wancompile.kernels.jit.rows import row_shape


@triton.jit
def load_heads(
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
        chunks += (load_heads(start, first, H, D, BLOCK_H, BLOCK_D).to(tl.float32),)
    return chunks


@triton.jit
def _sum_squares(chunks):
    total = chunks[0] * chunks[0]
    for i in tl.static_range(1, len(chunks)):
        total = tl.fma(chunks[i], chunks[i], total)
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def read_token(
    at,
    cos,
    sin,
    token,
    eps,
    cos_strides,
    sin_strides,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The chunks of the token at `at`, and its cosines and sines over its root mean square.

    Two channels share an angle: to scale the angles costs half of what scaling the channels does.
    """
    values = _load_token(at, H, D, BLOCK_H, BLOCK_D)
    pair = tl.arange(0, BLOCK_D // 2)
    c = tl.load(cos + token * cos_strides[0] + pair * cos_strides[1], mask=pair < D // 2, other=0.0)
    s = tl.load(sin + token * sin_strides[0] + pair * sin_strides[1], mask=pair < D // 2, other=0.0)
    root = tl.rsqrt(_sum_squares(values) / (H * D) + eps)
    return values, c[None, :] * root, s[None, :] * root


@triton.jit
def rotate_heads(value, weight, cos, sin, FIRST: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """The heads from `FIRST` on times their weights, rotated by `cos` and `sin`."""
    if weight is not None:
        value *= load_heads(weight, FIRST, H, D, value.shape[0], value.shape[1]).to(tl.float32)
    return _rotate(value, cos, sin)


@triton.jit
def _rotate(value, cos, sin):
    """Turn channels 2i and 2i + 1 of every head by angle i."""
    heads: tl.constexpr = value.shape[0]
    channels: tl.constexpr = value.shape[1]
    even, odd = tl.split(value.reshape(heads, channels // 2, 2))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return turned.reshape(heads, channels)


@triton.jit
def store_heads(to, value, FIRST: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """Write the heads from `FIRST` on to `to`; those beyond `H` are none."""
    if FIRST + value.shape[0] <= H and value.shape[1] == D:
        tl.store(to, value)
    else:
        head = FIRST + tl.arange(0, value.shape[0])[:, None]
        channel = tl.arange(0, value.shape[1])[None, :]
        tl.store(to, value, mask=(head < H) & (channel < D))


@triton.jit(do_not_specialize=["tokens"])
def _norm_rotate(
    x,
    weight,
    cos,
    sin,
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
):
    token = (tl.program_id(0) % tokens).to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    at = x + row * x_stride
    values, c, s = read_token(
        at, cos, sin, token, eps, cos_strides, sin_strides, H, D, BLOCK_H, BLOCK_D
    )
    channel = tl.arange(0, BLOCK_D)[None, :]
    for i in tl.static_range(len(values)):
        rotated = rotate_heads(values[i], weight, c, s, i * BLOCK_H, H, D)
        head = i * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        to = out + row * (H * D) + head * D + channel
        store_heads(to, rotated.to(out.dtype.element_ty), i * BLOCK_H, H, D)


def launch(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, out: Tensor
) -> None:
    """Fill `out` with what `norm_rotate` computes.

    Args:
        x: `[B * S, H * D]`, any float dtype, no gaps inside rows, not empty.
        weight: `[H * D]`, any float dtype, contiguous, or None.
        eps: added to the mean square.
        cos: `[S, D / 2]` fp32, any strides.
        sin: `[S, D / 2]` fp32, any strides.
        out: `[B, H, S, D]`, any float dtype, laid out as `[B, S, H, D]`.
    """
    grid, shape = grid_of(out)
    _norm_rotate[grid](
        x,
        weight,
        cos,
        sin,
        out,
        out.shape[2],
        eps,
        x.stride(0),
        cos.stride(),
        sin.stride(),
        **shape,
    )


def grid_of(out: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and the constants of a kernel that writes `out [B, H, S, D]`."""
    batch, heads, tokens, channels = out.shape
    block_d = triton.next_power_of_2(channels)
    shape = row_shape(heads * block_d)
    constants = {
        "H": heads,
        "D": channels,
        "BLOCK_H": max(1, shape.chunk // block_d),
        "BLOCK_D": block_d,
        "num_warps": shape.warps,
    }
    return (batch * tokens,), constants
