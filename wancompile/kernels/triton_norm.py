"""The norms of the residual stream, and the sums into it, in one pass over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, lacks_triton_device
from wancompile.kernels.triton_quantize import as_rows, lacks_row, lacks_type
from wancompile.ops.norm import (
    check_norm,
    check_residual,
    fake_add_gated,
    fake_norm_quantize,
    fake_residual_norm_quantize,
)


@torch.library.custom_op("wancompile_kernels::norm_quantize_triton", mutates_args=())
def norm_quantize_triton(
    x: Tensor,
    weight: Tensor | None,
    weight_offset: Tensor | None,
    bias: Tensor | None,
    bias_offset: Tensor | None,
    rows: Tensor | None,
    eps: float,
    inv_smooth: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`norm_quantize`; each token is read once and stays in registers."""
    check_norm(x, None, None, weight, weight_offset, bias, bias_offset, rows, inv_smooth, dtype)
    operands, offsets = (None, weight, bias), (None, weight_offset, bias_offset)
    return _norm_quantize(x, None, None, operands, offsets, rows, eps, inv_smooth, dtype)


@torch.library.custom_op("wancompile_kernels::residual_norm_quantize_triton", mutates_args=())
def residual_norm_quantize_triton(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    gate_offset: Tensor | None,
    weight: Tensor | None,
    weight_offset: Tensor | None,
    bias: Tensor | None,
    bias_offset: Tensor | None,
    rows: Tensor | None,
    eps: float,
    inv_smooth: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`residual_norm_quantize`; the sum is written once and not read again."""
    check_norm(x, y, gate, weight, weight_offset, bias, bias_offset, rows, inv_smooth, dtype)
    total = x.new_empty(x.shape)
    operands, offsets = (gate, weight, bias), (gate_offset, weight_offset, bias_offset)
    q, scale = _norm_quantize(x, y, total, operands, offsets, rows, eps, inv_smooth, dtype)
    return total, q, scale


@torch.library.custom_op("wancompile_kernels::add_gated_triton", mutates_args=())
def add_gated_triton(
    x: Tensor, y: Tensor, gate: Tensor | None, gate_offset: Tensor | None, rows: Tensor | None
) -> Tensor:
    """`add_gated` in one pass."""
    check_residual(x, y, gate, gate_offset, rows)
    out = x.new_empty(x.shape)
    if out.numel():
        from wancompile.kernels.jit import norm

        gate, gate_offset = _without_gaps(gate), _without_gaps(gate_offset)
        norm.launch_add_gated(as_rows(x), as_rows(y), gate, gate_offset, _contiguous(rows), out)
    return out


@torch.library.custom_op("wancompile_kernels::rms_norm_triton", mutates_args=())
def rms_norm_triton(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> Tensor:
    """`torch.rms_norm` over the last dim; computed in fp32, rounded once, at the end."""
    out = input.new_empty(input.shape)
    if out.numel():
        from wancompile.kernels.jit import norm

        eps = torch.finfo(input.dtype).eps if eps is None else eps
        norm.launch_rms_norm(as_rows(input), _without_gaps(weight), eps, out)
    return out


def _norm_quantize(
    x: Tensor,
    y: Tensor | None,
    total: Tensor | None,
    operands: Sequence[Tensor | None],
    offsets: Sequence[Tensor | None],
    rows: Tensor | None,
    eps: float,
    inv_smooth: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    q = x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if q.numel():
        from wancompile.kernels.jit import norm

        norm.launch_norm_quantize(
            as_rows(x),
            None if y is None else as_rows(y),
            total,
            [_without_gaps(one) for one in operands],
            [_without_gaps(one) for one in offsets],
            _contiguous(rows),
            eps,
            _without_gaps(inv_smooth),
            q,
            scale,
        )
    return q, scale


def _without_gaps(operand: Tensor | None) -> Tensor | None:
    """`operand` with neighbouring channels, wherever its rows are."""
    if operand is None or operand.stride(-1) == 1:
        return operand
    return operand.contiguous()


def _contiguous(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.contiguous()


def _fake_rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> Tensor:
    return input.new_empty(input.shape)


norm_quantize_triton.register_fake(fake_norm_quantize)
residual_norm_quantize_triton.register_fake(fake_residual_norm_quantize)
add_gated_triton.register_fake(fake_add_gated)
rms_norm_triton.register_fake(_fake_rms_norm)


def _supports_quantize(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_type(device, args[-1]) or lacks_row(args[0])


def _supports_add(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_triton_device(device, (8, 0)) or lacks_row(args[0])


def _supports_rms_norm(device: torch.device, args: tuple[object, ...]) -> str | None:
    normalized_shape = args[1]
    assert isinstance(normalized_shape, Sequence)
    if len(normalized_shape) != 1:
        return f"normalizes over the last dim, not over {len(normalized_shape)}"
    return lacks_triton_device(device, (8, 0)) or lacks_row(args[0])


NORM_QUANTIZE_TRITON = Kernel(
    "norm_quantize_triton",
    torch.ops.wancompile.norm_quantize.default,
    torch.ops.wancompile_kernels.norm_quantize_triton.default,
    _supports_quantize,
)
RESIDUAL_NORM_QUANTIZE_TRITON = Kernel(
    "residual_norm_quantize_triton",
    torch.ops.wancompile.residual_norm_quantize.default,
    torch.ops.wancompile_kernels.residual_norm_quantize_triton.default,
    _supports_quantize,
)
ADD_GATED_TRITON = Kernel(
    "add_gated_triton",
    torch.ops.wancompile.add_gated.default,
    torch.ops.wancompile_kernels.add_gated_triton.default,
    _supports_add,
)
RMS_NORM_TRITON = Kernel(
    "rms_norm_triton",
    torch.ops.aten.rms_norm.default,
    torch.ops.wancompile_kernels.rms_norm_triton.default,
    _supports_rms_norm,
)
