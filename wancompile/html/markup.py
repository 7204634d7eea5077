"""HTML from Python calls, escaped by construction."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

_VOID = frozenset({"br", "img", "input", "meta", "line", "circle", "rect", "path"})


class Html(str):
    """Text that is markup already; any other string is escaped where it is put into an element."""

    __slots__ = ()


def el(name: str, /, *children: object, **attributes: object) -> Html:
    """Return an element.

    `children` are markup, text, numbers, None (left out), or nested lists and generators of them.
    Names of `attributes` lose a trailing underscore and have others turned to dashes; None and
    False leave the attribute out, True gives it no value.
    """
    head = "".join([name, *(_attribute(key, value) for key, value in attributes.items())])
    if name in _VOID:
        return Html(f"<{head}/>")
    return Html(f"<{head}>{join(children)}</{name}>")


def join(*children: object) -> Html:
    """Return several pieces as one."""
    return Html("".join(_flatten(children)))


def _flatten(child: object) -> Iterator[str]:
    if child is None:
        return
    if isinstance(child, Html):
        yield child
    elif isinstance(child, (list, tuple, Iterator)):
        for one in child:
            yield from _flatten(one)
    else:
        yield escape(str(child))


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
