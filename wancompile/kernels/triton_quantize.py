"""`quantize_per_token` and `quantize_per_head` in one pass over memory."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_triton_device
from wancompile.ops.quantize import (
    check_per_head,
    check_per_token,
    fake_quantize_per_head,
    fake_quantize_per_token,
)
from wancompile.quant.numerics import FP8

_MOST_CHANNELS = 1 << 14
_MOST_HEAD_CHANNELS = 256


@torch.library.custom_op("wancompile_kernels::quantize_per_token_triton", mutates_args=())
def quantize_per_token_triton(
    x: Tensor, inv_smooth: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`quantize_per_token`, bit for bit as a CPU computes it; each row is read once."""
    check_per_token(x, inv_smooth, dtype)
    q = x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    rows = x.reshape(-1, x.shape[-1])
    if rows.numel():
        from wancompile.kernels.jit import quantize

        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        smooth = None if inv_smooth is None else inv_smooth.contiguous()
        quantize.launch_per_token(rows, smooth, q, scale)
    return q, scale


@torch.library.custom_op("wancompile_kernels::quantize_per_head_triton", mutates_args=())
def quantize_per_head_triton(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`quantize_per_head`, bit for bit as a CPU computes it, from any strides."""
    check_per_head(x, scale, dtype)
    q = x.new_empty(x.shape, dtype=dtype)
    if q.numel():
        from wancompile.kernels.jit import quantize

        quantize.launch_per_head(x, scale.contiguous(), q)
    return q


quantize_per_token_triton.register_fake(fake_quantize_per_token)
quantize_per_head_triton.register_fake(fake_quantize_per_head)


def _supports_per_token(device: torch.device, args: tuple[object, ...]) -> str | None:
    return _refuses(device, args, "K", _MOST_CHANNELS)


def _supports_per_head(device: torch.device, args: tuple[object, ...]) -> str | None:
    return _refuses(device, args, "the head size", _MOST_HEAD_CHANNELS)


def _refuses(device: torch.device, args: tuple[object, ...], name: str, most: int) -> str | None:
    x, _, dtype = args
    assert isinstance(x, Tensor)
    channels = x.shape[-1]
    reason = lacks_triton_device(device, (8, 9) if dtype == FP8 else (8, 0))
    if reason is not None:
        return reason
    if not isinstance(channels, int):
        return f"{name} is not static"
    return None if channels <= most else f"{name}={channels} is more than {most}"


QUANTIZE_PER_TOKEN_TRITON = Kernel(
    "quantize_per_token_triton",
    torch.ops.wancompile.quantize_per_token.default,
    torch.ops.wancompile_kernels.quantize_per_token_triton.default,
    _supports_per_token,
)
QUANTIZE_PER_HEAD_TRITON = Kernel(
    "quantize_per_head_triton",
    torch.ops.wancompile.quantize_per_head.default,
    torch.ops.wancompile_kernels.quantize_per_head_triton.default,
    _supports_per_head,
)
