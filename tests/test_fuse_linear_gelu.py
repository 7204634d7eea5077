from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusing import called_fused, calls, skips
from kit import counts, run_pass
from small import largest, nearest
from test_lower import CUDA, give

from wancompile import pipeline
from wancompile.passes import FuseGelu, FuseLinearGelu, Lower
from wancompile.passes.add_low_rank import AddLowRank, Slot
from wancompile.quant.numerics import FP8, INT8, QMAX, quantize_weight

K, N = 32, 48
BF16 = torch.bfloat16
TYPES = {"int8": INT8, "fp8": FP8}
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 20, K, generator=DRAW)
WEIGHT = torch.randn(N, K, generator=DRAW) / K**0.5
BIAS = torch.randn(N, generator=DRAW)
INVERSE = torch.rand(N, generator=DRAW) + 0.5
TOP = 2.5  # what the static scale reaches to: a few values are beyond it
ops = torch.ops.wancompile


def weight(self):
    """No parameter that is exported can be e4m3: its bytes are."""
    return self.data.view(FP8) if self.data.dtype == torch.uint8 else self.data


def linear(self, x):
    q, scale = ops.quantize_per_token(x, None, weight(self).dtype)
    return ops.scaled_linear(q, scale, weight(self), self.scale, self.bias, x.dtype)


def tanh_form(self, x):
    return F.gelu(linear(self, x), approximate="tanh")


def erf_form(self, x):
    return F.gelu(linear(self, x))


def tensors(dtype="int8", **others):
    found = quantize_weight(WEIGHT, TYPES[dtype])
    data = found.data if dtype == "int8" else found.data.view(torch.uint8)
    scale = torch.tensor([TOP / QMAX[TYPES[dtype]]])
    return {"data": data, "scale": found.scale, "bias": BIAS, "t": scale, **others}


def program(fn, x=X, **given):
    """`fn` rounded by the static scale `t`, called a FUSED program: nothing is fused yet."""

    def rounding(self, x):
        value, *rest = found if isinstance(found := fn(self, x), tuple) else (found,)
        dtype = weight(self).dtype
        return (ops.quantize_per_tensor(value, getattr(self, "inv", None), self.t, dtype), *rest)

    return called_fused(rounding, x, **given)


def fused(fn, x=X, **given):
    return run_pass(program(fn, x, **given), FuseLinearGelu())


def test_the_linear_rounds_what_comes_behind_gelu(golden):
    golden(fused(tanh_form, **tensors(inv=INVERSE)).print("canonical"))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("others", [{"inv": INVERSE}, {}], ids=["smooth", "plain"])
@pytest.mark.parametrize(("fn", "form"), [(tanh_form, "tanh"), (erf_form, "none")])
def test_both_forms_round_to_the_nearest_of_fp64(fn, form, others, dtype):
    given = tensors(dtype, **others)
    after = fused(fn, **given)
    assert not {"scaled_linear", "gelu", "quantize_per_tensor"} & set(counts(after))
    assert calls(after, "linear_gelu_quantize")[0][5] == form
    (q,) = after(x=X)
    x8, x_scale = ops.quantize_per_token(X, None, TYPES[dtype])
    stored = given["data"] if dtype == "int8" else given["data"].view(FP8)
    y = (x8.double() * x_scale) @ (stored.double() * given["scale"]).T + BIAS
    wanted = F.gelu(y, approximate=form) * others.get("inv", 1) / given["t"].double()
    assert (wanted.abs() > largest(dtype)).any()
    assert q.float().abs().max() == largest(dtype)
    near = nearest(wanted, dtype)
    differs = q.double() != near
    assert differs.double().mean() < 0.005  # fp32 falls to the other side of a tie now and then
    step = 1 if dtype == "int8" else near.abs() / 8 + 2**-9
    assert ((q.double() - near).abs() <= step).all()


def test_bf16_is_rounded_less_often():
    given = tensors(bias=BIAS.to(BF16))
    x = X.to(BF16)
    x8, x_scale = ops.quantize_per_token(x, None, INT8)
    y = (x8.double() * x_scale) @ (given["data"].double() * given["scale"]).T
    y += given["bias"].double()
    wanted = (F.gelu(y, approximate="tanh") / given["t"].double()).clamp(-127, 127)
    before = program(tanh_form, x, **given)
    off = [(one(x=x)[0].double() - wanted).norm() for one in (fused(tanh_form, x, **given), before)]
    assert off[0] < off[1]


def test_casts_on_the_way_go():
    def fn(self, x):
        return F.gelu(linear(self, x).float(), approximate="tanh").to(x.dtype)

    given = tensors(bias=BIAS.to(BF16))
    assert "to" not in counts(fused(fn, X.to(BF16), **given))


def test_a_scale_per_token_is_left_to_the_other_pass():
    def fn(self, x):
        return ops.quantize_per_token(tanh_form(self, x), None, INT8)

    before = called_fused(fn, X, **tensors())
    after = run_pass(before, FuseLinearGelu())
    assert after.print() == before.print()
    assert not skips(after)
    assert counts(run_pass(after, FuseGelu()))["gelu_quantize"] == 1


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda m, x: (y := tanh_form(m, x), y.sum(1)), "something else reads the GELU, too"),
        (
            lambda m, x: (F.gelu(y := linear(m, x)), y.sum(1)),
            "something else reads the linear before it, too",
        ),
        (lambda m, x: F.gelu(F.linear(x, m.w)), "what it reads is no linear in 8 bits"),
        (lambda m, x: F.gelu(linear(m, x) + 1), "what it reads is no linear in 8 bits"),
    ],
    ids=["gelu", "linear", "float", "sum"],
)
def test_what_cannot_be_one_op_stays(fn, reason):
    before = program(fn, **tensors(w=WEIGHT))
    after = run_pass(before, FuseLinearGelu())
    assert after.print() == before.print()
    assert skips(after) == [reason]


@pytest.mark.parametrize("between", [torch.neg, lambda x: x.flip(2), F.silu])
def test_what_stands_between_stays(between):
    def fn(self, x):
        return between(tanh_form(self, x))

    before = program(fn, **tensors())
    after = run_pass(before, FuseLinearGelu())
    assert after.print() == before.print()
    assert not skips(after)


# What becomes of it -----------------------------------------------------------------------------


def lowered(monkeypatch, capability, dtype):
    give(monkeypatch, capability)
    return pipeline.run(fused(tanh_form, **tensors(dtype)), [Lower(CUDA)])


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_hopper_takes_it_whole(monkeypatch, dtype):
    found = counts(lowered(monkeypatch, (9, 0), dtype))
    assert found["linear_gelu_quantize_hopper"] == 1
    assert "gelu" not in found


@pytest.mark.parametrize(
    ("dtype", "kernel"), [("int8", "int8_linear_int_mm"), ("fp8", "fp8_linear_scaled_mm")]
)
def test_elsewhere_it_is_three_ops_again(monkeypatch, dtype, kernel):
    found = counts(lowered(monkeypatch, (8, 9), dtype))
    assert (found[kernel], found["gelu"], found["quantize_per_tensor_triton"]) == (1, 1, 1)
    assert "linear_gelu_quantize" not in found


def test_a_branch_of_low_rank_goes_before_gelu():
    before = fused(tanh_form, **tensors())
    after = run_pass(before, AddLowRank((Slot("data", 4),), torch.float32))
    found = counts(after)
    assert (found["scaled_linear_low_rank"], found["gelu"], found["quantize_per_tensor"]) == (
        1,
        1,
        1,
    )
    assert torch.equal(after(x=X)[0], before(x=X)[0])
