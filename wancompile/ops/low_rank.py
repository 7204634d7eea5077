"""A product of low rank beside an 8-bit linear, which reads the same 8-bit input."""

import torch
from torch import Tensor

from wancompile.ops.check import is_8bit, is_input_scale, require
from wancompile.ops.chunk import row_chunks
from wancompile.ops.linear import check_scaled_linear, scaled_linear
from wancompile.quant.numerics import decode


@torch.library.custom_op("wancompile::low_rank_down", mutates_args=())
def low_rank_down(x: Tensor, x_scale: Tensor, down: Tensor) -> Tensor:
    """`(x @ down.T) * x_scale`: what the 8 bits stand for, in the few directions of a LoRA.

    The A of `W + B A` (Hu et al. 2021, "LoRA").

    Args:
        x: `[..., K]`, int8 or e4m3.
        x_scale: `[..., 1]` fp32, per token, or `[1]` for all tokens.
        down: `[R, K]`, any float dtype.

    Returns:
        `[..., R]` in the dtype of `down`, computed in fp32 and rounded once.
    """
    check_low_rank_down(x, x_scale, down)
    tokens = x.reshape(-1, x.shape[-1])
    scales = x_scale.reshape(-1, 1).expand(tokens.shape[0], 1)
    out = down.new_empty((tokens.shape[0], down.shape[0]))
    right = down.to(torch.float32).t()
    for rows in row_chunks(tokens.shape[0], tokens.shape[1], x.device):
        out[rows] = (decode(tokens[rows]) @ right * scales[rows]).to(out.dtype)
    return out.view(*x.shape[:-1], down.shape[0])


@low_rank_down.register_fake
def fake_low_rank_down(x: Tensor, x_scale: Tensor, down: Tensor) -> Tensor:
    """Shape and dtype of `low_rank_down` and of its kernels."""
    check_low_rank_down(x, x_scale, down)
    return down.new_empty((*x.shape[:-1], down.shape[0]))


@torch.library.custom_op("wancompile::scaled_linear_low_rank", mutates_args=())
def scaled_linear_low_rank(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    low: Tensor,
    up: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_linear` plus `low @ up.T`, added in fp32 before the bias, rounded once.

    Args:
        x: `[..., K]`, int8 or e4m3.
        x_scale: `[..., 1]` fp32, per token, or `[1]` for all tokens.
        weight: `[N, K]`, of the dtype of `x`.
        weight_scale: `[N, 1]` fp32, per output channel.
        bias: `[N]`, any float dtype, or None.
        low: `[..., R]`, any float dtype, as `low_rank_down` yields it.
        up: `[N, R]`, of the dtype of `low`.
        out_dtype: a float dtype.

    Returns:
        `[..., N]`; where `up` is zero, exactly what `scaled_linear` yields.
    """
    check_scaled_linear_low_rank(x, x_scale, weight, weight_scale, bias, low, up, out_dtype)
    total: Tensor = scaled_linear(x, x_scale, weight, weight_scale, None, torch.float32)
    total += low.to(torch.float32) @ up.to(torch.float32).t()
    if bias is not None:
        total += bias
    return total.to(out_dtype)


@scaled_linear_low_rank.register_fake
def fake_scaled_linear_low_rank(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    low: Tensor,
    up: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """Shape and dtype of `scaled_linear_low_rank` and of its kernels."""
    check_scaled_linear_low_rank(x, x_scale, weight, weight_scale, bias, low, up, out_dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


def check_low_rank_down(x: Tensor, x_scale: Tensor, down: Tensor) -> None:
    """Raise InputError unless the arguments are those of `low_rank_down`."""
    fits = is_8bit(x.dtype) and x.dim() >= 1 and is_input_scale(x_scale, x)
    fits = fits and down.is_floating_point() and down.dim() == 2 and down.shape[1] == x.shape[-1]
    need = "x int8 or float8_e4m3fn[..., K], x_scale float32[..., 1] or [1], down float[R, K]"
    require(fits, "low_rank_down", need, x, x_scale, down)


def check_scaled_linear_low_rank(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    low: Tensor,
    up: Tensor,
    out_dtype: torch.dtype,
) -> None:
    """Raise InputError unless the arguments are those of `scaled_linear_low_rank`."""
    check_scaled_linear(x, x_scale, weight, weight_scale, bias, out_dtype)
    fits = low.is_floating_point() and up.dtype == low.dtype and up.dim() == 2
    fits = fits and up.shape[0] == weight.shape[0]
    fits = fits and low.dim() == x.dim() and low.shape == (*x.shape[:-1], up.shape[-1])
    need = "low float[..., R] with the leading dims of x, up [N, R] of the same dtype"
    require(fits, "scaled_linear_low_rank", need, low, up, weight)
