import pytest
import torch
import torch.nn.functional as F

from wancompile import ops
from wancompile.kernels.triton_linear import linear_triton
from wancompile.kernels.triton_linear_gelu import linear_gelu_quantize_triton
from wancompile.quant.numerics import FP8, INT8, QMAX

DTYPES = [INT8, FP8]
FORMS = ["none", "tanh"]
SMALL = (1, 64, 32)
ODD = (127, 208, 272)  # no dim is a multiple of a tile's


def args(shape, dtype, form="tanh", bias=torch.bfloat16, smooth=True, one_scale=False, reach=1.0):
    """Arguments of the op; its scale holds `reach` times the largest value."""
    m, k, n = shape
    x, w = torch.randn(m, k), torch.randn(n, k) / k**0.5
    x[:, ::7] *= 20
    q, scale = ops.quantize_per_token(x, None, dtype)
    if one_scale:
        scale = scale.amax().reshape(1)
        q = ops.quantize_per_tensor(x, None, scale, dtype)
    linear = q, scale, *ops.quantize_per_token(w, None, dtype)
    b = None if bias is None else torch.randn(n).to(bias)
    inverse = torch.rand(n) + 0.5 if smooth else None
    top = exact(*linear, b, form, inverse).abs().max().float()
    return *linear, b, form, inverse, (reach * top / QMAX[dtype]).reshape(1), dtype


def exact(x, x_scale, w, w_scale, bias, form, inverse):
    y = (x.double() @ w.double().t()) * x_scale.double() * w_scale.double().t()
    y = F.gelu(y if bias is None else y + bias.double(), approximate=form)
    return y if inverse is None else y * inverse.double()


def assert_alike(ours, plain):
    """Only what lies between two 8-bit numbers may fall on either side."""
    assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
    step = 1 if plain.dtype == INT8 else plain.float().abs() / 8 + 2**-9
    difference = (ours.float() - plain.float()).abs()
    assert (difference <= step).all()
    assert (difference > 0).float().mean() < 1e-3 + 2 / difference.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [SMALL, ODD])
def test_it_is_the_plain_body(dtype, form, shape):
    given = args(shape, dtype, form)
    assert_alike(linear_gelu_quantize_triton(*given), ops.linear_gelu_quantize(*given))


@pytest.mark.parametrize("bias", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("one_scale", [False, True])
def test_every_bias_and_either_scale(bias, one_scale):
    given = args((5, 32, 48), INT8, bias=bias, smooth=False, one_scale=one_scale)
    assert_alike(linear_gelu_quantize_triton(*given), ops.linear_gelu_quantize(*given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_near_float64_and_saturates(dtype, form):
    given = args((40, 64, 48), dtype, form, reach=0.5)
    *_, scale, _ = given
    out, wanted = linear_gelu_quantize_triton(*given), exact(*given[:-2])
    top = QMAX[dtype] * scale.double()
    assert (wanted.abs() > top).any()
    assert out.float().abs().max() == QMAX[dtype]
    wanted = wanted.clamp(-top, top)
    step = 0.5 * scale if dtype == INT8 else wanted.abs() / 16 + scale / 1024
    assert ((out.double() * scale - wanted).abs() <= step * 1.001 + 1e-6 * (1 + wanted.abs())).all()


def test_leading_dims_and_strides_are_as_in_the_plain_body():
    x, xs, *rest = args((24, 64, 32), INT8)
    x, xs = x.view(4, 6, 64).transpose(0, 1), xs.view(4, 6, 1).transpose(0, 1)
    out = linear_gelu_quantize_triton(x, xs, *rest)
    assert out.is_contiguous()
    assert_alike(out, ops.linear_gelu_quantize(x, xs, *rest))
    assert linear_gelu_quantize_triton(x[:0], xs[:0], *rest).shape == (0, 4, 32)


def test_a_linear_reads_one_scale_for_all_tokens():
    x, scale, w, w_scale, bias, *_ = args(ODD, INT8, one_scale=True)
    linear = w, w_scale, bias, torch.float32
    out = linear_triton(x, scale, *linear)
    assert torch.equal(out, ops.scaled_linear(x, scale.expand(127, 1).contiguous(), *linear))
    assert torch.equal(out, ops.scaled_linear(x, scale, *linear))
