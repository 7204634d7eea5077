"""The part of a report page about how near the compiled model is to the original."""

from __future__ import annotations

from wancompile.gate.rounds import Gate
from wancompile.gate.text import HEADERS, rows_of, summary
from wancompile.html.markup import Html, el, join
from wancompile.html.sections import tr


def render(gate: Gate) -> Html:
    """Return the worst figure of each kind with its limit, and what fell back."""
    head = el("tr", [el("th", name, scope="col") for name in HEADERS])
    rows = [
        tr(HEADERS, [kind, el("code", place), *figures])
        for kind, place, *figures in rows_of(gate.check)
    ]
    beyond = [f"beyond its limit: {one}" for one in gate.check.violations]
    fell = [f"fell back: {one}" for one in gate.fallbacks]
    notes = [el("li", note) for note in (*beyond, *fell)]
    table = el("table", el("thead", head), el("tbody", rows), class_="cards")
    return join(
        el("p", summary(gate.check).capitalize() + "."),
        table,
        el("ul", notes, class_="reasons") if notes else None,
    )
