"""Figures computed from the raw results of `benchmarks.h100`: layers, models, floors, targets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.h100_plan import COLUMNS, DEEP, ROWS, SHALLOW, WHOLE_ROW
from benchmarks.h100_profile import ATTENTION, ELEMENTWISE, LINEARS, PARTS
from wancompile import presets

Cell = Mapping[str, Any]
Cells = Mapping[tuple[str, str], Cell]

# Both with values of attention in fp8: bf16 is another trade, and its column speaks for itself.
OURS, OURS_INT8, COMPILED, COMPILED_FA3 = (
    "fp8-attention",
    "int8-attention-fast",
    "compile-sdpa",
    "compile-fa3",
)
TORCHAO = ("torchao-fa3", "torchao-sdpa")
# What models of different runs are compared through, whichever both runs have.
_ANCHORS = (COMPILED, OURS)
_FIRST_CALL_S = 60.0
_MEMORY = 0.62
_INT8 = 1.03
_ELEMENTWISE = 1.25
_FFN_TFLOPS = 1300.0
_ATTENTION = 0.90
_ERROR = 1.20
# Of a layer's time: what takes less is not worth a kernel's improvement.
_NOTICEABLE = 0.005


def load(paths: Iterable[Path]) -> tuple[dict[tuple[str, str], Cell], list[dict[str, Any]]]:
    """Return the cells of all files, by row and column, and what each file was measured on.

    Of a cell in several files the last one with times counts. Cells know their `run` and its
    `pace`, see `_paces`: cards differ, and so does one from hour to hour.
    """
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    paces = {row: _paces(row, runs) for row in ROWS}
    cells: dict[tuple[str, str], Cell] = {}
    for run, content in runs.items():
        for cell in content["results"]:
            cell = {**cell, "run": run, "pace": paces[cell["row"]].get(run)}
            key = cell["row"], cell["column"]
            if key not in cells or has_times(cell) or not has_times(cells[key]):
                cells[key] = cell
    return cells, [{**content["measured_on"], **content["settings"]} for content in runs.values()]


def _paces(row: str, runs: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """Return, for each run, a run that it can be compared with and how often the time it takes.

    They are compared by a column that is in both, or through runs between them.
    """
    found: dict[str, tuple[str, float]] = {}
    times: dict[str, dict[str, float]] = {}
    for run, content in runs.items():
        own = {
            cell["column"]: model_ms(cell)
            for cell in content["results"]
            if cell["row"] == row and cell["column"] in _ANCHORS and has_times(cell)
        }
        shared = [(earlier, name) for earlier in times for name in own if name in times[earlier]]
        found[run] = run, 1.0
        if shared:
            earlier, name = shared[0]
            root, pace = found[earlier]
            found[run] = root, pace * own[name] / times[earlier][name]
        times[run] = own
    return found


def has_times(cell: Cell | None) -> bool:
    """Whether a cell has been timed."""
    return bool(cell and cell.get("forward_ms"))


def timed(cells: Cells, row: str, column: str) -> Cell | None:
    """Return a cell if it has been timed."""
    cell = cells.get((row, column))
    return cell if has_times(cell) else None


def layer_ms(cell: Cell) -> float:
    """Return the time of one layer: the difference of the medians, by the layers between them."""
    deep, shallow = (statistics.median(cell["forward_ms"][str(n)]) for n in (DEEP, SHALLOW))
    return float(deep - shallow) / (DEEP - SHALLOW)


def layer_range_ms(cell: Cell) -> tuple[float, float]:
    """Return the least and the largest that this difference is between any two forwards."""
    deep, shallow = (cell["forward_ms"][str(n)] for n in (DEEP, SHALLOW))
    span = DEEP - SHALLOW
    return (min(deep) - max(shallow)) / span, (max(deep) - min(shallow)) / span


def model_ms(cell: Cell) -> float:
    """Return the computed time of a whole forward: of what is no layer, and of all layers."""
    shallow = statistics.median(cell["forward_ms"][str(SHALLOW)])
    return float(shallow) + (ROWS[cell["row"]].layers - SHALLOW) * layer_ms(cell)


def model_gib(cell: Cell) -> float | None:
    """Return the computed peak memory of a forward of the whole model."""
    peaks = cell.get("peak_gib") or {}
    deep, shallow = (peaks.get(str(n)) for n in (DEEP, SHALLOW))
    if deep is None or shallow is None:
        return None
    return float(
        shallow + (ROWS[cell["row"]].layers - SHALLOW) * (deep - shallow) / (DEEP - SHALLOW)
    )


def whole_ms(cell: Cell) -> float:
    """Return the measured time of a forward of all layers."""
    (times,) = cell["forward_ms"].values()
    return float(statistics.median(times))


def whole_gib(cell: Cell) -> float | None:
    """Return the measured peak memory of a forward of all layers."""
    return next(iter((cell.get("peak_gib") or {}).values()), None)


# ---------------------------------------------------------------- floors


def best_rates(cell: Cell) -> dict[str, float]:
    """Return TFLOP/s by kind of number and GB/s of a copy: the best that this run has seen."""
    found = dict(cell.get("rates") or {})
    for entry in cell.get("profile") or ():
        if entry["part"] == LINEARS and entry["ms"] > 0 and entry["tflop"] > 0:
            rate = 1e3 * entry["tflop"] / entry["ms"]
            found[entry["kind"]] = max(rate, found.get(entry["kind"], 0.0))
    return found


def floor_ms(entry: Mapping[str, Any], rates: Mapping[str, float]) -> float | None:
    """Return the least time for the bytes and FLOPs of an entry; None where no rate is known."""
    if not rates.get("copy"):
        return None
    bytes_ms = float(1e3 * entry["gbytes"] / rates["copy"])
    if not entry["tflop"]:
        return bytes_ms
    rate = rates.get(entry["kind"])
    return None if not rate else max(bytes_ms, 1e3 * entry["tflop"] / rate)


def noticeable(cell: Cell) -> list[Mapping[str, Any]]:
    """Return the entries of a profile that take at least half a percent of the layer."""
    entries = cell.get("profile") or []
    total = sum(entry["ms"] for entry in entries)
    return [entry for entry in entries if entry["ms"] >= _NOTICEABLE * total]


def parts_ms(cell: Cell) -> dict[str, float]:
    """Return the time of each part of a layer."""
    entries = cell.get("profile") or []
    return {part: sum(e["ms"] for e in entries if e["part"] == part) for part in PARTS}


def floors_ms(cell: Cell) -> dict[str, float]:
    """Return the floor of each part of a layer of ours."""
    rates = best_rates(cell)
    return {
        part: sum(
            floor_ms(entry, rates) or 0.0
            for entry in cell.get("profile") or ()
            if entry["part"] == part
        )
        for part in PARTS
    }


# ---------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """A figure that the project set out to reach; `value` is None where it was not measured."""

    text: str
    where: str
    need: str
    value: float | None
    met: bool | None
    aim: str = ""


# Least and aimed-for gains over each peer, by the resolution in the name of the row.
_GAINS = (
    ((COMPILED,), "torch.compile bf16, cuDNN attention", {"480p": 1.70, "720p": 1.60}, 1.85),
    ((COMPILED_FA3,), "torch.compile bf16 + FA3", {"480p": 1.50, "720p": 1.45}, 1.65),
    (TORCHAO, "torchao fp8 + torch.compile, the faster", {"480p": 1.45, "720p": 1.45}, 1.60),
)


def targets(cells: Cells) -> list[Target]:
    """Return every target, with what was measured."""
    found = [
        _gain(cells, row, peers, text, least[row[-4:]], aim)
        for peers, text, least, aim in _GAINS
        for row in ROWS
        if row.startswith("t2v-14b") and row[-4:] in least
    ]
    found += [_int8(cells, row) for row in ROWS]
    found += [_elementwise(cells, row) for row in ROWS]
    found += [_ffn_rate(cells, column) for column in (OURS, OURS_INT8)]
    found += [_attention_rate(cells, row) for row in ROWS]
    found += [_error(cells, row, column) for column in ("fp8", "int8") for row in ROWS]
    return [*found, _memory(cells), _first_call(cells)]


def gain(cells: Cells, row: str, column: str, over: Sequence[str]) -> float | None:
    """Return how many times faster a column is than the fastest of others, on whole models."""
    own = timed(cells, row, column)
    others = [one for name in over if (one := timed(cells, row, name))]
    ratios = [found for one in others if own and (found := ratio(one, own)) is not None]
    return min(ratios, default=None)


def ratio(slow: Cell, fast: Cell) -> float | None:
    """Return the ratio of the times of two models of one row.

    Where they were measured in different runs, each is taken by the pace of its own; None where
    these have nothing in common.
    """
    plain = model_ms(slow) / model_ms(fast)
    if slow.get("run") == fast.get("run"):
        return plain
    (slow_root, slow_pace), (fast_root, fast_pace) = slow["pace"], fast["pace"]
    return plain * fast_pace / slow_pace if slow_root == fast_root else None


def over_compiled(cells: Cells, cell: Cell) -> float | None:
    """Return how many times faster a model is than torch.compile's, as in `ratio`."""
    compiled = timed(cells, cell["row"], COMPILED)
    return None if compiled is None else ratio(compiled, cell)


def _gain(
    cells: Cells, row: str, peers: Sequence[str], text: str, least: float, aim: float
) -> Target:
    value = gain(cells, row, OURS, peers)
    met = None if value is None else value >= least
    return Target(f"ours fp8 over {text}", row, f">= {least:.2f}", value, met, f"{aim:.2f}")


def _int8(cells: Cells, row: str) -> Target:
    value = gain(cells, row, OURS, (OURS_INT8,))
    return _at_most("time of ours int8 over ours fp8", row, value, _INT8)


def _elementwise(cells: Cells, row: str) -> Target:
    ratios = [
        entry["ms"] / floor
        for column in (OURS, OURS_INT8)
        if (cell := timed(cells, row, column))
        for entry in noticeable(cell)
        if entry["part"] == ELEMENTWISE and (floor := floor_ms(entry, best_rates(cell)))
    ]
    return _at_most("worst elementwise kernel over its floor", row, max(ratios, default=None),
                    _ELEMENTWISE)  # fmt: skip


def _ffn_rate(cells: Cells, column: str) -> Target:
    cell = timed(cells, WHOLE_ROW, column)
    ffn = f"x{presets.find(ROWS[WHOLE_ROW].preset).config['ffn_dim']} "
    rates = [
        1e3 * entry["tflop"] / entry["ms"]
        for entry in (cell or {}).get("profile") or ()
        if entry["part"] == LINEARS and ffn in entry["shapes"]
    ]
    text = f"TFLOP/s of the slower product of the FFN, {column_title(column)}"
    return _at_least(text, WHOLE_ROW, min(rates, default=None), _FFN_TFLOPS, 0)


def _attention_rate(cells: Cells, row: str) -> Target:
    times = [_self_attention_ms(timed(cells, row, column)) for column in (OURS, OURS_INT8)]
    value = times[0] / times[1] if times[0] and times[1] else None
    text = "rate of our attention over FlashAttention-3's in fp8, inside of models"
    return _at_least(text, row, value, _ATTENTION)


def _self_attention_ms(cell: Cell | None) -> float | None:
    """Return the time of the longest op of the attention."""
    entries = (cell or {}).get("profile") or ()
    return max((entry["ms"] for entry in entries if entry["part"] == ATTENTION), default=None)


def _error(cells: Cells, row: str, column: str) -> Target:
    own, peer = (cells.get((row, name), {}).get("error") for name in (column, "torchao-sdpa"))
    value = own / peer if own and peer else None
    text = f"error of {column_title(column)}, over torchao fp8's"
    return _at_most(text, row, value, _ERROR)


def _memory(cells: Cells) -> Target:
    own, whole = timed(cells, WHOLE_ROW, OURS), cells.get((WHOLE_ROW, "whole"))
    peer = timed(cells, WHOLE_ROW, COMPILED)
    used = whole_gib(whole) if whole else None
    used = used if used is not None or own is None else model_gib(own)
    of = model_gib(peer) if peer else None
    value = used / of if used and of else None
    return _at_most("peak memory of ours fp8 over torch.compile bf16", WHOLE_ROW, value, _MEMORY)


def _first_call(cells: Cells) -> Target:
    whole = cells.get((WHOLE_ROW, "whole")) or {}
    value = whole.get("first_call_s")
    return _at_most("first call of all 40 layers, seconds", WHOLE_ROW, value, _FIRST_CALL_S, 0)


def _at_most(text: str, row: str, value: float | None, limit: float, digits: int = 2) -> Target:
    met = None if value is None else value <= limit
    return Target(text, row, f"<= {limit:.{digits}f}", value, met)


def _at_least(text: str, row: str, value: float | None, least: float, digits: int = 2) -> Target:
    met = None if value is None else value >= least
    return Target(text, row, f">= {least:.{digits}f}", value, met)


def column_title(name: str) -> str:
    """Return what a column is called in tables."""
    return COLUMNS[name].title
