"""`linear_gelu_quantize` for Hopper: what the product's epilogue stores has 8 bits."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, aligned, lacks_gluon
from wancompile.kernels.triton_linear_gelu import fits_product
from wancompile.ops.linear import row_scales
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
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty((rows.shape[0], weight.shape[0]), dtype=out_dtype)
    if out.numel():
        from wancompile.kernels.jit import linear_hopper as jit
        from wancompile.kernels.jit.activation import Gelu

        inverse = None if inv_smooth is None else inv_smooth.contiguous()
        jit.launch(
            aligned(rows),
            row_scales(x_scale),
            aligned(weight),
            weight_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            activation=Gelu(approximate, inverse, out_scale),
        )
    return out.view(*x.shape[:-1], weight.shape[0])


linear_gelu_quantize_hopper.register_fake(fake_linear_gelu)


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    return fits_product(device, args) or lacks_gluon()


LINEAR_GELU_QUANTIZE_HOPPER = Kernel(
    "linear_gelu_quantize_hopper",
    torch.ops.wancompile.linear_gelu_quantize.default,
    torch.ops.wancompile_kernels.linear_gelu_quantize_hopper.default,
    _supports,
)
