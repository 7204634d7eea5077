"""The parts of a report page that list what the compiler did, skipped and found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from wancompile.gate.compare import Comparison
from wancompile.html.markup import Html, el, join
from wancompile.ir.blocks import blocks
from wancompile.ir.edit import Note
from wancompile.ir.site import Group, Ungrouped
from wancompile.program import PassRecord
from wancompile.recipe import Recipe
from wancompile.report import RoleSummary, Skip
from wancompile.units import percent, plural, seconds

# Notes with one text are listed together; past this many sites the rest is only counted.
MAX_SITES = 60


def pipeline(records: Sequence[PassRecord]) -> Html:
    """Return the passes in order, a line each, with what they did behind it."""
    longest = max((record.seconds for record in records), default=1.0)
    names = ("pass", "did", "skipped", "nodes", "time", "output moved")
    head = el("div", [el("span", name) for name in names], class_="pass head")
    parts: list[Html] = [head]
    for level, found in groupby(records, lambda record: record.level.name):
        parts.append(el("h3", f"to level {level}", class_="level"))
        parts += [_pass(record, longest) for record in found]
    return el("div", parts, class_="passes")


def _pass(record: PassRecord, longest: float) -> Html:
    change = record.nodes_after - record.nodes_before
    width = f"width:{100 * record.seconds / longest:.1f}%"
    cells = [
        el("span", record.name, class_="name"),
        _counted(len(record.done), "did"),
        _counted(len(record.skipped), "skipped"),
        el("span", f"{record.nodes_after:,}", el("small", f" {change:+,}" if change else "")),
        el("span", el("i", style=width, class_="time"), seconds(record.seconds), class_="bar"),
        el("span", _exactness(record.error), data_label="moved"),
    ]
    notes = [*_notes(record.done, "did"), *_notes(record.skipped, "skipped")]
    if not notes:
        return el("div", cells, class_="pass idle")
    return el("details", el("summary", cells, class_="pass"), el("ul", notes, class_="notes"))


def _exactness(error: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.1e}" if error else "not at all"


def _counted(number: int, label: str) -> Html:
    return el("span", f"{number:,}", data_label=label, class_=None if number else "zero")


def _notes(notes: Iterable[Note], kind: str) -> list[Html]:
    """List notes of one text as one."""
    sites: dict[str, list[str]] = {}
    for note in notes:
        sites.setdefault(note.text, []).append(note.site)
    return [
        el("li", el("b", text), " ", el("span", _names(found), class_="sites"), class_=kind)
        for text, found in sites.items()
    ]


def _names(sites: Sequence[str]) -> str:
    more = len(sites) - MAX_SITES
    return ", ".join(sites[:MAX_SITES]) + (f" and {more} more" if more > 0 else "")


def roles(summaries: Sequence[RoleSummary]) -> Html:
    """Return the table of roles with their mean errors."""
    largest = max([*(one.error_plain or 0.0 for one in summaries), 1e-30])
    names = ["role", "groups", "linears", "1/s goes to", "smoothed", "plain error", "as compiled"]
    head = el("tr", [el("th", name, scope="col") for name in names])
    rows = []
    for one in summaries:
        smoothed = f"{one.smoothed} of {one.groups}" if one.error_plain is not None else "-"
        cells = [
            one.role, one.groups, one.linears, ", ".join(one.folds), smoothed,
            _error_bar(one.error_plain, largest, "before"),
            _error_bar(one.error_smoothed, largest, "after"),
        ]  # fmt: skip
        rows.append(tr(names, cells))
    return el("table", el("thead", head), el("tbody", rows), class_="cards")


def _error_bar(value: float | None, largest: float, class_: str) -> Html | str:
    if value is None:
        return "-"
    width = f"width:{100 * value / largest:.1f}%"
    return el("span", el("i", style=width, class_=class_), percent(value, 3), class_="bar")


def groups(found: Sequence[Group], recipe: Recipe) -> Html:
    """Return every group, with a field to search them and a menu of roles."""
    options = [el("option", role) for role in dict.fromkeys(str(group.role) for group in found)]
    controls = el(
        "div",
        el("input", type="search", placeholder="Search members, folds, reasons", id="q",
           aria_label="Search groups"),
        el("select", el("option", "all roles", value=""), options, id="role", aria_label="Role"),
        el("select",
           el("option", "smoothed or not", value=""),
           el("option", "smoothed", value="yes"),
           el("option", "not smoothed", value="no"), id="smoothed", aria_label="Smoothed"),
        el("output", plural(len(found), "group"), id="shown"),
        class_="controls",
    )  # fmt: skip
    names = ["members", "role", "reads", "1/s goes to", "in", "alpha, beta", "error"]
    head = el("tr", [el("th", name, scope="col") for name in names])
    rows = [_group(group, recipe, names) for group in found]
    table = el("table", el("thead", head), el("tbody", rows), class_="cards", id="groups")
    return el("div", controls, el("div", table, class_="scroll", tabindex=0))


def _group(group: Group, recipe: Recipe, names: Sequence[str]) -> Html:
    spec, smoothing = recipe.spec_for(group), group.smoothing
    applied = smoothing is not None and smoothing.applied
    reason = el("small", group.fold_reason) if group.fold_reason else None
    cells: list[object] = [
        _members(group), group.role, group.source, [group.fold, reason],
        spec.name if spec else "float",
        f"{smoothing.alpha:g}, {smoothing.beta:g}" if smoothing and applied else "-",
        _moved(group),
    ]  # fmt: skip
    return tr(names, cells, data_role=group.role, data_smoothed="yes" if applied else "no")


def _members(group: Group) -> Html:
    """Write what the names have in common once, and the block they lie in softly."""
    split = [member.split(".") for member in group.members]
    shared = 0
    while shared < min(map(len, split)) - 1 and len({parts[shared] for parts in split}) == 1:
        shared += 1
    block = blocks(group.members[:1]).get(group.members[0], "")
    depth = block.count(".") + 1 if block else 0
    rest = ".".join(split[0][depth : max(shared, depth)])
    leaves = ", ".join(".".join(parts[max(shared, depth) :]) for parts in split)
    soft = el("span", f"{block}.", class_="type") if block else None
    return el("code", soft, f"{rest}." if rest else "", leaves)


def _moved(group: Group) -> Html | str:
    if group.smoothing is None:
        return "-"
    plain = percent(group.smoothing.error_plain, 3)
    if not group.smoothing.applied:
        return join(plain, el("small", group.smoothing.refusal, _rounded(group)))
    gain = group.smoothing.error_plain / max(group.smoothing.error_smoothed, 1e-30)
    after = el("b", percent(group.smoothing.error_smoothed, 3))
    text = el("small", f"{gain:.2f} times less", _rounded(group))
    return el("span", el("s", plain), " ", after, text)


def _rounded(group: Group) -> Html | None:
    """Say what was done to the weights beyond rounding to nearest."""
    found = group.rounding
    if found is None:
        return None
    tried = (
        ("clipped", found.clipped, found.clip_refusal),
        ("GPTQ", found.gptq, found.gptq_refusal),
    )
    said = [name if kept else f"not {name}: {why}" for name, kept, why in tried if kept or why]
    return el("small", f"{'; '.join(said)}: {percent(found.error, 3)}") if said else None


def skipped(skips: Sequence[Skip]) -> Html:
    """Return what was not rewritten, one entry per pass and reason."""
    if not skips:
        return el("p", "Nothing was skipped.", class_="note")
    return el("ul", [_skip(one) for one in skips], class_="reasons")


def _skip(one: Skip) -> Html:
    sources = dict.fromkeys(_short(note.source) for note in one.notes if note.source)
    times = len(one.notes)
    return el(
        "li",
        el("b", one.reason),
        el("small", f"{one.pass_name}, {times} times" if times > 1 else one.pass_name),
        el("code", _names([note.site for note in one.notes])),
        [el("small", source) for source in list(sources)[:3]],
    )


def _short(source: str) -> str:
    """Leave out where packages are installed: it says nothing and differs between machines."""
    return source.rpartition("site-packages/")[2]


def ungrouped(found: Sequence[Ungrouped]) -> Html:
    """Return the linears in no group, by reason."""
    if not found:
        return el("p", "Every linear is in a group.", class_="note")
    reasons: dict[str, list[str]] = {}
    for one in found:
        reasons.setdefault(one.reason, []).append(str(one.site))
    entries = [
        el(
            "li",
            el("b", reason),
            el("small", plural(len(sites), "linear")),
            el("code", _names(sites)),
        )
        for reason, sites in reasons.items()
    ]
    return el("ul", entries, class_="reasons")


def worst_sites(comparison: Comparison) -> Html:
    """Return the sites with the largest errors between two programs."""
    names = ["site", "role", "relative error", "SQNR", "cosine"]
    rows = [
        tr(names, [el("code", one.site), one.role, percent(one.relative, 3),
                    f"{one.sqnr:.1f} dB", f"{one.cosine:.6f}"])
        for one in comparison.worst(6)
    ]  # fmt: skip
    head = el("tr", [el("th", name, scope="col") for name in names])
    return el("table", el("thead", head), el("tbody", rows), class_="cards")


def tr(names: Sequence[str], cells: Sequence[object], **attributes: object) -> Html:
    """Return a row of a table; on narrow pages each cell shows its name."""
    row = [el("td", cell, data_label=name) for name, cell in zip(names, cells, strict=True)]
    return el("tr", row, **attributes)
