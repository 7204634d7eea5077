"""The gate: what passes, what is an error, and what can be checked later."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import gating
import pytest
import torch
import zoo
from gating import OPEN, calls, float_output

import wancompile
from wancompile.artifact import facts
from wancompile.errors import GateError, InputError
from wancompile.gate.check import Check, Kind, Violation
from wancompile.gate.compare import SiteError
from wancompile.gate.evidence import Evidence
from wancompile.gate.fallback import Fallback
from wancompile.gate.limits import Limits
from wancompile.gate.rounds import Gate
from wancompile.html import write_html
from wancompile.pipeline import relative_error
from wancompile.report import Report

wan = pytest.fixture(scope="module")(gating.wan)
data = pytest.fixture(scope="module")(gating.data)
stats = pytest.fixture(scope="module")(gating.stats)
int8 = pytest.fixture(scope="module")(gating.int8)
traced = pytest.fixture(scope="module")(gating.traced)


@pytest.mark.parametrize("value", [-0.1, math.nan, "0.1", None, True])
def test_limits_are_numbers(value):
    with pytest.raises(InputError, match="the limit output is a number from 0 on"):
        Limits(output=value)


def test_there_are_figures_for_every_limit():
    assert {str(kind) for kind in Kind} == {field.name for field in fields(Limits)}


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
    for one, other in zip(again.blocks, first.blocks, strict=True):
        assert one.site == other.site
        assert one.relative == pytest.approx(other.relative, rel=0.2)
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
    assert [one.site for one in check.blocks] == ["blocks.0", "blocks.1"]
    assert all(0.001 < one.relative < 0.1 for one in check.blocks)
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
