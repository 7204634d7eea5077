"""The part of a report page that says why a recipe was chosen for a budget."""

from __future__ import annotations

from collections.abc import Sequence

from wancompile.auto import Choice
from wancompile.candidates import Point
from wancompile.html import chart
from wancompile.html.markup import Html, el, join
from wancompile.html.sections import tr
from wancompile.sensitivity import Sensitivity
from wancompile.units import percent

_WORST = 8
# Points of a frontier that are drawn: there is one for each site and type.
_DRAWN = 80


def render(choice: Choice) -> Html:
    """Return what was chosen, the frontier it lies on, and the sensitivities it rests on."""
    found = choice.sensitivity
    charts = [_by_depth(found, one.dtype) for one in found.together]
    return join(
        el("p", _summary(choice)),
        _frontier(choice),
        el("h3", "One site at a time"),
        charts,
        el("p", _additivity(found), class_="note"),
        el("h3", "Most sensitive"),
        _worst(found),
    )


def _summary(choice: Choice) -> str:
    gain = choice.compiled_ms / choice.predicted.ms
    return (
        f"{choice.recipe.name}: {choice.predicted.ms:.4g} ms predicted for the blocks of one call "
        f"of {choice.tokens:,} tokens, {gain:.2f} times as fast as torch.compile in bf16; error "
        f"{percent(choice.measured, 3)} measured, "
        f"{percent(choice.predicted.error, 3)} predicted. Times from {choice.source}. "
        f"{choice.covered[:1].upper()}{choice.covered[1:]}."
    )


def _frontier(choice: Choice) -> Html:
    """Draw the best choices, the recipes of one type, and what was chosen, by their times."""
    step = max(1, len(choice.frontier) // _DRAWN)
    points = [
        *(("best choices", one) for one in choice.frontier[::step]),
        *((one.name, one) for one in choice.uniform),
        ("chosen", choice.predicted),
    ]
    times = [one.ms for _, one in points]
    low, width = min(times), max(max(times) - min(times), 1e-9)
    marks = [
        chart.Point((one.ms - low) / width, one.error, name, _label(name, one))
        for name, one in points
    ]
    ticks = [chart.Tick(at / 4, f"{low + width * at / 4:.4g} ms") for at in range(5)]
    caption = "Error of the whole model by the time of its blocks; floating point has no error"
    return chart.scatter(marks, ticks, caption=caption, across="predicted time")


def _label(name: str, point: Point) -> str:
    return f"{name}\n{point.ms:.4g} ms, {percent(point.error, 3)}"


def _by_depth(found: Sensitivity, dtype: str) -> Html:
    sites = [one for one in found.sites if one.dtype == dtype]
    last = max(1, len(sites) - 1)
    points = [
        chart.Point(
            index / last,
            one.error,
            one.role,
            f"{one.site} in {dtype}\n{percent(one.error, 3)} at the end, "
            f"{percent(one.local, 3)} of its own output",
        )
        for index, one in enumerate(sites)
    ]
    ticks = chart.ticks([one.site for one in sites])
    caption = f"Error at the end of the model, {dtype}, by block"
    return chart.scatter(points, ticks, caption=caption, across="block")


def _additivity(found: Sensitivity) -> str:
    parts = [
        f"all in {one.dtype} {percent(one.error, 3)} ({percent(one.predicted, 3)} by the root of "
        "the sum of squares)"
        for one in found.together
    ]
    return (
        f"Measured on {found.calls} calls with {found.forwards:.0f} forwards; {', '.join(parts)}."
    )


def _worst(found: Sensitivity) -> Html:
    names: Sequence[str] = ("site", "role", "type", "its own error", "the model's error")
    rows = [
        tr(names, [el("code", one.site), one.role, one.dtype,
                   percent(one.local, 3), percent(one.error, 3)])
        for one in found.worst(_WORST)
    ]  # fmt: skip
    head = el("tr", [el("th", name, scope="col") for name in names])
    return el("table", el("thead", head), el("tbody", rows), class_="cards")
