"""What statistics are kept apart by: the halves of the calls, their kinds, ranges of timesteps.

An observer of channels has a line for each half, kind and range, in this order, the range running
fastest; one of attention operands has a line for each half and range.
"""

from __future__ import annotations

KINDS = ("", "cond", "uncond")
"""The kinds of call: with the prompt, without it, and first any other."""

HALVES = 2
"""The calls of one kind in one range are dealt out to two halves, to be compared."""

PER_RANGE = HALVES * len(KINDS)
"""The lines that observers of channels have for one range of timesteps; those of heads `HALVES`."""


def half_of(number: int) -> int:
    """Return the half that call `number` of its kind and range goes to, counted from 0.

    0 1 1 0 1 0 0 1 and so on (the Thue-Morse sequence): halves are alike in number, and also where
    nobody has told the kinds of calls that take turns.
    """
    return number.bit_count() % HALVES


def line_of(half: int, kind: int, place: int, ranges: int) -> int:
    """Return the line of a half, a kind (an index of `KINDS`) and a range, of `ranges` in all."""
    return (half * len(KINDS) + kind) * ranges + place
