"""`scaled_linear` through the matrix products that ship with torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_capability, lacks_dtype, lacks_multiple
from wancompile.ops.linear import check_scaled_linear, epilogue, fake_scaled_linear
from wancompile.quant.numerics import FP8, INT8

_INT_MM_LEAST_ROWS = 17
_BIAS_LEAST_ROWS = 128


@torch.library.custom_op("wancompile_kernels::fp8_linear_scaled_mm", mutates_args=())
def fp8_linear_scaled_mm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_linear` for e4m3 through `torch._scaled_mm` with row-wise scales.

    The product knows bf16 output only, so the bias (of more than a few rows) is rounded to bf16 on
    the way in, and the result before it is cast. Fast accumulation keeps fewer bits of the running
    sum than fp32 has.
    """
    check_scaled_linear(x, x_scale, weight, weight_scale, bias, out_dtype)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    # cuBLAS refuses a bias in some row-wise products of few rows.
    takes_bias = bias is not None and rows.shape[0] >= _BIAS_LEAST_ROWS
    out = torch._scaled_mm(
        rows,
        weight.contiguous().t(),
        scale_a=x_scale.reshape(-1, 1).expand(rows.shape[0], 1).contiguous(),
        scale_b=weight_scale.reshape(1, -1).contiguous(),
        bias=bias.to(torch.bfloat16) if bias is not None and takes_bias else None,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    if bias is not None and not takes_bias:
        out = out.float().add_(bias)
    return out.to(out_dtype).view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("wancompile_kernels::int8_linear_int_mm", mutates_args=())
def int8_linear_int_mm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_linear` for int8 through `torch._int_mm`, bit for bit, the epilogue done after it."""
    check_scaled_linear(x, x_scale, weight, weight_scale, bias, out_dtype)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    count = rows.shape[0]
    if count < _INT_MM_LEAST_ROWS:
        rows = F.pad(rows, (0, 0, 0, _INT_MM_LEAST_ROWS - count))
    product = torch._int_mm(rows, weight.contiguous().t())
    out = epilogue(product[:count], x_scale, weight_scale, bias, out_dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


fp8_linear_scaled_mm.register_fake(fake_scaled_linear)
int8_linear_int_mm.register_fake(fake_scaled_linear)


def _supports_scaled_mm(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_capability(device, (8, 9)) or _refuses_weight(args, FP8, 16)


def _supports_int_mm(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_capability(device, (8, 0)) or _refuses_weight(args, INT8, 8)


def _refuses_weight(args: tuple[object, ...], dtype: torch.dtype, divisor: int) -> str | None:
    weight = args[2]
    assert isinstance(weight, Tensor)
    out_features, in_features = weight.shape
    return (
        lacks_dtype(weight, dtype)
        or lacks_multiple("K", in_features, divisor)
        or lacks_multiple("N", out_features, divisor)
    )


FP8_LINEAR_SCALED_MM = Kernel(
    "fp8_linear_scaled_mm",
    torch.ops.wancompile.scaled_linear.default,
    torch.ops.wancompile_kernels.fp8_linear_scaled_mm.default,
    _supports_scaled_mm,
)
INT8_LINEAR_INT_MM = Kernel(
    "int8_linear_int_mm",
    torch.ops.wancompile.scaled_linear.default,
    torch.ops.wancompile_kernels.int8_linear_int_mm.default,
    _supports_int_mm,
)
