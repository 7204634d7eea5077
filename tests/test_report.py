from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from small import WEIGHTS, X, attend, fused, normal, plain, quantized

import wancompile
from wancompile import pipeline
from wancompile.calibrate import Calibration
from wancompile.ir.edit import Note
from wancompile.ir.site import Role, Site
from wancompile.passes import FoldConstants, Lower, Smooth
from wancompile.recipe import QSpec, Recipe, Rule
from wancompile.report import Report

RECIPE = Recipe("mine", QSpec("int8"), (Rule("attn_out_proj", None),))
OUTLIERS = torch.ones(12)
OUTLIERS[3] = 100.0


def outlying(self, x):
    return attend(self, x * self.outliers)


@pytest.fixture(scope="module")
def programs():
    weights = {**WEIGHTS, **{n: WEIGHTS[n] / OUTLIERS for n in ("wq", "wk", "wv")}}
    program = normal(outlying, X, **weights, outliers=OUTLIERS)
    calibration = Calibration(program, rows=32)
    for _ in range(4):
        calibration(x=torch.randn(2, 9, 12))
    smoothed = pipeline.run(program, [Smooth(RECIPE, calibration.stats())])
    return program, pipeline.run(quantized(smoothed, RECIPE), [FoldConstants()])


@pytest.fixture(scope="module")
def report(programs):
    before, after = programs
    return Report(RECIPE, (), (), (), before.nbytes, 0).with_program(after)


def test_roles_are_summed_up(report):
    qkv, out = report.roles
    assert (qkv.role, qkv.groups, qkv.linears, qkv.smoothed) == (Role.ATTN_QKV, 1, 3, 1)
    assert (out.role, out.groups, out.linears, out.smoothed) == (Role.ATTN_OUT, 1, 1, 0)
    assert qkv.folds == ("quantise op",)
    assert qkv.error_smoothed < 0.5 * qkv.error_plain
    assert (out.error_plain, out.error_smoothed) == (None, None)


def test_errors_are_those_of_the_choice(report):
    (group,) = [group for group in report.groups if group.key == Site("wq")]
    assert report.errors == {"wq": group.smoothing.error_smoothed}


def test_what_was_skipped_is_listed_with_its_pass(report):
    assert (
        "quantize_linears",
        "wo",
        "the recipe leaves this group in floating point",
    ) in report.skipped


def test_bytes_count_all_tensors(report, programs):
    before, after = programs
    assert report.bytes_before == before.nbytes
    assert report.bytes_after == sum(t.nbytes for t in after.state.values())
    assert report.bytes_after < report.bytes_before


def test_a_report_prints_roles_and_passes(report):
    text = str(report)
    assert text.startswith("recipe mine, weights 0.0 MB -> 0.0 MB (0.")
    row = next(line for line in text.splitlines() if line.startswith("attn_qkv_proj")).split()
    assert row[:5] == ["attn_qkv_proj", "1", "3", "quantise", "op"]
    assert row[5] == "1"
    assert row[-1] == row[-3] == "%"
    out = next(line for line in text.splitlines() if line.startswith("attn_out_proj")).split()
    assert out[-2:] == ["-", "-"]
    assert column(text, "pass") == [record.name for record in report.records]


def column(text, header):
    """The first word of each row of the table whose first header is this."""
    (table,) = [one for one in text.split("\n\n") if one.startswith(f"{header} ")]
    return [line.split()[0] for line in table.splitlines()[2:]]


def test_a_report_prints_what_is_stored_and_what_was_skipped(report, programs):
    _, after = programs
    text = str(report)
    assert column(text, "stored") == [one.dtype for one in report.stored]
    assert column(text, "skipped") == [one.pass_name for one in report.skips]
    assert "the recipe leaves this group in floating point" in text
    sizes = {one.dtype: one.nbytes for one in report.stored}
    assert sizes["int8"] == sum(t.nbytes for t in after.state.values() if t.dtype == torch.int8)
    assert sum(sizes.values()) == report.bytes_after


def test_skips_are_all_that_was_skipped_reason_by_reason(report):
    found = [(one.pass_name, note.site, note.text) for one in report.skips for note in one.notes]
    assert sorted(found) == sorted(report.skipped)
    assert len({(one.pass_name, one.reason) for one in report.skips}) == len(report.skips)


def test_reasons_that_differ_in_numbers_are_one(report):
    texts = ("int8 is 4.0 % off at 2", "int8 is 0.5 % off at 2", "fp8 is 10.25 % off at 2")
    record = replace(report.records[0], skipped=tuple(Note(f"s{text[:8]}", text) for text in texts))
    first, second = replace(report, records=(record,)).skips
    assert first.reason == "int8 is 0.5 to 4.0 % off at 2"
    assert [note.text for note in first.notes] == list(texts[:2])
    assert second.reason == texts[2]


def test_a_report_follows_its_program(report, programs):
    later = report.with_program(pipeline.run(fused(programs[1]), [Lower(torch.device("cpu"))]))
    assert later.records[-1].name == "lower"
    assert later.bytes_before == report.bytes_before
    assert report.records[-1].name == "fold_constants"


def test_a_model_without_statistics_has_no_errors():
    program = quantized(normal(attend, **WEIGHTS), plain("fp8"))
    report = Report(plain("fp8"), (), (), (), 1, 0).with_program(program)
    assert report.errors == {}
    assert all(one.error_plain is None for one in report.roles)


def test_compile_reports():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in WEIGHTS.items():
                self.register_parameter(name, torch.nn.Parameter(tensor))

        def forward(self, x):
            return attend(self, x)

    model = Model()
    compiled = wancompile.compile(model, recipe="fp8", example_inputs={"x": X})
    assert compiled.report.recipe.name == "fp8"
    assert compiled.report.bytes_before == 4 * sum(p.numel() for p in model.parameters())
    assert compiled.report.bytes_after == compiled.nbytes
    assert compiled.report.records[-1].name == "lower"
    # Nothing was calibrated, and the time of the one attention is known from its shape.
    assert compiled.report.stability is None
    assert compiled.report.predicted is not None
    text = str(compiled.report)
    assert "predicted" in text
    # What every op runs as is never silent, also where its first choice fits.
    assert column(text, "op") == [note.site for note in compiled.report.records[-1].done]
    assert re.search(r"^wancompile\.scaled_linear\.default +\d x plain body$", text, re.MULTILINE)
