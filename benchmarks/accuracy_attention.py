"""What each choice of 8-bit attention buys, from `benchmarks.attention_accuracy`, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.accuracy_table import markdown

CHOICES: Mapping[str, tuple[str, str]] = {
    "q and k in int8, not e4m3": ("QK int8, scales per head", "QK fp8, scales per head"),
    "the same, both turned": ("QK int8, Hadamard", "QK fp8, Hadamard"),
    "q and k in int8, a scale per query, not e4m3 (recipes)": ("recipe int8-fast", "recipe fp8"),
    "q and k turned": ("QK int8, Hadamard", "QK int8, scales per head"),
    "a scale per query": ("QK int8, q per token", "QK int8, scales per head"),
    "the same, q and k turned": ("QK int8, Hadamard, q per token", "QK int8, Hadamard"),
    "a scale per key": ("QK int8, k per token", "QK int8, scales per head"),
    "keys less their middle": ("QK int8, K less its middle", "QK int8, scales per head"),
    "the same, turned, a scale per query": (
        "QK int8, Hadamard, q per token, K less its middle",
        "QK int8, Hadamard, q per token",
    ),
    "the same, weights and values in bf16 (recipes)": (
        "recipe int8",
        "recipe int8, K not centred",
    ),
    "keys less their mean, a scale per key": ("QK int8, K less its mean", "QK int8, k per token"),
    "weights and values in bf16, not e4m3 (recipes)": ("recipe int8", "recipe int8-fast"),
    "weights in bf16, not e4m3": ("P bf16", "P fp8"),
    "values in bf16, not e4m3": ("V bf16", "V fp8"),
}
"""The cell with a choice, and the one without."""


def document(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each choice: the error of one step without it, with it, and the change."""
    headers = ["choice"]
    for found in results:
        headers += [f"{found['checkpoint'].upper()}, without", "with", "change"]
    rows = [[title, *_figures(pair, results)] for title, pair in CHOICES.items()]
    return markdown(headers, [row for row in rows if any(row[1:])])


def _figures(pair: tuple[str, str], results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for found in results:
        cells = found["cells"]
        if not set(pair) <= set(cells):
            yield from ("", "", "")
            continue
        with_it, without = (cells[one]["float"] for one in pair)
        yield from (f"{without:.3%}", f"{with_it:.3%}", f"{with_it / without - 1:+.0%}")
