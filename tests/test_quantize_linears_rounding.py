"""Weights of linears that are rounded better than to nearest: by GPTQ, and clipped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
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
    skips,
    tensors,
)

from wancompile import pipeline
from wancompile.calibrate import Calibration
from wancompile.errors import CalibrationError, NumericsError
from wancompile.ir.site import Fold, Role
from wancompile.passes import FUSE, QuantizeLinears, Smooth
from wancompile.quant.rounding import choose_rounding
from wancompile.recipe import QSpec, Recipe, Rule

INT8 = plain("int8")
sdpa = F.scaled_dot_product_attention


def correlated(tokens: int = 64, seed: int = 3):
    """Inputs with a mean and few directions, the same for all seeds, as activations have them."""
    directions = torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    low = torch.randn(2, tokens, 3, generator=draw) @ directions
    return low + 0.05 * torch.randn(2, tokens, CHANNELS, generator=draw) + 1


def better(dtype: str = "int8", *rules: Rule, **options) -> Recipe:
    chosen = {"smooth": False, "rounding": "gptq", **options}
    return Recipe("better", QSpec(dtype, **chosen), rules)


def calibrated(program, x=None):
    calibration = Calibration(program)
    calibration(x=correlated() if x is None else x)
    return calibration.stats()


def notes(program) -> list[str]:
    return [note.text for note in program.records[-1].done]


# Of e4m3 the activations make nearly all of the error, so that weights have little to win.
@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.9), ("fp8", 1.0)])
def test_gptq_lowers_the_error_on_other_inputs(dtype, most):
    program = normal(attend, correlated(), **WEIGHTS)
    nearest = quantized(program, plain(dtype))
    stats = calibrated(program)
    found = quantized(program, better(dtype), stats)
    x = correlated(32, seed=4)
    before, after = (error(one, attend, x, **WEIGHTS) for one in (nearest, found))
    assert after < most * before
    kept = [group.rounding for group in found.groups if group.rounding.gptq]
    assert kept
    assert any(text.startswith("GPTQ: error / ") for text in notes(found))
    assert all(one.error < 0.95 * one.error_nearest for one in kept)
    assert counts(found) == counts(nearest)


def test_weights_of_a_group_are_those_of_the_choice_for_all_of_them():
    program = normal(attend, correlated(), **WEIGHTS)
    stats = calibrated(program)
    found = quantized(program, better(clip=True), stats)
    qkv = next(one for one in program.groups if len(one.sites) == 3)
    stacked = torch.cat([WEIGHTS[str(site)] for site in qkv.sites])
    tokens = stats.channels[qkv.observer].tokens
    wanted = choose_rounding(stacked, tokens, torch.int8, clip=True, gptq=True)
    data = torch.cat([found.state[f"{site}_int8"] for site in qkv.sites])
    assert torch.equal(data, wanted.weight.data)
    assert next(one for one in found.groups if one.key == qkv.key).rounding == wanted.how
    merged = pipeline.run(found, FUSE)
    assert torch.equal(merged(x=X), found(x=X))


@pytest.mark.parametrize("weights_scale", [1.0, 4.0])
def test_tokens_are_smoothed_as_the_input_is(weights_scale):
    """The scale lies in rows of the value projection, which is quantized and gone by then."""
    loud = torch.full((CHANNELS,), weights_scale)
    loud[2] = 60
    weights = {**WEIGHTS, "wv": WEIGHTS["wv"] * loud[:, None], "bv": WEIGHTS["bv"] * loud}
    program = normal(attend, correlated(), **weights)
    stats = calibrated(program)
    recipe = better(smooth=True)
    smoothed = pipeline.run(program, [Smooth(recipe, stats)])
    out = next(one for one in smoothed.groups if one.role is Role.ATTN_OUT)
    assert out.smoothing.applied
    assert out.fold is Fold.VALUE_ROWS
    found = quantized(smoothed, recipe, stats)
    inverse = smoothed.state[out.smoothing.inverse]
    tokens = stats.channels[out.observer].tokens * inverse
    weight = weights["wo"] * smoothed.state[out.smoothing.inverse.replace("inverse", "scale")]
    wanted = choose_rounding(weight, tokens, torch.int8, clip=False, gptq=True)
    assert torch.equal(found.state["wo_int8"], wanted.weight.data)
    after = next(one for one in found.groups if one.role is Role.ATTN_OUT)
    assert after.rounding == wanted.how
    # Smoothed once: the error before GPTQ is that which the search promised, on all the rows.
    assert after.rounding.error_nearest == pytest.approx(out.smoothing.error, rel=1e-3)


def test_a_second_run_keeps_what_was_rounded():
    program = normal(attend, correlated(), **WEIGHTS)
    stats = calibrated(program)
    once = quantized(program, better(clip=True), stats)
    again = run_pass(once, QuantizeLinears(better(clip=True), stats))
    assert again.print() == once.print()
    assert again.groups == once.groups
    assert not again.records[-1].done
    assert not again.records[-1].skipped


def test_rules_say_which_groups_are_rounded_better():
    program = normal(attend, correlated(), **WEIGHTS)
    rule = Rule("attn_out_proj", QSpec("int8", smooth=False))
    found = quantized(program, better("int8", rule), calibrated(program))
    assert [one.rounding is None for one in found.groups] == [False, True]
    assert torch.equal(found.state["wo_int8"], quantized(program, INT8).state["wo_int8"])


def test_without_statistics_weights_are_rounded_to_nearest():
    program = normal(attend, correlated(), **WEIGHTS)
    found, nearest = quantized(program, better()), quantized(program, INT8)
    assert all(torch.equal(found.state[name], nearest.state[name]) for name in nearest.state)
    assert set(skips(found).values()) == {"without statistics weights are rounded to nearest"}
    assert all(group.rounding is None for group in found.groups)


def test_three_tokens_judge_no_rounding():
    program = normal(attend, correlated(), **WEIGHTS)
    stats = calibrated(program, correlated()[:1, :3].repeat(2, 4, 1))
    found = quantized(program, better(), stats)
    assert skips(found)["wq"] == "only 3 of the 10 different tokens that it takes to judge rounding"
    assert torch.equal(found.state["wq_int8"], quantized(program, INT8).state["wq_int8"])


def test_a_refusal_has_a_reason():
    program = normal(attend, **{name: t.sign() for name, t in WEIGHTS.items()})
    stats = calibrated(program, correlated().sign())
    found = quantized(program, better(clip=True), stats)
    reasons = [n.text for n in found.records[-1].skipped if n.site == "wq"]
    assert reasons[0] == "clipping does not lower the calibrated error"
    assert reasons[1] == "GPTQ does not lower the calibrated error"
    group = found.groups[0]
    assert (group.rounding.clip_refusal, group.rounding.gptq_refusal) == (
        "does not lower the calibrated error",
    ) * 2


def test_a_weight_of_two_groups_is_rounded_to_nearest():
    """What suits the inputs of one need not suit those of the other."""

    def fn(self, x):
        again = attend(self, attend(self, x))
        return again + F.linear(x, self.wv2)

    program = normal(fn, correlated(), **WEIGHTS, **tensors("wv2"))
    found = quantized(program, better(clip=True), calibrated(program))
    assert set(skips(found).values()) >= {"a weight of the group is used more than once"}
    nearest = quantized(program, INT8)
    for name in ("wq_int8", "wk_int8", "wv_int8", "wo_int8"):
        assert torch.equal(found.state[name], nearest.state[name])


def test_a_weight_that_two_linears_of_a_group_read_is_rounded_once():
    def fn(self, x):
        v = F.linear(x, self.wv, self.bv)
        q, k = F.linear(x, self.wq, self.bq), F.linear(x, self.wq, self.bk)
        return F.linear(joined(sdpa(heads(q), heads(k), heads(v))), self.wo, self.bo)

    program = normal(fn, correlated(), **WEIGHTS)
    found = quantized(program, better(), calibrated(program))
    names = {name for name in found.state if "int8" in name}
    assert names == {"wq_int8", "wv_int8", "wo_int8"}
    assert found.groups[0].rounding.gptq


def test_broken_weights_are_named_with_gptq_too():
    program = normal(attend, correlated(), **WEIGHTS)
    stats = calibrated(program)
    program.state["wk"] = WEIGHTS["wk"].clone()
    program.state["wk"][3, 2] = torch.nan
    with pytest.raises(NumericsError, match="NaN or infinity") as caught:
        quantized(program, better(), stats)
    assert (caught.value.site, caught.value.pass_name) == ("wk", "quantize_linears")


def test_statistics_of_another_model_are_refused():
    program = normal(attend, correlated(), **WEIGHTS)
    stats = replace(calibrated(program), channels={})
    with pytest.raises(CalibrationError, match="they are of another model") as caught:
        quantized(program, better(), stats)
    assert caught.value.pass_name == "quantize_linears"
