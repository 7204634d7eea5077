"""How far two programs of one model are apart, site by site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wancompile.errors import InputError
from wancompile.gate.record import take
from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.ir.site import Fold, Site
from wancompile.program import Program


@dataclass(frozen=True)
class SiteError:
    """How far values lie from those of the reference.

    `relative` is `|actual - expected| / |expected|` in L2, `sqnr` is the same in dB (infinite
    where nothing differs), `cosine` the cosine between both. `role` is that of the site's group,
    the kind of attention, or empty.
    """

    site: str
    role: str
    relative: float
    sqnr: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """Two programs of one model on one call, site by site in execution order.

    Errors accumulate: each program runs on its own values. `left_out` names sites that hold other
    numbers on purpose, with the reason.
    """

    before: Level
    after: Level
    errors: tuple[SiteError, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def worst(self, limit: int = 10) -> tuple[SiteError, ...]:
        """Return the sites of the largest relative errors, worst first."""
        return tuple(sorted(self.errors, key=lambda one: -one.relative)[:limit])


def compare(program_a: Program, program_b: Program, inputs: Mapping[str, Any]) -> Comparison:
    """Run both programs on `inputs` and compare the outputs of their linears and attentions.

    Of each output a sample of tokens is looked at (all of them where there are few), so that models
    of any size can be compared.

    Args:
        program_a: the reference.
        program_b: a program of the same model at any other level.
        inputs: named arguments of one call of the model.

    Raises:
        InputError: the programs share no site, or `inputs` do not fit.
    """
    left_out = _rescaled(program_a, program_b)
    other = match.by_site(program_b.graph)
    sites = [s for s in match.by_site(program_a.graph) if s in other and s not in left_out]
    if not sites:
        raise InputError("the programs have no site in common: they are not of one model")
    (_, expected), (_, actual) = (take(one, inputs, sites) for one in (program_a, program_b))
    roles = roles_of(program_a)
    errors = tuple(
        error_of(str(site), [(actual.sites[site], expected.sites[site])], roles.get(site, ""))
        for site in sites
    )
    reasons = tuple((str(site), reason) for site, reason in left_out.items())
    return Comparison(program_a.level, program_b.level, errors, reasons)


def _rescaled(a: Program, b: Program) -> dict[Site, str]:
    """Return the sites whose values smoothing scales: what a fold into value rows changes."""
    inverse_a, inverse_b = (
        {
            g.key: g.smoothing.inverse
            for g in one.groups
            if g.fold is Fold.VALUE_ROWS and g.smoothing
        }
        for one in (a, b)
    )
    found = {}
    for attention in b.attentions:
        out = attention.out
        if out is not None and inverse_a.get(out, "") != inverse_b.get(out, ""):
            reason = f"scaled by the smooth scale of {out}"
            found.update(dict.fromkeys((attention.v, attention.site), reason))
    return found


def roles_of(program: Program) -> dict[Site, str]:
    """Return what each linear of a group and each attention is for."""
    roles = {site: str(group.role) for group in program.groups for site in group.sites}
    for attention in program.attentions:
        roles[attention.site] = "self-attention" if attention.is_self else "cross-attention"
    return roles


def error_of(name: str, pairs: Iterable[tuple[Tensor, Tensor]], role: str = "") -> SiteError:
    """Return the error over all pairs `(actual, expected)` of one shape each, together, in fp64.

    NaN never compares small: it makes the figures NaN.
    """
    lost = total = found = product = 0.0
    for actual, expected in pairs:
        a, e = actual.double().flatten(), expected.double().flatten()
        lost += float((a - e) @ (a - e))
        total += float(e @ e)
        found += float(a @ a)
        product += float(a @ e)
    relative = math.sqrt(lost / max(total, 1e-60))
    sqnr = -20 * math.log10(relative) if relative > 0 else math.inf if relative == 0 else math.nan
    norms = math.sqrt(total * found)
    return SiteError(name, role, relative, sqnr, product / norms if norms else 1.0)
