"""Each kernel against the plain body of its op, on the device it is made for and on fresh data."""

import importlib
import itertools
import pkgutil

import pytest
import torch
from torch import Tensor

from wancompile import ops
from wancompile.kernels import KERNELS, Kernel, choose
from wancompile.kernels.torch_attention import ATTENTION_DEQUANTIZE_SDPA
from wancompile.ops import linear
from wancompile.ops.hadamard import turned as hadamard_of
from wancompile.quant.numerics import FP8, INT8, QMAX, absmax_scale

LINEAR = torch.ops.wancompile.scaled_linear.default
ATTENTION = torch.ops.wancompile.scaled_attention.default
PER_TOKEN = torch.ops.wancompile.quantize_per_token.default
PER_HEAD = torch.ops.wancompile.quantize_per_head.default
SHAPES = [  # M, K, N: edges of tiles, then those of Wan's linears
    (1, 64, 32),
    (16, 256, 128),
    (17, 128, 64),
    (130, 272, 208),
    (513, 1536, 8960),
    (300, 8960, 1536),
    (127, 13824, 5120),
    (1, 14336, 3072),
    (127, 3072, 14336),
    (32760, 5120, 13824),
    (75600, 1536, 1536),
]


def fitting(op: torch._ops.OpOverload, device: torch.device, args: tuple) -> list[Kernel]:
    """Every kernel that takes these arguments, the one of highest priority first."""
    kernels = [k for k in KERNELS if k.op == op and k.supports(device, args) is None]
    if not kernels:
        pytest.skip(str(choose(op, device, args)[1]))
    return kernels


def with_outliers(*shape: int, device: torch.device) -> Tensor:
    """Normal values, a few channels 100 times larger, a zero row: what Wan feeds its linears."""
    x = torch.randn(shape, device=device)
    x[..., :: max(1, shape[-1] // 4)] *= 100
    x[-1] = 0
    return x.to(torch.bfloat16)


def linear_args(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple:
    m, k, n = shape
    x = ops.quantize_per_token(with_outliers(m + 1, k, device=device)[:m], None, dtype)
    w = ops.quantize_per_token(torch.randn(n, k, device=device) / k**0.5, None, dtype)
    return *x, *w, torch.randn(n, device=device, dtype=torch.bfloat16)


def compilations(device: torch.device) -> int:
    """How often any of our kernels has been compiled for `device` by this process."""
    from triton.runtime.jit import JITFunction

    from wancompile.kernels import jit

    found: set[JITFunction] = set()
    for one in pkgutil.iter_modules(jit.__path__):
        module = importlib.import_module(f"{jit.__name__}.{one.name}")
        found |= {value for value in vars(module).values() if isinstance(value, JITFunction)}
    return sum(len(one.device_caches[device.index][0]) for one in found)


def relative_error(out: Tensor, reference: Tensor) -> float:
    difference = (out.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_int8_linear_is_the_plain_body_bit_for_bit(cuda, shape, out_dtype):
    args = (*linear_args(shape, INT8, cuda), out_dtype)
    plain = ops.scaled_linear(*args)
    for kernel in fitting(LINEAR, cuda, args):
        assert torch.equal(kernel.impl(*args), plain), kernel.name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_fp8_linear_is_the_plain_body_to_bf16(cuda, shape, bias):
    args = [*linear_args(shape, FP8, cuda), torch.float32]
    if not bias:
        args[4] = None
    plain = ops.scaled_linear(*args)
    for kernel in fitting(LINEAR, cuda, tuple(args)):
        # bf16 rounding is 2**-9 of a value; fast accumulation keeps 14 bits of the running sum.
        assert relative_error(kernel.impl(*args), plain) < 2e-3 * (1 + shape[1] / 512), kernel.name


@pytest.mark.parametrize("shape", [(1, 7, 3), (33, 2100, 9), (64, 4096, 16)])
@pytest.mark.parametrize("tf32", [True, False])
def test_plain_int8_product_is_exact_on_the_gpu(cuda, shape, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    m, k, n = shape
    for x, w in [
        (torch.randint(-127, 128, (m, k)), torch.randint(-127, 128, (n, k))),
        (torch.full((m, k), 127), torch.full((n, k), 127)),
    ]:
        out = linear.int8_matmul(x.to(cuda, INT8), w.to(cuda, INT8))
        assert torch.equal(out.long().cpu(), x @ w.t())


def attention_args(
    dtype: torch.dtype,
    batch: int,
    tokens: tuple[int, int],
    head_size: int,
    device: torch.device,
    *,
    heads: int = 4,
    per_token: bool = False,
) -> tuple:
    """Arguments of `scaled_attention`, with a channel ten times as wide; v in e4m3.

    If `per_token`, queries differ in size up to twenty times, and each has its own scale.
    """
    sizes = (*tokens, tokens[1])
    q, k, v = (torch.randn(batch, heads, s, head_size, device=device) for s in sizes)
    k[..., 5] *= 10
    types = dtype, dtype, FP8
    if per_token:
        q *= torch.exp(-3 * torch.rand(*q.shape[:3], 1, device=device))
    scales = [
        absmax_scale(t, (0, 2, 3), d).flatten() for t, d in zip((q, k, v), types, strict=True)
    ]
    data = [
        ops.quantize_per_head(t, s, d) for t, s, d in zip((q, k, v), scales, types, strict=True)
    ]
    if per_token:
        data[0], scales[0] = ops.quantize_per_token(q, None, dtype)
    return *data, *scales, head_size**-0.5, torch.bfloat16


def dequantized(args: tuple) -> list[Tensor]:
    """q, k and v in float64; v as it is where it has no scale."""
    found = []
    for value, scale in zip(args[:3], args[3:6], strict=True):
        wide = value.double()
        if scale is not None:
            wide *= scale.double() if scale.dim() == 4 else scale.double()[:, None, None]
        found.append(wide)
    return found


ATTENDED = [  # batch, queries and keys
    (1, (1, 77)),
    (2, (128, 512)),
    (2, (700, 513)),
    (1, (127, 1)),
    (1, (300, 32760)),
    (1, (127, 75600)),
]


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), ATTENDED)
def test_attention_is_near_the_plain_body_and_float64(
    cuda, dtype, head_size, batch, tokens, per_token
):
    args = attention_args(dtype, batch, tokens, head_size, cuda, per_token=per_token)
    qf, kf, vf = dequantized(args)
    exact = torch.softmax(qf @ kf.transpose(-1, -2) * head_size**-0.5, -1) @ vf
    plain = ops.scaled_attention(*args)
    assert relative_error(plain, exact) < 0.05
    for kernel in fitting(ATTENTION, cuda, args):
        out = kernel.impl(*args)
        assert out.transpose(1, 2).is_contiguous()
        # Only 8-bit tensor cores round P; bf16 products stay much nearer.
        limit = 0.02 if kernel is ATTENTION_DEQUANTIZE_SDPA else 0.05
        assert relative_error(out, exact) < limit, kernel.name
        assert relative_error(out, plain) < 0.06, kernel.name


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("values", [FP8, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens"), [(1, (32760, 32760)), (2, (32760, 513)), (1, (75600, 75600))]
)
def test_attention_of_whole_videos_is_near_float64(cuda, dtype, values, batch, tokens):
    """Of the first, middle and last queries, which are few enough for float64."""
    args = attention_args(dtype, batch, tokens, 128, cuda, heads=2, per_token=True)
    if values != FP8:
        v = torch.randn(args[2].shape, device=cuda, dtype=values)
        args = *args[:2], v, *args[3:5], None, *args[6:]
    count = tokens[0]
    rows = torch.tensor([0, 1, 127, 128, count // 2, count - 121, count - 2, count - 1]).to(cuda)
    few = args[0][:, :, rows], *args[1:3], args[3][:, :, rows], *args[4:]
    qf, kf, vf = dequantized(few)
    exact = torch.softmax(qf @ kf.transpose(-1, -2) * args[6], -1) @ vf
    kernel = fitting(ATTENTION, cuda, args)[0]
    out = kernel.impl(*args)[:, :, rows]
    assert relative_error(out, exact) < (0.05 if values == FP8 else 0.02), kernel.name


@pytest.mark.parametrize("heads", [12, 24, 40])
@pytest.mark.parametrize("values", [FP8, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 127, 600])
def test_a_scale_for_each_query_is_read_beside_it(cuda, heads, values, tokens):
    """In the middle of a large head and at its end, of every head, in both videos."""
    args = attention_args(INT8, 2, (tokens, 333), 128, cuda, heads=heads, per_token=True)
    if values != FP8:
        v = torch.randn(args[2].shape, device=cuda, dtype=values)
        args = *args[:2], v, *args[3:5], None, *args[6:]
    qf, kf, vf = dequantized(args)
    exact = torch.softmax(qf @ kf.transpose(-1, -2) * args[6], -1) @ vf
    for kernel in fitting(ATTENTION, cuda, args):
        error = (kernel.impl(*args).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error.amax() < (0.1 if values == FP8 else 0.03), kernel.name


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), ATTENDED)
def test_attention_with_values_in_bf16_is_near_float64(
    cuda, dtype, head_size, batch, tokens, per_token
):
    given = attention_args(dtype, batch, tokens, head_size, cuda, per_token=per_token)
    q, k, _, *scales, _, factor, _ = given
    merged = torch.randn(batch, tokens[1], 3, 4, head_size, device=cuda, dtype=torch.bfloat16)
    qf, kf, _ = dequantized(given)
    p = torch.softmax(qf @ kf.transpose(-1, -2) * factor, -1)
    # Read in place, and where no bulk copy could read it.
    for v in (merged[:, :, 1].transpose(1, 2), merged[:, :, 1].transpose(1, 2).flip(-1).flip(-1)):
        args = q, k, v, *scales, None, factor, torch.float32
        for kernel in fitting(ATTENTION, cuda, args):
            # P is bf16; tensor cores keep 14 bits of the sums of e4m3 products, the logits. Torch's
            # own attention has q in bf16, too.
            limit = 3e-3 if dtype == INT8 else 6e-3
            limit = 0.02 if kernel is ATTENTION_DEQUANTIZE_SDPA else limit
            assert relative_error(kernel.impl(*args), p @ v.double()) < limit, kernel.name


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("tokens", [1, 127, 600, 32760])
def test_float_values_in_a_merged_product_are_rounded_as_e4m3_ones(cuda, head_size, tokens):
    args = list(attention_args(INT8, 2, (130, tokens), head_size, cuda))
    merged = torch.randn(2, tokens, 3, 4, head_size, device=cuda, dtype=torch.bfloat16)
    v = merged[:, :, 1].transpose(1, 2)
    args[5] = torch.tensor([0.001, 0.004, 0.01, 0.1], device=cuda)  # the first saturates
    rounded = ops.quantize_per_head(v.cpu(), args[5].cpu(), FP8).to(cuda)
    for kernel in fitting(ATTENTION, cuda, tuple(args)):
        args[2] = v
        out = kernel.impl(*args)
        args[2] = rounded
        assert torch.equal(out, kernel.impl(*args)), kernel.name


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("factor", [1e-3, 0.1, 20.0])
def test_a_bias_of_int8_sums_costs_no_accuracy(cuda, biased, factor):
    pytest.importorskip("triton")
    from wancompile.kernels.jit import attention

    q, k, v, *scales, _, dtype = attention_args(INT8, 1, (300, 1000), 128, cuda)
    fitting(ATTENTION, cuda, (q, k, v, *scales, factor, dtype))
    out = torch.empty(q.shape, device=cuda)
    one = attention.Tile(biased=biased)
    attention.launch(q, k, v, tuple(scales), factor, out, one)
    qf, kf, vf = (
        t.double() * s.double()[:, None, None] for t, s in zip((q, k, v), scales, strict=True)
    )
    p = torch.softmax(qf @ kf.transpose(-1, -2) * factor, -1)
    # e4m3 rounds p by 2**-4 of it; tensor cores keep 14 bits of the sum.
    bound = (2.0**-4 * p + 2.0**-18 * p.amax(-1, keepdim=True)) @ vf.abs()
    assert ((out - p @ vf).abs() <= 1.01 * bound + 2.0**-12 * p @ vf.abs() + 1e-5).all()


ROUNDED = [
    *itertools.product((1, 127, 2000), (16, 300, 1536, 3072, 5120, 8960, 13824, 14336)),
    (32760, 5120),
    (75600, 1536),
]


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize(("tokens", "channels"), ROUNDED)
def test_quantize_kernels_are_the_plain_body_on_a_cpu_bit_for_bit(cuda, dtype, channels, tokens):
    x = with_outliers(tokens + 1, channels, device=cuda)
    for inv_smooth in (None, torch.rand(channels, device=cuda) + 0.1):
        args = x, inv_smooth, dtype
        kernel = fitting(PER_TOKEN, cuda, args)[0]
        q, scale = kernel.impl(*args)
        q_cpu, scale_cpu = ops.quantize_per_token(
            x.cpu(), None if inv_smooth is None else inv_smooth.cpu(), dtype
        )
        assert torch.equal(scale.cpu(), scale_cpu)
        assert torch.equal(q.cpu().view(torch.uint8), q_cpu.view(torch.uint8))


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("tokens", [1, 127, 1000, 32760, 75600])
def test_per_head_kernel_is_the_plain_body_on_a_cpu_bit_for_bit(cuda, dtype, tokens):
    x = with_outliers(2, tokens, 12, 128, device=cuda).transpose(1, 2)
    scale = torch.rand(12, device=cuda) + 0.01
    out = fitting(PER_HEAD, cuda, (x, scale, dtype))[0].impl(x, scale, dtype)
    plain = ops.quantize_per_head(x.cpu(), scale.cpu(), dtype)
    assert torch.equal(out.cpu().view(torch.uint8), plain.view(torch.uint8))


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_quantize_kernels_show_nan(cuda, dtype):
    x = torch.randn(3, 64, device=cuda)
    x[1, 5] = torch.nan
    _, scale = fitting(PER_TOKEN, cuda, (x, None, dtype))[0].impl(x, None, dtype)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    heads = x.view(1, 1, 3, 64)
    out = fitting(PER_HEAD, cuda, (heads, scale[:1, 0], FP8))[0].impl(heads, scale[:1, 0], FP8)
    assert out.float().isnan().sum() == 1


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_kernels_never_wait_for_the_gpu_and_compile_once_for_all_lengths(cuda, dtype):
    pytest.importorskip("triton")

    def run(tokens: int) -> None:
        args = (*linear_args((tokens, 2048, 512), dtype, cuda), torch.bfloat16)
        fitting(LINEAR, cuda, args)[0].impl(*args)
        given = attention_args(dtype, 1, (tokens, tokens), 128, cuda)
        fitting(ATTENTION, cuda, given)[0].impl(*given)

    run(128)
    compiled = compilations(cuda)
    assert compiled
    for tokens in (1, 16, 127, 130):
        run(tokens)
    assert compilations(cuda) == compiled
    x = torch.randn(100, 2048, device=cuda)
    q, scale = torch.ops.wancompile_kernels.quantize_per_token_triton(x, None, dtype)
    weight, weight_scale = torch.ops.wancompile_kernels.quantize_per_token_triton(
        torch.randn(512, 2048, device=cuda), None, dtype
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.wancompile_kernels.quantize_per_token_triton(x, None, dtype)
        torch.ops.wancompile_kernels.linear_hopper(
            q, scale, weight, weight_scale, None, torch.bfloat16
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_quantize_agrees_with_the_cpu(cuda, dtype):
    x, inv_smooth = with_outliers(65, 300, device=cuda), torch.rand(300, device=cuda) + 0.1
    q, scale = ops.quantize_per_token(x, inv_smooth, dtype)
    q_cpu, scale_cpu = ops.quantize_per_token(x.cpu(), inv_smooth.cpu(), dtype)
    torch.testing.assert_close(scale.cpu(), scale_cpu, rtol=1e-6, atol=0)
    # A last bit of the scale may move a value across a tie: one step of int8, one of e4m3.
    step = 1 if dtype == INT8 else q_cpu.float().abs() / 8 + 2**-9
    difference = (q.cpu().float() - q_cpu.float()).abs()
    assert (difference <= step).all()
    assert (difference > 0).float().mean() < 1e-3
    assert (q.float().abs().amax(-1)[:-1] == QMAX[dtype]).all()


def test_observer_agrees_with_the_cpu_and_never_waits(cuda):
    x = with_outliers(400, 24, device=cuda)
    x[200:300] = 0
    label = torch.tensor(1, device=cuda)

    def buffers(device: torch.device | str) -> list[Tensor]:
        count = torch.zeros(2, dtype=torch.int64, device=device)
        priority = torch.full((32,), torch.inf, dtype=torch.float64, device=device)
        return [torch.zeros(2, 24, device=device), count,
                torch.zeros(32, 24, device=device), priority]  # fmt: skip

    ours, theirs = buffers(cuda), buffers("cpu")
    ops.observe_channels(x, *buffers(cuda), label, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.observe_channels(x, *ours, label, 3)
        low = torch.full((2, 4, 24), torch.inf, device=cuda)
        high = torch.full((2, 4, 24), -torch.inf, device=cuda)
        ops.observe_heads(x.view(1, 4, 100, 24), low, high, label, False)
        turned = [torch.full((2, 12, 8), sign * torch.inf, device=cuda) for sign in (1, -1)]
        ops.observe_heads(x.view(1, 12, 100, 8), *turned, label, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ops.observe_channels(x.cpu(), *theirs, label.cpu(), 3)
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got.cpu(), expected)
    assert torch.equal(high[1], x.view(4, 100, 24).amax(1).float())
    assert torch.equal(low[1], x.view(4, 100, 24).amin(1).float())
    exact = hadamard_of(x.view(12, 100, 8).double())
    for found, wanted in zip(turned, (exact.amin(1), exact.amax(1)), strict=True):
        torch.testing.assert_close(found[1].double(), wanted, rtol=1e-5, atol=1e-3)
