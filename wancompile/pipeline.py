"""The pass protocol, and the runner: the only place that verifies, times, compares and dumps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch.utils import _pytree as pytree

from wancompile.errors import InputError, LevelError, NumericsError, WancompileError
from wancompile.ir import text
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.program import PassRecord, Program
from wancompile.stream import place

log = logging.getLogger("wancompile")

# How far two float programs that compute the same function may drift apart, relative L2.
EXACT_TOLERANCE: Mapping[torch.dtype, float] = {
    # Models compute norms in fp32 whatever the type of their weights, and smooth scales are fp32.
    torch.float64: 1e-6,
    torch.float32: 2e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}


class Pass(Protocol):
    """One rewrite: a frozen dataclass whose fields are its options and whose repr is its identity.

    `apply` edits a draft and reports through `did` and `skip`; it neither recompiles nor verifies.
    Running it a second time must change nothing. `exact` says that the program computes the same
    function before and after, which the runner checks where it is given inputs.
    """

    name: ClassVar[str]
    needs: ClassVar[Level]
    gives: ClassVar[Level]
    exact: ClassVar[bool]

    def apply(self, draft: Draft) -> None:
        """Edit `draft` in place."""


@dataclass(frozen=True)
class Probe:
    """Inputs on which exact passes are checked: one call of the model, and where it runs.

    Weights that are not on `device` come and go while it runs; None is where they are.
    """

    kwargs: Mapping[str, Any]
    device: torch.device | None = None


def run(
    program: Program,
    passes: Sequence[Pass],
    *,
    probe: Probe | None = None,
    dump: Path | None = None,
    consume: bool = False,
) -> Program:
    """Return what `program` becomes after `passes`; `program` itself stays as it is.

    With a `probe`, the output before and after each run of consecutive exact passes is compared.
    With `dump`, the text of every level and the diff of every pass are written there, numbered.
    With `consume`, `program` gives up its weights: whatever the passes drop is freed at once.

    Raises:
        LevelError: the program is not at the level that a pass needs, or a pass broke an invariant.
        NumericsError: exact passes moved the output by more than rounding.
    """
    _dump(dump, program, "start", before=None)
    for group in _runs(passes):
        checked_on = probe if group[0].exact else None
        expected = _expected(program, checked_on) if checked_on else []
        for one in group:
            program = _apply(program, one, dump, consume)
        if checked_on:
            program = _compare(expected, program, checked_on, group)
    return program


def _runs(passes: Iterable[Pass]) -> list[list[Pass]]:
    """Split into runs of consecutive passes that are alike in being exact or not."""
    runs: list[list[Pass]] = []
    for one in passes:
        if runs and runs[-1][0].exact == one.exact:
            runs[-1].append(one)
        else:
            runs.append([one])
    return runs


def _apply(program: Program, one: Pass, dump: Path | None, consume: bool) -> Program:
    if program.level != one.needs:
        raise LevelError(
            f"the pass needs level {one.needs.name}, the program is at {program.level.name}",
            pass_name=one.name,
        )
    started = time.perf_counter()
    draft = program.draft(consume=consume)
    try:
        one.apply(draft)
    except WancompileError as error:
        raise type(error)(
            error.reason, site=error.site, source=error.source, pass_name=one.name
        ) from error
    draft.erase_dead()
    record = PassRecord(
        name=one.name,
        identity=repr(one),
        level=one.gives,
        seconds=time.perf_counter() - started,
        nodes_before=len(program.graph.nodes),
        nodes_after=len(draft.graph.nodes),
        done=tuple(draft.done),
        skipped=tuple(draft.skipped),
    )
    result = program.advance(draft, one.gives, record)
    result.verify(one.name)
    log.debug("%s: %d done, %d skipped", one.name, len(record.done), len(record.skipped))
    _dump(dump, result, one.name, before=program)
    return result


def _expected(program: Program, probe: Probe) -> list[torch.Tensor]:
    """Return the outputs before any rewrite: where there are none, it is the inputs' fault."""
    try:
        return _outputs(program, probe)
    except RuntimeError as error:
        raise InputError(f"the model cannot run on the example inputs: {error}") from error


def _compare(
    expected: Sequence[torch.Tensor], after: Program, probe: Probe, group: Sequence[Pass]
) -> Program:
    names = ", ".join(one.name for one in group)
    worst = 0.0
    if not all(bool(torch.isfinite(one).all()) for one in expected):
        raise NumericsError(
            "the model's own output on the example inputs holds NaN or infinity, "
            "so that nothing can be checked on them",
            pass_name=names,
        )
    for new, old in zip(_outputs(after, probe), expected, strict=True):
        error, limit = relative_error(new, old), EXACT_TOLERANCE.get(old.dtype, 0.0)
        if not error <= limit:
            raise NumericsError(
                f"the output moved by {error:.2e} (relative L2) where it must not move "
                f"by more than {limit:.0e}",
                pass_name=names,
            )
        worst = max(worst, error)
    log.info("%s: exact to %.1e", names, worst)
    *rest, last = after.records
    return replace(after, records=(*rest, replace(last, error=worst)))


def _outputs(program: Program, probe: Probe) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(place(program, probe.device)(**probe.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return `|actual - expected| / |expected|` in L2, in fp64; NaN never compares small."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp_min(1e-30))


def _dump(folder: Path | None, program: Program, name: str, before: Program | None) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{len(program.records):02d}_{name}"
    (folder / f"{stem}.txt").write_text(program.print(), encoding="utf-8")
    if before is not None:
        changes = text.diff(before.print(), program.print())
        (folder / f"{stem}.diff").write_text(changes, encoding="utf-8")
