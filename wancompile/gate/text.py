"""Checks as text tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from wancompile.gate.check import Check, Kind
from wancompile.gate.compare import SiteError
from wancompile.units import percent, plural

if TYPE_CHECKING:
    from wancompile.gate.rounds import Gate

HEADERS = ["worst", "place", "error", "SQNR", "cosine", "limit"]
_LISTED = 12


def check_text(check: Check) -> str:
    """Return the worst figure of each kind with its limit, and what is beyond one."""
    table = tabulate(rows_of(check), headers=HEADERS, disable_numparse=True)
    lines = [summary(check), str(table)]
    found = check.violations
    lines += [f"beyond its limit: {one}" for one in found[:_LISTED]]
    if len(found) > _LISTED:
        lines.append(f"and {len(found) - _LISTED} more")
    return "\n".join(lines)


def gate_text(gate: Gate) -> str:
    """Return the check, and what fell back."""
    found = [f"fell back: {one}" for one in gate.fallbacks]
    more = [f"and {len(found) - _LISTED} more fell back"] if len(found) > _LISTED else []
    return "\n".join([check_text(gate.check), *found[:_LISTED], *more])


def summary(check: Check) -> str:
    """Return in one line on what the check rests and how it ended."""
    calls = plural(check.calls, "held-out call" if check.held_out else "call")
    note = "" if check.held_out else " that calibration has seen, too, or that only shows shapes"
    count = len(check.violations)
    result = "all within limits" if count == 0 else f"{plural(count, 'figure')} beyond a limit"
    return f"checked on {calls}{note}: {result}"


def rows_of(check: Check) -> list[list[str]]:
    """Return a row for each kind of figure that there is: its worst, and the limit."""
    limits = check.limits
    rows = [
        _error_row(kind, errors, getattr(limits, kind))
        for kind, errors in (
            (Kind.OUTPUT, check.outputs),
            (Kind.BLOCK, check.blocks),
            (Kind.SITE, check.sites),
        )
        if errors
    ]
    rows += [
        _share_row(name, figures, limit)
        for name, figures, limit in (
            ("of its own", check.own, limits.own),
            ("largest code", check.clipped, limits.clipped),
        )
        if figures
    ]
    count = sum(check.broken.values())
    first = next(iter(check.broken), "-")
    return [*rows, ["NaN, infinity", first, f"{count:,}", "", "", f"{limits.broken:,}"]]


def _error_row(kind: Kind, errors: Sequence[SiteError], limit: float) -> list[str]:
    worst = max(errors, key=lambda one: (one.relative != one.relative, one.relative))
    figures = [percent(worst.relative, 2), f"{worst.sqnr:.1f} dB", f"{worst.cosine:.6f}"]
    return [str(kind), worst.site, *figures, percent(limit)]


def _share_row(name: str, figures: Mapping[str, float], limit: float) -> list[str]:
    place = max(figures, key=lambda one: (figures[one] != figures[one], figures[one]))
    return [name, place, percent(figures[place], 2), "", "", percent(limit)]
