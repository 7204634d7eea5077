"""GELU and rounding to 8 bits, one program per token."""

# A tuple of chunks changes its type as it grows.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from wancompile.kernels.jit.rows import (
    load_row,
    quantize_row,
    quantized_kind,
    row_shape,
    smooth_row,
    widen_row,
)

# x Phi(x) ~ x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3); as powers of two:
LINEAR = tl.constexpr(-2 * math.log2(math.e) * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715 * -2 * math.log2(math.e) * math.sqrt(2 / math.pi))
ONE_OVER_ROOT_2 = tl.constexpr(math.sqrt(0.5))


@dataclass(frozen=True, eq=False)
class Gelu:
    """GELU and the rounding of its output, behind a product.

    Attributes:
        form: "none" or "tanh", as in `gelu_quantize`.
        inv_smooth: `[N]` fp32, contiguous, or None.
        out_scale: `[1]` fp32.
    """

    form: str
    inv_smooth: Tensor | None
    out_scale: Tensor


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """GELU of fp32 values; the tanh of its approximation is a quotient of exponentials."""
    if TANH:
        y = x / (1.0 + tl.exp2(x * tl.fma(x * x, CUBIC, LINEAR)))
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * ONE_OVER_ROOT_2))
    return y


@triton.jit
def _gelu_quantize(
    x,
    inv_smooth,
    out,
    scales,
    x_stride,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    TANH: tl.constexpr,
    IS_INT8: tl.constexpr,
    QMAX: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = widen_row(load_row(x + row * x_stride, K, CHUNK))
    activated = ()
    for i in tl.static_range(len(values)):
        activated += (gelu(values[i], TANH),)
    activated = smooth_row(activated, inv_smooth, K, CHUNK)
    quantize_row(activated, out + row * K, scales + row, K, CHUNK, IS_INT8, QMAX, SMALLEST)


def launch_gelu_quantize(
    x: Tensor, approximate: str, inv_smooth: Tensor | None, out: Tensor, scale: Tensor
) -> None:
    """Fill `out` and `scale` with what `gelu_quantize` computes.

    Args:
        x: `[M, K]`, any float dtype, its rows without gaps inside them; M > 0.
        approximate: "none" or "tanh".
        inv_smooth: `[K]` fp32, contiguous, or None.
        out: M rows of K, int8 or e4m3, contiguous.
        scale: M fp32 numbers, contiguous.
    """
    rows, columns = x.shape
    shape = row_shape(columns)
    _gelu_quantize[(rows,)](
        x,
        inv_smooth,
        out,
        scale,
        x.stride(0),
        K=columns,
        CHUNK=shape.chunk,
        TANH=approximate == "tanh",
        num_warps=shape.warps,
        **quantized_kind(out.dtype),
    )
