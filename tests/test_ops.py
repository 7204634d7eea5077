"""The semantic ops against float64, and what torch asks of a library op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from wancompile import ops
from wancompile.errors import InputError
from wancompile.ops import chunk, linear
from wancompile.quant.numerics import FP8, INT8, QMAX

BF16 = torch.bfloat16
DTYPES = [INT8, FP8]
SHAPES = [(1, 7, 3), (1, 1, 1), (2, 1, 4), (2, 16, 8), (33, 40, 24), (5, 2100, 9)]


def random_8bit(*shape: int, dtype: torch.dtype) -> Tensor:
    if dtype == INT8:
        return torch.randint(-127, 128, shape, dtype=INT8)
    return (torch.randn(shape) * 100).clamp(-448, 448).to(FP8)


def linear_args(m: int, k: int, n: int, dtype: torch.dtype, bias: bool = True) -> tuple:
    scales = torch.rand(m, 1) + 0.1, torch.rand(n, 1) + 0.1
    x, w = random_8bit(m, k, dtype=dtype), random_8bit(n, k, dtype=dtype)
    return x, scales[0], w, scales[1], torch.randn(n) if bias else None, torch.float32


def residual_args(
    kind: torch.dtype,
    gate: tuple[int, ...] | None = (2, 1, 5),
    dtype: torch.dtype = torch.float32,
) -> tuple:
    x, x_scale, w, w_scale, bias, _ = linear_args(6, 7, 5, kind)
    residual = torch.randn(2, 3, 5).to(dtype)
    opening = None if gate is None else torch.randn(gate)
    return x.view(2, 3, 7), x_scale.view(2, 3, 1), w, w_scale, bias, residual, opening


def gelu_args(dtype: torch.dtype, form: str = "tanh", smooth: bool = True) -> tuple:
    x, x_scale, w, w_scale, bias, _ = linear_args(6, 7, 5, dtype)
    inverse = torch.rand(5) + 0.5 if smooth else None
    scale = torch.tensor([60.0 if dtype == INT8 else 10.0])
    return x.view(2, 3, 7), x_scale.view(2, 3, 1), w, w_scale, bias, form, inverse, scale, dtype


def attention_args(dtype: torch.dtype, b=2, h=3, sq=5, sk=7, d=8) -> tuple:
    q, k = (random_8bit(b, h, s, d, dtype=dtype) for s in (sq, sk))
    v = random_8bit(b, h, sk, d, dtype=FP8)
    scales = [torch.rand(h) * 2 / QMAX[t] for t in (dtype, dtype, FP8)]
    return q, k, v, *scales, d**-0.5, torch.float32


def queries_scaled(args: tuple) -> tuple:
    """The same with a scale for each query."""
    q, k, v, q_scale, *rest = args
    return q, k, v, torch.rand(*q.shape[:3], 1) * q_scale[:, None, None], *rest


def stream(batch: int, tokens: int, channels: int) -> tuple:
    """x, y, gate `[B, 1, C]` and no offset."""
    x, y = (torch.randn(batch, tokens, channels) for _ in range(2))
    return x, y, torch.randn(batch, 1, channels), None


def modulation(batch: int, tokens: int, channels: int) -> tuple:
    """Weight and bias per token, their offsets, rows, eps and 1/s."""
    weight, bias = (torch.randn(batch, tokens, channels, dtype=torch.bfloat16) for _ in range(2))
    rows = torch.randint(0, tokens, (batch, tokens), dtype=torch.int32)
    offsets = torch.randn(channels), torch.randn(channels)
    smooth = torch.rand(channels) + 0.5
    return weight, offsets[0], bias, offsets[1], rows, 1e-6, smooth


def rotary_args(
    dtype: torch.dtype, weight: bool = True, shift: bool = False, turned: bool = False
) -> tuple:
    x, angle = torch.randn(2, 5, 3 * 8), torch.randn(5, 4)
    w = torch.rand(24) + 0.5 if weight else None
    s = torch.randn(3, 8) if shift else None
    scale = torch.rand(3) * 4 / QMAX[dtype]
    return x, w, 1e-6, angle.cos(), angle.sin(), s, scale, turned, dtype


def float_rotary_args(dtype: torch.dtype = torch.float32, weight: bool = True) -> tuple:
    return *rotary_args(INT8, weight)[:5], dtype


ONE = torch.tensor([0.01])


def by_one_scale(args: tuple) -> tuple:
    """The same with one scale for all tokens."""
    return args[0], args[1].flatten()[:1].clone(), *args[2:]


OPCHECKS = [
    *[(ops.quantize_per_token, (torch.randn(2, 3, 7), torch.rand(7), d)) for d in DTYPES],
    (ops.quantize_per_token, (torch.randn(4, 6, dtype=torch.bfloat16).t(), None, INT8)),
    *[(ops.quantize_per_tensor, (torch.randn(2, 7), torch.rand(7), ONE, d)) for d in DTYPES],
    (ops.quantize_per_tensor, (torch.randn(4, 6, dtype=torch.bfloat16).t(), None, ONE, INT8)),
    *[(ops.quantize_per_head, (torch.randn(1, 2, 3, 4), torch.rand(2), d)) for d in DTYPES],
    (ops.quantize_per_head, (torch.randn(1, 3, 2, 4).transpose(1, 2), torch.rand(2), INT8)),
    *[(ops.scaled_linear, linear_args(3, 7, 5, d)) for d in DTYPES],
    (ops.scaled_linear, linear_args(1, 8, 8, INT8, bias=False)),
    *[(ops.scaled_linear, by_one_scale(linear_args(3, 7, 5, d))) for d in DTYPES],
    *[(ops.linear_gelu_quantize, gelu_args(d)) for d in DTYPES],
    (ops.linear_gelu_quantize, by_one_scale(gelu_args(INT8, "none", smooth=False))),
    *[(ops.scaled_linear_residual, residual_args(d)) for d in DTYPES],
    (ops.scaled_linear_residual, residual_args(INT8, gate=None, dtype=torch.bfloat16)),
    *[(ops.scaled_attention, attention_args(d)) for d in DTYPES],
    *[(ops.gelu_quantize, (torch.randn(2, 3, 8), "tanh", torch.rand(8), d)) for d in DTYPES],
    *[(ops.norm_quantize, (torch.randn(2, 3, 8), *modulation(2, 3, 8), d)) for d in DTYPES],
    (ops.norm_quantize, (torch.randn(1, 3, 8), *[None] * 5, 1e-6, None, INT8)),
    (ops.residual_norm_quantize, (*stream(2, 3, 8), *modulation(2, 3, 8), INT8)),
    (ops.residual_norm_quantize, (*stream(1, 1, 8), *[None] * 5, 1e-6, None, FP8)),
    (ops.add_gated, (*stream(2, 3, 8), None)),
    (ops.repeated_rows, (torch.randint(0, 2, (2, 5, 1)).expand(2, 5, 3),)),
    (ops.repeated_rows, (torch.randn(1, 1, 2, 3, dtype=torch.bfloat16),)),
    *[(ops.norm_rotate_quantize, rotary_args(d)) for d in DTYPES],
    (ops.norm_rotate_quantize, rotary_args(INT8, weight=False, shift=True, turned=True)),
    *[
        (ops.norm_rotate_quantize_per_token, (*rotary_args(d)[:5], turned, d))
        for d, turned in ((INT8, True), (FP8, False))
    ],
    (ops.hadamard, (torch.randn(2, 3, 8),)),
    (ops.hadamard, (torch.randn(2, 8, 4, dtype=torch.bfloat16).transpose(1, 2),)),
    *[(ops.scaled_attention, queries_scaled(attention_args(d))) for d in DTYPES],
    (ops.norm_rotate, float_rotary_args()),
    (ops.norm_rotate, float_rotary_args(torch.bfloat16, weight=False)),
]


@pytest.mark.parametrize(("op", "args"), OPCHECKS)
def test_op_is_a_good_library_op(op, args):
    # torch's schema check compares the arguments by allclose, which no CPU has for e4m3.
    takes_e4m3 = any(isinstance(arg, Tensor) and arg.dtype == FP8 for arg in args)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, args, test_utils=checks[takes_e4m3:])


@pytest.mark.parametrize("name", ops.__all__)
def test_op_is_reachable_by_name(name):
    assert getattr(torch.ops.wancompile, name).default is getattr(ops, name)._opoverload


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32])
def test_quantize_per_token_gives_back_the_smoothed_input(dtype, source):
    x = torch.randn(2, 5, 33).to(source)
    x[:, :, 4] *= 50
    x[1, 3] = 0
    inv_smooth = torch.rand(33) + 0.1
    q, scale = ops.quantize_per_token(x, inv_smooth, dtype)
    smoothed = x.double() * inv_smooth.double()
    torch.testing.assert_close(
        scale[x.any(-1)].double(),
        smoothed.abs().amax(-1, keepdim=True)[x.any(-1)] / QMAX[dtype],
        rtol=1e-6,
        atol=0,
    )
    half_step = {INT8: 0.5 * scale, FP8: smoothed.abs() / 16 + scale / 1024}[dtype]
    assert ((q.double() * scale.double() - smoothed).abs() <= half_step * 1.001).all()
    assert (q.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (2, 5, 1))


def test_quantize_per_head_saturates():
    x = torch.tensor([1.0, -2.0, 1e6]).expand(1, 2, 1, 3)
    q = ops.quantize_per_head(x, torch.tensor([1.0, 0.5]), INT8)
    assert q[0, :, 0].tolist() == [[1, -2, 127], [2, -4, 127]]
    q = ops.quantize_per_head(x, torch.tensor([1.0, 0.5]), FP8)
    assert q[0, :, 0].float().tolist() == [[1, -2, 448], [2, -4, 448]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_scaled_linear_is_the_float64_linear(dtype, shape, bias):
    x, x_scale, w, w_scale, b, _ = args = linear_args(*shape, dtype, bias)
    expected = (x.double() * x_scale) @ (w.double() * w_scale).t()
    size = (x.double() * x_scale).abs() @ (w.double() * w_scale).abs().t() + 1
    expected = expected if b is None else expected + b
    out = ops.scaled_linear(*args)
    assert ((out - expected).abs() <= size * 1e-5).all()
    assert ops.scaled_linear(*args[:-1], torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_scale_for_all_tokens_is_that_of_each(dtype):
    for args in (linear_args(5, 7, 3, dtype), linear_args(0, 7, 3, dtype)):
        x, _, *rest = args
        each = torch.full((len(x), 1), 0.25)
        out = ops.scaled_linear(x, torch.tensor([0.25]), *rest)
        assert torch.equal(out, ops.scaled_linear(x, each, *rest))
    x, _, *rest = residual_args(dtype)
    out = ops.scaled_linear_residual(x, torch.tensor([0.25]), *rest)
    assert torch.equal(out, ops.scaled_linear_residual(x, torch.full((2, 3, 1), 0.25), *rest))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 8, 4), (64, 4096, 16)])
def test_int8_accumulates_exactly(shape, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(linear, "_int_mm_is_exact", lambda: False)
    m, k, n = shape
    for x, w in [
        (random_8bit(m, k, dtype=INT8), random_8bit(n, k, dtype=INT8)),
        (torch.full((m, k), 127, dtype=INT8), torch.full((n, k), 127, dtype=INT8)),
        (torch.full((m, k), 127, dtype=INT8), torch.full((n, k), -127, dtype=INT8)),
    ]:
        out = linear.int8_matmul(x, w)
        assert out.dtype == torch.int32
        assert torch.equal(out.long(), x.long() @ w.long().t())


def test_scaled_linear_takes_any_leading_dims_and_strides():
    x, x_scale, w, w_scale, b, out_dtype = linear_args(12, 7, 5, INT8)
    flat = ops.scaled_linear(x, x_scale, w, w_scale, b, out_dtype)
    strided = x.reshape(4, 3, 7).transpose(0, 1), x_scale.reshape(4, 3, 1).transpose(0, 1)
    out = ops.scaled_linear(*strided, w.t().contiguous().t(), w_scale, b, out_dtype)
    assert torch.equal(out.transpose(0, 1), flat.reshape(4, 3, 5))
    assert out.is_contiguous()


def test_scaled_linear_shows_nan():
    x, x_scale, w, w_scale, b, out_dtype = linear_args(3, 8, 8, FP8)
    x_scale[1] = torch.nan
    out = ops.scaled_linear(x, x_scale, w, w_scale, b, out_dtype)
    assert out.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_attention_is_float64_attention_but_for_the_rounding_of_p(dtype, per_token):
    args = attention_args(dtype, sq=37, sk=300, d=16)
    args = queries_scaled(args) if per_token else args
    q, k, v, qs, ks, vs, scale, _ = args
    kf, vf = (t.double() * s.double()[:, None, None] for t, s in ((k, ks), (v, vs)))
    qf = q.double() * (qs if per_token else qs[:, None, None]).double()
    p = torch.softmax(qf @ kf.transpose(-1, -2) * scale, -1)
    error = (ops.scaled_attention(*args) - p @ vf).abs()
    rounding = 2.0**-4 * p + 2.0**-18 * p.amax(-1, keepdim=True)  # e4m3 of 256 p / max(p)
    assert (error <= 1.001 * rounding @ vf.abs() + 1e-5).all()


def test_scaled_attention_is_exact_where_p_is():
    q = torch.zeros(1, 1, 3, 8, dtype=INT8)
    v = random_8bit(1, 1, 6, 8, dtype=FP8)
    one = torch.ones(1)
    out = ops.scaled_attention(q, random_8bit(1, 1, 6, 8, dtype=INT8), v, one, one, one, 1.0,
                               torch.float32)  # fmt: skip
    torch.testing.assert_close(out, v.float().mean(2, keepdim=True).expand(1, 1, 3, 8))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ops_are_the_same_in_chunks(dtype, per_token, monkeypatch):
    attention, linear = attention_args(dtype, sq=11), linear_args(11, 7, 5, dtype)
    attention = queries_scaled(attention) if per_token else attention
    whole = ops.scaled_attention(*attention), ops.scaled_linear(*linear)
    monkeypatch.setattr(chunk, "CPU_ELEMENTS", 100)
    parts = ops.scaled_attention(*attention), ops.scaled_linear(*linear)
    monkeypatch.setattr(chunk, "CPU_ELEMENTS", 1)
    rows = ops.scaled_attention(*attention), ops.scaled_linear(*linear)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(rows, whole)


def test_scaled_attention_shows_nan_and_is_laid_out_by_tokens():
    q, k, v, *rest = attention_args(FP8)
    v = v.clone()
    v[0, 0, 0, 0] = torch.nan
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = ops.scaled_attention(q, k, v, *rest)
    assert out.isnan().sum() == q.shape[2]
    assert out.transpose(1, 2).is_contiguous()


@given(m=st.integers(1, 40), k=st.integers(1, 70), n=st.integers(1, 20))
@settings(deadline=None, max_examples=30)
def test_int8_linear_error_is_bounded_by_the_steps(m, k, n):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m * k * n))
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(k))
    (q, qs), (p, ps) = (ops.quantize_per_token(t, None, INT8) for t in (x, w))
    out = ops.scaled_linear(q, qs, p, ps, None, torch.float32)
    dx, dw = qs / 2, ps / 2
    bound = dx * w.abs().sum(1) + x.abs().sum(1, keepdim=True) * dw.t() + k * dx * dw.t()
    assert ((out - x @ w.t()).abs() <= bound * 1.001 + 1e-5).all()


WRONG = [
    (ops.quantize_per_token, (torch.ones(2, 3), None, torch.int16)),
    (ops.quantize_per_token, (torch.ones(2, 3), torch.ones(4), INT8)),
    (ops.quantize_per_head, (torch.ones(2, 3, 4), torch.ones(3), INT8)),
    (ops.quantize_per_tensor, (torch.ones(2, 3), None, torch.ones(2), INT8)),
    (ops.quantize_per_tensor, (torch.ones(2, 3), None, torch.ones(1).double(), INT8)),
    (ops.linear_gelu_quantize, (*gelu_args(INT8)[:7], torch.ones(5), INT8)),
    (
        ops.scaled_linear,
        (*linear_args(2, 8, 4, INT8)[:1], torch.ones(2), *linear_args(2, 8, 4, INT8)[2:]),
    ),
    (ops.scaled_linear, (*linear_args(2, 8, 4, INT8)[:2], *linear_args(2, 8, 4, FP8)[2:])),
    (ops.scaled_linear, (*linear_args(2, 8, 4, INT8)[:2], *linear_args(2, 9, 4, INT8)[2:])),
    (ops.scaled_linear, (*linear_args(2, 8, 4, INT8)[:5], torch.int8)),
    (ops.scaled_attention, (*attention_args(INT8)[:2], *attention_args(INT8, sk=6)[2:])),
    *[
        (ops.scaled_attention, (*attention_args(INT8)[:3], scale, *attention_args(INT8)[4:]))
        for scale in (torch.ones(2, 3, 5), torch.ones(2, 3, 7, 1))
    ],
    (ops.hadamard, (torch.ones(2, 6),)),
    (ops.hadamard, (torch.ones(2, 8, dtype=INT8),)),
    (ops.hadamard, (torch.ones(()),)),
]


@pytest.mark.parametrize(("op", "args"), WRONG)
def test_wrong_arguments_are_named_by_body_and_fake(op, args):
    with pytest.raises(InputError, match=f"{op._name} needs .*, but got "):
        op(*args)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
    with mode, pytest.raises(InputError, match=f"{op._name} needs"):
        op(*fakes)


class Chain(torch.nn.Module):
    def forward(self, x, w, w_scale):
        q, scale = torch.ops.wancompile.quantize_per_token(x, None, torch.int8)
        return torch.ops.wancompile.scaled_linear(q, scale, w, w_scale, None, torch.float32)


def test_leading_dims_stay_dynamic():
    w, w_scale = random_8bit(5, 8, dtype=INT8), torch.rand(5, 1)
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        Chain(), (torch.randn(3, 4, 8), w, w_scale), dynamic_shapes=(dynamic, None, None)
    )
    x = torch.randn(7, 2, 8)
    assert torch.equal(program.module()(x, w, w_scale), Chain()(x, w, w_scale))
    out = next(iter(program.graph.find_nodes(op="output"))).args[0][0]
    assert [isinstance(size, int) for size in out.meta["val"].shape] == [False, False, True]


def test_attention_tokens_stay_dynamic():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in attention_args(FP8)]
    with mode:
        out = ops.scaled_attention(*args)
    assert (out.dtype, tuple(out.shape)) == (torch.float32, (2, 3, 5, 8))


def half_step(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """How far rounding to `dtype` may move a float64 `value`, and a little for fp32 arithmetic."""
    step = 0.5 * scale if dtype == INT8 else value.abs() / 16 + scale / 1024
    return step * 1.001 + 1e-5 * (1 + value.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_quantize_is_gelu_in_float64(dtype, approximate):
    x, smooth = torch.randn(2, 5, 40, dtype=torch.bfloat16) * 3, torch.rand(40) + 0.5
    q, scale = ops.gelu_quantize(x, approximate, smooth, dtype)
    exact = torch.nn.functional.gelu(x.double(), approximate=approximate) * smooth
    assert ((q.double() * scale - exact).abs() <= half_step(exact, scale, dtype)).all()
    with pytest.raises(InputError, match="not 'sigmoid'"):
        ops.gelu_quantize(x, "sigmoid", None, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_quantize_per_tensor_gives_back_what_lies_within(dtype, source):
    x, smooth = torch.randn(3, 5, 40).to(source) * 3, torch.rand(40) + 0.5
    scale = torch.tensor([4.0 / QMAX[dtype]])
    q = ops.quantize_per_tensor(x, smooth, scale, dtype)
    exact = (x.double() * smooth).clamp(-4, 4)
    assert ((x.double() * smooth).abs() > 4).any()
    assert ((q.double() * scale - exact).abs() <= half_step(exact, scale, dtype)).all()
    assert q.float().abs().max() == QMAX[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("smooth", [True, False])
def test_linear_gelu_quantize_is_float64_and_saturates(dtype, approximate, smooth):
    x, x_scale, w, w_scale, bias, _, inverse, scale, _ = args = gelu_args(
        dtype, approximate, smooth
    )
    y = (x.double() * x_scale) @ (w.double() * w_scale).t() + bias
    y = torch.nn.functional.gelu(y, approximate=approximate)
    y = y if inverse is None else y * inverse
    top = QMAX[dtype] * scale.double()
    exact = y.clamp(-top, top)
    assert (y > top).any()
    q = ops.linear_gelu_quantize(*args)
    assert ((q.double() * scale - exact).abs() <= half_step(exact, scale, dtype)).all()
    with pytest.raises(InputError, match="not 'sigmoid'"):
        ops.linear_gelu_quantize(*args[:5], "sigmoid", *args[6:])


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


@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32])
def test_scaled_attention_rounds_float_values(wide):
    q, k, v, qs, ks, vs, *rest = attention_args(INT8)
    floats = (torch.randn(v.shape) * vs[:, None, None] * 100).to(wide)
    rounded = ops.quantize_per_head(floats, vs, FP8)
    a = ops.scaled_attention(q, k, floats, qs, ks, vs, *rest)
    assert torch.equal(a, ops.scaled_attention(q, k, rounded, qs, ks, vs, *rest))


@pytest.mark.parametrize(
    ("op", "args", "what"),
    [
        (ops.norm_quantize, (torch.randn(3, 8), *[None] * 5, 1e-6, None, INT8), "x float"),
        (
            ops.norm_quantize,
            (torch.randn(1, 3, 8), None, torch.ones(8), None, None, None, 1e-6, None, INT8),
            "offsets",
        ),
        (
            ops.norm_quantize,
            (torch.randn(1, 3, 8), torch.ones(1, 2, 8), *[None] * 4, 1e-6, None, INT8),
            "weight",
        ),
        (ops.add_gated, (torch.randn(1, 3, 8), torch.randn(1, 2, 8), None, None, None), "y float"),
        (
            ops.norm_rotate_quantize,
            (*rotary_args(INT8)[:-3], torch.ones(5), False, INT8),
            "cos and sin",
        ),
        (
            ops.norm_rotate_quantize_per_token,
            (torch.ones(2, 5, 24), None, 1e-6, torch.ones(5, 3), torch.ones(5, 3), True, INT8),
            "a power of two",
        ),
        (ops.norm_rotate, float_rotary_args(FP8), "16 bits or more"),
        (ops.norm_rotate, float_rotary_args(torch.int32), "16 bits or more"),
        (ops.norm_rotate, (*float_rotary_args()[:3], *torch.ones(2, 5, 5), BF16), "cos and sin"),
        (ops.norm_rotate, (*float_rotary_args()[:3], *torch.ones(2, 4, 4), BF16), "cos and sin"),
        (ops.norm_rotate, (*float_rotary_args()[:3], *torch.ones(2, 5, 0), BF16), "cos and sin"),
        (ops.norm_rotate, (torch.ones(5, 24), *float_rotary_args()[1:]), "x float"),
    ],
)
def test_fused_ops_refuse_other_arguments(op, args, what):
    with pytest.raises(InputError, match=what):
        op(*args)


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


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("gate", [None, (5,), (2, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_linear_residual_adds_a_gated_linear(kind, gate, dtype):
    x, x_scale, w, w_scale, bias, residual, opening = args = residual_args(kind, gate, dtype)
    branch = (x.double() * x_scale) @ (w.double() * w_scale).t() + bias
    exact = residual.double() + (branch if opening is None else branch * opening)
    out = ops.scaled_linear_residual(*args)
    size = branch.abs() + residual.abs() + 1
    assert out.dtype == dtype
    assert ((out - exact).abs() <= size * 1e-5 + exact.abs() * torch.finfo(dtype).eps).all()


def test_scaled_linear_residual_refuses_a_gate_per_token():
    with pytest.raises(InputError, match=r"gate float\[N\] or \[B, 1, N\] or None"):
        ops.scaled_linear_residual(*residual_args(INT8, (2, 3, 5)))
