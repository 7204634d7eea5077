"""Looking at programs: their text line by line, and what differs between two."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from wancompile import passes, pipeline
from wancompile.calibrate import Calibration
from wancompile.errors import InputError, LevelError
from wancompile.export import export
from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.passes.observe import Observe
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import Recipe, resolve

_VALUE = re.compile(r"%(\w+)")
_DOUBLE = re.compile(r"\(\(([^()]*)\)\)")


# Text ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One value of a program as text; `path` is its site, or the module whose forward made it."""

    text: str
    path: str

    @property
    def head(self) -> str:
        """The name of the value, alike in two programs of one model where it has a site."""
        return self.text.partition(":")[0] if self.text.startswith("%") else self.text


class Change(StrEnum):
    """How a line of two programs differs."""

    SAME = "same"
    CHANGED = "changed"
    REMOVED = "removed"
    ADDED = "added"


@dataclass(frozen=True)
class Row:
    """Two lines that stand side by side; one is None where the other program has none."""

    change: Change
    before: Line | None
    after: Line | None


def lines(program: Program, site: str | None = None) -> list[Line]:
    """Return the program as lines, those under `site` only if it is given.

    Values that have a site are named after it, so that quantizing a linear changes one line and
    not every line that reads it. `site` is a glob for module paths; what lies under a module that
    matches is shown with it.

    Raises:
        InputError: `site` matches nothing.
    """
    shown = [node for node in program.graph.nodes if node.op != "get_attr"]
    names = {node.name: str(at) for node in shown if (at := match.site(node)) is not None}
    found = [
        Line(_named_by_site(text, names), path_of(node))
        for node, text in zip(shown, program.print().splitlines(), strict=True)
    ]
    kept = [line for line in found if site is None or is_under(line.path, site)]
    if not kept:
        near = difflib.get_close_matches(
            str(site).replace("*", ""), sorted({line.path for line in found}), n=3, cutoff=0.0
        )
        raise InputError(f"nothing in the graph matches {site!r}; nearest are {', '.join(near)}")
    return kept


def is_under(path: str, pattern: str) -> bool:
    """Whether a module path matches the glob, or lies under a module that does."""
    return any(fnmatchcase(path, pattern + tail) for tail in ("", ".*", ":*", "#*"))


def diff(before: Program, after: Program, site: str | None = None, *, context: int = 2) -> str:
    """Return a unified diff of two programs of one model, empty where they agree.

    `context` is the number of equal lines around each change; `site` and errors as for `lines`.
    """
    a, b = ([line.text for line in lines(one, site)] for one in (before, after))
    names = before.level.name, after.level.name
    return "\n".join(difflib.unified_diff(a, b, *names, lineterm="", n=context))


def side_by_side(before: Program, after: Program, site: str | None = None) -> list[Row]:
    """Return two programs of one model with their lines aligned."""
    return aligned(lines(before, site), lines(after, site))


def aligned(a: Sequence[Line], b: Sequence[Line]) -> list[Row]:
    """Return the lines of two programs of one model side by side."""
    rows: list[Row] = []
    for tag, i, j, k, m in _opcodes([line.text for line in a], [line.text for line in b]):
        if tag == "equal":
            rows += [Row(Change.SAME, x, y) for x, y in zip(a[i:j], b[k:m], strict=True)]
        else:
            rows += _paired(a[i:j], b[k:m])
    return rows


def _paired(before: Sequence[Line], after: Sequence[Line]) -> list[Row]:
    """Pair the lines of a changed stretch that define the same value."""
    rows: list[Row] = []
    for tag, i, j, k, m in _opcodes([line.head for line in before], [line.head for line in after]):
        if tag == "equal":
            pairs = zip(before[i:j], after[k:m], strict=True)
            rows += [Row(Change.CHANGED, x, y) for x, y in pairs]
            continue
        rows += [Row(Change.REMOVED, line, None) for line in before[i:j]]
        rows += [Row(Change.ADDED, None, line) for line in after[k:m]]
    return rows


def _opcodes(a: Sequence[str], b: Sequence[str]) -> list[tuple[str, int, int, int, int]]:
    return list(difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes())


def _named_by_site(text: str, names: Mapping[str, str]) -> str:
    code = _DOUBLE.sub(r"(\1)", text.partition("  # ")[0])
    return _VALUE.sub(lambda found: "%" + names.get(found.group(1), found.group(1)), code)


def path_of(node: Node) -> str:
    """Return the site of a node, or the path of the module whose forward made it."""
    return str(match.site(node) or match.module_path(node))


# Levels -------------------------------------------------------------------------------------


def climb(
    model: torch.nn.Module,
    call: Mapping[str, Any],
    to: Level,
    *,
    recipe: str | Recipe = "int8",
    calibration: Iterable[Mapping[str, Any]] = (),
    dynamic: bool = False,
    dump: Path | None = None,
) -> dict[Level, Program]:
    """Return `model` at every level up to `to`.

    Args:
        model: with real weights, or on the meta device for levels that compute nothing.
        call: named arguments of one call, which shows the shapes.
        to: the last level wanted.
        recipe: what QUANTIZED and the levels after it are made with.
        calibration: calls to observe for smoothing and attention scales; none, no smoothing.
        dynamic: whether batch, frames, height and width stay symbolic.
        dump: a folder for the text of every level and the diff of every pass.

    Raises:
        LevelError: `to` computes with weights, and they are on the meta device.
        WancompileError: as `compile` does.
    """
    is_meta = any(tensor.is_meta for tensor in model.state_dict().values())
    if is_meta and to >= Level.QUANTIZED:
        raise LevelError(f"{to.name} computes with weights, and this model has none (meta device)")
    program = export(model, [call], dynamic=dynamic)
    probe = None if is_meta else pipeline.Probe(call)
    found = {Level.EXPORTED: program}
    if to >= Level.NORMAL:
        found[Level.NORMAL] = pipeline.run(program, passes.NORMALIZE, probe=probe, dump=dump)
    if to >= Level.OBSERVED:
        found[Level.OBSERVED] = pipeline.run(found[Level.NORMAL], (Observe(),))
    if to >= Level.QUANTIZED:
        chosen, stats = resolve(recipe), _observe(found[Level.NORMAL], calibration)
        chosen.check(found[Level.NORMAL].groups, found[Level.NORMAL].attentions)
        steps = (*passes.smoothing(chosen, stats), *passes.quantization(chosen, stats))
        found[Level.QUANTIZED] = pipeline.run(found[Level.NORMAL], steps, probe=probe, dump=dump)
    if to >= Level.FUSED:
        found[Level.FUSED] = pipeline.run(found[Level.QUANTIZED], passes.FUSE, dump=dump)
    if to >= Level.LOWERED:
        steps = passes.lowering(program.device)
        found[Level.LOWERED] = pipeline.run(found[Level.FUSED], steps, dump=dump)
    return found


def _observe(normal: Program, calls: Iterable[Mapping[str, Any]]) -> Stats | None:
    calibration = None
    for call in calls:
        calibration = calibration or Calibration(normal)
        calibration(**call)
    return calibration.stats() if calibration else None
