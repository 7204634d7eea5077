"""Whether one way to round is better than another, judged on tokens that did not choose it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 4
"""Different tokens that it takes to choose something and to judge it."""

LEAST_GAIN = 0.05
"""Share by which an error must fall.

Rounding all groups anew, by factors near 1 that smooth nothing, moves the error of the trained
models' output by 2 to 3 % either way: what wins less than that in a group cannot be told from a
lucky draw. In e4m3, smoothing what wins 1 or 3 % gave T2V nothing, on average over four draws."""

# Share of their size by which values differ that agree: last bits are 0.4 % in bf16. Tokens of the
# trained models before self-attention lie 15 to 50 % apart.
_AGREE = 0.01
# How many standard errors a gain must be above zero.
_SIGMAS = 2.0


def different(tokens: Tensor) -> Tensor:
    """Return the rows of `tokens [R, K]` that are not equal to an earlier one, in order.

    Words recur in every prompt, and every step shows the same ones again. Were one of them to
    choose and its copy to judge, whatever was learned by heart would pass.

    Where no `FEWEST` of them lie apart, only those that do are returned. Copies of a token leave an
    attention with other last bits, as its sums ran in another order, and are no more to judge by.
    """
    apart = _apart(tokens)
    if len(apart) < FEWEST:
        return apart
    _, number = torch.unique(tokens, dim=0, return_inverse=True)
    place = torch.arange(len(tokens), device=tokens.device)
    first = torch.full_like(place, len(tokens)).scatter_reduce_(0, number, place, "amin")
    return tokens[first[first < len(tokens)].sort().values]


def _apart(tokens: Tensor) -> Tensor:
    """Return the first rows none of which is nearly an earlier one, at most `FEWEST`."""
    found: list[int] = []
    for at, row in enumerate(tokens):
        if not any(_nearly(row, tokens[one]) for one in found):
            found.append(at)
        if len(found) == FEWEST:
            break
    return tokens[found]


def _nearly(one: Tensor, other: Tensor) -> bool:
    """Whether two tokens `[K]` agree in three of four channels that speak in either.

    So a few large channels do not hide the rest, and those where last bits are all there is do not
    tell tokens apart.
    """
    one, other = one.float(), other.float()
    size = torch.maximum(one.abs(), other.abs())
    speak = size > 0
    agree = speak & ((one - other).abs() <= _AGREE * size)
    return bool(4 * agree.sum() >= 3 * speak.sum())


def few(count: int, purpose: str, least: int = FEWEST) -> str:
    """Say that `count` different tokens do not suffice for a purpose that takes `least`."""
    return f"only {count} of the {least} different tokens that it takes to {purpose}"


def halves(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return every other row from the first on, which choose, and the rest, which judge; fp32."""
    return tokens[0::2].float(), tokens[1::2].float()


@dataclass(frozen=True, eq=False)
class Losses:
    """What rounding did to the outputs of a group: squared errors and squared sizes per token.

    `lost [T]` and `total [T]`, fp32, summed over output channels.
    """

    lost: Tensor
    total: Tensor

    @classmethod
    def of(cls, actual: Tensor, exact: Tensor) -> Losses:
        """Compare outputs `[T, N]`."""
        return cls((actual - exact).square().sum(1), exact.square().sum(1))

    @property
    def error(self) -> float:
        """Relative L2 error over all tokens."""
        tiny = torch.finfo(torch.float32).tiny
        return float((self.lost.sum() / self.total.sum().clamp_min(tiny)).sqrt())


def refusal(before: Losses, after: Losses, least: float = LEAST_GAIN) -> str:
    """Say why `after` is not surely better than `before` on the same tokens; empty if it is.

    The error must fall by the share `least`, and the loss of the tokens, compared token by token,
    by two standard errors. The second guards against few tokens; the first against what no number
    of tokens shows: they all share one draw of rounding errors of the weight.

    Where one token has most of the loss, two standard errors are never reached, were it a hundred
    times as large before. So it is as good if the share of its loss that a token is spared exceeds
    what `least` asks of all, again by two standard errors.
    """
    gain = 1 - after.error / before.error if before.error else 0.0
    if not gain > 0:  # NaN is no gain
        return "does not lower the calibrated error"
    falls = f"lowers the calibrated error by {100 * gain:.1f} %"
    if gain < least:
        return f"{falls} only"
    won = before.lost - after.lost
    tiny = torch.finfo(torch.float32).tiny
    spared = won / torch.maximum(before.lost, after.lost).clamp_min(tiny)
    if not (_surely_above(won, 0.0) or _surely_above(spared, 1 - (1 - least) ** 2)):
        return f"{falls}, which {len(won)} tokens do not prove"
    return ""


def _surely_above(values: Tensor, bound: float) -> bool:
    """Whether the mean of what `values [T]` are drawn from lies above `bound`."""
    spread = float(values.std()) if len(values) > 1 else math.inf
    return float(values.mean()) - bound > _SIGMAS * spread / math.sqrt(len(values))
