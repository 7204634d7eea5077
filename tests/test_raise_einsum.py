from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import Function, counts, error, exported, normalized, run_pass

from wancompile.export import export
from wancompile.passes import RaiseEinsum


def _scores(self, x):
    q = x.reshape(x.shape[0], -1, 2, 3)
    return torch.einsum("bqhd,bkhd->bhqk", q * self.w, q)


def test_scores_become_a_matmul(golden):
    x, w = torch.randn(2, 5, 6), torch.ones(3)
    program = normalized(_scores, x, RaiseEinsum(), w=w)
    golden(program.print("canonical"))
    assert counts(program)["matmul"] == 1
    assert error(program, _scores, x, w=w) < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.permutations("bhqd"), st.permutations("bhkd"), st.permutations("bhqk"))
def test_any_order_of_letters(left, right, output):
    equation = f"{''.join(left)},{''.join(right)}->{''.join(output)}"
    sizes = {"b": 2, "h": 3, "q": 4, "k": 5, "d": 6}
    other = torch.randn([sizes[letter] for letter in right])

    def fn(self, x):
        return torch.einsum(equation, x.reshape([sizes[letter] for letter in left]), self.w)

    x = torch.randn(12, 3, 4)
    program = run_pass(export(Function(fn, w=other), [{"x": x}], dynamic=False), RaiseEinsum())
    assert "einsum" not in counts(program)
    assert error(program, fn, x, w=other) < 1e-5


@pytest.mark.parametrize("equation", ["bnc,c->bnc", "bnc,bnc->b", "bnc,mc->bnm"])
def test_what_is_no_batched_matmul(equation):
    operand = {"bnc,c->bnc": torch.ones(6), "bnc,mc->bnm": torch.randn(4, 6)}.get(equation)

    def fn(self, x):
        return torch.einsum(equation, x, self.w if operand is not None else x * self.w)

    x = torch.randn(2, 5, 6)
    w = operand if operand is not None else torch.ones(6)
    program = run_pass(exported(fn, x, w=w), RaiseEinsum())
    assert counts(program).get("einsum", 0) == 1
    assert program.records[-1].skipped


@pytest.mark.parametrize("equation", ["...qd,...kd->...qk", "...qd,...dk->...kq"])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_ellipses_are_letters(equation, leading):
    other = torch.randn(*leading, 4, 4)

    def fn(self, x):
        return torch.einsum(equation, x, self.w)

    x = torch.randn(*leading, 5, 4)
    program = run_pass(export(Function(fn, w=other), [{"x": x}], dynamic=False), RaiseEinsum())
    assert "einsum" not in counts(program)
    assert error(program, fn, x, w=other) < 1e-6


@pytest.mark.parametrize(
    "equation", ["...qd,kd->...qk", "...qd,...kd->...qk", "q...d,...kd->...qk"]
)
def test_ellipses_of_different_length_stay(equation):
    def fn(self, x):
        return torch.einsum(equation, x, self.w)

    x, w = torch.randn(1, 3, 4), torch.randn(5, 4)
    program = run_pass(export(Function(fn, w=w), [{"x": x}], dynamic=False), RaiseEinsum())
    assert counts(program)["einsum"] == 1
    assert "not one batched matmul" in program.records[-1].skipped[0].text


def test_the_operand_that_gives_the_rows_may_be_the_second():
    def fn(self, x):
        return torch.einsum("bkc,bqc->bqk", x * self.w, x)

    x, w = torch.randn(2, 5, 6), torch.ones(6)
    program = run_pass(exported(fn, x, w=w), RaiseEinsum())
    assert counts(program)["permute"] == 1  # of the keys; the result needs none
    assert error(program, fn, x, w=w) < 1e-6
