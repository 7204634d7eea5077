"""The figures of a compiled program against the original, and which of them are beyond a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from wancompile.gate.compare import SiteError, error_of, roles_of
from wancompile.gate.limits import DEFAULT, Limits
from wancompile.gate.record import OUTPUT, Record
from wancompile.ir.site import Fold, Site
from wancompile.program import Program


class Kind(StrEnum):
    """What is limited; the values are the names of the fields of `Limits`."""

    OWN = "own"
    SITE = "site"
    BLOCK = "block"
    OUTPUT = "output"
    CLIPPED = "clipped"
    BROKEN = "broken"


@dataclass(frozen=True)
class Violation:
    """A figure that is beyond its limit, or no number.

    By `kind` the figure is a relative L2 error, a share of values, or a count of broken ones.
    """

    kind: Kind
    place: str
    figure: float
    limit: float

    def __str__(self) -> str:
        return f"{self.place}: {wording(self.kind, self.figure, self.limit)}"


def wording(kind: Kind, figure: float, limit: float) -> str:
    """Return what is too much, and how much is allowed."""
    if kind is Kind.BROKEN:
        return f"{figure:,.0f} values are NaN or infinite"
    what = "of the values have the largest code" if kind is Kind.CLIPPED else _ERRORS[kind]
    return f"{100 * figure:.2f} % {what}, more than {100 * limit:g} %"


_ERRORS = {
    Kind.OWN: "error of its own",
    Kind.SITE: "error so far",
    Kind.BLOCK: "error so far",
    Kind.OUTPUT: "error",
}


@dataclass(frozen=True)
class Check:
    """How a compiled program compares with the original on some calls.

    Errors but for `own` accumulate from the input of the model on, each program running on its own
    values. Places are sites, paths of blocks, or "output".

    Attributes:
        outputs: errors of the output of the model, one for each call; empty without a reference.
        blocks: of what leaves each repeated block, over all calls.
        sites: of each linear and attention, over all calls.
        own: relative L2 error that a group makes by itself on sampled tokens, by its first member;
            an 8-bit attention on its operands, the largest of all calls.
        clipped: by attention, the largest share of values that got the largest code.
        broken: NaN and infinite values that the original does not have, in all calls.
        held_out: whether nothing was calibrated on the calls.
        limits: what this is held to.
    """

    outputs: tuple[SiteError, ...]
    blocks: tuple[SiteError, ...]
    sites: tuple[SiteError, ...]
    own: Mapping[str, float]
    clipped: Mapping[str, float]
    broken: Mapping[str, int]
    calls: int
    held_out: bool
    limits: Limits

    @property
    def violations(self) -> tuple[Violation, ...]:
        """Everything beyond its limit, in execution order within each kind."""
        found: list[Violation] = []
        for kind, figures in self._figures().items():
            limit = getattr(self.limits, kind)
            found += [
                Violation(kind, place, figure, limit)
                for place, figure in figures
                if not figure <= limit
            ]
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether everything is within its limit."""
        return not self.violations

    def culprits(self, limit: int = 5) -> tuple[tuple[str, float], ...]:
        """Return the places with the largest errors of their own."""
        return tuple(sorted(self.own.items(), key=lambda one: -one[1])[:limit])

    def _figures(self) -> dict[Kind, list[tuple[str, float]]]:
        return {
            Kind.BROKEN: list(self.broken.items()),
            Kind.OUTPUT: [(one.site, one.relative) for one in self.outputs],
            Kind.BLOCK: [(one.site, one.relative) for one in self.blocks],
            Kind.SITE: [(one.site, one.relative) for one in self.sites],
            Kind.OWN: list(self.own.items()),
            Kind.CLIPPED: list(self.clipped.items()),
        }

    def __str__(self) -> str:
        from wancompile.gate.text import check_text

        return check_text(self)


def check_records(
    program: Program,
    records: Sequence[Record],
    references: Sequence[Record] | None,
    *,
    inverses: Mapping[Site, Tensor] | None = None,
    held_out: bool = False,
    limits: Limits = DEFAULT,
) -> Check:
    """Compare what `program` did on some calls with what the original did on them.

    Args:
        program: of which the records are.
        records: one for each call.
        references: of the original, in the same order; without them only `own`, `clipped` and
            `broken` are known.
        inverses: see `inverses_of`; without them what smoothing scales is left out.
        held_out: whether nothing was calibrated on the calls.
        limits: what the check is held to.
    """
    known = records if references is None else references
    pairs = list(zip(records, known, strict=True))
    is_compared = references is not None
    return Check(
        outputs=tuple(
            error_of(f"{OUTPUT} of call {index}", zip(a.output, e.output, strict=True))
            for index, (a, e) in enumerate(pairs)
            if is_compared
        ),
        blocks=_block_errors(pairs) if is_compared else (),
        sites=_site_errors(program, pairs, inverses or {}) if is_compared else (),
        own={**_own_of_groups(program), **_largest([one.own for one in records])},
        clipped=_largest([one.clipped for one in records]),
        broken=_broken(pairs, is_compared),
        calls=len(records),
        held_out=held_out,
        limits=limits,
    )


def inverses_of(smoothed: Program) -> dict[Site, Tensor]:
    """Return the 1/s `[C]` by which smoothing has scaled what leaves a site, on the host.

    Only a fold into value rows does that: it reaches from a value projection to the linear that
    reads the output of the attention.
    """
    return {site: smoothed.state[name].cpu() for site, name in _scaled(smoothed).items()}


def _scaled(program: Program) -> dict[Site, str]:
    """Return the sites that smoothing scales, and the names of the stored 1/s."""
    applied = {
        group.key: group.smoothing.inverse
        for group in program.groups
        if group.fold is Fold.VALUE_ROWS and group.smoothing and group.smoothing.applied
    }
    return {
        site: applied[attention.out]
        for attention in program.attentions
        if attention.out in applied
        for site in (attention.v, attention.site)
    }


_Pairs = Sequence[tuple[Record, Record]]


def _block_errors(pairs: _Pairs) -> tuple[SiteError, ...]:
    actual, expected = pairs[0]
    return tuple(
        error_of(path, [(a.blocks[path], e.blocks[path]) for a, e in pairs])
        for path in expected.blocks
        if path in actual.blocks
    )


def _site_errors(
    program: Program, pairs: _Pairs, inverses: Mapping[Site, Tensor]
) -> tuple[SiteError, ...]:
    actual, expected = pairs[0]
    roles, scaled = roles_of(program), _scaled(program)
    found = []
    for site in expected.sites:
        inverse = inverses.get(site, _ONE)
        width = expected.sites[site].shape[-1]
        is_known = site not in scaled or site in inverses
        if site not in actual.sites or not is_known or len(inverse) not in (1, width):
            continue  # of fused projections only a part of the output is scaled
        values = [(a.sites[site] / inverse, e.sites[site]) for a, e in pairs]
        found.append(error_of(str(site), values, roles.get(site, "")))
    return tuple(found)


_ONE = torch.ones(1)


def _own_of_groups(program: Program) -> dict[str, float]:
    return {str(one.key): one.smoothing.error for one in program.groups if one.smoothing}


def _largest(figures: Sequence[Mapping[Site, float]]) -> dict[str, float]:
    """Return the largest figure of each site over all calls; NaN is larger than any number."""
    found: dict[str, float] = {}
    for one in figures:
        for site, figure in one.items():
            known = found.get(str(site), 0.0)
            found[str(site)] = known if figure <= known or known != known else figure
    return found


def _broken(pairs: _Pairs, is_compared: bool) -> dict[str, int]:
    found: dict[str, int] = {}
    for actual, expected in pairs:
        for place, count in actual.broken.items():
            more = count - (expected.broken.get(place, 0) if is_compared else 0)
            if more > 0:
                found[place] = found.get(place, 0) + more
    return found
