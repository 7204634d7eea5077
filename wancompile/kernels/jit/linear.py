"""One matrix product for int8 and e4m3, with the epilogue of `scaled_linear`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wancompile.kernels.jit.activation import Gelu, gelu
from wancompile.kernels.jit.rows import saturate, to_8bit
from wancompile.quant.numerics import INT8, QMAX


@dataclass(frozen=True)
class Tile:
    """How the product is cut up.

    Attributes:
        m: rows of the output that one program computes at a time.
        n: columns of the output that one program computes at a time.
        k: length of the partial sums that are loaded at once.
        warps: warps per program.
        stages: how many loads of operands are in flight.
        group: rows of tiles that are computed side by side, so that they share weights in L2.
        persistent: one program per multiprocessor works through many tiles and loads the next
            one's operands while it stores a result, for which they need shared memory of their own.
    """

    m: int = 128
    n: int = 256
    k: int = 128
    warps: int = 8
    stages: int = 4
    group: int = 8
    persistent: bool = False


_ONE_TURN = Tile(stages=1)
_PERSISTENT = Tile(stages=3, persistent=True)


def _fastest(x: Tensor, out: Tensor, low: Tensor | None) -> Tile:
    """Return the fastest tile on an H100 (`python -m benchmarks.kernels`) that fits into it.

    A loop over a low rank stands in the way of a persistent program's, which are to be one.

    Shared memory holds the operands in flight and, where the loop ends within the same stretch of
    code (one turn only, or persistent), the result beside them: too much for 32-bit results.
    """
    if x.shape[1] <= _ONE_TURN.k:
        return _ONE_TURN
    if x.dtype != INT8 and out.element_size() < 4 and low is None:
        return _PERSISTENT
    return Tile()


@triton.jit
def _corner(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile; tiles go down `GROUP` rows before they go right."""
    down, right = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = tile // (GROUP * right) * GROUP
    height = tl.minimum(GROUP, down - first)
    place = tile % (GROUP * right)
    return (first + place % height) * BLOCK_M, place // height * BLOCK_N


@triton.jit
def _add_low_rank(value, low, up, at_row, at_column, rows, N: tl.constexpr, RANK: tl.constexpr):
    """`value + low @ up.T`, sixteen directions at a time: little memory beside that of the sum."""
    for start in tl.range(0, RANK, 16, num_stages=1):
        direction = start + tl.arange(0, 16)
        left = tl.load(
            low + at_row[:, None].to(tl.int64) * RANK + direction[None, :],
            mask=(at_row < rows)[:, None] & (direction < RANK)[None, :],
            other=0.0,
        )
        right = tl.load(
            up + at_column[:, None] * RANK + direction[None, :],
            mask=(at_column < N)[:, None] & (direction < RANK)[None, :],
            other=0.0,
        )
        value = tl.dot(left, right.T, value, input_precision="ieee")
    return value


@triton.jit
def _activated(value, inv_smooth, out_scale, at_column, N: tl.constexpr, GELU: tl.constexpr):
    """GELU of a tile, in steps of the scale that it will be rounded by."""
    value = gelu(value, GELU == "tanh")
    if inv_smooth is not None:
        value *= tl.load(inv_smooth + at_column, mask=at_column < N, other=0.0)[None, :]
    return value * tl.div_rn(1.0, tl.load(out_scale))


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x,
    weight,
    out,
    x_scale,
    weight_scale,
    bias,
    low,
    up,
    inv_smooth,
    out_scale,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    SUM: tl.constexpr,
    EACH: tl.constexpr,
    GELU: tl.constexpr,
    QMAX: tl.constexpr,
):
    """`x` and `weight` are descriptors: beyond their edges they load 0.

    `EACH` is 1 where each row has a scale, and 0 where all have one.
    """
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        row, column = _corner(tile, rows, N, BLOCK_M, BLOCK_N, GROUP)
        total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for start in tl.range(0, K, BLOCK_K):
            left = x.load([row, start])
            right = weight.load([column, start])
            total = tl.dot(left, right.T, total, out_dtype=SUM)
        at_row = row + tl.arange(0, BLOCK_M)
        at_column = column + tl.arange(0, BLOCK_N)
        scale = tl.load(x_scale + at_row * EACH, mask=at_row < rows, other=0.0)
        value = total.to(tl.float32) * scale[:, None]
        value *= tl.load(weight_scale + at_column, mask=at_column < N, other=0.0)[None, :]
        if RANK:
            value = _add_low_rank(value, low, up, at_row, at_column, rows, N, RANK)
        if HAS_BIAS:
            value += tl.load(bias + at_column, mask=at_column < N, other=0.0).to(tl.float32)[
                None, :
            ]
        if GELU is not None:
            value = _activated(value, inv_smooth, out_scale, at_column, N, GELU)
            value = to_8bit(saturate(value, QMAX), out.dtype.element_ty == tl.int8)
        to = out + at_row[:, None].to(tl.int64) * N + at_column[None, :]
        inside = (at_row < rows)[:, None] & (at_column < N)[None, :]
        tl.store(to, value.to(out.dtype.element_ty), mask=inside)


def launch(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile | None = None,
    *,
    low: Tensor | None = None,
    up: Tensor | None = None,
    activation: Gelu | None = None,
) -> None:
    """Fill `out` with what `scaled_linear` yields.

    With `low` and `up` it is what `scaled_linear_low_rank` yields, and with `activation`
    what `linear_gelu_quantize` does.

    Args:
        x: `[M, K]`, int8 or e4m3; like all others contiguous and at an address divisible by 16.
        x_scale: `[M, 1]` fp32, or `[1]` for all rows.
        weight: `[N, K]`, of the dtype of `x`; K and N are multiples of 16.
        weight_scale: N fp32 numbers.
        bias: `[N]`, a float of at most 32 bits.
        out: `[M, N]`, a float of at most 32 bits, or with `activation` int8 or e4m3; M > 0.
        tile: None for the fastest measured on an H100.
        low: `[M, R]`, a float of at most 32 bits.
        up: `[N, R]`, of the dtype of `low`.
        activation: what comes after the linear.
    """
    tile = tile or _fastest(x, out, low)
    rows, columns, depth = x.shape[0], weight.shape[0], x.shape[1]
    programs = triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n)
    if tile.persistent and x.is_cuda:
        programs = min(programs, torch.cuda.get_device_properties(x.device).multi_processor_count)
    _linear[(programs,)](
        TensorDescriptor.from_tensor(x, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
        out,
        x_scale,
        weight_scale,
        weight_scale if bias is None else bias,
        weight_scale if low is None else low,
        weight_scale if up is None else up,
        activation.inv_smooth if activation else None,
        activation.out_scale if activation else weight_scale,
        rows,
        N=columns,
        K=depth,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP=tile.group,
        PERSISTENT=tile.persistent,
        HAS_BIAS=bias is not None,
        RANK=0 if low is None else low.shape[1],
        SUM=tl.int32 if x.dtype == INT8 else tl.float32,
        EACH=0 if x_scale.shape == (1,) else 1,
        GELU=activation.form if activation else None,
        QMAX=float(QMAX[out.dtype]) if activation else 0.0,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,  # a fused multiply-add would round once less than the plain body
    )
