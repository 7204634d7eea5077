from __future__ import annotations

import torch
from kit import counts, error, normalized

from wancompile.passes import RaiseLinear

X = torch.randn(2, 5, 6)


def _spellings(self, x):
    a = x @ self.w.t() + self.b
    b = torch.addmm(self.b, x.reshape(-1, 6), self.w.t()).reshape(a.shape)
    c = self.b + torch.matmul(x, self.w.mT)
    return a + b + c


def test_products_with_weights_become_linears(golden):
    tensors = {"w": torch.randn(4, 6), "b": torch.randn(4)}
    program = normalized(_spellings, X, RaiseLinear(), **tensors)
    golden(program.print("canonical"))
    assert counts(program)["linear"] == 3
    assert not {"matmul", "addmm"} & set(counts(program))
    assert error(program, _spellings, X, **tensors) < 1e-5


def test_products_of_activations_stay():
    def fn(self, x):
        return x @ x.mT * self.w

    program = normalized(fn, X, RaiseLinear(), w=torch.ones(1))
    assert "linear" not in counts(program)


def test_an_addition_of_another_shape_is_no_bias():
    def fn(self, x):
        return x @ self.w.t() + self.table

    tensors = {"w": torch.randn(4, 6), "table": torch.randn(5, 4)}
    x = torch.randn(2, 5, 6)
    from kit import Function, before, run_pass

    from wancompile.export import export

    program = export(Function(fn, **tensors), [{"x": x}])
    program = run_pass(before(program, RaiseLinear), RaiseLinear())
    assert counts(program) == {"add": 1, "linear": 1}
    assert error(program, fn, x, **tensors) < 1e-5
