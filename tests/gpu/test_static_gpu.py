"""Products that round what comes behind GELU, against the op's plain body and float64."""

import faulthandler

import pytest
import torch
import torch.nn.functional as F
from test_kernels_gpu import fitting, linear_args, relative_error
from torch import Tensor

from wancompile import ops
from wancompile.kernels import choose
from wancompile.kernels.hopper_linear_gelu import LINEAR_GELU_QUANTIZE_HOPPER
from wancompile.quant.numerics import FP8, INT8, QMAX

LINEAR = torch.ops.wancompile.scaled_linear.default
LINEAR_GELU = torch.ops.wancompile.linear_gelu_quantize.default
PER_TENSOR = torch.ops.wancompile.quantize_per_tensor.default
DTYPES = [INT8, FP8]
SHAPES = [(5120, 13824), (1536, 8960), (3072, 14336)]  # K, N
TOKENS = (1, 127, 32760, 75600)
ODD = (1552, 208)
SAMPLE = 64  # tokens that are compared with float64
LIMIT_S = 90


@pytest.fixture(autouse=True)
def ends_where_a_barrier_is_wrong():
    """Such a kernel hangs, and no exception reaches whoever waits for it; this ends the process."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def gelu_args(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    form: str = "tanh",
    smooth: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple:
    """Arguments of the op for `shape` (tokens, K, N); a scale that a few values are beyond."""
    linear = linear_args(shape, dtype, device)
    inverse = torch.rand(shape[2], device=device) + 0.5 if smooth else None
    y = F.gelu(ops.scaled_linear(*linear, torch.float32), approximate=form)
    top = (y if inverse is None else y * inverse).abs().amax().clamp_min(1e-3)
    to = out_dtype or dtype
    return *linear, form, inverse, (0.8 * top / QMAX[to]).reshape(1), to


def run(args: tuple) -> Tensor:
    """What the Hopper kernel computes; skips where it does not fit."""
    reason = LINEAR_GELU_QUANTIZE_HOPPER.supports(args[0].device, args)
    if reason:
        pytest.skip(reason)
    return LINEAR_GELU_QUANTIZE_HOPPER.impl(*args)


def exact(args: tuple, rows: Tensor) -> Tensor:
    """What is rounded, in float64 and saturated, of some rows."""
    x, x_scale, w, w_scale, bias, form, inverse, scale, dtype = args
    x_scale = x_scale.expand(len(x), 1)[rows] if x_scale.dim() == 1 else x_scale[rows]
    y = (x[rows].double() @ w.double().t()) * x_scale.double() * w_scale.double().t()
    y = F.gelu(y if bias is None else y + bias.double(), approximate=form)
    y = y if inverse is None else y * inverse.double()
    top = QMAX[dtype] * scale.double()
    return y.clamp(-top, top)


def sampled(out: Tensor) -> Tensor:
    return torch.linspace(0, len(out) - 1, SAMPLE, device=out.device).long().unique()


def assert_codes(ours: Tensor, plain: Tensor) -> None:
    """Only what lies between two 8-bit numbers may fall on either side."""
    assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
    assert ours.is_contiguous()
    for a, b in zip(ours.split(4096), plain.split(4096), strict=True):
        a, b = a.float(), b.float()
        step = 1 if plain.dtype == INT8 else b.abs() / 8 + 2**-9
        assert ((a - b).abs() <= step).all()
    differs = ours.view(torch.uint8) != plain.view(torch.uint8)
    assert differs.float().mean() < 1e-3 + 2 / differs.numel()


def assert_no_farther(out: Tensor, args: tuple) -> None:
    """e4m3: a running sum of 14 bits may add as much to the error as `scaled_linear` is allowed."""
    rows, scale = sampled(out), args[7].double()
    wanted, plain = exact(args, rows), ops.linear_gelu_quantize(*args)[rows]
    ours, theirs = (relative_error(one.double() * scale, wanted) for one in (out[rows], plain))
    sums = 2e-3 * args[0].shape[-1] / 512
    assert ours < ((1.02 * theirs) ** 2 + sums**2) ** 0.5


@pytest.mark.parametrize("shape", [*SHAPES, ODD])
def test_int8_is_the_plain_body(cuda, shape):
    for tokens in TOKENS:
        args = gelu_args((tokens, *shape), INT8, cuda)
        assert_codes(run(args), ops.linear_gelu_quantize(*args))


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_as_near_float64_as_its_sums(cuda, shape):
    for tokens in TOKENS:
        args = gelu_args((tokens, *shape), FP8, cuda)
        assert_no_farther(run(args), args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_other_kernel_computes_the_same(cuda, dtype):
    for tokens in (1, 333):
        args = gelu_args((tokens, *ODD), dtype, cuda)
        for kernel in fitting(LINEAR_GELU, cuda, args):
            assert_no_farther(kernel.impl(*args), args)


def test_erf_without_smoothing_or_bias_into_the_other_type(cuda):
    x, x_scale, w, w_scale, _, *rest = gelu_args((333, *ODD), INT8, cuda, "none", False, FP8)
    args = x, x_scale, w, w_scale, None, *rest
    assert_codes(run(args), ops.linear_gelu_quantize(*args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_scale_for_all_tokens(cuda, dtype):
    """Every kernel of a linear reads it, and computes what it does with that scale per token."""
    x, _, w, w_scale, bias, *rest = gelu_args((333, *ODD), dtype, cuda)
    one, each = torch.full((1,), 0.01, device=cuda), torch.full((333, 1), 0.01, device=cuda)
    args = x, one, w, w_scale, bias, torch.bfloat16
    for kernel in fitting(LINEAR, cuda, args):
        assert torch.equal(kernel.impl(*args), kernel.impl(x, each, *args[2:])), kernel.name
    assert torch.equal(
        *(run((x, scale, w, w_scale, bias, *rest)).view(torch.uint8) for scale in (one, each))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smooth", [True, False])
def test_quantize_per_tensor_is_the_plain_body_bit_for_bit(cuda, dtype, smooth):
    x = torch.randn(333, 13824, device=cuda, dtype=torch.bfloat16)
    inverse = torch.rand(13824, device=cuda) + 0.5 if smooth else None
    args = x, inverse, torch.full((1,), 2.5 / QMAX[dtype], device=cuda), dtype
    plain = ops.quantize_per_tensor(*(a.cpu() if isinstance(a, Tensor) else a for a in args))
    for kernel in fitting(PER_TENSOR, cuda, args):
        assert torch.equal(kernel.impl(*args).cpu().view(torch.uint8), plain.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_agree_and_nothing_beyond_the_rows_is_written(cuda, dtype):
    args = gelu_args((32760, *ODD), dtype, cuda)
    first = run(args).view(torch.uint8)
    assert all(torch.equal(run(args).view(torch.uint8), first) for _ in range(10))
    from wancompile.kernels.jit import linear_hopper
    from wancompile.kernels.jit.activation import Gelu

    x, x_scale, *rest = args
    for rows in (1, 64, 127, 333):
        memory = torch.full((rows + 64, ODD[1]), 17, device=cuda).to(dtype)
        linear_hopper.launch(
            x[:rows], x_scale[:rows], *rest[:3], memory[:rows], activation=Gelu(*rest[3:6])
        )
        assert torch.equal(memory[:rows].view(torch.uint8), first[:rows])
        assert (memory[rows:].float() == memory[-1, -1].float()).all()


def test_no_waiting_and_one_compilation_for_all_lengths(cuda):
    from wancompile.kernels.jit import linear_hopper

    args = gelu_args((130, *ODD), INT8, cuda)
    run(args)
    cache = linear_hopper._linear_hopper.device_caches[cuda.index][0]
    compiled = len(cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for tokens in (1, 16, 127):
            run((args[0][:tokens], args[1][:tokens], *args[2:]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(cache) == compiled


def test_shapes_that_no_kernel_takes_are_named(cuda):
    args = gelu_args((5, 24, 40), INT8, cuda)
    kernel, reasons = choose(LINEAR_GELU, cuda, args)
    assert kernel is None
    assert all("not a multiple of 16" in reason or "needs" in reason for _, reason in reasons)
