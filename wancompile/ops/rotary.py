"""RMSNorm and rotary position embedding of q and k as one op, which may turn and round, too."""

import torch
from torch import Tensor

from wancompile.ops.check import is_8bit, is_scale, require
from wancompile.ops.hadamard import has_hadamard, turned
from wancompile.quant.numerics import absmax_scale, quantize


@torch.library.custom_op("wancompile::norm_rotate", mutates_args=())
def norm_rotate(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, dtype: torch.dtype
) -> Tensor:
    """RMSNorm over all heads, then rotate; computed in fp32 and rounded once, at the end.

    Args:
        x: `[B, S, H * D]`, any float dtype; the output of the projection of q or k.
        weight: `[H * D]`, any float dtype, of the RMSNorm (Zhang & Sennrich 2019). None is 1.
        eps: added to the mean square.
        cos: `[S, D / 2]` fp32. Channels 2i and 2i + 1 of a head turn by angle i (Su et al. 2021,
            "RoFormer").
        sin: `[S, D / 2]` fp32.
        dtype: a float dtype of 16 bits or more.

    Returns:
        `[B, H, S, D]` in `dtype`, laid out in memory as `[B, S, H, D]`. Attention writes its output
        in the layout of q, and the next linear reads that layout without a copy.
    """
    check_rotate(x, weight, cos, sin, dtype)
    return _rotated(x, weight, eps, cos, sin).to(dtype).transpose(1, 2)


@norm_rotate.register_fake
def fake_norm_rotate(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, dtype: torch.dtype
) -> Tensor:
    """Shape, dtype and layout of `norm_rotate` and of its kernels."""
    check_rotate(x, weight, cos, sin, dtype)
    return empty_rotated(x, cos, dtype)


@torch.library.custom_op("wancompile::norm_rotate_quantize", mutates_args=())
def norm_rotate_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    is_turned: bool,
    dtype: torch.dtype,
) -> Tensor:
    """RMSNorm over all heads, rotate, turn, subtract, quantize; nothing is rounded in between.

    Args:
        x: as in `norm_rotate`.
        weight: as in `norm_rotate`.
        eps: as in `norm_rotate`.
        cos: as in `norm_rotate`.
        sin: as in `norm_rotate`.
        shift: `[H, D]` fp32, subtracted last, or None. Softmax does not see a vector that is
            subtracted from all keys.
        scale: `[H]` fp32, static.
        is_turned: multiply each head by the matrix of `hadamard`; D is then a power of two.
        dtype: int8 or e4m3.

    Returns:
        `[B, H, S, D]` in `dtype`, contiguous; what lies outside the range saturates.
    """
    check_rotate_quantize(x, weight, cos, sin, shift, scale, is_turned, dtype)
    y = _rotated(x, weight, eps, cos, sin)
    if is_turned:
        y = turned(y)
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
    is_turned: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Shape and dtype of `norm_rotate_quantize` and of its kernels."""
    check_rotate_quantize(x, weight, cos, sin, shift, scale, is_turned, dtype)
    return empty_heads(x, cos, dtype)


@torch.library.custom_op("wancompile::norm_rotate_quantize_per_token", mutates_args=())
def norm_rotate_quantize_per_token(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    is_turned: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over all heads, rotate, turn, quantize each head of each token by its own scale.

    Args:
        x: as in `norm_rotate`.
        weight: as in `norm_rotate`.
        eps: as in `norm_rotate`.
        cos: as in `norm_rotate`.
        sin: as in `norm_rotate`.
        is_turned: as in `norm_rotate_quantize`.
        dtype: int8 or e4m3.

    Returns:
        `q [B, H, S, D]` in `dtype` and `scale [B, H, S, 1]` fp32, both contiguous, the scale as of
        `quantize_per_token`.
    """
    check_rotate_quantize_per_token(x, weight, cos, sin, is_turned, dtype)
    y = _rotated(x, weight, eps, cos, sin)
    if is_turned:
        y = turned(y)
    y = y.transpose(1, 2)
    scale = absmax_scale(y, -1, dtype)
    return quantize(y, scale, dtype).contiguous(), scale.contiguous()


@norm_rotate_quantize_per_token.register_fake
def fake_norm_rotate_quantize_per_token(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    is_turned: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `norm_rotate_quantize_per_token` and of its kernels."""
    check_rotate_quantize_per_token(x, weight, cos, sin, is_turned, dtype)
    out = empty_heads(x, cos, dtype)
    return out, x.new_empty((*out.shape[:3], 1), dtype=torch.float32)


def empty_heads(x: Tensor, cos: Tensor, dtype: torch.dtype) -> Tensor:
    """An output `[B, H, S, D]` of the ops that quantize to fill, contiguous."""
    batch, tokens, channels = x.shape
    size = 2 * cos.shape[1]
    return x.new_empty((batch, channels // size, tokens, size), dtype=dtype)


def empty_rotated(x: Tensor, cos: Tensor, dtype: torch.dtype) -> Tensor:
    """An output `[B, H, S, D]` of `norm_rotate` to fill, laid out as `[B, S, H, D]`."""
    batch, tokens, channels = x.shape
    size = 2 * cos.shape[1]
    return x.new_empty((batch, tokens, channels // size, size), dtype=dtype).transpose(1, 2)


def _rotated(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """The normed and rotated heads `[B, S, H, D]` in fp32."""
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    half = cos.shape[1]
    even, odd = y.view(*x.shape[:2], x.shape[2] // (2 * half), half, 2).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


_OPERANDS = "x float[B, S, H * D], weight float[H * D] or None, cos and sin float32[S, D / 2]"
_TURNED = "D a power of two if it is turned"


def check_rotate(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, dtype: torch.dtype
) -> None:
    """Raise InputError unless the arguments are those of `norm_rotate`."""
    fits = _are_operands(x, weight, cos, sin) and dtype.is_floating_point and dtype.itemsize > 1
    need = f"{_OPERANDS}, dtype a float of 16 bits or more"
    require(fits, "norm_rotate", need, x, weight, cos, sin, dtype)


def check_rotate_quantize(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    is_turned: bool,
    dtype: torch.dtype,
) -> None:
    """Raise InputError unless the arguments are those of `norm_rotate_quantize`."""
    fits = _are_operands(x, weight, cos, sin) and is_8bit(dtype) and _can_turn(cos, is_turned)
    if fits:
        size = 2 * cos.shape[1]
        heads = x.shape[2] // size
        fits = is_scale(scale, heads) and (shift is None or is_scale(shift, heads, size))
    need = (
        f"{_OPERANDS}, {_TURNED}, shift float32[H, D] or None, scale float32[H], "
        "dtype int8 or float8_e4m3fn"
    )
    require(fits, "norm_rotate_quantize", need, x, weight, cos, sin, shift, scale, dtype)


def check_rotate_quantize_per_token(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    is_turned: bool,
    dtype: torch.dtype,
) -> None:
    """Raise InputError unless the arguments are those of `norm_rotate_quantize_per_token`."""
    fits = _are_operands(x, weight, cos, sin) and is_8bit(dtype) and _can_turn(cos, is_turned)
    need = f"{_OPERANDS}, {_TURNED}, dtype int8 or float8_e4m3fn"
    require(fits, "norm_rotate_quantize_per_token", need, x, weight, cos, sin, dtype)


def _can_turn(cos: Tensor, is_turned: bool) -> bool:
    return not is_turned or has_hadamard(int(2 * cos.shape[1]))


def _are_operands(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> bool:
    """Whether both tables turn all channels of all tokens of `x`, and `weight` fits."""
    if x.dim() != 3 or not x.is_floating_point() or cos.dim() != 2 or not cos.shape[1]:
        return False
    tokens, half = x.shape[1], cos.shape[1]
    if x.shape[2] % (2 * half) or not all(is_scale(one, tokens, half) for one in (cos, sin)):
        return False
    return weight is None or (weight.is_floating_point() and weight.shape == x.shape[2:])
