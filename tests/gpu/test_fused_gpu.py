"""The kernels that norm, rotate or activate, against their plain bodies, on fresh data."""

import pytest
import torch
import torch.nn.functional as F
from test_kernels_gpu import fitting, relative_error
from torch import Tensor

from wancompile import ops
from wancompile.ops.hadamard import turned as hadamard_of
from wancompile.quant.numerics import FP8, INT8, QMAX

GELU = torch.ops.wancompile.gelu_quantize.default
NORM = torch.ops.wancompile.norm_quantize.default
RESIDUAL_NORM = torch.ops.wancompile.residual_norm_quantize.default
ADD_GATED = torch.ops.wancompile.add_gated.default
ROTATE = torch.ops.wancompile.norm_rotate_quantize.default
ROTATE_PER_TOKEN = torch.ops.wancompile.norm_rotate_quantize_per_token.default
FLOAT_ROTATE = torch.ops.wancompile.norm_rotate.default
RMS_NORM = torch.ops.aten.rms_norm.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default

DTYPES = [INT8, FP8]
SHAPES = [  # batch, tokens, channels
    (1, 1, 1536),
    (2, 127, 3072),
    (1, 333, 5120),
    (2, 5, 300),
    (3, 16, 16),
    (1, 32760, 5120),
    (1, 75600, 1536),
    (1, 75600, 5120),
]
KINDS = ["none", "channels", "video", "token", "rows"]
CASES = [  # dtype, kind, dtype of operands: each takes seconds to compile, so not every combination
    (INT8, "none", torch.bfloat16),
    (FP8, "channels", torch.float32),
    (INT8, "video", torch.bfloat16),
    (FP8, "token", torch.bfloat16),
    (INT8, "rows", torch.float32),
]
EPS = 1e-6


def stream(*shape: int, device: torch.device) -> Tensor:
    """Values with a mean, a few channels 100 times larger, and a last row of zeros."""
    x = torch.randn(shape, device=device) + 0.5
    x[..., :: max(1, shape[-1] // 4)] *= 100
    x[..., -1, :] = 0
    return x.to(torch.bfloat16)


IN_TF32 = 0.03
"""How many values TF32, which has 10 bits, may move to the other side of a tie."""


def assert_alike(q: Tensor, plain: Tensor, *, in_tf32: bool = False) -> None:
    """A value may fall to the other side of a tie, a few do.

    What TF32 drops is a share of the whole row, far more than the step of e4m3 at its small values.
    """
    assert (q.shape, q.dtype, q.is_contiguous()) == (plain.shape, plain.dtype, True)
    step = 1 if q.dtype == INT8 else plain.float().abs() / 8 + 2**-9
    if in_tf32 and q.dtype == FP8:
        step = step + 2.0**-10 * plain.float().norm(dim=-1, keepdim=True)
    difference = (q.float() - plain.float()).abs()
    assert (difference <= step).all()
    few = IN_TF32 if in_tf32 else 2e-3
    assert (difference > 0).float().mean() < few + 2 / difference.numel()


def assert_quantized_alike(ours: tuple, plain: tuple) -> None:
    torch.testing.assert_close(ours[1], plain[1], rtol=2e-5, atol=1e-37)
    assert_alike(ours[0], plain[0])


def modulation(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
    """Gate, weight and bias with their offsets, rows; `rows` reads one of four."""
    batch, tokens, channels = shape
    sizes = {"channels": (), "video": (batch, 1)}.get(kind, (batch, tokens))
    operands: list[Tensor | None] = []
    for _ in range(3):
        value = torch.randn(*sizes, channels, device=device).to(dtype)
        offset = torch.randn(channels, device=device)
        operands += [None, None] if kind == "none" else [value, offset]
    rows = torch.randint(0, min(4, tokens), (batch, tokens), device=device, dtype=torch.int32)
    return *operands, rows if kind == "rows" else None


@pytest.mark.parametrize(("dtype", "kind", "operands"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_kernel_is_the_plain_body(cuda, dtype, kind, operands, shape):
    _, _, *modulated = modulation(kind, shape, operands, cuda)
    smooth = None if kind == "video" else torch.rand(shape[-1], device=cuda) + 0.5
    args = stream(*shape, device=cuda), *modulated, EPS, smooth, dtype
    assert_quantized_alike(fitting(NORM, cuda, args)[0].impl(*args), ops.norm_quantize(*args))


@pytest.mark.parametrize("channels", [300, 5120])
def test_a_row_of_equal_values_becomes_the_bias(cuda, channels):
    """Its variance is 0, so what its mean is rounded by comes out a thousand times larger."""
    x = torch.full((1, 4, channels), 3.0, device=cuda, dtype=torch.bfloat16)
    bias = torch.randn(channels, device=cuda)
    args = x, None, None, bias, None, None, EPS, None, INT8
    for kernel in fitting(NORM, cuda, args):
        q, scale = kernel.impl(*args)
        assert ((q * scale - bias).abs() <= 0.5 * scale + 2e-3).all()


@pytest.mark.parametrize(("dtype", "kind", "operands"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_norm_kernel_is_the_plain_body(cuda, dtype, kind, operands, shape):
    x, y = stream(*shape, device=cuda), stream(*shape, device=cuda)
    x = x if operands == torch.bfloat16 else x.float()
    args = x, y, *modulation(kind, shape, operands, cuda), EPS, None, dtype
    total, *ours = fitting(RESIDUAL_NORM, cuda, args)[0].impl(*args)
    total_plain, *plain = ops.residual_norm_quantize(*args)
    assert torch.equal(total, total_plain)
    assert_quantized_alike(ours, plain)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_add_gated_kernel_is_the_plain_body_bit_for_bit(cuda, shape, kind):
    x, y = stream(*shape, device=cuda), stream(*shape, device=cuda)
    *operands, rows = modulation(kind, shape, torch.bfloat16, cuda)
    args = x, y, *operands[:2], rows
    assert torch.equal(fitting(ADD_GATED, cuda, args)[0].impl(*args), ops.add_gated(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(
    ("tokens", "channels"),
    [(1, 8960), (127, 14336), (333, 13824), (5, 300), (32760, 13824), (75600, 8960)],
)
def test_gelu_kernel_is_the_plain_body(cuda, dtype, approximate, tokens, channels):
    smooth = torch.rand(channels, device=cuda) + 0.5
    args = stream(tokens, channels, device=cuda) / 16, approximate, smooth, dtype
    assert_quantized_alike(fitting(GELU, cuda, args)[0].impl(*args), ops.gelu_quantize(*args))


ROTATED = [  # batch, tokens, heads, head size
    (1, 1, 12, 128),
    (2, 127, 24, 128),
    (1, 333, 40, 128),
    (2, 65, 5, 40),
    (1, 100, 4, 64),
    (1, 32760, 40, 128),
    (1, 75600, 12, 128),
]


def projected(shape: tuple[int, ...], interleaved: bool, device: torch.device) -> tuple:
    """x, a part of a merged projection, weight, eps, cosines and sines."""
    batch, tokens, heads, size = shape
    channels = heads * size
    merged = stream(batch, tokens, 3 * channels, device=device)
    angle = torch.rand(tokens, size // 2, device=device) * 6
    cos, sin = angle.cos(), angle.sin()
    if interleaved:
        cos, sin = torch.stack([cos, sin], -1).unbind(-1)
    weight = (torch.rand(channels, device=device) + 0.5).to(torch.bfloat16)
    return merged[..., channels : 2 * channels], weight, EPS, cos, sin


def has_matrix(shape: tuple[int, ...]) -> bool:
    """Whether the heads of `shape` can be turned."""
    return shape[3] & (shape[3] - 1) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", ROTATED)
def test_rotary_kernel_is_the_plain_body(cuda, dtype, shift, interleaved, shape):
    args = rounded_per_head(shape, interleaved, shift, False, dtype, cuda)
    assert_alike(fitting(ROTATE, cuda, args)[0].impl(*args), ops.norm_rotate_quantize(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("shape", filter(has_matrix, ROTATED))
def test_turned_rotary_kernel_is_the_plain_body_but_for_tf32(cuda, dtype, shift, shape):
    args = rounded_per_head(shape, True, shift, True, dtype, cuda)
    out, plain = fitting(ROTATE, cuda, args)[0].impl(*args), ops.norm_rotate_quantize(*args)
    assert_alike(out, plain, in_tf32=True)
    part = slice(0, 300)
    x, weight, _, cos, sin, moved, scale, *_ = args
    rotated = float64_heads(x[:, part], weight, cos[part], sin[part])
    length = rotated.norm(dim=-1, keepdim=True)
    exact = hadamard_of(rotated)
    exact = exact if moved is None else exact - moved[:, None]
    step = scale.double()[:, None, None]
    top = QMAX[dtype] * step
    half = half_step(exact, step, dtype)
    # Of each of the values that are summed TF32 drops less than 2**-10, and sqrt(D) of them have
    # the length of the head.
    off = (out[:, :, part].double() * step - exact.clamp(-top, top)).abs()
    assert (off <= half * 1.001 + 2.0**-10 * length + 1e-4 * step).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", ROTATED)
def test_rotary_kernel_finds_the_scales_of_the_plain_body(cuda, dtype, turned, interleaved, shape):
    args = *projected(shape, interleaved, cuda), turned and has_matrix(shape), dtype
    out, scale = fitting(ROTATE_PER_TOKEN, cuda, args)[0].impl(*args)
    plain, plain_scale = ops.norm_rotate_quantize_per_token(*args)
    assert out.is_contiguous()
    assert scale.is_contiguous()
    torch.testing.assert_close(scale, plain_scale, rtol=2e-3 if args[5] else 1e-5, atol=0)
    assert_alike(out, plain, in_tf32=True)
    part = slice(max(0, shape[1] - 300), None)  # the last tokens
    x, weight, _, cos, sin, *_ = args
    rotated = float64_heads(x[:, part], weight, cos[part], sin[part])
    exact = hadamard_of(rotated) if args[5] else rotated
    step = scale[:, :, part].double()
    off = (out[:, :, part].double() * step - exact).abs()
    slack = 2.0**-10 * rotated.norm(dim=-1, keepdim=True) * args[5] + 1e-4 * step
    assert (off <= half_step(exact, step, dtype) * 1.001 + slack).all()


def rounded_per_head(
    shape: tuple[int, ...],
    interleaved: bool,
    shift: bool,
    turned: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple:
    """Arguments of `norm_rotate_quantize`."""
    _, _, heads, size = shape
    return (
        *projected(shape, interleaved, device),
        torch.randn(heads, size, device=device) if shift else None,
        (torch.rand(heads, device=device) + 0.5) * 4 / QMAX[dtype],
        turned,
        dtype,
    )


def float64_heads(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normed pairs times complex numbers of length 1, `[B, H, S, D]`."""
    normed = F.rms_norm(x.double(), weight.shape, weight.double(), EPS)
    half = cos.shape[1]
    pairs = torch.view_as_complex(normed.view(*x.shape[:2], -1, half, 2))
    turns = torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(pairs * turns).flatten(-2).transpose(1, 2)


def half_step(exact: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding to the nearest may be off."""
    return step / 2 if dtype == INT8 else torch.maximum(exact.abs() / 16, step / 1024)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", ROTATED)
def test_float_rotary_kernel_is_rounded_once(cuda, dtype, interleaved, shape):
    x, weight, _, cos, sin = given = projected(shape, interleaved, cuda)
    args = *given, dtype
    out, plain = fitting(FLOAT_ROTATE, cuda, args)[0].impl(*args), ops.norm_rotate(*args)
    assert (out.shape, out.stride(), out.dtype) == (plain.shape, plain.stride(), plain.dtype)
    for first in {0, max(0, shape[1] - 300)}:  # the first tokens, and the last
        part = slice(first, first + 300)
        normed = F.rms_norm(x[:, part].double(), weight.shape, weight.double(), EPS)
        pairs = torch.view_as_complex(normed.view(*normed.shape[:2], shape[2], -1, 2))
        turned = pairs * torch.complex(cos[part].double(), sin[part].double())[:, None]
        exact = torch.view_as_real(turned).flatten(-2).transpose(1, 2)
        size = turned.abs().repeat_interleave(2, -1).transpose(1, 2)
        bound = torch.finfo(dtype).eps / 2 * 1.001 * exact.abs() + 3e-6 * size + 6e-8
        assert ((out[:, :, part] - exact).abs() <= bound).all()
    assert relative_error(out, plain) < torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(2, 127, 24, 128), (1, 333, 40, 128)])
def test_attention_of_rotated_q_and_k_lies_as_the_next_linear_reads_it(cuda, shape):
    args = *projected(shape, True, cuda), torch.bfloat16
    value = fitting(FLOAT_ROTATE, cuda, args)[0].impl(*args)
    given = value, value, value, None, 0.0, False, None, False
    out = fitting(SDPA, cuda, given)[0].impl(*given)
    assert out.transpose(1, 2).is_contiguous()
    exact = F.scaled_dot_product_attention(*[value.double()] * 3)
    assert relative_error(out, exact) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_kernel_is_rounded_once(cuda, dtype, shape):
    x, channels = stream(*shape, device=cuda).to(dtype), shape[-1]
    weight = torch.randn(channels, device=cuda).to(dtype)
    args = x, [channels], weight, EPS
    out = fitting(RMS_NORM, cuda, args)[0].impl(*args)
    exact = F.rms_norm(x[:, :300].double(), [channels], weight.double(), EPS)
    bound = (torch.finfo(dtype).eps / 2 * 1.001 + 3e-6) * exact.abs()
    assert ((out[:, :300] - exact).abs() <= bound).all()
    assert relative_error(out, F.rms_norm(*args)) < torch.finfo(dtype).eps


@pytest.mark.parametrize("keys", [1, 2, 257, 512])
@pytest.mark.parametrize("queries", [1, 127, 32760])
def test_cudnn_attention_is_near_float64(cuda, keys, queries):
    q = torch.randn(1, queries, 4, 128, device=cuda, dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.randn(2, 1, keys, 4, 128, device=cuda, dtype=torch.bfloat16).transpose(2, 3)
    args = q, k, v, None, 0.0, False, None, False
    out = fitting(SDPA, cuda, args)[0].impl(*args)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative_error(out, exact) < 1e-2
    assert out.stride() == q.stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_never_wait_for_the_gpu_and_compile_once_for_all_lengths(cuda, dtype):
    pytest.importorskip("triton")
    from wancompile.kernels.jit import activation, norm, rotary, rotary_quantize

    def run(tokens: int) -> None:
        shape = 1, tokens, 512
        x = torch.ones(shape, device=cuda, dtype=torch.bfloat16)
        ones = torch.ones(512, device=cuda)
        none = [None] * 5
        angles = torch.ones(tokens, 64, device=cuda)
        kernels = torch.ops.wancompile_kernels
        kernels.residual_norm_quantize_triton(x, x, x, ones, *none, EPS, ones, dtype)
        kernels.add_gated_triton(x, x, x, ones, None)
        kernels.gelu_quantize_triton(x, "tanh", ones, dtype)
        given = x, None, EPS, angles, angles
        kernels.norm_rotate_quantize_triton(*given, None, ones[:4], True, dtype)
        kernels.norm_rotate_quantize_per_token_triton(*given, True, dtype)
        kernels.norm_rotate_triton(x, None, EPS, angles, angles, x.dtype)
        kernels.rms_norm_triton(x, [512], None, EPS)

    compiled = norm._norm_quantize, norm._add_gated, norm._rms_norm, activation._gelu_quantize
    compiled = *compiled, rotary._norm_rotate, rotary_quantize._per_head, rotary_quantize._per_token
    run(128)
    counts = [len(one.device_caches[cuda.index][0]) for one in compiled]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for tokens in (1, 16, 127, 130):
            run(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(one.device_caches[cuda.index][0]) for one in compiled] == counts
