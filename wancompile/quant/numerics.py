"""How a float becomes 8 bits and comes back: the reference every op, kernel and pass agrees with.

Both types are symmetric (no zero point): `value = data * scale`. int8 spreads 255 equal steps over
[-amax, amax]; e4m3 (Micikevicius et al. 2022, "FP8 formats for deep learning") has three mantissa
bits, so its step grows with the value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wancompile.errors import InputError, NumericsError

INT8 = torch.int8
FP8 = torch.float8_e4m3fn

QMAX: dict[torch.dtype, int] = {INT8: 127, FP8: 448}
"""Largest magnitude a type may hold. int8 leaves -128 out, so that negation is exact."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Scales are normal fp32 numbers: GPUs may flush smaller ones to 0, and 0 must not divide."""

_CHUNK_ELEMENTS = 1 << 24  # 64 MiB of fp32
_E4M3_VALUES = torch.arange(256, dtype=torch.uint8, device="cpu").view(FP8).float()


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor.

    Invariants:
        `data` is int8 or e4m3, of any shape; int8 never holds -128.
        `scale` is fp32, > 0, with as many dims as `data`; each of its sizes is 1 or that of `data`
        (a weight `[N, K]` has `[N, 1]`, activations `[..., K]` have `[..., 1]`).
        `dequantize() == data.float() * scale`.
    """

    data: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of data and scale together."""
        return self.data.nbytes + self.scale.nbytes

    def dequantize(self) -> Tensor:
        """The fp32 values that the 8 bits stand for."""
        return self.data.float() * self.scale


def absmax(x: Tensor, dim: int | tuple[int, ...], *, keepdim: bool = False) -> Tensor:
    """Largest magnitude over `dim`, in the dtype of `x`; NaN if any element is NaN.

    Two reductions rather than `x.abs().amax()`, which would write a temporary as large as `x`.
    """
    return torch.maximum(x.amax(dim, keepdim=keepdim), -x.amin(dim, keepdim=keepdim))


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp32 scale that maps magnitudes up to `amax` onto `dtype`, `amax / QMAX[dtype]`.

    Where `amax` is 0 the scale is `SMALLEST_SCALE`: one clamp keeps zero rows and rows of subnormal
    numbers from dividing by 0, they still come back as 0 within half a step, and the scale stays
    proportional to the data, which an arbitrary 1 would not be. NaN stays NaN and infinity stays
    infinity, so broken inputs show up in the output.
    """
    return (amax.to(torch.float32) / _qmax(dtype)).clamp_min(SMALLEST_SCALE)


def absmax_scale(x: Tensor, dim: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """fp32 scale of `x` over `dim`, which is kept with size 1; see `scale_of`."""
    return scale_of(absmax(x, dim, keepdim=True), dtype)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x * (1 / scale)` in fp32, rounded half to even and saturated at `QMAX[dtype]`.

    One division for each scale, not one for each value: a GPU divides a dozen times slower than it
    multiplies, and the values are to be rounded to 8 bits anyway.

    Args:
        x: any float dtype.
        scale: fp32, > 0, broadcastable to `x`.
        dtype: `INT8` or `FP8`.

    Returns:
        A tensor of `x`'s shape. e4m3 keeps NaN; int8 has none, so what a NaN becomes there is
        unspecified, and only a dynamic scale (NaN too) makes it visible.
    """
    limit = _qmax(dtype)
    steps = x.to(torch.float32) * scale.reciprocal()
    if dtype == INT8:
        steps.round_()
    return steps.clamp_(-limit, limit).to(dtype)


def quantize_weight(weight: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> QTensor:
    """Quantize a weight `[N, K]` per output channel: data `[N, K]`, scale `[N, 1]`.

    `amax [N, 1]` is the magnitude from which on channels saturate; by default the largest of each.
    Works row chunk by row chunk, so the fp32 temporary never exceeds 64 MiB.

    Raises:
        NumericsError: the weight holds NaN or infinity.
    """
    if weight.dim() != 2:
        raise InputError(f"a weight has two dims [N, K], not the shape {tuple(weight.shape)}")
    scale = absmax_scale(weight, -1, dtype) if amax is None else scale_of(amax, dtype)
    if not weight.is_meta and not bool(torch.isfinite(scale).all()):
        raise NumericsError("the weight holds NaN or infinity")
    data = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        data[rows] = quantize(weight[rows], scale[rows], dtype)
    return QTensor(data, scale)


def decode(data: Tensor) -> Tensor:
    """int8 or e4m3 as fp32, exactly, without the scale.

    A CPU converts e4m3 one element at a time; looking the 256 values up is six times faster.
    """
    if data.dtype != FP8 or data.device.type != "cpu":
        return data.to(torch.float32)
    codes = data.contiguous().view(torch.uint8).to(torch.int32)
    return _E4M3_VALUES.index_select(0, codes.flatten()).reshape(data.shape)


def _qmax(dtype: torch.dtype) -> int:
    if dtype not in QMAX:
        raise InputError(f"8-bit types are {INT8} and {FP8}, not {dtype}")
    return QMAX[dtype]
