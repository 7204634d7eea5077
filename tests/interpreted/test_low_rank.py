"""In fp16 and fp32: the interpreter has no products of bf16, which tests/gpu has."""

import pytest
import torch

from wancompile import ops
from wancompile.kernels.triton_low_rank import linear_low_rank_triton, low_rank_down_triton
from wancompile.quant.numerics import FP8, INT8

SHAPES = [(1, 32, 32, 16), (70, 208, 272, 96)]  # M, K, N, R


def args(shape, dtype, kind, bias=True, out_dtype=torch.float32):
    m, k, n, r = shape
    x, w = torch.randn(m, k), torch.randn(n, k) / k**0.5
    q, w8 = (ops.quantize_per_token(one, None, dtype) for one in (x, w))
    low, up = torch.randn(m, r).to(kind), torch.randn(n, r).to(kind)
    return *q, *w8, torch.randn(n) if bias else None, low, up, out_dtype


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_down_is_near_float64(shape, dtype, kind):
    m, k, _, r = shape
    q, scale = ops.quantize_per_token(torch.randn(m, k), None, dtype)
    down = torch.randn(r, k).to(kind)
    out = low_rank_down_triton(q, scale, down)
    exact = (q.double() * scale) @ down.double().t()
    size = (q.double().abs() * scale) @ down.double().abs().t()
    rounding = torch.finfo(kind).eps
    assert out.dtype == kind
    assert ((out - exact).abs() <= 1e-6 * size + rounding * exact.abs()).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_linear_with_a_low_rank_is_near_float64(shape, dtype, kind):
    x, xs, w, ws, bias, low, up, out_dtype = given = args(shape, dtype, kind)
    parts = (x.double() * xs, (w.double() * ws).t()), (low.double(), up.double().t())
    exact = sum(left @ right for left, right in parts) + bias
    size = sum(left.abs() @ right.abs() for left, right in parts) + bias.abs()
    out = linear_low_rank_triton(*given)
    assert out.dtype == out_dtype
    assert ((out - exact).abs() <= 2e-6 * size).all()


def test_a_low_rank_of_zeros_changes_no_bit():
    x, xs, w, ws, bias, low, up, _ = args(SHAPES[1], INT8, torch.float16)
    out = linear_low_rank_triton(x, xs, w, ws, bias, low, 0 * up, torch.bfloat16)
    assert torch.equal(out, ops.scaled_linear(x, xs, w, ws, bias, torch.bfloat16))


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_one_scale_for_all_tokens_is_that_scale_for_each(dtype):
    x, xs, *rest = args((70, 48, 32, 16), dtype, torch.float32)
    down = torch.randn(16, 48)
    one, each = xs[0], xs[:1].expand_as(xs)
    assert torch.equal(
        linear_low_rank_triton(x, one, *rest), linear_low_rank_triton(x, each, *rest)
    )
    ours, theirs = (low_rank_down_triton(x, scale, down) for scale in (one, each))
    assert torch.equal(ours, theirs)


def test_leading_dims_and_no_tokens():
    q, xs, w, ws, _, low, up, dtype = args((6, 32, 48, 16), INT8, torch.float32, bias=False)
    cut = q.view(2, 3, 32), xs.view(2, 3, 1), w, ws, None, low.view(2, 3, 16), up, dtype
    assert linear_low_rank_triton(*cut).shape == (2, 3, 48)
    down = torch.randn(16, 32)
    assert torch.allclose(
        low_rank_down_triton(*cut[:2], down), ops.low_rank_down(*cut[:2], down), rtol=1e-5
    )
    assert low_rank_down_triton(q[:0], xs[:0], down).shape == (0, 16)
