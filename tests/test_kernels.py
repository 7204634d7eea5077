"""Which kernel a node gets, and that every kernel keeps the contract of the op it stands for."""

import inspect

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from wancompile import kernels, ops
from wancompile.kernels import KERNELS, base, choose, torch_attention, torch_linear
from wancompile.kernels.hopper_linear import LINEAR_HOPPER
from wancompile.ops import linear
from wancompile.quant.numerics import FP8, INT8

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
LINEAR = torch.ops.wancompile.scaled_linear.default
LINEAR_RESIDUAL = torch.ops.wancompile.scaled_linear_residual.default
LINEAR_GELU = torch.ops.wancompile.linear_gelu_quantize.default
PER_TENSOR = torch.ops.wancompile.quantize_per_tensor.default
ATTENTION = torch.ops.wancompile.scaled_attention.default
PER_TOKEN = torch.ops.wancompile.quantize_per_token.default
PER_HEAD = torch.ops.wancompile.quantize_per_head.default
GELU = torch.ops.wancompile.gelu_quantize.default
NORM = torch.ops.wancompile.norm_quantize.default
RESIDUAL_NORM = torch.ops.wancompile.residual_norm_quantize.default
ADD_GATED = torch.ops.wancompile.add_gated.default
ROTATE = torch.ops.wancompile.norm_rotate_quantize.default
ROTATE_PER_TOKEN = torch.ops.wancompile.norm_rotate_quantize_per_token.default
FLOAT_ROTATE = torch.ops.wancompile.norm_rotate.default
RMS_NORM = torch.ops.aten.rms_norm.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default
STREAM_OPS = GELU, NORM, RESIDUAL_NORM, ADD_GATED, ROTATE, FLOAT_ROTATE, RMS_NORM


def linear_args(dtype: torch.dtype, k: int = 64, n: int = 32, m: int = 5) -> tuple:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w = empty(m, k, dtype=dtype), empty(n, k, dtype=dtype)
    return x, empty(m, 1), w, empty(n, 1), None, torch.bfloat16


def residual_args(dtype: torch.dtype, k: int = 64, stream: torch.dtype = torch.bfloat16) -> tuple:
    x, x_scale, w, w_scale, bias, _ = linear_args(dtype, k)
    residual = torch.empty(1, *x.shape[:1], w.shape[0], dtype=stream, device="meta")
    return x[None], x_scale[None], w, w_scale, bias, residual, None


def gelu_args(dtype: torch.dtype, **sizes: int) -> tuple:
    *linear, _ = linear_args(dtype, **sizes)
    return *linear, "tanh", None, torch.empty(1, device="meta"), dtype


def static_args(dtype: torch.dtype, k: int = 64) -> tuple:
    x, smooth, _ = quantize_args(dtype, k)
    return x, smooth, torch.empty(1, device="meta"), dtype


def attention_args(
    head_size: int = 64, softmax_scale: float = 0.1, out_dtype: torch.dtype = torch.bfloat16
) -> tuple:
    q = torch.empty(1, 2, 3, head_size, dtype=INT8, device="meta")
    v, scale = q.to(FP8), torch.empty(2, device="meta")
    return q, q, v, scale, scale, scale, softmax_scale, out_dtype


def quantize_args(dtype: torch.dtype, k: int = 64) -> tuple:
    return torch.empty(1, 2, 3, k, device="meta"), None, dtype


def stream_args(op, dtype: torch.dtype = INT8, channels: int = 64) -> tuple:
    """Arguments of the ops that see whole tokens, as far as kernels look at them."""
    x = torch.empty(1, 3, channels, dtype=torch.bfloat16, device="meta")
    scale, angles = torch.empty(2, device="meta"), torch.empty(3, channels // 4, device="meta")
    return {
        GELU: (x, "tanh", None, dtype),
        NORM: (x, *[None] * 5, 1e-6, None, dtype),
        RESIDUAL_NORM: (x, x, *[None] * 7, 1e-6, None, dtype),
        ADD_GATED: (x, x, None, None, None),
        ROTATE: (x, None, 1e-6, angles, angles, None, scale, False, dtype),
        ROTATE_PER_TOKEN: (x, None, 1e-6, angles, angles, True, dtype),
        FLOAT_ROTATE: (x, None, 1e-6, angles, angles, torch.bfloat16),
        RMS_NORM: (x, [channels], None, 1e-6),
    }[op]


def sdpa_args(head_size: int = 64, dtype: torch.dtype = torch.bfloat16, **changed) -> tuple:
    q = torch.empty(1, 2, 3, head_size, dtype=dtype, device="meta")
    given = {"mask": None, "dropout": 0.0, "causal": False, "scale": None, "gqa": False} | changed
    return q, q, q, *given.values()


def with_float64_bias(args: tuple) -> tuple:
    return *args[:4], torch.empty(args[2].shape[0], dtype=torch.float64, device="meta"), args[5]


@pytest.fixture
def hopper(monkeypatch):
    give(monkeypatch, (9, 0))


def give(monkeypatch, capability, reason_against_triton=None):
    monkeypatch.setattr(base, "capability", lambda device: capability)
    monkeypatch.setattr(base, "lacks_triton", lambda: reason_against_triton)


@pytest.mark.parametrize(
    ("capability", "op", "args", "name"),
    [
        ((9, 0), LINEAR, linear_args(FP8, k=5120), "linear_hopper"),
        ((9, 0), LINEAR, linear_args(FP8, k=1536), "fp8_linear_scaled_mm"),
        ((9, 0), LINEAR, linear_args(INT8), "linear_hopper"),
        ((9, 0), LINEAR_RESIDUAL, residual_args(INT8), "linear_residual_hopper"),
        ((9, 0), LINEAR_RESIDUAL, residual_args(FP8, k=5120), "linear_residual_hopper"),
        ((9, 0), LINEAR_GELU, gelu_args(INT8), "linear_gelu_quantize_hopper"),
        ((9, 0), LINEAR_GELU, gelu_args(FP8, k=1536), "linear_gelu_quantize_hopper"),
        ((9, 0), LINEAR, with_float64_bias(linear_args(FP8)), "fp8_linear_scaled_mm"),
        ((8, 9), LINEAR, linear_args(FP8), "fp8_linear_scaled_mm"),
        ((10, 0), LINEAR, linear_args(FP8), "fp8_linear_scaled_mm"),
        ((9, 0), LINEAR, linear_args(INT8, k=72, n=8), "int8_linear_int_mm"),
        ((8, 0), LINEAR, linear_args(INT8), "int8_linear_int_mm"),
        ((9, 0), ATTENTION, attention_args(), "attention_hopper"),
        ((9, 0), ATTENTION, attention_args(128), "attention_hopper"),
        ((9, 0), ATTENTION, attention_args(80), "attention_dequantize_sdpa"),
        ((8, 9), ATTENTION, attention_args(), "attention_dequantize_sdpa"),
        ((8, 0), PER_TOKEN, quantize_args(INT8), "quantize_per_token_triton"),
        ((8, 9), PER_TOKEN, quantize_args(FP8, 16384), "quantize_per_token_triton"),
        ((8, 0), PER_TENSOR, static_args(INT8), "quantize_per_tensor_triton"),
        ((8, 9), PER_TENSOR, static_args(FP8), "quantize_per_tensor_triton"),
        ((8, 0), PER_HEAD, quantize_args(INT8), "quantize_per_head_triton"),
        ((8, 9), PER_HEAD, quantize_args(FP8), "quantize_per_head_triton"),
        ((8, 0), GELU, stream_args(GELU), "gelu_quantize_triton"),
        ((8, 9), NORM, stream_args(NORM, FP8, 5120), "norm_quantize_triton"),
        ((8, 9), RESIDUAL_NORM, stream_args(RESIDUAL_NORM, FP8), "residual_norm_quantize_triton"),
        ((8, 0), ADD_GATED, stream_args(ADD_GATED), "add_gated_triton"),
        ((8, 9), ROTATE, stream_args(ROTATE, FP8), "norm_rotate_quantize_triton"),
        (
            (8, 0),
            ROTATE_PER_TOKEN,
            stream_args(ROTATE_PER_TOKEN),
            "norm_rotate_quantize_per_token_triton",
        ),
        ((8, 0), FLOAT_ROTATE, stream_args(FLOAT_ROTATE), "norm_rotate_triton"),
        ((8, 0), RMS_NORM, stream_args(RMS_NORM), "rms_norm_triton"),
        ((9, 0), SDPA, sdpa_args(128), "attention_cudnn"),
        ((10, 0), SDPA, sdpa_args(64, torch.float16), "attention_cudnn"),
    ],
)
def test_a_gpu_gets_a_kernel(monkeypatch, capability, op, args, name):
    give(monkeypatch, capability)
    kernel, _ = choose(op, CUDA, args)
    assert kernel is not None
    assert kernel.name == name


@pytest.mark.parametrize(
    ("op", "args", "name", "reason"),
    [
        (LINEAR, linear_args(FP8, k=72), "linear_triton", "K=72 is not a multiple of 16"),
        (LINEAR, linear_args(FP8, k=1536), "linear_hopper", "torch is faster for e4m3"),
        (
            LINEAR_RESIDUAL,
            residual_args(FP8, k=1536),
            "linear_residual_hopper",
            "torch is faster for e4m3",
        ),
        (
            LINEAR_RESIDUAL,
            residual_args(INT8, stream=torch.float64),
            "linear_residual_hopper",
            "residual is torch.float64",
        ),
        (LINEAR_GELU, gelu_args(INT8, n=8), "linear_gelu_quantize_hopper", "N=8 is not a multiple"),
        (LINEAR_GELU, gelu_args(FP8, k=72), "linear_gelu_quantize_triton", "K=72 is not a multi"),
        (PER_TENSOR, static_args(INT8, 16385), "quantize_per_tensor_triton", "more than 16384"),
        (LINEAR, linear_args(INT8, n=8), "linear_triton", "N=8 is not a multiple of 16"),
        (LINEAR, with_float64_bias(linear_args(INT8)), "linear_triton", "bias is torch.float64"),
        (LINEAR, (*linear_args(INT8)[:5], torch.float64), "linear_triton", "output is torch.float"),
        (ATTENTION, attention_args(16), "attention_triton", "head size of 64 or 128, not 16"),
        (ATTENTION, attention_args(64, 0.0), "attention_triton", "positive softmax scale, not 0"),
        (ATTENTION, attention_args(64, 1.0, torch.float64), "attention_triton", "output is torch"),
        (PER_TOKEN, quantize_args(INT8, 16385), "quantize_per_token_triton", "more than 16384"),
        (PER_HEAD, quantize_args(INT8, 512), "quantize_per_head_triton", "more than 256"),
        (GELU, stream_args(GELU, channels=16388), "gelu_quantize_triton", "more than 16384"),
        (NORM, stream_args(NORM, channels=16388), "norm_quantize_triton", "more than 16384"),
        (ROTATE, stream_args(ROTATE, channels=16388), "norm_rotate_quantize_triton", "more than"),
        (
            ROTATE_PER_TOKEN,
            stream_args(ROTATE_PER_TOKEN, channels=16388),
            "norm_rotate_quantize_per_token_triton",
            "more than",
        ),
        (
            FLOAT_ROTATE,
            stream_args(FLOAT_ROTATE, channels=16388),
            "norm_rotate_triton",
            "more than",
        ),
        (ADD_GATED, stream_args(ADD_GATED, channels=16388), "add_gated_triton", "more than"),
        (RMS_NORM, stream_args(RMS_NORM, channels=16388), "rms_norm_triton", "more than"),
        (RMS_NORM, (*stream_args(RMS_NORM)[:1], [3, 64], None, None), "rms_norm_triton", "over 2"),
        (SDPA, sdpa_args(136), "attention_cudnn", "head size=136 is more than 128"),
        (SDPA, sdpa_args(12), "attention_cudnn", "head size=12 is not a multiple of 8"),
        (SDPA, sdpa_args(64, torch.float32), "attention_cudnn", "16-bit floats, not torch.float32"),
        (SDPA, sdpa_args(mask=torch.empty(3, 3)), "attention_cudnn", "neither mask nor dropout"),
        (SDPA, sdpa_args(dropout=0.1), "attention_cudnn", "neither mask nor dropout"),
        (SDPA, sdpa_args(causal=True), "attention_cudnn", "neither causal nor grouped"),
        (SDPA, sdpa_args(gqa=True), "attention_cudnn", "neither causal nor grouped"),
        (
            SDPA,
            tuple(one[0] if isinstance(one, Tensor) else one for one in sdpa_args()),
            "attention_cudnn",
            "not 3 dims",
        ),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_a_triton_kernel_says_why_it_leaves_a_node_to_others(op, args, name, reason):
    kernel, refusals = choose(op, CUDA, args)
    assert kernel is None or kernel.name != name
    assert reason in dict(refusals)[name]


@pytest.mark.parametrize(
    ("capability", "name", "op", "args", "reason"),
    [
        ((8, 9), "linear_triton", LINEAR, linear_args(INT8), "needs compute capability 9.0"),
        ((10, 0), "linear_triton", LINEAR, linear_args(INT8), "is made for compute capability 9.0"),
        ((8, 0), "attention_triton", ATTENTION, attention_args(), "needs compute capability 9.0"),
        ((8, 9), "linear_gelu_quantize_hopper", LINEAR_GELU, gelu_args(INT8), "capability 9.0"),
        ((8, 6), "quantize_per_tensor_triton", PER_TENSOR, static_args(FP8), "capability 8.9"),
        ((8, 6), "quantize_per_head_triton", PER_HEAD, quantize_args(FP8), "capability 8.9"),
        ((7, 5), "quantize_per_head_triton", PER_HEAD, quantize_args(INT8), "capability 8.0"),
        ((8, 6), "gelu_quantize_triton", GELU, stream_args(GELU, FP8), "capability 8.9"),
        ((8, 6), "norm_quantize_triton", NORM, stream_args(NORM, FP8), "capability 8.9"),
        ((8, 6), "norm_rotate_quantize_triton", ROTATE, stream_args(ROTATE, FP8), "8.9"),
        ((7, 5), "norm_rotate_triton", FLOAT_ROTATE, stream_args(FLOAT_ROTATE), "capability 8.0"),
        ((7, 5), "add_gated_triton", ADD_GATED, stream_args(ADD_GATED), "capability 8.0"),
        ((7, 5), "rms_norm_triton", RMS_NORM, stream_args(RMS_NORM), "capability 8.0"),
        ((8, 9), "attention_cudnn", SDPA, sdpa_args(), "capability 9.0"),
    ],
)
def test_a_triton_kernel_names_the_device_it_needs(monkeypatch, capability, name, op, args, reason):
    give(monkeypatch, capability)
    assert reason in dict(choose(op, CUDA, args)[1])[name]


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (LINEAR, linear_args(INT8)),
        (ATTENTION, attention_args()),
        (PER_TOKEN, quantize_args(INT8)),
        *[(op, stream_args(op)) for op in STREAM_OPS],
    ],
)
def test_without_triton_the_other_kernels_stay(monkeypatch, op, args):
    give(monkeypatch, (9, 0), "the package triton is missing")
    kernel, refusals = choose(op, CUDA, args)
    assert kernel is None or "triton" not in kernel.name
    assert "the package triton is missing" in dict(refusals).values()


@pytest.mark.parametrize(
    ("capability", "op", "args", "name", "reason"),
    [
        ((8, 6), LINEAR, linear_args(FP8), "fp8_linear_scaled_mm", "capability 8.9, not 8.6"),
        ((7, 5), LINEAR, linear_args(INT8), "int8_linear_int_mm", "capability 8.0, not 7.5"),
        ((9, 0), LINEAR, linear_args(FP8, k=72), "fp8_linear_scaled_mm", "K=72 is not a mult"),
        ((9, 0), LINEAR, linear_args(FP8, n=8), "fp8_linear_scaled_mm", "N=8 is not a multiple"),
        ((9, 0), LINEAR, linear_args(INT8, n=4), "int8_linear_int_mm", "N=4 is not a multiple"),
        ((9, 0), LINEAR, linear_args(INT8, n=4), "fp8_linear_scaled_mm", "takes torch.float8"),
        ((7, 0), ATTENTION, attention_args(), "attention_dequantize_sdpa", "capability 8.0"),
        ((9, 0), ATTENTION, attention_args(12), "attention_dequantize_sdpa", "head size=12"),
        (None, ATTENTION, attention_args(), "attention_dequantize_sdpa", "needs a CUDA device"),
    ],
)
def test_a_kernel_that_does_not_fit_says_why(monkeypatch, capability, op, args, name, reason):
    give(monkeypatch, capability)
    kernel, refusals = choose(op, CUDA, args)
    assert kernel is None
    assert reason in dict(refusals)[name]


def test_a_cpu_keeps_the_plain_bodies():
    assert base.capability(CPU) is None
    for op, args in [
        (LINEAR, linear_args(FP8)),
        (ATTENTION, attention_args()),
        (PER_TOKEN, quantize_args(INT8)),
        (PER_HEAD, quantize_args(FP8)),
        *[(op, stream_args(op)) for op in STREAM_OPS],
        (SDPA, sdpa_args()),
    ]:
        kernel, refusals = choose(op, CPU, args)
        assert kernel is None
        assert refusals
        assert all(reason == "needs a CUDA device, not cpu" for _, reason in refusals)
    no_kernels = choose(torch.ops.wancompile.observe_heads.default, CPU, ())
    assert no_kernels == (None, [])


@pytest.mark.usefixtures("hopper")
def test_the_first_fitting_kernel_of_the_table_wins(monkeypatch):
    real = torch_linear.INT8_LINEAR_INT_MM
    first = base.Kernel("first", LINEAR, real.impl, lambda device, args: None)
    refusing = base.Kernel("refusing", LINEAR, real.impl, lambda device, args: "it is a test")
    monkeypatch.setattr(kernels, "KERNELS", (refusing, first, real))
    assert choose(LINEAR, CUDA, linear_args(INT8)) == (first, [("refusing", "it is a test")])


@pytest.mark.usefixtures("hopper")
def test_symbolic_tokens_are_no_obstacle_and_symbolic_features_are():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x, *rest = linear_args(INT8, m=48)
    x = mode.from_tensor(torch.empty(48, 64, dtype=INT8))
    assert not isinstance(x.shape[0], int)
    kernel, _ = choose(LINEAR, CUDA, (x, *rest))
    assert kernel is LINEAR_HOPPER
    rest[1] = mode.from_tensor(torch.empty(40, 64, dtype=INT8))
    assert dict(choose(LINEAR, CUDA, (x, *rest))[1])["linear_triton"] == "K is not static"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_has_the_schema_of_its_op(kernel):
    assert kernel.impl.namespace == "wancompile_kernels"
    assert kernel.impl._schema.name == f"wancompile_kernels::{kernel.name}"
    ours, theirs = (op._schema for op in (kernel.impl, kernel.op))
    # Defaults and "by keyword only" do not matter: `lower` gives every argument by position.
    assert [(a.name, str(a.type)) for a in ours.arguments] == [
        (a.name, str(a.type)) for a in theirs.arguments
    ]
    assert [str(r.type) for r in ours.returns] == [str(r.type) for r in theirs.returns]


def test_names_are_unique_and_documented():
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    for module in (torch_linear, torch_attention):
        assert inspect.getdoc(module)


def operands(dtype: torch.dtype, m: int, k: int, n: int) -> tuple:
    x, w = torch.randn(m, k), torch.randn(n, k)
    x[:, 3] *= 40
    quantized = [ops.quantize_per_token(t, None, dtype) for t in (x, w)]
    return *quantized[0], *quantized[1], torch.randn(n)


@pytest.mark.skipif(not linear._int_mm_is_exact(), reason="this CPU's torch._int_mm saturates")
@pytest.mark.parametrize("m", [1, 16, 17, 40])
def test_int_mm_kernel_is_the_plain_body_bit_for_bit(m):
    args = *operands(INT8, m, 16, 24), torch.float32
    assert torch.equal(torch_linear.int8_linear_int_mm(*args), ops.scaled_linear(*args))


@pytest.mark.parametrize("bias", [True, False])
def test_scaled_mm_kernel_is_the_plain_body_to_bf16(bias):
    args = [*operands(FP8, 6, 32, 16), torch.float32]
    if not bias:
        args[4] = None
    out, plain = torch_linear.fp8_linear_scaled_mm(*args), ops.scaled_linear(*args)
    torch.testing.assert_close(out, plain, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("in_bf16", [False, True])
def test_sdpa_kernel_takes_a_scale_for_each_query(in_bf16):
    q, k, v = torch.randn(3, 2, 4, 50, 16)
    q8, q_scale = ops.quantize_per_token(q, None, INT8)
    scale = torch.full((4,), 4.0)
    k8 = ops.quantize_per_head(k, scale / 127, INT8)
    args = q8, k8, v, q_scale, scale / 127, None if in_bf16 else scale / 448, 0.25, torch.float32
    out, plain = torch_attention.attention_dequantize_sdpa(*args), ops.scaled_attention(*args)
    assert (out - plain).norm() / plain.norm() < (0.01 if in_bf16 else 0.03)


def test_sdpa_kernel_is_near_the_plain_body():
    q, k, v = torch.randn(3, 2, 4, 50, 16)
    scale = torch.full((4,), 4.0)
    q8, k8 = (ops.quantize_per_head(t, scale / 127, INT8) for t in (q, k))
    v8 = ops.quantize_per_head(v, scale / 448, FP8)
    args = q8, k8, v8, scale / 127, scale / 127, scale / 448, 0.25, torch.float32
    out, plain = torch_attention.attention_dequantize_sdpa(*args), ops.scaled_attention(*args)
    assert (out - plain).norm() / plain.norm() < 0.03
    assert out.stride() == plain.stride()
    floating = (*args[:2], v, *args[3:])
    assert torch.equal(torch_attention.attention_dequantize_sdpa(*floating), out)


def test_cudnn_kernel_tells_the_layout_that_torch_gives():
    merged = torch.empty(2, 7, 3, 4, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 4, 9, 64, dtype=torch.bfloat16, device="meta")
    for q in (
        merged[:, :, 0].transpose(1, 2),
        k,
        k.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    ):
        out = torch_attention.attention_cudnn(q, k, k, None, 0.0, False, None, False)
        real = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, k, None, False)[0]
        assert (out.shape, out.dtype, out.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_to_a_single_key_is_left_to_torch(scale):
    q, k, v = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 1, 16), torch.randn(2, 3, 1, 16)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = torch_attention.attention_cudnn(q, k, v, None, 0.0, False, scale, False)
    torch.testing.assert_close(out, v.expand(q.shape))
    assert out.stride() == q.stride()


def test_kernel_fakes_tell_shapes():
    args = linear_args(INT8)
    for op in (torch_linear.int8_linear_int_mm, torch_linear.fp8_linear_scaled_mm):
        out = op(*args)
        assert (out.shape, out.dtype) == ((5, 32), torch.bfloat16)
    out = torch_attention.attention_dequantize_sdpa(*attention_args())
    assert (out.shape, out.dtype) == ((1, 2, 3, 64), torch.bfloat16)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (torch_linear.int8_linear_int_mm, (*operands(INT8, 5, 16, 8), torch.bfloat16)),
        (torch_linear.fp8_linear_scaled_mm, (*operands(FP8, 5, 16, 16), torch.bfloat16)),
    ],
)
def test_kernel_is_a_good_library_op(op, args):
    # torch's schema check compares the arguments by allclose, which no CPU has for e4m3.
    torch.library.opcheck(op, args, test_utils=("test_autograd_registration", "test_faketensor"))
