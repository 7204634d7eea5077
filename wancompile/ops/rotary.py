"""RMSNorm, rotary position embedding and the rounding to 8 bits of q and k, as one op."""

import torch
from torch import Tensor

from wancompile.ops.check import is_8bit, is_scale, require
from wancompile.quant.numerics import quantize


@torch.library.custom_op("wancompile::norm_rotate_quantize", mutates_args=())
def norm_rotate_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """RMSNorm over all heads, rotate, subtract, quantize each head; nothing is rounded in between.

    Args:
        x: `[B, S, H * D]`, any float dtype; the output of the projection of q or k.
        weight: `[H * D]`, any float dtype, of the RMSNorm (Zhang & Sennrich 2019). None is 1.
        eps: added to the mean square.
        cos: `[S, D / 2]` fp32. Channels 2i and 2i + 1 of a head turn by angle i (Su et al. 2021,
            "RoFormer").
        sin: `[S, D / 2]` fp32.
        shift: `[H, D]` fp32, subtracted after the rotation, or None. Softmax does not see a vector
            that is subtracted from all keys.
        scale: `[H]` fp32, static.
        dtype: int8 or e4m3.

    Returns:
        `[B, H, S, D]` in `dtype`, contiguous; what lies outside the range saturates.
    """
    check_rotate(x, weight, cos, sin, shift, scale, dtype)
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    heads = scale.shape[0]
    even, odd = y.view(*y.shape[:-1], heads, -1, 2).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    y = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    if shift is not None:
        y = y - shift
    return quantize(y, scale[:, None], dtype).transpose(1, 2).contiguous()


@norm_rotate_quantize.register_fake
def fake_norm_rotate_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Shape and dtype of `norm_rotate_quantize` and of its kernels."""
    check_rotate(x, weight, cos, sin, shift, scale, dtype)
    batch, tokens, channels = x.shape
    heads = scale.shape[0]
    return x.new_empty((batch, heads, tokens, channels // heads), dtype=dtype)


def check_rotate(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    dtype: torch.dtype,
) -> None:
    """Raise InputError unless the arguments are those of `norm_rotate_quantize`."""
    fits = x.dim() == 3 and x.is_floating_point() and is_8bit(dtype) and scale.dim() == 1
    fits = fits and scale.dtype == torch.float32 and x.shape[-1] % (2 * scale.shape[0]) == 0
    if fits:
        size = x.shape[-1] // scale.shape[0]
        fits = all(
            angle.dtype == torch.float32 and angle.shape == (x.shape[1], size // 2)
            for angle in (cos, sin)
        )
        fits = fits and (shift is None or is_scale(shift, scale.shape[0], size))
    if weight is not None:
        fits = fits and weight.is_floating_point() and weight.shape == x.shape[-1:]
    need = (
        "x float[B, S, H * D], weight float[H * D] or None, cos and sin float32[S, D / 2], shift "
        "float32[H, D] or None, scale float32[H], dtype int8 or float8_e4m3fn"
    )
    require(fits, "norm_rotate_quantize", need, x, weight, cos, sin, shift, scale, dtype)
