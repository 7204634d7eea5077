"""Choosing types for a budget: what is asked is kept, and nothing is given away."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
import zoo
from sensing import made

import wancompile
from benchmarks import accuracy, subjects
from wancompile import cost, passes, pipeline
from wancompile.auto import Choice, resolve
from wancompile.candidates import Candidates, Point
from wancompile.demo import sampler
from wancompile.demo.sampler import calls
from wancompile.errors import CalibrationError, InputError, RecipeError
from wancompile.html import write_html
from wancompile.ir.site import Role
from wancompile.recipe import LINEARS, RECIPES, Recipe, Rule
from wancompile.report import Report
from wancompile.sensitivity import HeldOut, sensitivity
from wancompile.trials import SELF_ATTENTION

TOKENS = 32760


@cache
def held_out():
    t2v = made("t2v")
    return HeldOut.of(t2v.program, t2v.calls, t2v.stats)


@cache
def chosen(**budget) -> Choice:
    request = Recipe.auto(**{"tokens": TOKENS, **budget})
    return resolve(request, held_out(), sensitivity=made("t2v").found)


@cache
def ends() -> tuple[Point, Point]:
    """All in floating point, and the fastest."""
    frontier = chosen(max_error=1.0).frontier
    return frontier[0], frontier[-1]


def really(recipe: Recipe) -> list[float]:
    """The error on each held-out call of a program that was rewritten for the recipe."""
    t2v = made("t2v")
    steps = passes.smoothing(recipe, t2v.stats) + passes.quantization(recipe, t2v.stats)
    program = pipeline.run(t2v.program, steps)
    pairs = ((program(**call)[0], t2v.program(**call)[0]) for call in t2v.calls)
    return [pipeline.relative_error(*pair) for pair in pairs]


@pytest.mark.parametrize("budget", [0.002, 0.01])
def test_no_held_out_call_errs_by_more_than_the_budget(budget):
    found = chosen(max_error=budget)
    assert found.measured <= budget
    errors = really(found.recipe)
    assert found.measured == pytest.approx(max(errors), rel=1e-3)
    assert max(errors) > 1.01 * min(errors), "it matters that it is the largest"
    assert found.measured > budget / 3, "the budget is there to be used"


def test_weights_are_rounded_as_those_of_named_recipes():
    specs = {spec for spec in map(chosen(max_error=0.01).recipe.spec_for, groups()) if spec}
    assert specs
    assert specs <= {RECIPES[name].linears for name in ("int8", "fp8")}


def groups():
    return made("t2v").program.groups


def test_sites_are_told_apart_on_the_call_that_errs_most():
    t2v, recipe = made("t2v"), RECIPES["int8"]
    first, second = t2v.calls
    # Text of zeros, which rounds to itself: this call errs less than it would.
    easy = {**second, "encoder_hidden_states": 0 * second["encoder_hidden_states"]}
    every = HeldOut.of(t2v.program, [easy, first, second], t2v.stats)
    errors = every.errors_of(recipe)
    hardest = every.hardest(recipe)
    (call,) = hardest.calls
    assert call is every.calls[errors.index(max(errors))]
    assert hardest.error_of(recipe) == max(errors) > min(errors)
    assert hardest.hardest(recipe) is hardest


def test_a_choice_says_at_which_timesteps_its_error_was_measured():
    found = chosen(max_error=0.003)
    t2v = made("t2v")
    steps = [float(call["timestep"].max()) for call in t2v.calls]
    assert found.timesteps == held_out().timesteps == (min(steps), max(steps))
    assert found.calibrated == t2v.stats.timesteps
    assert found.covered in str(found)
    narrow = replace(found, calls=1, timesteps=(301, 954), calibrated=(168, 999))
    assert narrow.covered.startswith(
        "error of the worst of 1 held-out call at timesteps 954 to 301, of 999 to 168 that "
        "calibration saw; steps beyond may err more: calibrate with"
    )
    single = replace(narrow, timesteps=(301, 301))
    assert "at timesteps 301, of 999 to 168 that" in single.covered
    wide = replace(narrow, timesteps=(168, 999))
    assert "that calibration saw" not in wide.covered
    assert replace(wide, timesteps=None).covered == "error of the worst of 1 held-out call"


def test_a_larger_error_buys_time():
    found = [chosen(max_error=10.0**-power) for power in (4, 3, 2)]
    times = [one.predicted.ms for one in found]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


@pytest.mark.parametrize("share", [0.1, 0.8])
def test_the_time_is_within_the_budget(share):
    slowest, fastest = ends()
    limit = fastest.ms + share * (slowest.ms - fastest.ms)
    found = chosen(max_ms=limit)
    assert found.predicted.ms <= limit * (1 + 1e-9)
    t2v = made("t2v")
    times = cost.costs(t2v.program, tokens=TOKENS)
    assert times.of(found.recipe, t2v.program.groups) == pytest.approx(found.predicted.ms)


def test_more_time_buys_exactness():
    slowest, fastest = ends()
    limits = [fastest.ms + share * (slowest.ms - fastest.ms) for share in (0, 0.4, 1)]
    errors = [chosen(max_ms=limit).predicted.error for limit in limits]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(fastest.error)
    assert errors[-1] == 0


def measured_options(site):
    return [option for option in site.ms if option not in ("int8-static", "fp8-static")]


def test_no_other_choice_of_a_few_sites_is_better():
    """One block of seven groups and an attention: all 3^7 times 4 choices are tried."""
    t2v, request = made("t2v"), Recipe.auto(max_error=1, tokens=TOKENS)
    times = cost.costs(t2v.program, tokens=TOKENS)
    first = [one for one in times.sites if str(one.site).startswith("blocks.0.")]
    few = cost.Costs(tuple(first), 0.0, 1.0, TOKENS, "")
    groups = [one for one in t2v.program.groups if str(one.key).startswith("blocks.0.")]
    candidates = Candidates(request, few, t2v.found, groups)
    every = [
        (sum(t2v.found.error(str(s.site), o) ** 2 for s, o in zip(first, options, strict=True)),
         sum(s.ms[o] for s, o in zip(first, options, strict=True)))
        for options in itertools.product(*map(measured_options, first))
    ]  # fmt: skip
    longest_step = max(max(s.ms.values()) - min(s.ms.values()) for s in first)
    for limit in (1e-4, 1e-3, 3e-3, 1e-2):
        ours = candidates.point(candidates.recipe(candidates.within_error(limit)))
        best = min(ms for square, ms in every if square <= limit * limit)
        assert best <= ours.ms <= best + longest_step
        assert ours.error <= limit
    for point in candidates.frontier():
        best = min(ms for square, ms in every if square <= point.error**2 * (1 + 1e-9))
        assert point.ms == pytest.approx(best), "the frontier is optimal everywhere"


def test_static_scales_are_taken_behind_activations_alone():
    t2v = made("t2v")
    more = sensitivity(t2v.program, t2v.calls, t2v.stats, options=["int8-static"])
    downs = [group for group in t2v.program.groups if group.role is Role.FFN_DOWN]
    assert [one.site for one in more.sites] == [str(group.key) for group in downs]
    assert [one.dtype for one in more.together] == ["int8-static"]
    for one in more.sites:
        alone = Recipe("one", None, (Rule(one.site, LINEARS["int8-static"]),))
        assert one.error == pytest.approx(t2v.really(alone), rel=0.01)
    found = replace(t2v.found, sites=(*t2v.found.sites, *more.sites))
    types = "int8", "int8-static"
    request = Recipe.auto(max_error=0.05, tokens=TOKENS, types=types, attention=False)
    choice = resolve(request, held_out(), sensitivity=found)
    specs = {group.key: choice.recipe.spec_for(group) for group in t2v.program.groups}
    static = [key for key, spec in specs.items() if spec and spec.activation == "static"]
    assert static == [group.key for group in downs]
    assert choice.measured == pytest.approx(max(really(choice.recipe)), rel=0.01)
    dynamic = chosen(max_error=0.05, types=("int8",), attention=False)
    assert choice.predicted.ms < dynamic.predicted.ms


def test_what_cannot_be_reached_is_refused_with_what_can():
    _, fastest = ends()
    with pytest.raises(
        RecipeError, match=rf"the fastest takes {fastest.ms:.4g} ms, at an error of"
    ):
        chosen(max_ms=fastest.ms * 0.99)
    with pytest.raises(RecipeError, match=r"error of 0\.0001 % or less: the most exact has"):
        chosen(max_ms=fastest.ms * 1.01, max_error=1e-6)


def test_both_budgets_hold():
    slowest, fastest = ends()
    limit = (slowest.ms + fastest.ms) / 2
    found = chosen(max_ms=limit, max_error=0.05)
    assert found.predicted.ms <= limit
    assert found.measured <= 0.05


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "needs max_error or max_ms"),
        ({"max_error": 0}, "max_error is a positive number, not 0"),
        ({"max_error": math.nan}, "max_error is a positive number"),
        ({"max_error": True}, "max_error is a positive number"),
        ({"max_ms": -1}, "max_ms is a positive number"),
        ({"max_ms": "45"}, "max_ms is a positive number"),
        ({"max_ms": 1, "tokens": 0}, "tokens is a positive number"),
        ({"max_ms": 1, "types": ["int4"]}, "types are some of int8, fp8"),
        ({"max_ms": 1, "types": []}, "types are some of int8, fp8"),
    ],
)
def test_bad_requests(budget, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.auto(**budget)


def test_a_device_without_times_is_refused():
    with pytest.raises(InputError, match="no times were measured on 'a100'"):
        chosen(max_error=0.01, device="a100")


def test_types_and_attention_can_be_kept_out():
    found = chosen(max_error=1.0, types=("fp8",), attention=False)
    specs = [found.recipe.spec_for(group) for group in made("t2v").program.groups]
    assert set(specs) == {RECIPES["fp8"].linears, None}, "some are too small for 8 bits"
    assert not found.recipe.rounds_attention
    assert [one.name for one in found.uniform] == ["float", "fp8"]


def test_attention_that_must_stay_in_float_is_not_compared_in_8_bits():
    found = made("t2v").found
    linears = tuple(one for one in found.sites if one.role != SELF_ATTENTION)
    request = Recipe.auto(tokens=TOKENS, max_error=1.0)
    choice = resolve(request, held_out(), sensitivity=replace(found, sites=linears))
    assert [one.name for one in choice.uniform] == ["float", "int8", "fp8"]
    assert not choice.recipe.rounds_attention


def test_the_recipe_is_one_like_any_other():
    found = chosen(max_error=0.003)
    recipe = Recipe.from_json(found.recipe.to_json())
    assert recipe == found.recipe
    t2v = made("t2v")
    recipe.check(groups(), t2v.program.attentions)
    assert recipe.rules, "sites differ"
    compiled = wancompile.compile(
        t2v.model, recipe=recipe, stats=t2v.stats, example_inputs=t2v.first
    )
    assert compiled.report.recipe == recipe


def test_a_choice_tells_why():
    found = chosen(max_error=0.003)
    text = str(found)
    assert f"{found.predicted.ms:.4g} ms" in text
    assert found.sensitivity.worst(1)[0].site in text
    assert "benchmarks/results" in text
    assert found.uniform[0].error == 0
    assert [one.error for one in found.frontier] == sorted(one.error for one in found.frontier)


def test_a_page_and_a_saved_report_say_why(tmp_path):
    found = chosen(max_error=0.003)
    program = made("t2v").program
    report = Report(found.recipe, program.groups, (), (), 0, 0, choice=found)
    page = write_html(tmp_path / "page.html", report).read_text()
    (section,) = re.findall(r'<section id="budget">.*?</section>', page, re.DOTALL)
    # A frontier and a chart for each type, drawn for wide and for narrow pages.
    types = [one.dtype for one in found.sensitivity.together]
    assert {"int8", "fp8"} <= set(types)
    assert section.count("<svg") == 2 * (1 + len(types))
    assert section.count("<title>chosen") == 2
    assert section.count(f"<title>{found.sensitivity.worst(1)[0].site} in ") == 2 * 2
    assert f"{found.predicted.ms:.4g} ms" in section
    assert Report.from_data(json.loads(json.dumps(report.to_data()))) == report


def test_compile_takes_a_budget():
    t2v = made("t2v")
    data = [t2v.first, *(zoo.example("t2v", seed=seed) for seed in range(2, 6))]
    compiled = wancompile.compile(t2v.model, data, Recipe.auto(max_error=0.004, tokens=TOKENS))
    report = compiled.report
    assert report.choice is not None
    assert report.recipe == report.choice.recipe
    assert report.gate.check.held_out
    assert len(report.gate.check.outputs) == report.choice.sensitivity.calls == 1
    # What the gate measured with kernels and fusions is what the choice was made by.
    assert report.choice.measured <= 0.004
    assert report.gate.check.outputs[0].relative == pytest.approx(report.choice.measured, rel=0.1)
    assert "auto max_error 0.004" in str(report)


def test_compile_with_a_budget_needs_data_and_leaves_the_model_alone():
    t2v = made("t2v")
    with pytest.raises(CalibrationError, match="a budget needs calibration data"):
        wancompile.compile(t2v.model, recipe=Recipe.auto(max_error=1), example_inputs=t2v.first)
    impossible, before = Recipe.auto(max_ms=1e-6), t2v.model(**t2v.first)[0]
    with pytest.raises(RecipeError, match="the fastest takes"):
        wancompile.compile(t2v.model, recipe=impossible, stats=t2v.stats, example_inputs=t2v.first)
    assert torch.equal(t2v.model(**t2v.first)[0], before)


class Still(torch.nn.Module):
    """A model that reads images and sees no motion anywhere."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, hidden_states, **others):
        return (torch.zeros_like(hidden_states[:, :1]),)


def test_benchmarks_calibrate_on_the_whole_schedule_without_more_forwards():
    asked = subjects.calibration("i2v", 4, 6)
    halves = [calls(Still(), [subjects.part(asked, start, 2)]) for start in (0, 2)]
    found = subjects.alternating(Still(), asked)
    assert len(found) == len(halves[0]) == 12
    steps = [float(call["timestep"][0]) for call in found]
    assert steps == [float(call["timestep"][0]) for call in halves[0]]
    assert steps[::2] == steps[1::2] == sorted(set(steps), reverse=True)
    for at, call in enumerate(found):
        same = [torch.equal(call["hidden_states"], one[at]["hidden_states"]) for one in halves]
        assert same == [at // 2 % 2 == 0, at // 2 % 2 == 1]
    assert len(subjects.alternating(Still(), subjects.part(asked, 0, 1))) == 12


def test_benchmarks_tell_the_worst_call_of_each_video():
    reference = accuracy.Reference.__new__(accuracy.Reference)
    data = [[{"x": torch.tensor([[3.0, 4.0], [2.0, 0.0]])}, {"x": torch.tensor([[0.0, 5.0]] * 2)}]]
    reference.calls = [*data, *data]
    reference.outputs = [[call["x"].double() for call in batch] for batch in reference.calls]
    off = {5.0: torch.tensor([[0.5, 0.0], [0.1, 0.0]]), 4.0: torch.tensor([[0.1, 0.0], [0.3, 0.0]])}

    def model(x, return_dict):
        return (x + off[float(x.amax())],)

    model.dtype = torch.float32
    expected = torch.tensor([0.1, 0.15] * 2, dtype=torch.float64)
    torch.testing.assert_close(reference.worst_call(model), expected, atol=1e-6, rtol=0)


class Trained:
    """The first blocks of a trained model with outliers, shown some calls, judged on others."""

    def __init__(self, name: str) -> None:
        model = subjects.load(name)
        model.blocks = model.blocks[:2]
        self.model = subjects.with_outliers(model)
        first, second, *other = calls(model, [subjects.calibration(name, 4, 3)])
        self.first, shown = first, [first, *other[::2]]
        self.stats = wancompile.calibrate(self.model, [_part(one, 0, 2) for one in shown])
        program = wancompile.trace(self.model, first)
        # One video for the choice, the other to judge it.
        self.held_out = HeldOut.of(program, [_part(one, 2, 3) for one in other[1:]], self.stats)
        self.judged = [_part(one, 3, 4) for one in (second, *other)]
        self.found = sensitivity(program, self.held_out.calls[:1], self.stats)

    def error(self, recipe: Recipe) -> float:
        """The error of the compiled model on calls that neither calibration nor choice has seen."""
        compiled = wancompile.compile(
            self.model, recipe=recipe, stats=self.stats, example_inputs=self.first, limits=None
        )
        with torch.no_grad():
            pairs = [[one(**call)[0] for one in (compiled, self.model)] for call in self.judged]
        return max(pipeline.relative_error(*pair) for pair in pairs)


def _part(call, start, stop):
    return {
        name: one[start:stop] if isinstance(one, torch.Tensor) else one
        for name, one in call.items()
    }


def test_trained_models_keep_their_budgets_on_other_calls(monkeypatch):
    monkeypatch.setattr(sampler, "FRAMES", 3)
    trained = Trained("i2v")
    for one in trained.found.together:
        assert 0.6 < one.error / one.predicted < 1.5
    times = []
    for budget in (0.003, 0.02):
        request = Recipe.auto(max_error=budget, tokens=TOKENS)
        choice = resolve(request, trained.held_out, sensitivity=trained.found)
        assert choice.measured <= budget
        assert trained.error(choice.recipe) <= 1.3 * budget
        times.append(choice.predicted.ms)
    assert times[0] > 1.1 * times[-1]
