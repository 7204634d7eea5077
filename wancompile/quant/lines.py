"""What statistics are kept apart by: the halves of the calls, their kinds, ranges of timesteps.

An observer of channels has a line for each half, kind and range, in this order, the range running
fastest; one of attention operands has a line for each range.
"""

from __future__ import annotations

KINDS = ("", "cond", "uncond")
"""The kinds of call: with the prompt, without it, and first any other."""

HALVES = 2
"""The calls of one kind in one range go to one half and the other in turn, to be compared."""

PER_RANGE = HALVES * len(KINDS)
"""The lines of one range of timesteps."""


def line_of(half: int, kind: int, place: int, ranges: int) -> int:
    """Return the line of a half, a kind (an index of `KINDS`) and a range, of `ranges` in all."""
    return (half * len(KINDS) + kind) * ranges + place
