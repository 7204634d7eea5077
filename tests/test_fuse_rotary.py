from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fusing import TYPES, called_fused, calls, skips
from kit import Function, counts, run_pass
from small import CHANNELS, HEAD_DIM, HEADS, largest

from wancompile.passes import FuseRotary
from wancompile.pipeline import relative_error

BF16 = torch.bfloat16
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 20, CHANNELS, generator=DRAW)
TENSORS = {
    "weight": 1 + 0.3 * torch.randn(CHANNELS, generator=DRAW),
    "rates": torch.tensor([0.7, 0.1]),
    "scale": torch.tensor([0.02, 0.03, 0.04]),
}
BF16_TENSORS = TENSORS | {"weight": TENSORS["weight"].to(BF16)}
ops = torch.ops.wancompile
# Sylvester's, of heads of four.
HADAMARD = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
SHIFT = {"shift": torch.randn(HEADS, 1, HEAD_DIM, generator=DRAW)}


def angles(self, x):
    """[1, S, 1, D / 2], fp32."""
    places = torch.arange(x.shape[1], dtype=torch.float32)
    return (places[:, None] * self.rates.float())[None, :, None]


def norm(self, x):
    return F.rms_norm(x, (CHANNELS,), self.weight, 1e-6)


def split(x):
    return x.unflatten(-1, (HEADS, HEAD_DIM))


def pairs(heads):
    return heads.unflatten(-1, (-1, 2)).unbind(-1)


def stored(heads, first, second):
    """As Wan does it: strided stores into a fresh buffer."""
    out = torch.empty_like(heads)
    out[..., 0::2], out[..., 1::2] = first, second
    return out.type_as(heads)


def wan(self, x):
    heads, turn = split(norm(self, x)), angles(self, x)
    even, odd = pairs(heads)
    cos, sin = turn.cos(), turn.sin()
    return stored(heads, even * cos - odd * sin, even * sin + odd * cos).transpose(1, 2)


def stacked(self, x):
    """By another hand: stack, factors and terms the other way round, fp32 on the way."""
    turn = angles(self, x)
    even, odd = pairs(split(norm(self, x)).float())
    first = turn.cos() * even - turn.sin() * odd
    second = turn.cos() * odd + turn.sin() * even
    return torch.stack((first, second), -1).flatten(-2).to(x.dtype).transpose(1, 2)


def selected_tables(self, x):
    """Cosine and sine are themselves halves of one value."""
    turn = angles(self, x)
    cos, sin = torch.stack((turn.cos(), turn.sin()), -1).unbind(-1)
    even, odd = pairs(split(norm(self, x)))
    parts = even * cos - odd * sin, even * sin + odd * cos
    return torch.stack(parts, -1).flatten(-2).transpose(1, 2)


def backwards(self, x):
    """A rotation by minus the angle, with the signs in the table."""
    turn = -angles(self, x)
    even, odd = pairs(split(norm(self, x)))
    parts = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
    return torch.stack(parts, -1).flatten(-2).transpose(1, 2)


def without_gain(self, x):
    heads, turn = split(F.rms_norm(x, (CHANNELS,), eps=1e-5)), angles(self, x)
    even, odd = pairs(heads)
    parts = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
    return stored(heads, *parts).transpose(1, 2)


SPELLINGS = (wan, stacked, selected_tables, backwards, without_gain)


def program(fn, x=X, dtype="int8", *, turned=False, **more):
    def rounded(self, x):
        value = fn(self, x)
        if turned:
            value = ops.hadamard(value)
        if "shift" in more:
            value = value - self.shift
        return ops.quantize_per_head(value, self.scale, TYPES[dtype])

    return called_fused(rounded, x, **{**TENSORS, **more})


def per_token(fn, x=X, dtype="int8", *, turned=False, **more):
    """Rounded by a scale for each head of each token."""

    def rounded(self, x):
        value = fn(self, x)
        return ops.quantize_per_token(ops.hadamard(value) if turned else value, None, TYPES[dtype])

    return called_fused(rounded, x, **{**TENSORS, **more})


def exact(fn, x, shift=0.0, *, turned=False, **more):
    with torch.no_grad():
        value = fn(Function(fn, **{**TENSORS, **more}).double(), x.double())
    value = value.double() @ HADAMARD.double() if turned else value.double()
    return value - shift


def attended(fn, x=X, **more):
    """`fn` as q, k and v of an attention in floating point: its value, and what attention gives."""

    def compared(self, x):
        value = fn(self, x)
        return value, F.scaled_dot_product_attention(value, value, value)

    return called_fused(compared, x, **{**TENSORS, **more})


def steps(q):
    return q.double() * TENSORS["scale"].double()[:, None, None]


def fused(fn, x=X, dtype="int8", **more):
    return run_pass(program(fn, x, dtype, **more), FuseRotary())


BASES = [{}, {**SHIFT, "turned": True}]
NAMES = ["plain", "turned and shifted"]


def test_norm_and_rotation_round_their_own_output(golden):
    golden(fused(wan, turned=True, **SHIFT).print("canonical"))


def test_norm_and_rotation_find_scales_of_their_own(golden):
    golden(run_pass(per_token(wan, turned=True), FuseRotary()).print("canonical"))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("fn", SPELLINGS)
def test_every_spelling_rounds_each_token_to_the_nearest(fn, turned, dtype):
    before = per_token(fn, dtype=dtype, turned=turned)
    after = run_pass(before, FuseRotary())
    found = counts(after)
    assert found["norm_rotate_quantize_per_token"] == 1
    assert not {"rms_norm", "permute", "quantize_per_token", "hadamard"} & set(found)
    q, step = after(x=X)
    value = exact(fn, X, turned=turned)
    top = value.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(step.double(), top / largest(dtype), rtol=1e-5, atol=0)
    half = step / 2 if dtype == "int8" else torch.maximum(value.abs() / 16, step / 1024)
    assert ((q.double() * step - value).abs() <= half + 1e-5).all()
    assert (q.float() != before(x=X)[0].float()).float().mean() < 0.01


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("more", BASES, ids=NAMES)
@pytest.mark.parametrize("fn", SPELLINGS)
def test_every_spelling_rounds_to_the_nearest(fn, more, dtype):
    after = fused(fn, dtype=dtype, **more)
    found = counts(after)
    assert found["norm_rotate_quantize"] == 1
    assert not {"rms_norm", "permute", "quantize_per_head", "hadamard"} & set(found)
    q, before = after(x=X), program(fn, dtype=dtype, **more)(x=X)
    value, step = exact(fn, X, **more), TENSORS["scale"].double()[:, None, None]
    top = step * largest(dtype)
    half = step / 2 if dtype == "int8" else torch.maximum(value.abs() / 16, step / 1024)
    assert ((steps(q) - value.clamp(-top, top)).abs() <= half + 1e-5).all()
    assert (q.float() != before.float()).float().mean() < 0.01
    assert relative_error(steps(q), steps(before)) < 0.01


@pytest.mark.parametrize("more", BASES, ids=NAMES)
@pytest.mark.parametrize("fn", SPELLINGS)
def test_bf16_is_rounded_less_often(fn, more):
    x, more = X.to(BF16), {"weight": TENSORS["weight"].to(BF16), **more}
    after, before = fused(fn, x, **more), program(fn, x, **more)
    assert counts(after)["norm_rotate_quantize"] == 1
    expected = exact(fn, x, **more)
    ours, theirs = (relative_error(steps(one(x=x)), expected) for one in (after, before))
    assert ours < 1.02 * theirs


def test_q_and_k_share_one_view_of_the_tables():
    def fn(self, x):
        op = ops.quantize_per_head
        return [op(wan(self, one), self.scale, torch.int8) for one in (x, torch.tanh(x))]

    after = run_pass(called_fused(fn, X, **TENSORS), FuseRotary())
    assert counts(after)["norm_rotate_quantize"] == 2
    first, second = calls(after, "norm_rotate_quantize")
    assert first[3:5] == second[3:5]


def test_a_norm_that_others_read_is_computed_for_them():
    def fn(self, x):
        op = ops.quantize_per_head
        return op(wan(self, x), self.scale, torch.int8), norm(self, x)

    after = run_pass(called_fused(fn, X, **TENSORS), FuseRotary())
    assert (counts(after)["norm_rotate_quantize"], counts(after)["rms_norm"]) == (1, 1)
    torch.testing.assert_close(after(x=X)[1], norm(Function(fn, **TENSORS), X))


def test_the_default_eps_is_that_of_the_type():
    def fn(self, x):
        heads, turn = split(F.rms_norm(x, (CHANNELS,))), angles(self, x)
        even, odd = pairs(heads)
        parts = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
        return stored(heads, *parts).transpose(1, 2)

    ((_, weight, eps, *_),) = calls(fused(fn), "norm_rotate_quantize")
    assert weight is None
    assert eps == pytest.approx(torch.finfo(torch.float32).eps)


# For attention in floating point ---------------------------------------------------------------


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


# What must not be fused ------------------------------------------------------------------------


def turned(self, x, first, second, norm=norm, angles=angles):
    """Rotate by formulas of (even, odd, cos, sin)."""
    even, odd = pairs(split(norm(self, x)))
    turn = angles(self, x)
    parts = (one(even, odd, turn.cos(), turn.sin()) for one in (first, second))
    return torch.stack(tuple(parts), -1).flatten(-2).transpose(1, 2)


def x_part(e, o, c, s):
    return e * c - o * s


def y_part(e, o, c, s):
    return e * s + o * c


def no_norm(self, x):
    return turned(self, x, x_part, y_part, norm=lambda self, x: x)


def norm_of_each_head(self, x):
    def per_head(self, x):
        return F.rms_norm(split(x), (HEAD_DIM,), self.weight[:HEAD_DIM], 1e-6).flatten(2)

    return turned(self, x, x_part, y_part, norm=per_head)


def layer_norm(self, x):
    return turned(self, x, x_part, y_part, norm=lambda m, x: F.layer_norm(x, (CHANNELS,), m.weight))


def other_way_round(self, x):
    return turned(self, x, lambda e, o, c, s: e * c + o * s, lambda e, o, c, s: o * c - e * s)


def no_rotation(self, x):
    return turned(self, x, x_part, lambda e, o, c, s: e * c + o * s)


def both_differences(self, x):
    return turned(self, x, x_part, lambda e, o, c, s: e * s - o * c)


def odd_before_even(self, x):
    return turned(self, x, lambda e, o, c, s: o * c - e * s, lambda e, o, c, s: o * s + e * c)


def swapped_results(self, x):
    return turned(self, x, y_part, x_part)


def scaled_by_alpha(self, x):
    def first(e, o, c, s):
        return torch.sub(e * c, o * s, alpha=2)

    return turned(self, x, first, y_part)


def table_of_each_head(self, x):
    def per_head(self, x):
        return angles(self, x) * torch.arange(1.0, HEADS + 1)[:, None]

    return turned(self, x, x_part, y_part, angles=per_head)


def table_of_each_video(self, x):
    def per_video(self, x):
        return angles(self, x) * x.mean((1, 2), keepdim=True)[..., None]

    return turned(self, x, x_part, y_part, angles=per_video)


def one_angle_for_all_tokens(self, x):
    return turned(self, x, x_part, y_part, angles=lambda self, x: angles(self, x)[:, 1:2])


def rounded_table(self, x):
    return turned(self, x, x_part, y_part, angles=lambda self, x: angles(self, x).to(BF16))


def halves(self, x):
    """Channels i and i + D / 2 are a pair, as in GPT-NeoX."""
    even, odd = split(norm(self, x)).chunk(2, -1)
    turn = angles(self, x)
    parts = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
    return torch.cat(parts, -1).transpose(1, 2)


def pairs_of_halves(self, x):
    """Halves turn, but the results lie in pairs."""
    even, odd = split(norm(self, x)).unflatten(-1, (2, -1)).unbind(-2)
    turn = angles(self, x)
    parts = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
    return torch.stack(parts, -1).flatten(-2).transpose(1, 2)


def stacked_before_pairs(self, x):
    """The two results lie D / 2 apart."""
    even, odd = pairs(split(norm(self, x)))
    turn = angles(self, x)
    parts = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
    return torch.stack(parts, -2).flatten(-2).transpose(1, 2)


def tokens_first(self, x):
    """[S, H, B, D], which looks like [B, H, S, D] of another batch."""
    even, odd = pairs(split(norm(self, x)))
    turn = angles(self, x)
    parts = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
    return torch.stack(parts, -1).flatten(-2).permute(1, 2, 0, 3)


def odd_channels_alone(self, x):
    return turned(self, x, lambda e, o, c, s: o * c - o * s, lambda e, o, c, s: o * s + o * c)


def whole_numbers(self, x):
    even, odd = pairs(split(norm(self, x)))
    turn = angles(self, x)
    parts = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
    return torch.stack(parts, -1).to(torch.int32).flatten(-2).float().transpose(1, 2)


def whole_products(self, x):
    def first(e, o, c, s):
        return (e * c).to(torch.int32) - o * s

    return turned(self, x, first, y_part)


def whole_pairs(self, x):
    return turned(self, x, x_part, y_part, norm=lambda m, x: norm(m, x).to(torch.int32).float())


def regrouped(self, x):
    """Rotated in heads of 4, rounded in heads of 4 of which each holds channels of two."""
    rotated = wan(self, x).transpose(1, 2).flatten(2)
    return rotated.unflatten(-1, (HEAD_DIM, HEADS)).transpose(-1, -2).transpose(1, 2)


def three_parts(self, x):
    even, odd = pairs(split(norm(self, x)))
    turn = angles(self, x)
    a, b = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
    return torch.stack((a, b, a), -1).flatten(-2).transpose(1, 2)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (no_norm, "no RMSNorm"),
        (norm_of_each_head, "no RMSNorm"),
        (layer_norm, "no RMSNorm"),
        (whole_pairs, "no RMSNorm"),
        (other_way_round, "not a rotation of pairs"),
        (no_rotation, "not a rotation of pairs"),
        (both_differences, "not a rotation of pairs"),
        (swapped_results, "not a rotation of pairs"),
        (whole_products, "not a rotation of pairs"),
        (scaled_by_alpha, "not a rotation of pairs"),
        (odd_before_even, "not neighbouring channels"),
        (table_of_each_head, "table of angles"),
        (table_of_each_video, "table of angles"),
        (one_angle_for_all_tokens, "table of angles"),
        (rounded_table, "table of angles"),
        (pairs_of_halves, "not neighbouring channels"),
        (halves, "not rotated by pairs"),
        (stacked_before_pairs, "not rotated by pairs"),
        (whole_numbers, "not rotated by pairs"),
        (tokens_first, "not laid out"),
        (odd_channels_alone, "not neighbouring channels"),
        (regrouped, "not rotated by pairs"),
    ],
)
@pytest.mark.parametrize(
    "reader",
    [program, partial(per_token, turned=True), attended],
    ids=["8 bits", "turned, per token", "float"],
)
def test_what_is_not_this_rotation_stays(fn, reason, reader):
    before = reader(fn)
    after = run_pass(before, FuseRotary())
    assert after.print() == before.print()
    (found,) = skips(after)
    assert reason in found


@pytest.mark.parametrize("reader", [program, per_token, attended])
def test_heads_of_three_parts_stay(reader):
    before = reader(three_parts)
    after = run_pass(before, FuseRotary())
    assert after.print() == before.print()
    assert "not rotated by pairs" in skips(after)[0]


def test_other_heads_than_were_rotated_stay():
    """Rotated as 3 heads of 4 and rounded as 6 heads of 2: the tables fit the first alone."""

    def fn(self, x):
        even, odd = pairs(split(norm(self, x)))
        turn = angles(self, x)
        parts = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
        heads = torch.stack(parts, -1).reshape(x.shape[0], x.shape[1], 6, 2).transpose(1, 2)
        return ops.quantize_per_head(heads, self.scale, torch.int8)

    before = called_fused(fn, X, **{**TENSORS, "scale": torch.linspace(0.01, 0.06, 6)})
    after = run_pass(before, FuseRotary())
    assert after.print() == before.print()
    assert "not rotated by pairs" in skips(after)[0]


@pytest.mark.parametrize("shape", [(HEADS, 1, 1), (1, 1, HEAD_DIM), (HEAD_DIM,)])
def test_a_shift_of_another_shape_stays(shape):
    before = program(wan, shift=torch.ones(shape))
    after = run_pass(before, FuseRotary())
    assert after.print() == before.print()
    assert "not laid out" in skips(after)[0]


def test_what_is_turned_after_the_shift_stays():
    def fn(self, x):
        value = ops.hadamard(wan(self, x) - self.shift)
        return ops.quantize_per_head(value, self.scale, torch.int8)

    before = called_fused(fn, X, **TENSORS, **SHIFT)
    after = run_pass(before, FuseRotary())
    assert after.print() == before.print()
    assert "not laid out" in skips(after)[0]


def test_what_is_turned_twice_stays():
    def fn(self, x):
        return ops.quantize_per_token(ops.hadamard(ops.hadamard(wan(self, x))), None, torch.int8)

    before = called_fused(fn, X, **TENSORS)
    after = run_pass(before, FuseRotary())
    assert after.print() == before.print()
    assert "not laid out" in skips(after)[0]


def test_rows_with_a_smooth_scale_and_rows_of_three_dims_are_no_queries():
    def fn(self, x):
        smooth = self.scale.new_ones(HEAD_DIM)
        return [
            *ops.quantize_per_token(wan(self, x), smooth, torch.int8),
            *ops.quantize_per_token(wan(self, x).transpose(1, 2).flatten(2), None, torch.int8),
        ]

    before = called_fused(fn, X, **TENSORS)
    after = run_pass(before, FuseRotary())
    assert after.print() == before.print()
    assert not skips(after)


def test_a_shift_by_alpha_stays():
    def fn(self, x):
        value = torch.sub(wan(self, x), self.shift, alpha=2)
        return ops.quantize_per_head(value, self.scale, torch.int8)

    before = called_fused(fn, X, **TENSORS, **SHIFT)
    after = run_pass(before, FuseRotary())
    assert after.print() == before.print()
