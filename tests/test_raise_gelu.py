from __future__ import annotations

import math

import pytest
import torch
from kit import counts, error, normalized

from wancompile.passes import RaiseGelu

X = torch.randn(2, 5, 8) * 2
W = torch.ones(1)


def tanh_form(self, x):
    x = x * self.w
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))
    return 0.5 * x * (1 + torch.tanh(inner))


def cubed_by_hand(self, x):
    x = x * self.w
    return x / 2 * (torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x)) + 1.0)


def erf_form(self, x):
    x = x * self.w
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def test_the_formula_becomes_gelu(golden):
    program = normalized(tanh_form, X, RaiseGelu(), w=W)
    golden(program.print("canonical"))


@pytest.mark.parametrize("fn", [tanh_form, cubed_by_hand, erf_form])
def test_every_spelling(fn):
    program = normalized(fn, X, RaiseGelu(), w=W)
    assert counts(program) == {"gelu": 1, "mul": 1}
    assert error(program, fn, torch.randn(3, 4, 8) * 4, w=W) < 1e-6


def other_constant(self, x):
    x = x * self.w
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.05 * x**3)))


def two_inputs(self, x):
    y = x * self.w
    return 0.5 * y * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("fn", [other_constant, two_inputs])
def test_what_is_no_gelu_stays(fn):
    program = normalized(fn, X, RaiseGelu(), w=torch.full((1,), 2.0))
    assert "gelu" not in counts(program)
