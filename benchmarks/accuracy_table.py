"""The results of `benchmarks.accuracy` as Markdown: a table for each subject, budgets and goals.

python -m benchmarks.accuracy_table benchmarks/results/accuracy-*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

from benchmarks.accuracy_columns import COLUMNS, Column

WORST = 0.05
Found = Mapping[str, Any]
_HIGHER_IS_WORSE = ("one_step", "temporal")
_HEADERS = ("", "one step", "worst", "PSNR, dB", "worst", "SSIM", "worst", "temporal", "worst",
            "recognised")  # fmt: skip
_FORMATS = {"one_step": "{:.2%}", "psnr": "{:.1f}", "ssim": "{:.4f}", "temporal": "{:.2%}"}
_KINDS = {"plain": "as trained", "outliers": "with outlier channels"}
BUDGETS = {"auto-0.5": 0.005, "auto-1": 0.01, "auto-2": 0.02}
"""Columns by a budget, and the largest one-step error that each was asked for."""
_ABOUT_BUDGETS = """\
`Recipe.auto(max_error=...)` bounds the error of the worst call that was held back from
calibration, of the videos that it was calibrated on. Here is the one-step error of the worst
call of each of the other videos, over the budget: a budget is an estimate of what they will err
by, and no bound on it."""


def spread(name: str, values: Tensor) -> dict[str, Any]:
    """Return the mean of a figure, and of its worst twentieth, or of the worst one of a few."""
    ordered = values.sort(descending=name in _HIGHER_IS_WORSE).values
    worst = ordered[: max(1, int(WORST * len(values)))]
    each = [float(f"{value:.6g}") for value in values.tolist()]
    return {"mean": float(values.mean()), "worst": float(worst.mean()), "each": each}


def line(figures: Found, column: Column) -> str:
    """Return the figures of one column in a line."""
    return ", ".join(cell for cell in _cells(figures, column) if cell)


def _cells(figures: Found, column: Column) -> list[str]:
    for word in ("left_out", "failed"):
        if word in figures:
            reason = figures[word].splitlines()[0]
            return [column.title, f"{word.replace('_', ' ')}: {reason}"]
    cells = [column.title]
    for name, text in _FORMATS.items():
        cells += [text.format(figures[name][how]) for how in ("mean", "worst")]
    return [*cells, f"{figures['recognised']:.0%}"]


def document(results: Sequence[Found]) -> str:
    """Return a table for each subject, and one of what was to be reached."""
    parts = [*map(_section, results), *_budgets(results), "### Goals", _goals(results)]
    return "\n\n".join(parts)


def subject(found: Found) -> str:
    """Return the name of a subject in tables."""
    return f"{found['checkpoint'].upper()}, {_KINDS[found['kind']]}"


def _section(found: Found) -> str:
    videos, right = len(found["asked"]), found["original"]["recognised"]
    title = f"### {subject(found)}"
    about = f"{videos} videos, of which the float32 original shows {right:.0%} as asked for."
    rows = [_cells(found["columns"][c.name], c) for c in COLUMNS if c.name in found["columns"]]
    return "\n\n".join([title, about, markdown(_HEADERS, rows)])


def _budgets(results: Sequence[Found]) -> list[str]:
    rows = [row for found in results for row in _budgets_of(found)]
    if not rows:
        return []
    headers = ("subject", "budget", "mean", "worst 5 %", "worst", "videos beyond the budget")
    return ["### Budgets", _ABOUT_BUDGETS, markdown(headers, rows)]


def _budgets_of(found: Found) -> Iterator[list[str]]:
    for name, budget in BUDGETS.items():
        worst = found["columns"].get(name, {}).get("worst_call")
        if worst is None:
            continue
        over = [worst["mean"], worst["worst"], max(worst["each"])]
        beyond = sum(error > budget for error in worst["each"])
        ratios = [f"{error / budget:.2f}" for error in over]
        yield [subject(found), f"{budget:.1%}", *ratios, f"{beyond} of {len(worst['each'])}"]


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in which every cell stands as it is."""
    return tabulate(list(rows), headers, tablefmt="github", disable_numparse=True)


def _goals(results: Sequence[Found]) -> str:
    rows = [row for found in results for row in _goals_of(found)]
    ahead = [gain for found in results if (gain := _over_smoothquant(found)) is not None]
    if ahead:
        mean = sum(ahead) / len(ahead)
        rows.append(_goal("all", "int8 over ModelOpt's SmoothQuant, mean", mean, 1.0))
    return markdown(("subject", "mean PSNR", "dB", "at least", "met"), rows)


def _goals_of(found: Found) -> Iterator[list[str]]:
    where = f"{found['checkpoint']} {found['kind']}"
    int8, attention = mean_psnr(found, "int8"), mean_psnr(found, "int8-attention")
    if int8 is not None:
        yield _goal(where, "int8", int8, 45.0)
    if attention is not None:
        yield _goal(where, "int8, int8 attention", attention, 42.0)
    for ours, peer, least in (
        ("int8", "torchao-fp8", 9.0),
        ("bf16-int8", "bf16-torchao-fp8", 9.0),
        ("fp8", "torchao-fp8", -0.2),
    ):
        gain = _difference(found, ours, peer)
        if gain is not None:
            yield _goal(where, f"{ours} over {peer}", gain, least)
    gain = _over_smoothquant(found)
    if gain is not None:
        yield _goal(where, "int8 over ModelOpt's SmoothQuant, the better alpha", gain, 0.0)


def _goal(where: str, what: str, value: float, least: float) -> list[str]:
    return [where, what, f"{value:.1f}", f"{least:.1f}", "yes" if value >= least else "**no**"]


def _over_smoothquant(found: Found) -> float | None:
    gains = [_difference(found, "int8", peer) for peer in ("modelopt-int8", "modelopt-int8-half")]
    return min((gain for gain in gains if gain is not None), default=None)


def _difference(found: Found, ours: str, peer: str) -> float | None:
    one, other = mean_psnr(found, ours), mean_psnr(found, peer)
    return None if one is None or other is None else one - other


def mean_psnr(found: Found, column: str) -> float | None:
    """Return the mean PSNR of a column in dB, or None where it was not measured."""
    figures = found["columns"].get(column, {})
    return float(figures["psnr"]["mean"]) if "psnr" in figures else None


def main(paths: Sequence[str]) -> None:
    """Print the document of result files."""
    print(document([json.loads(Path(path).read_text())["results"] for path in paths]))


if __name__ == "__main__":
    main(sys.argv[1:])
