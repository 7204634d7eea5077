"""Choosing how the weights of a group are rounded, from sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wancompile.ir.site import Rounding
from wancompile.quant.clip import clipping_ratios
from wancompile.quant.gptq import Feedback, round_weight
from wancompile.quant.judge import Losses, different, halves, refusal
from wancompile.quant.numerics import QTensor, absmax, decode, quantize_weight
from wancompile.quant.search import rounded

FEWEST = 10
"""Different tokens that it takes to choose how to round and to judge it.

GPTQ has a number to choose for every weight. What was kept from 4 to 6 tokens was up to 20 % worse
on others in one of 300 draws, and what was kept from 8 up to 3 %; from 10 on none was worse."""

# Tokens by which ratios are chosen and everything is judged: more of them change nothing.
_LOOKED_AT = 256
# Output channels at once: keeps temporaries small.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class Rounded:
    """The weight of a group as it was rounded in the end, and how that was chosen."""

    weight: QTensor
    how: Rounding


def choose_rounding(
    weight: Tensor, tokens: Tensor, dtype: torch.dtype, *, clip: bool, gptq: bool
) -> Rounded | None:
    """Round a weight to nearest, with clipped ranges and by GPTQ, and keep what surely is better.

    Args:
        weight: `[N, K]` fp32, the weights of all linears of the group over one another.
        tokens: `[R, K]`, sampled inputs as the product gets them, smoothed but not rounded. Of the
            different ones every other is learned from, the rest judge.
        dtype: int8 or e4m3, of weights (per output channel) and activations (per token).
        clip: whether to try clipping.
        gptq: whether to try GPTQ, with the ranges that were kept.

    Returns:
        The weight and the errors, or None where there are too few different tokens to judge by.

    Raises:
        NumericsError: the weight holds NaN or infinity.
    """
    training, held_out = halves(different(tokens))
    if len(training) + len(held_out) < FEWEST:
        return None
    seen = rounded(training, dtype)
    kept = _Kept(weight, held_out[:_LOOKED_AT], quantize_weight(weight, dtype))
    how = Rounding(kept.losses.error)
    if clip:
        look = slice(_LOOKED_AT)
        ratios = clipping_ratios(weight, training[look], seen[look], dtype)
        amax = absmax(weight, 1, keepdim=True) * ratios
        error, reason = kept.offer(quantize_weight(weight, dtype, amax))
        ratio = 1.0 if reason else float(ratios.mean())
        how = replace(
            how, error_clipped=error, ratio=ratio, clipped=not reason, clip_refusal=reason
        )
    if gptq:
        error, reason = kept.offer(
            round_weight(weight, kept.weight.scale, dtype, Feedback.of(seen))
        )
        how = replace(how, error_gptq=error, gptq=not reason, gptq_refusal=reason)
    return Rounded(kept.weight, how)


class _Kept:
    """The best rounding of a weight so far, judged on some inputs `x [T, K]`."""

    def __init__(self, weight: Tensor, x: Tensor, first: QTensor) -> None:
        self._exact = x @ weight.T
        self._seen = rounded(x, first.data.dtype)
        self.weight = first
        self.losses = self._losses(first)

    def offer(self, candidate: QTensor) -> tuple[float, str]:
        """Keep a candidate that is surely better; return its error, and why it was not kept."""
        losses = self._losses(candidate)
        reason = refusal(self.losses, losses)
        if not reason:
            self.weight, self.losses = candidate, losses
        return losses.error, reason

    def _losses(self, weight: QTensor) -> Losses:
        chunks = zip(
            torch.split(weight.data, _ROWS_AT_ONCE),
            torch.split(weight.scale, _ROWS_AT_ONCE),
            strict=True,
        )
        actual = [self._seen @ (decode(data) * scale).T for data, scale in chunks]
        return Losses.of(torch.cat(actual, 1), self._exact)
