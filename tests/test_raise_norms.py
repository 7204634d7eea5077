from __future__ import annotations

import pytest
import torch
from kit import counts, error, normalized

from wancompile.passes import RaiseNorms

X = torch.randn(2, 5, 8) * 3 + 1
VECTORS = {"w": torch.rand(8) + 0.5, "b": torch.randn(8)}


def rms_rsqrt(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.w


def rms_sqrt_of_product(self, x):
    h = x.float()
    return self.w * (h / torch.sqrt((h * h).mean(dim=-1, keepdim=True) + 1e-6)).type_as(x)


def layer_by_var(self, x):
    centred = x - x.mean(-1, keepdim=True)
    spread = x.var(-1, unbiased=False, keepdim=True)
    return centred * (spread + 1e-5) ** -0.5 * self.w + self.b


def layer_by_square(self, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) + self.b


def test_rms_norm(golden):
    program = normalized(rms_rsqrt, X, RaiseNorms(), **VECTORS)
    golden(program.print("canonical"))


def test_layer_norm(golden):
    program = normalized(layer_by_var, X, RaiseNorms(), **VECTORS)
    golden(program.print("canonical"))


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (rms_rsqrt, "rms_norm"),
        (rms_sqrt_of_product, "rms_norm"),
        (layer_by_var, "layer_norm"),
        (layer_by_square, "layer_norm"),
    ],
)
def test_every_spelling(fn, op):
    program = normalized(fn, X, RaiseNorms(), **VECTORS)
    assert counts(program)[op] == 1
    assert "rsqrt" not in counts(program)
    assert error(program, fn, torch.randn(3, 4, 8), **VECTORS) < 1e-6


def unbiased(self, x):
    return (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + 1e-5) ** -0.5 * self.w


def over_tokens(self, x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * self.w


def mean_of_another(self, x):
    return x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6) * self.w


@pytest.mark.parametrize("fn", [unbiased, over_tokens, mean_of_another])
def test_what_is_no_norm_stays(fn):
    program = normalized(fn, X, RaiseNorms(), **VECTORS)
    assert not {"rms_norm", "layer_norm"} & set(counts(program))


def test_an_addition_after_rms_norm_is_no_bias():
    def fn(self, x):
        return rms_rsqrt(self, x) + self.b

    program = normalized(fn, X, RaiseNorms(), **VECTORS)
    assert counts(program) == {"add": 1, "rms_norm": 1}
    assert error(program, fn, X, **VECTORS) < 1e-6
