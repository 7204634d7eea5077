"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap

from wancompile.cli import target
from wancompile.plan import GroupPlan, Leftover, Plan
from wancompile.units import count, flops, nbytes, percent, plural, seconds, shape

# Lines are no longer than this, whatever the terminal.
WIDTH = 100
# Of the linears that share a reason, so many are named; the rest is counted.
NAMED = 3
NUMBERS = frozenset({"groups", "linears", "before", "after", "calls", "work", "share", "in 8 bits"})


def as_text(subject: target.Subject, found: Plan, width: int = WIDTH) -> str:
    """Return the plan in lines of at most `width` columns, but for what cannot be broken."""
    parts = [
        _facts(subject, found, width),
        _sizes(found),
        _groups(found.groups, width),
        _reasons(found.groups, width),
        _leftovers(found.leftovers, width),
        _steady(found, width),
        _work(found),
        _cost(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _facts(subject: target.Subject, found: Plan, width: int) -> str:
    facts = found.facts
    dtypes = ", ".join(f"{nbytes(size)} {dtype}" for dtype, size in facts.dtypes.items())
    inputs = [f"{one.name}[{shape(one.shape)}]" for one in facts.inputs]
    attentions = f"{facts.self_attentions} self- and {facts.cross_attentions} cross-attentions"
    lines = [
        f"{subject.name}: {subject.description}",
        f"{count(facts.parameters)} parameters, {dtypes}",
        f"{attentions}, {facts.heads} heads of {facts.head_dim}, {facts.tokens:,} video tokens",
        *_wrapped(", ".join(inputs), width),
    ]
    if subject.experts > 1:
        lines.append(f"One of {subject.experts} transformers of this kind in the pipeline.")
    return "\n".join(lines)


def _sizes(found: Plan) -> str:
    share = percent(found.bytes_after / max(1, found.bytes_before))
    sizes = f"{nbytes(found.bytes_before)} to {nbytes(found.bytes_after)} ({share})"
    attention = found.recipe.attention
    wish = f"self-attention with {attention}" if attention else "attention in float"
    return f"Recipe {found.recipe.name}: weights {sizes}, {wish}"


def _groups(groups: Sequence[GroupPlan], width: int) -> str:
    columns: dict[str, list[object]] = {
        "role": [one.role for one in groups],
        "groups": [one.groups for one in groups],
        "linears": [one.linears for one in groups],
        "reads": [one.source for one in groups],
        "1/s goes to": [one.fold for one in groups],
        "in": [one.dtype or "float" for one in groups],
        "before": [nbytes(one.bytes_before) for one in groups],
        "after": [nbytes(one.bytes_after) for one in groups],
    }
    table = _table(columns)
    if len(table.partition("\n")[0]) <= width:
        return table
    # The role of a group says most of what it reads.
    return _table({name: cells for name, cells in columns.items() if name != "reads"})


def _reasons(groups: Sequence[GroupPlan], width: int) -> str:
    lines = [
        line
        for one in groups
        if one.fold_reason and one.smooth
        for line in _wrapped(f"{one.role}: {one.fold_reason}", width, indent=2, hang=2)
    ]
    if not lines:
        return ""
    law = "Calibration finds a scale s that evens out channels. It is multiplied into the weights, "
    where = "and 1/s into what comes before them, or else into the quantise op:"
    return "\n".join([*_wrapped(law + where, width), *lines])


def _leftovers(leftovers: Sequence[Leftover], width: int) -> str:
    if not leftovers:
        return ""
    lines = ["In no group, left in floating point:"]
    for one in leftovers:
        size = f"{plural(len(one.sites), 'linear')}, {nbytes(one.nbytes)}"
        lines += _wrapped(f"{size}: {one.reason}", width, indent=2, hang=2)
        lines += _wrapped(_named(one.sites), width, indent=4)
    return "\n".join(lines)


def _steady(found: Plan, width: int) -> str:
    steady = found.steady
    if steady is None:
        return ""
    weights, of_weights = steady.bytes_after, steady.bytes_after / max(1, found.bytes_after)
    work, of_work = steady.flops, steady.flops / max(1, found.flops)
    linears = plural(steady.linears, "linear")
    lines = [
        *_wrapped(f"Computed once for each prompt, from {', '.join(steady.inputs)}:", width),
        f"  {linears}, {nbytes(weights)} of weights ({percent(of_weights)}) when quantized",
        f"  {flops(work)} of work ({percent(of_work, 2)})",
        f"  {nbytes(steady.cached_bytes)} kept of each prompt",
    ]
    return "\n".join(lines)


def _wrapped(text: str, width: int, indent: int = 0, hang: int = 0) -> list[str]:
    """Break at spaces; `indent` the first line, and further ones by `hang` more."""
    return wrap(
        text,
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hang),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _named(sites: Sequence[str]) -> str:
    more = len(sites) - NAMED
    return ", ".join(sites[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _work(found: Plan) -> str:
    parts = [(one.part, one.calls, one.flops, one.quantized) for one in found.work]
    calls = sum(one.calls for one in found.work)
    parts.append(("total", calls, found.flops, found.quantized_flops))
    total = max(1, found.flops)
    return _table(
        {
            "one call of the model": [part for part, _, _, _ in parts],
            "calls": [calls for _, calls, _, _ in parts],
            "work": [flops(done) for _, _, done, _ in parts],
            "share": [percent(done / total) for _, _, done, _ in parts],
            "in 8 bits": [_share(quantized, done) for _, _, done, quantized in parts],
        }
    )


def _share(quantized: int, done: int) -> str:
    return percent(quantized / max(1, done)) if quantized else "-"


def _cost(found: Plan) -> str:
    peak = f", peak memory {nbytes(found.peak_bytes)}" if found.peak_bytes is not None else ""
    linears = sum(one.linears for one in found.groups)
    return (
        f"{plural(linears, 'linear')} in {sum(one.groups for one in found.groups):,} groups; "
        f"planned in {seconds(found.seconds)}{peak}"
    )


def _table(columns: Mapping[str, Sequence[object]]) -> str:
    """Return a table with its headers underlined, numbers to the right."""
    drawn = [_column(name, list(map(str, cells))) for name, cells in columns.items()]
    return "\n".join("  ".join(row).rstrip() for row in zip(*drawn, strict=True))


def _column(name: str, cells: Sequence[str]) -> list[str]:
    width = max(map(len, (name, *cells)))
    place = str.rjust if name in NUMBERS else str.ljust
    return [place(name, width), "-" * width, *(place(cell, width) for cell in cells)]
