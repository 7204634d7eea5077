"""The part of BENCHMARKS.md on speed, from the JSON of `benchmarks.h100`.

    python -m benchmarks.h100_table benchmarks/results/h100-*.json

Several files are merged: of a cell measured twice the last one counts, and cells of different runs
are compared through a column that is in both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import h100_figures as figures
from benchmarks.h100_figures import COMPILED, COMPILED_FA3, OURS, OURS_INT8, Cell, Cells
from benchmarks.h100_plan import COLUMNS, DEEP, ROWS, SHALLOW, WHOLE_ROW
from benchmarks.h100_profile import PARTS

# In the order in which people want to compare them.
_SHOWN = (
    "eager",
    "compile-sdpa",
    "compile-fa3",
    "compile-sage",
    "torchao-sdpa",
    "torchao-fa3",
    "float",
    "fp8",
    "int8",
    "fp8-attention",
    "int8-attention-fast",
    "int8-attention",
)
# What the numbers cannot say: what was tried, what it gave, and what limits it.
_NOTES = Path(__file__).with_name("h100_notes.md")
_HOW = f"""\
`python -m benchmarks.h100 FILE`, on one H100. All cells take half an hour of compiling and
measuring: in the ten minutes of one run the last ones have no time left, so what stands here is of
several runs, with `--rows` and `--columns` of what was missing.

- Weights are random: they serve for speed, and the errors below are errors on random activations,
  not of videos. Calibration data of ours is one random call.
- A **layer** is a block of the transformer. Its time is the difference between a model of {DEEP}
  layers and one of {SHALLOW}, divided by {DEEP - SHALLOW}: medians of forwards taken in turn, by
  CUDA events, after warm-up. The range is the least and the largest difference between any two.
- **All layers** is computed: the part of the model that is no layer, plus the number of its layers
  times a layer. So is its peak memory. What was measured with all layers in place has a section
  of its own.
- Every cell ran in a process of its own. They compile side by side; while one is timed, all others
  are stopped. **First call** is the first forward of {DEEP} layers, in which torch.compile and
  Triton compile, beside other processes; **compile** is the call of `wancompile.compile` before it.
  Neither is shown where a cache held kernels of an earlier cell.
- **Error** is the relative L2 distance of the output of {DEEP} layers from that of the same weights
  in fp32, TF32 off, at full size; empty where a run had no time for those.
- torch.compile sees the whole model; with torchao's fp8 (dynamic, per row), whose compilation takes
  minutes, each block on its own. SageAttention is 1.0.6, which is written in Triton.
- **Gain** is over torch.compile in bf16 with cuDNN attention. Columns of different runs, and so of
  different cards, are compared through a column that is in both, never by their times.
"""
_KERNELS = """\
Of one layer. The floor is the larger of two times: that of its bytes at the rate of a large copy,
and that of its FLOPs at the best rate that any matrix product of its type reached in the same
process. Ops that take less than 0.5 % of a layer are left out. Times are by CUDA events around each
op of the lowered program."""
_PARTS = """\
Milliseconds of one layer. Predicted is what would be won if ours ran at its floors, measured is
what was won. Times of torch.compile are the profiler's, by the names of kernels."""


def main(paths: Sequence[str]) -> None:
    """Print the document."""
    cells, surroundings = figures.load(map(Path, paths))
    print(document(cells, surroundings), end="")


def document(cells: Cells, surroundings: Sequence[dict[str, Any]]) -> str:
    """Return the whole document as Markdown."""
    parts = [
        "## Speed",
        _HOW.rstrip(),
        _machines(surroundings),
        "### Targets",
        target_table(cells),
        "### Layers and models",
        *(text for row in ROWS for text in _row_section(cells, row)),
        "### All layers, measured",
        _whole_section(cells),
        "### Kernels over their floors",
        _KERNELS,
        *(text for row in ROWS for text in _kernel_sections(cells, row)),
        "### Where the gain comes from",
        _PARTS,
        _gain_table(cells),
        *_not_run(cells),
        _NOTES.read_text(encoding="utf-8").strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(records: Iterable[Cell]) -> str:
    """Return a short table of cells for the terminal."""
    lines = [f"{'row':15}{'column':16}{'layer ms':>9}{'min..max':>17}{'model ms':>10}"
             f"{'GiB':>7}{'first s':>9}{'error':>10}"]  # fmt: skip
    for cell in records:
        layer, span, model, gib = _times(cell)
        first, error = _number(cell.get("first_call_s"), ".0f"), _number(cell.get("error"), ".1e")
        lines.append(f"{cell['row']:15}{cell['column']:16}{layer:>9}{span:>17}{model:>10}"
                     f"{gib:>7}{first:>9}{error:>10}  {cell.get('note', '')}")  # fmt: skip
    return "\n".join(lines)


def target_table(cells: Cells) -> str:
    """Return the targets and whether they were met."""
    rows = [
        (t.text, t.where, t.need, t.aim, _number(t.value, ".2f"), _verdict(t.met))
        for t in figures.targets(cells)
    ]
    return _table(("target", "where", "need", "aim", "measured", "met"), rows)


def _verdict(met: bool | None) -> str:
    return "not measured" if met is None else "yes" if met else "**no**"


def _times(cell: Cell) -> tuple[str, str, str, str]:
    """Return the columns layer, its range, the whole model and its memory, for the terminal."""
    if not figures.has_times(cell):
        return "", "", "", ""
    if cell["column"] == "whole":
        return "", "", f"{figures.whole_ms(cell):.0f}", _number(figures.whole_gib(cell), ".1f")
    low, high = figures.layer_range_ms(cell)
    return (
        f"{figures.layer_ms(cell):.2f}",
        f"{low:.2f}..{high:.2f}",
        f"{figures.model_ms(cell):.0f}",
        _number(figures.model_gib(cell), ".1f"),
    )


def _machines(surroundings: Sequence[dict[str, Any]]) -> str:
    lines = {
        f"Measured on {one['gpu']}, CUDA {one['cuda']}, Python {one['python']}, "
        + ", ".join(f"{name} {version}" for name, version in one["packages"].items() if version)
        + "."
        for one in surroundings
    }
    return "\n".join(sorted(lines))


def _row_section(cells: Cells, row: str) -> list[str]:
    shown = [cell for name in _SHOWN if (cell := figures.timed(cells, row, name))]
    if not shown:
        return []
    body = [_row_line(cells, cell) for cell in shown]
    head = ("", "layer, ms", "range, ms", "all layers, s", "gain", "peak, GiB", "compile, s",
            "first call, s", "error")  # fmt: skip
    title = f"#### {ROWS[row].title}, {ROWS[row].tokens:,} tokens, {ROWS[row].layers} layers"
    return [title, _table(head, body)]


def _row_line(cells: Cells, cell: Cell) -> tuple[str, ...]:
    low, high = figures.layer_range_ms(cell)
    cold = bool(cell.get("cold"))
    return (
        figures.column_title(cell["column"]),
        f"{figures.layer_ms(cell):.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{figures.model_ms(cell) / 1e3:.3f}",
        _number(figures.over_compiled(cells, cell), ".2f"),
        _number(figures.model_gib(cell), ".1f"),
        _number(cell.get("compile_s") if cold else None, ".0f"),
        _number(cell.get("first_call_s") if cold else None, ".0f"),
        _number(cell.get("error"), ".1e"),
    )


def _whole_section(cells: Cells) -> str:
    cell = figures.timed(cells, WHOLE_ROW, "whole")
    if cell is None:
        return "Not measured."
    own = figures.timed(cells, WHOLE_ROW, OURS)
    times = next(iter(cell["forward_ms"].values()))
    computed = f"; computed from layers, {figures.model_ms(own) / 1e3:.3f} s" if own else ""
    return (
        f"{ROWS[WHOLE_ROW].title}, {cell['layers']} layers, ours fp8 with 8-bit attention, "
        f"compiled with `consume=True`.\n\n"
        f"- forward: {figures.whole_ms(cell) / 1e3:.3f} s "
        f"({min(times) / 1e3:.3f} to {max(times) / 1e3:.3f}){computed}\n"
        f"- peak memory of a forward: {_number(figures.whole_gib(cell), '.1f')} GiB, "
        f"of which weights {_number(cell.get('weights_gib'), '.1f')} GiB\n"
        f"- `wancompile.compile`, calibration included: {_number(cell.get('compile_s'), '.0f')} s\n"
        f"- first call: {_number(cell.get('first_call_s'), '.0f')} s"
    )


def _kernel_sections(cells: Cells, row: str) -> list[str]:
    found = []
    for name in (OURS, OURS_INT8):
        cell = figures.timed(cells, row, name)
        if cell is None or not cell.get("profile"):
            continue
        rates = figures.best_rates(cell)
        best = ", ".join(
            f"{kind} {rate:.0f} {'GB/s' if kind == 'copy' else 'TFLOP/s'}"
            for kind, rate in rates.items()
        )
        covered = sum(figures.parts_ms(cell).values()) / figures.layer_ms(cell)
        body = [_kernel_line(entry, rates) for entry in figures.noticeable(cell)]
        head = ("op", "tensors", "calls", "ms", "GB", "TFLOP", "floor, ms", "over floor")
        found += [
            f"#### {ROWS[row].title}, {figures.column_title(name)}",
            f"Best rates: {best}. The ops add up to {100 * covered:.0f} % of the layer's time.",
            _table(head, body),
        ]
    return found


def _kernel_line(entry: Any, rates: dict[str, float]) -> tuple[str, ...]:
    floor = figures.floor_ms(entry, rates)
    return (
        f"`{entry['op']}`",
        entry["shapes"],
        f"{entry['calls']:g}",
        f"{entry['ms']:.3f}",
        f"{entry['gbytes']:.2f}",
        f"{entry['tflop']:.2f}" if entry["tflop"] else "",
        _number(floor, ".3f"),
        _number(entry["ms"] / floor if floor else None, ".2f"),
    )


def _gain_table(cells: Cells) -> str:
    body = []
    for row in ROWS:
        for name in (OURS, OURS_INT8):
            for peer in (COMPILED, COMPILED_FA3):
                body += _gain_lines(cells, row, name, peer)
    head = ("row", "of", "over", "part", "theirs", "ours", "floor", "predicted gain",
            "measured gain")  # fmt: skip
    return _table(head, body) if body else "Not measured."


def _gain_lines(cells: Cells, row: str, name: str, peer: str) -> list[tuple[str, ...]]:
    own, other = figures.timed(cells, row, name), figures.timed(cells, row, peer)
    if own is None or other is None or not own.get("profile") or not other.get("profile"):
        return []
    ours, theirs, floor = figures.parts_ms(own), figures.parts_ms(other), figures.floors_ms(own)
    for parts in (theirs, ours, floor):
        parts["sum"] = sum(parts.values())
    lines = []
    for part in (*PARTS, "sum"):
        they, we, least = theirs[part], ours[part], floor[part]
        values = they, we, least, they - least, they - we
        lines.append((row, name, peer, part, *(f"{value:.2f}" for value in values)))
    return lines


def _not_run(cells: Cells) -> list[str]:
    rows = [
        (row, COLUMNS[column].title, cell["note"])
        for (row, column), cell in cells.items()
        if cell.get("note")
    ]
    if not rows:
        return []
    return ["### Cells without all of their figures", _table(("row", "column", "why"), rows)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main(sys.argv[1:])
