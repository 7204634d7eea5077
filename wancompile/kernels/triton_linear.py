"""`scaled_linear` through one Triton kernel for both 8-bit types."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_float, lacks_hopper, lacks_multiple
from wancompile.kernels.product import product
from wancompile.ops.linear import check_scaled_linear, fake_scaled_linear
from wancompile.quant.numerics import FP8

_SHALLOW = 1536  # 1,234 TFLOP/s to 1,135; at 5,120 it is 1,247 to 1,319


@torch.library.custom_op("wancompile_kernels::linear_triton", mutates_args=())
def linear_triton(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_linear` in one pass: the sums never leave the chip before they are scaled.

    int8 is the plain body bit for bit. For e4m3 Hopper's tensor cores keep fewer bits of the
    running sum than fp32 has, as `torch._scaled_mm` with fast accumulation does.
    """
    check_scaled_linear(x, x_scale, weight, weight_scale, bias, out_dtype)
    from wancompile.kernels.jit.linear import launch

    return product(launch, x, x_scale, weight, weight_scale, bias, out_dtype)


linear_triton.register_fake(fake_scaled_linear)


def fits_tensor_cores(device: torch.device, args: tuple[object, ...]) -> str | None:
    """The reason why a `scaled_linear` cannot, or should not, be one of the kernels for Hopper."""
    weight = args[2]
    assert isinstance(weight, Tensor)
    return lacks_shapes(device, args) or _lacks_depth(weight.dtype, weight.shape[1])


def lacks_shapes(device: torch.device, args: tuple[object, ...]) -> str | None:
    """The reason why a `scaled_linear` cannot be one of the kernels for Hopper."""
    weight, bias, out_dtype = args[2], args[4], args[5]
    assert isinstance(weight, Tensor)
    assert isinstance(out_dtype, torch.dtype)
    out_features, in_features = weight.shape
    return (
        lacks_hopper(device)
        or lacks_multiple("K", in_features, 16)
        or lacks_multiple("N", out_features, 16)
        or (lacks_float("the bias", bias.dtype) if isinstance(bias, Tensor) else None)
        or lacks_float("the output", out_dtype)
    )


def _lacks_depth(dtype: torch.dtype, depth: int) -> str | None:
    is_slower = dtype == FP8 and depth <= _SHALLOW
    return f"torch is faster for e4m3 with K={depth}" if is_slower else None


LINEAR_TRITON = Kernel(
    "linear_triton",
    torch.ops.wancompile.scaled_linear.default,
    torch.ops.wancompile_kernels.linear_triton.default,
    fits_tensor_cores,
)
