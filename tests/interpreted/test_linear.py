import pytest
import torch

from wancompile import ops
from wancompile.kernels.triton_linear import linear_triton
from wancompile.quant.numerics import FP8, INT8

SMALL = (1, 64, 32)
ODD = (127, 208, 272)  # no dim is a multiple of a tile's
MORE_TILES = (1170, 32, 272)  # more rows of tiles than a group has


def args(shape, dtype, bias=torch.bfloat16, out_dtype=torch.float32):
    m, k, n = shape
    x, w = torch.randn(m, k), torch.randn(n, k)
    x[:, ::7] *= 50
    x[-1] = 0
    q, w8 = (ops.quantize_per_token(t, None, dtype) for t in (x, w))
    return *q, *w8, None if bias is None else torch.randn(n).to(bias), out_dtype


@pytest.mark.parametrize("shape", [SMALL, ODD, MORE_TILES])
def test_int8_is_the_plain_body_bit_for_bit(shape):
    given = args(shape, INT8)
    assert torch.equal(linear_triton(*given), ops.scaled_linear(*given))


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_bias_and_output_is_the_plain_body_bit_for_bit(bias, out_dtype):
    given = args((5, 32, 48), INT8, bias, out_dtype)
    out = linear_triton(*given)
    assert out.dtype == out_dtype
    assert torch.equal(out, ops.scaled_linear(*given))


def test_int8_sums_do_not_overflow_and_are_not_rounded():
    x, w = torch.full((3, 2048), 127, dtype=INT8), torch.full((16, 2048), 127, dtype=INT8)
    x[1, 7] = 126
    one_x, one_w = torch.ones(3, 1), torch.ones(16, 1)
    out = linear_triton(x, one_x, w, one_w, None, torch.float32)
    exact = (x.long() @ w.long().t()).float()
    assert torch.equal(out, exact)
    assert exact[0, 0] != exact[1, 0]


@pytest.mark.parametrize("shape", [SMALL, ODD])
def test_fp8_is_near_float64(shape):
    x, xs, w, ws, bias, _ = given = args(shape, FP8)
    exact = (x.double() @ w.double().t()) * xs * ws.t() + bias
    bound = 1e-6 * ((x.double().abs() @ w.double().abs().t()) * xs * ws.t() + bias.abs())
    assert ((linear_triton(*given) - exact).abs() <= bound).all()


def test_leading_dims_and_strides_are_as_in_the_plain_body():
    x, xs, *rest = args((24, 64, 32), INT8)
    x, xs = x.view(4, 6, 64).transpose(0, 1), xs.view(4, 6, 1).transpose(0, 1)
    out = linear_triton(x, xs, *rest)
    assert out.is_contiguous()
    assert torch.equal(out, ops.scaled_linear(x, xs, *rest))


def test_a_persistent_program_computes_the_same():
    from wancompile.kernels.jit import linear

    x, xs, w, ws, bias, _ = given = args((130, 144, 272), INT8)
    out = torch.empty(130, 272)
    linear.launch(x, xs, w, ws, bias, out, linear.Tile(m=64, n=64, k=64, persistent=True))
    assert torch.equal(out, ops.scaled_linear(*given))


def test_an_address_that_is_no_multiple_of_16_is_copied():
    x, *rest = args((6, 64, 32), INT8)
    shifted = torch.empty(6 * 64 + 1, dtype=INT8)[1:].view(6, 64).copy_(x)
    assert shifted.data_ptr() % 16
    assert torch.equal(linear_triton(shifted, *rest), ops.scaled_linear(x, *rest))


def test_no_tokens_give_no_output():
    x, xs, *rest = args((3, 64, 32), INT8)
    assert linear_triton(x[:0], xs[:0], *rest).shape == (0, 32)
