"""Attention through torch's own, which knows no 8-bit types."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_capability, lacks_multiple
from wancompile.ops.attention import (
    check_attention,
    empty_output,
    fake_scaled_attention,
    per_token,
    quantized_values,
)

_MOST_HEAD_CHANNELS = 128
_LEAST_KEYS = 2  # cuDNN refuses attention to a single key


@torch.library.custom_op("wancompile_kernels::attention_dequantize_sdpa", mutates_args=())
def attention_dequantize_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor | None,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_attention` by dequantizing to bf16 and calling SDPA: right everywhere, no faster.

    bf16 holds every int8 and e4m3 value, so k and v are exact; the scales of q and k go into q,
    which rounds it to bf16, and that of v into the result. P is rounded to bf16.
    """
    check_attention(q, k, v, q_scale, k_scale, v_scale, out_dtype)
    logit_scale = per_token(q_scale) * (k_scale * softmax_scale)[:, None, None]
    out = F.scaled_dot_product_attention(
        (q.to(torch.float32) * logit_scale).to(torch.bfloat16),
        k.to(torch.bfloat16),
        quantized_values(v, v_scale).to(torch.bfloat16),
        scale=1.0,
    )
    return empty_output(q, out_dtype).copy_(
        out if v_scale is None else out * v_scale[:, None, None]
    )


attention_dequantize_sdpa.register_fake(fake_scaled_attention)


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    q = args[0]
    assert isinstance(q, Tensor)
    return lacks_capability(device, (8, 0)) or lacks_multiple("the head size", q.shape[3], 8)


@torch.library.custom_op("wancompile_kernels::attention_cudnn", mutates_args=())
def attention_cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """`scaled_dot_product_attention` through cuDNN, laid out in memory like the query."""
    if not query.numel() or key.shape[2] < _LEAST_KEYS:
        empty = _fake_attention_cudnn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
        return empty.copy_(F.scaled_dot_product_attention(query, key, value, scale=scale))
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    out: Tensor = cudnn(query, key, value, None, False, 0.0, False, False, scale=scale)[0]
    return out


def _fake_attention_cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    strides = query.stride()
    order = sorted(range(4), key=lambda dim: -strides[dim])
    back = sorted(range(4), key=lambda dim: order[dim])
    sizes = (*query.shape[:3], value.shape[3])
    return query.new_empty([sizes[dim] for dim in order]).permute(back)


attention_cudnn.register_fake(_fake_attention_cudnn)


def _supports_cudnn(device: torch.device, args: tuple[object, ...]) -> str | None:
    query, key, value, attn_mask, dropout_p, is_causal, _, enable_gqa = args
    assert isinstance(query, Tensor)
    assert isinstance(key, Tensor)
    assert isinstance(value, Tensor)
    reason = lacks_capability(device, (9, 0))
    if reason is not None:
        return reason
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        return "takes neither mask nor dropout, and is neither causal nor grouped"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"takes 16-bit floats, not {query.dtype}"
    if query.dim() != 4:
        return f"takes [B, H, S, D], not {query.dim()} dims"
    for size in (query.shape[3], value.shape[3]):
        if size > _MOST_HEAD_CHANNELS:
            return f"the head size={size} is more than {_MOST_HEAD_CHANNELS}"
    return lacks_multiple("the head size", query.shape[3], 8) or lacks_multiple(
        "the head size", value.shape[3], 8
    )


ATTENTION_DEQUANTIZE_SDPA = Kernel(
    "attention_dequantize_sdpa",
    torch.ops.wancompile.scaled_attention.default,
    torch.ops.wancompile_kernels.attention_dequantize_sdpa.default,
    _supports,
)
ATTENTION_CUDNN = Kernel(
    "attention_cudnn",
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.wancompile_kernels.attention_cudnn.default,
    _supports_cudnn,
)
