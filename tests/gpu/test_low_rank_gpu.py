"""Branches of low rank on the GPU, against float64; bf16, which the interpreter cannot multiply."""

import pytest
import torch
from test_kernels_gpu import linear_args, relative_error

from wancompile import ops
from wancompile.kernels.triton_low_rank import LINEAR_LOW_RANK_TRITON, LOW_RANK_DOWN_TRITON
from wancompile.quant.numerics import FP8, INT8

LINEAR_LOW_RANK = torch.ops.wancompile.scaled_linear_low_rank.default
LOW_RANK_DOWN = torch.ops.wancompile.low_rank_down.default
SHAPES = [  # M, K, N, R: edges of tiles, then q, k, v of Wan's at rank 32
    (1, 64, 32, 16),
    (127, 1536, 272, 48),
    (333, 13824, 5120, 32),
    (32760, 5120, 15360, 96),
]
KINDS = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}


def low_rank_args(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    kind: torch.dtype,
    device: torch.device,
) -> tuple:
    m, k, n, r = shape
    low, up = torch.randn(m, r, device=device), torch.randn(n, r, device=device)
    return *linear_args((m, k, n), dtype, device), low.to(kind), up.to(kind)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_down_is_near_float64(cuda, dtype, kind, shape):
    m, k, n, r = shape
    x, x_scale, *_ = linear_args((m, k, n), dtype, cuda)
    down = (torch.randn(r, k, device=cuda) / k**0.5).to(kind)
    reason = LOW_RANK_DOWN_TRITON.supports(cuda, (x, x_scale, down))
    if reason:
        pytest.skip(reason)
    out = LOW_RANK_DOWN_TRITON.impl(x, x_scale, down)
    rows = slice(-256, None)
    exact = (x[rows].double() * x_scale[rows]) @ down.double().t()
    assert out.dtype == kind
    assert relative_error(out[rows], exact) < TOLERANCE[kind]
    assert relative_error(out, ops.low_rank_down(x, x_scale, down)) < TOLERANCE[kind]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_a_linear_with_a_branch_is_near_float64(cuda, dtype, kind, shape):
    x, x_scale, w, w_scale, bias, low, up = low_rank_args(shape, dtype, kind, cuda)
    given = x, x_scale, w, w_scale, bias, low, up, torch.bfloat16
    reason = LINEAR_LOW_RANK_TRITON.supports(cuda, given)
    if reason:
        pytest.skip(reason)
    out = LINEAR_LOW_RANK_TRITON.impl(*given)
    rows = slice(-256, None)
    exact = (x[rows].double() * x_scale[rows]) @ (w.double() * w_scale).t() + bias.double()
    exact += low[rows].double() @ up.double().t()
    assert relative_error(out[rows], exact) < TOLERANCE[torch.bfloat16]


def test_a_branch_of_zeros_changes_no_bit(cuda):
    *linear, low, up = low_rank_args((333, 1552, 272, 32), INT8, torch.bfloat16, cuda)
    given = *linear, low, 0 * up, torch.bfloat16
    reason = LINEAR_LOW_RANK_TRITON.supports(cuda, given)
    if reason:
        pytest.skip(reason)
    plain = ops.scaled_linear(*linear, torch.bfloat16)
    assert torch.equal(LINEAR_LOW_RANK_TRITON.impl(*given), plain)
