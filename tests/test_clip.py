"""Clipping ranges of output channels, against a search by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wancompile.quant import clip
from wancompile.quant.clip import RATIOS, clipping_ratios
from wancompile.quant.numerics import FP8, INT8, absmax, quantize_weight
from wancompile.quant.rounding import choose_rounding
from wancompile.quant.search import rounded

DTYPES = [INT8, FP8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ratio_of_one_is_rounding_to_nearest_bit_for_bit(dtype):
    weight = torch.randn(7, 33)
    whole = quantize_weight(weight, dtype)
    same = quantize_weight(weight, dtype, absmax(weight, 1, keepdim=True) * 1.0)
    assert torch.equal(whole.scale, same.scale)
    assert torch.equal(whole.data.float(), same.data.float())


@pytest.mark.parametrize("dtype", DTYPES)
@given(n=st.integers(1, 9), k=st.integers(1, 20), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_no_ratio_loses_less_than_the_one_taken(dtype, n, k, seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(n, k), torch.randn(16, k)
    seen = rounded(x, dtype)
    found = clipping_ratios(weight, x, seen, dtype)
    assert found.shape == (n, 1)
    amax = absmax(weight, 1, keepdim=True)

    def lost(ratios):
        actual = seen @ quantize_weight(weight, dtype, amax * ratios).dequantize().T
        return (actual - x @ weight.T).square().sum(0)

    least = lost(found)
    for ratio in RATIOS:
        assert (least <= lost(torch.full((n, 1), ratio)) * (1 + 1e-4) + 1e-9).all()


def test_int8_clips_what_stands_out_and_is_never_needed():
    """Steps a third smaller for all the weights whose inputs ever speak."""
    weight, x = torch.rand(64, 32) * 2 - 1, torch.randint(-1, 2, (128, 32)).float()
    weight[:, 5], x[:, 5] = 1.45, 0
    ratios = clipping_ratios(weight, x, x, INT8)
    amax = absmax(weight, 1, keepdim=True)
    whole, clipped = (quantize_weight(weight, INT8, amax * r) for r in (1.0, ratios))
    assert ratios.mean() < 0.75
    errors = [(x @ (q.dequantize() - weight).T).norm() for q in (whole, clipped)]
    assert errors[1] < 0.75 * errors[0]


def test_clipping_that_others_pay_for_is_refused():
    """What stands out is multiplied by 0 in the tokens that choose, by 1 in those that judge."""
    weight, x = torch.rand(64, 32) * 2 - 1, torch.randint(-1, 2, (128, 32)).float()
    weight[:, 5], x[0::2, 5], x[1::2, 5] = 1.45, 0, 1
    assert clipping_ratios(weight, x[0::2], x[0::2], INT8).mean() < 0.75
    found = choose_rounding(weight, x, INT8, clip=True, gptq=False)
    assert found.how.error_clipped > 5 * found.how.error_nearest
    assert not found.how.clipped
    assert found.how.error == found.how.error_nearest
    nearest = quantize_weight(weight, INT8)
    assert torch.equal(found.weight.data, nearest.data)
    assert torch.equal(found.weight.scale, nearest.scale)


def test_what_loses_nothing_is_not_clipped():
    weight = torch.randn(12, 8).sign()
    x = torch.randn(16, 8)
    assert (clipping_ratios(weight, x, x, INT8) == 1).all()


def test_output_channels_are_independent(monkeypatch):
    weight, x = torch.randn(10, 16), torch.randn(16, 16)
    whole = clipping_ratios(weight, x, rounded(x, INT8), INT8)
    monkeypatch.setattr(clip, "_ROWS_AT_ONCE", 3)
    assert torch.equal(clipping_ratios(weight, x, rounded(x, INT8), INT8), whole)
