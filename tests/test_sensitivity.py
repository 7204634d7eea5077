"""What each site does alone, against programs in which really only that site is rounded."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sensing import made, only

from wancompile import passes, pipeline
from wancompile.errors import CalibrationError, InputError, LevelError, NumericsError, RecipeError
from wancompile.pipeline import relative_error
from wancompile.recipe import ATTENTIONS, AttentionRule, QSpec, Recipe, Rule
from wancompile.sensitivity import HeldOut, Sensitivity, everything_in, sensitivity
from wancompile.trials import Branches, trials

TYPES = ("int8", "fp8")


@pytest.fixture(params=["t2v", "fused_i2v"])
def subject(request):
    return made(request.param)


@pytest.fixture
def t2v():
    return made("t2v")


def test_there_is_an_error_for_every_site_and_type(subject):
    sites = [(str(group.key), dtype) for group in subject.program.groups for dtype in TYPES]
    own = [one for one in subject.program.attentions if one.is_self]
    sites += [(str(one.site), name) for one in own for name in ATTENTIONS]
    found = [(one.site, one.dtype) for one in subject.found.sites]
    assert sorted(found) == sorted(sites)


def test_a_group_alone_errs_as_if_compiled_alone(subject):
    for one in subject.found.sites:
        if one.role != "self-attention":
            really = subject.really(only(one.site, one.dtype))
            assert one.error == pytest.approx(really, rel=0.01), (one.site, one.dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_an_attention_errs_as_if_rounded_alone_in_the_smoothed_program(subject, dtype):
    # Smoothing scales the channels of v, so that without it other numbers are rounded.
    first, *others = everything_in(dtype)
    names = [one.name for one in (first, *others)]
    smoothed = pipeline.run(subject.program, passes.smoothing(first, subject.stats))
    found = [one for one in subject.found.sites if one.role == "self-attention"]
    for one in (one for one in found if one.dtype in names):
        steps = passes.quantization(only(one.site, one.dtype), subject.stats)
        really = subject.error(pipeline.run(smoothed, steps))
        assert one.error == pytest.approx(really, rel=1e-3), one.site


@pytest.mark.parametrize("name", ATTENTIONS)
def test_all_together_err_as_if_compiled(subject, name):
    (together,) = (one for one in subject.found.together if one.dtype == name)
    dtype = ATTENTIONS[name].dtype
    (recipe,) = (one for one in everything_in(dtype) if one.name == name)
    assert together.error == pytest.approx(subject.really(recipe), rel=0.01)
    of_role = {"self-attention": name}
    sites = subject.found.sites
    alone = [one.error for one in sites if one.dtype == of_role.get(one.role, dtype)]
    assert together.predicted == pytest.approx(math.sqrt(sum(one * one for one in alone)))
    assert 0.5 < together.error / together.predicted < 2


def test_a_mixture_errs_as_if_compiled(t2v):
    rules = (Rule("ffn_*", QSpec("fp8")), Rule("blocks.1.attn2.*", None))
    kept = (AttentionRule("blocks.0.*", None),)
    recipe = Recipe("mixed", QSpec("int8"), rules, ATTENTIONS["int8"], kept)
    held_out = HeldOut.of(t2v.program, t2v.calls, t2v.stats)
    assert held_out.error_of(recipe) == pytest.approx(t2v.really(recipe), rel=0.01)
    assert held_out.error_of(Recipe("float", None)) < 1e-6


def test_local_errors_are_those_of_the_site(t2v):
    held_out = HeldOut.of(t2v.program, t2v.calls[:1], t2v.stats)
    recipe = Recipe("plain", QSpec("fp8", smooth=False))
    (up,) = (one for one in t2v.program.groups if str(one.key) == "blocks.0.ffn.net.0.proj")
    (found,) = (one for one in trials(t2v.program, recipe, None) if one.site == up.key)
    branches = Branches(t2v.program, [found])
    exact = [t2v.program(**t2v.calls[0])[0]]
    (outcome,) = branches.outcomes(t2v.calls[0], exact)
    rounded = pipeline.run(t2v.program, passes.quantization(only(str(up.key), "fp8"), None))
    values = [one.values([up.key], **t2v.calls[0])[up.key] for one in (rounded, t2v.program)]
    lost, total = outcome.local
    assert math.sqrt(lost / total) == pytest.approx(relative_error(*values), rel=1e-3)
    assert held_out.forwards == 1


def test_trials_leave_the_float_run_as_it_was(t2v):
    chosen = trials(t2v.program, everything_in("int8")[0], t2v.stats)
    branches = Branches(t2v.program, chosen)
    call, exact = t2v.calls[0], t2v.program(**t2v.calls[0])
    first = list(branches.outcomes(call, exact))
    assert [one.final for one in branches.outcomes(call, exact)] == [one.final for one in first]
    assert not branches.env, "values are let go after their last reader"


def test_the_cost_is_half_a_forward_for_a_trial(t2v):
    found, calls = t2v.found, len(t2v.calls)
    assert found.forwards < calls * (0.6 * len(found.sites) + 2 * len(TYPES) + 1)
    assert found.calls == calls
    assert found.seconds > 0


def test_the_search_for_smooth_scales_has_its_say(t2v):
    groups = [one for one in t2v.found.sites if one.role != "self-attention"]
    assert all(one.calibrated is not None and 0 < one.calibrated < 0.1 for one in groups)
    unsmoothed = sensitivity(t2v.program, t2v.calls[:1], None, options=["int8"])
    assert {one.calibrated for one in unsmoothed.sites} == {None}
    assert "self-attention" not in {one.role for one in unsmoothed.sites}


def test_errors_can_be_looked_up(t2v):
    worst = t2v.found.worst(3)
    assert [one.error for one in worst] == sorted((one.error for one in worst), reverse=True)
    assert worst[0].error == max(one.error for one in t2v.found.sites)
    assert t2v.found.error(worst[0].site, worst[0].dtype) == worst[0].error
    assert t2v.found.error(worst[0].site, "float") == 0
    with pytest.raises(KeyError, match="nowhere in int8"):
        t2v.found.error("nowhere", "int8")


def test_json_and_text(t2v):
    assert Sensitivity.from_json(t2v.found.to_json()) == t2v.found
    text = str(t2v.found)
    assert text.splitlines()[2].startswith(t2v.found.worst(1)[0].site)
    assert "all in int8:" in text
    assert "all in int8-fast:" in text


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"sites": 1, "together": []}'])
def test_anything_else_is_refused(text):
    with pytest.raises(InputError, match="these are no sensitivities"):
        Sensitivity.from_json(text)


def test_bad_requests(t2v):
    program, calls = t2v.program, t2v.calls
    with pytest.raises(RecipeError, match="unknown type 'int4'"):
        sensitivity(program, calls, t2v.stats, options=["int4"])
    with pytest.raises(CalibrationError, match="there is no call"):
        sensitivity(program, [], t2v.stats)
    with pytest.raises(InputError, match="timestep"):
        sensitivity(program, [{**calls[0], "timestep": None}], t2v.stats)
    steps = passes.quantization(everything_in("int8")[0], t2v.stats)
    quantized = pipeline.run(program, steps)
    with pytest.raises(LevelError, match="at QUANTIZED"):
        sensitivity(quantized, calls, t2v.stats)
    broken = {**calls[0], "hidden_states": torch.full_like(calls[0]["hidden_states"], torch.nan)}
    with pytest.raises(NumericsError, match="call 1 holds NaN"):
        sensitivity(program, [calls[0], broken], t2v.stats)
    other = replace(t2v.stats, channels={}, heads={})
    with pytest.raises(CalibrationError, match="another model"):
        sensitivity(program, calls, other)
