"""A norm of the residual stream, its modulation and the rounding to 8 bits, as one op."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wancompile.ops.check import is_8bit, is_scale, require
from wancompile.ops.quantize import quantize_per_token


@torch.library.custom_op("wancompile::norm_quantize", mutates_args=())
def norm_quantize(
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
    """LayerNorm over channels, modulate, quantize each token; nothing is rounded in between.

    Args:
        x: `[B, S, C]`, any float dtype.
        weight: what the normed values are multiplied by; `[C]`, `[B, 1, C]` or `[B, S, C]`, any
            float dtype. None is 1.
        weight_offset: `[C]` fp32, added to `weight`, which must be given then.
        bias: what is added after that, like `weight`. None is 0.
        bias_offset: `[C]` fp32, added to `bias`, which must be given then.
        rows: `[B, S]` int32. Token s reads row `rows[b, s]` of every `[B, S, C]` operand instead of
            row s: rows that are equal can be read from one place, which stays in cache.
        eps: added to the variance.
        inv_smooth: `[C]` fp32 or None, see `quantize_per_token`.
        dtype: int8 or e4m3.

    Returns:
        `q [B, S, C]` in `dtype` and `scale [B, S, 1]` fp32, as `quantize_per_token` gives them for
        `layer_norm(x) * (weight + weight_offset) + (bias + bias_offset)` in fp32.
    """
    check_norm(x, None, None, weight, weight_offset, bias, bias_offset, rows, inv_smooth, dtype)
    y = F.layer_norm(x.to(torch.float32), x.shape[-1:], None, None, eps)
    if weight is not None:
        y = y * operand(weight, weight_offset, rows)
    if bias is not None:
        y = y + operand(bias, bias_offset, rows)
    q, scale = quantize_per_token(y, inv_smooth, dtype)
    return q, scale


@norm_quantize.register_fake
def fake_norm_quantize(
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
    """Shapes and dtypes of `norm_quantize` and of its kernels."""
    check_norm(x, None, None, weight, weight_offset, bias, bias_offset, rows, inv_smooth, dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("wancompile::residual_norm_quantize", mutates_args=())
def residual_norm_quantize(
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
    """`add_gated`, then `norm_quantize` of the sum; arguments as there.

    Returns:
        The sum `[B, S, C]` in the dtype of `x`, and `q` and `scale` of `norm_quantize(sum, ...)`.
    """
    check_norm(x, y, gate, weight, weight_offset, bias, bias_offset, rows, inv_smooth, dtype)
    total = add_gated(x, y, gate, gate_offset, rows)
    modulation = (weight, weight_offset, bias, bias_offset, rows)
    q, scale = norm_quantize(total, *modulation, eps, inv_smooth, dtype)
    return total, q, scale


@residual_norm_quantize.register_fake
def fake_residual_norm_quantize(
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
    """Shapes and dtypes of `residual_norm_quantize` and of its kernels."""
    check_norm(x, y, gate, weight, weight_offset, bias, bias_offset, rows, inv_smooth, dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), scale


@torch.library.custom_op("wancompile::add_gated", mutates_args=())
def add_gated(
    x: Tensor, y: Tensor, gate: Tensor | None, gate_offset: Tensor | None, rows: Tensor | None
) -> Tensor:
    """`x + y * (gate + gate_offset)` in fp32, rounded to the dtype of `x` at the end.

    Args:
        x: `[B, S, C]`, any float dtype.
        y: `[B, S, C]`, any float dtype.
        gate: `[C]`, `[B, 1, C]` or `[B, S, C]`, any float dtype; None is 1.
        gate_offset: `[C]` fp32, added to `gate`, which must be given then.
        rows: `[B, S]` int32, see `norm_quantize`.

    Returns:
        `[B, S, C]`, contiguous.
    """
    check_residual(x, y, gate, gate_offset, rows)
    branch = y.to(torch.float32)
    if gate is not None:
        branch = branch * operand(gate, gate_offset, rows)
    return (x.to(torch.float32) + branch).to(x.dtype).contiguous()


@add_gated.register_fake
def fake_add_gated(
    x: Tensor, y: Tensor, gate: Tensor | None, gate_offset: Tensor | None, rows: Tensor | None
) -> Tensor:
    """Shape and dtype of `add_gated` and of its kernels."""
    check_residual(x, y, gate, gate_offset, rows)
    return x.new_empty(x.shape)


def operand(value: Tensor, offset: Tensor | None, rows: Tensor | None) -> Tensor:
    """What `value + offset` is for each token, fp32, broadcastable to `[B, S, C]`."""
    value = value.to(torch.float32)
    if rows is not None and is_per_token(value):
        value = value.take_along_dim(rows.long()[:, :, None], 1)
    return value if offset is None else value + offset


def is_per_token(value: Tensor) -> bool:
    """Whether a modulation may differ between the tokens of one video."""
    return value.dim() == 3 and not _is_one(value.shape[1])


def check_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, gate_offset: Tensor | None, rows: Tensor | None
) -> None:
    """Raise InputError unless the arguments are those of `add_gated`."""
    fits = x.dim() == 3 and x.is_floating_point() and _is_operand(gate, gate_offset, x)
    fits = fits and y.shape == x.shape and y.is_floating_point() and _is_rows(rows, x)
    need = (
        "x and y float[B, S, C], gate float[C], [B, 1, C] or [B, S, C] or None, gate_offset "
        "float32[C] beside a gate or None, rows int32[B, S] or None"
    )
    require(fits, "add_gated", need, x, y, gate, gate_offset, rows)


def check_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    weight_offset: Tensor | None,
    bias: Tensor | None,
    bias_offset: Tensor | None,
    rows: Tensor | None,
    inv_smooth: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raise InputError unless the arguments are those of the two ops with a norm."""
    if y is not None:
        check_residual(x, y, gate, None, rows)
    fits = x.dim() == 3 and x.is_floating_point() and is_8bit(dtype) and _is_rows(rows, x)
    fits = fits and _is_operand(weight, weight_offset, x) and _is_operand(bias, bias_offset, x)
    fits = fits and (inv_smooth is None or is_scale(inv_smooth, x.shape[-1]))
    need = (
        "x float[B, S, C], weight and bias float[C], [B, 1, C] or [B, S, C] or None, their offsets "
        "float32[C] or None, rows int32[B, S] or None, inv_smooth float32[C] or None, dtype int8 "
        "or float8_e4m3fn"
    )
    got = (x, weight, weight_offset, bias, bias_offset, rows, inv_smooth, dtype)
    require(fits, "norm_quantize", need, *got)


def _is_operand(value: Tensor | None, offset: Tensor | None, x: Tensor) -> bool:
    if value is None:
        return offset is None
    shapes = (x.shape[2:], (x.shape[0], 1, x.shape[2]), x.shape)
    fits = value.is_floating_point() and any(value.shape == shape for shape in shapes)
    return fits and (offset is None or is_scale(offset, x.shape[2]))


def _is_rows(rows: Tensor | None, x: Tensor) -> bool:
    return rows is None or (rows.dtype == torch.int32 and rows.shape == x.shape[:2])


def _is_one(size: int) -> bool:
    return isinstance(size, int) and size == 1
