"""One row of channels, held in registers as a tuple of chunks: read once, reduced, rounded.

A chunk has a power of two of channels, a row has not: 5120 channels are five chunks of 1024, where
one block would be 8192 with three in eight lanes idle.
"""

# A tuple of chunks changes its type as it grows.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from wancompile.quant.numerics import INT8, QMAX, SMALLEST_SCALE

_LANES = 32
_VALUES = 8  # of one chunk, in one thread: 16 bytes of a 16-bit float
_MOST_CHUNKS = 9  # 72 values in a thread; more would leave room for too few programs
_MOST_WARPS = 16


@dataclass(frozen=True)
class RowShape:
    """How a row is cut up.

    Attributes:
        chunk: channels of one chunk, a power of two.
        warps: warps that share one row.
    """

    chunk: int
    warps: int


def row_shape(channels: int) -> RowShape:
    """Cut a row so that no thread holds too much, then with few idle lanes, then in many warps."""
    if channels <= _LANES * _VALUES:
        return RowShape(triton.next_power_of_2(channels), 1)
    shapes = []
    warps = 1
    while warps <= _MOST_WARPS:
        shapes.append(RowShape(_LANES * _VALUES * warps, warps))
        warps *= 2
    fitting = [one for one in shapes if _chunks(channels, one) <= _MOST_CHUNKS] or shapes[-1:]
    return min(fitting, key=lambda one: (_chunks(channels, one) * one.chunk, -one.warps))


def _chunks(channels: int, shape: RowShape) -> int:
    return -(-channels // shape.chunk)


def quantized_kind(dtype: torch.dtype) -> dict[str, bool | float]:
    """The constants of a kernel that rounds to `dtype` by a dynamic scale."""
    return {
        "IS_INT8": dtype == INT8,
        "QMAX": float(QMAX[dtype]),
        "SMALLEST": SMALLEST_SCALE,
    }


@triton.jit
def load_chunk(
    row, FIRST: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, STREAM: tl.constexpr
):
    """Channels `FIRST` and on of the row at `row`, 0 beyond `K`.

    `STREAM` is for what one program reads: it stays out of L1, where the operands that all programs
    read are kept.
    """
    column = FIRST + tl.arange(0, CHUNK)
    if STREAM and FIRST + CHUNK <= K:
        value = tl.load(row + column, cache_modifier=".cg")
    elif STREAM:
        value = tl.load(row + column, mask=column < K, other=0.0, cache_modifier=".cg")
    elif FIRST + CHUNK <= K:
        value = tl.load(row + column, eviction_policy="evict_last")
    else:
        value = tl.load(row + column, mask=column < K, other=0.0, eviction_policy="evict_last")
    return value


@triton.jit
def load_row(row, K: tl.constexpr, CHUNK: tl.constexpr):
    """All chunks of the row at `row`, in its own dtype, the loads one after the other."""
    chunks = ()
    for first in tl.static_range(0, K, CHUNK):
        chunks += (load_chunk(row, first, K, CHUNK, True),)
    return chunks


@triton.jit
def widen_row(chunks):
    """The same values in fp32."""
    wide = ()
    for i in tl.static_range(len(chunks)):
        wide += (chunks[i].to(tl.float32),)
    return wide


@triton.jit
def store_row(chunks, row, K: tl.constexpr, CHUNK: tl.constexpr):
    """Write the row to `row`, cast to what is there."""
    for i in tl.static_range(len(chunks)):
        column = i * CHUNK + tl.arange(0, CHUNK)
        value = chunks[i].to(row.dtype.element_ty)
        if i * CHUNK + CHUNK <= K:
            tl.store(row + column, value)
        else:
            tl.store(row + column, value, mask=column < K)


@triton.jit
def sum_row(chunks):
    """The sum of all values: over chunks in each lane, then over lanes."""
    total = chunks[0]
    for i in tl.static_range(1, len(chunks)):
        total += chunks[i]
    return tl.sum(total, 0)


@triton.jit
def sum_squares(chunks):
    """The sum of the squares of all values."""
    total = chunks[0] * chunks[0]
    for i in tl.static_range(1, len(chunks)):
        total = tl.fma(chunks[i], chunks[i], total)
    return tl.sum(total, 0)


@triton.jit
def smooth_row(chunks, inv_smooth, K: tl.constexpr, CHUNK: tl.constexpr):
    """The row times `inv_smooth [K]`, where there is one."""
    if inv_smooth is None:
        smoothed = chunks
    else:
        smoothed = ()
        for i in tl.static_range(len(chunks)):
            factor = load_chunk(inv_smooth, i * CHUNK, K, CHUNK, False)
            smoothed += (chunks[i] * factor,)
    return smoothed


@triton.jit
def quantize_row(
    chunks,
    out,
    scale_to,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Write an fp32 row to `out` in 8 bits, and its scale, as `quantize_per_token` has them.

    By its own scale a row cannot leave the range of the type, so nothing has to saturate.
    """
    peak = tl.abs(chunks[0])
    for i in tl.static_range(1, len(chunks)):
        peak = tl.maximum(peak, tl.abs(chunks[i]), propagate_nan=tl.PropagateNan.ALL)
    # As integers, the magnitudes of floats have the same order, with NaN above infinity.
    largest = tl.max(peak.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, QMAX)
    scale = tl.where(scale < SMALLEST, SMALLEST, scale)
    inverse = tl.div_rn(1.0, scale)
    for i in tl.static_range(len(chunks)):
        column = i * CHUNK + tl.arange(0, CHUNK)
        rounded = to_8bit(chunks[i] * inverse, IS_INT8)
        if i * CHUNK + CHUNK <= K:
            tl.store(out + column, rounded)
        else:
            tl.store(out + column, rounded, mask=column < K)
    tl.store(scale_to, scale)


@triton.jit
def to_8bit(steps, IS_INT8: tl.constexpr):
    """Round half to even what lies within the range; e4m3 keeps NaN, int8 has none."""
    if IS_INT8:
        # Around 1.5 * 2**23 the step of fp32 is 1: the sum is rounded, its low byte is the integer.
        rounded = (steps + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        rounded = steps.to(tl.float8e4nv)
    return rounded


@triton.jit
def saturate(steps, QMAX: tl.constexpr):
    """Limit magnitudes to `QMAX`, which a static scale does not ensure; NaN stays."""
    return tl.clamp(steps, -QMAX, QMAX, propagate_nan=tl.PropagateNan.ALL)
