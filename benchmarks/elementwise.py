"""Time what moves memory: norms, rotation, GELU and rounding, beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import (
    DEVICE,
    HEAD_SIZE,
    HEADS,
    TOKENS,
    Row,
    activations,
    checked,
    copy_bytes_per_ms,
    differing,
    head_scale,
    label,
    measure,
)
from wancompile import ops
from wancompile.kernels.jit import attention
from wancompile.quant.numerics import FP8, INT8

LAST = 64
"""How many of the last tokens are compared with the plain body."""
EPS = 1e-6

kernels = torch.ops.wancompile_kernels


def time_quantize() -> Iterator[Row]:
    rate = copy_bytes_per_ms()
    yield Row("quantize", "copy", "torch", rate=rate / 1e6)
    for resolution, tokens in TOKENS.items():
        for channels in (5120, 13824):
            x = activations(tokens, channels)
            inv_smooth = torch.rand(channels, device=DEVICE) + 0.5
            for dtype in (INT8, FP8):
                shape = f"{resolution} {channels} {label(dtype)}"
                yield time_per_token(Row("quantize", shape, "per token"), x, None, dtype, rate)
                row = Row("quantize", shape, "per token, smooth")
                yield time_per_token(row, x, inv_smooth, dtype, rate)
        x = activations(1, tokens, HEADS, HEAD_SIZE).transpose(1, 2)
        for dtype in (INT8, FP8):
            row = Row("quantize", f"{resolution} {label(dtype)}", "per head")
            yield time_per_head(row, x, dtype, rate)


def time_per_token(
    row: Row, x: Tensor, smooth: Tensor | None, dtype: torch.dtype, rate: float
) -> Row:
    cpu_smooth = None if smooth is None else smooth.cpu()
    sample = ops.quantize_per_token(x[-LAST:].cpu(), cpu_smooth, dtype)[0]
    return timed(
        row,
        rate,
        3 * x.numel(),
        lambda: kernels.quantize_per_token_triton(x, smooth, dtype)[0],
        lambda out: differing(out[-LAST:], sample),
    )


def time_per_head(row: Row, x: Tensor, dtype: torch.dtype, rate: float) -> Row:
    scale = head_scale(x, dtype)
    sample = ops.quantize_per_head(x[:, :, -LAST:].cpu(), scale.cpu(), dtype)
    return timed(
        row,
        rate,
        3 * x.numel(),
        lambda: kernels.quantize_per_head_triton(x, scale, dtype),
        lambda out: differing(out[:, :, -LAST:], sample),
    )


def time_norms() -> Iterator[Row]:
    rate = copy_bytes_per_ms()
    yield Row("norm", "copy", "torch", rate=rate / 1e6)
    for resolution, tokens in TOKENS.items():
        for channels in (1536, 5120):
            x, y = activations(1, tokens, channels), activations(1, tokens, channels)
            shape = f"{resolution} {channels}"
            yield time_norm(Row("norm", shape, "norm, modulate, int8"), x, rate)
            yield time_add_gated(Row("norm", shape, "x + y * gate"), x, y, rate)
            yield time_rms_norm(Row("norm", shape, "rms_norm"), x, rate)
            for dtype in (INT8, FP8):
                row = Row("norm", f"{shape} {label(dtype)}", "x + y * gate, norm, modulate")
                yield time_residual_norm(row, x, y, None, dtype, rate)
            rows = torch.arange(tokens, device=DEVICE, dtype=torch.int32)[None] // (tokens // 21)
            row = Row("norm", f"{shape} int8", "the same, a row per frame")
            yield time_residual_norm(row, x, y, rows, INT8, rate)


def time_norm(row: Row, x: Tensor, rate: float) -> Row:
    weight, bias = (torch.randn(1, 1, x.shape[2], device=DEVICE).bfloat16() for _ in range(2))
    offsets = torch.randn(2, x.shape[2], device=DEVICE)
    rest = weight, offsets[0], bias, offsets[1], None, EPS, None, INT8
    sample = ops.norm_quantize(x[:, -LAST:], *rest)[0]
    return timed(
        row,
        rate,
        3 * x.numel(),
        lambda: kernels.norm_quantize_triton(x, *rest)[0],
        lambda out: differing(out[:, -LAST:], sample),
    )


def time_residual_norm(
    row: Row, x: Tensor, y: Tensor, rows: Tensor | None, dtype: torch.dtype, rate: float
) -> Row:
    channels = x.shape[2]
    sizes = (1, 1, channels) if rows is None else x.shape
    modulation: list[Tensor] = []
    for _ in range(3):
        value = torch.randn(sizes, device=DEVICE, dtype=torch.bfloat16)
        modulation += [value, torch.randn(channels, device=DEVICE)]
    rest = EPS, None, dtype
    last = None if rows is None else rows[:, -LAST:]
    # Operands with a row per token are cut so that their rows are counted from 0, as `last` does.
    cut = [m[:, : max(LAST, 22)] if m.dim() == 3 and rows is not None else m for m in modulation]
    sample = residual_sample(x[:, -LAST:], y[:, -LAST:], cut, last, rest)
    return timed(
        row,
        rate,
        7 * x.numel(),
        lambda: kernels.residual_norm_quantize_triton(x, y, *modulation, rows, *rest)[1],
        lambda out: differing(out[:, -LAST:], sample),
    )


def residual_sample(
    x: Tensor, y: Tensor, modulation: list[Tensor], rows: Tensor | None, rest: tuple
) -> Tensor:
    """`q` of the plain body."""
    return ops.residual_norm_quantize(x, y, *modulation, rows, *rest)[1]


def time_add_gated(row: Row, x: Tensor, y: Tensor, rate: float) -> Row:
    gate = torch.randn(1, 1, x.shape[2], device=DEVICE, dtype=torch.bfloat16)
    rest = gate, torch.randn(x.shape[2], device=DEVICE), None
    sample = ops.add_gated(x[:, -LAST:], y[:, -LAST:], *rest)
    return timed(
        row,
        rate,
        6 * x.numel(),
        lambda: kernels.add_gated_triton(x, y, *rest),
        lambda out: differing(out[:, -LAST:], sample),
    )


def time_rms_norm(row: Row, x: Tensor, rate: float) -> Row:
    rest = [x.shape[2]], torch.randn(x.shape[2], device=DEVICE, dtype=torch.bfloat16), EPS
    sample = F.rms_norm(x[:, -LAST:], *rest)
    return timed(
        row,
        rate,
        4 * x.numel(),
        lambda: kernels.rms_norm_triton(x, *rest),
        lambda out: differing(out[:, -LAST:], sample),
    )


def time_projections() -> Iterator[Row]:
    """What follows the product of q, k and v, and the one of the MLP."""
    rate = copy_bytes_per_ms()
    yield Row("project", "copy", "torch", rate=rate / 1e6)
    for resolution, tokens in TOKENS.items():
        merged = activations(1, tokens, 3 * HEADS * HEAD_SIZE)
        row = Row("project", f"{resolution} int8", "q: norm, rotate, turn, scales")
        yield time_rotary_per_token(row, merged, INT8, rate)
        row = Row("project", f"{resolution} fp8", "q: norm, rotate, turn")
        yield time_rotary(row, merged, 0, FP8, rate)
        for dtype in (INT8, FP8):
            row = Row("project", f"{resolution} {label(dtype)}", "k: norm, rotate, turn, shift")
            yield time_rotary(row, merged, 1, dtype, rate)
        row = Row("project", f"{resolution} bf16", "q: norm, rotate")
        yield time_float_rotary(row, merged, rate)
        yield time_values(Row("project", resolution, "v: e4m3, transposed"), merged, rate)
        for channels in (8960, 13824):
            x = activations(tokens, channels) / 8
            for form in ("tanh", "none"):
                row = Row("project", f"{resolution} {channels} int8", f"gelu {form}, smooth")
                yield time_gelu(row, x, form, rate)


def time_rotary(row: Row, merged: Tensor, part: int, dtype: torch.dtype, rate: float) -> Row:
    x, weight, _, cos, sin = given = rotary_operands(merged, part)
    shift = torch.randn(HEADS, HEAD_SIZE, device=DEVICE) if part else None
    rest = shift, torch.full((HEADS,), 4 / 127, device=DEVICE), True, dtype
    sample = ops.norm_rotate_quantize(x[:, -LAST:], weight, EPS, cos[-LAST:], sin[-LAST:], *rest)
    return timed(
        row,
        rate,
        3 * x.numel(),
        lambda: kernels.norm_rotate_quantize_triton(*given, *rest),
        lambda out: differing(out[:, :, -LAST:], sample),
    )


def time_rotary_per_token(row: Row, merged: Tensor, dtype: torch.dtype, rate: float) -> Row:
    x, weight, _, cos, sin = given = rotary_operands(merged, 0)
    last = x[:, -LAST:], weight, EPS, cos[-LAST:], sin[-LAST:]
    sample = ops.norm_rotate_quantize_per_token(*last, True, dtype)[0]
    return timed(
        row,
        rate,
        3 * x.numel(),
        lambda: kernels.norm_rotate_quantize_per_token_triton(*given, True, dtype)[0],
        lambda out: differing(out[:, :, -LAST:], sample),
    )


def time_float_rotary(row: Row, merged: Tensor, rate: float) -> Row:
    x, weight, _, cos, sin = given = rotary_operands(merged, 0)
    sample = ops.norm_rotate(x[:, -LAST:], weight, EPS, cos[-LAST:], sin[-LAST:], x.dtype)
    return timed(
        row,
        rate,
        4 * x.numel(),
        lambda: kernels.norm_rotate_triton(*given, x.dtype),
        lambda out: differing(out[:, :, -LAST:], sample),
    )


def rotary_operands(merged: Tensor, part: int) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    """One projection, weight, eps, cosines and sines; those of k lie side by side."""
    tokens, channels = merged.shape[1], HEADS * HEAD_SIZE
    x = merged[..., part * channels : (part + 1) * channels]
    angle = torch.rand(tokens, HEAD_SIZE // 2, device=DEVICE) * 6
    cos, sin = torch.stack([angle.cos(), angle.sin()], -1).unbind(-1) if part else (
        angle.cos(), angle.sin())  # fmt: skip
    return x, torch.rand(channels, device=DEVICE).bfloat16(), EPS, cos, sin


def time_values(row: Row, merged: Tensor, rate: float) -> Row:
    """The error compares sorted bytes of the last channel: the layout mixes tokens."""
    tokens = merged.shape[1]
    v = merged.view(1, tokens, 3, HEADS, HEAD_SIZE)[:, :, 2].transpose(1, 2)
    scale = head_scale(v, FP8)
    plain = ops.quantize_per_head(v[:, -1:].cpu(), scale[-1:].cpu(), FP8)[0, 0, :, -1]

    def error(out: Tensor) -> float:
        channel = out[-1].view(torch.uint8).cpu()
        padding = torch.zeros(channel.numel() - tokens, dtype=torch.uint8)
        expected = torch.cat([plain.view(torch.uint8), padding])
        return differing(channel.sort().values, expected.sort().values)

    return timed(row, rate, 3 * v.numel(), lambda: attention.transpose_values(v, scale), error)


def time_gelu(row: Row, x: Tensor, form: str, rate: float) -> Row:
    smooth = torch.rand(x.shape[1], device=DEVICE) + 0.5
    sample = ops.gelu_quantize(x[-LAST:], form, smooth, INT8)[0]
    return timed(
        row,
        rate,
        3 * x.numel(),
        lambda: kernels.gelu_quantize_triton(x, form, smooth, INT8)[0],
        lambda out: differing(out[-LAST:], sample),
    )


def timed(
    row: Row,
    rate: float,
    moved: int,
    run: Callable[[], Tensor],
    error: Callable[[Tensor], float],
) -> Row:
    """Check and time `run`, which has to move `moved` bytes."""
    return measure(checked(row, lambda: error(run())), moved, run, moved / rate)
