"""Flash attention on 8-bit operands (Shah et al. 2024, "FlashAttention-3")."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wancompile.kernels.jit.rows import saturate, to_8bit
from wancompile.ops.attention import P_RANGE
from wancompile.quant.numerics import FP8, INT8, QMAX

_PADDING = 128
_E4M3_MAX = tl.constexpr(float(QMAX[FP8]))


@dataclass(frozen=True)
class Tile:
    """How attention is cut up.

    Attributes:
        queries: queries of one program.
        keys: keys it reads at a time; at most 128, so that blocks stay within padded values.
        warps: warps per program.
        stages: how many loads of keys and values are in flight.
        registers: the most that a thread may use: fewer let more programs share a multiprocessor,
            and one's softmax runs while another multiplies. None leaves it to the compiler.
        biased: start int8 sums at the bits of a float, so that they end as floats and need not be
            converted, see `_products`.
    """

    queries: int = 64
    keys: int = 128
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    biased: bool = False


@triton.jit
def _products(q, keys, SUM: tl.constexpr, BIASED: tl.constexpr):
    """`q @ keys.T` in fp32; if `BIASED`, plus 1.5 * 2**23.

    From 2**23 to 2**24 the floats are the integers and neighbours differ by one in their bits, so
    sums that start at the bits of 1.5 * 2**23 end at those of 1.5 * 2**23 + q k: exactly, as |q k|
    is at most 127 * 127 * 128 < 2**22.
    """
    if BIASED:
        start = tl.full((q.shape[0], keys.shape[0]), 0x4B400000, tl.int32)
        product = tl.dot(q, keys.T, start, out_dtype=SUM).to(tl.float32, bitcast=True)
    else:
        product = tl.dot(q, keys.T, out_dtype=SUM).to(tl.float32)
    return product


@triton.jit
def _attend(
    q,
    k,
    v,
    peak,
    total,
    out,
    factor,
    key_row,
    value_row,
    start,
    k_tokens,
    BLOCK_K: tl.constexpr,
    LAST: tl.constexpr,
    SUM: tl.constexpr,
    P_BITS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Online softmax over one block of keys; `peak` is the row maximum of base-2 logits so far.

    These are products times `factor`, which every row has its own of.
    A bias of the products raises all logits alike, so weights are the same without it. The maximum
    is rounded at the size of the bias, but alike for all of a row, the total included.
    """
    product = _products(q, k.load([key_row + start, 0]), SUM, BIASED)
    if LAST:
        inside = start + tl.arange(0, BLOCK_K) < k_tokens
        product = tl.where(inside[None, :], product, float("-inf"))
    higher = tl.maximum(peak, tl.max(product, 1) * factor)
    decay = tl.exp2(peak - higher)
    weight = tl.exp2(tl.fma(product, factor[:, None], (P_BITS - higher)[:, None]))
    total = total * decay + tl.sum(weight, 1)
    out = out * decay[:, None]
    out = tl.dot(_swap_keys(weight.to(tl.float8e4nv)), v.load([value_row, start]).T, out)
    return higher, total, out


@triton.jit
def _swap_keys(weight):
    """Reorder every 16 keys: 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15.

    Of 16 columns of a product, a thread holds four in that order, of an 8-bit operand it has to
    hold four neighbours. With the columns renamed, and the rows of v reordered alike, weights go
    from one product to the next without a shuffle between threads.
    """
    rows: tl.constexpr = weight.shape[0]
    keys: tl.constexpr = weight.shape[1]
    groups = weight.reshape(rows, keys // 16, 2, 4, 2)
    return groups.permute(0, 1, 3, 2, 4).reshape(rows, keys)


@triton.jit
def _attend_all(
    q,
    k,
    v,
    factor,
    key_row,
    value_row,
    k_tokens,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM: tl.constexpr,
    P_BITS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Weights over all keys times values, and their sum."""
    rows: tl.constexpr = q.shape[0]
    peak = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    result = tl.zeros((rows, D), tl.float32)
    whole = k_tokens // BLOCK_K * BLOCK_K
    for start in tl.range(0, whole, BLOCK_K):
        peak, total, result = _attend(
            q, k, v, peak, total, result, factor, key_row, value_row, start, k_tokens,
            BLOCK_K, False, SUM, P_BITS, BIASED,
        )  # fmt: skip
    if whole < k_tokens:
        peak, total, result = _attend(
            q, k, v, peak, total, result, factor, key_row, value_row, whole, k_tokens,
            BLOCK_K, True, SUM, P_BITS, BIASED,
        )  # fmt: skip
    return result, total


@triton.jit(do_not_specialize=["q_tokens", "k_tokens"])
def _attention(
    q,
    k,
    v,
    out,
    q_scale,
    k_scale,
    v_scale,
    softmax_scale,
    heads,
    q_tokens,
    k_tokens,
    out_strides,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM: tl.constexpr,
    P_BITS: tl.constexpr,
    BIASED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """One program computes `BLOCK_Q` queries of one head; q, k and v are descriptors.

    `q_scale` has a number for each query if `PER_TOKEN`, else for each head. A block at the end of
    a head reads on into the next one: queries there are not stored, and weights of keys there are
    0, as are the padded values.
    """
    both = tl.program_id(1)
    head = both % heads
    first = tl.program_id(0) * BLOCK_Q
    query = first + tl.arange(0, BLOCK_Q)
    if PER_TOKEN:
        factor = tl.load(q_scale + both * q_tokens + query, mask=query < q_tokens, other=1.0)
    else:
        factor = tl.full((BLOCK_Q,), 1.0, tl.float32) * tl.load(q_scale + head)
    factor *= tl.load(k_scale + head) * softmax_scale
    queries = q.load([both * q_tokens + first, 0])
    # From 0.5 on, a rounded maximum could push weights over the range of e4m3.
    if tl.max(factor, 0) < 0.5 if BIASED else False:
        result, total = _attend_all(
            queries, k, v, factor, both * k_tokens, both * D, k_tokens,
            D, BLOCK_K, SUM, P_BITS, True,
        )  # fmt: skip
    else:
        result, total = _attend_all(
            queries, k, v, factor, both * k_tokens, both * D, k_tokens,
            D, BLOCK_K, SUM, P_BITS, False,
        )  # fmt: skip
    result = result / total[:, None] * tl.load(v_scale + head)
    token = query[:, None]
    start = out + (both // heads).to(tl.int64) * out_strides[0]
    start += head.to(tl.int64) * out_strides[1]
    to = start + token.to(tl.int64) * out_strides[2] + tl.arange(0, D)[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=token < q_tokens)


@triton.jit(do_not_specialize=["tokens"])
def _transpose(
    v, v_scale, out, tokens, padded, heads, strides, D: tl.constexpr, BLOCK: tl.constexpr
):
    """`v [tokens, D]` of one head to `out [D, padded]` in e4m3, in the order of `_swap_keys`.

    `v` is a float, or bytes of e4m3 where there is no `v_scale`; `out` is bytes.
    """
    both = tl.program_id(1)
    head = (both % heads).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    channel = tl.arange(0, D)
    start = v + (both // heads).to(tl.int64) * strides[0] + head * strides[1]
    at = token[:, None].to(tl.int64) * strides[2] + channel[None, :] * strides[3]
    block = tl.load(start + at, mask=token[:, None] < tokens, other=0)
    if v_scale is not None:
        steps = block.to(tl.float32) * tl.div_rn(1.0, tl.load(v_scale + head))
        block = to_8bit(saturate(steps, _E4M3_MAX), False).to(tl.uint8, bitcast=True)
    to = out + both.to(tl.int64) * D * padded
    tl.store(to + channel[:, None] * padded + place[None, :], block.T)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor],
    softmax_scale: float,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """Fill `out` with what `scaled_attention` computes.

    Args:
        q: `[B, H, Sq, D]`, int8 or e4m3, D 64 or 128; like k contiguous and at an address divisible
            by 16; none of all is empty.
        k: `[B, H, Sk, D]`, of the dtype of `q`.
        v: `[B, H, Sk, D]`, e4m3 or a float that is rounded to it; any strides, any address.
        scales: of q, k and v, each `[H]` fp32; of q also `[B, H, Sq, 1]`; contiguous.
        softmax_scale: factor of the logits, > 0.
        out: `[B, H, Sq, D]`, a float of at most 32 bits; any strides but the last, which is 1.
        tile: None for the fastest measured on an H100.
    """
    tile = tile or Tile()
    batch, heads, q_tokens, channels = q.shape
    k_tokens = k.shape[2]
    transposed = transpose_values(v, scales[2])
    _attention[(triton.cdiv(q_tokens, tile.queries), batch * heads)](
        TensorDescriptor.from_tensor(q.view(-1, channels), [tile.queries, channels]),
        TensorDescriptor.from_tensor(k.view(-1, channels), [tile.keys, channels]),
        TensorDescriptor.from_tensor(transposed, [channels, tile.keys]),
        out,
        *scales,
        softmax_scale * math.log2(math.e),
        heads,
        q_tokens,
        k_tokens,
        out.stride()[:3],
        D=channels,
        BLOCK_Q=tile.queries,
        BLOCK_K=tile.keys,
        SUM=tl.int32 if q.dtype == INT8 else tl.float32,
        P_BITS=math.log2(P_RANGE),
        BIASED=tile.biased and q.dtype == INT8,
        PER_TOKEN=scales[0].dim() > 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )


def transpose_values(v: Tensor, v_scale: Tensor) -> Tensor:
    """`v [B, H, S, D]` in e4m3 as `[B * H * D, S]`, S padded with zeros to a multiple of 128.

    Hopper's 8-bit tensor cores read the second operand along the dim that is summed over. Tokens
    are in the order of `_swap_keys`.

    Args:
        v: e4m3, or a wider float, which is rounded as by `quantize_per_head`; any strides.
        v_scale: `[H]` fp32, contiguous; only a float is divided by it.
    """
    batch, heads, tokens, channels = v.shape
    padded = triton.cdiv(tokens, _PADDING) * _PADDING
    out = v.new_empty(batch * heads * channels, padded, dtype=FP8)
    _transpose[(padded // _PADDING, batch * heads)](
        v.view(torch.uint8) if v.dtype == FP8 else v,
        None if v.dtype == FP8 else v_scale,
        out.view(torch.uint8),
        tokens,
        padded,
        heads,
        v.stride(),
        D=channels,
        BLOCK=_PADDING,
        num_warps=8,
    )
    return out
