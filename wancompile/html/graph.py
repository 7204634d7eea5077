"""Two graphs side by side, with what changed marked down to the token."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from wancompile.html.markup import Html, el
from wancompile.inspect import Change, Line, Row
from wancompile.units import plural

# Unchanged lines that stay visible around a change; longer stretches are folded away.
CONTEXT = 2

_TOKEN = re.compile(r"%?[\w.:#]+|\s+|.")
_HEAD = re.compile(r"(%[^:\s]+(?::[a-z]\w*)?(?:#\d+)?): (.+?) = (\w+)(.*)", re.DOTALL)


def panes(rows: Sequence[Row], before: str, after: str) -> Html:
    """Return `rows` as a two-column listing, one column at phone width."""
    body: list[Html] = []
    stretches = [list(found) for _, found in groupby(rows, lambda row: row.change is Change.SAME)]
    for index, stretch in enumerate(stretches):
        if stretch[0].change is Change.SAME:
            edges = (index == 0, index == len(stretches) - 1)
            body += _folded(stretch, *edges)
        else:
            body += [_row(row) for row in stretch]
    head = el("div", el("b", before), el("b", after), class_="row head")
    return el("div", head, body, class_="panes")


def listing(found: Sequence[Line], name: str) -> Html:
    """Return the lines of one graph in one column."""
    rows = [el("div", _cell(line, []), class_="row same") for line in found]
    return el("div", el("div", el("b", name), class_="row head"), rows, class_="panes alone")


def _folded(stretch: Sequence[Row], is_first: bool, is_last: bool) -> list[Html]:
    start = 0 if is_first else CONTEXT
    end = len(stretch) - (0 if is_last else CONTEXT)
    if end - start <= 2 * CONTEXT:
        return [_row(row) for row in stretch]
    hidden = el(
        "details",
        el("summary", f"{plural(end - start, 'equal line')}"),
        [_row(row) for row in stretch[start:end]],
    )
    shown_before = [_row(row) for row in stretch[:start]]
    return [*shown_before, hidden, *(_row(row) for row in stretch[end:])]


def _row(row: Row) -> Html:
    marks = _marks(row)
    left, right = (
        _cell(line, found) for line, found in zip((row.before, row.after), marks, strict=True)
    )
    return el("div", left, right, class_=f"row {row.change}")


def _marks(row: Row) -> tuple[list[bool], list[bool]]:
    """Return which tokens of each line are not in the other one; nothing where a line is alone."""
    if row.change is not Change.CHANGED or row.before is None or row.after is None:
        return [], []
    a, b = _tokens(row.before.text), _tokens(row.after.text)
    marked_a, marked_b = [True] * len(a), [True] * len(b)
    for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
        marked_a[block.a : block.a + block.size] = [False] * block.size
        marked_b[block.b : block.b + block.size] = [False] * block.size
    return marked_a, marked_b


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def _cell(line: Line | None, marks: Sequence[bool]) -> Html:
    if line is None:
        return el("code", class_="none", aria_hidden="true")
    return el("code", list(_pieces(line.text, marks)))


def _pieces(text: str, marks: Sequence[bool]) -> Iterator[Html]:
    """Yield the tokens, neighbours of one look together."""
    tokens = _tokens(text)
    flags = list(marks) or [False] * len(tokens)
    looks = [*_looks(text, tokens)]
    for (look, marked), found in groupby(
        zip(tokens, looks, flags, strict=True), lambda one: (one[1], one[2])
    ):
        piece = el("span", "".join(token for token, _, _ in found), class_=look or None)
        yield el("mark", piece) if marked else piece


def _looks(text: str, tokens: Sequence[str]) -> Iterator[str]:
    """Say for each token what it is: the value defined, its type, the op, or the rest."""
    found = _HEAD.match(text)
    ends = [found.end(1), found.start(3), found.end(3)] if found else [0, 0, 0]
    position = 0
    for token in tokens:
        if position < ends[0]:
            yield "value"
        elif position < ends[1]:
            yield "type"
        elif position < ends[2]:
            yield "op"
        else:
            yield "value" if token.startswith("%") else ""
        position += len(token)
