from __future__ import annotations

import pytest
import torch
from kit import exported

from wancompile.ir import match

aten = torch.ops.aten
X = torch.linspace(-1, 1, 80).view(2, 5, 8)


def two_sums(self, x):
    first = x + 1
    second = torch.tanh(first)
    third = x * 3
    return second, third


@pytest.fixture
def program():
    return exported(two_sums, X)


def names(draft) -> list[str]:
    return [node.name for node in draft.graph.nodes]


def test_sorting_leaves_a_sorted_graph_alone(program):
    draft = program.draft()
    before = names(draft)
    draft.sort()
    assert names(draft) == before


def test_sorting_moves_what_is_too_early_and_nothing_else(program):
    draft = program.draft()
    (tanh,), (third,) = (
        match.nodes_of(draft.graph, op) for op in (aten.tanh.default, aten.mul.Tensor)
    )
    draft.redirect(tanh, tanh.args[0], third)
    with pytest.raises(RuntimeError):
        draft.graph.lint()
    before = names(draft)
    draft.sort()
    draft.graph.lint()
    assert names(draft) != before
    assert [name for name in names(draft) if name != tanh.name] == [
        name for name in before if name != tanh.name
    ]
    assert names(draft).index(tanh.name) == names(draft).index(third.name) + 1


def test_sorting_refuses_a_circle(program):
    draft = program.draft()
    (tanh,), (first,) = (
        match.nodes_of(draft.graph, op) for op in (aten.tanh.default, aten.add.Tensor)
    )
    draft.redirect(first, first.args[0], tanh)
    with pytest.raises(RuntimeError, match="depend on each other in a circle"):
        draft.sort()
