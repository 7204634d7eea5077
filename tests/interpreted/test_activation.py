import pytest
import torch
import torch.nn.functional as F

from wancompile import ops
from wancompile.kernels.triton_activation import gelu_quantize_triton
from wancompile.quant.numerics import FP8, INT8

DTYPES = [INT8, FP8]


def values(*shape, dtype=torch.bfloat16):
    x = torch.randn(shape)
    x[..., ::5] *= 10
    x[-1] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(1, 16), (2, 8960), (2, 3, 300), (11, 100)])
def test_gelu_is_the_plain_body(dtype, approximate, shape):
    args = values(*shape), approximate, torch.rand(shape[-1]) + 0.5, dtype
    (q, scale), (q_plain, scale_plain) = gelu_quantize_triton(*args), ops.gelu_quantize(*args)
    torch.testing.assert_close(scale, scale_plain, rtol=1e-5, atol=1e-37)
    step = 1 if dtype == INT8 else q_plain.float().abs() / 8 + 2**-9
    difference = (q.float() - q_plain.float()).abs()
    assert (difference <= step).all()
    assert (difference > 0).float().mean() < 1e-3 + 2 / difference.numel()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_near_float64(approximate):
    x = torch.linspace(-12, 12, 2000).view(4, 500)
    q, scale = gelu_quantize_triton(x, approximate, None, INT8)
    exact = F.gelu(x.double(), approximate=approximate)
    assert ((q.double() * scale - exact).abs() <= 0.5001 * scale + 1e-7 * x.abs()).all()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_extreme_values_give_what_the_plain_body_gives(approximate):
    x = torch.tensor([[1e37, -1e37, 1, 0], [1e-38, -1e-38, 0, 0], [-60, -100, -1e4, -1e30]])
    for ours, plain in zip(
        gelu_quantize_triton(x, approximate, None, INT8),
        ops.gelu_quantize(x, approximate, None, INT8),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-37)


def test_nan_shows_in_the_scale_of_its_token_only():
    x = values(3, 40)
    x[1, 7] = torch.nan
    _, scale = gelu_quantize_triton(x, "tanh", None, INT8)
    assert scale.isnan().flatten().tolist() == [False, True, False]


def test_a_slice_is_read_in_place():
    x = values(3, 5, 120)
    args = "tanh", None, INT8
    ours = gelu_quantize_triton(x[..., 40:80], *args)
    for a, b in zip(ours, gelu_quantize_triton(x[..., 40:80].contiguous(), *args), strict=True):
        assert torch.equal(a, b)
    q, scale = gelu_quantize_triton(x[:, :0], *args)
    assert (q.shape, scale.shape) == ((3, 0, 120), (3, 0, 1))
