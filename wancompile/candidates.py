"""What each site may be in, with its times and errors: the choices to search among."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape

from wancompile.cost import FLOAT, Costs
from wancompile.ir.site import Group, Role
from wancompile.knapsack import Option, choose, frontier
from wancompile.recipe import ATTENTIONS, LINEARS, AttentionRule, Auto, QSpec, Recipe, Rule
from wancompile.sensitivity import Sensitivity
from wancompile.trials import SELF_ATTENTION


@dataclass(frozen=True)
class Point:
    """A choice for the whole model: milliseconds and relative L2 error, both predicted."""

    ms: float
    error: float
    name: str = ""


class Candidates:
    """The sites to choose for, each with its types, their times and their squared errors."""

    def __init__(
        self, request: Auto, times: Costs, found: Sensitivity, groups: Sequence[Group]
    ) -> None:
        self.times = times
        self._request = request
        self._groups = groups
        self._keys = {str(group.key) for group in groups}
        errors = {(one.site, one.dtype): one.error for one in found.sites}
        self._types: list[tuple[str, ...]] = []
        self._squares: list[tuple[float, ...]] = []
        self._ms: list[tuple[float, ...]] = []
        for site in times.sites:
            measured = {FLOAT: 0.0} | {
                name: errors[str(site.site), name]
                for name in _allowed(request, site.role)
                if (str(site.site), name) in errors
            }
            usable = {name: one for name, one in measured.items() if math.isfinite(one)}
            self._types.append(tuple(usable))
            self._squares.append(tuple(one * one for one in usable.values()))
            self._ms.append(tuple(site.ms[name] for name in usable))

    def within_error(self, limit: float) -> list[int]:
        """Return the fastest choice whose root of the sum of squares is within `limit`."""
        found = choose(_items(self._squares, self._ms), limit * limit)
        assert found is not None, "floating point has no error"
        return found

    def within_ms(self, limit: float) -> list[int] | None:
        """Return the choice of least sum of squares within a time, None where there is none."""
        # A limit that is one of our own sums must not fail for having been added up otherwise.
        return choose(_items(self._ms, self._squares), limit * (1 + 1e-9) - self.times.fixed)

    def frontier(self) -> tuple[Point, ...]:
        """Return the best choices from floating point to the fastest."""
        return tuple(
            Point(one.value + self.times.fixed, math.sqrt(max(0.0, one.weight)))
            for one in frontier(_items(self._squares, self._ms))
        )

    def recipe(self, chosen: Sequence[int]) -> Recipe:
        """Return the recipe that says in rules by name what was chosen."""
        types = {
            str(site.site): names[at]
            for site, names, at in zip(self.times.sites, self._types, chosen, strict=True)
        }
        linears = {site: name for site, name in types.items() if site in self._keys}
        attentions = {site: name for site, name in types.items() if site not in self._keys}
        most, most_attentions = _most(linears), _most(attentions)
        return Recipe(
            self._request.name,
            _spec(most),
            tuple(Rule(escape(one), _spec(t)) for one, t in linears.items() if t != most),
            ATTENTIONS.get(most_attentions),
            tuple(
                AttentionRule(escape(one), ATTENTIONS.get(t))
                for one, t in attentions.items()
                if t != most_attentions
            ),
        )

    def point(self, recipe: Recipe) -> Point:
        """Return the time and the error that are predicted for a recipe."""
        options = self.times.options(recipe, self._groups)
        total = 0.0
        for name, names, squares in zip(options, self._types, self._squares, strict=True):
            total += squares[names.index(name)] if name in names else math.inf
        return Point(self.times.of(recipe, self._groups), math.sqrt(total), recipe.name)


def _items(
    weights: Sequence[Sequence[float]], values: Sequence[Sequence[float]]
) -> list[list[Option]]:
    return [
        [Option(weight, value) for weight, value in zip(*one, strict=True)]
        for one in zip(weights, values, strict=True)
    ]


def _allowed(request: Auto, role: str) -> list[str]:
    """Return what a site of a role may be in, but for floating point."""
    if role == Role.FFN_DOWN:
        return list(request.types)
    if role != SELF_ATTENTION:
        return [name for name in request.types if LINEARS[name].activation != "static"]
    found = [name for name, spec in ATTENTIONS.items() if spec.dtype in request.types]
    return found if request.attention else []


def _most(types: Mapping[str, str]) -> str:
    return Counter(types.values()).most_common(1)[0][0] if types else FLOAT


def _spec(name: str) -> QSpec | None:
    """Return how a linear is quantized in a type: its weights as those of named recipes."""
    return None if name == FLOAT else replace(LINEARS[name], rounding="gptq", clip=True)
