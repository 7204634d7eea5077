"""The cost model against the layers that were measured."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

import pytest

import wancompile
from benchmarks import cost_table, h100_plan
from wancompile import cost, presets
from wancompile.errors import InputError
from wancompile.recipe import ATTENTIONS, RECIPES, QSpec, Recipe, Rule

NAMES = ("int8", "fp8", "int8-attention", "int8-attention-fast", "fp8-attention")
OURS = {"float": Recipe("float", None), **{name: RECIPES[name] for name in NAMES}}
COMPILED = "compile-sdpa"


DEVICE, RESULTS = cost_table.measured()


def layer_ms(cell):
    deep, shallow = (median(cell["forward_ms"][str(n)]) for n in (3, 1))
    return (deep - shallow) / 2


CELLS = [
    (cell["row"], cell["column"], layer_ms(cell))
    for cell in RESULTS
    if cell["column"] in (*OURS, COMPILED) and cell.get("forward_ms")
]


@cache
def traced(preset, latent):
    subject = presets.truncated(presets.find(preset), 1)
    subject = replace(subject, latent=latent)
    call = presets.example_inputs(subject, device="meta")
    return wancompile.trace(presets.build(subject, device="meta"), call, dynamic=False)


def layer(row, table="h100", tokens=None):
    row = h100_plan.ROWS[row]
    program = traced(row.preset, row.latent)
    return cost.costs(program, tokens=tokens, device=table), program.groups


def predicted(row, column):
    found, groups = layer(row)
    return found.compiled if column == COMPILED else found.of(OURS[column], groups)


@pytest.mark.parametrize(("row", "column", "ms"), CELLS)
def test_a_measured_layer_is_predicted_within_a_tenth(row, column, ms):
    assert predicted(row, column) == pytest.approx(ms, rel=0.1)


@pytest.mark.parametrize("left_out", ["t2v-14b-480p", "t2v-14b-720p", "ti2v-5b-704p"])
def test_and_nearly_so_if_its_row_had_not_been_measured(left_out, monkeypatch, tmp_path):
    rest = [cell for cell in RESULTS if cell["row"] != left_out]
    less = cost_table.write(tmp_path / "less", DEVICE, rest)
    monkeypatch.setattr(cost, "TABLES", {"less": less})
    found, groups = layer(left_out, "less")
    for row, column, ms in CELLS:
        if row == left_out:
            mine = found.compiled if column == COMPILED else found.of(OURS[column], groups)
            assert mine == pytest.approx(ms, rel=0.15), column


def test_the_table_is_made_from_the_results_it_names(tmp_path):
    table = json.loads(cost.TABLES["h100"].read_text())
    files = sorted(Path(cost_table.RESULTS).parents[1].glob(table["source"]))
    assert files == sorted(cost_table.RESULTS.glob("h100-*.json"))
    cost_table.main(["--out", str(tmp_path / "again.json")])
    assert (tmp_path / "again.json").read_text() == cost.TABLES["h100"].read_text()


def test_attention_with_values_in_bf16_has_a_rate_of_its_own():
    by_column = {one["column"]: one for one in RESULTS if one["row"] == "t2v-14b-480p"}
    slow, fast = by_column["int8-attention"], by_column["int8-attention-fast"]
    both = cost_table.table([slow, {**slow, "column": fast["column"], "profile": halved(slow)}])
    assert both["attention int8"]
    for (shape, rate), (_, other) in zip(
        both["attention int8"], both["attention int8-fast"], strict=True
    ):
        assert other == pytest.approx(2 * rate, rel=1e-3), shape


def halved(cell):
    """The profile of a layer that took half as long."""
    return [{**entry, "ms": entry["ms"] / 2} for entry in cell["profile"]]


def test_a_rate_lies_between_those_of_its_neighbours():
    table = cost.Table("a", "b", {"x": (((10, 100), 1.0), ((1000, 100), 4.0))})
    assert table.ms("x", (10, 100), 3e9) == 3
    assert table.ms("x", (1000, 100), 3e9) == 0.75
    assert table.ms("x", (100, 100), 3e9) == pytest.approx(1.5)
    assert 0.75 < table.ms("x", (900, 100), 3e9) < table.ms("x", (200, 100), 3e9) < 1.5
    assert table.ms("x", (10, 100), 0) == 0


def test_exceptions_cost_what_they_are():
    found, groups = layer("t2v-14b-480p")
    all_int8, ms = found.of(OURS["int8"], groups), {one.role: one.ms for one in found.sites}
    rules = [Rule("ffn_up_proj", QSpec("fp8")), Rule("ffn_down_proj", None)]
    some = found.of(OURS["int8"].with_rules(rules), groups)
    up, down = ms["ffn_up_proj"], ms["ffn_down_proj"]
    assert some - all_int8 == pytest.approx(up["fp8"] - up["int8"] + down["float"] - down["int8"])
    attention = ms["self-attention"]
    kept = found.of(OURS["int8-attention"].with_float_attention(["*"]), groups)
    assert kept == pytest.approx(all_int8)
    for name in ATTENTIONS:
        recipe = replace(OURS["int8"], attention=ATTENTIONS[name])
        saved = attention["float"] - attention[name]
        assert found.of(recipe, groups) == pytest.approx(all_int8 - saved)
    assert attention["int8-fast"] < attention["int8"] < attention["float"]


def test_open_sizes_are_those_of_the_call_asked_for():
    row = h100_plan.ROWS["t2v-1.3b-480p"]
    subject = presets.truncated(presets.find(row.preset), 1)
    call = presets.example_inputs(replace(subject, latent=(2, 8, 8)), device="meta")
    program = wancompile.trace(presets.build(subject, device="meta"), call)
    fixed, groups = layer(row.name)
    assert cost.costs(program).tokens == 32
    found = cost.costs(program, tokens=row.tokens)
    assert found.of(OURS["int8"], groups) == pytest.approx(fixed.of(OURS["int8"], groups))
    assert found.sites == fixed.sites


def test_what_was_not_measured_is_refused():
    with pytest.raises(InputError, match="no times were measured on 'a100'; there are h100"):
        layer("t2v-1.3b-480p", "a100")
    with pytest.raises(InputError, match="no attention int4 was measured"):
        cost.load("h100").ms("attention int4", (1, 1, 1, 1), 1.0)
