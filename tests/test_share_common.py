from __future__ import annotations

import torch
from kit import counts, error, normalized

from wancompile.passes import ShareCommon


def _twice(self, x):
    a = x.to(torch.float64) * 2
    b = x.to(torch.float64) * 2
    return (a + self.w) * (b - self.w)


def test_equal_expressions_are_computed_once(golden):
    x, w = torch.randn(2, 3, 4), torch.randn(4)
    program = normalized(_twice, x, ShareCommon(), w=w)
    golden(program.print("canonical"))
    assert counts(program) == {"add": 1, "mul": 2, "sub": 1, "to": 1}
    assert error(program, _twice, x, w=w) < 1e-6


def test_numbers_of_different_type_differ():
    def fn(self, x):
        return (x * 2) + (x * 2.0) + self.w

    program = normalized(fn, torch.randn(2, 3, 4), ShareCommon(), w=torch.zeros(4))
    assert counts(program)["mul"] == 2


def test_order_of_operands_matters():
    def fn(self, x):
        return (x - self.w) * (self.w - x)

    x, w = torch.randn(2, 3, 4), torch.randn(4)
    program = normalized(fn, x, ShareCommon(), w=w)
    assert counts(program)["sub"] == 2
    assert error(program, fn, x, w=w) < 1e-6
