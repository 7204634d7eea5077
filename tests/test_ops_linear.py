"""Rounding to 8 bits and linears of what is rounded, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_args import DTYPES, gelu_args, half_step, linear_args, random_8bit, residual_args

from wancompile import ops
from wancompile.errors import InputError
from wancompile.ops import linear
from wancompile.quant.numerics import FP8, INT8, QMAX

SHAPES = [(1, 7, 3), (1, 1, 1), (2, 1, 4), (2, 16, 8), (33, 40, 24), (5, 2100, 9)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32])
def test_quantize_per_token_gives_back_the_smoothed_input(dtype, source):
    x = torch.randn(2, 5, 33).to(source)
    x[:, :, 4] *= 50
    x[1, 3] = 0
    inv_smooth = torch.rand(33) + 0.1
    q, scale = ops.quantize_per_token(x, inv_smooth, dtype)
    smoothed = x.double() * inv_smooth.double()
    torch.testing.assert_close(
        scale[x.any(-1)].double(),
        smoothed.abs().amax(-1, keepdim=True)[x.any(-1)] / QMAX[dtype],
        rtol=1e-6,
        atol=0,
    )
    half_step = {INT8: 0.5 * scale, FP8: smoothed.abs() / 16 + scale / 1024}[dtype]
    assert ((q.double() * scale.double() - smoothed).abs() <= half_step * 1.001).all()
    assert (q.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (2, 5, 1))


def test_quantize_per_head_saturates():
    x = torch.tensor([1.0, -2.0, 1e6]).expand(1, 2, 1, 3)
    q = ops.quantize_per_head(x, torch.tensor([1.0, 0.5]), INT8)
    assert q[0, :, 0].tolist() == [[1, -2, 127], [2, -4, 127]]
    q = ops.quantize_per_head(x, torch.tensor([1.0, 0.5]), FP8)
    assert q[0, :, 0].float().tolist() == [[1, -2, 448], [2, -4, 448]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_scaled_linear_is_the_float64_linear(dtype, shape, bias):
    x, x_scale, w, w_scale, b, _ = args = linear_args(*shape, dtype, bias)
    expected = (x.double() * x_scale) @ (w.double() * w_scale).t()
    size = (x.double() * x_scale).abs() @ (w.double() * w_scale).abs().t() + 1
    expected = expected if b is None else expected + b
    out = ops.scaled_linear(*args)
    assert ((out - expected).abs() <= size * 1e-5).all()
    assert ops.scaled_linear(*args[:-1], torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_scale_for_all_tokens_is_that_of_each(dtype):
    for args in (linear_args(5, 7, 3, dtype), linear_args(0, 7, 3, dtype)):
        x, _, *rest = args
        each = torch.full((len(x), 1), 0.25)
        out = ops.scaled_linear(x, torch.tensor([0.25]), *rest)
        assert torch.equal(out, ops.scaled_linear(x, each, *rest))
    x, _, *rest = residual_args(dtype)
    out = ops.scaled_linear_residual(x, torch.tensor([0.25]), *rest)
    assert torch.equal(out, ops.scaled_linear_residual(x, torch.full((2, 3, 1), 0.25), *rest))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 8, 4), (64, 4096, 16)])
def test_int8_accumulates_exactly(shape, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(linear, "_int_mm_is_exact", lambda: False)
    m, k, n = shape
    for x, w in [
        (random_8bit(m, k, dtype=INT8), random_8bit(n, k, dtype=INT8)),
        (torch.full((m, k), 127, dtype=INT8), torch.full((n, k), 127, dtype=INT8)),
        (torch.full((m, k), 127, dtype=INT8), torch.full((n, k), -127, dtype=INT8)),
    ]:
        out = linear.int8_matmul(x, w)
        assert out.dtype == torch.int32
        assert torch.equal(out.long(), x.long() @ w.long().t())


def test_scaled_linear_takes_any_leading_dims_and_strides():
    x, x_scale, w, w_scale, b, out_dtype = linear_args(12, 7, 5, INT8)
    flat = ops.scaled_linear(x, x_scale, w, w_scale, b, out_dtype)
    strided = x.reshape(4, 3, 7).transpose(0, 1), x_scale.reshape(4, 3, 1).transpose(0, 1)
    out = ops.scaled_linear(*strided, w.t().contiguous().t(), w_scale, b, out_dtype)
    assert torch.equal(out.transpose(0, 1), flat.reshape(4, 3, 5))
    assert out.is_contiguous()


def test_scaled_linear_shows_nan():
    x, x_scale, w, w_scale, b, out_dtype = linear_args(3, 8, 8, FP8)
    x_scale[1] = torch.nan
    out = ops.scaled_linear(x, x_scale, w, w_scale, b, out_dtype)
    assert out.isnan().all(1).tolist() == [False, True, False]


@given(m=st.integers(1, 40), k=st.integers(1, 70), n=st.integers(1, 20))
@settings(deadline=None, max_examples=30)
def test_int8_linear_error_is_bounded_by_the_steps(m, k, n):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m * k * n))
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(k))
    (q, qs), (p, ps) = (ops.quantize_per_token(t, None, INT8) for t in (x, w))
    out = ops.scaled_linear(q, qs, p, ps, None, torch.float32)
    dx, dw = qs / 2, ps / 2
    bound = dx * w.abs().sum(1) + x.abs().sum(1, keepdim=True) * dw.t() + k * dx * dw.t()
    assert ((out - x @ w.t()).abs() <= bound * 1.001 + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_quantize_per_tensor_gives_back_what_lies_within(dtype, source):
    x, smooth = torch.randn(3, 5, 40).to(source) * 3, torch.rand(40) + 0.5
    scale = torch.tensor([4.0 / QMAX[dtype]])
    q = ops.quantize_per_tensor(x, smooth, scale, dtype)
    exact = (x.double() * smooth).clamp(-4, 4)
    assert ((x.double() * smooth).abs() > 4).any()
    assert ((q.double() * scale - exact).abs() <= half_step(exact, scale, dtype)).all()
    assert q.float().abs().max() == QMAX[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("smooth", [True, False])
def test_linear_gelu_quantize_is_float64_and_saturates(dtype, approximate, smooth):
    x, x_scale, w, w_scale, bias, _, inverse, scale, _ = args = gelu_args(
        dtype, approximate, smooth
    )
    y = (x.double() * x_scale) @ (w.double() * w_scale).t() + bias
    y = torch.nn.functional.gelu(y, approximate=approximate)
    y = y if inverse is None else y * inverse
    top = QMAX[dtype] * scale.double()
    exact = y.clamp(-top, top)
    assert (y > top).any()
    q = ops.linear_gelu_quantize(*args)
    assert ((q.double() * scale - exact).abs() <= half_step(exact, scale, dtype)).all()
    with pytest.raises(InputError, match="not 'sigmoid'"):
        ops.linear_gelu_quantize(*args[:5], "sigmoid", *args[6:])


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("gate", [None, (5,), (2, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_linear_residual_adds_a_gated_linear(kind, gate, dtype):
    x, x_scale, w, w_scale, bias, residual, opening = args = residual_args(kind, gate, dtype)
    branch = (x.double() * x_scale) @ (w.double() * w_scale).t() + bias
    exact = residual.double() + (branch if opening is None else branch * opening)
    out = ops.scaled_linear_residual(*args)
    size = branch.abs() + residual.abs() + 1
    assert out.dtype == dtype
    assert ((out - exact).abs() <= size * 1e-5 + exact.abs() * torch.finfo(dtype).eps).all()


def test_scaled_linear_residual_refuses_a_gate_per_token():
    with pytest.raises(InputError, match=r"gate float\[N\] or \[B, 1, N\] or None"):
        ops.scaled_linear_residual(*residual_args(INT8, (2, 3, 5)))
