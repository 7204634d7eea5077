import pytest
import torch

from wancompile import ops
from wancompile.kernels.triton_quantize import (
    quantize_per_head_triton,
    quantize_per_tensor_triton,
    quantize_per_token_triton,
)
from wancompile.quant.numerics import FP8, INT8, SMALLEST_SCALE

DTYPES = [INT8, FP8]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def bits(x):
    return x.view(torch.uint8)


def outliers(*shape, dtype=torch.float32):
    x = torch.randn(shape)
    x[..., ::5] *= 100
    x[-1] = 0
    return x.to(dtype)


def same(ours, theirs):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (11, 1536), (3, 13824), (2, 5, 100), (4, 1)])
@pytest.mark.parametrize("smooth", [True, False])
def test_per_token_is_the_plain_body_bit_for_bit(dtype, shape, smooth):
    inv_smooth = torch.rand(shape[-1]) + 0.1 if smooth else None
    args = outliers(*shape), inv_smooth, dtype
    assert same(quantize_per_token_triton(*args), ops.quantize_per_token(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float_dtype", FLOATS)
def test_per_token_takes_every_float(dtype, float_dtype):
    args = outliers(9, 48, dtype=float_dtype), torch.rand(48) + 0.1, dtype
    assert same(quantize_per_token_triton(*args), ops.quantize_per_token(*args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_even(dtype):
    x = torch.arange(-254, 255).float()[None] / 2
    args = x, None, dtype
    ours = quantize_per_token_triton(*args)
    assert same(ours, ops.quantize_per_token(*args))
    if dtype == INT8:  # the scale is 1: -0.5, 0, 0.5, 1, 1.5, 2, 2.5
        assert ours[0][0, 253:260].tolist() == [0, 0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_scale_are_as_in_the_plain_body(dtype):
    tiny, nan, inf = torch.finfo(torch.float32).tiny, torch.nan, torch.inf
    x = torch.tensor([[0.0, -0.0, 0, 0], [tiny / 8, 0, 0, tiny], [nan, 1, 2, 3], [inf, -inf, 1, 0]])
    q, scale = quantize_per_token_triton(x, None, dtype)
    q_plain, scale_plain = ops.quantize_per_token(x, None, dtype)
    torch.testing.assert_close(scale, scale_plain, rtol=0, atol=0, equal_nan=True)
    assert scale[0] == SMALLEST_SCALE
    assert scale[2].isnan()
    if dtype == FP8:  # what int8 holds where there was a NaN is unspecified
        torch.testing.assert_close(q.float(), q_plain.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(q[:2].float(), q_plain[:2].float())


def test_per_token_reads_a_slice_in_place():
    x = outliers(6, 40)[:, 4:36]
    args = x, None, INT8
    assert same(quantize_per_token_triton(*args), ops.quantize_per_token(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 3, 127, 128), (1, 2, 65, 40)])
@pytest.mark.parametrize("float_dtype", [torch.bfloat16, torch.float32])
def test_per_head_is_the_plain_body_bit_for_bit(dtype, shape, float_dtype):
    batch, heads, tokens, channels = shape
    x = outliers(batch, tokens, heads, channels, dtype=float_dtype).transpose(1, 2)
    scale = torch.rand(heads) / 20 + 0.01  # small enough that outliers saturate
    ours = quantize_per_head_triton(x, scale, dtype)
    assert ours.is_contiguous()
    assert same([ours], [ops.quantize_per_head(x, scale, dtype)])


def test_fp8_shows_nan_and_saturates_infinity():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).view(1, 1, 1, 4)
    q = quantize_per_head_triton(x, torch.ones(1), FP8).float().flatten()
    assert q[0].isnan()
    assert q[1:].tolist() == [448, -448, 448]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_give_no_output(dtype):
    q, scale = quantize_per_token_triton(torch.empty(0, 8), None, dtype)
    assert (q.shape, scale.shape) == ((0, 8), (0, 1))
    assert quantize_per_head_triton(torch.empty(1, 2, 0, 8), torch.ones(2), dtype).shape[2] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 13824), (2, 5, 100)])
@pytest.mark.parametrize("smooth", [True, False])
def test_per_tensor_is_the_plain_body_bit_for_bit(dtype, shape, smooth):
    inv_smooth = torch.rand(shape[-1]) + 0.1 if smooth else None
    x = outliers(*shape)
    scale = (x.abs().max() / 1000).clamp(1e-3).reshape(1)  # some values saturate
    out = quantize_per_tensor_triton(x, inv_smooth, scale, dtype)
    assert same([out], [ops.quantize_per_tensor(x, inv_smooth, scale, dtype)])
    assert quantize_per_tensor_triton(x[:0], None, scale, dtype).shape == (0, *shape[1:])
