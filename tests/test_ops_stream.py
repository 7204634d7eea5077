"""Ops on the residual stream against float64: GELU, modulated norms, rows that repeat."""

import pytest
import torch
from op_args import DTYPES, half_step, modulation
from torch import Tensor

from wancompile import ops
from wancompile.errors import InputError
from wancompile.ops import chunk
from wancompile.quant.numerics import INT8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_quantize_is_gelu_in_float64(dtype, approximate):
    x, smooth = torch.randn(2, 5, 40, dtype=torch.bfloat16) * 3, torch.rand(40) + 0.5
    q, scale = ops.gelu_quantize(x, approximate, smooth, dtype)
    exact = torch.nn.functional.gelu(x.double(), approximate=approximate) * smooth
    assert ((q.double() * scale - exact).abs() <= half_step(exact, scale, dtype)).all()
    with pytest.raises(InputError, match="not 'sigmoid'"):
        ops.gelu_quantize(x, "sigmoid", None, dtype)


def modulated_norm(x: Tensor, weight, weight_offset, bias, bias_offset, rows, eps, smooth):
    """The definition of `norm_quantize` without rounding, token by token in float64."""
    x = x.double()
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()

    def pick(value: Tensor, offset: Tensor) -> Tensor:
        chosen = torch.stack([v[r.long()] for v, r in zip(value.double(), rows, strict=True)])
        return chosen + offset

    return (y * pick(weight, weight_offset) + pick(bias, bias_offset)) * smooth


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_quantize_is_a_modulated_norm_in_float64(dtype):
    x, args = torch.randn(2, 6, 40, dtype=torch.bfloat16) * 5 + 3, modulation(2, 6, 40)
    q, scale = ops.norm_quantize(x, *args, dtype)
    exact = modulated_norm(x, *args)
    assert ((q.double() * scale - exact).abs() <= half_step(exact, scale, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_norm_quantize_norms_the_rounded_sum(dtype):
    x, y = (torch.randn(2, 6, 40, dtype=torch.bfloat16) for _ in range(2))
    gate, gate_offset, args = torch.randn(2, 6, 40), torch.randn(40), modulation(2, 6, 40)
    total, q, scale = ops.residual_norm_quantize(x, y, gate, gate_offset, *args, dtype)
    chosen = torch.stack([g[r.long()] for g, r in zip(gate, args[4], strict=True)])
    exact = x.double() + y.double() * (chosen.double() + gate_offset)
    assert total.dtype == torch.bfloat16
    assert ((total.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()
    assert torch.equal(ops.add_gated(x, y, gate, gate_offset, args[4]), total)
    normed = modulated_norm(total, *args)
    assert ((q.double() * scale - normed).abs() <= half_step(normed, scale, dtype)).all()


@pytest.mark.parametrize("shape", [(40,), (2, 1, 40), (2, 6, 40)])
def test_modulation_broadcasts_over_tokens(shape):
    x, weight = torch.randn(2, 6, 40), torch.randn(shape)
    whole = weight.expand(2, 6, 40).contiguous()
    one = ops.norm_quantize(x, weight, None, weight, None, None, 1e-6, None, INT8)
    two = ops.norm_quantize(x, whole, None, whole, None, None, 1e-6, None, INT8)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("elements", [1, 100, chunk.CPU_ELEMENTS])
def test_repeated_rows_point_at_the_first_of_their_run(elements, monkeypatch):
    monkeypatch.setattr(chunk, "CPU_ELEMENTS", elements)
    kinds = torch.tensor([[3, 3, 5, 5, 5, 3, 3, 7], [1, 2, 2, 2, 2, 2, 2, 2]])
    table = torch.randn(8, 2, 6, dtype=torch.bfloat16)
    x = table[kinds]
    found = ops.repeated_rows(x)
    assert found.tolist() == [[0, 0, 2, 2, 2, 5, 5, 7], [0, 1, 1, 1, 1, 1, 1, 1]]
    assert torch.equal(x.take_along_dim(found.long()[..., None, None], 1), x)


def test_rows_with_nan_repeat_nothing():
    x = torch.zeros(1, 4, 3)
    x[0, 1:3, 1] = torch.nan
    assert ops.repeated_rows(x).tolist() == [[0, 1, 2, 3]]
