"""Pictures of blocks: what is drawn, what is connected, and where it lies."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pages
import pytest
from pages import Made
from torch.fx import Node

from wancompile.html.layers import arrange
from wancompile.html.reduce import Look, Reduced, reduce
from wancompile.inspect import is_under, path_of
from wancompile.ir import match
from wancompile.program import Program

BLOCKS = ("blocks.0", "blocks.1")

made = pytest.fixture(scope="module")(pages.made)


def inside(program: Program, block: str) -> set[Node]:
    return {
        node
        for node in program.graph.nodes
        if node.op == "call_function" and is_under(path_of(node), block)
    }


def reduced(program: Program, block: str) -> Reduced:
    return reduce(program.graph, inside(program, block), block)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_picture_has_every_op_that_computes_once(made: Made, block: str) -> None:
    for program in (made.normal, made.compiled.program):
        found = reduced(program, block)
        assert all(0 <= start < end < len(found.boxes) for start, end in found.edges)
        assert len(set(found.edges)) == len(found.edges)
        drawn = Counter(
            node for box in found.boxes if box.look is not Look.OUTSIDE for node in box.nodes
        )
        assert set(drawn.values()) == {1}
        computing = {
            node
            for node in inside(program, block)
            if match.is_linear(node) or match.is_attention(node)
        }
        assert computing
        assert computing <= drawn.keys()


def test_a_picture_keeps_who_depends_on_whom(made: Made) -> None:
    """Boxes are connected exactly where the values of their nodes are, over what lies between."""
    nodes, found = inside(made.normal, "blocks.0"), reduced(made.normal, "blocks.0")
    box_of = {
        node: index
        for index, box in enumerate(found.boxes)
        if box.look is not Look.OUTSIDE
        for node in box.nodes
    }
    expected = set()
    for node, index in box_of.items():
        waiting = [*node.all_input_nodes]
        while waiting:
            read = waiting.pop()
            if read in box_of:
                expected.add((box_of[read], index))
            elif read in nodes and match.is_tensor(read):
                waiting += read.all_input_nodes
    own = {(a, b) for a, b in found.edges if found.boxes[a].look is not Look.OUTSIDE}
    assert own == {(a, b) for a, b in expected if a != b}


def test_looks_tell_what_is_in_8_bits(made: Made) -> None:
    before, after = (reduced(one, "blocks.0") for one in (made.normal, made.compiled.program))
    assert not {Look.EIGHT, Look.ROUNDS} & {box.look for box in before.boxes}
    assert {Look.EIGHT, Look.ROUNDS} <= {box.look for box in after.boxes}
    eight = " ".join(box.title for box in after.boxes if box.look is Look.EIGHT)
    for name in ("attn1.to_q, to_k, to_v", "attn1.to_out.0", "ffn.net.0.proj"):
        assert name in eight


@pytest.mark.parametrize("seed", range(6))
def test_rows_go_down_and_nothing_overlaps(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(2, 30)
    pairs = [(a, b) for b in range(count) for a in range(b) if draw.random() < 3 / count]
    found = arrange(count, pairs, width=100, bend=10)
    assert found.places.keys() == set(range(count))
    for (start, end), line in zip(pairs, found.lines, strict=True):
        assert (line[0], line[-1]) == (found.places[start], found.places[end])
        assert [place.row for place in line] == list(range(line[0].row, line[-1].row + 1))
    for row in range(found.rows):
        across = sorted(place.x for place in found.places.values() if place.row == row)
        assert all(b - a >= 100 - 1e-6 for a, b in pairwise(across))
        assert all(50 - 1e-6 <= x <= found.width - 50 + 1e-6 for x in across)
