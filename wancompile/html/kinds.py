"""The repeated blocks of one or two programs, those that are alike shown once."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch.fx import Node

from wancompile.html import picture
from wancompile.html.graph import listing, panes
from wancompile.html.markup import Html, el, join
from wancompile.inspect import Line, aligned, is_under, lines, path_of
from wancompile.ir.blocks import blocks
from wancompile.program import Program
from wancompile.units import plural

# Kinds of blocks that are drawn; where a recipe differs from block to block there may be more.
_DRAWN, _LISTED = 8, 4

_VALUE = re.compile(r"%[\w.:#]+")


@dataclass(frozen=True)
class Kind:
    """Blocks that read alike but for the names of values: the first is shown for all."""

    blocks: tuple[str, ...]
    lines: tuple[Sequence[Line], ...]

    @property
    def first(self) -> str:
        """The block that is shown; empty for a whole graph that has none."""
        return self.blocks[0]


def render(programs: Sequence[Program], wanted: str | None) -> Html:
    """Return pictures and listings of every kind of block, with a field to search them.

    Args:
        programs: before and after, or one alone.
        wanted: a glob of modules to show in the place of the blocks.

    Raises:
        InputError: the glob matches nothing.
    """
    found = _kinds(programs) if wanted is None else [_one(programs, wanted)]
    shown = found[:_DRAWN]
    controls = el(
        "div",
        el("input", type="search", id="find", placeholder="Search ops, sites, weights",
           aria_label="Search the graphs"),
        _menu(shown) if sum(len(kind.blocks) for kind in shown) > 1 else None,
        el("output", "", id="found", aria_live="polite"),
        class_="controls",
    )  # fmt: skip
    more = len(found) - len(shown)
    note = f"{plural(more, 'more kind')} of blocks; inspect --site NAME --html draws any one."
    return join(
        controls,
        picture.legend(),
        [_kind(programs, kind, index) for index, kind in enumerate(shown)],
        el("p", note, class_="note") if more else None,
    )


def _kinds(programs: Sequence[Program]) -> list[Kind]:
    names = dict.fromkeys(blocks(str(group.key) for group in programs[0].groups).values())
    if not names:
        return [Kind(("",), tuple(lines(program) for program in programs))]
    texts = [_by_block(lines(program), names) for program in programs]
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        key = tuple(_anonymous(text[name], name) for text in texts)
        found.setdefault(key, []).append(name)
    return [Kind(tuple(alike), tuple(text[alike[0]] for text in texts)) for alike in found.values()]


def _one(programs: Sequence[Program], wanted: str) -> Kind:
    return Kind((wanted,), tuple(lines(program, wanted) for program in programs))


def _by_block(found: Sequence[Line], names: Collection[str]) -> dict[str, list[Line]]:
    depth = next(iter(names)).count(".") + 1
    split: dict[str, list[Line]] = {name: [] for name in names}
    for line in found:
        name = ".".join(re.split(r"[.:#]", line.path)[:depth])
        if name in split:
            split[name].append(line)
    return split


def _anonymous(found: Sequence[Line], name: str) -> str:
    """Return lines as they are in every block alike: values numbered, the block's name gone."""
    own = re.compile(rf"(?<![\w]){re.escape(name)}(?=[.:#])")
    numbers: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        return numbers.setdefault(match.group(), f"%{len(numbers)}")

    return "\n".join(_VALUE.sub(number, own.sub("*", line.text)) for line in found)


def _menu(shown: Sequence[Kind]) -> Html:
    """Return a menu of all blocks; those of one kind show the same."""
    options = [
        el("option", name if name == kind.first else f"{name} (like {kind.first})", value=index)
        for name, index, kind in sorted(
            ((name, index, kind) for index, kind in enumerate(shown) for name in kind.blocks),
            key=lambda one: _natural(one[0]),
        )
    ]
    return el("select", options, id="kind", aria_label="Block")


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _kind(programs: Sequence[Program], kind: Kind, index: int) -> Html:
    names = [program.level.name for program in programs]
    pictures = [
        el(
            "figure",
            el("figcaption", f"{kind.first or 'The whole graph'} at {name}"),
            el("div", picture.draw(program.graph, _inside(program, kind), kind.first, name),
               class_="sideways", tabindex=0, role="group", aria_label=f"Picture at {name}"),
        )
        for program, name in zip(programs, names, strict=True)
    ]  # fmt: skip
    text = _listing(kind, names) if index < _LISTED else None
    return el(
        "div",
        el("h3", _title(kind)),
        el("div", pictures, class_="pair"),
        el("details", el("summary", "Line by line"), text, class_="listing") if text else None,
        class_="kind",
        data_kind=index,
    )


def _title(kind: Kind) -> str:
    if len(kind.blocks) == 1:
        return kind.first or "The whole graph"
    return f"{kind.first}, and {plural(len(kind.blocks) - 1, 'block')} like it"


def _listing(kind: Kind, names: Sequence[str]) -> Html:
    if len(kind.lines) == 1:
        return listing(kind.lines[0], names[0])
    before, after = kind.lines
    return panes(aligned(before, after), *names)


def _inside(program: Program, kind: Kind) -> set[Node]:
    return {
        node
        for node in program.graph.nodes
        if node.op == "call_function" and (not kind.first or is_under(path_of(node), kind.first))
    }
