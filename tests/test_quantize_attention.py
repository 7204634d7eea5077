from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kit import Function, counts, error
from small import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    WEIGHTS,
    X,
    attend,
    heads,
    joined,
    largest,
    nearest,
    normal,
    plain,
    quantized,
    rounded,
)

from wancompile import pipeline
from wancompile.calibrate import Calibration
from wancompile.errors import CalibrationError
from wancompile.ir import match
from wancompile.ir.site import Fold, Site
from wancompile.passes import QuantizeAttention, Smooth
from wancompile.quant.judge import FEWEST
from wancompile.recipe import ATTENTIONS, QSpec, Recipe
from wancompile.trials import trials

sdpa = F.scaled_dot_product_attention
# Sylvester's, of heads of four.
HADAMARD = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def attention_only(name: str = "int8") -> Recipe:
    return Recipe("attention", None, attention=ATTENTIONS[name])


def calibrated(program, x=X):
    calibration = Calibration(program, rows=32)
    calibration(x=x)
    return calibration.stats()


def rewritten(fn=attend, name="int8"):
    """Quantize the attentions of `fn`, calibrated on X."""
    program = normal(fn, **WEIGHTS)
    one = QuantizeAttention(attention_only(name), calibrated(program))
    return pipeline.run(program, [one])


def skips(program) -> list[str]:
    return [note.text for note in program.records[-1].skipped]


def rounded_attention(
    q, k, v, *, name: str = "int8", scale: float | None = None, centre=True, matrix=HADAMARD
):
    """Attention on turned q, turned and centred k, and v, all rounded, in float64."""
    spec = ATTENTIONS[name]
    matrix = torch.eye(q.shape[-1]) if matrix is None else matrix
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q @ matrix.double(), k @ matrix.double()
    q = rounded(q, "int8") if spec.dtype == "int8" else per_head(q, "fp8")
    k = per_head(k - middle(k) if centre else k, spec.dtype)
    weights = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    if spec.values == "bf16":
        top = weights.amax(-1, keepdim=True)
        parts = (weights / top).bfloat16().double()
        return parts @ v.bfloat16().double() / (weights / top).sum(-1, keepdim=True)
    parts = 256 * weights / weights.amax(-1, keepdim=True)
    return nearest(parts, "fp8") @ per_head(v, "fp8") / parts.sum(-1, keepdim=True)


def middle(x):
    """The middle of each channel's range over batch and tokens."""
    return (x.amax((0, 2), keepdim=True) + x.amin((0, 2), keepdim=True)) / 2


def per_head(x, dtype: str):
    scale = x.abs().amax((0, 2, 3), keepdim=True) / largest(dtype)
    return nearest(x / scale, dtype) * scale


def test_attention_reads_8_bits(golden):
    golden(rewritten().print("canonical"))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_operands_are_turned_and_rounded(name):
    program = rewritten(name=name)
    by_hand = partial(attend, attention=partial(rounded_attention, name=name))
    # P and v are rounded to bf16 after sums in fp32, so that a few fall to the other side of a tie.
    assert error(program, by_hand, X, **WEIGHTS) < (2e-4 if name == "int8" else 1e-5)
    assert error(program, attend, X, **WEIGHTS) > 1e-3


@pytest.mark.parametrize("name", ATTENTIONS)
def test_heads_whose_size_is_no_power_of_two_are_not_turned(name):
    def fn(self, x, attention=sdpa):
        q, k, v = (
            F.linear(x, w).unflatten(-1, (4, 3)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        return F.linear(joined(attention(q, k, v)), self.wo)

    program = rewritten(fn, name)
    assert counts(program)["scaled_attention"] == 1
    assert "hadamard" not in counts(program)
    assert "turned" not in program.records[-1].done[0].text
    by_hand = partial(fn, attention=partial(rounded_attention, name=name, matrix=None))
    assert error(program, by_hand, X, **WEIGHTS) < (2e-4 if name == "int8" else 1e-5)


def test_turning_makes_the_error_of_a_large_channel_smaller():
    outlier = torch.ones(CHANNELS)
    outlier[::HEAD_DIM] = 30
    weights = {**WEIGHTS, "wq": WEIGHTS["wq"] * outlier[:, None], "bq": WEIGHTS["bq"] * outlier}
    weights |= {"wk": WEIGHTS["wk"] / outlier[:, None], "bk": WEIGHTS["bk"] / outlier}
    program = normal(attend, **weights)
    program = pipeline.run(program, [QuantizeAttention(attention_only(), calibrated(program))])
    unturned = partial(attend, attention=partial(rounded_attention, matrix=None))
    one = Function(unturned, **weights).double()(X.double())
    exact = Function(attend, **weights).double()(X.double())
    assert error(program, attend, X, **weights) < 0.7 * pipeline.relative_error(one, exact)


@pytest.mark.parametrize(("name", "stored"), [("int8", "k"), ("int8-fast", "kv"), ("fp8", "qkv")])
def test_scales_are_static_but_those_of_queries_in_int8(name, stored):
    program = rewritten(name=name)
    by_hand = partial(attend, attention=partial(rounded_attention, name=name))
    assert error(program, by_hand, 10 * X, **WEIGHTS) > 0.1
    assert {name for name in program.state if "scale" in name} == {
        f"attention_{operand}_scale" for operand in stored
    }


def test_keys_far_from_zero_keep_their_bits():
    """All keys of a channel lie near 200, on one or two of the numbers that int8 has there."""
    weights = {**WEIGHTS, "bk": WEIGHTS["bk"] + 200}
    program = normal(attend, **weights)
    program = pipeline.run(program, [QuantizeAttention(attention_only(), calibrated(program))])
    assert counts(program)["sub"] == 1
    uncentred = partial(rounded_attention, centre=False)
    one = Function(partial(attend, attention=uncentred), **weights).double()(X.double())
    exact = Function(attend, **weights).double()(X.double())
    assert error(program, attend, X, **weights) < 0.2 * pipeline.relative_error(one, exact)
    k = heads(F.linear(X, weights["wk"], weights["bk"])) @ HADAMARD
    torch.testing.assert_close(program.state["attention_k_middle"], middle(k)[0])
    width = (k - middle(k)).abs().amax((0, 2, 3))
    # Numbers near 400 are multiples of 3e-5.
    torch.testing.assert_close(program.state["attention_k_scale"] * 127, width, rtol=0, atol=1e-4)


def test_keys_around_zero_are_not_centred():
    def fn(self, x):
        return attend(self, torch.cat([x, -x], 1))

    weights = {**WEIGHTS, "bk": torch.zeros(CHANNELS)}
    program = normal(fn, **weights)
    program = pipeline.run(program, [QuantizeAttention(attention_only(), calibrated(program))])
    assert counts(program)["scaled_attention"] == 1
    assert "sub" not in counts(program)
    assert "attention_k_middle" not in program.state


@pytest.mark.parametrize("second", [-0.4, 0.9])
def test_keys_are_centred_only_if_calls_agree_on_their_middle(second):
    """Of two videos, the second one's keys are as the first one's times a factor.

    A range of both has its middle off zero. Where the two lie on either side of it, a third one may
    be anywhere between the first and its mirror image, which would saturate in that range.
    """
    x = torch.randn(CHANNELS, generator=torch.Generator().manual_seed(3)) + 0.1 * X
    weights = {**WEIGHTS, "bk": torch.zeros(CHANNELS)}
    program = normal(attend, **weights)
    calibration = Calibration(program, rows=32)
    for factor in (1.0, second):
        calibration(x=factor * x)
    program = pipeline.run(program, [QuantizeAttention(attention_only(), calibration.stats())])
    assert ("sub" in counts(program)) == (second > 0)
    seen = x if second > 0 else torch.cat([x, -x])
    assert error(program, attend, seen, **weights) < 0.002


def test_the_factor_of_the_logits_is_kept():
    def fn(self, x):
        return attend(self, x, attention=partial(sdpa, scale=0.7))

    by_hand = partial(attend, attention=partial(rounded_attention, scale=0.7))
    assert error(rewritten(fn), by_hand, X, **WEIGHTS) < 2e-4


def test_a_second_run_changes_nothing():
    program = normal(attend, **WEIGHTS)
    once = QuantizeAttention(attention_only(), calibrated(program))
    draft = pipeline.run(program, [once]).draft()
    nodes = len(draft.graph.nodes)
    once.apply(draft)
    assert len(draft.graph.nodes) == nodes
    assert not draft.done


def test_linears_and_attention_together():
    program = normal(attend, **WEIGHTS)
    program = quantized(program, plain("fp8", attention="int8"), calibrated(program))
    assert not {"linear", "scaled_dot_product_attention"} & set(counts(program))
    assert error(program, attend, X, **WEIGHTS) < 0.1


# What stays in floating point ------------------------------------------------------------------


@pytest.mark.parametrize(
    "attention",
    [
        partial(sdpa, is_causal=True),
        partial(sdpa, dropout_p=0.1),
        lambda q, k, v: sdpa(q, k, v, (q @ k.transpose(-1, -2) > 0)),
    ],
    ids=["causal", "dropout", "mask"],
)
def test_more_than_softmax_stays(attention):
    program = rewritten(lambda m, x: attend(m, x, attention=attention))
    assert "scaled_attention" not in counts(program)
    assert skips(program) == ["it has a mask, dropout or causality"]


def test_three_dimensions_stay():
    def fn(self, x):
        q, k, v = (F.linear(x, w) for w in (self.wq, self.wk, self.wv))
        return F.linear(sdpa(q, k, v), self.wo)

    program = rewritten(fn)
    assert "scaled_attention" not in counts(program)
    assert skips(program) == ["its operands have 3 dimensions, not [B, H, S, D]"]


def test_fewer_key_heads_stay():
    def fn(self, x):
        k, v = (F.linear(x, w[:HEAD_DIM]).unsqueeze(1) for w in (self.wk, self.wv))
        mixed = sdpa(heads(F.linear(x, self.wq)), k, v, enable_gqa=True)
        return F.linear(joined(mixed), self.wo)

    program = rewritten(fn)
    assert "scaled_attention" not in counts(program)
    assert skips(program) == ["q, k and v differ in heads or head size"]


def test_another_value_size_stays():
    def fn(self, x):
        v = F.linear(x, self.wv[: HEADS * 2]).unflatten(-1, (HEADS, 2)).transpose(1, 2)
        mixed = sdpa(heads(F.linear(x, self.wq)), heads(F.linear(x, self.wk)), v)
        return F.linear(joined(mixed), self.wo[:, : HEADS * 2])

    program = rewritten(fn)
    assert "scaled_attention" not in counts(program)
    assert skips(program) == ["q, k and v differ in heads or head size"]


def test_cross_attention_stays():
    def fn(self, x):
        q, context = F.linear(x, self.wq), x.flip(1)
        k, v = F.linear(context, self.wk), F.linear(context, self.wv)
        return F.linear(joined(sdpa(heads(q), heads(k), heads(v))), self.wo)

    program = rewritten(fn)
    assert "scaled_attention" not in counts(program)
    assert skips(program) == ["cross-attention stays in floating point"]


def test_an_attention_that_the_recipe_excepts_stays():
    program = normal(attend, **WEIGHTS)
    recipe = attention_only().with_float_attention(["atten*"])
    program = pipeline.run(program, [QuantizeAttention(recipe, calibrated(program))])
    assert "scaled_attention" not in counts(program)
    assert skips(program) == ["the recipe leaves it in floating point"]


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("seen", [1, 3, 4])
def test_too_few_different_tokens_leave_it_in_floating_point(name, seen):
    program, recipe = normal(attend, **WEIGHTS), attention_only(name)
    stats = calibrated(program, X[:1, :seen].repeat(2, 3, 1))
    after = pipeline.run(program, [QuantizeAttention(recipe, stats)])
    enough = seen >= FEWEST
    assert ("scaled_attention" in counts(after)) == enough
    text = f"only {seen} of the 4 different tokens that it takes to trust its ranges"
    assert skips(after) == ([] if enough else [text])
    # Nor is it measured for a recipe that is chosen by its errors.
    assert [str(one.site) for one in trials(program, recipe, stats)] == ["attention"] * enough


def test_statistics_without_tokens_are_refused():
    program = normal(attend, **WEIGHTS)
    stats = replace(calibrated(program), channels={})
    with pytest.raises(CalibrationError, match="they are of another model") as caught:
        pipeline.run(program, [QuantizeAttention(attention_only(), stats)])
    assert caught.value.site == "wq"
    assert caught.value.pass_name == "quantize_attention"


def test_a_recipe_without_attention_changes_nothing():
    program = normal(attend, **WEIGHTS)
    after = pipeline.run(program, [QuantizeAttention(plain("int8"))])
    assert after.print() == program.print()
    assert not after.records[-1].skipped


@pytest.mark.parametrize("calibrate_another", [False, True], ids=["none", "another model's"])
def test_missing_statistics_are_named(calibrate_another):
    program, stats = normal(attend, **WEIGHTS), None
    if calibrate_another:
        stats = calibrated(normal(one_head_less, **WEIGHTS))
    with pytest.raises(CalibrationError, match="none for this site") as caught:
        pipeline.run(program, [QuantizeAttention(attention_only(), stats)])
    assert caught.value.site == "attention"
    assert caught.value.pass_name == "quantize_attention"


def one_head_less(self, x):
    wq, wk, wv = (w[:-HEAD_DIM] for w in (self.wq, self.wk, self.wv))
    q, k, v = (
        F.linear(x, w).unflatten(-1, (HEADS - 1, HEAD_DIM)).transpose(1, 2) for w in (wq, wk, wv)
    )
    return F.linear(joined(sdpa(q, k, v)), self.wo[:, :-HEAD_DIM])


# Smoothing changes v after it was observed -----------------------------------------------------


def split_channels_first(x):
    """[B, S, D H] -> [B, H, S, D]: the channels of a head lie H apart."""
    return x.unflatten(-1, (HEAD_DIM, HEADS)).permute(0, 3, 1, 2)


def attend_channels_first(self, x):
    q, k = F.linear(x, self.wq, self.bq), F.linear(x, self.wk, self.bk)
    v = split_channels_first(F.linear(x, self.wv, self.bv))
    mixed = sdpa(heads(q), heads(k), v).permute(0, 2, 3, 1).flatten(2)
    return F.linear(mixed, self.wo, self.bo)


@pytest.mark.parametrize("fn", [attend, attend_channels_first])
def test_value_scales_are_those_of_the_smoothed_values(fn):
    outliers = torch.logspace(-2, 2, CHANNELS)[torch.randperm(CHANNELS)]
    weights = {
        **WEIGHTS,
        "wv": WEIGHTS["wv"] * outliers[:, None],
        "bv": WEIGHTS["bv"] * outliers,
        "wo": WEIGHTS["wo"] / outliers,
    }
    x = torch.randn(3, 40, CHANNELS)
    program = normal(fn, x, **weights)
    stats = calibrated(program, x)
    recipe = Recipe("smooth", QSpec("int8"), attention=ATTENTIONS["int8-fast"])
    smoothed = pipeline.run(program, [Smooth(recipe, stats)])
    out = next(group for group in smoothed.groups if group.key == Site("wo"))
    assert out.smoothing.applied

    after = pipeline.run(smoothed, [QuantizeAttention(recipe, stats)])
    attention = match.nodes_of(after.graph, torch.ops.wancompile.scaled_attention.default)[0]
    (stored,) = [str(a.target) for a in attention.args[3:6] if "v_scale" in str(a.target)]
    v = values_of(smoothed, x)
    expected = v.abs().amax((0, 2, 3))
    torch.testing.assert_close(after.state[stored] * 448, expected, rtol=1e-5, atol=0)


def values_of(program, x):
    """What the attention of a float program reads as v."""
    seen = []
    graph = program.draft().graph
    node = match.nodes_of(graph, torch.ops.aten.scaled_dot_product_attention.default)[0]

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.name == node.args[2].name:
                seen.append(result)
            return result

    Watch(program.module).run(x)
    return seen[0]


def test_unfolded_values_keep_their_scale():
    program = normal(attend, **WEIGHTS)
    recipe = plain("int8", attention="int8-fast")
    stats = calibrated(program)
    smoothed = pipeline.run(program, [Smooth(recipe, stats)])
    after = pipeline.run(smoothed, [QuantizeAttention(recipe, stats)])
    expected = heads(F.linear(X, WEIGHTS["wv"], WEIGHTS["bv"])).abs().amax((0, 2, 3))
    torch.testing.assert_close(after.state["attention_v_scale"] * 448, expected)
    assert next(g for g in program.groups if g.key == Site("wo")).fold is Fold.VALUE_ROWS
