"""What the compiler did to a model: data first, text second."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate

from wancompile.artifact import facts
from wancompile.auto import Choice
from wancompile.gate.rounds import Gate
from wancompile.hoist import Hoisting
from wancompile.ir.site import Group, Role, Ungrouped
from wancompile.program import PassRecord, Program
from wancompile.recipe import Recipe


@dataclass(frozen=True)
class RoleSummary:
    """The groups of one role together: mean relative L2 errors over those that were judged."""

    role: Role
    groups: int
    linears: int
    smoothed: int
    folds: tuple[str, ...]
    error_plain: float | None
    error_smoothed: float | None


@dataclass(frozen=True)
class Report:
    """What was rewritten, what was skipped and why, errors per site.

    `bytes_before` and `bytes_after` count all stored tensors of the float and the compiled program.
    `choice` says how the recipe was chosen, where a budget was given instead of one. `gate` says
    how near the original the program is, and what fell back for that; None where nothing was
    measured. `hoisting` says what is computed once for each prompt, None if nothing is.
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
        )

    def __str__(self) -> str:
        ratio = self.bytes_after / max(1, self.bytes_before)
        sizes = f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB ({ratio:.2f})"
        parts = [
            f"recipe {self.recipe.name}, weights {sizes}",
            role_table(self.roles),
            tabulate(_pass_rows(self.records), headers=["pass", "done", "skipped", "nodes", "ms"]),
        ]
        if self.hoisting is not None:
            parts.append(str(self.hoisting))
        if self.choice is not None:
            parts.append(str(self.choice))
        if self.gate is not None:
            parts.append(str(self.gate))
        return "\n\n".join(parts)


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
        ]
        for record in records
    ]
