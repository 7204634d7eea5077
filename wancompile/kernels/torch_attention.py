"""`scaled_attention` through torch's own attention, which knows no 8-bit types."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_capability, lacks_multiple
from wancompile.ops.attention import check_attention, fake_scaled_attention


@torch.library.custom_op("wancompile_kernels::attention_dequantize_sdpa", mutates_args=())
def attention_dequantize_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_attention` by dequantizing to bf16 and calling SDPA: right everywhere, no faster.

    bf16 holds every int8 and e4m3 value, so k and v are exact; the per-head scales of q and k go
    into q, which rounds it to bf16, and that of v into the result. P is not rounded to 8 bits.
    """
    check_attention(q, k, v, q_scale, k_scale, v_scale, out_dtype)
    logit_scale = (q_scale * k_scale * softmax_scale)[:, None, None]
    out = F.scaled_dot_product_attention(
        (q.to(torch.float32) * logit_scale).to(torch.bfloat16),
        k.to(torch.bfloat16),
        v.to(torch.bfloat16),
        scale=1.0,
    )
    return (out * v_scale[:, None, None]).to(out_dtype).contiguous()


attention_dequantize_sdpa.register_fake(fake_scaled_attention)


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    q = args[0]
    assert isinstance(q, Tensor)
    return lacks_capability(device, (8, 0)) or lacks_multiple("the head size", q.shape[3], 8)


ATTENTION_DEQUANTIZE_SDPA = Kernel(
    "attention_dequantize_sdpa",
    torch.ops.wancompile.scaled_attention.default,
    torch.ops.wancompile_kernels.attention_dequantize_sdpa.default,
    _supports,
)
