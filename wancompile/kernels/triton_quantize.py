"""`quantize_per_token`, `_per_tensor` and `_per_head` in one pass over memory."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_triton_device
from wancompile.ops.quantize import (
    check_per_head,
    check_per_tensor,
    check_per_token,
    fake_quantize_per_head,
    fake_quantize_per_tensor,
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
    if q.numel():
        from wancompile.kernels.jit import quantize

        smooth = None if inv_smooth is None else inv_smooth.contiguous()
        quantize.launch_per_token(as_rows(x), smooth, q, scale)
    return q, scale


@torch.library.custom_op("wancompile_kernels::quantize_per_tensor_triton", mutates_args=())
def quantize_per_tensor_triton(
    x: Tensor, inv_smooth: Tensor | None, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`quantize_per_tensor`, bit for bit as a CPU computes it."""
    check_per_tensor(x, inv_smooth, scale, dtype)
    q = x.new_empty(x.shape, dtype=dtype)
    if q.numel():
        from wancompile.kernels.jit import quantize

        smooth = None if inv_smooth is None else inv_smooth.contiguous()
        quantize.launch_per_tensor(as_rows(x), smooth, scale, q)
    return q


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
quantize_per_tensor_triton.register_fake(fake_quantize_per_tensor)
quantize_per_head_triton.register_fake(fake_quantize_per_head)


def as_rows(x: Tensor) -> Tensor:
    """`x [..., K]` as `[M, K]` without gaps inside rows; copied only where no view is that."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def lacks_type(device: torch.device, dtype: object) -> str | None:
    """The reason why a Triton kernel that rounds to `dtype` cannot run on `device`."""
    return lacks_triton_device(device, (8, 9) if dtype == FP8 else (8, 0))


def lacks_row(x: object, name: str = "K", most: int = _MOST_CHANNELS) -> str | None:
    """The reason why a kernel that keeps the last dim of `x` in registers does not take it."""
    assert isinstance(x, Tensor)
    channels = x.shape[-1]
    if not isinstance(channels, int):
        return f"{name} is not static"
    return None if channels <= most else f"{name}={channels} is more than {most}"


def _supports_per_token(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_type(device, args[2]) or lacks_row(args[0])


def _supports_per_tensor(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_type(device, args[3]) or lacks_row(args[0])


def _supports_per_head(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_type(device, args[2]) or lacks_row(args[0], "the head size", _MOST_HEAD_CHANNELS)


QUANTIZE_PER_TOKEN_TRITON = Kernel(
    "quantize_per_token_triton",
    torch.ops.wancompile.quantize_per_token.default,
    torch.ops.wancompile_kernels.quantize_per_token_triton.default,
    _supports_per_token,
)
QUANTIZE_PER_TENSOR_TRITON = Kernel(
    "quantize_per_tensor_triton",
    torch.ops.wancompile.quantize_per_tensor.default,
    torch.ops.wancompile_kernels.quantize_per_tensor_triton.default,
    _supports_per_tensor,
)
QUANTIZE_PER_HEAD_TRITON = Kernel(
    "quantize_per_head_triton",
    torch.ops.wancompile.quantize_per_head.default,
    torch.ops.wancompile_kernels.quantize_per_head_triton.default,
    _supports_per_head,
)
