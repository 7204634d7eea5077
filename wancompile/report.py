"""What the compiler did to a model: data first, text second."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from tabulate import tabulate

from wancompile.artifact import facts
from wancompile.auto import Choice
from wancompile.gate.rounds import Gate
from wancompile.hoist import Hoisting
from wancompile.ir import match
from wancompile.ir.edit import Note
from wancompile.ir.levels import Level
from wancompile.ir.site import Group, Role, Ungrouped
from wancompile.program import PassRecord, Program
from wancompile.quant.stability import Stability
from wancompile.recipe import Recipe
from wancompile.times import Predicted, as_text
from wancompile.units import nbytes

# A number that is no part of a name, such as of a type.
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])")


@dataclass(frozen=True)
class RoleSummary:
    """The groups of one role together.

    `smoothed` of the `groups` are smoothed, with 1/s in the places that `folds` names. Errors are
    means of relative L2 errors over the groups that were judged, None where none was.
    """

    role: Role
    groups: int
    linears: int
    smoothed: int
    folds: tuple[str, ...]
    error_plain: float | None
    error_smoothed: float | None


@dataclass(frozen=True)
class Stored:
    """The stored tensors of one type: how many there are, and their bytes."""

    dtype: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Skip:
    """What one pass left as it was for one reason, with the sites and source lines."""

    pass_name: str
    reason: str
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Report:
    """What was rewritten, what was skipped and why, errors per site.

    `bytes_before` and `bytes_after` count all stored tensors of the float and the compiled program.
    `choice` says how the recipe was chosen, where a budget was given instead of one. `gate` says
    how near the original the program is, and what fell back for that; None where nothing was
    measured. `hoisting` says what is computed once for each prompt, None if nothing is. `stored`
    are the tensors of the compiled program by type, most bytes first. `stability` says how far
    scales moved between halves of the calibration calls, None without such. `predicted` is the
    time of the blocks by measured rates, None where no rates fit the model. `notes` are what
    compiling warned of.
    """

    recipe: Recipe
    groups: tuple[Group, ...]
    ungrouped: tuple[Ungrouped, ...]
    records: tuple[PassRecord, ...]
    bytes_before: int
    bytes_after: int
    choice: Choice | None = None
    gate: Gate | None = None
    hoisting: Hoisting | None = None
    stored: tuple[Stored, ...] = ()
    stability: Stability | None = None
    predicted: Predicted | None = None
    notes: tuple[str, ...] = ()

    @property
    def errors(self) -> Mapping[str, float]:
        """Relative L2 error of each group's quantized output on held-out calibration tokens."""
        return {str(g.key): g.smoothing.error for g in self.groups if g.smoothing is not None}

    @property
    def skipped(self) -> tuple[tuple[str, str, str], ...]:
        """`(pass, site, reason)` for everything that was not rewritten."""
        return tuple(
            (record.name, note.site, note.text)
            for record in self.records
            for note in record.skipped
        )

    @property
    def skips(self) -> tuple[Skip, ...]:
        """What was skipped, one entry for each pass and reason, in the order of the passes.

        Reasons that differ in their numbers alone are one, which gives the range of each.
        """
        found: dict[tuple[str, str], list[Note]] = {}
        for record in self.records:
            for note in record.skipped:
                found.setdefault((record.name, _NUMBER.sub("0", note.text)), []).append(note)
        return tuple(
            Skip(name, _ranges([note.text for note in notes]), tuple(notes))
            for (name, _), notes in found.items()
        )

    @property
    def roles(self) -> tuple[RoleSummary, ...]:
        """One line per role that occurs."""
        return tuple(
            _summary(role, found)
            for role in Role
            if (found := [group for group in self.groups if group.role is role])
        )

    def to_data(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        data: dict[str, Any] = facts.to_data(self)
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Report:
        """Return the report that `to_data` wrote; raise `ArtifactError` for anything else."""
        return facts.from_data(cls, data)

    def with_program(self, program: Program) -> Report:
        """Return the report brought up to date with a later program of the same model."""
        return replace(
            self,
            groups=program.groups,
            ungrouped=program.ungrouped,
            records=program.records,
            bytes_after=program.nbytes,
            stored=stored_in(program.state),
        )

    def __str__(self) -> str:
        ratio = self.bytes_after / max(1, self.bytes_before)
        sizes = f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB ({ratio:.2f})"
        passes = ["pass", "done", "skipped", "nodes", "ms", "output moved"]
        parts = [
            f"recipe {self.recipe.name}, weights {sizes}",
            "\n".join(f"note: {one}" for one in self.notes),
            role_table(self.roles),
            _table(_stored_rows(self.stored), ["stored as", "tensors", "bytes"]),
            _table(_pass_rows(self.records), passes),
            _table(_kernel_rows(self.records), ["op", "runs as"]),
            _table(_skip_rows(self.skips), ["skipped by", "times", "reason", "such as"]),
            _table(_ungrouped_rows(self.ungrouped), ["in no group", "reason", "such as"]),
        ]
        if self.predicted is not None:
            parts.append(predicted_table(self.predicted))
        more = (self.hoisting, self.stability, self.choice, self.gate)
        return "\n\n".join([*filter(None, parts), *(str(one) for one in more if one is not None)])


def _ranges(texts: list[str]) -> str:
    """Return texts that differ in numbers as one, `0.3 to 4.1` in the place of a number."""
    columns = zip(*(_NUMBER.findall(text) for text in texts), strict=True)
    spans = [sorted(set(column), key=float) for column in columns]
    shown = iter([span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans])
    return _NUMBER.sub(lambda _: next(shown), texts[0])


def stored_in(state: Mapping[str, torch.Tensor]) -> tuple[Stored, ...]:
    """Return what `state` holds of each type, most bytes first."""
    kinds: dict[str, list[int]] = {}
    for tensor in state.values():
        dtype = match.dtype_name(tensor.dtype).removeprefix("torch.")
        kinds.setdefault(dtype, []).append(tensor.nbytes)
    found = [Stored(dtype, len(sizes), sum(sizes)) for dtype, sizes in kinds.items()]
    return tuple(sorted(found, key=lambda one: -one.nbytes))


def predicted_table(found: Predicted) -> str:
    """Return the predicted times of the parts as a text table, with their sum."""
    rows: list[list[object]] = [
        [one.part, one.sites or "", as_text(one.float_ms), as_text(one.ms)] for one in found.parts
    ]
    headers = ["part", "sites", "in bf16", "as compiled"]
    return f"{_table(rows, headers)}\npredicted {found.summary}"


def _table(rows: list[list[object]], headers: list[str]) -> str:
    return str(tabulate(rows, headers=headers, disable_numparse=True)) if rows else ""


def role_table(roles: Iterable[RoleSummary]) -> str:
    """Return the summaries as a text table."""
    rows = [
        [
            one.role,
            one.groups,
            one.linears,
            ", ".join(one.folds),
            one.smoothed,
            _percent(one.error_plain),
            _percent(one.error_smoothed),
        ]
        for one in roles
    ]
    headers = [
        "role",
        "groups",
        "linears",
        "1/s goes to",
        "smoothed",
        "error plain",
        "error smoothed",
    ]
    return str(tabulate(rows, headers=headers, disable_numparse=True))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3f} %"


def _summary(role: Role, groups: list[Group]) -> RoleSummary:
    judged = [group.smoothing for group in groups if group.smoothing is not None]
    return RoleSummary(
        role=role,
        groups=len(groups),
        linears=sum(len(group.sites) for group in groups),
        smoothed=sum(one.applied for one in judged),
        folds=tuple(dict.fromkeys(str(group.fold) for group in groups)),
        error_plain=sum(one.error_plain for one in judged) / len(judged) if judged else None,
        error_smoothed=sum(one.error for one in judged) / len(judged) if judged else None,
    )


def _pass_rows(records: Iterable[PassRecord]) -> list[list[object]]:
    return [
        [
            record.name,
            len(record.done),
            len(record.skipped),
            f"{record.nodes_before} -> {record.nodes_after}",
            f"{1000 * record.seconds:.0f}",
            "-" if record.error is None else f"{record.error:.1e}",
        ]
        for record in records
    ]


def _kernel_rows(records: Iterable[PassRecord]) -> list[list[object]]:
    lowered = [record for record in records if record.level is Level.LOWERED]
    return [[note.site, note.text] for record in lowered for note in record.done]


def _stored_rows(found: Iterable[Stored]) -> list[list[object]]:
    return [[one.dtype, one.tensors, nbytes(one.nbytes)] for one in found]


def _skip_rows(skips: Iterable[Skip]) -> list[list[object]]:
    return [[one.pass_name, len(one.notes), one.reason, one.notes[0].site] for one in skips]


def _ungrouped_rows(found: Iterable[Ungrouped]) -> list[list[object]]:
    reasons: dict[str, list[str]] = {}
    for one in found:
        reasons.setdefault(one.reason, []).append(str(one.site))
    return [[len(sites), reason, sites[0]] for reason, sites in reasons.items()]
