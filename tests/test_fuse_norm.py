from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusing import (
    assert_nearest,
    assert_neighbours,
    assert_no_farther,
    called_fused,
    calls,
    program,
    skips,
)
from kit import counts, run_pass

from wancompile.ir import match
from wancompile.passes import FuseNorm

C = 16
BF16, INT8 = torch.bfloat16, torch.int8
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 20, C, generator=DRAW) * 2 + 1
# Vectors for what is computed from a mean over tokens: gates, scales and shifts [B, 1, C].
NAMES = ("gate", "scale", "shift", "weight", "bias")
VECTORS = {name: torch.randn(C, generator=DRAW) for name in NAMES}
INV = {"inv": torch.randn(C, generator=DRAW).exp()}
TABLE = {"table": torch.randn(6, C, generator=DRAW), "spread": torch.randn(6, C, generator=DRAW)}


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def normed(x, *affine):
    return F.layer_norm(wide(x), (C,), *affine, eps=1e-6)


def times(x):
    """What a timestep embedding is: one row a video, [B, 1, C]."""
    return wide(x).mean(1, keepdim=True)


def branch(x):
    """What an attention is: another value of the stream's type."""
    return torch.tanh(x.flip(1))


def modulated(self, x, times):
    return (normed(x) * (1 + times * self.scale) + times * self.shift).type_as(x)


def first(self, x):
    return modulated(self, x, times(x))


def gated(self, x):
    total = (wide(x) + branch(x) * (times(x) * self.gate)).type_as(x)
    return modulated(self, total, times(x)), total


def swapped(self, x):
    total = ((times(x) * self.gate) * branch(x) + wide(x)).type_as(x)
    return modulated(self, total, times(x)), total


def affine(self, x):
    total = x + branch(x)
    return normed(total, wide(self.weight), wide(self.bias)).type_as(x), total


def bare(self, x):
    return normed(x).type_as(x)


def scaled(self, x):
    return (normed(x) * self.weight).type_as(x)


def shifted(self, x):
    return (self.bias + normed(x)).type_as(x)


def gate_per_channel(self, x):
    total = (wide(x) + branch(x) * self.gate).type_as(x)
    return (self.weight * normed(total) + self.bias).type_as(x), total


def per_token(self, x):
    """Modulations with a row a token: no table, so they are read as they are."""
    rows = wide(x).flip(2)
    total = (wide(x) + branch(x) * (rows * self.gate)).type_as(x)
    return modulated(self, total, rows), total


def from_a_table(self, x):
    """Six modulations a token, from a stored table and an embedding [B, S, 6, C]."""
    embedded = x.unsqueeze(2) * self.spread
    six = (self.table + wide(embedded)).chunk(6, dim=2)
    shift, scale, gate, _, _, _ = (one.squeeze(2) for one in six)
    total = (wide(x) + branch(x) * gate).type_as(x)
    return (normed(total) * (1 + scale) + shift).type_as(x), total


def needed(fn, dtype=None):
    """The tensors that `fn` reads, and 1/s."""
    names = {name for one in (fn, modulated) for name in one.__code__.co_names}
    found = {name: one for name, one in {**VECTORS, **TABLE}.items() if name in names}
    return {**{name: one.to(dtype or one.dtype) for name, one in found.items()}, **INV}


def fused(fn, x=X, dtype="int8", **tensors):
    return run_pass(program(fn, x, dtype, **tensors), FuseNorm())


ALONE = (first, bare, scaled, shifted)
AFTER_A_SUM = (gated, swapped, affine, gate_per_channel, per_token, from_a_table)


def test_residual_norm_and_modulation_become_one(golden):
    golden(fused(gated, **needed(gated)).print("canonical"))


def test_a_table_becomes_offsets(golden):
    golden(fused(from_a_table, **needed(from_a_table)).print("canonical"))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("fn", ALONE)
def test_a_norm_alone(fn, dtype):
    tensors = needed(fn)
    after = fused(fn, dtype=dtype, **tensors)
    found = counts(after)
    assert found["norm_quantize"] == 1
    assert not {"layer_norm", "quantize_per_token", "residual_norm_quantize"} & set(found)
    assert_nearest(after, fn, X, dtype, **tensors)
    assert_neighbours(after, program(fn, X, dtype, **tensors), X)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("fn", AFTER_A_SUM)
def test_a_norm_after_a_sum(fn, dtype):
    tensors = needed(fn)
    after = fused(fn, dtype=dtype, **tensors)
    found = counts(after)
    assert found["residual_norm_quantize"] == 1
    assert not {"layer_norm", "quantize_per_token", "norm_quantize"} & set(found)
    assert_nearest(after, fn, X, dtype, **tensors)
    assert_neighbours(after, program(fn, X, dtype, **tensors), X)


@pytest.mark.parametrize("fn", [*ALONE, *AFTER_A_SUM])
def test_bf16_is_rounded_less_often(fn):
    tensors, x = needed(fn, BF16), X.to(BF16)
    tensors.update(INV)
    after = fused(fn, x, **tensors)
    assert not {"layer_norm", "quantize_per_token"} & set(counts(after))
    assert_no_farther(after, program(fn, x, **tensors), fn, x, **tensors)


def test_without_a_smooth_scale():
    after = fused(gated, **VECTORS)
    ((*_, inverse, dtype),) = calls(after, "residual_norm_quantize")
    assert (inverse, dtype) == (None, INT8)
    assert_nearest(after, gated, X, **VECTORS)


def test_operands_are_where_the_op_wants_them():
    """Stream first, then branch, whichever comes first in the addition."""
    for fn in (gated, swapped):
        ((x, y, gate, *_),) = calls(fused(fn, **needed(fn)), "residual_norm_quantize")
        assert x.op == "placeholder"
        assert match.is_op(y, torch.ops.aten.tanh.default)
        assert match.shape(gate)[1] == 1


def test_later_and_earlier_readers_read_the_new_sum():
    """`early` comes before the op that yields the sum, and has to move behind it."""

    def fn(self, x):
        total = (wide(x) + branch(x) * (times(x) * self.gate)).type_as(x)
        early = torch.tanh(total)
        value = modulated(self, total, times(x))
        return value, early, total + early

    tensors = needed(gated)
    after = fused(fn, **tensors)
    found = counts(after)
    assert found["residual_norm_quantize"] == 1
    assert found["add"] == 2  # total + early, and 1 + scale
    assert_nearest(after, fn, X, **tensors)


def test_two_norms_of_one_sum():
    """The second reads the sum that the first one yields."""

    def fn(self, x):
        total = x + branch(x)
        op = torch.ops.wancompile.quantize_per_token
        other = op(normed(total, self.weight, self.bias), None, INT8)
        return modulated(self, total, times(x)), *other

    tensors = {**needed(first), "weight": VECTORS["weight"], "bias": VECTORS["bias"]}
    after, before = fused(fn, **tensors), program(fn, X, **tensors)
    found = counts(after)
    assert found["residual_norm_quantize"] == found["norm_quantize"] == 1
    assert_neighbours(after, before, X)
    assert (after(x=X)[2].int() - before(x=X)[2].int()).abs().max() <= 1


# What must not be fused ------------------------------------------------------------------------


def untouched(fn, **tensors):
    before = program(fn, X, **tensors)
    after = run_pass(before, FuseNorm())
    assert after.print() == before.print()
    return after


def test_a_norm_that_others_read_stays():
    def fn(self, x):
        value = normed(x)
        return value * self.weight, value.sum(1)

    after = untouched(fn, weight=VECTORS["weight"])
    assert skips(after) == ["something else reads the normed values, too"]


def test_a_modulated_norm_that_others_read_stays():
    def fn(self, x):
        value = first(self, x)
        return value, value.sum(1)

    assert skips(untouched(fn, **needed(first)))


def test_two_affine_parts_stay():
    def fn(self, x):
        return normed(x, self.weight, self.bias) * self.scale

    untouched(fn, **{name: VECTORS[name] for name in ("weight", "bias", "scale")})


def of_heads(self, x):
    return F.layer_norm(x.unflatten(-1, (4, 4)), (4,))


def of_two_dims(self, x):
    return F.layer_norm(x.unflatten(-1, (4, 4)).flatten(0, 1), (4, 4))


def of_squares_alone(self, x):
    return F.rms_norm(x, (C,))


def by_a_number(self, x):
    return normed(x) * 2.0 + 1.0


def by_one_number_a_token(self, x):
    return normed(x) * x[..., :1]


def by_whole_numbers(self, x):
    return normed(x) * torch.arange(C)


def by_a_row_for_all_videos(self, x):
    return normed(x) * self.bias[None, None]


def by_alpha(self, x):
    return torch.add(normed(x), self.bias, alpha=2)


def by_weight_after_bias(self, x):
    return (normed(x) + self.bias) * self.weight


@pytest.mark.parametrize(
    "fn",
    [
        of_heads,
        of_two_dims,
        of_squares_alone,
        by_a_number,
        by_one_number_a_token,
        by_whole_numbers,
        by_a_row_for_all_videos,
        by_alpha,
    ],
)
def test_other_norms_and_modulations_stay(fn):
    untouched(fn, bias=VECTORS["bias"])


def test_a_product_after_a_sum_stays():
    untouched(by_weight_after_bias, bias=VECTORS["bias"], weight=VECTORS["weight"])


def of_a_part(self, x, total):
    return total + branch(x)[:, :1]


def of_less_than_all(self, x, total):
    return torch.add(total, branch(x), alpha=0.5)


def of_another_type(self, x, total):
    return total + branch(x).double()


@pytest.mark.parametrize("summed", [of_a_part, of_less_than_all, of_another_type])
def test_other_sums_are_left_to_themselves(summed):
    def fn(self, x):
        total = summed(self, x, x)
        return normed(total) * self.weight, total

    tensors = {"weight": VECTORS["weight"]}
    after = fused(fn, **tensors)
    found = counts(after)
    assert (found["norm_quantize"], found["add"]) == (1, 1)
    assert_nearest(after, fn, X, **tensors)


# A modulation that is made from the sum --------------------------------------------------------


def test_a_modulation_made_from_the_sum_keeps_it():
    def fn(self, x):
        total = (wide(x) + branch(x) * (times(x) * self.gate)).type_as(x)
        return modulated(self, total, times(total)), total

    tensors = needed(gated)
    after = fused(fn, **tensors)
    found = counts(after)
    assert found["norm_quantize"] == 1
    assert "residual_norm_quantize" not in found
    assert_nearest(after, fn, X, **tensors)


def test_a_modulation_made_from_the_sum_by_way_of_a_fused_norm_keeps_it():
    def fn(self, x):
        op = torch.ops.wancompile.quantize_per_token
        total = x + branch(x)
        q, scale = op(F.layer_norm(total, (C,)) * times(total), None, INT8)
        return modulated(self, total, times(q.float() * scale)), total

    tensors = needed(first)
    after = fused(fn, **tensors)
    assert counts(after)["norm_quantize"] == 2
    assert_neighbours(after, program(fn, X, **tensors), X)


def test_two_sums_whose_modulations_cross():
    """Each sum could give its norm away, but not both: each norm needs a mean of the other sum."""

    def fn(self, x):
        op = torch.ops.wancompile.quantize_per_token
        one = x + branch(x)
        mean = times(torch.tanh(one))
        other = x + branch(x) * self.weight
        first = op(normed(one) * (times(other) * self.scale), None, INT8)
        return normed(other) * (mean * self.shift), *first

    tensors = {name: VECTORS[name] for name in ("weight", "scale", "shift")}
    after = fused(fn, **tensors)
    found = counts(after)
    assert found["residual_norm_quantize"] + found.get("norm_quantize", 0) == 2
    assert_neighbours(after, program(fn, X, **tensors), X)


def test_sorting_is_left_to_what_needs_it():
    """A program in which nothing is early keeps its order."""
    before = called_fused(lambda self, x: torch.tanh(x) + x, X)
    assert run_pass(before, FuseNorm()).print() == before.print()
