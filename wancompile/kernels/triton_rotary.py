"""`norm_rotate` and `norm_rotate_quantize` in one pass over memory."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_triton_device
from wancompile.kernels.triton_quantize import as_rows, lacks_row, lacks_type
from wancompile.ops.rotary import (
    check_rotate,
    check_rotate_quantize,
    empty_rotated,
    fake_norm_rotate,
    fake_norm_rotate_quantize,
)


@torch.library.custom_op("wancompile_kernels::norm_rotate_triton", mutates_args=())
def norm_rotate_triton(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, dtype: torch.dtype
) -> Tensor:
    """`norm_rotate`; each token is read once and stays in registers."""
    check_rotate(x, weight, cos, sin, dtype)
    out = empty_rotated(x, cos, dtype)
    if out.numel():
        from wancompile.kernels.jit import rotary

        rotary.launch(as_rows(x), _contiguous(weight), eps, cos, sin, out)
    return out


@torch.library.custom_op("wancompile_kernels::norm_rotate_quantize_triton", mutates_args=())
def norm_rotate_quantize_triton(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`norm_rotate_quantize`; each token is read once and stays in registers."""
    check_rotate_quantize(x, weight, cos, sin, shift, scale, dtype)
    batch, tokens, channels = x.shape
    heads = scale.shape[0]
    out = x.new_empty((batch, heads, tokens, channels // heads), dtype=dtype)
    if out.numel():
        from wancompile.kernels.jit import rotary

        weight, shift = _contiguous(weight), _contiguous(shift)
        rotary.launch_quantize(as_rows(x), weight, eps, cos, sin, shift, scale.contiguous(), out)
    return out


norm_rotate_triton.register_fake(fake_norm_rotate)
norm_rotate_quantize_triton.register_fake(fake_norm_rotate_quantize)


def _contiguous(operand: Tensor | None) -> Tensor | None:
    return None if operand is None else operand.contiguous()


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_triton_device(device, (8, 0)) or lacks_row(args[0])


def _supports_quantize(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_type(device, args[7]) or lacks_row(args[0])


NORM_ROTATE_TRITON = Kernel(
    "norm_rotate_triton",
    torch.ops.wancompile.norm_rotate.default,
    torch.ops.wancompile_kernels.norm_rotate_triton.default,
    _supports,
)
NORM_ROTATE_QUANTIZE_TRITON = Kernel(
    "norm_rotate_quantize_triton",
    torch.ops.wancompile.norm_rotate_quantize.default,
    torch.ops.wancompile_kernels.norm_rotate_quantize_triton.default,
    _supports_quantize,
)
