"""`scaled_attention` all in 8 bits: q, k and v, against float64."""

import pytest
import torch
from op_args import DTYPES, attention_args, queries_scaled, random_8bit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from wancompile import ops
from wancompile.quant.numerics import FP8, INT8


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_attention_is_float64_attention_but_for_the_rounding_of_p(dtype, per_token):
    args = attention_args(dtype, sq=37, sk=300, d=16)
    args = queries_scaled(args) if per_token else args
    q, k, v, qs, ks, vs, scale, _ = args
    kf, vf = (t.double() * s.double()[:, None, None] for t, s in ((k, ks), (v, vs)))
    qf = q.double() * (qs if per_token else qs[:, None, None]).double()
    p = torch.softmax(qf @ kf.transpose(-1, -2) * scale, -1)
    error = (ops.scaled_attention(*args) - p @ vf).abs()
    rounding = 2.0**-4 * p + 2.0**-18 * p.amax(-1, keepdim=True)  # e4m3 of 256 p / max(p)
    assert (error <= 1.001 * rounding @ vf.abs() + 1e-5).all()


def test_scaled_attention_is_exact_where_p_is():
    q = torch.zeros(1, 1, 3, 8, dtype=INT8)
    v = random_8bit(1, 1, 6, 8, dtype=FP8)
    one = torch.ones(1)
    out = ops.scaled_attention(q, random_8bit(1, 1, 6, 8, dtype=INT8), v, one, one, one, 1.0,
                               torch.float32)  # fmt: skip
    torch.testing.assert_close(out, v.float().mean(2, keepdim=True).expand(1, 1, 3, 8))


def test_scaled_attention_shows_nan_and_is_laid_out_by_tokens():
    q, k, v, *rest = attention_args(FP8)
    v = v.clone()
    v[0, 0, 0, 0] = torch.nan
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = ops.scaled_attention(q, k, v, *rest)
    assert out.isnan().sum() == q.shape[2]
    assert out.transpose(1, 2).is_contiguous()


def test_attention_tokens_stay_dynamic():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in attention_args(FP8)]
    with mode:
        out = ops.scaled_attention(*args)
    assert (out.dtype, tuple(out.shape)) == (torch.float32, (2, 3, 5, 8))


@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32])
def test_scaled_attention_rounds_float_values(wide):
    q, k, v, qs, ks, vs, *rest = attention_args(INT8)
    floats = (torch.randn(v.shape) * vs[:, None, None] * 100).to(wide)
    rounded = ops.quantize_per_head(floats, vs, FP8)
    a = ops.scaled_attention(q, k, floats, qs, ks, vs, *rest)
    assert torch.equal(a, ops.scaled_attention(q, k, rounded, qs, ks, vs, *rest))
