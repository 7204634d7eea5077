"""The choice among ways to round a weight, on data made so that the best one is known."""

from __future__ import annotations

import pytest
import torch

from wancompile.errors import NumericsError
from wancompile.quant.numerics import FP8, INT8, quantize_weight
from wancompile.quant.rounding import FEWEST, choose_rounding

DTYPES = [INT8, FP8]


def data(tokens: int = 256, k: int = 64, n: int = 96, rank: int = 6):
    x = torch.randn(tokens, rank) @ torch.randn(rank, k) + 0.05 * torch.randn(tokens, k)
    return torch.randn(n, k), x


def error(weight, q, x, dtype):
    """Relative error of the product when inputs are rounded, too, in fp64."""
    exact = x.double() @ weight.double().T
    seen = quantize_weight(x, dtype)
    x_back, w_back = (one.data.double() * one.scale.double() for one in (seen, q))
    return float((x_back @ w_back.T - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gptq_wins_on_correlated_inputs_and_errors_are_those_of_held_out_tokens(dtype):
    weight, x = data()
    found = choose_rounding(weight, x, dtype, clip=False, gptq=True)
    nearest = quantize_weight(weight, dtype)
    assert found.how.gptq
    assert found.how.gptq_refusal == ""
    assert found.how.error == found.how.error_gptq < 0.9 * found.how.error_nearest
    assert found.how.error_clipped is None
    held_out = x[1::2]
    for q, told in ((nearest, found.how.error_nearest), (found.weight, found.how.error_gptq)):
        assert told == pytest.approx(error(weight, q, held_out, dtype), rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_learned_by_heart_is_refused(dtype):
    """Each token lives in channels of its own, so none says anything of another."""
    weight = torch.randn(32, 64)
    x = torch.zeros(16, 64)
    for token in range(16):
        x[token, 4 * token : 4 * token + 4] = torch.randn(4)
    found = choose_rounding(weight, x, dtype, clip=True, gptq=True)
    assert not found.how.gptq
    assert found.how.gptq_refusal
    assert found.how.error == found.how.error_nearest
    assert torch.equal(found.weight.data.float(), quantize_weight(weight, dtype).data.float())


def test_uncorrelated_inputs_keep_nearest():
    weight, x = torch.randn(32, 16), torch.eye(16).repeat(2, 1) * torch.arange(1, 33)[:, None]
    found = choose_rounding(weight, x, INT8, clip=False, gptq=True)
    assert not found.how.gptq
    assert found.how.error_gptq == found.how.error_nearest
    assert found.how.gptq_refusal == "does not lower the calibrated error"
    assert torch.equal(found.weight.data, quantize_weight(weight, INT8).data)


def exact_tokens(count: int, k: int):
    """Inputs that int8 holds exactly, so that only the weight's errors count."""
    return torch.randint(-1, 2, (count, k)).float()


def spiky():
    """Weights with one large column, and inputs that never need it."""
    weight, x = torch.rand(64, 32) * 2 - 1, exact_tokens(128, 32)
    weight[:, 5], x[:, 5] = 1.45, 0
    return weight, x


def test_ranges_are_clipped_where_that_wins():
    weight, x = spiky()
    found = choose_rounding(weight, x, INT8, clip=True, gptq=False)
    assert found.how.clipped
    assert found.how.ratio < 1
    assert found.how.error == found.how.error_clipped < found.how.error_nearest
    assert found.how.error_gptq is None


def test_gptq_takes_the_ranges_that_were_kept():
    weight, x = spiky()
    clipped = choose_rounding(weight, x, INT8, clip=True, gptq=False)
    both = choose_rounding(weight, x, INT8, clip=True, gptq=True)
    assert torch.equal(both.weight.scale, clipped.weight.scale)
    assert both.how.error <= clipped.how.error


def test_refused_clipping_leaves_ratio_and_scales():
    weight, x = torch.randn(16, 32).sign(), exact_tokens(32, 32)
    found = choose_rounding(weight, x, INT8, clip=True, gptq=False)
    assert not found.how.clipped
    assert found.how.ratio == 1
    assert found.how.clip_refusal
    assert torch.equal(found.weight.scale, quantize_weight(weight, INT8).scale)


def test_few_different_tokens_judge_nothing():
    weight, x = data()
    less = x[: FEWEST - 1].repeat(9, 1)
    assert choose_rounding(weight, less, INT8, clip=True, gptq=True) is None
    assert choose_rounding(weight, x[:0], INT8, clip=True, gptq=True) is None
    assert choose_rounding(weight, x[:FEWEST], INT8, clip=True, gptq=True) is not None


def test_broken_tokens_keep_nearest():
    weight, x = data()
    x[5, 3] = torch.nan
    found = choose_rounding(weight, x, INT8, clip=True, gptq=True)
    assert not found.how.gptq
    assert torch.equal(found.weight.data, quantize_weight(weight, INT8).data)


def test_a_broken_weight_is_an_error():
    weight, x = data()
    weight[0, 0] = torch.inf
    with pytest.raises(NumericsError):
        choose_rounding(weight, x, INT8, clip=True, gptq=True)
