from __future__ import annotations

import torch
from kit import counts, error, normalized

from wancompile.passes import ResolveSlices


def _join_and_cut(self, x):
    image, text = x * 2, x[:, :3] + 1
    both = torch.cat([image, text], dim=1)
    tokens = both.shape[1] - 3
    return both[:, :tokens] @ self.w, both[:, tokens:] @ self.w, both[:, :]


def test_a_slice_reads_its_part(golden):
    x, w = torch.randn(2, 5, 4), torch.randn(4, 4)
    program = normalized(_join_and_cut, x, ResolveSlices(), w=w)
    golden(program.print("canonical"))
    # Only the slice that makes the text out of x is left.
    assert counts(program)["slice"] == 1
    y = torch.randn(3, 9, 4)
    for actual, expected in zip(program(x=y), _join_and_cut(Weights(w), y), strict=True):
        assert torch.allclose(actual, expected)


class Weights:
    def __init__(self, w):
        self.w = w


def test_a_slice_across_parts_stays():
    def fn(self, x):
        both = torch.cat([x * 2, x + 1], dim=2)
        return both[:, :, 1:5] * self.w, both[:, :, ::2]

    x, w = torch.randn(2, 5, 4), torch.randn(4)
    program = normalized(fn, x, ResolveSlices(), w=w)
    assert counts(program)["slice"] == 2
    assert counts(program)["cat"] == 1


def test_negative_bounds_count_from_the_end():
    def fn(self, x):
        both = torch.cat([x * 2, x[:, :, :3] + 1], dim=2)
        return both[:, :, -3:] * self.w

    x, w = torch.randn(2, 5, 4), torch.randn(3)
    program = normalized(fn, x, ResolveSlices(), w=w)
    assert "cat" not in counts(program)
    assert error(program, fn, x, w=w) < 1e-6
