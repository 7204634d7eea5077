"""Norm and rotation of heads, and the Hadamard transform, against float64."""

import pytest
import torch
from op_args import DTYPES, float_rotary_args, half_step, rotary_args
from torch import Tensor

from wancompile import ops
from wancompile.quant.numerics import QMAX


def rotated(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Normed pairs times complex numbers of length 1, in fp64, `[B, H, S, D]`."""
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    pairs = torch.view_as_complex(y.view(*x.shape[:2], -1, cos.shape[1], 2))
    turned = pairs * torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(turned).flatten(-2).transpose(1, 2)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [True, False])
def test_norm_rotate_rounds_once(source, dtype, weight):
    x, *rest, _ = float_rotary_args(weight=weight)
    exact = rotated(x.to(source), *rest)
    out = ops.norm_rotate(x.to(source), *rest, dtype)
    assert (out.shape, out.dtype) == ((2, 3, 5, 8), dtype)
    assert out.transpose(1, 2).is_contiguous()
    assert ((out - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 2e-6).all()


def sylvester(size: int) -> Tensor:
    """The orthonormal matrix whose signs are the parity of the bits that row and column share."""
    both = [[bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return (-1.0) ** torch.tensor(both, dtype=torch.float64) * size**-0.5


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128])
def test_turning_q_and_k_changes_no_product(size):
    q, k = torch.randn(2, 3, 5, size, dtype=torch.float64), torch.randn(2, 3, 7, size).double()
    a, b = ops.hadamard(q), ops.hadamard(k)
    torch.testing.assert_close(a, q @ sylvester(size), rtol=0, atol=1e-12)
    products = q @ k.transpose(-1, -2)
    torch.testing.assert_close(a @ b.transpose(-1, -2), products, rtol=0, atol=1e-12)
    torch.testing.assert_close(ops.hadamard(a), q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hadamard_is_computed_in_float32_and_rounded_once(dtype):
    x = torch.randn(3, 5, 64).to(dtype)
    exact = x.double() @ sylvester(64)
    out = ops.hadamard(x)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
    assert ((out - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True])
def test_norm_rotate_quantize_per_token_rounds_each_head_by_its_own_scale(dtype, turned):
    given = *rotary_args(dtype)[:5], turned, dtype
    exact = rotated(*given[:5])
    exact = exact @ sylvester(8) if turned else exact
    q, scale = ops.norm_rotate_quantize_per_token(*given)
    assert q.is_contiguous()
    assert scale.is_contiguous()
    assert (q.shape, scale.shape) == ((2, 3, 5, 8), (2, 3, 5, 1))
    top = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), top / QMAX[dtype], rtol=1e-5, atol=0)
    assert ((q.double() * scale - exact).abs() <= half_step(exact, scale, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_norm_rotate_quantize_turns_pairs_of_channels(dtype, shift, turned):
    x, w, eps, cos, sin, c, scale, *_ = args = rotary_args(dtype, shift=shift, turned=turned)
    exact = rotated(x, w, eps, cos, sin)
    exact = exact @ sylvester(8) if turned else exact
    exact = exact if c is None else exact - c[:, None]
    limit = (scale * QMAX[dtype])[:, None, None]
    exact = exact.clamp(-limit, limit)
    q = ops.norm_rotate_quantize(*args)
    scale = scale[:, None, None]
    assert q.is_contiguous()
    assert q.shape == (2, 3, 5, 8)
    assert ((q.double() * scale - exact).abs() <= half_step(exact, scale, dtype)).all()
