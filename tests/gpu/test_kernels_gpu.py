"""Each kernel against the plain body of its op, on the device it is made for and on fresh data."""

import pytest
import torch
from torch import Tensor

from wancompile import ops
from wancompile.kernels import Kernel, choose
from wancompile.ops import linear
from wancompile.quant.numerics import FP8, INT8, QMAX, absmax_scale

LINEAR = torch.ops.wancompile.scaled_linear.default
ATTENTION = torch.ops.wancompile.scaled_attention.default
SHAPES = [(1, 64, 32), (16, 256, 128), (17, 128, 64), (513, 1536, 8960), (300, 8960, 1536)]


def chosen(op: torch._ops.OpOverload, device: torch.device, args: tuple) -> Kernel:
    kernel, refusals = choose(op, device, args)
    if kernel is None:
        pytest.skip(str(refusals))
    return kernel


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


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_int8_linear_is_the_plain_body_bit_for_bit(cuda, shape, out_dtype):
    args = (*linear_args(shape, INT8, cuda), out_dtype)
    kernel = chosen(LINEAR, cuda, args)
    assert torch.equal(kernel.impl(*args), ops.scaled_linear(*args))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_fp8_linear_is_the_plain_body_to_bf16(cuda, shape, bias):
    args = [*linear_args(shape, FP8, cuda), torch.float32]
    if not bias:
        args[4] = None
    kernel = chosen(LINEAR, cuda, tuple(args))
    # bf16 rounding is 2**-9 of a value; fast accumulation keeps about 14 bits of the running sum.
    assert relative_error(kernel.impl(*args), ops.scaled_linear(*args)) < 2e-3 * (
        1 + shape[1] / 512
    )


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


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("tokens", [(1, 77), (128, 512), (700, 513)])
def test_attention_is_near_the_plain_body_and_float64(cuda, dtype, tokens):
    q, k, v = (torch.randn(1, 4, s, 128, device=cuda) for s in (*tokens, tokens[1]))
    k[..., 5] *= 10
    types = dtype, dtype, FP8
    scales = [
        absmax_scale(t, (0, 2, 3), d).flatten() for t, d in zip((q, k, v), types, strict=True)
    ]
    q8, k8, v8 = (
        ops.quantize_per_head(t, s, d) for t, s, d in zip((q, k, v), scales, types, strict=True)
    )
    args = (q8, k8, v8, *scales, 128**-0.5, torch.bfloat16)
    kernel = chosen(ATTENTION, cuda, args)
    qf, kf, vf = (
        t.double() * s.double()[:, None, None] for t, s in zip(args[:3], scales, strict=True)
    )
    exact = torch.softmax(qf @ kf.transpose(-1, -2) * 128**-0.5, -1) @ vf
    out = kernel.impl(*args)
    assert out.is_contiguous()
    assert relative_error(out, exact) < 0.02
    assert relative_error(ops.scaled_attention(*args), exact) < 0.05
    assert relative_error(out, ops.scaled_attention(*args)) < 0.05


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
        heads = torch.zeros(2, 4, 24, device=cuda)
        ops.observe_heads(x.view(1, 4, 100, 24), heads, label)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ops.observe_channels(x.cpu(), *theirs, label.cpu(), 3)
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got.cpu(), expected)
    assert torch.equal(heads[1], x.view(4, 100, 24).abs().amax(1).float())
