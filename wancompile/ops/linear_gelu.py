"""An 8-bit linear, GELU, and the rounding to 8 bits by a static scale, as one op."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wancompile.ops.activation import check_gelu
from wancompile.ops.check import is_scale, require
from wancompile.ops.linear import check_scaled_linear, scaled_linear
from wancompile.ops.quantize import quantize_per_tensor


@torch.library.custom_op("wancompile::linear_gelu_quantize", mutates_args=())
def linear_gelu_quantize(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    approximate: str,
    inv_smooth: Tensor | None,
    out_scale: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_linear` in fp32, GELU in fp32 (Hendrycks & Gimpel 2016), `quantize_per_tensor`.

    A scale that does not depend on the values lets each tile of the product be rounded on its own.

    Args:
        x: `[..., K]`, int8 or e4m3.
        x_scale: `[..., 1]` fp32, per token, or `[1]` for all tokens.
        weight: `[N, K]`, of the dtype of `x`.
        weight_scale: `[N, 1]` fp32, per output channel.
        bias: `[N]`, any float dtype, or None.
        approximate: "none" or "tanh", see `gelu_quantize`.
        inv_smooth: `[N]` fp32 or None, what GELU is multiplied by before it is rounded.
        out_scale: `[1]` fp32.
        out_dtype: int8 or e4m3.

    Returns:
        `[..., N]` in `out_dtype`, contiguous, saturated.
    """
    linear = x, x_scale, weight, weight_scale, bias
    check_linear_gelu(*linear, approximate, inv_smooth, out_scale, out_dtype)
    y = scaled_linear(*linear, torch.float32)
    y = F.gelu(y, approximate=approximate)
    q: Tensor = quantize_per_tensor(y, inv_smooth, out_scale, out_dtype)
    return q


@linear_gelu_quantize.register_fake
def fake_linear_gelu(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    approximate: str,
    inv_smooth: Tensor | None,
    out_scale: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """Shape and dtype of `linear_gelu_quantize` and of its kernels."""
    linear = x, x_scale, weight, weight_scale, bias
    check_linear_gelu(*linear, approximate, inv_smooth, out_scale, out_dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


def check_linear_gelu(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    approximate: str,
    inv_smooth: Tensor | None,
    out_scale: Tensor,
    out_dtype: torch.dtype,
) -> None:
    """Raise InputError unless the arguments are those of `linear_gelu_quantize`."""
    check_scaled_linear(x, x_scale, weight, weight_scale, bias, torch.float32)
    # GELU's operand has the shape of a row of the linear's output.
    check_gelu(weight_scale.reshape(-1), approximate, inv_smooth, out_dtype)
    require(is_scale(out_scale, 1), "linear_gelu_quantize", "out_scale float32[1]", out_scale)
