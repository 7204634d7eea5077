from __future__ import annotations

from functools import partial

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

from wancompile.passes import FuseGelu

DRAWN = torch.randn(40 * 16 + 32, generator=torch.Generator().manual_seed(0))
X = 2 * DRAWN[: 40 * 16].view(2, 20, 16)
VECTORS = {"b": DRAWN[-32:-16], "inv": DRAWN[-16:].exp()}
BF16 = torch.bfloat16


def tanh_form(self, x):
    return F.gelu(x + self.b, approximate="tanh")


def erf_form(self, x):
    return F.gelu(x + self.b)


def fused(fn, x=X, dtype="int8", **tensors):
    return run_pass(program(fn, x, dtype, **tensors), FuseGelu())


def test_gelu_rounds_its_own_output(golden):
    golden(fused(tanh_form, **VECTORS).print("canonical"))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("tensors", [VECTORS, {"b": VECTORS["b"]}], ids=["smooth", "plain"])
@pytest.mark.parametrize("fn", [tanh_form, erf_form])
def test_both_forms_round_to_the_nearest(fn, tensors, dtype):
    after = fused(fn, dtype=dtype, **tensors)
    assert counts(after) == {"add": 1, "gelu_quantize": 1, "getitem": 2}
    assert_nearest(after, fn, X, dtype, **tensors)
    assert_neighbours(after, program(fn, X, dtype, **tensors), X)


def test_the_two_forms_are_told_apart():
    """Where GELU is 2 they differ by 5e-5 of it, far more than fp32 rounds."""
    x, b = torch.linspace(1, 3, 640).view(2, 20, 16), torch.zeros(16)
    tanh, erf = (fused(fn, x, b=b) for fn in (tanh_form, erf_form))
    assert [calls(one, "gelu_quantize")[0][1] for one in (tanh, erf)] == ["tanh", "none"]
    assert (tanh(x=x)[1] / erf(x=x)[1] - 1).abs().max() > 4e-5


@pytest.mark.parametrize("fn", [tanh_form, erf_form])
def test_bf16_is_rounded_less_often(fn):
    tensors = {"b": VECTORS["b"].to(BF16), "inv": VECTORS["inv"]}
    x = X.to(BF16)
    assert_no_farther(fused(fn, x, **tensors), program(fn, x, **tensors), fn, x, **tensors)


def test_casts_on_the_way_go():
    def fn(self, x):
        return F.gelu(x.float(), approximate="tanh").to(x.dtype)

    x = X.to(BF16)
    after = fused(fn, x)
    assert counts(after) == {"gelu_quantize": 1, "getitem": 2, "to": 1}
    assert_no_farther(after, program(fn, x), fn, x)


def test_a_gelu_that_others_read_stays():
    def fn(self, x):
        value = tanh_form(self, x)
        return value, value.sum(1)

    after = fused(fn, **VECTORS)
    assert counts(after) == counts(program(fn, X, **VECTORS))
    assert skips(after) == ["something else reads the GELU, too"]


def test_a_gelu_that_is_rounded_twice_stays():
    def fn(self, x):
        op = torch.ops.wancompile.quantize_per_token
        value = tanh_form(self, x)
        return *op(value, None, torch.int8), *op(value, self.inv, torch.int8)

    after = run_pass(called_fused(fn, X, **VECTORS), FuseGelu())
    assert "gelu_quantize" not in counts(after)
    assert skips(after) == ["something else reads the GELU, too"] * 2


@pytest.mark.parametrize(
    "between",
    [torch.neg, lambda x: x.to(torch.int32).float(), partial(torch.flip, dims=[2])],
    ids=["negated", "truncated", "flipped"],
)
def test_what_stands_between_stays(between):
    def fn(self, x):
        return between(tanh_form(self, x))

    before = program(fn, X, **VECTORS)
    after = run_pass(before, FuseGelu())
    assert after.print() == before.print()
    assert not skips(after)


def test_another_activation_stays():
    before = program(lambda self, x: F.silu(x), X)
    assert run_pass(before, FuseGelu()).print() == before.print()
