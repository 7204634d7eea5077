from __future__ import annotations

import pytest
import torch
from kit import counts, error, normalized

from wancompile.errors import LevelError
from wancompile.passes import RaiseStores


def _rotate(self, x):
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * self.cos - odd * self.sin
    out[..., 1::2] = even * self.sin + odd * self.cos
    return out


def test_rotation_becomes_an_interleave(golden):
    x = torch.randn(2, 5, 8)
    angles = {"cos": torch.rand(4), "sin": torch.rand(4)}
    program = normalized(_rotate, x, RaiseStores(), **angles)
    golden(program.print("canonical"))
    assert "copy_" not in counts(program)
    assert counts(program)["stack"] == 1
    assert error(program, _rotate, torch.randn(3, 7, 8), **angles) < 1e-6


def test_thirds_in_any_order():
    def fn(self, x):
        out = torch.zeros_like(x)
        out[..., 2::3] = x[..., 0::3] * self.w
        out[..., 0::3] = x[..., 1::3]
        out[..., 1::3] = x[..., 2::3]
        return out

    x, w = torch.randn(2, 5, 9), torch.randn(3)
    program = normalized(fn, x, RaiseStores(), w=w)
    assert error(program, fn, x, w=w) < 1e-6


def test_a_buffer_that_is_not_filled_is_refused():
    def fn(self, x):
        out = torch.zeros_like(x)
        out[..., 0::2] = x[..., 0::2] * self.w
        return out

    with pytest.raises(LevelError, match="do not fill") as caught:
        normalized(fn, torch.randn(2, 5, 8), RaiseStores(), w=torch.ones(4))
    assert "in forward" in str(caught.value.source)
    assert "raise_stores" in str(caught.value)
