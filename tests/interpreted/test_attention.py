import math

import pytest
import torch

from wancompile import ops
from wancompile.kernels.triton_attention import attention_triton
from wancompile.quant.numerics import FP8, INT8, absmax_scale

DTYPES = [INT8, FP8]


def args(dtype, sq, sk, d=64, batch=1, heads=2, out_dtype=torch.float32):
    q, k, v = (torch.randn(batch, heads, s, d) for s in (sq, sk, sk))
    k[..., 5] *= 10
    types = dtype, dtype, FP8
    scales = [
        absmax_scale(t, (0, 2, 3), to).flatten() for t, to in zip((q, k, v), types, strict=True)
    ]
    data = [
        ops.quantize_per_head(t, s, to) for t, s, to in zip((q, k, v), scales, types, strict=True)
    ]
    return *data, *scales, d**-0.5, out_dtype


def queries_scaled(given):
    """The same with a scale for each query, from 1/8 to 1 times as large."""
    q, k, v, q_scale, *rest = given
    own = torch.rand(*q.shape[:3], 1) * 0.875 + 0.125
    return q, k, v, own * q_scale[:, None, None], *rest


def exact(q, k, v, qs, ks, vs, scale, _):
    qs = qs if qs.dim() == 4 else qs[:, None, None]
    kf, vf = (t.double() * s.double()[:, None, None] for t, s in ((k, ks), (v, vs)))
    qf = q.double() * qs.double()
    p = torch.softmax(qf @ kf.transpose(-1, -2) * scale, -1)
    return p, vf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sq", "sk", "d", "batch"),
    [(1, 1, 64, 1), (1, 127, 64, 2), (127, 128, 128, 1), (65, 300, 64, 1), (64, 256, 64, 1)],
)
@pytest.mark.parametrize("per_token", [False, True])
def test_attention_is_float64_attention_but_for_the_rounding_of_p(
    dtype, sq, sk, d, batch, per_token
):
    given = args(dtype, sq, sk, d, batch)
    given = queries_scaled(given) if per_token else given
    p, v = exact(*given)
    out = attention_triton(*given)
    assert out.transpose(1, 2).is_contiguous()
    # e4m3 rounds 256 p / (maximum so far) by 2**-4 of it, small values by half of 2**-9.
    rounding = 2.0**-4 * p + 2.0**-18 * p.amax(-1, keepdim=True)
    assert ((out - p @ v).abs() <= 1.001 * rounding @ v.abs() + 1e-5).all()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_block_of_keys_is_the_plain_body(dtype, per_token):
    given = args(dtype, 70, 63)
    given = queries_scaled(given) if per_token else given
    out, plain = attention_triton(*given), ops.scaled_attention(*given)
    # exp and exp2 differ in last bits, so a few p fall to the other side of a tie.
    assert (out - plain).norm() / plain.norm() < 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_later_block_with_larger_logits_takes_over(dtype):
    q, k, *rest = args(dtype, 3, 200)
    k = (k.float() / 64).to(dtype)
    k[:, :, 150] = q[:, :, 0]
    given = q, k, *rest
    p, v = exact(*given)
    assert (p[..., 0, 150] > 0.9).all()
    error = attention_triton(*given) - p @ v
    assert error.norm() / (p @ v).norm() < 0.05


@pytest.mark.parametrize("tile", [(64, 128), (16, 32)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("factor", [0.01, 8.0])
@pytest.mark.parametrize("per_token", [False, True])
def test_every_tile_computes_the_same(tile, biased, factor, per_token):
    from wancompile.kernels.jit import attention

    given = args(INT8, 70, 150)
    q, k, v, *scales, _, dtype = queries_scaled(given) if per_token else given
    out = torch.empty(q.shape)
    one = attention.Tile(*tile, biased=biased)
    attention.launch(q, k, v, tuple(scales), factor, out, one)
    p, vf = exact(q, k, v, *scales, factor, dtype)
    rounding = 2.0**-4 * p + 2.0**-18 * p.amax(-1, keepdim=True)
    # The interpreter multiplies and adds in two steps, and rounds products at the size of the bias.
    rounding += p * 2e-3 * biased
    assert ((out - p @ vf).abs() <= 1.001 * rounding @ vf.abs() + 1e-5).all()


@pytest.mark.parametrize("step", [1e-4, 0.49, 0.51, 12.7, 15.3, 37.7])
def test_the_bias_changes_no_weight_however_large_a_step_of_the_logits_is(step):
    from wancompile.kernels.jit import attention

    q = torch.zeros(1, 1, 1, 64, dtype=INT8)
    k = torch.zeros(1, 1, 3, 64, dtype=INT8)
    q[..., 0], k[0, 0, :, 0] = 1, torch.tensor([3, 2, 3], dtype=INT8)
    v = torch.tensor([1.0, 2, 4])[:, None].expand(1, 1, 3, 64).to(FP8)
    one, out = torch.ones(1), torch.empty(q.shape)
    scale = step * math.log(2)
    attention.launch(q, k, v, (one, one, one), scale, out, attention.Tile(16, 32, biased=True))
    weights = torch.exp2(torch.tensor([0, -step, 0], dtype=torch.float64))
    expected = (weights * torch.tensor([1, 2, 4])).sum() / weights.sum()
    assert ((out - expected).abs() <= 2**-4 * expected).all()


@pytest.mark.parametrize("float_dtype", [torch.bfloat16, torch.float32])
def test_float_values_are_rounded_as_quantize_per_head_rounds_them(float_dtype):
    q, k, _, *scales, factor, dtype = args(FP8, 5, 200, 128, batch=2)
    merged = torch.randn(2, 200, 3, 2, 128).to(float_dtype)
    v = merged[:, :, 1].transpose(1, 2)
    scales[2] = torch.tensor([0.001, 1 / 256])  # small enough that values saturate
    rounded = ops.quantize_per_head(v, scales[2], FP8)
    out = attention_triton(q, k, v, *scales, factor, dtype)
    assert torch.equal(out, attention_triton(q, k, rounded, *scales, factor, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_is_rounded_at_the_end(dtype):
    given = args(INT8, 5, 9)
    wide = attention_triton(*given)
    assert torch.equal(attention_triton(*given[:-1], dtype), wide.to(dtype))


def test_strides_do_not_matter():
    q, k, v, *rest = args(INT8, 5, 9)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(attention_triton(*strided, *rest), attention_triton(q, k, v, *rest))


def test_nan_is_shown_where_it_reaches_and_nowhere_else():
    q, k, v, *rest = args(FP8, 66, 130, heads=3)
    v, q, k = v.clone(), q.clone(), k.clone()
    v[0, 0, 0, 7] = torch.nan
    q[0, 1, 65] = torch.nan
    k[0, 2, 0] = torch.nan  # right after the last key of head 1
    out = attention_triton(q, k, v, *rest)
    nan = out.isnan()
    assert torch.equal(nan, ops.scaled_attention(q, k, v, *rest).isnan())
    assert nan[0, 0].sum() == 66
    assert nan[0, 1].sum() == nan[0, 1, 65].sum() == 64
