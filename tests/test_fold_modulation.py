from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from folding import SCALE, TENSORS, attend, folded, group_of, input_of, normal, place
from kit import error
from small import CHANNELS, X

from wancompile.ir import text
from wancompile.ir.site import Fold, Role, Source
from wancompile.passes.folds import modulation

SHAPE = (CHANNELS,)


def row(x, factor):
    """One row per video, [B, 1, C]."""
    return x.mean(1, keepdim=True) * factor


def modulated(self, x):
    y = F.layer_norm(x, SHAPE)
    return attend(self, y * (1 + row(x, self.gain)) + row(x, self.shift))


def operands_swapped(self, x):
    y = F.layer_norm(x, SHAPE)
    return attend(self, row(x, self.shift) + (row(x, self.gain) + 1) * y)


def by_stored_vectors(self, x):
    return attend(self, F.layer_norm(x, SHAPE) * (1 + self.gain) + self.shift)


def over_rms_norm(self, x):
    return attend(self, F.rms_norm(x, SHAPE, None, 1e-6) * row(x, self.gain) + row(x, self.shift))


def over_affine_norm(self, x):
    y = F.layer_norm(x, SHAPE, self.bias)
    return attend(self, y * (1 + row(x, self.gain)) + row(x, self.shift))


def gain_is_shift(self, x):
    vector = row(x, self.gain)
    return attend(self, F.layer_norm(x, SHAPE) * vector + vector)


def same_gain_twice(self, x):
    """The gain is read elsewhere too, where it must not change."""
    gain = row(x, self.gain)
    return attend(self, F.layer_norm(x, SHAPE) * gain + row(x, self.shift)) * gain


MODULATED = [
    modulated,
    operands_swapped,
    by_stored_vectors,
    over_rms_norm,
    over_affine_norm,
    gain_is_shift,
    same_gain_twice,
]


def test_scale_goes_into_gain_and_shift(golden):
    before = normal(modulated)
    golden(text.diff(before.print(), folded(before, Role.ATTN_QKV, modulation).print()))


@pytest.mark.parametrize("fn", MODULATED)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_the_function_stays(fn, dtype, limit):
    before = normal(fn, dtype)
    after = folded(before, Role.ATTN_QKV, modulation)
    x = torch.randn(3, 7, CHANNELS, dtype=dtype)
    assert group_of(before, Role.ATTN_QKV).source is Source.MODULATED_NORM
    assert group_of(before, Role.ATTN_QKV).fold is Fold.MODULATION
    assert error(after, fn, x, **TENSORS) < limit
    read = input_of(after, Role.ATTN_QKV, x) * SCALE
    torch.testing.assert_close(read.to(dtype), input_of(before, Role.ATTN_QKV, x))


def in_fp32(self, x):
    y = F.layer_norm(x.float(), SHAPE) * (1 + row(x, self.gain).float()) + self.shift.float()
    return attend(self, y.to(x.dtype))


def test_norm_and_modulation_in_fp32_of_a_bf16_model():
    after = folded(normal(in_fp32, torch.bfloat16), Role.ATTN_QKV, modulation)
    assert error(after, in_fp32, X.bfloat16(), **TENSORS) < 3e-2


def per_token(self, x):
    return attend(self, F.layer_norm(x, SHAPE) * (1 + x * self.gain) + row(x, self.shift))


def shift_per_token(self, x):
    return attend(self, F.layer_norm(x, SHAPE) * (1 + self.gain) + x * self.shift)


def foreign(self, x):
    y = F.layer_norm(x, SHAPE) * (1 + self.gain) + self.shift
    return attend(self, y) + y


def product_read_too(self, x):
    y = F.layer_norm(x, SHAPE) * (1 + self.gain)
    return attend(self, y + self.shift) + y


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (per_token, "row per token"),
        (shift_per_token, "row per token"),
        (foreign, "reads the modulated norm too"),
        (product_read_too, "product of norm and gain has other readers"),
    ],
)
def test_why_not(fn, reason):
    program = normal(fn)
    group = group_of(program, Role.ATTN_QKV)
    assert reason in modulation.find(*place(program, Role.ATTN_QKV))
    assert (group.source, group.fold) == (Source.MODULATED_NORM, Fold.QUANTIZE)
    assert reason in group.fold_reason


def no_norm(self, x):
    return attend(self, x * (1 + self.gain) + self.shift)


def no_shift(self, x):
    return attend(self, F.layer_norm(x, SHAPE) * (1 + row(x, self.gain)))


def shift_by_a_number(self, x):
    return attend(self, F.layer_norm(x, SHAPE) * (1 + row(x, self.gain)) + 2.0)


def weighted_sum(self, x):
    return attend(self, torch.add(F.layer_norm(x, SHAPE) * row(x, self.gain), self.shift, alpha=2))


def norm_times_itself(self, x):
    y = F.layer_norm(x, SHAPE)
    return attend(self, y * y + self.shift)


def product_plus_itself(self, x):
    y = F.layer_norm(x, SHAPE) * row(x, self.gain)
    return attend(self, y + y)


@pytest.mark.parametrize(
    "fn",
    [no_norm, no_shift, shift_by_a_number, weighted_sum, norm_times_itself, product_plus_itself],
)
def test_what_is_no_modulated_norm(fn):
    program = normal(fn)
    assert modulation.read(place(program, Role.ATTN_QKV)[0]) is None
    assert group_of(program, Role.ATTN_QKV).source is Source.STREAM
