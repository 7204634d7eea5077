"""8-bit tokens in the few directions of a LoRA: one pass over them, which is all it costs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _DEPTH, _MOST_DIRECTIONS = 64, 128, 64


@triton.jit(do_not_specialize=["rows"])
def _down(
    x,
    x_scale,
    down,
    out,
    rows,
    K: tl.constexpr,
    R: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes `BLOCK_R` directions of `BLOCK_M` tokens.

    `EACH` is 1 where each token has a scale, and 0 where all have one.
    """
    at_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at_column = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    at_depth = tl.arange(0, BLOCK_K)
    kind = down.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        depth = start + at_depth
        token = tl.load(
            x + at_row[:, None] * K + depth[None, :],
            mask=(at_row < rows)[:, None] & (depth < K)[None, :],
            other=0.0,
        )
        direction = tl.load(
            down + at_column[:, None] * K + depth[None, :],
            mask=(at_column < R)[:, None] & (depth < K)[None, :],
            other=0.0,
        )
        # 8-bit numbers are exact in every float of 16 bits, so the tensor cores may multiply those.
        total = tl.dot(token.to(kind), direction.T, total, input_precision="ieee")
    total *= tl.load(x_scale + at_row * EACH, mask=at_row < rows, other=0.0)[:, None]
    inside = (at_row < rows)[:, None] & (at_column < R)[None, :]
    tl.store(out + at_row[:, None] * R + at_column[None, :], total.to(kind), mask=inside)


def launch(x: Tensor, x_scale: Tensor, down: Tensor, out: Tensor) -> None:
    """Fill `out` with what `low_rank_down` computes.

    Args:
        x: `[M, K]`, int8 or e4m3, contiguous like all others; M > 0.
        x_scale: `[M, 1]` fp32, or `[1]` for all tokens.
        down: `[R, K]`, a float of at most 32 bits.
        out: `[M, R]`, of the dtype of `down`.
    """
    (rows, depth), directions = x.shape, down.shape[0]
    block = min(_MOST_DIRECTIONS, max(16, triton.next_power_of_2(directions)))
    _down[(triton.cdiv(rows, _TOKENS), triton.cdiv(directions, block))](
        x,
        x_scale,
        down,
        out,
        rows,
        K=depth,
        R=directions,
        EACH=0 if x_scale.shape == (1,) else 1,
        BLOCK_M=_TOKENS,
        BLOCK_R=block,
        BLOCK_K=_DEPTH,
        num_warps=4,
        num_stages=4,
    )
