"""Norm and rotation before an attention in floating point, as one op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusing import called_fused, calls, skips
from kit import counts, run_pass
from rotating import (
    BF16,
    BF16_TENSORS,
    SPELLINGS,
    TENSORS,
    X,
    attended,
    exact,
    ops,
    split,
    wan,
    without_gain,
)

from wancompile.passes import FuseRotary
from wancompile.pipeline import relative_error


def q_and_k(self, x):
    q, k = wan(self, x), wan(self, torch.tanh(x))
    return F.scaled_dot_product_attention(q, k, split(x).transpose(1, 2))


def test_q_and_k_are_normed_and_rotated_in_one_op(golden):
    after = run_pass(called_fused(q_and_k, X.to(BF16), **BF16_TENSORS), FuseRotary())
    golden(after.print("canonical"))


@pytest.mark.parametrize("fn", SPELLINGS)
def test_every_spelling_is_float64_to_rounding(fn):
    before = attended(fn)
    after = run_pass(before, FuseRotary())
    found = counts(after)
    assert found["norm_rotate"] == 1
    assert not {"rms_norm", "permute"} & set(found)
    (value, out), (plain_value, plain_out) = after(x=X), before(x=X)
    expected = exact(fn, X)
    assert relative_error(value, expected) < 2e-7
    assert relative_error(value, expected) < 1.2 * relative_error(plain_value, expected)
    assert relative_error(out, plain_out) < 1e-6
    assert (value.dtype, value.stride()) == (plain_value.dtype, plain_value.stride())


@pytest.mark.parametrize("fn", SPELLINGS)
def test_a_float_of_16_bits_is_rounded_once(fn):
    x, more = X.to(BF16), {"weight": BF16_TENSORS["weight"]}
    before = attended(fn, x, **more)
    after = run_pass(before, FuseRotary())
    assert counts(after)["norm_rotate"] == 1
    expected = exact(fn, x, **more)
    value, plain = after(x=x)[0], before(x=x)[0]
    assert value.dtype == plain.dtype
    half = torch.finfo(value.dtype).eps / 2
    assert ((value - expected).abs() <= half * expected.abs() + 2e-6).all()
    assert relative_error(value, expected) <= relative_error(plain, expected)


def test_a_cast_before_attention_is_the_rounding():
    def fn(self, x):
        return without_gain(self, x).to(BF16)

    after = run_pass(attended(fn), FuseRotary())
    assert (counts(after)["norm_rotate"], counts(after).get("to")) == (1, None)
    assert torch.equal(after(x=X)[0], exact(without_gain, X).to(BF16))


def test_k_alone_is_fused_where_q_is_not_rotated():
    def fn(self, x):
        return F.scaled_dot_product_attention(split(x).transpose(1, 2), wan(self, x), wan(self, x))

    after = run_pass(called_fused(fn, X, **TENSORS), FuseRotary())
    assert counts(after)["norm_rotate"] == 1
    (reason,) = skips(after)
    assert "not rotated by pairs" in reason


def test_keys_that_two_attentions_read_are_computed_once():
    def fn(self, x):
        first, second, k = wan(self, x), wan(self, torch.sin(x)), wan(self, torch.tanh(x))
        return [F.scaled_dot_product_attention(q, k, k) for q in (first, second)]

    before = called_fused(fn, X, **TENSORS)
    after = run_pass(before, FuseRotary())
    assert counts(after)["norm_rotate"] == 3
    assert len(after.records[-1].done) == 3
    assert not skips(after)
    for ours, theirs in zip(after(x=X), before(x=X), strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_a_value_that_is_rounded_for_one_and_not_for_another():
    def fn(self, x):
        value = wan(self, x)
        rounded = ops.quantize_per_head(value, self.scale, torch.int8)
        return rounded, F.scaled_dot_product_attention(value, value, value)

    before = called_fused(fn, X, **TENSORS)
    after = run_pass(before, FuseRotary())
    found = counts(after)
    assert (found["norm_rotate"], found["norm_rotate_quantize"]) == (1, 1)
    assert "rms_norm" not in found
    assert relative_error(after(x=X)[1], before(x=X)[1]) < 1e-6


def test_an_attention_before_one_in_8_bits_reads_the_same_tables():
    def fn(self, x):
        value = wan(self, x)
        out = F.scaled_dot_product_attention(value, value, value).transpose(1, 2).flatten(2)
        return ops.quantize_per_head(wan(self, out), self.scale, torch.int8)

    before = called_fused(fn, X, **TENSORS)
    after = run_pass(before, FuseRotary())
    (first,), (second,) = calls(after, "norm_rotate"), calls(after, "norm_rotate_quantize")
    assert first[3:5] == second[3:5]
    assert (after(x=X).float() - before(x=X).float()).abs().max() <= 1


def test_float64_is_not_computed_in_fewer_bits():
    before = attended(without_gain, X.double())
    after = run_pass(before, FuseRotary())
    assert after.print() == before.print()
    assert "float64" in skips(after)[0]
