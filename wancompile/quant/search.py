"""Choosing a smooth scale for a group from sampled tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wancompile.quant.numerics import absmax, absmax_scale, quantize

# Output channels on which candidates are scored. Each has its own scale, so they are independent,
# and a few hundred of them rank candidates as well as all.
_SCORED_ROWS = 256
_ROWS_AT_ONCE = 128  # keeps temporaries small, and in the cache
_LIMIT = 1e4


@dataclass(frozen=True, eq=False)
class Weights:
    """What the search looks at of a group's weights, stacked over their outputs.

    `amax [K]` fp32: largest magnitude of each input channel; `rows [R, K]` fp32: some outputs.
    """

    amax: Tensor
    rows: Tensor

    @classmethod
    def of(cls, weights: Iterable[Tensor], outputs: int) -> Weights:
        """Look at each of `weights [N_i, K]` fp32 in turn; `outputs` is the sum of all N_i.

        Where an iterator makes the weights, only the one looked at is held in memory.
        """
        stride = -(-outputs // _SCORED_ROWS)
        looks = [(absmax(weight, 0), weight[::stride].clone()) for weight in weights]
        amax, rows = zip(*looks, strict=True)
        return cls(torch.stack(amax).amax(0), torch.cat(rows))


@dataclass(frozen=True, eq=False)
class Candidate:
    """A smooth scale `s [K]` fp32 > 0, and the exponents that made it."""

    alpha: float
    beta: float
    scale: Tensor


@dataclass(frozen=True, eq=False)
class Choice:
    """The best candidate, with errors measured on tokens that did not choose it."""

    best: Candidate
    error_plain: float
    error_smoothed: float

    @property
    def helps(self) -> bool:
        """Whether smoothing lowered the error."""
        return self.error_smoothed < self.error_plain


def choose(
    amax: Tensor, weights: Weights, tokens: Tensor, dtype: torch.dtype, steps: int = 20
) -> Choice | None:
    """Search `s = amax_x ** alpha / amax_w ** beta` (Xiao et al. 2023, "SmoothQuant", eq. 4).

    Args:
        amax: `[K]` fp32, largest magnitude of each input channel over all calibration tokens.
        weights: of all linears of the group.
        tokens: `[R, K]`, sampled inputs. Even ones choose the scale, odd ones judge it.
        dtype: int8 or e4m3, of weights (per output channel) and activations (per token).
        steps: alpha runs over `steps` values up to 1, each with beta = 1 - alpha and beta = 0.

    Returns:
        The choice, or None where there are too few tokens to judge one.
    """
    if len(tokens) < 4:
        return None
    rows = weights.rows
    training, held_out = tokens[0::2].float(), tokens[1::2].float()
    candidates = list(_candidates(amax, weights.amax, steps))
    errors = [output_error(training, rows, dtype, one.scale) for one in candidates]
    best = candidates[min(range(len(errors)), key=errors.__getitem__)]
    return Choice(
        best,
        output_error(held_out, rows, dtype, None),
        output_error(held_out, rows, dtype, best.scale),
    )


def output_error(x: Tensor, weight: Tensor, dtype: torch.dtype, scale: Tensor | None) -> float:
    """Relative L2 error of `x @ weight.T` when both are quantized after dividing x by `scale`."""
    smooth = torch.ones_like(x[0]) if scale is None else scale
    rounded = _rounded(x / smooth, dtype)
    lost, total = x.new_zeros(()), x.new_zeros(())
    for rows in torch.split(weight, _ROWS_AT_ONCE):
        exact = x @ rows.T
        lost += (rounded @ _rounded(rows * smooth, dtype).T - exact).square().sum()
        total += exact.square().sum()
    return float((lost / total.clamp_min(torch.finfo(torch.float32).tiny)).sqrt())


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    scale = absmax_scale(x, -1, dtype)
    return quantize(x, scale, dtype).float() * scale


def _candidates(amax: Tensor, weight_amax: Tensor, steps: int) -> Iterator[Candidate]:
    for index in range(1, steps + 1):
        alpha = index / steps
        for beta in dict.fromkeys((round(1 - alpha, 6), 0.0)):
            yield Candidate(alpha, beta, smooth_scale(amax, weight_amax, alpha, beta))


def smooth_scale(amax: Tensor, weight_amax: Tensor, alpha: float, beta: float) -> Tensor:
    """Return `amax ** alpha / weight_amax ** beta` with geometric mean 1; 1 where either is 0.

    The common factor of s cancels in the product, so it is taken out: scales near 1 keep folded
    weights in the range of their type.
    """
    live = (amax > 0) & (weight_amax > 0)
    logs = alpha * amax.clamp_min(1e-30).log() - beta * weight_amax.clamp_min(1e-30).log()
    logs = torch.where(live, logs, 0.0)
    logs = torch.where(live, logs - logs.sum() / live.sum().clamp_min(1), 0.0)
    return logs.exp().clamp(1 / _LIMIT, _LIMIT)
