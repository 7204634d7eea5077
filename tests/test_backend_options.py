"""The options of the backend: recipe, statistics, Inductor, and those that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import clone
import pytest
import torch
import zoo
from captured import attending, compiled, error, linears, quantizations, ran, refused, run
from torch._dynamo.utils import counters

import wancompile
from wancompile.errors import CalibrationError, InputError, RecipeError, WancompileError
from wancompile.pipeline import relative_error
from wancompile.recipe import QSpec, Recipe, Rule

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_the_recipe_decides() -> None:
    model, inputs = zoo.make("t2v", 1)
    recipe = Recipe("mine", QSpec("fp8"), (Rule("ffn_*", None),))
    quantized = compiled(model, recipe=recipe)
    counts = ran(quantized, inputs)
    assert counts["scaled_linear"] == 5  # q, k, v; k, v; one q and two outputs
    assert counts["linear"] == linears(model) - 8
    assert 0.005 < error(quantized, model, inputs) < 0.1


def test_statistics_of_a_file_smooth_as_compile_does(tmp_path: Path) -> None:
    model, inputs = zoo.make("i2v", 1)
    stats = wancompile.calibrate(model, [inputs, zoo.example("i2v", 1)])
    file = tmp_path / "stats.safetensors"
    stats.save(file)
    other = wancompile.compile(model, stats=stats, example_inputs=inputs)
    assert any(group.smoothing.applied for group in other.report.groups)
    out = run(compiled(model, stats=file), inputs)
    torch.testing.assert_close(out, run(other, inputs), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    assert relative_error(out, run(compiled(model), inputs)) > 1e-3


def test_statistics_allow_8_bit_attention() -> None:
    model, inputs = zoo.make("t2v", 1)
    stats = wancompile.calibrate(model, [inputs])
    quantized = compiled(model, recipe="int8-attention", stats=stats)
    assert ran(quantized, inputs)["scaled_attention"] == 1
    assert error(quantized, model, inputs) < 0.05


def test_attention_scales_need_statistics() -> None:
    model, inputs = attending()
    found = refused(compiled(model, recipe="int8-attention"), inputs)
    assert isinstance(found, CalibrationError)
    assert "options={'stats': ...}" in found.reason


def test_statistics_of_another_model_are_refused() -> None:
    wan, inputs = zoo.make("t2v", 1)
    loom = clone.from_wan(wan)
    stats = wancompile.calibrate(loom, [clone.arguments(inputs)])
    assert isinstance(refused(compiled(wan, stats=stats), inputs), CalibrationError)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"recipes": "int8"},
            InputError,
            "unknown option 'recipes'; there are recipe, stats, inductor",
        ),
        ({"recipe": 8}, InputError, "recipe is a name or a Recipe, not int"),
        ({"stats": {}}, InputError, "stats is a Stats or the path of one, not dict"),
        ({"inductor": "yes"}, InputError, "inductor is True or False, not 'yes'"),
        ({"stats": "/nowhere"}, CalibrationError, "/nowhere"),
        ({"recipe": "int9"}, RecipeError, "no recipe 'int9'"),
    ],
)
def test_an_option_that_is_wrong_is_named(
    options: dict[str, Any], kind: type[WancompileError], message: str
) -> None:
    model, inputs = attending()
    found = refused(compiled(model, **options), inputs)
    assert isinstance(found, kind)
    assert message in found.reason


def test_a_rule_that_matches_nothing_is_told_what_is_near() -> None:
    model, inputs = zoo.make("t2v", 1)
    recipe = Recipe("mine", QSpec("int8"), (Rule("blocks.7.*", None),))
    found = refused(compiled(model, recipe=recipe), inputs)
    assert isinstance(found, RecipeError)
    assert "nearest are blocks.0." in found.reason


def test_a_mode_is_refused() -> None:
    model, inputs = attending()
    found = refused(torch.compile(model, backend="wancompile", mode="max-autotune"), inputs)
    assert "no mode 'max-autotune'" in found.reason


def test_inductor_compiles_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = attending()
    calls = [torch.randn(batch, tokens, 16) for batch, tokens in ((2, 5), (3, 9), (2, 8))]
    expected = [compiled(model, dynamic=True)(x) for x in calls]
    torch._dynamo.reset()
    counters.clear()
    quantized = compiled(model, dynamic=True, inductor=True)
    for x, plain in zip(calls, expected, strict=True):
        torch.testing.assert_close(quantized(x), plain, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    # The sine and the product are Inductor's now; the compiler's products are called as they are.
    assert counters["inductor"]["extern_calls"] >= 2
    model.out.weight.mul_(2)
    changed = compiled(model, dynamic=True)
    assert relative_error(quantized(calls[0]), changed(calls[0])) < 1e-5
    assert quantizations(caplog) == 4
