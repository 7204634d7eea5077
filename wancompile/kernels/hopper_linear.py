"""`scaled_linear` for Hopper: warps that load feed warps that multiply."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, aligned, lacks_gluon
from wancompile.kernels.triton_linear import fits_tensor_cores
from wancompile.ops.linear import check_scaled_linear, fake_scaled_linear


@torch.library.custom_op("wancompile_kernels::linear_hopper", mutates_args=())
def linear_hopper(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_linear`, as `linear_triton` computes it: int8 is the plain body bit for bit."""
    check_scaled_linear(x, x_scale, weight, weight_scale, bias, out_dtype)
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty((rows.shape[0], weight.shape[0]), dtype=out_dtype)
    if out.numel():
        from wancompile.kernels.jit import linear_hopper as jit

        jit.launch(
            aligned(rows),
            x_scale.contiguous(),
            aligned(weight),
            weight_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
        )
    return out.view(*x.shape[:-1], weight.shape[0])


linear_hopper.register_fake(fake_scaled_linear)


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    return fits_tensor_cores(device, args) or lacks_gluon()


LINEAR_HOPPER = Kernel(
    "linear_hopper",
    torch.ops.wancompile.scaled_linear.default,
    torch.ops.wancompile_kernels.linear_hopper.default,
    _supports,
)
