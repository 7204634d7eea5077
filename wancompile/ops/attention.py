"""Attention with q and k in 8 bits, scales per head or of q per token; v and P in e4m3 or bf16."""

import torch
from torch import Tensor

from wancompile.ops.check import is_8bit, is_scale, require
from wancompile.ops.chunk import row_chunks
from wancompile.quant.numerics import FP8, decode, quantize

P_RANGE = 256.0
"""Probabilities are stored times 2**8: a power of two, so exact, and the largest one below 448."""


@torch.library.custom_op("wancompile::scaled_attention", mutates_args=())
def scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor | None,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Attention on 8-bit q, k, v, without mask (Shah et al. 2024, "FlashAttention-3", 3.3).

    Args:
        q: `[B, H, Sq, D]`, int8 or e4m3.
        k: `[B, H, Sk, D]`, of the dtype of `q`.
        v: `[B, H, Sk, D]`. With a `v_scale` e4m3 in units of it, or a wider float, which is
            rounded to that; without, a float, which is rounded to bf16.
        q_scale: `[H]` fp32, one for each head, or `[B, H, Sq, 1]`, one for each token of it.
        k_scale: `[H]` fp32.
        v_scale: `[H]` fp32, or None for a product by v in bf16.
        softmax_scale: factor of the logits, usually `D ** -0.5`.
        out_dtype: a float dtype.

    Returns:
        `[B, H, Sq, D]`, laid out in memory as `[B, Sq, H, D]`, in which order the next linear reads
        it. With `S = (q @ k.T) * q_scale * k_scale * softmax_scale` and
        `P = exp(S - rowmax(S))` in fp32, it is `e4m3(256 P) @ v * v_scale / (256 sum(P))`, or the
        same with bf16: P is rounded where it meets v, as tensor cores need it, and summed
        unrounded.
    """
    check_attention(q, k, v, q_scale, k_scale, v_scale, out_dtype)
    rounded = quantized_values(v, v_scale)
    keys, values = decode(k).transpose(-2, -1), decode(rounded)
    logit_scale = per_token(q_scale) * (k_scale * softmax_scale)[:, None, None]
    logit_scale = logit_scale.expand(q.shape[0], -1, q.shape[2], -1)
    out_scale = 1 / P_RANGE if v_scale is None else v_scale[:, None, None] / P_RANGE
    out = empty_output(q, out_dtype)
    batch, heads, tokens, _ = q.shape
    for rows in row_chunks(tokens, batch * heads * k.shape[2], q.device):
        logits = (decode(q[:, :, rows]) @ keys).mul_(logit_scale[:, :, rows])
        out[:, :, rows] = _attend(logits, values, rounded.dtype).mul_(out_scale)
    return out


@scaled_attention.register_fake
def fake_scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor | None,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Shape and dtype of `scaled_attention` and of its kernels."""
    check_attention(q, k, v, q_scale, k_scale, v_scale, out_dtype)
    return empty_output(q, out_dtype)


def empty_output(q: Tensor, dtype: torch.dtype) -> Tensor:
    """An output `[B, H, Sq, D]` to fill, laid out as `[B, Sq, H, D]`."""
    batch, heads, tokens, channels = q.shape
    return q.new_empty((batch, tokens, heads, channels), dtype=dtype).transpose(1, 2)


def per_token(q_scale: Tensor) -> Tensor:
    """`q_scale` as it broadcasts to q `[B, H, Sq, D]`: `[H, 1, 1]` or `[B, H, Sq, 1]`."""
    return q_scale[:, None, None] if q_scale.dim() == 1 else q_scale


def quantized_values(v: Tensor, v_scale: Tensor | None) -> Tensor:
    """`v` in e4m3, rounded unless it is that already; in bf16 where there is no `v_scale`."""
    if v_scale is None:
        return v.to(torch.bfloat16)
    return v if v.dtype == FP8 else quantize(v, v_scale[:, None, None], FP8)


def _attend(logits: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`P_RANGE` times softmax(logits) @ values, P in `dtype`; overwrites `logits`."""
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    total = weights.sum(-1, keepdim=True)
    return (decode(weights.mul_(P_RANGE).to(dtype)) @ values).div_(total)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Raise InputError unless the arguments are those of `scaled_attention`."""
    fits = is_8bit(q.dtype) and k.dtype == q.dtype and v.is_floating_point()
    fits = fits and q.dim() == k.dim() == v.dim() == 4 and out_dtype.is_floating_point
    fits = fits and k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    fits = fits and (v_scale is not None or v.dtype != FP8)
    fits = fits and _is_query_scale(q_scale, q)
    scales = (k_scale,) if v_scale is None else (k_scale, v_scale)
    fits = fits and all(is_scale(scale, q.shape[1]) for scale in scales)
    need = (
        "q [B, H, Sq, D] and k [B, H, Sk, D] both int8 or both float8_e4m3fn, v a float "
        "shaped like k, scales float32[H] (of q float32[B, H, Sq, 1], too, of v only if it is "
        "rounded to 8 bits), a float out_dtype"
    )
    got = (q, k, v, q_scale, k_scale, v_scale, out_dtype)
    require(fits, "scaled_attention", need, *got)


def _is_query_scale(q_scale: Tensor, q: Tensor) -> bool:
    if q_scale.dim() == 1:
        return is_scale(q_scale, q.shape[1])
    return is_scale(q_scale, *q.shape[:3], 1)
