"""What torch asks of a library op, what an op refuses, and which sizes stay open."""

import pytest
import torch
from op_args import (
    DTYPES,
    attention_args,
    by_one_scale,
    float_rotary_args,
    gelu_args,
    linear_args,
    modulation,
    queries_scaled,
    random_8bit,
    residual_args,
    rotary_args,
    stream,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wancompile import ops
from wancompile.errors import InputError
from wancompile.ops import chunk
from wancompile.quant.numerics import FP8, INT8

BF16 = torch.bfloat16
ONE = torch.tensor([0.01])

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
