"""Which kernel a node gets, and why others leave it alone."""

import pytest
import torch
from kernel_args import (
    ADD_GATED,
    ATTENTION,
    CPU,
    CUDA,
    FLOAT_ROTATE,
    GELU,
    LINEAR,
    LINEAR_GELU,
    LINEAR_RESIDUAL,
    NORM,
    PER_HEAD,
    PER_TENSOR,
    PER_TOKEN,
    RESIDUAL_NORM,
    RMS_NORM,
    ROTATE,
    ROTATE_PER_TOKEN,
    SDPA,
    STREAM_OPS,
    attention_args,
    gelu_args,
    linear_args,
    quantize_args,
    residual_args,
    sdpa_args,
    static_args,
    stream_args,
    with_float64_bias,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from wancompile import kernels
from wancompile.kernels import base, choose, torch_linear
from wancompile.kernels.hopper_linear import LINEAR_HOPPER
from wancompile.quant.numerics import FP8, INT8


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
