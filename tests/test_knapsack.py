from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wancompile.knapsack import Option, choose, frontier, lightest, steps

numbers = st.integers(0, 1000).map(lambda number: number / 8)  # sums of these are exact
items = st.lists(
    st.lists(st.builds(Option, numbers, numbers), min_size=1, max_size=3), min_size=1, max_size=6
)
shares = st.floats(0, 1)


def total(items, chosen):
    options = [one[at] for one, at in zip(items, chosen, strict=True)]
    return sum(one.weight for one in options), sum(one.value for one in options)


def brute_force(items, capacity):
    every = itertools.product(*(range(len(one)) for one in items))
    found = [total(items, chosen) for chosen in every]
    return min(value for weight, value in found if weight <= capacity)


def capacity_of(items, share):
    least = total(items, lightest(items))[0]
    most = sum(max(option.weight for option in one) for one in items)
    return least + share * (most - least)


@given(items, shares)
def test_what_is_chosen_fits_and_is_as_good_as_promised(items, share):
    capacity = capacity_of(items, share)
    weight, value = total(items, choose(items, capacity))
    assert weight <= capacity
    best = brute_force(items, capacity)
    assert best <= value <= best + largest_gap(items, capacity) + 1e-9


def largest_gap(items, capacity):
    """What the first step that does not fit would save, times the share of it that would."""
    weight = total(items, lightest(items))[0]
    for step in steps(items):
        if weight + step.weight > capacity:
            return step.saved * (capacity - weight) / step.weight
        weight += step.weight
    return 0.0


@given(items)
def test_every_point_of_the_frontier_is_optimal_for_its_weight(items):
    for point in frontier(items):
        assert brute_force(items, point.weight) == pytest.approx(point.value, abs=1e-9)


@given(items, shares, shares)
def test_more_capacity_is_never_worse(items, one, other):
    small, large = sorted((capacity_of(items, one), capacity_of(items, other)))
    assert total(items, choose(items, large))[1] <= total(items, choose(items, small))[1] + 1e-9


def test_nothing_fits_below_the_lightest():
    items = [[Option(1, 5), Option(2, 1)], [Option(3, 1)]]
    assert choose(items, 3.9) is None
    assert choose(items, 4) == [0, 0]
    assert choose(items, 5) == [1, 0]


def test_a_step_that_does_not_fit_is_passed_over():
    items = [[Option(0, 10), Option(5, 0)], [Option(0, 3), Option(3, 0)], [Option(0, 1)]]
    assert choose(items, 4) == [0, 1, 0]


def test_options_that_lie_above_the_hull_are_left_out():
    items = [[Option(0, 10), Option(1, 9), Option(2, 0), Option(3, 0), Option(1, 20)]]
    (only,) = steps(items)
    assert (only.old, only.new, only.weight, only.saved) == (0, 2, 2, 10)
