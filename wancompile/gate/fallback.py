"""What goes back to higher precision because a figure of it is beyond its limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from wancompile.gate.check import Check, Kind, Violation, wording
from wancompile.ir import match
from wancompile.ir.blocks import blocks
from wancompile.ir.site import Group
from wancompile.program import Program
from wancompile.recipe import QSpec, Recipe, Rule

FLOAT = "float"
_OTHER = {"int8": "fp8", "fp8": "int8"}


@dataclass(frozen=True)
class Fallback:
    """One group (by its first member) or attention that went from one type to a better one.

    `kind`, `figure` and `limit` say why; of kind BLOCK they are those of the block that it is in.
    """

    place: str
    before: str
    after: str
    kind: Kind
    figure: float
    limit: float

    def __str__(self) -> str:
        why = wording(self.kind, self.figure, self.limit)
        return f"{self.place}: {self.before} to {self.after}, {why}"


@dataclass(frozen=True)
class Relaxed:
    """A recipe with more exceptions, and what they are."""

    recipe: Recipe
    fallbacks: tuple[Fallback, ...]


def relax_own(
    program: Program, recipe: Recipe, limit: float, before: Iterable[Fallback]
) -> Relaxed:
    """Give groups whose own error is beyond `limit` another type.

    The other 8-bit type comes first, and float where that has been tried: its own error is known
    only when the search has run with it.
    """
    tried = {one.place for one in before}
    rules, found = [], []
    for group in program.groups:
        spec, smoothing = recipe.spec_for(group), group.smoothing
        if spec is None or smoothing is None or smoothing.error <= limit:
            continue
        key = str(group.key)
        better = None if key in tried else replace(spec, dtype=_OTHER[spec.dtype])
        rules.append(Rule(key, better))
        found.append(_fallback(key, spec, better, Kind.OWN, smoothing.error, limit))
    return Relaxed(recipe.with_rules(rules), tuple(found))


def relax_sites(program: Program, recipe: Recipe, check: Check) -> Relaxed:
    """Leave in float what a check has found to be beyond its limit.

    A group whose input has a static scale gets one per token first.

    Errors accumulate, so that of a block after the first one with offenders nothing is known yet:
    only the first is changed. Where the block itself is beyond its limit and no site of it is, the
    place in it with the largest error of its own goes.
    """
    places = _Places(program, recipe)
    offenders = places.in_order(check.violations)
    always = [one for one in offenders if one.kind in (Kind.OWN, Kind.CLIPPED)]
    chosen = always or places.first_block([one for one in offenders if one not in always])
    chosen = chosen or places.worst_of_block(check)
    rules, attentions, found = [], [], []
    for one in {places.key(one.place): one for one in chosen}.values():
        key = places.key(one.place)
        before, better = places.dtype(key), places.by_token(key)
        after = better.name if better is not None else FLOAT
        found.append(Fallback(key, before, after, one.kind, one.figure, one.limit))
        if key in places.groups:
            rules.append(Rule(key, better))
        else:
            attentions.append(key)
    relaxed = recipe.with_rules(rules).with_float_attention(attentions)
    return Relaxed(relaxed, tuple(found))


def _fallback(
    key: str, spec: QSpec, better: QSpec | None, kind: Kind, figure: float, limit: float
) -> Fallback:
    return Fallback(key, spec.name, better.name if better else FLOAT, kind, figure, limit)


class _Places:
    """What of a program is in 8 bits, by group key or attention site, and in which block."""

    def __init__(self, program: Program, recipe: Recipe) -> None:
        self.groups: dict[str, Group] = {str(one.key): one for one in program.groups}
        self._specs = {
            key: spec
            for key, group in self.groups.items()
            if (spec := recipe.spec_for(group)) is not None
        }
        self._dtypes = {key: spec.name for key, spec in self._specs.items()}
        self._keys = {str(s): key for key, one in self.groups.items() for s in one.sites}
        for attention in program.attentions:
            of_attention = recipe.attention_for(attention.site) if attention.is_self else None
            if of_attention is not None:
                self._dtypes[str(attention.site)] = of_attention.name
        self._order = {str(site): at for at, site in enumerate(match.by_site(program.graph))}
        self._blocks = blocks(self._order)

    def key(self, place: str) -> str:
        """Return the group that a site is in, or the site of an attention itself."""
        return self._keys.get(place, place)

    def dtype(self, key: str) -> str:
        """Return the type of what is in 8 bits."""
        return self._dtypes[key]

    def by_token(self, key: str) -> QSpec | None:
        """Return how a group with a static scale is quantized without; None for all others."""
        spec = self._specs.get(key)
        if spec is None or spec.activation != "static":
            return None
        return replace(spec, activation="token")

    def in_order(self, violations: Iterable[Violation]) -> list[Violation]:
        """Return those that speak of what is in 8 bits, in execution order."""
        found = [one for one in violations if self.key(one.place) in self._dtypes]
        return sorted(found, key=lambda one: self._order[one.place])

    def first_block(self, violations: Sequence[Violation]) -> list[Violation]:
        """Return those in the block of the first one."""
        if not violations:
            return []
        first = self._block(violations[0].place)
        return [one for one in violations if self._block(one.place) == first]

    def worst_of_block(self, check: Check) -> list[Violation]:
        """Return the largest error of its own in the first block that is beyond its limit."""
        offending = next((one for one in check.violations if one.kind is Kind.BLOCK), None)
        if offending is None:
            return []
        inside = {
            place: figure
            for place, figure in check.own.items()
            if self._block(place) == offending.place and place in self._dtypes
        }
        if not inside:
            return []
        worst = max(inside, key=inside.__getitem__)
        return [replace(offending, place=worst)]

    def _block(self, place: str) -> str:
        return self._blocks.get(place, place)
