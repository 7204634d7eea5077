"""`scaled_attention` whose product by v is in bf16: q and k in 8 bits only."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from wancompile import ops
from wancompile.errors import InputError
from wancompile.kernels import choose
from wancompile.kernels.torch_attention import attention_dequantize_sdpa
from wancompile.quant.numerics import FP8, INT8, absmax_scale, quantize

ATTENTION = torch.ops.wancompile.scaled_attention.default
DTYPES = [INT8, FP8]
HALF_BF16, HALF_E4M3 = 2.0**-9, 2.0**-4


def operands(dtype: torch.dtype, tokens: int = 37, keys: int = 300, size: int = 16) -> tuple:
    q, k, v = (torch.randn(2, 3, n, size) for n in (tokens, keys, keys))
    scales = [absmax_scale(x, (0, 2, 3), dtype).flatten() for x in (q, k)]
    pairs = zip((q, k), scales, strict=True)
    rounded = [quantize(x, scale[:, None, None], dtype) for x, scale in pairs]
    return *rounded, v.bfloat16(), *scales, None, size**-0.5, torch.float32


def queries_scaled(args: tuple) -> tuple:
    """The same with a scale for each query."""
    q, k, v, q_scale, *rest = args
    return q, k, v, (torch.rand(*q.shape[:3], 1) + 0.1) * q_scale[:, None, None], *rest


def exact(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, factor: float):
    """P and v in float64."""
    q_scale = q_scale if q_scale.dim() == 4 else q_scale[:, None, None]
    qf, kf = q.double() * q_scale.double(), k.double() * k_scale[:, None, None]
    return torch.softmax(qf @ kf.transpose(-1, -2) * factor, -1), v.double()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_float64_attention_but_for_p_in_bf16(dtype, per_token):
    args = queries_scaled(operands(dtype)) if per_token else operands(dtype)
    p, v = exact(*args[:5], args[6])
    error = (ops.scaled_attention(*args) - p @ v).abs()
    bound = HALF_BF16 * p @ v.abs() * 1.01 + 1e-5
    assert (error <= bound).all()
    assert (error > bound / 100).any()  # the bound is of the right size


def test_it_is_nearer_than_with_e4m3():
    args = operands(INT8)
    p, v = exact(*args[:5], args[6])
    v_scale = absmax_scale(v.float(), (0, 2, 3), FP8).flatten()
    coarse = ops.scaled_attention(*args[:5], v_scale, *args[6:])
    fine = ops.scaled_attention(*args)
    assert (coarse - p @ v).norm() > 8 * (fine - p @ v).norm()


def test_wider_values_are_rounded_to_bf16():
    q, k, v, *rest = operands(INT8)
    wide = v.float() * (1 + 1e-4)
    assert torch.equal(
        ops.scaled_attention(q, k, wide, *rest), ops.scaled_attention(q, k, v, *rest)
    )


def test_values_in_8_bits_need_a_scale():
    q, k, v, *rest = operands(INT8)
    with pytest.raises(InputError, match="of v only if it is rounded to 8 bits"):
        ops.scaled_attention(q, k, v.to(FP8), *rest)


def test_the_kernel_of_torch_computes_the_same():
    args = operands(INT8)
    out, plain = attention_dequantize_sdpa(*args), ops.scaled_attention(*args)
    assert (out - plain).norm() < 0.01 * plain.norm()


@pytest.mark.parametrize(
    ("capability", "dtype", "name"),
    [
        ((9, 0), INT8, "attention_hopper"),
        ((9, 0), FP8, "attention_hopper"),
        ((8, 9), INT8, "attention_dequantize_sdpa"),
    ],
)
def test_only_kernels_for_bf16_values_are_chosen(monkeypatch, capability, dtype, name):
    kernel, refusals = chosen(monkeypatch, capability, operands(dtype, size=64))
    assert kernel == name
    if dtype == FP8:
        assert refusals["attention_fa3"] == "takes values in e4m3, not in bf16"


def test_a_scale_for_each_query_is_for_our_own_kernels(monkeypatch):
    q, k, v, q_scale, k_scale, _, *rest = operands(FP8, size=64)
    args = q, k, v, q_scale, k_scale, torch.ones(3), *rest
    assert chosen(monkeypatch, (9, 0), args)[0] == "attention_fa3"
    kernel, refusals = chosen(monkeypatch, (9, 0), queries_scaled(args))
    assert kernel == "attention_hopper"
    assert "one scale for the queries of a head" in refusals["attention_fa3"]


def chosen(monkeypatch, capability: tuple[int, int], args: tuple) -> tuple[str, dict[str, str]]:
    """The kernel for a GPU where all packages are installed, and why others were refused."""
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # fa3-fwd among them
    with FakeTensorMode(allow_non_fake_inputs=True):
        kernel, refusals = choose(ATTENTION, torch.device("cuda"), args)
    assert kernel is not None
    return kernel.name, dict(refusals)
