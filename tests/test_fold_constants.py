from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kit import before, counts, error, exported, run_pass

from wancompile.ir.levels import Level
from wancompile.passes import FoldConstants, NameSites

_DRAWN = torch.randn(13, 8, generator=torch.Generator().manual_seed(0))
X = _DRAWN[:10].unflatten(0, (2, 5))
VECTORS = {name: _DRAWN[10 + index].clone() for index, name in enumerate("wbs")}


def unfolded(fn, x=X, **tensors):
    """A program without linears, taken for a quantized one: what is folded is not in them."""
    return replace(before(exported(fn, x, **tensors), NameSites), level=Level.QUANTIZED)


def folded(fn, x=X, **tensors):
    return run_pass(unfolded(fn, x, **tensors), FoldConstants())


def norm(self, x):
    return F.layer_norm(x, (8,), self.w * self.s, self.b * self.s)


def test_a_norm_takes_up_its_scale(golden):
    golden(folded(norm, **VECTORS).print("canonical"))


def test_products_are_stored_and_factors_let_go():
    program = folded(norm, **VECTORS)
    assert counts(program) == {"layer_norm": 1}
    assert set(program.state) == {"folded.w", "folded.b"}
    assert torch.equal(program.state["folded.w"], VECTORS["w"] * VECTORS["s"])
    assert error(program, norm, X, **VECTORS) < 1e-6


def test_a_factor_that_is_read_elsewhere_stays():
    program = folded(lambda m, x: norm(m, x) * m.s, **VECTORS)
    assert set(program.state) == {"folded.w", "folded.b", "s"}


def test_a_tree_is_folded_at_its_root():
    def fn(self, x):
        return x * (self.w * (self.s * self.b)).unsqueeze(0)

    program = folded(fn, **VECTORS)
    assert counts(program) == {"mul": 1}
    assert program.state["folded.w"].shape == (1, 8)
    assert error(program, fn, X, **VECTORS) < 1e-6


def test_a_product_that_two_values_read_is_stored_once():
    program = folded(lambda m, x: (x * (m.w * m.s), x + m.w * m.s), **VECTORS)
    assert set(program.state) == {"folded.w"}
    assert counts(program) == {"add": 1, "mul": 1}


def test_a_padded_scale_is_folded():
    def fn(self, x):
        return x * (self.w * torch.constant_pad_nd(self.part, (2, 2), 1.0))

    tensors = {"w": VECTORS["w"], "part": VECTORS["s"][:4]}
    program = folded(fn, **tensors)
    assert counts(program) == {"mul": 1}
    assert error(program, fn, X, **tensors) < 1e-6


def test_bf16_is_rounded_once():
    tensors = {name: tensor.bfloat16() for name, tensor in VECTORS.items()}
    program = folded(lambda m, x: x * (m.w * m.s * m.b), X.bfloat16(), **tensors)
    w, s, b = (tensors[name].double() for name in "wsb")
    assert torch.equal(program.state["folded.w"], (w * s * b).bfloat16())
    assert not torch.equal((w * s).bfloat16() * tensors["b"], (w * s * b).bfloat16())


def test_float64_keeps_its_digits():
    tensors = {name: tensor.double() for name, tensor in VECTORS.items()}
    program = folded(norm, X.double(), **tensors)
    assert torch.equal(program.state["folded.w"], tensors["w"] * tensors["s"])


def test_a_cast_to_integers_is_no_rounding():
    def fn(self, x):
        return x * ((self.w * 5).to(torch.int64) * self.s)

    program = folded(fn, **VECTORS)
    assert error(program, fn, X, **VECTORS) < 1e-6


@pytest.mark.parametrize(
    "fn",
    [
        lambda m, x: x * m.w[:4].repeat(2),
        lambda m, x: x * torch.cat([m.w[:4], m.s[4:]]),
        lambda m, x: x * (m.w * x),
        lambda m, x: x * (m.w + m.s),
    ],
    ids=["slice", "cat", "of an input", "sum"],
)
def test_what_no_fold_inserts_stays(fn):
    program = unfolded(fn, **VECTORS)
    after = folded(fn, **VECTORS)
    assert counts(after) == counts(program)
    assert set(after.state) == set(program.state)
