import pytest
import torch
import torch.nn.functional as F

from wancompile import ops
from wancompile.kernels.triton_norm import (
    add_gated_triton,
    norm_quantize_triton,
    residual_norm_quantize_triton,
    rms_norm_triton,
)
from wancompile.quant.numerics import FP8, INT8

DTYPES = [INT8, FP8]
SHAPES = [(1, 1, 16), (2, 3, 300), (1, 2, 1536), (1, 1, 5120), (2, 11, 48)]
KINDS = ["none", "channels", "video", "token", "rows", "no offset"]
EPS = 1e-6


def stream(*shape, dtype=torch.bfloat16):
    """Values with outliers and a mean, the last row constant."""
    x = torch.randn(shape) + 3
    x[..., ::5] *= 100
    x[-1, -1] = 7
    return x.to(dtype)


def operand(kind, batch, tokens, channels, dtype=torch.bfloat16):
    """One operand and its offset."""
    sizes = {"channels": (), "video": (batch, 1), "no offset": (batch, 1)}
    value = torch.randn(*sizes.get(kind, (batch, tokens)), channels).to(dtype)
    offset = None if kind == "no offset" else torch.randn(channels)
    return (None, None) if kind == "none" else (value, offset)


def modulation(kind, batch, tokens, channels):
    """(gate, weight, bias) with their offsets, rows."""
    rows = torch.randint(0, tokens, (batch, tokens), dtype=torch.int32) if kind == "rows" else None
    values = [operand(kind, batch, tokens, channels) for _ in range(3)]
    return *(one for pair in values for one in pair), rows


def quantized_alike(ours, theirs, dtype):
    """Scales to fp32 rounding; a value may fall to the other side of a tie, a few do."""
    (q, scale), (q_plain, scale_plain) = ours, theirs
    torch.testing.assert_close(scale, scale_plain, rtol=2e-5, atol=1e-37)
    step = 1 if dtype == INT8 else q_plain.float().abs() / 8 + 2**-9
    difference = (q.float() - q_plain.float()).abs()
    assert q.is_contiguous()
    assert (difference <= step).all()
    assert (difference > 0).float().mean() < 1e-3 + 2 / difference.numel()


def exact_norm(x, weight, weight_offset, bias, bias_offset, rows):
    y = F.layer_norm(x.double(), x.shape[-1:], eps=EPS)
    if weight is not None:
        y = y * ops.norm.operand(weight, weight_offset, rows).double()
    if bias is not None:
        y = y + ops.norm.operand(bias, bias_offset, rows).double()
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_norm_is_the_plain_body(dtype, kind, shape):
    _, _, *modulated = modulation(kind, *shape)
    smooth = None if kind == "video" else torch.rand(shape[-1]) + 0.5
    args = stream(*shape), *modulated, EPS, smooth, dtype
    quantized_alike(norm_quantize_triton(*args), ops.norm_quantize(*args), dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_is_near_float64(shape):
    x = stream(*shape)
    _, _, *modulated = modulation("rows", *shape)
    q, scale = norm_quantize_triton(x, *modulated, EPS, None, INT8)
    exact = exact_norm(x, *modulated)
    assert ((q.double() * scale - exact).abs() <= 0.5001 * scale + 1e-4).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_mean_does_not_drown_the_variance(shape):
    x = torch.randn(shape) + 1e4
    q, scale = norm_quantize_triton(x, None, None, None, None, None, EPS, None, INT8)
    exact = F.layer_norm(x.double(), shape[-1:], eps=EPS)
    error = (q.double() * scale - exact).abs()
    assert (error <= 0.5001 * scale + 2e-3).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("float_dtype", [torch.bfloat16, torch.float32])
def test_residual_norm_is_the_plain_body(dtype, kind, float_dtype):
    shape = 2, 3, 300
    x, y = stream(*shape, dtype=float_dtype), stream(*shape)
    args = x, y, *modulation(kind, *shape), EPS, torch.rand(300) + 0.5, dtype
    total, *ours = residual_norm_quantize_triton(*args)
    total_plain, *theirs = ops.residual_norm_quantize(*args)
    assert total.dtype == float_dtype
    assert torch.equal(total, total_plain)
    quantized_alike(ours, theirs, dtype)


def test_what_is_normed_is_the_rounded_sum():
    x, y = torch.full((1, 1, 16), 256.0), torch.full((1, 1, 16), 0.5)
    y[..., 0] = 2
    none = [None] * 7
    total, q, _ = residual_norm_quantize_triton(x.bfloat16(), y, *none, EPS, None, INT8)
    assert total[0, 0, :2].tolist() == [258, 256]
    exact = F.layer_norm(total.double(), (16,))[0, 0]
    assert q[0, 0].tolist() == (exact * 127 / exact[0]).round().tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_gated_is_the_plain_body_bit_for_bit(kind, shape):
    x, y = stream(*shape), stream(*shape)
    *operands, rows = modulation(kind, *shape)
    args = x, y, *operands[:2], rows
    assert torch.equal(add_gated_triton(*args), ops.add_gated(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_may_be_slices_and_transposed(dtype):
    shape = batch, tokens, channels = 2, 3, 40
    x, y = stream(batch, tokens, 3 * channels)[..., channels:-channels], stream(*shape)
    one_of_six = torch.randn(batch, 6, channels).to(dtype)[:, 2:3]
    apart = torch.randn(batch, tokens, 2 * channels).to(dtype)[..., ::2]
    turned = torch.randn(batch, channels, tokens).to(dtype).transpose(1, 2)
    args = x, y, one_of_six, None, apart, torch.randn(channels), turned, None, None, EPS, None, INT8
    total, *ours = residual_norm_quantize_triton(*args)
    total_plain, *theirs = ops.residual_norm_quantize(*args)
    assert torch.equal(total, total_plain)
    quantized_alike(ours, theirs, INT8)


def test_nan_shows_in_the_scale_of_its_token_only():
    x = stream(1, 3, 40)
    x[0, 1, 7] = torch.nan
    _, scale = norm_quantize_triton(x, None, None, None, None, None, EPS, None, INT8)
    assert scale.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("channels", [16, 300, 5120])
def test_rms_norm_is_rounded_once(dtype, weighted, channels):
    x = stream(2, 3, 2 * channels, dtype=dtype)[..., :channels]
    weight = torch.randn(channels).to(dtype) if weighted else None
    out = rms_norm_triton(x, [channels], weight, 1e-6)
    exact = F.rms_norm(x.double(), (channels,), None if weight is None else weight.double(), 1e-6)
    unit = torch.finfo(dtype).eps
    assert out.is_contiguous()
    assert ((out - exact).abs() <= (unit / 2 * 1.001 + 3e-6) * exact.abs()).all()
    torch.testing.assert_close(
        out, F.rms_norm(x, (channels,), weight, 1e-6), rtol=max(2 * unit, 1e-5), atol=0
    )


def test_rms_norm_takes_the_eps_of_its_dtype_where_none_is_given():
    x = torch.full((1, 4), 1e-3)
    out = rms_norm_triton(x, [4], None, None)
    torch.testing.assert_close(out, F.rms_norm(x, (4,)))
    assert out[0, 0] < 0.95


def test_no_tokens_give_no_output():
    x, none = torch.empty(2, 0, 8), [None] * 5
    q, scale = norm_quantize_triton(x, *none, EPS, None, INT8)
    assert (q.shape, scale.shape) == ((2, 0, 8), (2, 0, 1))
    assert add_gated_triton(x, x, None, None, None).shape == x.shape
    assert rms_norm_triton(x, [8], None, EPS).shape == x.shape
