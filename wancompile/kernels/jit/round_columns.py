"""Columns of a weight rounded one after the other, as `quant.gptq` does it; a thread per row.

In plain PyTorch each column takes a dozen launches, and the weights of a large model have two
million columns: to wait for them took longer than all the rest of compiling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wancompile.kernels.jit.rows import saturate, to_8bit
from wancompile.quant.numerics import INT8, QMAX

# One warp: the errors of a row of the weight stay in the registers of one thread.
_ROWS = 32


@triton.jit(do_not_specialize=["count", "n_rows"])
def _round_columns(
    columns,
    moved,
    scales,
    spread,
    data,
    errors,
    count,
    n_rows,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    earlier = tl.arange(0, COUNT)
    scale = tl.load(scales + row, mask=inside, other=1.0)
    inverse = tl.div_rn(1.0, scale)
    kept = tl.zeros((COUNT, ROWS), tl.float32)
    for j in range(count):
        at = j * n_rows + row
        weight = tl.load(columns + at, mask=inside, other=0.0)
        share = tl.load(spread + j * COUNT + earlier)
        target = weight + tl.load(moved + at, mask=inside, other=0.0)
        target += tl.sum(share[:, None] * kept, 0)
        rounded = to_8bit(saturate(target * inverse, QMAX), IS_INT8)
        error = weight - rounded.to(tl.float32) * scale
        kept = tl.where(earlier[:, None] == j, error[None, :], kept)
        tl.store(data + at, rounded, mask=inside)
        tl.store(errors + at, error, mask=inside)


def round_columns(
    columns: Tensor, moved: Tensor, scale: Tensor, spread: Tensor, data: Tensor, errors: Tensor
) -> None:
    """Fill `data` and `errors` with what `gptq.round_columns` computes.

    Args:
        columns: `[C, N]` fp32, contiguous: C input channels of a weight.
        moved: `[C, N]` fp32, contiguous: what earlier channels add to their targets.
        scale: `[N]` fp32, contiguous, > 0.
        spread: `[C, C]` fp32; what is not above its diagonal is not read.
        data: `[C, N]`, int8 or e4m3, contiguous.
        errors: `[C, N]` fp32, contiguous.
    """
    count, rows = columns.shape
    padded = triton.next_power_of_2(count)
    # For column j, its shares of the errors before it lie side by side; of later ones there are 0.
    shares = torch.nn.functional.pad(spread.triu(1).T, (0, padded - count)).contiguous()
    _round_columns[(triton.cdiv(rows, _ROWS),)](
        columns,
        moved,
        scale,
        shares,
        data,
        errors,
        count,
        rows,
        COUNT=padded,
        ROWS=_ROWS,
        IS_INT8=data.dtype == INT8,
        QMAX=float(QMAX[data.dtype]),
        num_warps=1,
    )
