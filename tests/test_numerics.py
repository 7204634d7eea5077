"""The reference arithmetic, against float64 and against what the number formats promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from wancompile.errors import InputError, NumericsError
from wancompile.quant import numerics
from wancompile.quant.numerics import (
    FP8,
    INT8,
    QMAX,
    SMALLEST_SCALE,
    QTensor,
    absmax,
    absmax_scale,
    decode,
    quantize,
    quantize_weight,
)

DTYPES = [INT8, FP8]

MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


def round_trip(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = absmax_scale(x, -1, dtype)
    return quantize(x, scale, dtype).double() * scale.double(), scale.double()


@given(MATRICES)
@settings(deadline=None)
def test_int8_is_off_by_half_a_step_at_most(values):
    x = torch.from_numpy(values)
    back, scale = round_trip(x, INT8)
    # x / scale is itself rounded to fp32, which may move a value across a tie.
    assert ((back - x.double()).abs() <= 0.5 * scale * (1 + 1e-4)).all()


@given(MATRICES)
@settings(deadline=None)
def test_e4m3_is_off_by_a_sixteenth_at_most_among_normals(values):
    x = torch.from_numpy(values)
    back, scale = round_trip(x, FP8)
    half_step = torch.maximum(x.double().abs() * 2.0**-4, scale * 2.0**-10)  # normals, subnormals
    assert ((back - x.double()).abs() <= half_step * (1 + 1e-4)).all()


@given(MATRICES, st.sampled_from(DTYPES))
@settings(deadline=None)
def test_the_largest_value_of_a_row_uses_the_whole_range(values, dtype):
    x = torch.from_numpy(values) + 1.0
    q = quantize(x, absmax_scale(x, -1, dtype), dtype).float()
    nonzero = x.abs().amax(-1) > 1e-30
    assert (q.abs().amax(-1)[nonzero] == QMAX[dtype]).all()


@given(MATRICES, st.sampled_from(DTYPES), st.integers(-20, 20))
@settings(deadline=None)
def test_scaling_by_a_power_of_two_changes_the_scale_only(values, dtype, exponent):
    x = torch.from_numpy(values).clamp(-1e20, 1e20)
    x = torch.where(x.abs() < 1e-10, 0.0, x)
    one, two = absmax_scale(x, -1, dtype), absmax_scale(x * 2.0**exponent, -1, dtype)
    q = quantize(x, one, dtype).float()
    assert torch.equal(q, quantize(x * 2.0**exponent, two, dtype).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scale_is_amax_over_qmax_in_fp32(dtype, source):
    x = torch.randn(5, 7).to(source)
    scale = absmax_scale(x, -1, dtype)
    expected = x.double().abs().amax(-1, keepdim=True) / QMAX[dtype]
    assert scale.dtype == torch.float32
    assert scale.shape == (5, 1)
    torch.testing.assert_close(scale.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-41])
def test_rows_too_small_for_a_scale_come_back_as_nothing(dtype, value):
    x = torch.full((2, 3), value)
    scale = absmax_scale(x, -1, dtype)
    back = QTensor(quantize(x, scale, dtype), scale).dequantize()
    assert (scale == SMALLEST_SCALE).all()
    assert ((back - x).abs() <= scale).all()
    assert torch.isfinite(back).all()


def test_int8_rounds_half_to_even_and_leaves_minus_128_out():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.6, -1e9, 1e9, torch.inf])
    expected = [0, 2, 2, 0, -2, 126, -127, -127, 127, 127]
    assert quantize(x, torch.tensor([1.0]), INT8).tolist() == expected


def test_e4m3_saturates_rounds_half_to_even_and_keeps_nan():
    x = torch.tensor([447.0, 465.0, -1e9, torch.inf, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, torch.nan])
    q = quantize(x, torch.tensor([1.0]), FP8).float()
    assert q[:-1].tolist() == [448.0, 448.0, -448.0, 448.0, 16.0, 20.0, 0.0, 2.0**-8]
    assert q[-1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_visible_through_a_dynamic_scale(dtype, broken):
    x = torch.ones(2, 4)
    x[1, 2] = broken
    back, _ = round_trip(x, dtype)
    assert torch.isfinite(back[0]).all()
    assert not torch.isfinite(back[1]).all()


def test_absmax_propagates_nan_and_keeps_dims():
    x = torch.tensor([[1.0, -3.0], [torch.nan, 2.0]])
    assert absmax(x, 1)[0] == 3.0
    assert absmax(x, 1)[1].isnan()
    assert absmax(x, (0, 1), keepdim=True).shape == (1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_is_quantized_alike_in_one_chunk_or_many(dtype, monkeypatch):
    weight = torch.randn(13, 7, dtype=torch.bfloat16) * torch.logspace(-3, 3, 13)[:, None]
    whole = quantize_weight(weight, dtype)
    monkeypatch.setattr(numerics, "_CHUNK_ELEMENTS", 20)
    parts = quantize_weight(weight.t().contiguous().t(), dtype)
    assert torch.equal(whole.data.float(), parts.data.float())
    assert torch.equal(whole.scale, parts.scale)
    assert parts.data.is_contiguous()
    assert whole.nbytes == 13 * 7 + 13 * 4
    step = {INT8: 0.5 * whole.scale, FP8: weight.float().abs() / 16 + whole.scale / 1024}[dtype]
    assert ((whole.dequantize() - weight.float()).abs() <= step * 1.001).all()


def test_weight_must_be_a_finite_matrix():
    with pytest.raises(NumericsError, match="NaN or infinity"):
        quantize_weight(torch.tensor([[1.0, torch.nan]]), INT8)
    with pytest.raises(NumericsError, match="NaN or infinity"):
        quantize_weight(torch.tensor([[1.0, torch.inf]]), FP8)
    with pytest.raises(InputError, match="two dims"):
        quantize_weight(torch.ones(3), INT8)
    with pytest.raises(InputError, match="8-bit types"):
        quantize_weight(torch.ones(3, 3), torch.int16)


def test_weight_on_the_meta_device_gives_shapes():
    q = quantize_weight(torch.empty(6, 4, device="meta", dtype=torch.bfloat16), FP8)
    assert (q.data.shape, q.data.dtype, q.scale.shape) == ((6, 4), FP8, (6, 1))


def test_decode_knows_every_code():
    codes = torch.arange(256, dtype=torch.uint8)
    e4m3 = codes.view(FP8).reshape(16, 16).t()
    torch.testing.assert_close(decode(e4m3), e4m3.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(decode(codes.view(INT8)), codes.view(INT8).float())
