"""The page of a report: its parts in order, one file without links to anything outside."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from pathlib import Path

from wancompile.gate.compare import Comparison
from wancompile.html import amounts, budget, chart, gate, kinds, sections, stability
from wancompile.html.extras import Extras, render
from wancompile.html.markup import Html, el, join
from wancompile.program import Program
from wancompile.report import Report
from wancompile.times import Measured
from wancompile.units import nbytes, percent, plural, seconds

Section = tuple[str, str, str, Html]

# A browser refuses every request that a page of this policy would make.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; media-src data:"
)


def write_html(
    path: str | Path,
    report: Report,
    *,
    programs: tuple[Program, ...] | None = None,
    comparison: Comparison | None = None,
    measured: Measured | None = None,
    extras: Extras | None = None,
    title: str = "",
    block: str | None = None,
) -> Path:
    """Write `report` as one self-contained HTML file.

    Args:
        path: the file; folders above it are made.
        report: of `compile`, or of any program.
        programs: two programs of the model, before and after, or one alone; each block of them is
            shown, those that are alike once.
        comparison: their errors site by site, from `gate.compare.compare`.
        measured: the times of the parts, from `times.measure`; without it only those are shown
            that the report predicts.
        extras: tables and pictures of results, shown first.
        title: what was compiled, such as the name of a checkpoint.
        block: glob of the module to show of `programs`, in the place of the repeated blocks.

    Returns:
        The path.

    Raises:
        InputError: `block` matches nothing, or a picture has no image or video type.
    """
    parts = _sections(report, programs, comparison, measured, extras, block)
    name = " - ".join(part for part in (title, report.recipe.name, "wancompile") if part)
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("title", name),
        el("style", _asset("report.css")),
    )
    body = el(
        "body",
        el("a", "Skip to the report", href="#report", class_="skip"),
        _header(report, title),
        el("nav", [el("a", link, href=f"#{key}") for key, link, _, _ in parts],
           aria_label="Parts of the report"),
        el("main", [_section(*part) for part in parts], id="report"),
        el("script", _asset("report.js")),
    )  # fmt: skip
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"<!doctype html>\n{el('html', head, body, lang='en')}\n", encoding="utf-8")
    return target


def _asset(name: str) -> Html:
    return Html(files("wancompile.html").joinpath(name).read_text(encoding="utf-8"))


def _sections(
    report: Report,
    programs: tuple[Program, ...] | None,
    comparison: Comparison | None,
    measured: Measured | None,
    added: Extras | None,
    block: str | None,
) -> list[Section]:
    parts: list[Section] = []
    if added is not None:
        parts.append(("results", "Results", "", join(render(added))))
    if report.notes:
        parts.append(("notes", "Notes", "", join(el("p", one) for one in report.notes)))
    parts.append(("roles", "Roles", _ROLES, sections.roles(report.roles)))
    parts.append(("weights", "Weights", "", amounts.weights(report)))
    if report.predicted is not None or measured is not None:
        parts.append(("times", "Time", _TIMES, amounts.times(report.predicted, measured)))
    if any(group.smoothing for group in report.groups):
        parts.append(("errors", "Errors", _ERRORS, _group_chart(report)))
    if report.choice is not None:
        parts.append(("budget", "Budget", _BUDGET, budget.render(report.choice)))
    if report.gate is not None:
        parts.append(("gate", "Gate", _GATE, gate.render(report.gate)))
    if comparison is not None:
        parts.append(("sites", "Whole model", _sites_text(comparison), _site_chart(comparison)))
    if programs is not None:
        name = "Before and after" if len(programs) > 1 else "The graph"
        parts.append(("graph", name, _GRAPH, kinds.render(programs, block)))
    if report.hoisting is not None:
        parts.append(("hoisted", "Once a prompt", _HOISTED, amounts.hoisted(report.hoisting)))
    if report.stability is not None:
        parts.append(("calibration", "Calibration", _STABLE, stability.render(report.stability)))
    parts += [
        ("groups", "Groups", _GROUPS, sections.groups(report.groups, report.recipe)),
        ("passes", "Passes", _PASSES, sections.pipeline(report.records)),
        ("skipped", "Skipped", _SKIPPED, sections.skipped(report.skips)),
        ("ungrouped", "In no group", _UNGROUPED, sections.ungrouped(report.ungrouped)),
    ]
    return parts


_ROLES = (
    "Linears that read one value form a group; its role is proved from the dataflow around it. "
    "Errors are means over groups of the relative L2 error of the quantized output, on calibration "
    "tokens that did not choose the smooth scale s."
)
_ERRORS = "Each group by depth: open circles without smoothing, full ones as compiled."
_GATE = (
    "The worst figures against the original. Errors accumulate from the input of the model on, but "
    "for those that a group or an attention makes of its own."
)
_BUDGET = (
    "Why the recipe is what it is: the error of the model's output on held-out calls if one group "
    "or self-attention alone is in 8 bits, and what the best choices cost and lose."
)
_GROUPS = "What was found, where the reciprocal of the smooth scale went, and what it bought."
_PASSES = (
    "In the order they ran; a line with counts opens. The last column is how far the model's "
    "output moved over a run of exact passes, where it was measured."
)
_TIMES = (
    "A part is the groups of one role with the passes over memory that feed them, or a kind of "
    "attention. Predictions rest on kernels measured at the sizes of published models: models much "
    "smaller than these take longer than predicted."
)
_GRAPH = (
    "Each block as a picture, those that are alike once: a box computes, a line carries a value, "
    "and what only lies differently in memory is left out. Hover for the names of the values."
)
_HOISTED = (
    "What depends on the prompt alone is computed when a new one comes, and kept for the steps "
    "that follow."
)
_STABLE = (
    "How far scales move between two halves of the calibration calls: what one half knows and the "
    "other does not is what more calls would change."
)
_SKIPPED = "What a pass could have rewritten and did not, with the reason."
_UNGROUPED = "Linears that stay in floating point because no group claims them."


def _sites_text(comparison: Comparison) -> str:
    text = (
        f"Outputs of every linear and attention on one call, {comparison.after.name} against "
        f"{comparison.before.name}. Each program ran on its own values, so errors accumulate."
    )
    if comparison.left_out:
        text += (
            f" {plural(len(comparison.left_out), 'site')} left out: smoothing scales their values."
        )
    return text


def _section(key: str, title: str, text: str, content: Html) -> Html:
    return el(
        "section", el("h2", title), el("p", text, class_="lead") if text else None, content, id=key
    )


def _header(report: Report, title: str) -> Html:
    return el(
        "header",
        el("p", "wancompile report", class_="eyebrow"),
        el("h1", title or report.recipe.name),
        el("p", _summary(report), class_="summary"),
        el("dl", [_fact(*fact) for fact in _facts(report)]),
    )


def _summary(report: Report) -> str:
    kinds: Counter[str] = Counter()
    for group in report.groups:
        spec = report.recipe.spec_for(group)
        kinds[spec.name if spec else "floating point"] += len(group.sites)
    linears = ", ".join(f"{plural(n, 'linear')} in {kind}" for kind, n in kinds.most_common())
    attention = report.recipe.attention
    wish = f"attention with {attention}" if attention else "attention in floating point"
    if report.recipe.attention_rules:
        wish += f" with {plural(len(report.recipe.attention_rules), 'exception')}"
    return f"Recipe {report.recipe.name}: {linears or 'no linear'}, {wish}."


def _facts(report: Report) -> list[tuple[str, object, str]]:
    judged = [group.smoothing for group in report.groups if group.smoothing is not None]
    facts: list[tuple[str, object, str]] = []
    if report.bytes_before:
        share = report.bytes_after / report.bytes_before
        bar = el("span", el("i", style=f"width:{100 * min(1.0, share):.1f}%"), class_="meter")
        size = f"{nbytes(report.bytes_before)} to {nbytes(report.bytes_after)}"
        facts.append(("weights", size, join(bar, percent(share))))
    facts.append(("groups", f"{len(report.groups):,}", _members(report)))
    if judged:
        plain = sum(one.error_plain for one in judged) / len(judged)
        error = sum(one.error for one in judged) / len(judged)
        smoothed = f"{sum(one.applied for one in judged)} of {len(judged)}"
        facts.append(("smoothed", smoothed, "where it lowers the error"))
        facts.append(("mean error", percent(error, 3), f"{percent(plain, 3)} without smoothing"))
    total = sum(record.seconds for record in report.records)
    facts.append(("passes", len(report.records), f"in {seconds(total)}"))
    return facts


def _members(report: Report) -> str:
    members = sum(len(group.sites) for group in report.groups)
    return f"{plural(members, 'linear')}, {len(report.ungrouped)} in none"


def _fact(name: str, value: object, note: str) -> Html:
    return el("div", el("dt", name), el("dd", value), el("dd", note, class_="note"))


def _group_chart(report: Report) -> Html:
    last = max(1, len(report.groups) - 1)
    points = []
    for index, group in enumerate(report.groups):
        found = group.smoothing
        if found is None:
            continue
        after, plain = percent(found.error, 3), percent(found.error_plain, 3)
        text = f"{', '.join(group.members)}\n{plain} plain, {after} as compiled"
        before = found.error_plain if found.applied else None
        points.append(chart.Point(index / last, found.error, str(group.role), text, before))
    ticks = chart.ticks([str(group.key) for group in report.groups])
    caption = "Relative L2 error of each group by block"
    return chart.scatter(points, ticks, caption=caption, across="block")


def _site_chart(comparison: Comparison) -> Html:
    found = [one for one in comparison.errors if one.relative > 0]
    last = max(1, len(found) - 1)
    points = [
        chart.Point(
            index / last,
            one.relative,
            one.role or "in no group",
            f"{one.site}\n{percent(one.relative, 3)}, {one.sqnr:.1f} dB, cosine {one.cosine:.6f}",
        )
        for index, one in enumerate(found)
    ]
    ticks = chart.ticks([one.site for one in found])
    caption = "Relative L2 error of each output by block"
    drawn = chart.scatter(points, ticks, caption=caption, across="block")
    return join(drawn, el("h3", "Largest errors"), sections.worst_sites(comparison))
