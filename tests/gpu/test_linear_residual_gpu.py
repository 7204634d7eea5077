"""The Hopper product that adds the residual stream itself, against the plain body and float64."""

import faulthandler
import itertools

import pytest
import torch
from test_kernels_gpu import linear_args, relative_error
from torch import Tensor

from wancompile import ops
from wancompile.kernels.hopper_linear import LINEAR_RESIDUAL_HOPPER
from wancompile.quant.numerics import FP8, INT8

GATES = ("none", "shared", "per video")
TOKENS = (1, 127, 333, 32760)  # edges of tiles, fewer tiles than programs, and many for each
STREAM = 3.0  # what the outputs of these linears are on average, so that neither term hides
LIMIT_S = 90


@pytest.fixture(autouse=True)
def ends_where_a_barrier_is_wrong():
    """Such a kernel hangs, and no exception reaches whoever waits for it; this ends the process."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def residual_args(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    gate: str = "per video",
    bias: bool = True,
    stream: torch.dtype = torch.bfloat16,
) -> tuple:
    """Arguments of the op for `shape` (batch, tokens, K, N)."""
    batch, tokens, depth, features = shape
    x, x_scale, w, w_scale, some_bias = linear_args(
        (batch * tokens, depth, features), dtype, device
    )
    residual = STREAM * torch.randn(batch, tokens, features, device=device)
    gates = {
        "none": None,
        "shared": torch.randn(features, device=device, dtype=torch.bfloat16),
        "per video": torch.randn(batch, 6, features, device=device)[:, 2:3],  # as Wan cuts it
    }
    return (
        x.view(batch, tokens, depth),
        x_scale.view(batch, tokens, 1),
        w,
        w_scale,
        some_bias if bias else None,
        residual.to(stream),
        gates[gate],
    )


def run(args: tuple) -> Tensor:
    """What the kernel computes; skips where it does not fit."""
    reason = LINEAR_RESIDUAL_HOPPER.supports(args[0].device, args)
    if reason:
        pytest.skip(reason)
    return LINEAR_RESIDUAL_HOPPER.impl(*args)


@pytest.mark.parametrize("features", [5120, 208])
@pytest.mark.parametrize("depth", [5120, 1552, 128])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_the_plain_body_bit_for_bit(cuda, features, depth, gate, bias):
    for batch, tokens in itertools.product((1, 2), TOKENS):
        args = residual_args((batch, tokens, depth, features), INT8, cuda, gate, bias)
        out = run(args)
        assert out.is_contiguous()
        assert torch.equal(out, ops.scaled_linear_residual(*args)), (batch, tokens)


@pytest.mark.parametrize("stream", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [(1, 333, 1552, 208), (2, 127, 128, 5120), (1, 9000, 272, 1040), (1, 75600, 1536, 1536)],
)
def test_int8_is_the_plain_body_for_other_streams(cuda, stream, shape):
    args = residual_args(shape, INT8, cuda, stream=stream)
    out = run(args)
    assert out.dtype == stream
    assert torch.equal(out, ops.scaled_linear_residual(*args))


@pytest.mark.parametrize(
    "shape",
    [(1, 32760, 5120, 5120), (1, 75600, 1536, 1536), (2, 333, 1552, 208), (1, 1, 5120, 208)],
)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_fp8_is_float64_as_near_as_without_a_residual(cuda, shape, gate, stream):
    args = residual_args(shape, FP8, cuda, gate, gate != "none", stream)
    x, x_scale, w, w_scale, bias, residual, factor = args
    exact = (x.double() @ w.double().t()) * x_scale.double() * w_scale.double().t()
    if bias is not None:
        exact += bias.double()
    if factor is not None:
        exact *= factor.double()
    exact += residual.double()
    # As in test_kernels_gpu: rounding to bf16, and 14 bits of the running sum.
    assert relative_error(run(args), exact) < 2e-3 * (1 + shape[2] / 512)


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize(("depth", "runs"), [(1536 + 16, 10), (528, 20), (512, 20), (128, 50)])
def test_runs_agree_however_short_the_product_is(cuda, dtype, depth, runs):
    """A short product leaves little time between the stores of a tile and the next one's loads."""
    if dtype == FP8 and depth <= 1536:
        pytest.skip("torch is faster")
    args = residual_args((1, 32760, depth, 5120), dtype, cuda)
    first = run(args)
    assert all(torch.equal(run(args), first) for _ in range(runs))
    if dtype == INT8:
        assert torch.equal(first, ops.scaled_linear_residual(*args))


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 64, 127, 333])
def test_nothing_beyond_the_rows_is_read_or_written(cuda, dtype, stream, rows):
    args = residual_args((1, rows, 2048, 208), dtype, cuda, stream=stream)
    plain = run(args)
    from wancompile.kernels.jit import linear_hopper

    x, x_scale, w, w_scale, bias, residual, gate = args
    memory = torch.full((2, rows + 64, 208), torch.nan, device=cuda, dtype=stream)
    out, added = memory[:, :rows]
    added.copy_(residual[0])
    sides = x[0], x_scale[0], w, w_scale, bias
    linear_hopper.launch(*sides, out, residual=added, gate=gate[0, 0])
    assert torch.equal(out, plain[0])
    assert memory[:, rows:].isnan().all()


def test_a_stream_that_lies_otherwise_is_copied(cuda):
    x, x_scale, w, w_scale, bias, residual, gate = residual_args((2, 33, 256, 64), INT8, cuda)
    turned = residual.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    shifted = torch.empty(residual.numel() + 1, device=cuda, dtype=residual.dtype)[1:]
    shifted = shifted.view_as(residual).copy_(residual)
    plain = ops.scaled_linear_residual(x, x_scale, w, w_scale, bias, residual, gate)
    for stream in (turned, shifted):
        out = run((x, x_scale, w, w_scale, bias, stream, gate))
        assert torch.equal(out, plain)


def test_a_stream_of_64_bits_is_refused(cuda):
    args = residual_args((1, 5, 256, 64), INT8, cuda, stream=torch.float64)
    assert "the residual is torch.float64" in LINEAR_RESIDUAL_HOPPER.supports(cuda, args)


def test_it_never_waits_for_the_gpu_and_compiles_once_for_all_lengths(cuda):
    run(residual_args((1, 128, 2048, 512), INT8, cuda))
    from wancompile.kernels.jit import linear_hopper

    cache = linear_hopper._linear_hopper.device_caches[cuda.index][0]
    compiled = len(cache)
    lengths = [residual_args((1, tokens, 2048, 512), INT8, cuda) for tokens in (1, 16, 127, 130)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for args in lengths:
            run(args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(cache) == compiled
