"""That every kernel keeps the contract of the op it stands for."""

import inspect

import pytest
import torch
from kernel_args import attention_args, linear_args

from wancompile import ops
from wancompile.kernels import KERNELS, torch_attention, torch_linear
from wancompile.ops import linear
from wancompile.quant.numerics import FP8, INT8


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
