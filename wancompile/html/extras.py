"""What a caller adds to a report: tables of results and pictures."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wancompile.errors import InputError
from wancompile.html.markup import Html, el

_MIME = re.compile(r"(image|video)/[\w.+-]+")


class Picture(NamedTuple):
    """An image or a video with a title; `mime` is such as `image/png` or `video/mp4`."""

    title: str
    mime: str
    data: bytes


class Table(NamedTuple):
    """A table of results; cells are printed as they are."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""


@dataclass(frozen=True)
class Extras:
    """Pictures, then tables, under one heading; plain tuples in the order of the fields will do."""

    title: str = "Results"
    tables: Sequence[Table | tuple[str, Sequence[str], Sequence[Sequence[object]]]] = ()
    pictures: Sequence[Picture | tuple[str, str, bytes]] = ()


def render(extras: Extras) -> list[Html]:
    """Return the pictures and the tables.

    Raises:
        InputError: a picture is neither an image nor a video.
    """
    tables = [_table(Table(*one)) for one in extras.tables]
    pictures = [_picture(Picture(*one)) for one in extras.pictures]
    return [el("div", pictures, class_="pictures"), *tables] if pictures else tables


def _table(table: Table) -> Html:
    head = el("tr", [el("th", name, scope="col") for name in table.headers])
    names = list(table.headers)
    body = [
        el("tr", [el("td", cell, data_label=name) for name, cell in zip(names, row, strict=True)])
        for row in table.rows
    ]
    return el(
        "div",
        el("h3", table.title),
        el("table", el("thead", head), el("tbody", body), class_="cards results"),
        el("p", table.note, class_="note") if table.note else None,
    )


def _picture(picture: Picture) -> Html:
    kind = _MIME.fullmatch(picture.mime)
    if kind is None:
        raise InputError(f"{picture.title}: {picture.mime!r} is neither an image nor a video")
    source = f"data:{picture.mime};base64,{base64.b64encode(picture.data).decode('ascii')}"
    if kind.group(1) == "image":
        shown = el("img", src=source, alt=picture.title, loading="lazy")
    else:
        shown = el("video", src=source, controls=True, loop=True, muted=True, playsinline=True)
    return el("figure", shown, el("figcaption", picture.title))
