"""Products of low rank beside 8-bit linears, written in Triton."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_float, lacks_triton_device
from wancompile.kernels.product import product
from wancompile.kernels.triton_linear import lacks_shapes
from wancompile.ops.linear import row_scales
from wancompile.ops.low_rank import (
    check_low_rank_down,
    check_scaled_linear_low_rank,
    fake_low_rank_down,
    fake_scaled_linear_low_rank,
)
from wancompile.quant.numerics import FP8


@torch.library.custom_op("wancompile_kernels::low_rank_down_triton", mutates_args=())
def low_rank_down_triton(x: Tensor, x_scale: Tensor, down: Tensor) -> Tensor:
    """`low_rank_down` in one pass over the tokens, which stay in 8 bits in memory."""
    check_low_rank_down(x, x_scale, down)
    rows = x.reshape(-1, x.shape[-1])
    out = down.new_empty((rows.shape[0], down.shape[0]))
    if out.numel():
        from wancompile.kernels.jit import low_rank

        low_rank.launch(rows.contiguous(), row_scales(x_scale), down.contiguous(), out)
    return out.view(*x.shape[:-1], down.shape[0])


@torch.library.custom_op("wancompile_kernels::linear_low_rank_triton", mutates_args=())
def linear_low_rank_triton(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    low: Tensor,
    up: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_linear_low_rank` in one pass: `low @ up.T` is added before anything is stored."""
    check_scaled_linear_low_rank(x, x_scale, weight, weight_scale, bias, low, up, out_dtype)
    from wancompile.kernels.jit.linear import launch

    branch = {"low": low.reshape(-1, low.shape[-1]).contiguous(), "up": up.contiguous()}
    return product(launch, x, x_scale, weight, weight_scale, bias, out_dtype, **branch)


low_rank_down_triton.register_fake(fake_low_rank_down)
linear_low_rank_triton.register_fake(fake_scaled_linear_low_rank)


def _supports_down(device: torch.device, args: tuple[object, ...]) -> str | None:
    x, _, down = args
    assert isinstance(x, Tensor)
    assert isinstance(down, Tensor)
    least = (8, 9) if x.dtype == FP8 else (8, 0)
    return lacks_triton_device(device, least) or lacks_float("the LoRA", down.dtype)


def _supports_linear(device: torch.device, args: tuple[object, ...]) -> str | None:
    *linear, low, _up, out_dtype = args
    assert isinstance(low, Tensor)
    # That torch is faster at some shapes does not count: it would store the sum once more.
    lacking = lacks_shapes(device, (*linear, out_dtype))
    return lacking or lacks_float("the LoRA", low.dtype)


LOW_RANK_DOWN_TRITON = Kernel(
    "low_rank_down_triton",
    torch.ops.wancompile.low_rank_down.default,
    torch.ops.wancompile_kernels.low_rank_down_triton.default,
    _supports_down,
)
LINEAR_LOW_RANK_TRITON = Kernel(
    "linear_low_rank_triton",
    torch.ops.wancompile.scaled_linear_low_rank.default,
    torch.ops.wancompile_kernels.linear_low_rank_triton.default,
    _supports_linear,
)
