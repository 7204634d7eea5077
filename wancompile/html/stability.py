"""The part of a report page on calibration: whether there were enough samples."""

from __future__ import annotations

from wancompile.html.markup import Html, el, join
from wancompile.html.sections import tr
from wancompile.quant.stability import Moved, Stability


def render(found: Stability) -> Html:
    """Return the verdict, and how far scales moved between halves by role and by timesteps."""
    calls = dict(zip((one.name for one in found.ranges), found.calls, strict=False))
    verdict = el("p", found.verdict[0].upper() + found.verdict[1:] + ".", class_="verdict")
    ranges = [one for one in found.ranges if one.sites or calls.get(one.name)]
    return join(
        verdict,
        _table("of", found.roles, {}),
        el("h3", "By timesteps") if ranges else None,
        _table("timesteps", ranges, calls) if ranges else None,
    )


def _table(first: str, found: tuple[Moved, ...] | list[Moved], calls: dict[str, int]) -> Html:
    names = [first, *(["calls"] if calls else []), "values"]
    names += ["typical scale", "1 in 100 beyond", "furthest", "limit", "stable"]
    rows = []
    for one in found:
        moves = (one.scale_median, one.scale_tail, one.scale_worst)
        cells: list[object] = [one.name, *([calls.get(one.name, "-")] if calls else []), one.sites]
        cells += [f"{each:.2f} x" if one.sites else "-" for each in moves]
        cells += [f"{one.limit:g} x", _stable(one)]
        rows.append(tr(names, cells))
    head = el("tr", [el("th", name, scope="col") for name in names])
    return el("table", el("thead", head), el("tbody", rows), class_="cards")


def _stable(one: Moved) -> Html | str:
    if not one.sites:
        return "not seen by both"
    return el("span", "yes", class_="good") if one.is_stable else el("span", "no", class_="bad")
