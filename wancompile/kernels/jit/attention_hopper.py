"""Flash attention on 8-bit operands whose softmax runs while tensor cores multiply.

A program is one warp that loads and two or three groups of four warps that compute, after Shah et
al. 2024, "FlashAttention-3". A group owns 64 queries; groups share the keys and values. While one
multiplies, another is in its softmax, and a group's softmax overlaps with its own product by v.

Warps meet at mbarriers only; see `ring_hopper` for rounds and parities.

- Keys and values each have a ring. A group releases a block after its product by it.
- The loader fills k0 v0 k1 v1 and so on. In step n a group releases k(n+1) and v(n-1), then waits
  for v(n+1) and k(n+2). Before these the loader needs v(n+1-stages) and k(n+2-stages): with two
  stages or more no later than v(n-1) and k(n), which groups release without waiting for more.
- Groups issue their products in turn, which keeps their softmaxes apart. `turns` has a barrier a
  group, and a round takes the one arrival of the group before, once it has issued those of a step.
  Before it issues those of step n, group 0 waits for round n - 1, at once if n is 0, any other for
  round n. All groups take as many steps, so none waits for one that is done.
- Queries are loaded once: `q_full` has a single round.

Each load is waited for by every group, so nothing is in flight when a program ends.
"""

from __future__ import annotations

import math
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

from wancompile.kernels.jit.ring_hopper import (
    buffer,
    fill,
    make_barriers,
    make_ring,
    release,
    wait,
)
from wancompile.kernels.jit.softmax_hopper import (
    MAGIC_BITS,
    ROWS,
    mask,
    online_softmax,
    operand,
    rescale,
    rounded,
    thread_sums,
)
from wancompile.quant.numerics import INT8


@dataclass(frozen=True)
class Tile:
    """How attention is cut up.

    Attributes:
        groups: groups of 64 queries in one program, 2 or 3.
        keys: keys that they read at a time, 64 or 128, so that blocks stay within padded values;
            with 3 groups only 64 leave enough registers.
        stages: blocks of keys and of values in shared memory, at least 2.
        polynomial: one of so many exponentials is a polynomial, for the unit of exponentials is as
            busy as tensor cores are; 2, 4, 8, or 0 for none.
    """

    groups: int = 2
    keys: int = 128
    stages: int = 4
    polynomial: int = 0


_INT8_TILE = Tile(polynomial=8)


@gluon.jit
def _logits(q, keys, PRODUCT: gl.constexpr):
    """The products of `q [64, D]` and `keys [n, D]`, in flight; of int8 ones as bits, see MAGIC."""
    n: gl.constexpr = keys.shape[0]
    if q.dtype == gl.int8:
        start = gl.full([ROWS, n], MAGIC_BITS, gl.int32, PRODUCT)
        logits = warpgroup_mma(q, keys.permute((1, 0)), start, is_async=True)
    else:
        zeros = gl.zeros([ROWS, n], gl.float32, PRODUCT)
        logits = warpgroup_mma(q, keys.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return logits


@gluon.jit
def _right_operand(v):
    """A block of values as `[keys, D]`: e4m3 is stored transposed, as tensor cores need it."""
    return v if v.dtype == gl.bfloat16 else v.permute((1, 0))


@gluon.jit
def _step(
    block, state, group, shared, factor, k_tokens,
    LAST: gl.constexpr, EVERY: gl.constexpr,
):  # fmt: skip
    """Multiply the weights of `block` by v, and make those of the next one, which `LAST` masks."""
    words, peak, total, result = state
    queries, keys, values, turns = shared
    V: gl.constexpr = values[0].dtype
    GROUPS: gl.constexpr = queries.shape[0]
    SIZE: gl.constexpr = keys[0].shape[1]
    OUT: gl.constexpr = result.type.layout
    LOGITS: gl.constexpr = peak.type.layout.parent
    weight = operand(words, OUT, V)
    mbarrier.wait(turns.index(group), (block + (group == 0)) & 1)
    logits = _logits(queries.index(group), buffer(keys, block + 1), LOGITS)
    v = _right_operand(buffer(values, block))
    result = warpgroup_mma(weight, v, result, is_async=True)
    mbarrier.arrive(turns.index((group + 1) % GROUPS))
    logits = warpgroup_mma_wait(1, [logits]).to(gl.float32, bitcast=True)
    release(keys, block + 1)
    release(values, block - 1, block > 0)
    if LAST:
        logits = mask(logits, (block + 1) * SIZE, k_tokens)
    peak, total, decay, exps = online_softmax(logits, peak, total, factor, EVERY)
    # Without these waits in between, ptxas would move the next one to before the softmax.
    wait(values, block + 1)
    if not LAST:
        wait(keys, block + 2)
    result = warpgroup_mma_wait(0, [result])
    # The product by v reads the old words till then, the new ones may take their registers.
    return rounded(exps, V), peak, total, rescale(result, decay)


@gluon.jit
def _attend(group, common, EVERY: gl.constexpr, PER_TOKEN: gl.constexpr):
    """What one group of warps does; `q_scale` is of the head, or of its queries if `PER_TOKEN`."""
    shared, q_full, to, scales, first, q_tokens, k_tokens = common
    q_scale, k_factor, v_scale = scales
    queries, keys, values, _turns = shared
    SIZE: gl.constexpr = keys[0].shape[1]
    D: gl.constexpr = keys[0].shape[2]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 32])
    V: gl.constexpr = values[0].dtype
    K_OF_V: gl.constexpr = 256 // V.primitive_bitwidth
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, K_OF_V])
    last = (k_tokens + SIZE - 1) // SIZE - 1
    query = first + group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    factor = gl.load(q_scale + query * PER_TOKEN, mask=query < q_tokens, other=1.0) * k_factor
    mbarrier.wait(q_full, 0)
    wait(keys, 0)
    logits = _logits(queries.index(group), buffer(keys, 0), LOGITS)
    logits = warpgroup_mma_wait(0, [logits]).to(gl.float32, bitcast=True)
    release(keys, 0)
    peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
    total = thread_sums(gl.zeros([ROWS, SIZE], gl.float32, LOGITS))
    logits = mask(logits, 0, k_tokens)
    peak, total, _decay, exps = online_softmax(logits, peak, total, factor, EVERY)
    state = rounded(exps, V), peak, total, gl.zeros([ROWS, D], gl.float32, OUT)
    wait(values, 0)
    if last > 0:
        wait(keys, 1)
    for block in range(last - 1):
        state = _step(block, state, group, shared, factor, k_tokens, False, EVERY)
    if last > 0:
        state = _step(last - 1, state, group, shared, factor, k_tokens, True, EVERY)
    words, peak, total, result = state
    v = _right_operand(buffer(values, last))
    result = warpgroup_mma(operand(words, OUT, V), v, result, is_async=True)
    result = warpgroup_mma_wait(0, [result])
    whole = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, OUT))
    _store(result * (v_scale / whole)[:, None], to, first + group * ROWS, q_tokens)


@gluon.jit
def _store(result, to, first, q_tokens):
    out, stride = to
    layout: gl.constexpr = result.type.layout
    token = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    channel = gl.arange(0, result.shape[1], gl.SliceLayout(0, layout))
    at = out + token.to(gl.int64)[:, None] * stride + channel[None, :]
    gl.store(at, result.to(out.dtype.element_ty), mask=(token < q_tokens)[:, None])


@gluon.jit
def _load(descriptors, rows, shared, q_full, k_tokens):
    """What the loading warp does."""
    q, k, v = descriptors
    q_row, k_row, v_at = rows
    v_row, v_column = v_at
    queries, keys, values, _turns = shared
    GROUPS: gl.constexpr = queries.shape[0]
    SIZE: gl.constexpr = k.block_shape[0]
    mbarrier.expect(q_full, GROUPS * q.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q, [q_row + group * ROWS, 0], q_full, queries.index(group))
    for block in range((k_tokens + SIZE - 1) // SIZE):
        fill(keys, k, block, k_row + block * SIZE, 0)
        if v.dtype == gl.bfloat16:
            fill(values, v, block, v_row + block * SIZE, v_column)
        else:
            fill(values, v, block, v_row, block * SIZE)


@gluon.jit(do_not_specialize=["q_tokens", "k_tokens"])
def _attention_hopper(
    q, k, v, out, q_scale, k_scale, v_scale, softmax_scale, heads, q_tokens, k_tokens, strides,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, EVERY: gl.constexpr, PER_TOKEN: gl.constexpr,
):  # fmt: skip
    """`64 * GROUPS` queries of one head; q, k and v are descriptors.

    `q_scale` has a number for each query if `PER_TOKEN` is 1, for each head if it is 0. A block at
    the end of a head reads on into the next one: queries there are not stored, and weights of keys
    there are 0, as are the padded values.
    """
    both = gl.program_id(1)
    head = both % heads
    scales = (
        q_scale + (both * q_tokens if PER_TOKEN else head),
        gl.load(k_scale + head) * softmax_scale,
        1.0 if v_scale is None else gl.load(v_scale + head),
    )
    first = gl.program_id(0) * (GROUPS * ROWS)
    out += (both // heads).to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1]
    D: gl.constexpr = q.block_shape[1]
    queries = gl.allocate_shared_memory(q.dtype, [GROUPS, ROWS, D], q.layout)
    q_full = make_barriers(1, 1).index(0)
    shared = (
        queries,
        make_ring(k, STAGES, GROUPS),
        make_ring(v, STAGES, GROUPS),
        make_barriers(GROUPS, 1),
    )
    fence_async_shared()
    values = (both // heads * k_tokens, head * D) if v.dtype == gl.bfloat16 else (both * D, 0)
    rows = both * q_tokens + first, both * k_tokens, values
    load = (q, k, v), rows, shared, q_full, k_tokens
    common = shared, q_full, (out, strides[2]), scales, first, q_tokens, k_tokens
    if GROUPS == 2:
        gl.warp_specialize([
            (_attend, (0, common, EVERY, PER_TOKEN)),
            (_attend, (1, common, EVERY, PER_TOKEN)),
            (_load, load),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_attend, (0, common, EVERY, PER_TOKEN)),
            (_attend, (1, common, EVERY, PER_TOKEN)),
            (_attend, (2, common, EVERY, PER_TOKEN)),
            (_load, load),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


def _descriptor(rows: Tensor, block: list[int]) -> TensorDescriptor:
    dtype = gl.bfloat16 if rows.dtype == torch.bfloat16 else gl.int8
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor.from_tensor(rows, block, layout)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor | None],
    softmax_scale: float,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """Fill `out` with what `scaled_attention` computes.

    Args:
        q: `[B, H, Sq, D]`, int8 or e4m3, D 64 or 128; like k and v contiguous and at an address
            divisible by 16, none of them empty.
        k: `[B, H, Sk, D]`, of the dtype of `q`.
        v: `[B * H * D, S]`, e4m3, what `attention.transpose_values` makes of `[B, H, Sk, D]`; or
            `[B * Sk, H * D]`, bf16, rows any multiple of 8 apart.
        scales: of q, k and v, each `[H]` fp32, contiguous; of q also `[B, H, Sq, 1]`, of v None
            where it is bf16.
        softmax_scale: factor of the logits, > 0.
        out: `[B, H, Sq, D]`, a float of at most 32 bits; any strides but the last, which is 1.
        tile: None for the fastest measured on an H100.
    """
    in_8_bits = v.dtype != torch.bfloat16
    tile = tile or (_INT8_TILE if q.dtype == INT8 and in_8_bits else Tile())
    batch, heads, q_tokens, channels = q.shape
    rows: int = ROWS.value
    values = [channels, tile.keys] if in_8_bits else [tile.keys, channels]
    _attention_hopper[(triton.cdiv(q_tokens, tile.groups * rows), batch * heads)](
        _descriptor(q.view(-1, channels), [rows, channels]),
        _descriptor(k.view(-1, channels), [tile.keys, channels]),
        _descriptor(v, values),
        out,
        *scales,
        softmax_scale * math.log2(math.e),
        heads,
        q_tokens,
        k.shape[2],
        out.stride()[:3],
        GROUPS=tile.groups,
        STAGES=tile.stages,
        EVERY=tile.polynomial,
        PER_TOKEN=int(scales[0].dim() > 1),
        num_warps=4,
    )
