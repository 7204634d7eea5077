from __future__ import annotations

import pytest
import torch
from kit import counts, error, normalized

from wancompile.passes import Canonicalize


def _all_spellings(self, x):
    a, b = x.chunk(2, dim=-1)
    c, d, e = torch.split(a, [1, 2, 3], dim=-1)
    f, g = b.unflatten(-1, (3, 2)).unbind(-1)
    h = torch.concat([c, d, e], dim=-1).transpose(1, 2).flatten(1)
    i = (f + g).view(x.shape[0], -1).t().mT
    return h, i * self.w, x.narrow(2, 1, 2), x.swapaxes(0, 1), x.movedim(2, 0)


def test_one_spelling_for_all(golden):
    x, w = torch.randn(2, 4, 12), torch.ones(1)
    program = normalized(_all_spellings, x, Canonicalize(), w=w)
    golden(program.print("canonical"))
    spelled = set(counts(program))
    assert not spelled & {"chunk", "split", "split_with_sizes", "unbind", "view", "flatten"}
    assert not spelled & {"unflatten", "transpose", "t", "mT", "concat", "narrow", "getitem"}


@pytest.mark.parametrize("shape", [(2, 4, 12), (5, 7, 12)])
def test_values_stay(shape):
    x, w = torch.randn(2, 4, 12), torch.ones(1)
    program = normalized(_all_spellings, x, Canonicalize(), w=w)
    y = torch.randn(shape)
    for actual, expected in zip(program(x=y), _all_spellings(Bag(w), y), strict=True):
        assert torch.equal(actual, expected)


class Bag:
    def __init__(self, w):
        self.w = w


def test_parts_of_dynamic_size_stay():
    def fn(self, x):
        a, b = x.chunk(2, dim=1)
        return a.sum() + b.sum() + self.w

    x, w = torch.randn(2, 4, 6), torch.ones(1)
    program = normalized(fn, x, Canonicalize(), w=w)
    assert counts(program)["chunk"] == 1
    assert "dynamic" in program.records[-1].skipped[0].text
    assert error(program, fn, x, w=w) < 1e-6


def _narrowed(self, x):
    tokens = x.shape[1] - 2
    parts = [x.narrow(1, 0, tokens), x.narrow(1, 2, tokens), x.narrow(1, -2, 2), x.narrow(1, -2, 1)]
    return torch.cat(parts, 1) * self.w


def test_narrow_may_have_a_dynamic_length_or_count_from_the_end():
    x, w = torch.randn(2, 5, 6), torch.ones(1)
    program = normalized(_narrowed, x, Canonicalize(), w=w)
    assert "narrow" not in counts(program)
    y = torch.randn(3, 9, 6)
    assert torch.equal(program(x=y), _narrowed(Bag(w), y))
