import pytest
import torch

from wancompile import ops
from wancompile.kernels.triton_rotary import (
    norm_rotate_quantize_per_token_triton,
    norm_rotate_quantize_triton,
    norm_rotate_triton,
)
from wancompile.quant.numerics import FP8, INT8, QMAX, SMALLEST_SCALE

DTYPES = [INT8, FP8]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # batch, tokens (each a program of its own), heads, head size
    (1, 1, 1, 2),
    (2, 5, 3, 8),
    (1, 3, 12, 128),
    (1, 2, 40, 128),
    (2, 11, 2, 16),
    (1, 3, 5, 40),
]


TURNED = [shape for shape in SHAPES if shape[3] & (shape[3] - 1) == 0]


def args(
    dtype, batch, tokens, heads, size, shift=True, weight=True, source=torch.bfloat16, turned=False
):
    x = torch.randn(batch, tokens, heads * size)
    x[..., ::7] *= 20
    angle = torch.rand(tokens, size // 2) * 6
    return (
        x.to(source),
        (torch.rand(heads * size) + 0.5).to(source) if weight else None,
        1e-6,
        angle.cos(),
        angle.sin(),
        torch.randn(heads, size) if shift else None,
        (torch.rand(heads) + 0.5) * 4 / QMAX[dtype],  # small enough that outliers saturate
        turned,
        dtype,
    )


def exact(x, weight, eps, cos, sin):
    """Normed pairs times complex numbers of length 1, in fp64, `[B, S, H, D]`."""
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    turned = torch.view_as_complex(y.view(*x.shape[:2], -1, cos.shape[1], 2))
    turned = turned * torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(turned).flatten(-2)


def sylvester(size):
    """The orthonormal matrix whose signs are the parity of the bits that row and column share."""
    both = [[bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return (-1.0) ** torch.tensor(both, dtype=torch.float64) * size**-0.5


def alike(ours, plain, dtype):
    """A value may fall to the other side of a tie, a few do."""
    step = 1 if dtype == INT8 else plain.float().abs() / 8 + 2**-9
    difference = (ours.float() - plain.float()).abs()
    assert ours.is_contiguous()
    assert (difference <= step).all()
    assert (difference > 0).float().mean() < 1e-3 + 2 / difference.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TURNED)
@pytest.mark.parametrize("shift", [True, False])
def test_turned_rotation_is_the_plain_body(dtype, shape, shift):
    given = args(dtype, *shape, shift=shift, turned=True)
    alike(norm_rotate_quantize_triton(*given), ops.norm_rotate_quantize(*given), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "turned"), [*((one, True) for one in TURNED), *((one, False) for one in SHAPES)]
)
def test_rotation_by_scales_of_its_own_is_the_plain_body(dtype, shape, turned):
    given = *args(dtype, *shape)[:5], turned, dtype
    q, scale = norm_rotate_quantize_per_token_triton(*given)
    plain, plain_scale = ops.norm_rotate_quantize_per_token(*given)
    alike(q, plain, dtype)
    torch.testing.assert_close(scale, plain_scale, rtol=2e-6, atol=0)


@pytest.mark.parametrize("shape", TURNED)
def test_turned_rotation_is_near_complex_float64(shape):
    given = args(INT8, *shape, source=torch.float32)[:5]
    turned = (exact(*given) @ sylvester(shape[3])).transpose(1, 2)
    q, scale = norm_rotate_quantize_per_token_triton(*given, True, INT8)
    top = turned.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double() * 127, top, rtol=1e-5, atol=0)
    assert ((q - turned / scale).abs() <= 0.5 + 1e-3).all()


def test_a_head_of_zeros_has_the_smallest_scale():
    given = args(INT8, 1, 3, 2, 16, source=torch.float32)
    given[0][0, 1] = 0
    q, scale = norm_rotate_quantize_per_token_triton(*given[:5], True, INT8)
    assert not q[:, :, 1].any()
    assert (scale[:, :, 1] == SMALLEST_SCALE).all()
    assert (scale[:, :, [0, 2]] > 1e-3).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [True, False])
def test_rotation_is_the_plain_body(dtype, shape, shift):
    given = args(dtype, *shape, shift=shift)
    alike(norm_rotate_quantize_triton(*given), ops.norm_rotate_quantize(*given), dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", [True, False])
def test_rotation_is_near_complex_float64(shape, weight):
    given = args(INT8, *shape, weight=weight, source=torch.float32)
    *normed, shift, scale, _, _ = given
    shifted = exact(*normed) - shift
    steps = (shifted / scale.double()[:, None]).clamp(-127, 127).transpose(1, 2)
    assert ((norm_rotate_quantize_triton(*given) - steps).abs() <= 0.5 + 1e-3).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("weight", [True, False])
def test_rotation_of_floats_is_rounded_once(dtype, shape, source, weight):
    given = *args(INT8, *shape, weight=weight, source=source)[:5], dtype
    out, plain = norm_rotate_triton(*given), ops.norm_rotate(*given)
    assert (out.shape, out.stride(), out.dtype) == (plain.shape, plain.stride(), plain.dtype)
    wanted = exact(*given[:5]).transpose(1, 2)
    bound = torch.finfo(dtype).eps / 2 * wanted.abs() + 2e-6 * wanted.abs().amax()
    assert ((out - wanted).abs() <= bound).all()


def test_a_slice_of_a_merged_projection_and_interleaved_angles_are_read_in_place():
    x, w, eps, cos, sin, *rest = args(INT8, 2, 3, 4, 16)
    merged = torch.cat([x * 3, x, x - 1], -1)
    angles = torch.stack([cos, sin], -1)
    given = w, eps, angles[..., 0], angles[..., 1], *rest
    out = norm_rotate_quantize_triton(merged[..., 64:128], *given)
    assert torch.equal(out, norm_rotate_quantize_triton(x, w, eps, cos, sin, *rest))
    out, scale = norm_rotate_quantize_per_token_triton(merged[..., 64:128], *given[:4], True, INT8)
    whole = norm_rotate_quantize_per_token_triton(x, w, eps, cos, sin, True, INT8)
    assert torch.equal(out, whole[0])
    assert torch.equal(scale, whole[1])
    out = norm_rotate_triton(merged[..., 64:128], *given[:4], torch.bfloat16)
    assert torch.equal(out, norm_rotate_triton(x, w, eps, cos, sin, torch.bfloat16))


def test_nan_reaches_its_token_only():
    given = args(FP8, 1, 3, 2, 16)
    given[0][0, 1, 20] = torch.nan
    nan = norm_rotate_quantize_triton(*given).float().isnan()
    assert nan.all(-1).all(1)[0].tolist() == [False, True, False]
    assert nan.sum() == 32
    assert torch.equal(norm_rotate_triton(*given[:5], torch.bfloat16).isnan(), nan)
    _, scale = norm_rotate_quantize_per_token_triton(*given[:5], True, INT8)
    assert torch.equal(scale.isnan(), nan.all(-1, keepdim=True))


def test_no_tokens_give_no_output():
    x, w, eps, cos, sin, *rest = args(INT8, 2, 3, 4, 16)
    out = norm_rotate_quantize_triton(x[:, :0], w, eps, cos[:0], sin[:0], *rest)
    assert out.shape == (2, 4, 0, 16)
    out = norm_rotate_triton(x[:, :0], w, eps, cos[:0], sin[:0], torch.bfloat16)
    assert out.shape == (2, 4, 0, 16)
    given = x[:, :0], w, eps, cos[:0], sin[:0], True, INT8
    out, scale = norm_rotate_quantize_per_token_triton(*given)
    assert (out.shape, scale.shape) == ((2, 4, 0, 16), (2, 4, 0, 1))
