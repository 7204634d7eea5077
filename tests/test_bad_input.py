"""What happens with calibration data that is broken, says little, or is of another model.

| input | what happens |
|---|---|
| a NaN or infinite weight | `NumericsError` with its name, before anything runs |
| activations that overflow | `CalibrationError` with the sample and the linear |
| one constant sample | compiles, unsmoothed, rounded to nearest; attention stays in float |
| text that is all zeros | compiles; groups that read text, or attention over it, as above |
| videos of one token | compiles; all but the groups that read text as above |
| samples of one timestep | compiles; `check` on other timesteps tells whether that was enough |
| another expert's statistics | a warning, also in the report; clipped attention returns to float |
"""

from __future__ import annotations

import copy
import math
import pipes
import warnings
from dataclasses import replace

import pytest
import torch
import zoo

import wancompile
from wancompile.errors import CalibrationError, NumericsError
from wancompile.gate.check import Kind
from wancompile.html import write_html
from wancompile.pipeline import relative_error

RECIPE = "int8-attention"
FEW = "different tokens"
OTHER = "the statistics are of other weights than those of"
ATTENTION = "blocks.0.attn1:attention"
TEXT = torch.randn(2, 512, 40, generator=torch.Generator().manual_seed(3))


def calls(count, first=10, **changes):
    return [{**zoo.example("t2v", 1, seed=first + index), **changes} for index in range(count)]


@pytest.fixture(scope="module")
def wan():
    """A T2V model of one block."""
    return zoo.make("t2v", 1)[0]


def error_of(wan, compiled, call):
    with torch.no_grad():
        expected = wan(**call, return_dict=False)[0]
    return relative_error(compiled(**call, return_dict=False)[0], expected)


def unjudged(compiled):
    """Return the groups for which nothing was tried, for want of different tokens."""
    groups = compiled.report.groups
    found = {str(one.key) for one in groups if one.smoothing is None and one.rounding is None}
    for name in ("smooth", "quantize_linears"):
        skipped = [site for by, site, text in compiled.report.skipped if by == name and FEW in text]
        assert sorted(skipped) == sorted(found)  # each of them once
    return found


def attention_stays(compiled, seen):
    """Whether self-attention is in floating point, because only `seen` tokens were seen."""
    reason = f"only {seen} of the 4 {FEW} that it takes to trust its ranges"
    return ("quantize_attention", ATTENTION, reason) in compiled.report.skipped


def reasons(compiled):
    """Return what the report says of want of tokens, a line for each pass and reason."""
    return [one.reason for one in compiled.report.skips if FEW in one.reason]


def only_fallback(compiled):
    (found,) = compiled.report.gate.fallbacks
    return found


def passes_on_others(wan, compiled):
    """Return the figures on two calls unlike those it was calibrated on."""
    others = calls(2, first=90)
    check = compiled.check(others, reference=wan)
    assert check.passed
    for call, found in zip(others, check.outputs, strict=True):
        assert found.relative == pytest.approx(error_of(wan, compiled, call), rel=1e-3)
    return check


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("data", [calls(1), calls(5)], ids=["one", "held out"])
def test_a_weight_that_is_no_number(wan, value, data):
    broken = copy.deepcopy(wan)
    with torch.no_grad():
        broken.blocks[0].attn2.to_v.weight[3, 5] = value
    with pytest.raises(NumericsError, match="a weight holds NaN or infinity") as caught:
        wancompile.compile(broken, data)
    assert caught.value.site == "blocks.0.attn2.to_v.weight"


# The fourth call is held out, the fifth is observed again.
@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_activations_that_overflow(wan, at):
    data = calls(6)
    data[at] = {**data[at], "encoder_hidden_states": 5e37 * TEXT}
    # On the first call rewrites are checked, before anything is calibrated.
    kind = NumericsError if at == 0 else CalibrationError
    with pytest.raises(kind, match="NaN or infinity") as caught:
        wancompile.compile(wan, data)
    if at:
        assert f"sample {at} drives" in str(caught.value)
        assert caught.value.pass_name == "calibrate"
        assert "transformer_wan.py" in caught.value.source


@pytest.mark.parametrize("recipe", [RECIPE, "int8-attention-fast", "fp8-attention"])
def test_one_constant_sample(wan, recipe):
    """All text tokens are one, and so are all video tokens but for the last bits of attention."""
    constant = {
        name: torch.full_like(tensor, 0.5 if tensor.dim() > 1 else 500.0)
        for name, tensor in calls(1)[0].items()
    }
    compiled = wancompile.compile(wan, [constant], recipe)
    assert not compiled.report.gate.check.held_out
    assert not compiled.report.gate.fallbacks
    assert unjudged(compiled) == {str(group.key) for group in compiled.report.groups}
    assert attention_stays(compiled, seen=1)
    assert len(reasons(compiled)) == 3  # a line in the report for each pass, not for each group
    times = {one.part: one for one in compiled.report.predicted.parts}
    assert times["self-attention"].ms == times["self-attention"].float_ms
    passes_on_others(wan, compiled)


def test_text_that_is_all_zeros(wan):
    compiled = wancompile.compile(wan, calls(5, encoder_hidden_states=0 * TEXT), RECIPE)
    assert compiled.report.gate.check.held_out
    assert compiled.report.gate.fallbacks == ()
    assert unjudged(compiled) == {"blocks.0.attn2.to_k", "blocks.0.attn2.to_out.0"}
    assert ATTENTION in compiled.report.gate.check.own
    passes_on_others(wan, compiled)


def test_videos_of_a_single_token(wan):
    video = torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(4))
    small = {
        "hidden_states": video,
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": TEXT[:1],
    }
    compiled = wancompile.compile(wan, 5 * [small], RECIPE)
    keys = {str(group.key) for group in compiled.report.groups}
    assert unjudged(compiled) == keys - {"blocks.0.attn2.to_k"}
    assert attention_stays(compiled, seen=1)
    assert not compiled.report.gate.fallbacks
    assert error_of(wan, compiled, small) < 0.02
    passes_on_others(wan, compiled)


def test_samples_of_one_timestep(wan):
    compiled = wancompile.compile(wan, calls(5, timestep=torch.full((2,), 999.0)), RECIPE)
    assert compiled.report.gate.fallbacks == ()
    early = calls(2, first=90, timestep=torch.full((2,), 20.0))
    check = compiled.check(early, reference=wan)
    assert [one.relative for one in check.outputs] == pytest.approx(
        [error_of(wan, compiled, call) for call in early], rel=1e-3
    )
    assert check.passed  # the range of this model's activations hardly depends on the timestep


def scaled(wan, factor):
    """Return the same architecture with queries and keys of another size."""
    other = copy.deepcopy(wan)
    with torch.no_grad():
        for norm in (other.blocks[0].attn1.norm_q, other.blocks[0].attn1.norm_k):
            norm.weight.mul_(factor)
    return other


def test_statistics_of_another_expert(wan):
    stats, call = wancompile.calibrate(scaled(wan, 0.2), calls(3)), calls(1, first=50)[0]
    options = {"recipe": RECIPE, "stats": stats, "example_inputs": call}
    with pytest.warns(UserWarning, match=OTHER):
        compiled = wancompile.compile(wan, **options)
    found = only_fallback(compiled)
    assert (found.place, found.kind, found.after) == (ATTENTION, Kind.CLIPPED, "float")
    assert found.figure > 0.2
    passes_on_others(wan, compiled)
    with pytest.warns(UserWarning, match=OTHER):
        unguarded = wancompile.compile(wan, **options, limits=None)
    assert unguarded.check(call).clipped[ATTENTION] == found.figure
    assert error_of(wan, unguarded, call) > 2 * error_of(wan, compiled, call)


def outlying(wan):
    """Return `wan` with loud channels in what its MLP and its output projections read."""
    other = copy.deepcopy(wan)
    with torch.no_grad():
        other.blocks[0].ffn.net[0].proj.weight[::5].mul_(30)
        other.blocks[0].attn1.to_v.weight[::5].mul_(30)
    return other


def test_statistics_of_another_expert_are_noticed_where_linears_alone_are_in_8_bits(wan, tmp_path):
    """Nothing clips there, and errors grow within their limits: only the digest tells."""
    call, model = calls(1, first=50)[0], outlying(wan)
    own, foreign = (wancompile.calibrate(one, calls(3)) for one in (model, wan))
    own.save(tmp_path / "own.st")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = wancompile.Stats.load(tmp_path / "own.st")
        good = wancompile.compile(model, stats=loaded, example_inputs=call)
        unknown = wancompile.compile(model, stats=replace(foreign, model=""), example_inputs=call)
    assert good.report.notes == unknown.report.notes == ()
    with pytest.warns(UserWarning, match=f"{OTHER} this model.*give calib_data") as caught:
        poor = wancompile.compile(model, stats=foreign, example_inputs=call)
    (note,) = poor.report.notes
    assert [str(one.message) for one in caught] == [note]
    assert f"note: {note}" in str(poor.report)
    assert note.partition("`")[0] in write_html(tmp_path / "page.html", poor.report).read_text()
    assert poor.report.gate.check.passed
    assert poor.report.gate.fallbacks == ()
    assert error_of(model, poor, call) > 1.3 * error_of(model, good, call)


def test_statistics_of_experts_that_are_swapped():
    pipe = pipes.make("t2v22")
    names = ("transformer", "transformer_2")
    first, second = (wancompile.calibrate(getattr(pipe, name), calls(1)) for name in names)
    swapped = {"transformer": second, "transformer_2": first}
    examples = dict.fromkeys(names, calls(1)[0])
    with pytest.warns(UserWarning, match=OTHER) as caught:
        compiled = wancompile.compile(pipe, stats=swapped, example_inputs=examples, limits=None)
    told = [str(one.message) for one in caught]
    assert all(f"the expert {name}:" in text for name, text in zip(names, told, strict=True))
    assert [one.notes for one in compiled.report.experts.values()] == [(one,) for one in told]
