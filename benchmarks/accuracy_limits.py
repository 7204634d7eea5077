"""What limits the quality of 8 bits, from the results of `benchmarks.accuracy`, as Markdown.

Two tables are computed: what int8 adds to the error that bf16 has by itself, and by how much each
feature moves videos. The rest is in `accuracy_notes.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import log10
from pathlib import Path

import torch

from benchmarks.accuracy_table import Found, markdown, mean_psnr, subject

_NOTES = Path(__file__).with_name("accuracy_notes.md")
_GOAL = 9.0
"""dB of int8 over torchao's fp8, both in bf16."""
FEATURES: Mapping[str, tuple[str, str]] = {
    "int8: smoothing": ("int8-nearest", "int8-rounded"),
    "int8: clipping and GPTQ": ("int8", "int8-nearest"),
    "fp8: smoothing, clipping and GPTQ": ("fp8", "fp8-rounded"),
}
"""The column with a feature, and the one without."""


def document(results: Sequence[Found]) -> list[str]:
    """Return the parts of the section: nothing where what it needs was not measured."""
    ceilings = [row for found in results if (row := _ceiling(found)) is not None]
    features = [row for title in FEATURES for found in results for row in _feature(title, found)]
    if not ceilings or not features:
        return []
    ceiling = markdown(
        ("PSNR, dB", "bf16", "bf16, ours int8", "int8 adds", f"for {_GOAL:.0f} dB it may add",
         "ours int8, the rest in float32", "bf16, torchao fp8", "bf16 over it"),
        ceilings,
    )  # fmt: skip
    feature = markdown(
        ("feature", "subject", "mean, dB", "worst 5 %, dB", "better videos"), features
    )
    about, between, notes = _NOTES.read_text(encoding="utf-8").split("<!-- table -->\n")
    return ["### What limits it", about, ceiling, between, feature, notes]


def added(whole: float, part: float) -> float | None:
    """Return the PSNR in dB of what comes on top of `part` in `whole`, or None for nothing.

    Mean squares of independent errors add up: 10^(-whole/10) = 10^(-part/10) + 10^(-added/10).
    """
    rest = 10 ** (-whole / 10) - 10 ** (-part / 10)
    return -10 * log10(rest) if rest > 0 else None


def _ceiling(found: Found) -> list[str] | None:
    names = ("bf16", "bf16-int8", "int8", "bf16-torchao-fp8")
    bf16, both, alone, peer = (mean_psnr(found, name) for name in names)
    if bf16 is None or both is None or alone is None or peer is None:
        return None
    figures = (bf16, both, added(both, bf16), added(peer + _GOAL, bf16), alone, peer, bf16 - peer)
    return [subject(found), *("-" if one is None else f"{one:.1f}" for one in figures)]


def _feature(title: str, found: Found) -> Iterator[list[str]]:
    figures = [found["columns"].get(name, {}).get("psnr") for name in FEATURES[title]]
    if None in figures:
        return
    with_it, without = figures
    gains = torch.tensor(with_it["each"]) - torch.tensor(without["each"])
    error = float(gains.std()) / len(gains) ** 0.5
    worst = with_it["worst"] - without["worst"]
    yield [
        title,
        subject(found),
        f"{float(gains.mean()):+.1f} ± {error:.1f}",
        f"{worst:+.1f}",
        f"{int((gains > 0).sum())} of {len(gains)}",
    ]
