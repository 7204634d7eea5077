"""`scaled_linear` for Hopper, also with a residual: warps that load feed warps that multiply."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel, aligned, lacks_float, lacks_gluon
from wancompile.kernels.product import product
from wancompile.kernels.triton_linear import fits_tensor_cores
from wancompile.ops.linear import (
    check_scaled_linear,
    check_scaled_linear_residual,
    fake_scaled_linear,
    fake_scaled_linear_residual,
    row_scales,
)


@torch.library.custom_op("wancompile_kernels::linear_hopper", mutates_args=())
def linear_hopper(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_linear`, as `linear_triton` computes it: int8 is the plain body bit for bit."""
    check_scaled_linear(x, x_scale, weight, weight_scale, bias, out_dtype)
    from wancompile.kernels.jit.linear_hopper import launch

    return product(launch, x, x_scale, weight, weight_scale, bias, out_dtype)


linear_hopper.register_fake(fake_scaled_linear)


@torch.library.custom_op("wancompile_kernels::linear_residual_hopper", mutates_args=())
def linear_residual_hopper(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """`scaled_linear_residual` in one pass over memory; int8 is the plain body bit for bit.

    Where each video has a gate of its own, there is one launch a video.
    """
    check_scaled_linear_residual(x, x_scale, weight, weight_scale, bias, residual, gate)
    out = residual.new_empty(residual.shape)
    if not out.numel():
        return out
    from wancompile.kernels.jit import linear_hopper as jit

    weight, weight_scale = aligned(weight), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    gates = _gates(gate)
    one = x_scale.dim() == 1
    scales = [x_scale] * len(gates) if one else _parts(x_scale, len(gates))
    parts = (_parts(rows, len(gates)) for rows in (x, residual, out))
    for q, added, to, scale, factors in zip(*parts, scales, gates, strict=True):
        jit.launch(
            aligned(q),
            row_scales(scale),
            weight,
            weight_scale,
            bias,
            to,
            residual=aligned(added),
            gate=factors,
        )
    return out


linear_residual_hopper.register_fake(fake_scaled_linear_residual)


def _gates(gate: Tensor | None) -> Sequence[Tensor | None]:
    """What each launch multiplies with, `[N]` fp32."""
    if gate is None:
        return [None]
    return gate.to(torch.float32).reshape(-1, gate.shape[-1]).contiguous().unbind()


def _parts(rows: Tensor, count: int) -> Sequence[Tensor]:
    """Cut `[B, S, n]` into the rows of `count` launches, views where `rows` is contiguous."""
    return rows.reshape(count, -1, rows.shape[-1]).unbind()


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    return fits_tensor_cores(device, args) or lacks_gluon()


def _supports_residual(device: torch.device, args: tuple[object, ...]) -> str | None:
    *linear, residual, _gate = args
    assert isinstance(residual, Tensor)
    lacking = lacks_float("the residual", residual.dtype)
    return lacking or _supports(device, (*linear, residual.dtype))


LINEAR_HOPPER = Kernel(
    "linear_hopper",
    torch.ops.wancompile.scaled_linear.default,
    torch.ops.wancompile_kernels.linear_hopper.default,
    _supports,
)

LINEAR_RESIDUAL_HOPPER = Kernel(
    "linear_residual_hopper",
    torch.ops.wancompile.scaled_linear_residual.default,
    torch.ops.wancompile_kernels.linear_residual_hopper.default,
    _supports_residual,
)
