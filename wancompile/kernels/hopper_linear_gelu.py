"""`linear_gelu_quantize` for Hopper: what the product's epilogue stores has 8 bits."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_gluon
from wancompile.kernels.product import product
from wancompile.kernels.triton_linear_gelu import fits_product
from wancompile.ops.linear_gelu import check_linear_gelu, fake_linear_gelu


@torch.library.custom_op("wancompile_kernels::linear_gelu_quantize_hopper", mutates_args=())
def linear_gelu_quantize_hopper(
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
    """`linear_gelu_quantize` in one pass, by the product of `linear_hopper`."""
    linear = x, x_scale, weight, weight_scale, bias
    check_linear_gelu(*linear, approximate, inv_smooth, out_scale, out_dtype)
    from wancompile.kernels.jit.activation import Gelu
    from wancompile.kernels.jit.linear_hopper import launch

    inverse = None if inv_smooth is None else inv_smooth.contiguous()
    return product(launch, *linear, out_dtype, activation=Gelu(approximate, inverse, out_scale))


linear_gelu_quantize_hopper.register_fake(fake_linear_gelu)


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    return fits_product(device, args) or lacks_gluon()


LINEAR_GELU_QUANTIZE_HOPPER = Kernel(
    "linear_gelu_quantize_hopper",
    torch.ops.wancompile.linear_gelu_quantize.default,
    torch.ops.wancompile_kernels.linear_gelu_quantize_hopper.default,
    _supports,
)
