"""`scaled_attention` for Hopper: softmax runs while tensor cores multiply."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, aligned, lacks_gluon
from wancompile.kernels.triton_attention import fits_flash_attention
from wancompile.ops.attention import check_attention, empty_output, fake_scaled_attention


@torch.library.custom_op("wancompile_kernels::attention_hopper", mutates_args=())
def attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_attention`, rounded as `attention_triton` rounds it.

    Of int8 one exponential in eight is a polynomial, 800 times closer than P is rounded.
    """
    check_attention(q, k, v, q_scale, k_scale, v_scale, out_dtype)
    out = empty_output(q, out_dtype)
    if out.numel():
        from wancompile.kernels.jit import attention
        from wancompile.kernels.jit import attention_hopper as jit

        scales = q_scale.contiguous(), k_scale.contiguous(), v_scale.contiguous()
        values = attention.transpose_values(v, scales[2])
        jit.launch(aligned(q), aligned(k), values, scales, softmax_scale, out)
    return out


attention_hopper.register_fake(fake_scaled_attention)


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    return fits_flash_attention(device, args) or lacks_gluon()


ATTENTION_HOPPER = Kernel(
    "attention_hopper",
    torch.ops.wancompile.scaled_attention.default,
    torch.ops.wancompile_kernels.attention_hopper.default,
    _supports,
)
