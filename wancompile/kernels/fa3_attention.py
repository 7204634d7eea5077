"""`scaled_attention` through FlashAttention-3's fp8 forward, if its package is installed."""

import importlib
import importlib.util

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_dtype, lacks_hopper
from wancompile.kernels.triton_attention import lacks_value_scale
from wancompile.ops.attention import check_attention, empty_output, fake_scaled_attention
from wancompile.quant.numerics import FP8

_HEAD_SIZES = (64, 128)


@torch.library.custom_op("wancompile_kernels::attention_fa3", mutates_args=())
def attention_fa3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor | None,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_attention` for e4m3 q and k (Shah et al. 2024, "FlashAttention-3").

    It rounds P relative to the maximum so far and gives bf16, which is cast if need be.
    """
    check_attention(q, k, v, q_scale, k_scale, v_scale, out_dtype)
    assert v_scale is not None
    assert q_scale.dim() == 1
    if not q.numel() or not k.numel():
        return empty_output(q, out_dtype).zero_()
    importlib.import_module("fa3_fwd._C")  # defines the op
    if v.dtype != FP8:
        v = torch.ops.wancompile_kernels.quantize_per_head_triton(v, v_scale, FP8)
    batch = q.shape[0]
    operands = (one.transpose(1, 2) for one in (q.contiguous(), k.contiguous(), v.contiguous()))
    scales = (one.expand(batch, -1).contiguous() for one in (q_scale, k_scale, v_scale))
    named = dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True))
    out: Tensor = torch.ops.fa3_fwd.fwd(*operands, **named, softmax_scale=softmax_scale)[0]
    return out.to(out_dtype).transpose(1, 2)


attention_fa3.register_fake(fake_scaled_attention)


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    q = args[0]
    assert isinstance(q, Tensor)
    reason = lacks_hopper(device)
    if reason is not None:
        return reason
    if importlib.util.find_spec("fa3_fwd") is None:
        return "the package fa3-fwd is not installed (wancompile[hopper])"
    if q.shape[3] not in _HEAD_SIZES:
        return f"takes a head size of {' or '.join(map(str, _HEAD_SIZES))}, not {q.shape[3]}"
    return lacks_dtype(q, FP8) or lacks_value_scale(args) or _lacks_head_scale(args[3])


def _lacks_head_scale(q_scale: object) -> str | None:
    assert isinstance(q_scale, Tensor)
    return None if q_scale.dim() == 1 else "takes one scale for the queries of a head, not for each"


ATTENTION_FA3 = Kernel(
    "attention_fa3",
    torch.ops.wancompile.scaled_attention.default,
    torch.ops.wancompile_kernels.attention_fa3.default,
    _supports,
)
