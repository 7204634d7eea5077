"""Where the boxes of a drawn graph go: rows by depth, few crossings, short lines.

After Sugiyama, Tagawa and Toda (1981), "Methods for visual understanding of hierarchical system
structures": each vertex has a row below all that it reads, a line over several rows passes through
a bend in each of them, rows are ordered by the means of their neighbours, and positions are the
least squares of the lines' slants with the order and the gaps kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_SWEEPS = 8


@dataclass(frozen=True)
class Place:
    """The middle of a vertex or a bend, in units of the picture, and its row from the top."""

    x: float
    row: int


@dataclass(frozen=True)
class Layout:
    """Places by vertex, the lines as chains of places, and the width of it all."""

    places: Mapping[int, Place]
    lines: Sequence[Sequence[Place]]
    width: float
    rows: int


def arrange(count: int, edges: Sequence[tuple[int, int]], width: float, bend: float) -> Layout:
    """Lay out the vertices 0 to `count - 1`.

    Args:
        count: how many there are.
        edges: pairs `(from, to)` with from < to.
        width: room of a vertex, the gap beside it included.
        bend: the same of a line that passes a row.
    """
    rows = _rows(count, edges)
    chains, row_of = _bends(count, edges, rows)
    near = _neighbours(dict.fromkeys(link for chain in chains for link in pairwise(chain)))
    room = [width if one < count else bend for one in range(len(row_of))]
    order = _ordered(row_of, near)
    x = _positions(order, near, room)
    left = min((x[one] - room[one] / 2 for one in range(len(x))), default=0.0)
    right = max((x[one] + room[one] / 2 for one in range(len(x))), default=0.0)
    places = [Place(x[one] - left, row_of[one]) for one in range(len(x))]
    drawn = [[places[one] for one in chain] for chain in chains]
    return Layout(dict(enumerate(places[:count])), drawn, right - left, len(order))


def _rows(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Return the row of each vertex: as far down as its readers allow."""
    height = [0] * count
    for start, end in sorted(edges, key=lambda one: -one[0]):
        height[start] = max(height[start], height[end] + 1)
    deepest = max(height, default=0)
    return [deepest - one for one in height]


def _bends(
    count: int, edges: Sequence[tuple[int, int]], rows: Sequence[int]
) -> tuple[list[list[int]], list[int]]:
    """Return each edge as a chain of vertices and bends; edges of one source share their bends."""
    row_of = list(rows)
    bends: dict[tuple[int, int], int] = {}
    chains = []
    for start, end in edges:
        chain = [start]
        for row in range(rows[start] + 1, rows[end]):
            if (start, row) not in bends:
                bends[start, row] = len(row_of)
                row_of.append(row)
            chain.append(bends[start, row])
        chains.append([*chain, end])
    return chains, row_of


def _neighbours(links: Iterable[tuple[int, int]]) -> Mapping[int, list[int]]:
    near: defaultdict[int, list[int]] = defaultdict(list)
    for start, end in links:
        near[start].append(end)
        near[end].append(start)
    return near


def _ordered(row_of: Sequence[int], near: Mapping[int, list[int]]) -> list[list[int]]:
    """Return the vertices and bends of each row from left to right."""
    order: list[list[int]] = [[] for _ in range(max(row_of, default=-1) + 1)]
    for one, place in enumerate(row_of):
        order[place].append(one)
    share = [0.0] * len(row_of)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in order if down else order[::-1]:
            for index, one in enumerate(row):
                share[one] = (index + 0.5) / len(row)
            wish = {one: _mean_of(one, row_of, near, share, up=down) for one in row}
            row.sort(key=wish.__getitem__)
            for index, one in enumerate(row):
                share[one] = (index + 0.5) / len(row)
    return order


def _mean_of(
    one: int,
    row_of: Sequence[int],
    near: Mapping[int, list[int]],
    share: Sequence[float],
    *,
    up: bool,
) -> float:
    side = [other for other in near.get(one, ()) if (row_of[other] < row_of[one]) is up]
    return sum(share[other] for other in side) / len(side) if side else share[one]


def _positions(
    order: Sequence[Sequence[int]], near: Mapping[int, list[int]], room: Sequence[float]
) -> list[float]:
    x = [0.0] * len(room)
    for row in order:
        at = -sum(room[one] for one in row) / 2
        for one in row:
            x[one] = at + room[one] / 2
            at += room[one]
    for sweep in range(_SWEEPS):
        for row in order if sweep % 2 == 0 else order[::-1]:
            wish = [
                sum(x[other] for other in near[one]) / len(near[one]) if near.get(one) else x[one]
                for one in row
            ]
            for one, place in zip(row, _apart(wish, [room[one] for one in row]), strict=True):
                x[one] = place
    return x


def _apart(wish: Sequence[float], room: Sequence[float]) -> list[float]:
    """Return the places nearest to `wish` in least squares that keep the order and the room.

    With the room before each place subtracted, this is isotonic regression: neighbours that would
    change places are moved to their common mean.
    """
    offsets, at = [], 0.0
    for index, one in enumerate(room):
        at += (room[index - 1] + one) / 2 if index else 0.0
        offsets.append(at)
    pools: list[tuple[float, int]] = []
    for target, offset in zip(wish, offsets, strict=True):
        mean, size = target - offset, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    means = [mean for mean, size in pools for _ in range(size)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]
