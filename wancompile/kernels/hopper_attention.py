"""`scaled_attention` for Hopper: softmax runs while tensor cores multiply."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, aligned, lacks_gluon, starts_aligned
from wancompile.kernels.triton_attention import fits_flash_attention
from wancompile.ops.attention import check_attention, empty_output, fake_scaled_attention

_ROW_MULTIPLE = 8  # bulk copies start at multiples of 16 bytes


@torch.library.custom_op("wancompile_kernels::attention_hopper", mutates_args=())
def attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor | None,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_attention`, rounded as `attention_triton` rounds it.

    Of int8 with e4m3 values one exponential in eight is a polynomial, 800 times closer than P is
    rounded.
    """
    check_attention(q, k, v, q_scale, k_scale, v_scale, out_dtype)
    out = empty_output(q, out_dtype)
    if out.numel():
        from wancompile.kernels.jit import attention_hopper as jit

        v_factor = None if v_scale is None else v_scale.contiguous()
        scales = q_scale.contiguous(), k_scale.contiguous(), v_factor
        jit.launch(aligned(q), aligned(k), _values(v, v_factor), scales, softmax_scale, out)
    return out


def _values(v: Tensor, v_scale: Tensor | None) -> Tensor:
    """`v [B, H, S, D]` as the kernel reads it: e4m3 transposed, bf16 as tokens with all heads.

    A part of a merged product is read where it is.
    """
    if v_scale is not None:
        from wancompile.kernels.jit import attention

        return attention.transpose_values(v, v_scale)
    batch, heads, tokens, channels = v.shape
    flat = v.to(torch.bfloat16).transpose(1, 2).reshape(batch * tokens, heads * channels)
    is_read_in_place = flat.stride(1) == 1 and flat.stride(0) % _ROW_MULTIPLE == 0
    return flat if is_read_in_place and starts_aligned(flat) else aligned(flat)


attention_hopper.register_fake(fake_scaled_attention)


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    return fits_flash_attention(device, args) or lacks_gluon()


ATTENTION_HOPPER = Kernel(
    "attention_hopper",
    torch.ops.wancompile.scaled_attention.default,
    torch.ops.wancompile_kernels.attention_hopper.default,
    _supports,
)
