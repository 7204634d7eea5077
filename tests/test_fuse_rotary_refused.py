"""What is no rotation of normed heads, or is laid out otherwise, and stays as it is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fusing import called_fused, skips
from kit import run_pass
from rotating import (
    BF16,
    SHIFT,
    TENSORS,
    X,
    angles,
    attended,
    norm,
    ops,
    pairs,
    per_token,
    program,
    split,
    wan,
)
from small import CHANNELS, HEAD_DIM, HEADS

from wancompile.passes import FuseRotary


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
