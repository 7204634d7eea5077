"""The matrix product of `linear`, in Gluon: warps that only load feed warps that only multiply.

One program per multiprocessor works through many tiles. Its warps have three kinds of work:

- the producer, one warp, loads operands by TMA into a ring of stages;
- each consumer, four warps, multiplies 64 rows of the tile with all its columns, keeps the sums
  in registers, and scales, casts and stores them while the producer already loads the next tile;
- consumers share the weights of a stage and never wait for each other.

The ring. Stage s has two barriers, and every step of every tile passes both once, in this order:

    producer                            each consumer
    wait empty[s], parity 1 - phase
    expect bytes on full[s]
    load into s  ------------------->   wait full[s], parity phase
                                        start to multiply from s
                                        wait until the step before is done
                                        arrive on empty[the stage before]

`full[s]` counts one arrival, the producer's, and the bytes of all loads. `empty[s]` counts one
arrival per consumer. All start with stage 0 and phase 0, count steps on over the ends of tiles, and
flip the phase where the ring wraps. A barrier that is fresh lets a wait for parity 1 pass, so the
producer fills the ring without waiting. A consumer releases a stage one step late, when the product
that reads it is done, and after the last step of a tile it waits for that one too. So each side
waits for, and arrives at, each stage equally often, whatever M, N and K are: parts of a tile beyond
an edge are loaded as zeros, all their bytes counted, and are not stored.

A residual does not pass through the ring: each consumer loads its own, a few steps into a tile,
into the buffers through which the result will leave. See `linear_hopper_store`.

With a static scale for what comes behind GELU, the result is rounded to 8 bits on its way out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from wancompile.kernels.jit.activation import Gelu
from wancompile.kernels.jit.linear_hopper_store import (
    column_factors,
    fetch,
    store,
    tma_load,
    values,
)
from wancompile.kernels.jit.ring_hopper import make_barriers
from wancompile.quant.numerics import INT8

_CONSUMERS = gl.constexpr(2)
_ROWS = gl.constexpr(64)  # of one wgmma instruction: what the four warps of a consumer multiply
_BLOCK_M = gl.constexpr(128)  # rows of all consumers
_LINE = gl.constexpr(128)  # bytes of the widest swizzle: one row of a stage or of a result buffer
_SOON = gl.constexpr(512)  # columns of operands: while they multiply, the result before leaves
_HALF_LINE = 64  # bytes of a row of a result in 8 bits: the factors of more columns fill registers
_WIDEST_INT8 = 128  # columns: what PTX has beyond it, Triton does not write, or is no power of two


@dataclass(frozen=True)
class Tile:
    """How the product is cut up, in tiles of 128 rows.

    Attributes:
        n: columns of the output that one program computes at a time: 128 or 256.
        stages: how many loads of operands, each 128 long, are in flight; at least 2.
        buffers: per consumer, how many chunks of the result are on their way out; with a residual
            all n columns of it, 128 bytes to a chunk.
        group: rows of tiles that are computed side by side, so that they share weights in L2.
    """

    n: int = 256
    stages: int = 4
    buffers: int = 2
    group: int = 8


_BUFFERED = Tile(stages=3, buffers=4)  # the buffers hold a tile of 16-bit floats,
_NARROW = Tile(n=128, buffers=4)  # or this one of 32-bit floats
_SMALL = Tile(buffers=4)  # or a tile of 8 bits


@gluon.jit
def _corner(tile, rows, columns, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """First row and column of a tile; tiles go down `GROUP` rows before they go right."""
    down, right = gl.cdiv(rows, _BLOCK_M), gl.cdiv(columns, BLOCK_N)
    first = tile // (GROUP * right) * GROUP
    height = gl.minimum(GROUP, down - first)
    place = tile % (GROUP * right)
    return (first + place % height) * _BLOCK_M, place // height * BLOCK_N


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage after this one, and its phase."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, 1 - phase, phase)


@gluon.jit
def _produce(x, weight, ring, rows, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr):
    """Load the operands of every step of every tile of this program."""
    lefts, rights, full, empty = ring
    STAGES: gl.constexpr = rights.shape[0]
    BLOCK_N: gl.constexpr = rights.shape[1]
    tiles = gl.cdiv(rows, _BLOCK_M) * gl.cdiv(N, BLOCK_N)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _corner(tile, rows, N, BLOCK_N, GROUP)
        for start in range(0, K, _LINE):
            mbarrier.wait(empty.index(stage), 1 - phase)
            ready = full.index(stage)
            mbarrier.expect(ready, (_BLOCK_M + BLOCK_N) * _LINE)
            for part in gl.static_range(_CONSUMERS):
                to = lefts.index(stage * _CONSUMERS + part)
                tma_load(x, [row + part * _ROWS, start], ready, to)
            tma_load(weight, [column, start], ready, rights.index(stage))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _multiply(total, ring, place, START: gl.constexpr, END: gl.constexpr, PART: gl.constexpr):
    """Add the products of columns `START` to `END` of the operands; the last one is in flight.

    `place` in the ring is a stage, its phase, and the stage before, which is yet to be released.
    """
    lefts, rights, full, empty = ring
    STAGES: gl.constexpr = rights.shape[0]
    stage, phase, before = place
    for start in range(START, END, _LINE):
        mbarrier.wait(full.index(stage), phase)
        left = lefts.index(stage * _CONSUMERS + PART)
        right = rights.index(stage).permute([1, 0])
        total = warpgroup_mma(left, right, total, is_async=True)
        total = warpgroup_mma_wait(1, deps=[total])
        mbarrier.arrive(empty.index(before), pred=start > 0)
        before = stage
        stage, phase = _next(stage, phase, STAGES)
    return total, (stage, phase, before)


@gluon.jit
def _consume(
    out, ring, buffers, by, added, rows, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr,
    INSTRUCTION: gl.constexpr, EACH: gl.constexpr, GELU: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Multiply, scale and store rows `64 * PART` to `64 * PART + 63` of every tile."""
    lefts, rights, _full, empty = ring
    residual, there = added
    BLOCK_N: gl.constexpr = rights.shape[1]
    SUM: gl.constexpr = gl.float32 if lefts.dtype.is_fp8() else gl.int32
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, INSTRUCTION, 32])
    WIDTH: gl.constexpr = buffers.shape[2]
    CHUNK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    HAS_RESIDUAL: gl.constexpr = residual is not None
    SOON: gl.constexpr = (_SOON if K > _SOON else K) if HAS_RESIDUAL else 0
    tiles = gl.cdiv(rows, _BLOCK_M) * gl.cdiv(N, BLOCK_N)
    place = (0, 0, 0)
    parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _corner(tile, rows, N, BLOCK_N, GROUP)
        row += PART * _ROWS
        row_scale = values(by[0], row, rows, _ROWS, gl.SliceLayout(1, CHUNK), EACH)
        factors = column_factors(by, column, N, WIDTH, CHUNK)
        total = gl.zeros([_ROWS, BLOCK_N], SUM, SUMS)
        total, place = _multiply(total, ring, place, 0, SOON, PART)
        if HAS_RESIDUAL:
            fetch(residual, buffers, there.index(PART), row, column, BLOCK_N)
        total, place = _multiply(total, ring, place, SOON, K, PART)
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index(place[2]))
        if HAS_RESIDUAL:
            mbarrier.wait(there.index(PART), parity)
            parity = 1 - parity
        store(
            out, total, buffers, row_scale, factors, by, row, column, N, CHUNK, HAS_RESIDUAL, GELU
        )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows"])
def _linear_hopper(
    x, weight, out, x_scale, weight_scale, bias, residual, gate, out_scale, rows,
    N: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
    GROUP: gl.constexpr, INSTRUCTION: gl.constexpr, EACH: gl.constexpr, GELU: gl.constexpr,
):  # fmt: skip
    """The first three and `residual` are descriptors: beyond edges they load 0, store nothing.

    `bias`, `residual`, `gate` and `out_scale` may be None. `EACH` is 1 where each row has a scale,
    and 0 where all have one.
    """
    BLOCK_N: gl.constexpr = weight.block_shape[0]
    WIDTH: gl.constexpr = out.block_shape[1]
    lefts = gl.allocate_shared_memory(x.dtype, [STAGES * _CONSUMERS, _ROWS, _LINE], x.layout)
    rights = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_N, _LINE], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    to0 = gl.allocate_shared_memory(out.dtype, [BUFFERS, _ROWS, WIDTH], out.layout)
    to1 = gl.allocate_shared_memory(out.dtype, [BUFFERS, _ROWS, WIDTH], out.layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        mbarrier.init(empty.index(stage), _CONSUMERS)
    added = (None, None)
    if residual is not None:
        added = (residual, make_barriers(_CONSUMERS, 1))
    fence_async_shared()
    ring = (lefts, rights, full, empty)
    by = (x_scale, weight_scale, bias, gate, out_scale)
    # The first consumer is the program's own four warps; it has the registers that are left over.
    gl.warp_specialize(
        [
            (_consume, (out, ring, to0, by, added, rows, N, K, GROUP, INSTRUCTION, EACH, GELU, 0)),
            (_consume, (out, ring, to1, by, added, rows, N, K, GROUP, INSTRUCTION, EACH, GELU, 1)),
            (_produce, (x, weight, ring, rows, N, K, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )


def launch(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: Gelu | None = None,
) -> None:
    """Fill `out` with what `scaled_linear` computes.

    With a residual it is what `scaled_linear_residual` computes, and with `activation` what
    `linear_gelu_quantize` does.

    Args:
        x: `[M, K]`, int8 or e4m3; like all others contiguous and at an address divisible by 16.
        x_scale: `[M, 1]` fp32, or `[1]` for all rows.
        weight: `[N, K]`, of the dtype of `x`; K and N are multiples of 16.
        weight_scale: N fp32 numbers.
        bias: `[N]`, a float of at most 32 bits.
        out: `[M, N]`, a float of 16 or 32 bits, or with `activation` int8 or e4m3; M > 0.
        tile: None for the fastest measured on an H100.
        residual: `[M, N]`, of the dtype of `out`.
        gate: `[N]` fp32; only with a residual, and None is 1.
        activation: what comes after the linear; only without a residual.
    """
    tile = tile or _fastest(x.dtype, out, residual)
    rows, columns, depth = x.shape[0], weight.shape[0], x.shape[1]
    tiles = triton.cdiv(rows, _BLOCK_M.value) * triton.cdiv(columns, tile.n)
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    _linear_hopper[(min(programs, tiles),)](
        _descriptor(x, _ROWS.value),
        _descriptor(weight, tile.n),
        _descriptor(out, _ROWS.value, _HALF_LINE if activation else _LINE.value),
        x_scale,
        weight_scale,
        bias,
        None if residual is None else _descriptor(residual, _ROWS.value),
        activation.inv_smooth if activation else gate,
        activation.out_scale if activation else None,
        rows,
        N=columns,
        K=depth,
        STAGES=tile.stages,
        BUFFERS=tile.buffers,
        GROUP=tile.group,
        INSTRUCTION=min(tile.n, _WIDEST_INT8) if x.dtype == INT8 else tile.n,
        EACH=0 if x_scale.shape == (1,) else 1,
        GELU=activation.form if activation else None,
        num_warps=4,
        enable_fp_fusion=False,  # it would round once less than the plain body
    )


def _fastest(dtype: torch.dtype, out: Tensor, residual: Tensor | None) -> Tile:
    if residual is not None:
        return _BUFFERED if residual.element_size() == 2 else _NARROW
    if out.element_size() == 1:
        return _SMALL
    return Tile() if dtype == INT8 else _BUFFERED


def _descriptor(tensor: Tensor, rows: int, line: int = _LINE.value) -> TensorDescriptor:
    """Blocks of `rows` rows, each as long as a swizzled line of shared memory, in bytes."""
    size = tensor.element_size()
    layout = gl.NVMMASharedLayout(line, 8 * size)
    return TensorDescriptor.from_tensor(tensor, [rows, line // size], layout)
