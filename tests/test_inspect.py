from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from wancompile.errors import InputError, LevelError
from wancompile.gate.compare import Comparison, compare
from wancompile.html import Extras, Picture, Table, write_html
from wancompile.html.markup import Html, el
from wancompile.inspect import Change, climb, diff, is_under, lines, side_by_side
from wancompile.ir.blocks import blocks
from wancompile.ir.levels import Level
from wancompile.program import Program
from wancompile.recipe import ATTENTIONS, QSpec, Recipe, Rule, resolve
from wancompile.report import Report

RECIPE = Recipe("mixed", QSpec("int8"), (Rule("blocks.1.ffn.net.2", None),), ATTENTIONS["int8"])


def wan(device: str = "cpu") -> WanTransformer3DModel:
    torch.manual_seed(0)
    with torch.device(device):
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
            cross_attn_norm=True,
        ).eval()


def call(device: str = "cpu") -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 2, 8, 8, device=device),
        "timestep": torch.tensor([500.0, 20.0], device=device),
        "encoder_hidden_states": torch.randn(2, 16, 24, device=device),
    }


@pytest.fixture(scope="module")
def programs() -> dict[Level, Program]:
    return climb(wan(), call(), Level.LOWERED, recipe=RECIPE, calibration=[call()])


@pytest.fixture(scope="module")
def comparison(programs: dict[Level, Program]) -> Comparison:
    return compare(programs[Level.NORMAL], programs[Level.LOWERED], call())


@pytest.fixture(scope="module")
def report(programs: dict[Level, Program]) -> Report:
    size = programs[Level.EXPORTED].nbytes
    return Report(RECIPE, (), (), (), size, 0).with_program(programs[Level.LOWERED])


# Levels --------------------------------------------------------------------------------------


def test_climbing_stops_where_asked() -> None:
    assert list(climb(wan(), call(), Level.OBSERVED)) == [
        Level.EXPORTED,
        Level.NORMAL,
        Level.OBSERVED,
    ]


def test_a_model_without_weights_climbs_to_observed_and_no_further() -> None:
    assert Level.OBSERVED in climb(wan("meta"), call("meta"), Level.OBSERVED)
    with pytest.raises(LevelError, match="QUANTIZED computes with weights"):
        climb(wan("meta"), call("meta"), Level.QUANTIZED)


def test_without_calibration_nothing_is_smoothed() -> None:
    program = climb(wan(), call(), Level.QUANTIZED)[Level.QUANTIZED]
    assert all(group.smoothing is None for group in program.groups)
    assert "scaled_linear" in program.print()


def test_every_level_computes_the_same(programs: dict[Level, Program]) -> None:
    expected = wan()(**call(), return_dict=False)[0]
    for level, program in programs.items():
        error = (program(**call())[0] - expected).norm() / expected.norm()
        assert error < (0.05 if level >= Level.QUANTIZED else 1e-5), level


# Text ----------------------------------------------------------------------------------------


def test_lines_are_named_by_site(programs: dict[Level, Program]) -> None:
    found = lines(programs[Level.NORMAL], "blocks.0.attn1")
    texts = {line.head: line.text for line in found}
    assert "= linear(" in texts["%blocks.0.attn1.to_q"]
    assert any("rms_norm(%blocks.0.attn1.to_q," in line.text for line in found)
    assert all(line.path.startswith("blocks.0.attn1") for line in found)


def test_a_site_that_matches_nothing_is_an_error(programs: dict[Level, Program]) -> None:
    with pytest.raises(InputError, match=r"nearest are .*blocks\.1"):
        lines(programs[Level.NORMAL], "blocks.9*")


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("blocks.1", "blocks.1", True),
        ("blocks.1.attn1.to_q", "blocks.1", True),
        ("blocks.1.attn1:attention", "blocks.1.attn1", True),
        ("blocks.10.attn1", "blocks.1", False),
        ("blocks.10.attn1.to_q#1", "*.to_q", True),
        ("", "blocks.*", False),
    ],
)
def test_is_under(path: str, pattern: str, expected: bool) -> None:
    assert is_under(path, pattern) is expected


def test_blocks_are_the_list_with_the_most_sites() -> None:
    sites = [
        "embed.net.0.proj",
        "embed.net.2",
        "layers.0.a.to_out.0",
        "layers.1.b",
        "layers.2.c",
        "end",
    ]
    assert blocks(sites) == {
        "layers.0.a.to_out.0": "layers.0",
        "layers.1.b": "layers.1",
        "layers.2.c": "layers.2",
    }
    assert blocks(["end"]) == {}


def test_quantizing_a_linear_changes_one_line_and_none_of_its_readers(
    programs: dict[Level, Program],
) -> None:
    rows = side_by_side(programs[Level.NORMAL], programs[Level.QUANTIZED], "blocks.0.attn1")
    changed = {row.before.head for row in rows if row.change is Change.CHANGED and row.before}
    members = {"%blocks.0.attn1.to_q", "%blocks.0.attn1.to_k", "%blocks.0.attn1.to_v"}
    assert members <= changed
    assert not any("rms_norm" in head for head in changed)
    assert not any(row.change is Change.REMOVED for row in rows)


def test_both_sides_are_complete_and_in_order(programs: dict[Level, Program]) -> None:
    before, after = programs[Level.EXPORTED], programs[Level.LOWERED]
    rows = side_by_side(before, after)
    assert [row.before for row in rows if row.before] == lines(before)
    assert [row.after for row in rows if row.after] == lines(after)
    same = [row for row in rows if row.change is Change.SAME]
    assert same
    assert all(row.before and row.after and row.before.text == row.after.text for row in same)


def test_diff(programs: dict[Level, Program]) -> None:
    text = diff(programs[Level.NORMAL], programs[Level.QUANTIZED], "blocks.1.ffn")
    assert text.startswith("--- NORMAL\n+++ QUANTIZED\n")
    assert re.search(r"^-%blocks\.1\.ffn\.net\.0\.proj: .*= linear\(", text, re.MULTILINE)
    assert re.search(r"^\+%blocks\.1\.ffn\.net\.0\.proj: .*scaled_linear\(", text, re.MULTILINE)
    # The recipe leaves this one alone.
    assert not re.search(r"^[-+]%blocks\.1\.ffn\.net\.2:", text, re.MULTILINE)
    assert diff(programs[Level.NORMAL], programs[Level.NORMAL]) == ""


# Errors --------------------------------------------------------------------------------------


def test_float_levels_agree_at_every_site(programs: dict[Level, Program]) -> None:
    found = compare(programs[Level.NORMAL], programs[Level.OBSERVED], call())
    assert all(one.relative == 0 and one.sqnr == math.inf for one in found.errors)
    assert found.left_out == ()


def test_errors_start_at_the_first_quantized_linear(comparison: Comparison) -> None:
    errors = {one.site: one for one in comparison.errors}
    assert errors["condition_embedder.time_proj"].relative == 0
    first = errors["blocks.0.attn1.to_q"]
    assert first.role == "attn_qkv_proj"
    assert 1e-3 < first.relative < 5e-2
    assert first.sqnr == pytest.approx(-20 * math.log10(first.relative))
    assert 0.99 < first.cosine < 1
    assert comparison.worst(3)[0].relative == max(one.relative for one in comparison.errors)


def test_values_that_smoothing_scales_are_left_out(
    programs: dict[Level, Program], comparison: Comparison
) -> None:
    out = {site for site, _ in comparison.left_out}
    smoothed = {
        g.key for g in programs[Level.LOWERED].groups if g.smoothing and g.smoothing.applied
    }
    expected = {
        str(site)
        for attention in programs[Level.LOWERED].attentions
        if attention.out in smoothed
        for site in (attention.v, attention.site)
    }
    assert out == expected
    assert not out & {one.site for one in comparison.errors}


def test_a_site_error_is_that_of_the_values(
    programs: dict[Level, Program], comparison: Comparison
) -> None:
    site = programs[Level.NORMAL].groups[0].key
    expected, actual = (
        programs[level].values([site], **call())[site] for level in (Level.NORMAL, Level.LOWERED)
    )
    found = next(one for one in comparison.errors if one.site == str(site))
    assert found.relative == pytest.approx(
        float((actual - expected).norm() / expected.norm()), rel=1e-4
    )


# HTML ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that elements nest, and keeps what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


NASTY = '</script><script>alert("1")</script>&\'<img src=x onerror=alert(2)>'
PIXEL = (
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff!\xf9\x04\x01\x00\x00\x00\x00,"
    b"\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
)


@pytest.fixture(scope="module")
def page(
    programs: dict[Level, Program],
    comparison: Comparison,
    report: Report,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    extras = Extras(
        tables=[Table("Quality", ["recipe", "PSNR"], [["int8", "46.9 dB"], [NASTY, 1]], "note")],
        pictures=[Picture(NASTY, "image/gif", PIXEL), ("clip", "video/mp4", b"\x00")],
    )
    return write_html(
        tmp_path_factory.mktemp("html") / "new" / "report.html",
        report,
        programs=(programs[Level.NORMAL], programs[Level.LOWERED]),
        comparison=comparison,
        extras=extras,
        title=NASTY,
    )


def test_markup_escapes_whatever_is_not_markup() -> None:
    inner = el("b", "<", None, ["&", Html("<i/>")])
    assert inner == "<b>&lt;&amp;<i/></b>"
    assert el("td", inner, class_='"', data_x="'", hidden=True, title=None, lang=False) == (
        f'<td class="&quot;" data-x="&#x27;" hidden>{inner}</td>'
    )
    assert el("br") == "<br/>"


def test_the_page_is_one_file_without_links_to_anything_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for tag, attributes in Page(text).tags:
        target = attributes.get("src") or attributes.get("href") or "#"
        assert target.startswith(("#", "data:")), (tag, target)
    assert "url(" not in text
    assert "@import" not in text


def test_text_from_outside_is_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 1
    assert "<img src=x" not in text
    assert "&lt;/script&gt;&lt;script&gt;" in text


def test_the_page_holds_every_group_and_every_reason(page: Path, report: Report) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count('<tr data-role="') == len(report.groups)
    for reason in {reason for _, _, reason in report.skipped}:
        assert f"<b>{reason}</b>" in text
    for one in report.ungrouped:
        assert str(one.site) in text
    for record in report.records:
        assert f'<span class="name">{record.name}</span>' in text


def test_the_page_marks_what_changed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert 'class="row changed"' in text
    assert '<mark><span class="op">scaled_linear</span></mark>' in text
    assert re.search(r"<summary>\d+ equal lines</summary>", text)


def test_a_report_of_a_float_program_has_a_page(
    programs: dict[Level, Program], tmp_path: Path
) -> None:
    program = programs[Level.NORMAL]
    report = Report(resolve("int8"), (), (), (), 0, 0).with_program(program)
    text = write_html(tmp_path / "a.html", report).read_text(encoding="utf-8")
    assert 'id="errors"' not in text
    assert 'id="groups"' in text


def test_a_picture_of_another_type_is_refused(report: Report, tmp_path: Path) -> None:
    extras = Extras(pictures=[Picture("page", 'text/html"', b"")])
    with pytest.raises(InputError, match="neither an image nor a video"):
        write_html(tmp_path / "a.html", report, extras=extras)


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine")
    return found


PROBE = """
<body><iframe id="f" src="report.html" style="width:390px;height:800px"></iframe><script>
const frame = document.getElementById("f");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const all = page.querySelectorAll("#groups tbody tr").length;
  page.getElementById("q").value = "blocks.0 to_q";
  page.getElementById("q").dispatchEvent(new view.Event("input"));
  const shown = page.querySelectorAll("#groups tbody tr:not([hidden])").length;
  const button = page.querySelector(".legend button");
  const marks = () => page.querySelectorAll(".chart .mark.off").length;
  button.click();
  const off = marks();
  button.click();
  const wide = page.documentElement.scrollWidth;
  document.body.textContent = JSON.stringify({all, shown, off, back: marks(), wide});
});
</script></body>
"""


def test_the_page_works_at_phone_width(page: Path, report: Report) -> None:
    probe = page.with_name("probe.html")
    probe.write_text(PROBE, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --allow-file-access-from-files "
        f"--virtual-time-budget=5000 --user-data-dir={page.parent / 'profile'} --dump-dom"
    )
    done = subprocess.run(
        [browser(), *flags.split(), probe.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r"\{.*\}", done.stdout)
    assert found is not None, done.stderr
    assert '"back":0' in found.group()
    numbers = {key: int(value) for key, value in re.findall(r'"(\w+)":(\d+)', found.group())}
    assert numbers["all"] == len(report.groups)
    assert numbers["shown"] == 2  # the groups of to_q in both attentions of the first block
    assert numbers["off"] > 0
    assert numbers["wide"] <= 390, "the page is wider than the phone"
