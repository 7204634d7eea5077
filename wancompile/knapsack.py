"""One option for each item, the total value least, the total weight within a capacity.

The multiple-choice knapsack by its Lagrangian: of each item only the options on the lower convex
hull of (weight, value) matter, and moving along all hulls in the order of value saved for weight
spent passes through points each of which is optimal for the weight it has (Everett 1963). Steps
that no longer fit are passed over and later ones still taken. The result is worse than the optimum
by no more than the first step passed over would save, times the share of it that would fit: that is
the bound of the linear relaxation. More capacity never makes it worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """What choosing it costs: `weight` counts against the capacity, `value` is minimised."""

    weight: float
    value: float


@dataclass(frozen=True)
class Step:
    """A change of one item from option `old` to `new`, which weighs more and has less value."""

    item: int
    old: int
    new: int
    weight: float
    saved: float


Items = Sequence[Sequence[Option]]


def lightest(items: Items) -> list[int]:
    """Return the lightest option of each item, of equal ones that of least value."""
    return [min(range(len(one)), key=lambda at: (one[at].weight, one[at].value)) for one in items]


def steps(items: Items) -> list[Step]:
    """Return the changes from the lightest options on, those that save most for their weight first.

    The steps of one item follow each other in the order of their weights.
    """
    found = [
        step
        for index, (options, start) in enumerate(zip(items, lightest(items), strict=True))
        for step in _hull(index, options, start)
    ]
    return sorted(found, key=lambda one: -one.saved / one.weight)


def _hull(item: int, options: Sequence[Option], start: int) -> list[Step]:
    found: list[Step] = []
    at = start
    while True:
        ahead = [
            Step(item, at, other, one.weight - options[at].weight, options[at].value - one.value)
            for other, one in enumerate(options)
            if one.weight > options[at].weight and one.value < options[at].value
        ]
        if not ahead:
            return found
        # Of steps in one direction the longest: the others lie on the way.
        best = max(ahead, key=lambda one: (one.saved / one.weight, one.weight))
        found.append(best)
        at = best.new


def choose(items: Items, capacity: float) -> list[int] | None:
    """Return the index of the option chosen for each item, None where even the lightest weigh more.

    Runs in O(n log n) in the number of options.
    """
    chosen = lightest(items)
    weight = sum(options[at].weight for options, at in zip(items, chosen, strict=True))
    if weight > capacity:
        return None
    for step in steps(items):
        if chosen[step.item] == step.old and weight + step.weight <= capacity:
            chosen[step.item] = step.new
            weight += step.weight
    return chosen


def frontier(items: Items) -> list[Option]:
    """Return the totals of weight and value on the way from the lightest options to the least."""
    pairs = list(zip(items, lightest(items), strict=True))
    weight = sum(options[at].weight for options, at in pairs)
    value = sum(options[at].value for options, at in pairs)
    found = [Option(weight, value)]
    for step in steps(items):
        weight, value = weight + step.weight, value - step.saved
        found.append(Option(weight, value))
    return found
