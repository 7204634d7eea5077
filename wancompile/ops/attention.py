"""8-bit attention with static per-head scales, the arithmetic of FlashAttention-3's fp8 forward."""

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
    v_scale: Tensor,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Attention on 8-bit q, k, v, without mask (Shah et al. 2024, "FlashAttention-3", 3.3).

    Args:
        q: `[B, H, Sq, D]`, int8 or e4m3.
        k: `[B, H, Sk, D]`, of the dtype of `q`.
        v: `[B, H, Sk, D]`, e4m3 (in units of `v_scale`), or a wider float, which is rounded to it.
        q_scale: `[H]` fp32.
        k_scale: `[H]` fp32.
        v_scale: `[H]` fp32.
        softmax_scale: factor of the logits, usually `D ** -0.5`.
        out_dtype: a float dtype.

    Returns:
        `[B, H, Sq, D]`, laid out in memory as `[B, Sq, H, D]`, in which order the next linear reads
        it. With `S = (q @ k.T) * q_scale * k_scale * softmax_scale` and
        `P = exp(S - rowmax(S))` in fp32, it is `e4m3(256 P) @ v * v_scale / (256 sum(P))`: P is
        rounded to e4m3 where it meets v, as 8-bit tensor cores need it, and summed unrounded.
    """
    check_attention(q, k, v, q_scale, k_scale, v_scale, out_dtype)
    keys, values = decode(k).transpose(-2, -1), decode(quantized_values(v, v_scale))
    logit_scale = (q_scale * k_scale * softmax_scale)[:, None, None]
    out_scale = v_scale[:, None, None] / P_RANGE
    out = empty_output(q, out_dtype)
    batch, heads, tokens, _ = q.shape
    for rows in row_chunks(tokens, batch * heads * k.shape[2], q.device):
        logits = (decode(q[:, :, rows]) @ keys).mul_(logit_scale)
        out[:, :, rows] = _attend(logits, values).mul_(out_scale)
    return out


@scaled_attention.register_fake
def fake_scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
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


def quantized_values(v: Tensor, v_scale: Tensor) -> Tensor:
    """`v` in e4m3, rounded unless it is that already."""
    return v if v.dtype == FP8 else quantize(v, v_scale[:, None, None], FP8)


def _attend(logits: Tensor, values: Tensor) -> Tensor:
    """`P_RANGE` times softmax(logits) @ values, P in e4m3; overwrites `logits`."""
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    total = weights.sum(-1, keepdim=True)
    return (decode(weights.mul_(P_RANGE).to(FP8)) @ values).div_(total)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    out_dtype: torch.dtype,
) -> None:
    """Raise InputError unless the arguments are those of `scaled_attention`."""
    fits = is_8bit(q.dtype) and k.dtype == q.dtype and v.is_floating_point()
    fits = fits and q.dim() == k.dim() == v.dim() == 4 and out_dtype.is_floating_point
    fits = fits and k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    fits = fits and all(is_scale(scale, q.shape[1]) for scale in (q_scale, k_scale, v_scale))
    need = (
        "q [B, H, Sq, D] and k [B, H, Sk, D] both int8 or both float8_e4m3fn, v a float "
        "shaped like k, three scales float32[H], a float out_dtype"
    )
    got = (q, k, v, q_scale, k_scale, v_scale, out_dtype)
    require(fits, "scaled_attention", need, *got)
