"""One small attention with bare weights, and hand-written 8-bit arithmetic to compare with.

Channels 12 in 3 heads of 4; weights `wq wk wv wo` with biases `bq bk bv bo`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from kit import exported
from torch import Tensor

from wancompile import pipeline
from wancompile.passes import FUSE, NORMALIZE, QuantizeAttention, QuantizeLinears
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import ATTENTIONS, QSpec, Recipe

HEADS, HEAD_DIM = 3, 4
CHANNELS = HEADS * HEAD_DIM
X = torch.randn(2, 5, CHANNELS, generator=torch.Generator().manual_seed(7))

Linear = Callable[..., Tensor]


def tensors(*names: str, seed: int = 1) -> dict[str, Tensor]:
    """Return random matrices `w*` [12, 12] and vectors [12] of other names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (CHANNELS,) * (2 if name[0] == "w" else 1) for name in names}
    return {
        name: torch.randn(shape, generator=generator) / len(shape) for name, shape in shapes.items()
    }


WEIGHTS = tensors("wq", "bq", "wk", "bk", "wv", "bv", "wo", "bo")


def heads(x: Tensor) -> Tensor:
    """[B, S, H D] -> [B, H, S, D]."""
    return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H D]."""
    return x.transpose(1, 2).flatten(2)


def attend(self: Any, x: Tensor, linear: Linear = F.linear, attention: Any = None) -> Tensor:
    """Self-attention with its four projections."""
    q = linear(x, self.wq, self.bq)
    k = linear(x, self.wk, self.bk)
    v = linear(x, self.wv, self.bv)
    mix = attention or F.scaled_dot_product_attention
    return linear(joined(mix(heads(q), heads(k), heads(v))), self.wo, self.bo)


def normal(fn: Callable[..., Any], x: Tensor = X, **weights: Tensor) -> Program:
    """Export `fn(self, x)` and normalize it."""
    return pipeline.run(exported(fn, x, **weights), NORMALIZE)


def quantized(program: Program, recipe: Recipe, stats: Stats | None = None) -> Program:
    """Quantize a NORMAL program."""
    return pipeline.run(program, [QuantizeAttention(recipe, stats), QuantizeLinears(recipe, stats)])


def fused(program: Program) -> Program:
    """Fuse a QUANTIZED program."""
    return pipeline.run(program, FUSE)


def plain(dtype: str, attention: str | None = None) -> Recipe:
    """A recipe without smoothing; `attention` is a name in `ATTENTIONS`."""
    return Recipe("plain", QSpec(dtype, smooth=False), attention=ATTENTIONS.get(attention or ""))


def skips(program: Program) -> dict[str, str]:
    """Why the last pass left sites alone, by site."""
    return {note.site: note.text for note in program.records[-1].skipped}


# 8 bits by hand, in float64 --------------------------------------------------------------------

_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
_E4M3 = _E4M3[_E4M3.isfinite()].unique()


def nearest(x: Tensor, dtype: str) -> Tensor:
    """Round to the nearest number of an 8-bit type, saturating."""
    if dtype == "int8":
        return x.round().clamp(-127, 127)
    upper = torch.searchsorted(_E4M3, x.contiguous()).clamp(1, len(_E4M3) - 1)
    below, above = _E4M3[upper - 1], _E4M3[upper]
    return torch.where(x - below < above - x, below, above)


def largest(dtype: str) -> float:
    """The largest magnitude of an 8-bit type."""
    return {"int8": 127.0, "fp8": 448.0}[dtype]


def rounded(x: Tensor, dtype: str) -> Tensor:
    """Quantize and dequantize with one scale per row."""
    scale = x.abs().amax(-1, keepdim=True) / largest(dtype)
    return nearest(x / scale, dtype) * scale


def rounded_linear(dtype: str) -> Linear:
    """A linear whose input and weight are rounded to 8 bits, in float64."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = rounded(x, dtype) @ rounded(weight, dtype).T
        return out if bias is None else out + bias

    return linear
