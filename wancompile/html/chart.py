"""Scatter charts as inline SVG: errors on a logarithmic axis, by depth or cost, in colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from wancompile.flops import CROSS_ATTENTION, SELF_ATTENTION
from wancompile.html.markup import Html, el, join
from wancompile.ir.blocks import blocks
from wancompile.ir.site import Role

_TOP, _RIGHT, _BOTTOM, _LEFT = 26, 12, 46, 58

# What has a colour of its own in every chart; other series take those that are left, in order.
_OWN = (*(str(role) for role in Role), SELF_ATTENTION, CROSS_ATTENTION)
_COLOURS = 10


@dataclass(frozen=True)
class Point:
    """One mark: `value` at `x` (0 left, 1 right), and where it was before, if it moved.

    `series` decides the colour, `label` is shown on hovering.
    """

    x: float
    value: float
    series: str
    label: str
    before: float | None = None


@dataclass(frozen=True)
class Tick:
    """A mark on the horizontal axis."""

    x: float
    label: str


def scatter(points: Sequence[Point], ticks: Sequence[Tick], *, caption: str, across: str) -> Html:
    """Return the chart twice, drawn for wide and for narrow pages; the style sheet shows one.

    `across` says what the horizontal axis is. A role has the same colour in all charts.

    Points whose value is not positive and finite cannot be drawn on a logarithmic axis and are
    left out.
    """
    drawable = [point for point in points if point.value > 0 and math.isfinite(point.value)]
    if not drawable:
        return el("p", "Nothing to draw: no value differs.", class_="note")
    colours = _colours(dict.fromkeys(point.series for point in drawable))
    return el(
        "figure",
        _legend(colours),
        _Frame(940, 340, drawable, 12).draw(drawable, ticks, colours, "wide", across),
        _Frame(380, 320, drawable, 5).draw(drawable, ticks, colours, "narrow", across),
        el("figcaption", caption),
        class_="chart",
    )


def ticks(sites: Sequence[str]) -> list[Tick]:
    """Mark where each repeated block begins among sites in order, by its number."""
    last, found = max(1, len(sites) - 1), blocks(sites)
    first: dict[str, int] = {}
    for index, site in enumerate(sites):
        if site in found:
            first.setdefault(found[site], index)
    return [Tick(at / last, block.rpartition(".")[2]) for block, at in first.items()]


def _colours(series: Iterable[str]) -> dict[str, int]:
    """Return the number of each series' colour."""
    found = {name: _OWN.index(name) if name in _OWN else -1 for name in series}
    free = [one for one in range(_COLOURS - 1) if one not in found.values()]
    for name, colour in found.items():
        if colour < 0:
            found[name] = free.pop(0) if free else _COLOURS - 1
    return found


def _legend(colours: Mapping[str, int]) -> Html:
    buttons = [
        el(
            "button",
            el("i", class_="dot"),
            name,
            class_=f"c{index}",
            type="button",
            data_series=index,
        )
        for name, index in colours.items()
    ]
    return el("div", buttons, class_="legend", role="group", aria_label="Show or hide")


class _Frame:
    """The axes of one drawing: a size in SVG units and a logarithmic range of values."""

    def __init__(self, width: int, height: int, points: Sequence[Point], max_ticks: int) -> None:
        values = [v for p in points for v in (p.value, p.before) if v is not None and v > 0]
        self._low = math.log10(min(values)) - 0.05
        self._high = math.log10(max(values)) + 0.05
        self._width, self._height = width, height
        self._max_ticks = max_ticks

    def x(self, share: float) -> float:
        inner = self._width - _LEFT - _RIGHT - 12
        return round(_LEFT + 6 + share * inner, 1)

    def y(self, value: float) -> float:
        inner = self._height - _TOP - _BOTTOM
        share = (math.log10(max(value, 1e-30)) - self._low) / (self._high - self._low)
        return round(_TOP + (1 - min(1.0, max(0.0, share))) * inner, 1)

    def draw(
        self,
        points: Sequence[Point],
        ticks: Sequence[Tick],
        colours: Mapping[str, int],
        name: str,
        across: str,
    ) -> Html:
        return el(
            "svg",
            el("g", list(self._grid()), class_="grid"),
            el("g", list(self._depths(ticks)), class_="ticks"),
            el("g", self._titles(across), class_="titles"),
            [self._mark(point, colours[point.series]) for point in points],
            viewBox=f"0 0 {self._width} {self._height}",
            class_=name,
            role="img",
            aria_label=f"Error, on a logarithmic axis, by {across}",
        )

    def _grid(self) -> Iterator[Html]:
        for value in _round_values(self._low, self._high):
            y = self.y(value)
            yield el("line", x1=_LEFT, x2=self._width - _RIGHT, y1=y, y2=y)
            yield el("text", _percent(value), x=_LEFT - 8, y=y + 4, text_anchor="end")

    def _depths(self, ticks: Sequence[Tick]) -> Iterator[Html]:
        step = max(1, math.ceil(len(ticks) / self._max_ticks))
        for tick in ticks[::step]:
            x, bottom = self.x(tick.x), self._height - _BOTTOM
            yield el("line", x1=x, x2=x, y1=bottom, y2=bottom + 5)
            yield el("text", tick.label, x=x, y=bottom + 20, text_anchor="middle")

    def _titles(self, across: str) -> list[Html]:
        return [
            el("text", "error, logarithmic", x=0, y=12),
            el("text", across, x=self._width - _RIGHT, y=self._height - 3, text_anchor="end"),
        ]

    def _mark(self, point: Point, index: int) -> Html:
        x, y = self.x(point.x), self.y(point.value)
        moved = None
        if point.before is not None and point.before > 0:
            start = self.y(point.before)
            moved = join(
                el("line", x1=x, x2=x, y1=start, y2=y),
                el("circle", cx=x, cy=start, r=2.6, class_="before"),
            )
        dot = el("circle", cx=x, cy=y, r=3.4, class_="after")
        # A larger invisible disc, so that a point can be hovered without aiming.
        reach = el("circle", cx=x, cy=y, r=9, class_="reach")
        return el("g", el("title", point.label), moved, dot, reach, class_=f"mark c{index}")


def _round_values(low: float, high: float) -> list[float]:
    """Return round numbers between two logarithms, the fewer in a decade the longer the axis."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    values = [factor * 10.0**decade for decade in decades for factor in _factors(high - low)]
    return [value for value in values if low <= math.log10(value) <= high]


def _factors(length: float) -> Sequence[float]:
    if length < 0.7:
        return (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    return (1, 2, 5) if length < 2.5 else (1,)


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"
