"""Clipping the range of a weight's output channels where that loses less than it wins.

A smaller range makes the steps of int8 finer and saturates the few largest weights. The steps of
e4m3 grow with the value, so there a smaller range wins next to nothing but another draw of rounding
errors. Searched per output channel on a grid, as in AWQ (Lin et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wancompile.quant.numerics import absmax, decode, quantize, scale_of

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""What the range of an output channel may be clipped to. The first that loses least is taken."""

# Output channels at once: keeps temporaries small.
_ROWS_AT_ONCE = 1024


def clipping_ratios(weight: Tensor, x: Tensor, rounded: Tensor, dtype: torch.dtype) -> Tensor:
    """Return, for each output channel, the ratio of `RATIOS` that loses least on some inputs.

    Args:
        weight: `[N, K]` fp32.
        x: `[T, K]` fp32, inputs.
        rounded: `[T, K]` fp32, what 8 bits make of them.
        dtype: int8 or e4m3.

    Returns:
        `[N, 1]` fp32.
    """
    return torch.cat(
        [_of_rows(rows, x, rounded, dtype) for rows in torch.split(weight, _ROWS_AT_ONCE)]
    )


def _of_rows(rows: Tensor, x: Tensor, rounded: Tensor, dtype: torch.dtype) -> Tensor:
    exact, amax = x @ rows.T, absmax(rows, 1, keepdim=True)
    lost = []
    for ratio in RATIOS:
        scale = scale_of(amax * ratio, dtype)
        actual = rounded @ (decode(quantize(rows, scale, dtype)) * scale).T
        lost.append((actual - exact).square().sum(0))
    return torch.tensor(RATIOS, device=rows.device)[torch.stack(lost).argmin(0)][:, None]
