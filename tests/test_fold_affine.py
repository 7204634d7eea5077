from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from folding import SCALE, TENSORS, attend, folded, group_of, input_of, normal, place
from kit import error
from small import CHANNELS, X

from wancompile.ir import text
from wancompile.ir.site import Fold, Role, Source
from wancompile.passes.folds import affine

SHAPE = (CHANNELS,)


def layer(self, x):
    return attend(self, F.layer_norm(x, SHAPE, self.gain, self.shift))


def layer_without_bias(self, x):
    return attend(self, F.layer_norm(x, SHAPE, self.gain))


def rms(self, x):
    return attend(self, F.rms_norm(x, SHAPE, self.gain, 1e-6))


def cast_after_norm(self, x):
    return attend(self, F.layer_norm(x.float(), SHAPE, self.gain.float(), self.shift.float()).to(x))


def norm_used_twice(self, x):
    """Two norms share their weights; only one of them may change."""
    return attend(self, F.layer_norm(x, SHAPE, self.gain, self.shift)) + F.layer_norm(
        x + 1, SHAPE, self.gain, self.shift
    )


def test_scale_goes_into_weight_and_bias(golden):
    before = normal(layer)
    golden(text.diff(before.print(), folded(before, Role.ATTN_QKV, affine).print()))


@pytest.mark.parametrize("fn", [layer, layer_without_bias, rms, norm_used_twice])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_the_function_stays(fn, dtype, limit):
    before = normal(fn, dtype)
    after = folded(before, Role.ATTN_QKV, affine)
    x = torch.randn(3, 7, CHANNELS, dtype=dtype)
    assert group_of(before, Role.ATTN_QKV).source is Source.AFFINE_NORM
    assert group_of(before, Role.ATTN_QKV).fold is Fold.AFFINE
    assert error(after, fn, x, **TENSORS) < limit
    read = input_of(after, Role.ATTN_QKV, x) * SCALE
    torch.testing.assert_close(read.to(dtype), input_of(before, Role.ATTN_QKV, x))


def test_a_cast_lies_between_norm_and_linears():
    before = normal(cast_after_norm, torch.bfloat16)
    after = folded(before, Role.ATTN_QKV, affine)
    assert error(after, cast_after_norm, X.bfloat16(), **TENSORS) < 3e-2


def plain(self, x):
    return attend(self, F.layer_norm(x, SHAPE))


def foreign(self, x):
    y = F.layer_norm(x, SHAPE, self.gain, self.shift)
    return attend(self, y) + y


def foreign_before_cast(self, x):
    y = F.layer_norm(x.float(), SHAPE, self.gain.float(), self.shift.float())
    return attend(self, y.to(x)) + y.sum()


def returned(self, x):
    y = F.layer_norm(x, SHAPE, self.gain, self.shift)
    return attend(self, y), y


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (plain, "no norm with weights"),
        (foreign, "add reads the norm too"),
        (foreign_before_cast, "sum_1 reads the norm too"),
        (returned, "output reads the norm too"),
    ],
)
def test_why_not(fn, reason):
    program = normal(fn, torch.bfloat16 if fn is foreign_before_cast else torch.float64)
    assert reason in affine.find(*place(program, Role.ATTN_QKV))
    assert group_of(program, Role.ATTN_QKV).fold is Fold.QUANTIZE


def test_asking_for_a_size_is_no_reading():
    def fn(self, x):
        y = F.layer_norm(x, SHAPE, self.gain, self.shift)
        return attend(self, y) * y.shape[1]

    assert group_of(normal(fn), Role.ATTN_QKV).fold is Fold.AFFINE
