from __future__ import annotations

import pytest
import torch
from fusing import called_fused, calls, skips
from kit import counts, run_pass
from test_lower import CPU, CUDA, give

from wancompile import pipeline
from wancompile.ir import match
from wancompile.passes import FuseLinearResidual, Lower
from wancompile.pipeline import relative_error
from wancompile.quant.numerics import INT8, quantize_weight

C = 32
BF16 = torch.bfloat16
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 20, C, generator=DRAW)
WEIGHT = torch.randn(C, C, generator=DRAW) / C**0.5
GATE, BIAS = (torch.randn(C, generator=DRAW) for _ in range(2))
TENSORS = {"gate": GATE, "bias": BIAS}
ops = torch.ops.wancompile


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def linear(self, x):
    """An 8-bit linear of the stream's type."""
    q, scale = ops.quantize_per_token(torch.tanh(x), None, INT8)
    return ops.scaled_linear(q, scale, self.data, self.scale, self.bias, x.dtype)


def linear_in_fp32(self, x):
    """Its sum with a narrower stream is no value of the stream."""
    q, scale = ops.quantize_per_token(torch.tanh(x), None, INT8)
    return ops.scaled_linear(q, scale, self.data, self.scale, self.bias, torch.float32)


def gated(self, x):
    gate = wide(x).mean(1, keepdim=True) * self.gate
    return (wide(x) + linear(self, x) * gate).type_as(x)


def gated_first(self, x):
    gate = wide(x).mean(1, keepdim=True) * self.gate
    return (gate * linear(self, x) + wide(x)).type_as(x)


def per_channel(self, x):
    return (wide(x) + linear(self, x) * self.gate).type_as(x)


def plain(self, x):
    return x + linear(self, x)


def plain_first(self, x):
    return linear(self, x) + x


def program(fn, dtype=torch.float32):
    """A FUSED program in which nothing is fused yet; the weight is int8 from the start."""
    weight = quantize_weight(WEIGHT, INT8)
    stored = {name: one.to(dtype) for name, one in TENSORS.items()}
    return called_fused(fn, X.to(dtype), data=weight.data, scale=weight.scale, **stored)


GATED = [gated, gated_first, per_channel]
UNGATED = [plain, plain_first]


def test_a_gated_sum_is_the_linears_own(golden):
    after = run_pass(program(gated, BF16), FuseLinearResidual())
    golden(after.print("canonical"))


@pytest.mark.parametrize("fn", [*GATED, *UNGATED])
def test_every_spelling_is_fused(fn):
    after = run_pass(program(fn, BF16), FuseLinearResidual())
    assert counts(after)["scaled_linear_residual"] == 1
    assert not {"scaled_linear", "add"} & set(counts(after))
    *_, residual, gate = calls(after, "scaled_linear_residual")[0]
    assert residual.op == "placeholder"
    assert (gate is None) == (fn in UNGATED)


@pytest.mark.parametrize("fn", [*GATED, *UNGATED])
def test_fp32_moves_by_rounding_alone(fn):
    before = program(fn)
    after = run_pass(before, FuseLinearResidual())
    torch.testing.assert_close(after(x=X), before(x=X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fn", [*GATED, *UNGATED])
def test_one_rounding_less_is_nearer_to_the_same_sum_in_fp64(fn):
    before = program(fn, BF16)
    after = run_pass(before, FuseLinearResidual())
    x = X.to(BF16)
    q, scale = ops.quantize_per_token(torch.tanh(x), None, INT8)
    weight = quantize_weight(WEIGHT, INT8)
    bias, vector = (one.to(BF16).double() for one in (BIAS, GATE))
    branch = (q.double() * scale) @ weight.dequantize().double().t() + bias
    gate = {gated: x.double().mean(1, keepdim=True) * vector, per_channel: vector}
    gate[gated_first] = gate[gated]
    exact = x.double() + branch * gate.get(fn, 1.0)
    ours, theirs = (relative_error(one(x=x), exact) for one in (after, before))
    assert ours < 3e-3
    assert ours < theirs


def test_the_sum_has_readers_before_and_after():
    def fn(self, x):
        total = plain(self, x)
        return wide(total).mean(1), total, torch.tanh(total)

    before = program(fn, BF16)
    after = run_pass(before, FuseLinearResidual())
    assert counts(after)["scaled_linear_residual"] == 1
    for one, other in zip(after(x=X.to(BF16)), before(x=X.to(BF16)), strict=True):
        assert relative_error(one, other) < 1e-2


def test_the_sum_of_the_last_linear_and_another_is_no_residual_of_the_first():
    def fn(self, x):
        return linear(self, x) + linear(self, torch.tanh(x))

    after = run_pass(program(fn), FuseLinearResidual())
    assert counts(after)["scaled_linear_residual"] == 1
    assert counts(after)["scaled_linear"] == 1


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (
            lambda self, x: (wide(x) + linear(self, x) * (wide(x).flip(2) * self.gate)).type_as(x),
            "its gate has a row per token",
        ),
        (
            lambda self, x: (x + (y := linear(self, x)), torch.tanh(y)),
            "something else reads its output",
        ),
    ],
    ids=["gate per token", "another reader"],
)
def test_what_cannot_be_fused_says_why(fn, reason):
    before = program(fn, BF16)
    after = run_pass(before, FuseLinearResidual())
    assert skips(after) == [reason]
    assert after.print() == before.print()


@pytest.mark.parametrize(
    "fn",
    [
        lambda self, x: torch.add(x, linear(self, x), alpha=0.5),
        lambda self, x: linear(self, x) + self.gate,
        lambda self, x: linear(self, x) + x[:, :1],
        lambda self, x: x - linear(self, x),
        lambda self, x: x.float() + linear(self, x),
        lambda self, x: x + torch.tanh(linear(self, x)),
        lambda self, x: linear_in_fp32(self, x) + x,
    ],
    ids=["alpha", "a vector", "a row", "a difference", "a wider sum", "a function", "narrower"],
)
def test_other_sums_are_left_alone(fn):
    before = program(fn, BF16)
    after = run_pass(before, FuseLinearResidual())
    assert not after.records[-1].done
    assert after.print() == before.print()


# Lowering -----------------------------------------------------------------------------------------


def test_a_cpu_keeps_the_op():
    after = pipeline.run(run_pass(program(plain), FuseLinearResidual()), [Lower(CPU)])
    assert counts(after)["scaled_linear_residual"] == 1


@pytest.mark.parametrize("fn", [gated, plain])
def test_where_only_the_linear_has_a_kernel_the_two_part(monkeypatch, fn):
    give(monkeypatch, (8, 9))
    fused = run_pass(program(fn, BF16), FuseLinearResidual())
    after = pipeline.run(fused, [Lower(CUDA)])
    found = counts(after)
    assert found["int8_linear_int_mm"] == found["add_gated_triton"] == 1
    assert "scaled_linear_residual" not in found
    (node,) = match.nodes_of(after.graph, torch.ops.wancompile_kernels.int8_linear_int_mm.default)
    assert match.val(node).dtype == BF16
