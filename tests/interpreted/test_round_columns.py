"""Columns rounded one after the other by the kernel, against the plain loop."""

import pytest
import torch

from wancompile.kernels.jit import round_columns as kernel
from wancompile.quant import gptq
from wancompile.quant.numerics import FP8, INT8, absmax_scale


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("shape", [(64, 70), (40, 32), (1, 5)])
def test_columns_are_those_of_the_plain_loop(dtype, shape):
    """Sums in another order may tip a value over, after which its row goes its own way."""
    columns, moved = torch.randn(shape), 0.02 * torch.randn(shape)
    columns[:, 1::7] *= 100
    spread = 0.1 * torch.randn(shape[0], shape[0])
    scale = absmax_scale(columns, 0, dtype).flatten() * 0.8  # some saturate
    found, wanted = (
        (torch.empty(shape, dtype=dtype), torch.full(shape, torch.nan)) for _ in range(2)
    )
    kernel.round_columns(columns, moved, scale, spread, *found)
    gptq.round_columns(columns, moved.clone(), scale, spread, *wanted)
    same = (found[0].float() == wanted[0].float()).all(0)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(found[1][:, same], wanted[1][:, same], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[1], columns - found[0].float() * scale)
