"""Small random arguments of the semantic ops, and how far rounding may move a value."""

import torch
from torch import Tensor

from wancompile.quant.numerics import FP8, INT8, QMAX

DTYPES = [INT8, FP8]


def random_8bit(*shape: int, dtype: torch.dtype) -> Tensor:
    if dtype == INT8:
        return torch.randint(-127, 128, shape, dtype=INT8)
    return (torch.randn(shape) * 100).clamp(-448, 448).to(FP8)


def linear_args(m: int, k: int, n: int, dtype: torch.dtype, bias: bool = True) -> tuple:
    scales = torch.rand(m, 1) + 0.1, torch.rand(n, 1) + 0.1
    x, w = random_8bit(m, k, dtype=dtype), random_8bit(n, k, dtype=dtype)
    return x, scales[0], w, scales[1], torch.randn(n) if bias else None, torch.float32


def residual_args(
    kind: torch.dtype,
    gate: tuple[int, ...] | None = (2, 1, 5),
    dtype: torch.dtype = torch.float32,
) -> tuple:
    x, x_scale, w, w_scale, bias, _ = linear_args(6, 7, 5, kind)
    residual = torch.randn(2, 3, 5).to(dtype)
    opening = None if gate is None else torch.randn(gate)
    return x.view(2, 3, 7), x_scale.view(2, 3, 1), w, w_scale, bias, residual, opening


def gelu_args(dtype: torch.dtype, form: str = "tanh", smooth: bool = True) -> tuple:
    x, x_scale, w, w_scale, bias, _ = linear_args(6, 7, 5, dtype)
    inverse = torch.rand(5) + 0.5 if smooth else None
    scale = torch.tensor([60.0 if dtype == INT8 else 10.0])
    return x.view(2, 3, 7), x_scale.view(2, 3, 1), w, w_scale, bias, form, inverse, scale, dtype


def attention_args(dtype: torch.dtype, b=2, h=3, sq=5, sk=7, d=8) -> tuple:
    q, k = (random_8bit(b, h, s, d, dtype=dtype) for s in (sq, sk))
    v = random_8bit(b, h, sk, d, dtype=FP8)
    scales = [torch.rand(h) * 2 / QMAX[t] for t in (dtype, dtype, FP8)]
    return q, k, v, *scales, d**-0.5, torch.float32


def queries_scaled(args: tuple) -> tuple:
    """The same with a scale for each query."""
    q, k, v, q_scale, *rest = args
    return q, k, v, torch.rand(*q.shape[:3], 1) * q_scale[:, None, None], *rest


def stream(batch: int, tokens: int, channels: int) -> tuple:
    """x, y, gate `[B, 1, C]` and no offset."""
    x, y = (torch.randn(batch, tokens, channels) for _ in range(2))
    return x, y, torch.randn(batch, 1, channels), None


def modulation(batch: int, tokens: int, channels: int) -> tuple:
    """Weight and bias per token, their offsets, rows, eps and 1/s."""
    weight, bias = (torch.randn(batch, tokens, channels, dtype=torch.bfloat16) for _ in range(2))
    rows = torch.randint(0, tokens, (batch, tokens), dtype=torch.int32)
    offsets = torch.randn(channels), torch.randn(channels)
    smooth = torch.rand(channels) + 0.5
    return weight, offsets[0], bias, offsets[1], rows, 1e-6, smooth


def rotary_args(
    dtype: torch.dtype, weight: bool = True, shift: bool = False, turned: bool = False
) -> tuple:
    x, angle = torch.randn(2, 5, 3 * 8), torch.randn(5, 4)
    w = torch.rand(24) + 0.5 if weight else None
    s = torch.randn(3, 8) if shift else None
    scale = torch.rand(3) * 4 / QMAX[dtype]
    return x, w, 1e-6, angle.cos(), angle.sin(), s, scale, turned, dtype


def float_rotary_args(dtype: torch.dtype = torch.float32, weight: bool = True) -> tuple:
    return *rotary_args(INT8, weight)[:5], dtype


def by_one_scale(args: tuple) -> tuple:
    """The same with one scale for all tokens."""
    return args[0], args[1].flatten()[:1].clone(), *args[2:]


def half_step(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """How far rounding to `dtype` may move a float64 `value`, and a little for fp32 arithmetic."""
    step = 0.5 * scale if dtype == INT8 else value.abs() / 16 + scale / 1024
    return step * 1.001 + 1e-5 * (1 + value.abs())
