"""The parts of a report page on bytes and milliseconds: weights, times, what is done once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wancompile.hoist import Hoisting
from wancompile.html.markup import Html, el, join
from wancompile.html.sections import tr
from wancompile.report import Report, Stored
from wancompile.times import FIXED, Measured, PartTime, Predicted, as_text
from wancompile.units import nbytes, percent, plural

# Colours of what is stored in 8 bits; everything else is grey.
_EIGHT = {"int8": 0, "fp8": 1}
_GREY = 9
# The share of the whole width from which on there is room for a name.
_LABELLED = 0.12


def weights(report: Report) -> Html:
    """Return the bytes of all stored tensors before, and by type after."""
    largest = max(report.bytes_before, report.bytes_after, 1)
    before = [("as loaded", report.bytes_before, _GREY)]
    after = [(one.dtype, one.nbytes, _EIGHT.get(one.dtype, _GREY)) for one in report.stored]
    bars = [
        _stack("before", before, largest, nbytes(report.bytes_before)),
        _stack("after", after, largest, nbytes(report.bytes_after)),
    ]
    names = ["stored as", "tensors", "bytes", "share", "holds"]
    rows = [
        tr(names, [el("code", one.dtype), f"{one.tensors:,}", nbytes(one.nbytes),
                   percent(one.nbytes / max(report.bytes_after, 1)), _holds(one)])
        for one in report.stored
    ]  # fmt: skip
    return join(el("div", bars, class_="stacks"), _table(names, rows))


def _holds(one: Stored) -> str:
    return "weights of quantized linears" if one.dtype in _EIGHT else "all else, scales included"


def times(predicted: Predicted | None, measured: Measured | None) -> Html:
    """Return the milliseconds of each part: predicted before and after, and measured."""
    parts = [
        el("p", f"Predicted: {predicted.summary}.") if predicted else None,
        el("p", _measured(measured)) if measured else None,
    ]
    before = {one.part: one for one in predicted.parts} if predicted else {}
    clock = dict(measured.parts) if measured else {}
    names = ["part", "sites"]
    names += ["bf16, predicted", "as compiled, predicted"] if predicted else []
    names += ["measured"] if measured else []
    largest = max([one.float_ms for one in before.values()], default=1e-30)
    slowest = max(clock.values(), default=1e-30)
    rows = []
    for part in dict.fromkeys([*before, *clock]):
        cells: list[object] = [part, _sites(before.get(part))]
        if predicted:
            found = before.get(part)
            cells += [_bar(found.float_ms if found else None, largest, "before"),
                      _bar(found.ms if found else None, largest, "after")]  # fmt: skip
        if measured:
            cells.append(_bar(clock.get(part), slowest, "clock"))
        rows.append(tr(names, cells))
    fixed = FIXED in before
    note = f"No recipe changes {FIXED}; their rates are those of bf16." if fixed else None
    return join(parts, _table(names, rows), el("p", note, class_="note") if note else None)


def _sites(one: PartTime | None) -> str:
    return f"{one.sites:,}" if one is not None and one.sites else "-"


def _measured(found: Measured) -> str:
    return (
        f"Measured op by op on {found.device}: {as_text(found.ms)}, the median of "
        f"{plural(found.runs, 'run')}."
    )


def _bar(value: float | None, largest: float, class_: str) -> Html | str:
    if value is None:
        return "-"
    width = f"width:{100 * value / largest:.1f}%"
    return el("span", el("i", style=width, class_=class_), as_text(value), class_="bar")


def hoisted(found: Hoisting) -> Html:
    """Return what is computed once for each prompt."""
    facts: Mapping[str, str] = {
        "computed from": ", ".join(found.inputs),
        "linears": f"{found.linears:,}",
        "their weights": nbytes(found.weight_bytes),
        "of these on the host": nbytes(found.moved_bytes) if found.moved_bytes else "none",
        "kept of a prompt": nbytes(found.cached_bytes),
        "prompts kept": f"{found.prompts:,}",
    }
    names = ["what", "how much"]
    return _table(names, [tr(names, [name, value]) for name, value in facts.items()])


def _stack(name: str, parts: Sequence[tuple[str, int, int]], largest: int, total: str) -> Html:
    """Draw parts of a sum beside each other, as wide as their share of the `largest` sum."""
    pieces = [
        el("i", el("span", label) if size > _LABELLED * largest else None,
           style=f"width:{100 * size / largest:.2f}%", class_=f"c{colour}",
           title=f"{label}: {nbytes(size)}")
        for label, size, colour in parts
        if size
    ]  # fmt: skip
    return el(
        "div", el("b", name), el("span", pieces, class_="stack"), el("span", total), class_="sum"
    )


def _table(names: Sequence[str], rows: Sequence[Html]) -> Html:
    head = el("tr", [el("th", name, scope="col") for name in names])
    return el("table", el("thead", head), el("tbody", rows), class_="cards")
