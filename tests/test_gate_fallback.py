"""What the gate returns to another type, or to floating point, and in which order."""

from __future__ import annotations

from dataclasses import replace

import gating
import pytest
import torch
import zoo
from gating import OPEN, calls, float_output

import wancompile
from wancompile import passes, pipeline
from wancompile.errors import GateError
from wancompile.gate.check import Kind
from wancompile.gate.fallback import relax_sites
from wancompile.gate.limits import Limits
from wancompile.pipeline import relative_error
from wancompile.recipe import ATTENTIONS, QSpec, Recipe, Rule, resolve

UNSMOOTHED = Recipe("unsmoothed", QSpec("int8", smooth=False))


data = pytest.fixture(scope="module")(gating.data)
stats = pytest.fixture(scope="module")(gating.stats)
int8 = pytest.fixture(scope="module")(gating.int8)
traced = pytest.fixture(scope="module")(gating.traced)


@pytest.fixture(scope="module")
def free(traced, stats):
    """What becomes of the model where there is no limit, by type."""
    return {
        dtype: traced.compiled(dtype, stats=stats, limits=OPEN).report for dtype in ("int8", "fp8")
    }


@pytest.fixture(scope="module")
def quantized(traced, stats):
    """The program at QUANTIZED, where every site has its own value."""
    recipe = resolve("int8-attention")
    steps = (*passes.smoothing(recipe, stats), *passes.quantization(recipe, stats))
    return pipeline.run(traced.program, steps)


def test_a_group_beyond_its_own_limit_gets_the_other_type_and_then_none(traced, stats, free):
    """int8 errs less than fp8 here, so that fp8 cannot be what helps."""
    errors = free["int8"].errors
    limit = sorted(errors.values())[-3]  # two groups are beyond it
    worst = {key for key, error in errors.items() if error > limit}
    result = traced.compiled("int8", stats=stats, limits=replace(OPEN, own=limit))
    fallbacks = result.report.gate.fallbacks
    assert [(one.place, one.before, one.after) for one in fallbacks] == [
        *((key, "int8", "fp8") for key in errors if key in worst),
        *((key, "fp8", "float") for key in errors if key in worst),
    ]
    assert all(one.kind is Kind.OWN and one.figure > one.limit == limit for one in fallbacks)
    assert result.report.recipe.rules[-2:] == tuple(
        Rule(key, None) for key in errors if key in worst
    )
    for key in worst:
        assert f"{key}.weight" in result.program.state
    assert result.report.errors.keys() == errors.keys() - worst
    assert f"fell back: {fallbacks[0].place}: int8 to fp8" in str(result.report)


def test_the_other_type_is_kept_where_it_helps(traced, stats, free):
    errors = free["fp8"].errors
    limit = sorted(errors.values())[-2]
    result = traced.compiled("fp8", stats=stats, limits=replace(OPEN, own=limit))
    (only,) = result.report.gate.fallbacks
    assert (only.place, only.after) == (max(errors, key=errors.__getitem__), "int8")
    assert result.report.errors[only.place] < limit < only.figure
    assert f"{only.place}.weight_int8" in result.program.state


def test_an_attention_whose_own_error_is_too_large_returns_to_float(traced, stats):
    recipe = Recipe("mixed", QSpec("int8"), attention=ATTENTIONS["fp8"])
    own = traced.compiled(recipe, stats=stats, limits=OPEN).report.gate.check.own
    sites = [f"blocks.{block}.attn1:attention" for block in (0, 1)]
    groups = max(figure for place, figure in own.items() if place not in sites)
    limit = (groups + min(own[site] for site in sites)) / 2
    result = traced.compiled(recipe, stats=stats, limits=replace(OPEN, own=limit))
    assert [one.place for one in result.report.gate.fallbacks] == sites
    assert "scaled_attention" not in result.program.print()
    assert "scaled_linear" in result.program.print()


def test_only_the_first_block_with_offenders_falls_back_in_a_round(quantized, int8):
    check = replace(int8.report.gate.check, limits=replace(OPEN, site=0.0))
    relaxed = relax_sites(quantized, resolve("int8-attention"), check)
    assert {one.place[:8] for one in relaxed.fallbacks} == {"blocks.0"}
    assert all(one.after == "float" and one.kind is Kind.SITE for one in relaxed.fallbacks)
    groups = {str(one.key) for one in quantized.groups if str(one.key).startswith("blocks.0")}
    places = [one.place for one in relaxed.fallbacks]
    assert set(places) == groups | {"blocks.0.attn1:attention"}
    assert len(places) == len(set(places))


def test_the_worst_of_a_block_falls_back_where_no_site_of_it_is_beyond(quantized, int8):
    check = int8.report.gate.check
    limits = replace(OPEN, block=min(one.relative for one in check.blocks) * 1.001)
    relaxed = relax_sites(quantized, resolve("int8-attention"), replace(check, limits=limits))
    (only,) = relaxed.fallbacks
    inside = {place: one for place, one in check.own.items() if place.startswith("blocks.1")}
    assert only.place == max(inside, key=inside.__getitem__)
    assert only.kind is Kind.BLOCK


def test_what_is_in_float_has_nothing_to_fall_back_to(quantized, int8):
    check = replace(int8.report.gate.check, limits=Limits(*[0.0] * 5))
    nothing = Recipe("float", None)
    relaxed = relax_sites(quantized, nothing, check)
    assert relaxed.fallbacks == ()
    assert relaxed.recipe == nothing


def test_sites_fall_back_till_they_are_within_their_limit(traced, stats, free):
    first = free["fp8"].gate.check
    limit = max(one.relative for one in first.sites) * 0.9
    result = traced.compiled("fp8", stats=stats, limits=replace(OPEN, site=limit))
    gate = result.report.gate
    assert gate.check.passed
    assert 0 < len(gate.fallbacks) < len(result.report.groups)
    assert max(one.relative for one in gate.check.sites) <= limit
    assert gate.check.outputs[0].relative < first.outputs[0].relative


def test_a_damaged_group_is_caught_by_default():
    """Outlier channels ruin int8 without smoothing; the gate finds it without being asked."""
    model, kwargs = zoo.make("t2v", 1)
    with torch.no_grad():
        norm, query = model.blocks[0].norm2, model.blocks[0].attn2.to_q
        factor = torch.ones(48)
        factor[7] = 3e3
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)
        query.weight.div_(factor)
    data = [kwargs, *calls(4, layers=1)]
    ruined = wancompile.compile(model, data, UNSMOOTHED, limits=None)
    other = zoo.example("t2v", 1, seed=99)
    expected = float_output(model, other)
    before = relative_error(ruined(**other, return_dict=False)[0], expected)
    result = wancompile.compile(model, data, UNSMOOTHED)
    after = relative_error(result(**other, return_dict=False)[0], expected)
    (only,) = result.report.gate.fallbacks
    assert (only.place, only.before, only.after) == ("blocks.0.attn2.to_q", "int8", "fp8")
    assert only.figure > 0.15
    assert after < before


def test_a_consumed_model_cannot_fall_back_on_sites_but_on_its_own_errors(data, stats, free):
    limit = sorted(free["int8"].errors.values())[-2]
    model, _ = zoo.make("t2v", 2)
    limits = Limits(own=limit, site=0.0, block=1.0, output=1.0)
    result = wancompile.compile(
        model, recipe="int8", stats=stats, example_inputs=data[0], consume=True, limits=limits
    )
    gate = result.report.gate
    assert {one.kind for one in gate.fallbacks} == {Kind.OWN}
    assert {one.kind for one in gate.check.violations} == {Kind.SITE}
    assert all(parameter.is_meta for parameter in model.parameters())
    again, _ = zoo.make("t2v", 2)
    with pytest.raises(GateError, match="too far from the original"):
        wancompile.compile(
            again, recipe="int8", stats=stats, example_inputs=data[0], consume=True,
            limits=replace(OPEN, output=1e-5),
        )  # fmt: skip
