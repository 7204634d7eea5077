"""Linears in 8 bits: which, what they share, and what stays in floating point."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import zoo
from kit import counts, error, run_pass
from small import (
    CHANNELS,
    WEIGHTS,
    X,
    attend,
    heads,
    joined,
    normal,
    plain,
    quantized,
    rounded_linear,
    skips,
    tensors,
)
from torch import nn

import wancompile
from wancompile import pipeline
from wancompile.errors import NumericsError
from wancompile.export import export
from wancompile.ir import match
from wancompile.passes import NORMALIZE, QuantizeAttention, QuantizeLinears
from wancompile.recipe import QSpec, Rule, resolve

INT8 = plain("int8")
sdpa = F.scaled_dot_product_attention


def quantise_ops(program) -> list:
    return match.nodes_of(program.graph, torch.ops.wancompile.quantize_per_token.default)


def test_projections_read_one_quantised_input(golden):
    program = quantized(normal(attend, **WEIGHTS), INT8)
    golden(program.print("canonical"))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_linears_round_input_rows_and_weight_rows(dtype):
    program = quantized(normal(attend, **WEIGHTS), plain(dtype))
    by_hand = partial(attend, linear=rounded_linear(dtype))
    assert error(program, by_hand, X, **WEIGHTS) < 1e-5
    assert error(program, attend, X, **WEIGHTS) > 1e-3


def test_output_keeps_its_type():
    weights = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    program = quantized(normal(attend, X.bfloat16(), **weights), INT8)
    out = program(x=X.bfloat16())
    assert out.dtype == torch.bfloat16
    by_hand = partial(attend, linear=rounded_linear("int8"))
    assert error(program, by_hand, X.bfloat16(), **weights) < 1e-2


def test_a_second_run_changes_nothing():
    once = quantized(normal(attend, **WEIGHTS), INT8)
    again = run_pass(once, QuantizeLinears(INT8))
    assert again.print() == once.print()
    assert not again.records[-1].done


def test_float_weights_are_let_go_and_biases_stay():
    program = quantized(normal(attend, **WEIGHTS), INT8)
    names = [f"{kind}{one}" for one in "qkvo" for kind in ("b", "w")]
    stored = [f"{name}_{part}" for name in names if name[0] == "w" for part in ("int8", "scale")]
    assert set(program.state) == {*stored, *(name for name in names if name[0] == "b")}
    assert program.nbytes == 4 * (CHANNELS * CHANNELS + 4 * CHANNELS + 4 * CHANNELS)


def test_consumed_weights_are_freed_one_by_one():
    program = normal(attend, **WEIGHTS)
    pipeline.run(program, [QuantizeAttention(INT8), QuantizeLinears(INT8)], consume=True)
    assert not program.state


def test_the_program_before_still_runs():
    program = normal(attend, **WEIGHTS)
    expected = program(x=X)
    quantized(program, INT8)
    assert torch.equal(program(x=X), expected)


# What stays in floating point -------------------------------------------------------------------


def test_a_group_that_the_recipe_leaves_out_stays():
    recipe = INT8.with_rules([Rule("attn_out_proj", None)])
    program = quantized(normal(attend, **WEIGHTS), recipe)
    assert (counts(program)["linear"], counts(program)["scaled_linear"]) == (1, 3)
    assert skips(program) == {"wo": "the recipe leaves this group in floating point"}
    assert torch.equal(program.state["wo"], WEIGHTS["wo"])


def test_a_computed_weight_stays():
    def fn(self, x):
        return attend(self, x, linear=lambda x, w, b: F.linear(x, w * x.mean(), b))

    program = quantized(normal(fn, **WEIGHTS), INT8)
    assert counts(program)["linear"] == 4
    assert "scaled_linear" not in counts(program)
    assert set(skips(program).values()) == {"its weight is computed from the inputs"}
    assert not program.records[-1].done


def test_a_linear_without_a_group_stays():
    def fn(self, x):
        return F.linear(attend(self, x), self.w_last)

    program = quantized(normal(fn, **WEIGHTS, **tensors("w_last")), INT8)
    assert [one.site.path for one in program.ungrouped] == ["w_last"]
    assert (counts(program)["linear"], counts(program)["scaled_linear"]) == (1, 4)


# A multiply before the group --------------------------------------------------------------------


def times(factor):
    """Attention on `x` times what `factor(self, x)` gives."""
    return lambda self, x, **options: attend(self, x * factor(self, x), **options)


def test_a_stored_vector_is_taken_up():
    fn, weights = times(lambda self, x: self.s), {**WEIGHTS, **tensors("s")}
    program = quantized(normal(fn, **weights), INT8)
    assert "mul" not in counts(program)
    assert [str(node.args[1]) for node in quantise_ops(program)] == ["s", "None"]
    by_hand = partial(fn, linear=rounded_linear("int8"))
    assert error(program, by_hand, X, **weights) < 1e-5


def test_of_two_vectors_the_last_is_taken_up():
    def fn(self, x):
        return attend(self, x * self.s * self.t)

    program = quantized(normal(fn, **WEIGHTS, **tensors("s", "t")), INT8)
    assert counts(program)["mul"] == 1
    assert str(quantise_ops(program)[0].args[1]) == "t"


def test_a_vector_in_another_type_is_multiplied_before():
    weights = {name: t.bfloat16() for name, t in {**WEIGHTS, **tensors("s")}.items()}
    program = quantized(normal(times(lambda self, x: self.s), X.bfloat16(), **weights), INT8)
    assert counts(program)["mul"] == 1


@pytest.mark.parametrize(
    ("factor", "stored"),
    [
        (lambda self, x: self.s, torch.tensor([0.5])),
        (lambda self, x: self.s, torch.rand(1, CHANNELS)),
        (lambda self, x: self.s * x.mean(), torch.rand(CHANNELS)),
        (lambda self, x: x, torch.rand(CHANNELS)),
    ],
    ids=["one number", "two dims", "computed", "square"],
)
def test_what_is_no_channel_vector_is_not_taken_up(factor, stored):
    program = quantized(normal(times(factor), **WEIGHTS, s=stored), INT8)
    assert counts(program)["mul"] >= 1
    assert [node.args[1] for node in quantise_ops(program)] == [None, None]


def test_a_vector_that_broadcasts_over_one_channel_is_not_taken_up():
    def fn(self, x):
        return attend(self, x.mean(-1, keepdim=True) * self.s)

    weights = {**WEIGHTS, **tensors("s")}
    program = quantized(normal(fn, **weights), INT8)
    assert counts(program)["mul"] == 1
    assert error(program, fn, X, **weights) < 3e-2


# What is shared ---------------------------------------------------------------------------------

TWICE = {**WEIGHTS, **tensors("wq2", "wk2", "wv2", "wo2", seed=2)}


def attend_again(self, x):
    q, k, v = (F.linear(x, w) for w in (self.wq2, self.wk2, self.wv2))
    return F.linear(joined(sdpa(heads(q), heads(k), heads(v))), self.wo2)


def test_two_groups_share_an_input():
    program = quantized(normal(lambda m, x: attend(m, x) + attend_again(m, x), **TWICE), INT8)
    assert counts(program)["scaled_linear"] == 8
    assert len(quantise_ops(program)) == 3


def test_types_do_not_share_an_input():
    program = normal(lambda m, x: attend(m, x) + attend_again(m, x), **TWICE)
    mixed = quantized(program, INT8.with_rules([Rule("wq2", QSpec("fp8"))]))
    assert len(quantise_ops(mixed)) == 4
    assert {node.args[2] for node in quantise_ops(mixed)} == {torch.int8, torch.float8_e4m3fn}


def test_inputs_are_quantised_before_the_first_reader_of_any_group():
    """The group that is listed first does not have the first reader."""

    def fn(self, x):
        v = F.linear(x, self.wv, self.bv)
        other = attend_again(self, x)
        q, k = F.linear(x, self.wq, self.bq), F.linear(x, self.wk, self.bk)
        return F.linear(joined(sdpa(heads(q), heads(k), heads(v))), self.wo, self.bo) + other

    program = quantized(normal(fn, **TWICE), INT8)
    assert len(quantise_ops(program)) == 3
    assert error(program, fn, X, **TWICE) < 3e-2


@pytest.fixture(scope="module")
def wan():
    model, kwargs = zoo.make("i2v")
    return wancompile.trace(model, kwargs)


def test_blocks_share_text_and_image_states(wan):
    program = quantized(wan, plain("fp8"))
    in_a_block = 6  # qkv, out, q, out, up, down
    assert len(quantise_ops(program)) == 2 * in_a_block + 2
    assert counts(program)["scaled_linear"] == 2 * 12


def test_roles_can_differ_in_type(wan):
    recipe = resolve("int8").with_rules([Rule("ffn_*", QSpec("fp8")), Rule("attn_q_proj", None)])
    program = quantized(wan, recipe)
    stored = {name.rpartition("_")[2] for name in program.state if ".weight_" in name}
    assert stored == {"int8", "fp8", "scale"}
    assert all(f"blocks.{i}.ffn.net.2.weight_fp8" in program.state for i in range(2))
    assert all(f"blocks.{i}.attn2.to_q.weight" in program.state for i in range(2))


def test_a_weight_that_two_linears_read_is_stored_once():
    def fn(self, x, linear=F.linear):
        v = linear(x, self.wv, self.bv)
        q, k = linear(x, self.wq, self.bq), linear(x, self.wq, self.bk)
        return linear(joined(sdpa(heads(q), heads(k), heads(v))), self.wo, self.bo)

    program = quantized(normal(fn, **WEIGHTS), INT8)
    assert {name for name in program.state if "int8" in name} == {"wq_int8", "wv_int8", "wo_int8"}
    assert error(program, partial(fn, linear=rounded_linear("int8")), X, **WEIGHTS) < 1e-5


class Tied(nn.Module):
    """Two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))
        self.k.weight = self.q.weight

    def forward(self, x):
        mixed = sdpa(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)))
        return self.o(joined(mixed))


def test_modules_with_one_weight():
    model = Tied()
    program = quantized(pipeline.run(export(model, [{"x": X}]), NORMALIZE), INT8)
    assert len([name for name in program.state if "weight_int8" in name]) == 3
    assert pipeline.relative_error(program(x=X), model(X)) < 3e-2


def test_a_weight_left_in_float_elsewhere_stays_too():
    def fn(self, x):
        return attend(self, x) * self.wq.sum()

    program = quantized(normal(fn, **WEIGHTS), INT8)
    assert torch.equal(program.state["wq"], WEIGHTS["wq"])
    assert error(program, fn, X, **WEIGHTS) < 3e-2


# Weights that are computed from stored tensors --------------------------------------------------


@pytest.mark.parametrize(
    "weight",
    [
        lambda self, w: w.t(),
        lambda self, w: w.transpose(0, 1).contiguous(),
        lambda self, w: w + 0.5 * self.w_up @ self.w_down,
        lambda self, w: w[: CHANNELS // 2].repeat(2, 1),
    ],
    ids=["transposed", "copied", "low rank added", "sliced"],
)
def test_a_weight_is_computed_before_it_is_rounded(weight):
    def fn(self, x, linear=F.linear):
        return attend(self, x, linear=lambda x, w, b: linear(x, weight(self, w), b))

    weights = {**WEIGHTS, **tensors("w_up", "w_down")}
    program = quantized(normal(fn, **weights), INT8)
    assert counts(program)["scaled_linear"] == 4
    assert error(program, partial(fn, linear=rounded_linear("int8")), X, **weights) < 1e-5
    assert not {"wq", "wk", "wv", "wo"} & set(program.state)


def test_broken_weights_are_named():
    program = normal(attend, **WEIGHTS)
    program.state["wk"] = WEIGHTS["wk"].clone()
    program.state["wk"][3, 2] = torch.inf
    with pytest.raises(NumericsError, match="NaN or infinity") as caught:
        quantized(program, INT8)
    assert (caught.value.site, caught.value.pass_name) == ("wk", "quantize_linears")
    assert "in forward" in caught.value.source
