"""Inputs of linears that have one scale in all calls, from calibration."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import zoo
from kit import counts, error, run_pass
from small import WEIGHTS, X, attend, largest, nearest, normal, plain, quantized, rounded

import wancompile
from wancompile import pipeline
from wancompile.calibrate import Calibration
from wancompile.errors import CalibrationError, RecipeError
from wancompile.gate.check import Kind
from wancompile.gate.limits import Limits
from wancompile.ir import match
from wancompile.ir.site import Fold, Role, Site
from wancompile.passes import QuantizeLinears, Smooth
from wancompile.recipe import QSpec, Recipe, Rule

ops = torch.ops.wancompile
LOUD = torch.ones(12).index_fill_(0, torch.tensor([2, 7]), 30.0)


def static(dtype, smooth=False, *rules):
    return Recipe("static", QSpec(dtype, smooth=smooth, activation="static"), tuple(rules))


def calibrated(program, x=X):
    calibration = Calibration(program)
    calibration(x=x)
    return calibration.stats()


def quantise_ops(program):
    return match.nodes_of(program.graph, ops.quantize_per_tensor.default)


@pytest.fixture(scope="module")
def small():
    program = normal(attend, **WEIGHTS)
    return program, calibrated(program)


def test_a_group_reads_one_stored_scale(golden, small):
    program, stats = small
    golden(quantized(program, static("int8"), stats).print("canonical"))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_the_scale_is_the_largest_magnitude_of_calibration(small, dtype):
    program, stats = small
    found = quantized(program, static(dtype), stats)
    assert found.state["static.wq"].item() == pytest.approx(X.abs().max() / largest(dtype))
    assert "quantize_per_token" not in counts(found)
    assert (counts(found)["quantize_per_tensor"], counts(found)["scaled_linear"]) == (2, 4)
    assert 1e-3 < error(found, attend, X, **WEIGHTS) < 0.1


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_what_lies_outside_saturates(small, dtype):
    """Three times what was calibrated, by hand in fp64."""
    program, stats = small
    found = quantized(program, static(dtype), stats)
    names = iter(["static.wq"] * 3 + ["static.wo"])

    def linear(x, weight, bias):
        scale = found.state[next(names)].double()
        return nearest(x / scale, dtype) * scale @ rounded(weight, dtype).T + bias

    assert error(found, partial(attend, linear=linear), 3 * X, **WEIGHTS) < 1e-4
    assert error(found, attend, 3 * X, **WEIGHTS) > 0.2


def test_smoothing_divides_the_range():
    """Also where 1/s has gone into rows of the value projection, which has 8 bits by then."""
    weights = {**WEIGHTS, "wv": WEIGHTS["wv"] * LOUD[:, None], "bv": WEIGHTS["bv"] * LOUD}
    x = torch.randn(2, 64, 12, generator=torch.Generator().manual_seed(0)) * LOUD
    program = normal(attend, x, **weights)
    stats = calibrated(program, x)
    recipe = static("int8", True)
    smoothed = pipeline.run(program, [Smooth(recipe, stats)])
    found = quantized(smoothed, recipe, stats)
    places = {}
    for group in smoothed.groups:
        assert group.smoothing.applied
        places[group.role] = group.fold
        amax = stats.channels[group.observer].amax.amax(0)
        wanted = (amax * smoothed.state[group.smoothing.inverse]).max() / 127
        torch.testing.assert_close(found.state[f"static.{group.key}"], wanted.reshape(1))
    assert places == {Role.ATTN_QKV: Fold.QUANTIZE, Role.ATTN_OUT: Fold.VALUE_ROWS}
    assert [node.args[1] is None for node in quantise_ops(found)] == [False, True]
    unsmoothed = quantized(program, static("int8"), stats)
    by = [error(one, attend, x, **weights) for one in (found, unsmoothed)]
    assert by[0] < 0.7 * by[1]


def test_a_second_run_changes_nothing(small):
    program, stats = small
    once = quantized(program, static("int8"), stats)
    again = run_pass(once, QuantizeLinears(static("int8"), stats))
    assert again.print() == once.print()


def test_rules_say_which_groups_are_static(small):
    program, stats = small
    rule = Rule("attn_out_proj", QSpec("int8", smooth=False, activation="static"))
    found = quantized(program, plain("int8").with_rules([rule]), stats)
    assert (counts(found)["quantize_per_token"], counts(found)["quantize_per_tensor"]) == (1, 1)
    assert "static.wo" in found.state


def test_static_and_dynamic_groups_do_not_share_an_input():
    def fn(self, x):
        return attend(self, x) + attend(self, x.flip(2)) + F.linear(x, self.w)

    # wq, wk, wv and what reads x beside them are one group; flipped they are another one.
    program = normal(fn, **WEIGHTS, w=WEIGHTS["wq"].flip(0))
    assert len({group.observer for group in program.groups}) >= 2
    stats = calibrated(program)
    mixed = quantized(
        program, plain("int8").with_rules([Rule("wq", static("int8").linears)]), stats
    )
    assert counts(mixed)["quantize_per_tensor"] == 1


def test_without_statistics_it_is_an_error(small):
    program, _ = small
    with pytest.raises(CalibrationError, match="static scale of activations needs") as caught:
        quantized(program, static("int8"))
    assert (caught.value.site, caught.value.pass_name) == ("wq", "quantize_linears")
    assert "in forward" in caught.value.source


def test_a_recipe_says_static_and_nothing_else():
    recipe = static("fp8", False, Rule("ffn_*", QSpec("int8")))
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.scales_inputs
    assert plain("int8").with_rules([Rule("*", recipe.linears)]).scales_inputs
    assert not plain("int8").scales_inputs
    old = recipe.to_json().replace(',\n    "activation": "static"', "")
    assert Recipe.from_json(old).linears == QSpec("fp8", smooth=False)
    with pytest.raises(
        RecipeError, match="unknown activation 'tensor'; there are token and static"
    ):
        QSpec("int8", activation="tensor")


# A whole model ----------------------------------------------------------------------------------

DOWN_SITE = Site.parse("blocks.0.ffn.net.2")
DOWN = Rule("ffn_down_proj", QSpec("int8", activation="static"))


@pytest.fixture(scope="module")
def wan():
    model, inputs = zoo.make("t2v", layers=1)
    return model, inputs


def test_compiling_needs_data_for_static_scales(wan):
    model, inputs = wan
    with pytest.raises(CalibrationError, match="static scales of activations need calibration"):
        wancompile.compile(model, example_inputs=inputs, recipe=static("int8"))


@pytest.fixture(scope="module")
def compiled(wan):
    model, inputs = wan
    recipe = plain("int8").with_rules([DOWN])
    return wancompile.compile(model, [inputs], recipe=recipe, limits=Limits(output=1.0))


def test_the_linear_before_a_static_one_rounds_its_own_output(wan, compiled):
    found = counts(compiled.program)
    assert (found["linear_gelu_quantize"], found.get("gelu_quantize", 0)) == (1, 0)
    model, inputs = wan
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    assert pipeline.relative_error(compiled(**inputs, return_dict=False)[0], expected) < 0.05


def test_the_gate_counts_the_largest_codes(compiled):
    clipped = compiled.report.gate.check.clipped
    assert list(clipped) == ["blocks.0.ffn.net.2"]
    assert 0 <= clipped["blocks.0.ffn.net.2"] < 0.01


def test_it_is_saved_and_loaded(wan, compiled, tmp_path):
    _, inputs = wan
    compiled.save(tmp_path / "static")
    loaded = wancompile.load(tmp_path / "static")
    assert loaded.report.recipe == compiled.report.recipe
    outputs = [one(**inputs, return_dict=False)[0] for one in (loaded, compiled)]
    assert torch.equal(*outputs)


def test_a_scale_that_clips_gives_way_to_one_per_token(wan):
    """With statistics of a model whose GELU yields a fifth of what this one's does."""
    model, inputs = wan
    stats = wancompile.calibrate(model, [inputs])
    small = {
        site: replace(one, amax=one.amax / 5) if site == DOWN_SITE else one
        for site, one in stats.channels.items()
    }
    found = wancompile.compile(
        model,
        stats=replace(stats, channels=small),
        example_inputs=inputs,
        recipe=plain("int8").with_rules([DOWN]),
        limits=Limits(output=1.0),
    )
    (fallback,) = found.report.gate.fallbacks
    assert (fallback.place, fallback.before, fallback.after) == (
        DOWN_SITE.path,
        "int8-static",
        "int8",
    )
    assert fallback.kind is Kind.CLIPPED
    assert "linear_gelu_quantize" not in counts(found.program)
