"""Static scales of 8-bit attention, from the ranges that calibration saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wancompile.quant.lines import HALVES
from wancompile.quant.numerics import FP8, scale_of
from wancompile.quant.stats import HeadStats

_LEAST_GAIN = 0.05


@dataclass(frozen=True, eq=False)
class HeadScales:
    """The scales of one attention, and what is subtracted from its keys before they are rounded.

    `q`, `k` and `v` are fp32 `[H]`; `middle` is fp32 `[H, 1, D]`, or None where subtracting it
    would not surely narrow the keys by more than the operation may cost.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    middle: Tensor | None

    @classmethod
    def of(
        cls, stats: Mapping[str, HeadStats], v_inverse: Tensor | None, dtype: torch.dtype
    ) -> HeadScales:
        """Choose the scales.

        Args:
            stats: of the operands "q", "k" and "v".
            v_inverse: `[H * D]` fp32, what the channels of v are multiplied by since they were
                observed; None is 1.
            dtype: int8 or e4m3, of q and k; v is always e4m3.
        """
        amax = {name: one.amax for name, one in stats.items()}
        keys = stats["k"]
        centred = _gains_by_centring(keys)
        if centred:
            amax["k"] = keys.half_width
        if v_inverse is not None:
            amax["v"] = amax["v"] * v_inverse.to(amax["v"].device).reshape(amax["v"].shape)
        dtypes = {"q": dtype, "k": dtype, "v": FP8}
        q, k, v = (scale_of(amax[name].amax(-1), dtypes[name]) for name in "qkv")
        return cls(q, k, v, keys.middle[:, None].to(torch.float32) if centred else None)


def _gains_by_centring(keys: HeadStats) -> bool:
    """Whether the mean step of the heads shrinks by more than the operation may cost."""
    narrowed = _step(keys.half_width) / _step(keys.amax).clamp_min(1e-30)
    return bool(narrowed < 1 - _LEAST_GAIN) and _narrows_others(keys)


def _narrows_others(keys: HeadStats) -> bool:
    """Whether the middle of one half of the calls narrows the other half, on average of both.

    Where the halves lie on two sides of zero, a range that holds both is narrower around their
    middle, and the next call may be in neither. True where there is one half only.
    """
    parts = zip(keys.low.chunk(HALVES), keys.high.chunk(HALVES), strict=True)
    seen = [half for low, high in parts if (half := HeadStats(low, high)).amax.isfinite().all()]
    if len(seen) < HALVES:
        return True
    one, other = seen
    needed = _step(_reach(one, other.middle)) + _step(_reach(other, one.middle))
    return bool(needed < _step(one.amax) + _step(other.amax))


def _reach(keys: HeadStats, middle: Tensor) -> Tensor:
    """Return how far from `middle [H, D]` the keys lie, `[H, D]`."""
    return torch.maximum(keys.high.amax(0) - middle, middle - keys.low.amin(0))


def _step(width: Tensor) -> Tensor:
    """Return the mean over the heads of what their steps are proportional to, of `[H, D]`."""
    return width.amax(-1).mean()
