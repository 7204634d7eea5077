"""`norm_rotate` and what also quantizes, in one pass over memory."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_triton_device
from wancompile.kernels.triton_quantize import as_rows, lacks_row, lacks_type
from wancompile.ops.rotary import (
    check_rotate,
    check_rotate_quantize,
    check_rotate_quantize_per_token,
    empty_heads,
    empty_rotated,
    fake_norm_rotate,
    fake_norm_rotate_quantize,
    fake_norm_rotate_quantize_per_token,
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
    is_turned: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`norm_rotate_quantize`; each token is read once and stays in registers."""
    check_rotate_quantize(x, weight, cos, sin, shift, scale, is_turned, dtype)
    out = empty_heads(x, cos, dtype)
    if out.numel():
        from wancompile.kernels.jit import rotary_quantize

        given = as_rows(x), _contiguous(weight), eps, cos, sin, _contiguous(shift)
        rotary_quantize.launch_per_head(*given, scale.contiguous(), is_turned, out)
    return out


@torch.library.custom_op(
    "wancompile_kernels::norm_rotate_quantize_per_token_triton", mutates_args=()
)
def norm_rotate_quantize_per_token_triton(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    is_turned: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`norm_rotate_quantize_per_token`; each token is read once and stays in registers."""
    check_rotate_quantize_per_token(x, weight, cos, sin, is_turned, dtype)
    out = empty_heads(x, cos, dtype)
    scale = x.new_empty((*out.shape[:3], 1), dtype=torch.float32)
    if out.numel():
        from wancompile.kernels.jit import rotary_quantize

        given = as_rows(x), _contiguous(weight), eps, cos, sin
        rotary_quantize.launch_per_token(*given, is_turned, out, scale)
    return out, scale


norm_rotate_triton.register_fake(fake_norm_rotate)
norm_rotate_quantize_triton.register_fake(fake_norm_rotate_quantize)
norm_rotate_quantize_per_token_triton.register_fake(fake_norm_rotate_quantize_per_token)


def _contiguous(operand: Tensor | None) -> Tensor | None:
    return None if operand is None else operand.contiguous()


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_triton_device(device, (8, 0)) or lacks_row(args[0])


def _supports_quantize(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_type(device, args[8]) or lacks_row(args[0])


def _supports_per_token(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_type(device, args[6]) or lacks_row(args[0])


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
NORM_ROTATE_QUANTIZE_PER_TOKEN_TRITON = Kernel(
    "norm_rotate_quantize_per_token_triton",
    torch.ops.wancompile.norm_rotate_quantize_per_token.default,
    torch.ops.wancompile_kernels.norm_rotate_quantize_per_token_triton.default,
    _supports_per_token,
)
