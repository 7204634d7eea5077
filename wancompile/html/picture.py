"""A block of a graph as a picture: boxes for ops, lines for values, from top to bottom."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from torch.fx import Graph, Node

from wancompile.html.layers import Layout, Place, arrange
from wancompile.html.markup import Html, el
from wancompile.html.reduce import Box, Look, reduce

# In SVG units, which are pixels where the picture is as wide as its column.
_BOX, _GAP, _BEND = 148, 12, 10
_TALL, _LOW, _ROW = 34, 22, 56
_LETTERS = 24
# How far a picture shrinks before it scrolls: below that its text is too small.
_SMALLEST = 0.72
# Boxes beyond which nobody reads a picture.
_MOST = 160

_LOOKS = {
    Look.EIGHT: "in 8 bits",
    Look.ROUNDS: "rounds to 8 bits",
    Look.FLOAT: "product in floating point",
    Look.PLAIN: "other floating point",
    Look.OUTSIDE: "from outside",
}


def draw(graph: Graph, inside: Collection[Node], block: str, label: str) -> Html:
    """Return the nodes `inside` as an SVG, or a sentence where they are too many to be drawn."""
    reduced = reduce(graph, inside, block)
    if not 0 < len(reduced.boxes) <= _MOST:
        return el("p", f"{len(reduced.boxes)} boxes: not drawn.", class_="note")
    layout = arrange(len(reduced.boxes), reduced.edges, _BOX + _GAP, _BEND)
    height = layout.rows * _ROW - (_ROW - _TALL) + 4
    return el(
        "svg",
        el("g", _lines(layout), class_="wires"),
        [_box(box, layout.places[index]) for index, box in enumerate(reduced.boxes)],
        viewBox=f"0 0 {layout.width:.0f} {height}",
        style=f"min-width:{_SMALLEST * layout.width:.0f}px;max-width:{layout.width:.0f}px",
        class_="drawing",
        role="img",
        aria_label=f"{label}: {len(reduced.boxes)} boxes",
    )


def legend() -> Html:
    """Return what the looks of boxes mean."""
    keys = [el("span", el("i", class_=f"key {look}"), text) for look, text in _LOOKS.items()]
    return el("p", keys, class_="keys")


def _lines(layout: Layout) -> list[Html]:
    """Draw each stretch between two rows once."""
    stretches = dict.fromkeys(stretch for line in layout.lines for stretch in pairwise(line))
    boxes = set(layout.places.values())
    return [el("path", d=_curve(start, end, boxes)) for start, end in stretches]


def _curve(start: Place, end: Place, boxes: Collection[Place]) -> str:
    """Return a curve from below one place to above another; bends are passed straight."""
    top = start.row * _ROW + (_TALL if start in boxes else _TALL // 2)
    bottom = end.row * _ROW + (0 if end in boxes else _TALL // 2)
    middle = (top + bottom) / 2
    return (
        f"M{start.x:.0f} {top}C{start.x:.0f} {middle:.0f} {end.x:.0f} {middle:.0f} "
        f"{end.x:.0f} {bottom}"
    )


def _box(box: Box, place: Place) -> Html:
    is_low = box.look is Look.OUTSIDE
    height = _LOW if is_low else _TALL
    top = place.row * _ROW + (_TALL - height)
    lines = [one for one in (box.title, box.text) if one]
    return el(
        "g",
        el("title", "\n".join([", ".join(lines), *_values(box.nodes)])),
        el("rect", x=f"{place.x - _BOX / 2:.0f}", y=top, width=_BOX, height=height, rx=5),
        _texts(lines, place.x, top, height),
        class_=f"box {box.look}",
    )


def _texts(lines: Sequence[str], x: float, top: int, height: int) -> list[Html]:
    if len(lines) == 1:
        return [_text(lines[0], x, top + height // 2 + 4, "first")]
    return [_text(lines[0], x, top + 14, "first"), _text(lines[1], x, top + 27, "second")]


def _text(text: str, x: float, y: int, class_: str) -> Html:
    shown = text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
    return el("text", shown, x=f"{x:.0f}", y=y, class_=class_)


def _values(nodes: Sequence[Node]) -> list[str]:
    names = [node.name for node in nodes]
    more = [f"and {len(names) - 6} more"] if len(names) > 6 else []
    return [*names[:6], *more] if len(names) > 1 else []
