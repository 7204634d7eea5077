"""Choosing a smooth scale for a group from sampled tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from wancompile.ir.site import Span
from wancompile.quant.judge import FEWEST, Losses, different, halves, refusal
from wancompile.quant.numerics import absmax, absmax_scale, decode, quantize

# Output channels on which candidates are scored. Each has its own scale, so they are independent,
# and a few hundred of them rank candidates as well as all.
_SCORED_ROWS = 256
_LIMIT = 1e4

# The grid from which the search starts, for each pair of spans, the number of pairs from whose best
# points it goes on, and the steps in which it does.
_GRID = ((0.25, 0.75), (0.25, 0.0), (0.5, 0.5), (0.5, 0.0), (0.75, 0.25), (0.75, 0.0), (1.0, 0.0))
_STARTS = 2
_STEPS = (0.125, 0.0625, 0.03125)
_MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1))


@dataclass(frozen=True, eq=False)
class Weights:
    """What the search looks at of a group's weights, stacked over their outputs.

    `amax [K]` and `rms [K]` fp32: largest magnitude and root mean square of each input channel;
    `rows [R, K]` fp32: some outputs.
    """

    amax: Tensor
    rms: Tensor
    rows: Tensor

    @classmethod
    def of(cls, weights: Iterable[Tensor], outputs: int) -> Weights:
        """Look at each of `weights [N_i, K]` fp32 in turn; `outputs` is the sum of all N_i.

        Where an iterator makes the weights, only the one looked at is held in memory.
        """
        stride = -(-outputs // _SCORED_ROWS)
        looks = [
            (absmax(weight, 0), torch.linalg.vector_norm(weight, dim=0), weight[::stride].clone())
            for weight in weights
        ]
        amax, norms, rows = zip(*looks, strict=True)
        rms = torch.stack(norms).norm(dim=0) / outputs**0.5
        return cls(torch.stack(amax).amax(0), rms, torch.cat(rows))

    def spans(self) -> Mapping[Span, Tensor]:
        """Return the sizes `[K]` of the input channels, by how they are measured."""
        return {Span.AMAX: self.amax, Span.RMS: self.rms}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A smooth scale `s [K]` fp32 > 0, the exponents that made it, and of what."""

    alpha: float
    beta: float
    scale: Tensor
    span_x: Span = Span.AMAX
    span_w: Span = Span.AMAX


@dataclass(frozen=True, eq=False)
class Choice:
    """The best candidate, with errors measured on tokens that did not choose it.

    `refusal` says why it does not surely help, and is empty where it does.
    """

    best: Candidate
    error_plain: float
    error_smoothed: float
    refusal: str

    @property
    def helps(self) -> bool:
        """Whether smoothing surely lowered the error."""
        return not self.refusal


def choose(amax: Tensor, weights: Weights, tokens: Tensor, dtype: torch.dtype) -> Choice | None:
    """Search `s = span_x ** alpha / span_w ** beta` (Xiao et al. 2023, "SmoothQuant", eq. 4).

    A span is the largest magnitude of a channel or its root mean square. All pairs of them are
    tried on a coarse grid of exponents; from the best points of two pairs the search goes on in
    smaller and smaller steps. `benchmarks/exhaustive.py` compares it with a fine grid.

    Args:
        amax: `[K]` fp32, largest magnitude of each input channel over all calibration tokens.
        weights: of all linears of the group.
        tokens: `[R, K]`, sampled inputs. Of the different ones, every other chooses the scale, the
            rest judge it.
        dtype: int8 or e4m3, of weights (per output channel) and activations (per token).

    Returns:
        The choice, or None where there are too few different tokens to judge one.
    """
    training, held_out = halves(different(tokens))
    if len(training) + len(held_out) < FEWEST:
        return None
    spans_x = {Span.AMAX: amax, Span.RMS: training.square().mean(0).sqrt()}
    best = _Search(spans_x, weights, Probe(training, weights.rows, dtype)).best()
    judge = Probe(held_out, weights.rows, dtype)
    plain, smoothed = judge.losses(None), judge.losses(best.scale)
    return Choice(best, plain.error, smoothed.error, refusal(plain, smoothed))


class Probe:
    """Measures what rounding does to `x @ weight.T`, `x [T, K]` and `weight [N, K]` fp32."""

    def __init__(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
        self._x = x
        self._weight = weight
        self._dtype = dtype
        self._exact = x @ weight.T

    def losses(self, scale: Tensor | None) -> Losses:
        """Round x divided by `scale [K]` and the weight multiplied by it, row by row, and compare.

        None divides nothing.
        """
        smooth = torch.ones_like(self._x[0]) if scale is None else scale
        x = rounded(self._x / smooth, self._dtype)
        weight = rounded(self._weight * smooth, self._dtype)
        return Losses.of(x @ weight.T, self._exact)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x [..., K]` as 8 bits with one scale per row stand for it, in fp32."""
    scale = absmax_scale(x, -1, dtype)
    return decode(quantize(x, scale, dtype)) * scale


@dataclass(frozen=True, order=True)
class _Point:
    alpha: float
    beta: float
    span_x: Span
    span_w: Span

    def neighbours(self, step: float) -> Iterator[_Point]:
        for up_alpha, up_beta in _MOVES:
            alpha, beta = self.alpha + step * up_alpha, self.beta + step * up_beta
            if alpha >= 0 and beta >= 0:
                yield _Point(alpha, beta, self.span_x, self.span_w)


class _Search:
    """Looks for the scale of least error, and measures no scale twice."""

    def __init__(self, spans_x: Mapping[Span, Tensor], weights: Weights, probe: Probe) -> None:
        self._spans_x = spans_x
        self._spans_w = weights.spans()
        self._probe = probe
        self._errors: dict[_Point, float] = {}

    def best(self) -> Candidate:
        pairs = product(self._spans_x, self._spans_w)
        starts = [min((_Point(*at, *pair) for at in _GRID), key=self._error) for pair in pairs]
        starts.sort(key=self._error)
        best = min(map(self._descended, starts[:_STARTS]), key=self._error)
        return Candidate(best.alpha, best.beta, self._scale(best), best.span_x, best.span_w)

    def _descended(self, best: _Point) -> _Point:
        """Go from neighbour to better neighbour, in smaller and smaller steps."""
        for step in _STEPS:
            following = min(best.neighbours(step), key=self._error)
            while self._error(following) < self._error(best):
                best = following
                following = min(best.neighbours(step), key=self._error)
        return best

    def _error(self, point: _Point) -> float:
        if point not in self._errors:
            self._errors[point] = self._probe.losses(self._scale(point)).error
        return self._errors[point]

    def _scale(self, at: _Point) -> Tensor:
        return smooth_scale(self._spans_x[at.span_x], self._spans_w[at.span_w], at.alpha, at.beta)


def smooth_scale(span_x: Tensor, span_w: Tensor, alpha: float, beta: float) -> Tensor:
    """Return `span_x ** alpha / span_w ** beta` with geometric mean 1; 1 where either is 0.

    The common factor of s cancels in the product, so it is taken out: scales near 1 keep folded
    weights in the range of their type.
    """
    live = (span_x > 0) & (span_w > 0)
    logs = alpha * span_x.clamp_min(1e-30).log() - beta * span_w.clamp_min(1e-30).log()
    logs = torch.where(live, logs, 0.0)
    logs = torch.where(live, logs - logs.sum() / live.sum().clamp_min(1), 0.0)
    return logs.exp().clamp(1 / _LIMIT, _LIMIT)
