"""Arguments of the ops without values, as far as kernels look at them to say what they take."""

import torch
from torch import Tensor

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
