"""Flash attention on 8-bit operands (Shah et al. 2024, "FlashAttention-3")."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wancompile.ops.attention import P_RANGE
from wancompile.quant.numerics import INT8

_PADDING = 128


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
    """

    queries: int = 64
    keys: int = 128
    warps: int = 4
    stages: int = 3
    registers: int | None = None


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
):
    """Online softmax over one block of keys; `peak` is the row maximum of base-2 logits so far."""
    product = tl.dot(q, k.load([key_row + start, 0]).T, out_dtype=SUM).to(tl.float32)
    if LAST:
        inside = start + tl.arange(0, BLOCK_K) < k_tokens
        product = tl.where(inside[None, :], product, float("-inf"))
    higher = tl.maximum(peak, tl.max(product, 1) * factor)
    decay = tl.exp2(peak - higher)
    weight = tl.exp2(product * factor - (higher - P_BITS)[:, None])
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
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM: tl.constexpr,
    P_BITS: tl.constexpr,
):
    """One program computes `BLOCK_Q` queries of one head; q, k and v are descriptors.

    A block at the end of a head reads on into the next one: queries there are not stored, and
    weights of keys there are 0, as are the padded values.
    """
    both = tl.program_id(1)
    head = both % heads
    first = tl.program_id(0) * BLOCK_Q
    factor = tl.load(q_scale + head) * tl.load(k_scale + head) * softmax_scale
    queries = q.load([both * q_tokens + first, 0])
    peak = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    result = tl.zeros((BLOCK_Q, D), tl.float32)
    whole = k_tokens // BLOCK_K * BLOCK_K
    for start in tl.range(0, whole, BLOCK_K):
        peak, total, result = _attend(
            queries, k, v, peak, total, result, factor,
            both * k_tokens, both * D, start, k_tokens, BLOCK_K, False, SUM, P_BITS,
        )  # fmt: skip
    if whole < k_tokens:
        peak, total, result = _attend(
            queries, k, v, peak, total, result, factor,
            both * k_tokens, both * D, whole, k_tokens, BLOCK_K, True, SUM, P_BITS,
        )  # fmt: skip
    result = result / total[:, None] * tl.load(v_scale + head)
    token = first + tl.arange(0, BLOCK_Q)[:, None]
    to = out + (both.to(tl.int64) * q_tokens + token) * D + tl.arange(0, D)[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=token < q_tokens)


@triton.jit(do_not_specialize=["tokens"])
def _transpose(v, out, tokens, padded, D: tl.constexpr, BLOCK: tl.constexpr):
    """`v [tokens, D]` of one head to `out [D, padded]`, in the order of `_swap_keys`."""
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    channel = tl.arange(0, D)
    at = head * tokens * D + token[:, None] * D + channel[None, :]
    block = tl.load(v + at, mask=token[:, None] < tokens, other=0)
    tl.store(out + head * D * padded + channel[:, None] * padded + place[None, :], block.T)


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
        q: `[B, H, Sq, D]`, int8 or e4m3, D 64 or 128; like all others contiguous and at an address
            divisible by 16, none of them empty.
        k: `[B, H, Sk, D]`, of the dtype of `q`.
        v: `[B, H, Sk, D]`, e4m3.
        scales: of q, k and v, each `[H]` fp32.
        softmax_scale: factor of the logits, > 0.
        out: `[B, H, Sq, D]`, a float of at most 32 bits.
        tile: None for the fastest measured on an H100.
    """
    tile = tile or Tile()
    batch, heads, q_tokens, channels = q.shape
    k_tokens = k.shape[2]
    transposed = transpose_values(v)
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
        D=channels,
        BLOCK_Q=tile.queries,
        BLOCK_K=tile.keys,
        SUM=tl.int32 if q.dtype == INT8 else tl.float32,
        P_BITS=math.log2(P_RANGE),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )


def transpose_values(v: Tensor) -> Tensor:
    """`v [B, H, S, D]` as `[B * H * D, S]`, S padded with zeros to a multiple of 128.

    Hopper's 8-bit tensor cores read the second operand along the dim that is summed over. Tokens
    are in the order of `_swap_keys`.
    """
    batch, heads, tokens, channels = v.shape
    padded = triton.cdiv(tokens, _PADDING) * _PADDING
    out = v.new_empty(batch * heads * channels, padded)
    _transpose[(padded // _PADDING, batch * heads)](
        v.view(torch.uint8),
        out.view(torch.uint8),
        tokens,
        padded,
        D=channels,
        BLOCK=_PADDING,
    )
    return out
