"""Norm and rotation that round their own output to 8 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusing import called_fused, calls
from kit import Function, counts, run_pass
from rotating import (
    BF16,
    SHIFT,
    SPELLINGS,
    TENSORS,
    X,
    angles,
    exact,
    norm,
    ops,
    pairs,
    per_token,
    program,
    split,
    stored,
    wan,
)
from small import CHANNELS, largest

from wancompile.passes import FuseRotary
from wancompile.pipeline import relative_error


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
