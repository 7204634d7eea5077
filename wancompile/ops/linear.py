"""The 8-bit linear: exact integer or fp32 accumulation, then an fp32 epilogue."""

import functools

import torch
from torch import Tensor

from wancompile.ops.check import is_8bit, is_input_scale, is_scale, require
from wancompile.ops.chunk import row_chunks
from wancompile.quant.numerics import INT8, QMAX, decode

EXACT_K = (1 << 24) // QMAX[INT8] ** 2
"""How many int8 products an fp32 sum holds exactly, whatever their order: 1040."""


@torch.library.custom_op("wancompile::scaled_linear", mutates_args=())
def scaled_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`(x @ weight.T) * x_scale * weight_scale.T + bias`, cast to `out_dtype` at the very end.

    Args:
        x: `[..., K]`, int8 or e4m3.
        x_scale: `[..., 1]` fp32, per token, or `[1]` for all tokens.
        weight: `[N, K]`, of the dtype of `x`.
        weight_scale: `[N, 1]` fp32, per output channel.
        bias: `[N]`, any float dtype.
        out_dtype: a float dtype.

    Returns:
        `[..., N]`. int8 products are summed exactly in int32 and rounded once, to fp32; e4m3
        products are exact in fp32 and summed there. The epilogue is fp32, in the order above.
    """
    check_scaled_linear(x, x_scale, weight, weight_scale, bias, out_dtype)
    tokens = x.reshape(-1, x.shape[-1])
    scales = x_scale.reshape(-1, 1).expand(tokens.shape[0], 1)
    multiplier = weight.contiguous() if x.dtype == INT8 else decode(weight)
    multiply = int8_matmul if x.dtype == INT8 else _fp8_matmul
    out = x.new_empty((tokens.shape[0], weight.shape[0]), dtype=out_dtype)
    for rows in row_chunks(out.shape[0], out.shape[1], x.device):
        product = multiply(tokens[rows], multiplier)
        out[rows] = epilogue(product, scales[rows], weight_scale, bias, out_dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


@scaled_linear.register_fake
def fake_scaled_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Shape and dtype of `scaled_linear` and of its kernels."""
    check_scaled_linear(x, x_scale, weight, weight_scale, bias, out_dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


@torch.library.custom_op("wancompile::scaled_linear_residual", mutates_args=())
def scaled_linear_residual(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """`residual + linear * gate`, in fp32 and rounded once, the linear as in `scaled_linear`.

    Args:
        x: `[B, S, K]`, int8 or e4m3.
        x_scale: `[B, S, 1]` fp32, per token, or `[1]` for all tokens.
        weight: `[N, K]`, of the dtype of `x`.
        weight_scale: `[N, 1]` fp32, per output channel.
        bias: `[N]`, any float dtype, or None.
        residual: `[B, S, N]`, any float dtype.
        gate: `[N]` or `[B, 1, N]`, any float dtype; None is 1.

    Returns:
        `[B, S, N]` in the dtype of `residual`, contiguous.
    """
    check_scaled_linear_residual(x, x_scale, weight, weight_scale, bias, residual, gate)
    branch = scaled_linear(x, x_scale, weight, weight_scale, bias, torch.float32)
    if gate is not None:
        branch = branch * gate.to(torch.float32)
    total: Tensor = residual.to(torch.float32) + branch
    return total.to(residual.dtype).contiguous()


@scaled_linear_residual.register_fake
def fake_scaled_linear_residual(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """Shape and dtype of `scaled_linear_residual` and of its kernels."""
    check_scaled_linear_residual(x, x_scale, weight, weight_scale, bias, residual, gate)
    return residual.new_empty(residual.shape)


def check_scaled_linear_residual(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> None:
    """Raise InputError unless the arguments are those of `scaled_linear_residual`."""
    check_scaled_linear(x, x_scale, weight, weight_scale, bias, torch.float32)
    features = weight.shape[0]
    fits = x.dim() == 3 and residual.is_floating_point()
    fits = fits and residual.shape == (*x.shape[:2], features)
    if gate is not None:
        fits = fits and gate.is_floating_point()
        fits = fits and gate.shape in ((features,), (x.shape[0], 1, features))
    need = "x [B, S, K], residual float[B, S, N], gate float[N] or [B, 1, N] or None"
    require(fits, "scaled_linear_residual", need, x, residual, gate)


def check_scaled_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Raise InputError unless the arguments are those of `scaled_linear`."""
    fits = is_8bit(x.dtype) and weight.dtype == x.dtype and out_dtype.is_floating_point
    fits = fits and x.dim() >= 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    fits = fits and is_scale(weight_scale, weight.shape[0], 1)
    fits = fits and is_input_scale(x_scale, x)
    if bias is not None:
        fits = fits and bias.is_floating_point() and bias.shape == weight.shape[:1]
    need = (
        "x [..., K] and weight [N, K] both int8 or both float8_e4m3fn, x_scale float32[..., 1] or "
        "[1], weight_scale float32[N, 1], bias float[N] or None, a float out_dtype"
    )
    require(fits, "scaled_linear", need, x, x_scale, weight, weight_scale, bias, out_dtype)


def row_scales(x_scale: Tensor) -> Tensor:
    """Return the scales of tokens as a contiguous `[M, 1]`, or the `[1]` of all tokens as it is."""
    return x_scale if x_scale.dim() == 1 else x_scale.reshape(-1, 1).contiguous()


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """int8 `[M, K]` by int8 `[N, K]` to `[M, N]` int32, exact for every shape and device."""
    # With K = 1 a transposed weight has strides (1, 1), which torch._int_mm misreads on a CPU.
    if x.device.type == "cpu" and x.shape[1] > 1 and _int_mm_is_exact():
        return torch._int_mm(x.contiguous(), weight.contiguous().t())
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], EXACT_K):
        columns = slice(start, start + EXACT_K)
        total += (decode(x[:, columns]) @ decode(weight[:, columns]).t()).to(torch.int32)
    return total


def _fp8_matmul(x: Tensor, decoded_weight: Tensor) -> Tensor:
    return decode(x) @ decoded_weight.t()


def epilogue(
    product: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`product * x_scale * weight_scale.T + bias` in fp32, cast; product `[M, N]` int32 or fp32."""
    out = product * x_scale.reshape(-1, 1)
    out.mul_(weight_scale.t())
    if bias is not None:
        out.add_(bias)
    return out.to(out_dtype)


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` is right on this CPU.

    Without VNNI instructions oneDNN adds pairs of products in int16, which saturates silently.
    """
    x = torch.full((64, 256), QMAX[INT8], dtype=INT8, device="cpu")
    return bool((torch._int_mm(x, x.t()) == x.shape[1] * QMAX[INT8] ** 2).all())
