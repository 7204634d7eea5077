"""Float activations to 8 bits: by dynamic scales per token, by static ones per head or tensor."""

import torch
from torch import Tensor

from wancompile.ops.check import is_8bit, is_scale, require
from wancompile.quant.numerics import absmax_scale, quantize


@torch.library.custom_op("wancompile::quantize_per_token", mutates_args=())
def quantize_per_token(
    x: Tensor, inv_smooth: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize each token with its own scale, after dividing the smooth scale out.

    Args:
        x: `[..., K]`, any float dtype.
        inv_smooth: `[K]` fp32, one over the smooth scale (Xiao et al. 2023, "SmoothQuant"), which
            the weight was multiplied by; multiplied in fp32 before anything else.
        dtype: int8 or e4m3.

    Returns:
        `q [..., K]` in `dtype` and `scale [..., 1]` fp32, `scale = absmax(x * inv_smooth) / qmax`,
        so that `q * scale ~ x * inv_smooth`.
    """
    check_per_token(x, inv_smooth, dtype)
    smoothed = x if inv_smooth is None else x.to(torch.float32) * inv_smooth
    scale = absmax_scale(smoothed, -1, dtype)
    return quantize(smoothed, scale, dtype).contiguous(), scale.contiguous()


@quantize_per_token.register_fake
def fake_quantize_per_token(
    x: Tensor, inv_smooth: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `quantize_per_token` and of its kernels."""
    check_per_token(x, inv_smooth, dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scale


@torch.library.custom_op("wancompile::quantize_per_head", mutates_args=())
def quantize_per_head(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantize each head with its static, calibrated scale; what lies outside saturates.

    Args:
        x: `[B, H, S, D]`, any float dtype.
        scale: `[H]` fp32.
        dtype: int8 or e4m3. int8 cannot show a NaN here (see `numerics.quantize`).

    Returns:
        `[B, H, S, D]` in `dtype`.
    """
    check_per_head(x, scale, dtype)
    return quantize(x, scale[:, None, None], dtype).contiguous()


@quantize_per_head.register_fake
def fake_quantize_per_head(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Shape and dtype of `quantize_per_head` and of its kernels."""
    check_per_head(x, scale, dtype)
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("wancompile::quantize_per_tensor", mutates_args=())
def quantize_per_tensor(
    x: Tensor, inv_smooth: Tensor | None, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Quantize by one static, calibrated scale; what lies outside of its range saturates.

    Args:
        x: `[..., K]`, any float dtype.
        inv_smooth: `[K]` fp32 or None, see `quantize_per_token`.
        scale: `[1]` fp32.
        dtype: int8 or e4m3. int8 cannot show a NaN here (see `numerics.quantize`).

    Returns:
        `[..., K]` in `dtype`, contiguous, so that the result times `scale` is near
        `x * inv_smooth`.
    """
    check_per_tensor(x, inv_smooth, scale, dtype)
    smoothed = x if inv_smooth is None else x.to(torch.float32) * inv_smooth
    return quantize(smoothed, scale, dtype).contiguous()


@quantize_per_tensor.register_fake
def fake_quantize_per_tensor(
    x: Tensor, inv_smooth: Tensor | None, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Shape and dtype of `quantize_per_tensor` and of its kernels."""
    check_per_tensor(x, inv_smooth, scale, dtype)
    return x.new_empty(x.shape, dtype=dtype)


def check_per_token(x: Tensor, inv_smooth: Tensor | None, dtype: torch.dtype) -> None:
    """Raise InputError unless the arguments are those of `quantize_per_token`."""
    fits = x.dim() >= 1 and x.is_floating_point() and is_8bit(dtype)
    if inv_smooth is not None:
        fits = fits and is_scale(inv_smooth, x.shape[-1])
    need = "x float[..., K], inv_smooth float32[K] or None, dtype int8 or float8_e4m3fn"
    require(fits, "quantize_per_token", need, x, inv_smooth, dtype)


def check_per_tensor(
    x: Tensor, inv_smooth: Tensor | None, scale: Tensor, dtype: torch.dtype
) -> None:
    """Raise InputError unless the arguments are those of `quantize_per_tensor`."""
    check_per_token(x, inv_smooth, dtype)
    need = "scale float32[1]"
    require(is_scale(scale, 1), "quantize_per_tensor", need, scale)


def check_per_head(x: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Raise InputError unless the arguments are those of `quantize_per_head`."""
    fits = x.dim() == 4 and x.is_floating_point() and is_8bit(dtype)
    fits = fits and is_scale(scale, x.shape[1])
    need = "x float[B, H, S, D], scale float32[H], dtype int8 or float8_e4m3fn"
    require(fits, "quantize_per_head", need, x, scale, dtype)
