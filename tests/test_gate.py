"""The gate: what passes, what falls back, what is an error, and what can be checked later."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
import zoo
from diffusers import UniPCMultistepScheduler, WanPipeline
from once import Traced

import wancompile
from wancompile import passes, pipeline
from wancompile.artifact import facts
from wancompile.errors import GateError, InputError
from wancompile.gate.check import Check, Kind, Violation
from wancompile.gate.compare import SiteError
from wancompile.gate.evidence import FIRST, MOST, Evidence, HoldBack
from wancompile.gate.fallback import Fallback, relax_sites
from wancompile.gate.limits import Limits
from wancompile.gate.rounds import Gate
from wancompile.html import write_html
from wancompile.pipeline import relative_error
from wancompile.recipe import ATTENTIONS, QSpec, Recipe, Rule, resolve
from wancompile.report import Report

UNSMOOTHED = Recipe("unsmoothed", QSpec("int8", smooth=False))
OPEN = Limits(*[math.inf] * 5)


def calls(count, layers=2, first=10):
    return [zoo.example("t2v", layers, seed=first + index) for index in range(count)]


@pytest.fixture(scope="module")
def wan():
    """A T2V model of two blocks."""
    return zoo.make("t2v", 2)[0]


@pytest.fixture(scope="module")
def data():
    return calls(6)


@pytest.fixture(scope="module")
def stats(wan, data):
    return wancompile.calibrate(wan, data[:3])


@pytest.fixture(scope="module")
def int8(wan, data):
    return wancompile.compile(wan, data, "int8-attention")


@pytest.fixture(scope="module")
def traced(wan, data):
    return Traced.on(wan, example=data[0])


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


def float_output(model, call):
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


# Limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, math.nan, "0.1", None, True])
def test_limits_are_numbers(value):
    with pytest.raises(InputError, match="the limit output is a number from 0 on"):
        Limits(output=value)


def test_there_are_figures_for_every_limit():
    assert {str(kind) for kind in Kind} == {field.name for field in fields(Limits)}


# Held-out calls ---------------------------------------------------------------------------------


class Observed:
    """Stands in for a calibration."""

    def __init__(self):
        self.seen, self.passed_over = [], 0

    def observe(self, call, label):
        self.seen.append((int(call["timestep"][0]), label))
        return "observed"


def numbered(call, number):
    return {**call, "timestep": torch.full_like(call["timestep"], number)}


def test_some_calls_are_kept_from_the_observer(wan, traced, data):
    observed = Observed()
    hold = HoldBack(observed, traced.program)
    labels = ("cond", "uncond")
    outputs = [hold(numbered(data[0], at), labels[at % 2]) for at in range(50)]
    held = [at for at, out in enumerate(outputs) if out != "observed"]
    assert held == [3, 12, 21, 30]  # with and without the prompt in turn
    assert [at for at, _ in observed.seen] == [at for at in range(50) if at not in held]
    assert all(label == labels[at % 2] for at, label in observed.seen)
    assert observed.passed_over == hold.held == MOST
    evidence = hold.evidence()
    assert evidence.held_out
    for at, call, reference in zip(held, evidence.calls, evidence.references, strict=True):
        expected = float_output(wan, numbered(data[0], at))
        assert int(call["timestep"][0]) == at
        assert relative_error(outputs[at][0], expected) < 1e-5
        assert relative_error(reference.output[0], expected) < 1e-5


def test_calls_deeper_in_the_schedule_take_the_places_of_others(wan, data):
    program = wancompile.trace(wan, data[0])
    observed = Observed()
    hold = HoldBack(observed, program)
    schedule = [1000 - 10 * step for step in range(50)]
    steps = [step for step in schedule for _ in range(2)]
    for number in (*steps, *steps):
        hold(numbered(data[0], number), "")
    kept = [int(call["timestep"][0]) for call in hold.evidence().calls]
    assert len(kept) == len(hold.evidence().references) == MOST
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == schedule[1]
    assert kept[-1] <= schedule[46]
    assert max(a - b for a, b in itertools.pairwise(kept)) < 250, "they are spread"
    assert observed.passed_over + len(observed.seen) == 200
    assert observed.passed_over <= 13


def test_a_kept_call_does_not_change_with_the_callers_tensors(traced, data):
    hold = HoldBack(Observed(), traced.program)
    call = {name: tensor.clone() for name, tensor in data[0].items()}
    for _ in range(FIRST + 1):
        hold(call)
    call["hidden_states"].zero_()
    (kept,) = hold.evidence().calls
    assert torch.equal(kept["hidden_states"], data[0]["hidden_states"])


def test_what_is_held_out_is_not_in_the_statistics():
    model, data = zoo.make("t2v", 1)[0], calls(4, layers=1)
    loud = [*data[:3], {**data[3], "hidden_states": 50 * data[3]["hidden_states"]}]
    gated = wancompile.compile(model, loud, "int8-attention", limits=OPEN)
    again = wancompile.compile(model, data[:3], "int8-attention", limits=OPEN)
    (scale,) = (name for name in again.program.state if name.endswith("attention_k_scale"))
    assert torch.equal(gated.program.state[scale], again.program.state[scale])
    assert (gated.report.gate.check.held_out, again.report.gate.check.held_out) == (True, False)


def test_a_pipeline_is_calibrated_and_held_out_as_it_runs(wan):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=wan
    )
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 512, 40, generator=torch.Generator().manual_seed(1))
    videos = []

    def play():
        videos.append(
            pipe(
                prompt_embeds=text,
                negative_prompt_embeds=torch.zeros_like(text),
                num_frames=9,
                height=48,
                width=64,
                num_inference_steps=7,
                guidance_scale=5.0,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).frames
        )

    result = wancompile.compile(wan, play)
    play()
    assert relative_error(*videos) < 1e-4  # held-back calls yield the model's own output
    check = result.report.gate.check
    assert (check.calls, check.held_out, check.passed) == (2, True, True)
    assert len({float(one["timestep"][0]) for one in result._evidence.calls}) == 2


# Let through ------------------------------------------------------------------------------------


def test_what_is_healthy_passes_and_the_report_says_so(wan, int8, data):
    gate = int8.report.gate
    assert gate.check.passed
    assert gate.fallbacks == ()
    assert (gate.check.calls, gate.check.held_out) == (1, True)
    error = relative_error(int8(**data[3], return_dict=False)[0], float_output(wan, data[3]))
    assert gate.check.outputs[0].relative == pytest.approx(error, rel=1e-3)
    text = str(int8.report)
    assert "checked on 1 held-out call: all within limits" in text
    assert f"{100 * error:.2f} %" in text
    groups = {str(group.key) for group in int8.report.groups}
    attentions = {f"blocks.{block}.attn1:attention" for block in (0, 1)}
    assert gate.check.own.keys() == groups | attentions
    assert gate.check.clipped.keys() == attentions
    sites = {one.site for one in gate.check.sites}
    assert groups | attentions <= sites  # at QUANTIZED every linear still has its output


def test_a_model_in_bf16_passes():
    """Centred keys are in fp32 there, queries are not."""
    model, kwargs = zoo.make("t2v", 1, dtype=torch.bfloat16)
    result = wancompile.compile(model, [kwargs], "int8-attention")
    check = result.report.gate.check
    assert "k_middle" in " ".join(result.program.state)
    assert check.passed
    assert 0.001 < check.own["blocks.0.attn1:attention"] < 0.02
    assert 0.002 < check.outputs[0].relative < 0.05


def test_figures_survive_json(int8):
    gate = int8.report.gate
    assert facts.from_data(Gate, facts.to_data(gate)) == gate
    again = facts.from_data(Report, facts.to_data(int8.report))
    assert str(again) == str(int8.report)


def test_a_page_shows_the_gate(int8, tmp_path):
    gate = int8.report.gate
    fallback = Fallback("blocks.1.attn1:attention", "int8", "float", Kind.OWN, 0.2, 0.15)
    report = replace(int8.report, gate=replace(gate, fallbacks=(fallback,)))
    page = write_html(tmp_path / "page.html", report).read_text(encoding="utf-8")
    assert 'id="gate"' in page
    assert "Checked on 1 held-out call: all within limits." in page
    assert f"<code>{gate.check.outputs[0].site}</code>" in page
    assert f"fell back: {fallback}" in page
    without = write_html(tmp_path / "without.html", replace(report, gate=None))
    assert 'id="gate"' not in without.read_text(encoding="utf-8")


def test_nothing_is_measured_without_limits():
    result = wancompile.compile(zoo.make("t2v", 1)[0], calls(4, layers=1), limits=None)
    assert result.report.gate is None
    with pytest.raises(InputError, match="no calls kept"):
        result.check()


def test_without_data_the_example_is_compared(wan, data, stats):
    made = wancompile.compile(wan, recipe="int8", stats=stats, example_inputs=data[0])
    check = made.report.gate.check
    assert (check.calls, check.held_out) == (1, False)
    assert "calibration has seen, too, or that only shows shapes" in str(check)


# Falling back -----------------------------------------------------------------------------------


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


# Not let through --------------------------------------------------------------------------------


def test_an_output_too_far_off_is_an_error_that_names_the_culprits(wan, traced, stats):
    before = {name: tensor.clone() for name, tensor in wan.state_dict().items()}
    with pytest.raises(GateError) as caught:
        traced.compiled("int8-attention", stats=stats, limits=replace(OPEN, output=1e-5))
    check = caught.value.check
    assert [one.kind for one in check.violations] == [Kind.OUTPUT]
    text = str(caught.value)
    assert "on 1 call the compiled model is too far from the original: output of call 0: " in text
    assert "more than 0.001 %" in text
    for place, figure in check.culprits(3):
        assert f"{place} ({100 * figure:.2f} %)" in text
    assert check.culprits(1)[0][1] == max(check.own.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in wan.state_dict().items())


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


def a_check(**figures):
    empty = Check((), (), (), {}, {}, {}, calls=1, held_out=True, limits=Limits())
    return replace(empty, **figures)


def test_what_is_no_number_is_beyond_every_limit():
    nan = SiteError("output of call 0", "", math.nan, math.nan, math.nan)
    check = a_check(outputs=(nan,), broken={"blocks.0": 3}, own={"a": math.nan}, limits=OPEN)
    assert [one.kind for one in check.violations] == [Kind.BROKEN, Kind.OUTPUT, Kind.OWN]
    assert str(check.violations[0]) == "blocks.0: 3 values are NaN or infinite"
    assert "3 figures beyond a limit" in str(check)
    assert a_check().passed


def test_a_violation_reads_well():
    found = Violation(Kind.CLIPPED, "a:attention", 0.123, 0.01)
    assert str(found) == "a:attention: 12.30 % of the values have the largest code, more than 1 %"


# Checking again ---------------------------------------------------------------------------------


def test_a_check_can_be_repeated(int8):
    first, again = int8.report.gate.check, int8.check()
    assert again.outputs == first.outputs
    assert (again.calls, again.held_out, again.limits) == (1, True, first.limits)
    assert 0 < len(again.sites) < len(first.sites)  # some have merged
    strict = int8.check(limits=Limits(output=0))
    assert not strict.passed
    assert "beyond its limit: output of call 0" in str(strict)


def test_a_check_on_new_inputs_against_the_model(wan, int8):
    new = calls(2, first=70)
    check = int8.check(new, reference=wan)
    for call, found in zip(new, check.outputs, strict=True):
        error = relative_error(int8(**call, return_dict=False)[0], float_output(wan, call))
        assert found.relative == pytest.approx(error, rel=1e-3)
    assert (check.sites, check.blocks, check.calls) == ((), (), 2)
    one = int8.check(new[0], reference=wan)
    assert one.outputs == check.outputs[:1]
    order = ("hidden_states", "timestep", "encoder_hidden_states")
    by_position = int8.check([tuple(new[0][name] for name in order)], reference=wan)
    assert by_position.outputs == one.outputs


def test_a_check_against_a_program_tells_sites(traced, int8):
    check = int8.check(calls(1, first=80), reference=traced.program)
    places = {one.site for one in check.sites}
    assert "blocks.1.attn2.to_q" in places
    # What smoothing scales is another value in this program.
    scaled = {f"blocks.{block}.attn1.to_v" for block in (0, 1)}
    applied = {g.key.path for g in int8.report.groups if g.smoothing.applied}
    assert {"blocks.0.attn1.to_out.0", "blocks.1.attn1.to_out.0"} <= applied
    assert not places & scaled
    assert all(one.relative < 0.1 for one in check.sites if one.site.startswith("blocks"))


def test_a_check_without_the_original_looks_for_what_is_broken(int8, data):
    good = int8.check(data[0])
    assert (good.outputs, good.passed) == ((), True)
    spoiled = data[0]["hidden_states"].clone()
    spoiled[0, 0, 0, 0, 0] = math.nan
    bad = int8.check({**data[0], "hidden_states": spoiled})
    assert "output" in bad.broken
    assert not bad.passed


@pytest.mark.parametrize(
    ("inputs", "options", "reason"),
    [
        (None, {"reference": torch.nn.Linear(2, 2)}, "a reference needs inputs"),
        ([], {}, "no call among the inputs"),
        ({"videos": 1}, {}, "no parameter 'videos'"),
    ],
)
def test_what_cannot_be_checked_is_explained(int8, inputs, options, reason):
    with pytest.raises(InputError, match=reason):
        int8.check(inputs, **options)


def test_evidence_lies_on_the_host(int8):
    evidence: Evidence = int8._evidence
    tensors = [*evidence.calls[0].values(), *evidence.references[0].output]
    tensors += [*evidence.references[0].sites.values(), *evidence.references[0].blocks.values()]
    kept = [one for one in tensors if isinstance(one, torch.Tensor)]
    assert {one.device.type for one in kept} == {"cpu"}
