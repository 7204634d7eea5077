"""How much scales would move between two halves of the calibration calls.

Calls of one kind in one range of timesteps are dealt out to two halves (see `lines.half_of`). What
one half says of a model and the other does not is what the next calls would change: if the halves
agree, there were enough. Only kinds and ranges that both halves have seen are compared.

For each channel the largest value in one half is divided by that in the other, the larger by the
smaller. The smooth scale at alpha = 0.5 moves by the root of that, once its mean over the channels
is taken out, which cancels in the product with the weights (see `search.smooth_scale`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tabulate import tabulate
from torch import Tensor

from wancompile.errors import CalibrationError
from wancompile.quant import lines

if TYPE_CHECKING:
    from wancompile.quant.stats import Stats

MEDIAN_LIMIT = 1.1
"""How far the median of scales may move between halves of samples called enough."""

SMOOTH_LIMIT, STATIC_LIMIT = 2.0, 1.25
"""How far all but one in a hundred scales may move. A smooth scale that is wrong by two costs its
channel one bit of eight, since tokens have scales of their own; what goes beyond a static scale is
cut off. Single channels move further in every model: there are always some that hardly live."""

_TAIL = 0.99


@dataclass(frozen=True)
class Moved:
    """How far the channels of some sites moved between halves; 1 is not at all.

    `amax_*` are of the largest values, `scale_*` of the scales made from them: the smooth scale at
    alpha = 0.5 of what linears read, the scale of a head of attention. One in a hundred moves by
    more than `scale_tail`, which is to stay within `limit`. `sites` counts the observed values, 0
    where both halves saw none.
    """

    name: str
    sites: int
    amax_median: float = 1.0
    amax_worst: float = 1.0
    scale_median: float = 1.0
    scale_tail: float = 1.0
    scale_worst: float = 1.0
    limit: float = SMOOTH_LIMIT

    @property
    def is_stable(self) -> bool:
        """Whether typical scales hardly moved, and few far."""
        return self.scale_median <= MEDIAN_LIMIT and self.scale_tail <= self.limit


@dataclass(frozen=True)
class Stability:
    """What moved between halves, by role and by range of timesteps.

    `calls` gives the number of calls in each range; where it is unknown it is empty.
    """

    roles: tuple[Moved, ...]
    ranges: tuple[Moved, ...]
    calls: tuple[int, ...]

    @property
    def enough(self) -> bool:
        """Whether the calibration needs no more samples."""
        return self.verdict.startswith("enough")

    @property
    def verdict(self) -> str:
        """One sentence: enough samples, or what to add."""
        judged = [one for one in self.roles if one.sites]
        if not judged:
            return (
                "add samples: no range of timesteps was seen in two calls of one kind, "
                "so that nothing can be compared"
            )
        moving = [one for one in judged if not one.is_stable]
        if not moving:
            tail = max(one.scale_tail for one in judged)
            return f"enough samples: 99 in 100 scales move by {_times(tail)} at most{self._once()}"
        first = max(moving, key=lambda one: one.scale_tail)
        seen = [one for one in self.ranges if one.sites]
        where = max(seen, key=lambda one: one.scale_tail).name if seen else "all"
        return (
            f"add samples: between halves the scales of {first.name} move by "
            f"{_times(first.scale_median)} in the median, and one in 100 by more than "
            f"{_times(first.scale_tail)}; most moves at timesteps {where}{self._once()}"
        )

    def _once(self) -> str:
        """Say which ranges were seen, but not by both halves."""
        pairs = zip(self.ranges, self.calls, strict=False)
        names = [one.name for one, calls in pairs if calls and not one.sites]
        return f"; too few calls to compare at timesteps {', '.join(names)}" if names else ""

    def __str__(self) -> str:
        headers = ["", "values", "largest: median", "worst", "scale: median", "1 in 100", "worst"]
        roles = tabulate(map(_row, self.roles), headers=headers, disable_numparse=True)
        headers[0] = "timesteps"
        rows = list(map(_row, self.ranges))
        if self.calls:
            headers[1:1] = ["calls"]
            rows = [[row[0], str(n), *row[1:]] for row, n in zip(rows, self.calls, strict=True)]
        ranges = tabulate(rows, headers=headers, disable_numparse=True)
        return f"{roles}\n\n{ranges}\n\n{self.verdict}"


@dataclass(frozen=True, eq=False)
class _Halves:
    """Largest values `amax [2, cells, C]`, and which cells were `seen [2, cells]`, by half.

    Cells are kinds of calls in ranges of timesteps, the range running fastest. `is_scale` says that
    scales are proportional to the values, and not smooth scales made from them.
    """

    name: str
    amax: Tensor
    seen: Tensor
    is_scale: bool = False

    def ratios(self, chosen: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return how far `amax [C]` and scales `[C]` moved over the `chosen [L]` ranges."""
        cells = self.seen.all(0) & chosen.repeat(self.seen.shape[1] // len(chosen))
        if not bool(cells.any()):
            return None
        even, odd = self.amax[:, cells].amax(1).double()
        live = (even > 0) | (odd > 0)
        logs = torch.where(live, even.log() - odd.log(), 0.0)
        scale = logs if self.is_scale else (logs - logs[live].mean()) / 2
        return logs.abs().exp(), torch.where(live, scale, 0.0).abs().exp()


def of(stats: Stats) -> Stability:
    """Compare the halves of `stats`.

    Raises:
        CalibrationError: the statistics were not kept by halves.
    """
    ranges = len(stats.edges) - 1
    watched = [*_channels(stats, ranges), *_heads(stats, ranges)]
    every = torch.ones(ranges, dtype=torch.bool)
    names = dict.fromkeys(one.name for one in watched)
    return Stability(
        tuple(_moved(name, (one for one in watched if one.name == name), every) for name in names),
        tuple(
            _moved(f"{low:.0f} to {high:.0f}", watched, place)
            for low, high, place in zip(
                stats.edges, stats.edges[1:], torch.eye(ranges).bool(), strict=False
            )
        ),
        tuple(sum(stats.tally[place::ranges]) for place in range(ranges)) if stats.tally else (),
    )


def _channels(stats: Stats, ranges: int) -> Iterator[_Halves]:
    for site, one in stats.channels.items():
        if len(one.amax) != lines.PER_RANGE * ranges:
            raise CalibrationError("the statistics were not kept by halves", site=str(site))
        amax = one.amax.cpu().view(lines.HALVES, -1, one.amax.shape[-1])
        seen = one.count.cpu().view(lines.HALVES, -1) > 0
        yield _Halves(stats.roles.get(site, "linears"), amax, seen)


def _heads(stats: Stats, ranges: int) -> Iterator[_Halves]:
    for (site, operand), one in stats.heads.items():
        if len(one.low) != lines.HALVES * ranges:
            raise CalibrationError("the statistics were not kept by halves", site=str(site))
        largest = torch.maximum(one.high, -one.low).amax(-1).cpu()
        amax = largest.view(lines.HALVES, ranges, -1)
        yield _Halves(f"attention {operand}", amax, amax[..., 0].isfinite(), is_scale=True)


def _moved(name: str, watched: Iterable[_Halves], chosen: Tensor) -> Moved:
    halves = list(watched)
    found = [pair for one in halves if (pair := one.ratios(chosen)) is not None]
    if not found:
        return Moved(name, 0)
    amax, scale = (torch.cat(parts) for parts in zip(*found, strict=True))
    tail = scale.sort().values[min(len(scale) - 1, int(_TAIL * len(scale)))]
    return Moved(
        name,
        len(found),
        amax_median=float(amax.median()),
        amax_worst=float(amax.max()),
        scale_median=float(scale.median()),
        scale_tail=float(tail),
        scale_worst=float(scale.max()),
        limit=STATIC_LIMIT if all(one.is_scale for one in halves) else SMOOTH_LIMIT,
    )


def _row(one: Moved) -> list[str]:
    largest = one.amax_median, one.amax_worst
    figures = *largest, one.scale_median, one.scale_tail, one.scale_worst
    return [one.name, str(one.sites), *(_times(each) if one.sites else "-" for each in figures)]


def _times(ratio: float) -> str:
    return f"{ratio:.2f} x"
