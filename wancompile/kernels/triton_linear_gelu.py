"""`linear_gelu_quantize` through the Triton product."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel
from wancompile.kernels.product import product
from wancompile.kernels.triton_linear import lacks_shapes
from wancompile.ops.linear_gelu import check_linear_gelu, fake_linear_gelu


@torch.library.custom_op("wancompile_kernels::linear_gelu_quantize_triton", mutates_args=())
def linear_gelu_quantize_triton(
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
    """`linear_gelu_quantize` in one pass: nothing of more than 8 bits leaves the chip."""
    linear = x, x_scale, weight, weight_scale, bias
    check_linear_gelu(*linear, approximate, inv_smooth, out_scale, out_dtype)
    from wancompile.kernels.jit.activation import Gelu
    from wancompile.kernels.jit.linear import launch

    inverse = None if inv_smooth is None else inv_smooth.contiguous()
    return product(launch, *linear, out_dtype, activation=Gelu(approximate, inverse, out_scale))


linear_gelu_quantize_triton.register_fake(fake_linear_gelu)


def fits_product(device: torch.device, args: tuple[object, ...]) -> str | None:
    """The reason why `linear_gelu_quantize` cannot be one of the kernels for Hopper.

    That torch is faster at some shapes does not count: it would store the linear's output.
    """
    return lacks_shapes(device, (*args[:5], torch.float32))


LINEAR_GELU_QUANTIZE_TRITON = Kernel(
    "linear_gelu_quantize_triton",
    torch.ops.wancompile.linear_gelu_quantize.default,
    torch.ops.wancompile_kernels.linear_gelu_quantize_triton.default,
    fits_product,
)
