"""`scaled_attention` as flash attention in Triton, on 8-bit tensor cores."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, aligned, lacks_float, lacks_hopper
from wancompile.ops.attention import check_attention, empty_output, fake_scaled_attention

_HEAD_SIZES = (64, 128)


@torch.library.custom_op("wancompile_kernels::attention_triton", mutates_args=())
def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor | None,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_attention` without ever storing the logits.

    Where the body rounds P relative to the maximum of its row, this kernel rounds it relative to
    the maximum so far, so single values of P may round otherwise, by as much.
    """
    check_attention(q, k, v, q_scale, k_scale, v_scale, out_dtype)
    assert v_scale is not None
    out = empty_output(q, out_dtype)
    if out.numel():
        from wancompile.kernels.jit import attention

        scales = q_scale.contiguous(), k_scale.contiguous(), v_scale.contiguous()
        attention.launch(aligned(q), aligned(k), v, scales, softmax_scale, out)
    return out


attention_triton.register_fake(fake_scaled_attention)


def fits_flash_attention(device: torch.device, args: tuple[object, ...]) -> str | None:
    """The reason why a `scaled_attention` cannot be one of the kernels for Hopper."""
    q, softmax_scale, out_dtype = args[0], args[6], args[7]
    assert isinstance(q, Tensor)
    assert isinstance(softmax_scale, float)
    assert isinstance(out_dtype, torch.dtype)
    reason = lacks_hopper(device)
    if reason is not None:
        return reason
    if q.shape[3] not in _HEAD_SIZES:
        return f"takes a head size of {' or '.join(map(str, _HEAD_SIZES))}, not {q.shape[3]}"
    if softmax_scale <= 0:
        return f"takes a positive softmax scale, not {softmax_scale}"
    return lacks_float("the output", out_dtype)


def lacks_value_scale(args: tuple[object, ...]) -> str | None:
    """The reason why a kernel for values in e4m3 does not take those of a `scaled_attention`."""
    return "takes values in e4m3, not in bf16" if args[5] is None else None


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    return fits_flash_attention(device, args) or lacks_value_scale(args)


ATTENTION_TRITON = Kernel(
    "attention_triton",
    torch.ops.wancompile.scaled_attention.default,
    torch.ops.wancompile_kernels.attention_triton.default,
    _supports,
)
