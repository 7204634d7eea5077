"""Pages of reports: what they say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pages
import pytest
import zoo
from pages import Made

import wancompile
from wancompile.html import write_html
from wancompile.ir.edit import Note
from wancompile.ir.site import Group, Site
from wancompile.program import PassRecord
from wancompile.report import Report
from wancompile.times import as_text
from wancompile.units import nbytes

made = pytest.fixture(scope="module")(pages.made)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages.written(tmp_path_factory.mktemp("page") / "report.html")


def section(page: Path | str, key: str) -> str:
    text = page if isinstance(page, str) else page.read_text(encoding="utf-8")
    (found,) = re.findall(rf'<section id="{key}">.*?</section>', text, re.DOTALL)
    return str(found)


def test_what_is_stored_is_drawn_as_wide_as_it_is_large(page: Path, made: Made) -> None:
    text = section(page, "weights")
    for one in made.report.stored:
        assert f"{one.dtype}: {nbytes(one.nbytes)}" in text
    widths = [float(one) for one in re.findall(r"width:([\d.]+)%", text)]
    assert widths[0] == 100
    share = 100 * made.report.bytes_after / made.report.bytes_before
    assert sum(widths[1:]) == pytest.approx(share, abs=0.1)


def test_times_are_predicted_and_only_those_given_are_measured(
    page: Path, made: Made, tmp_path: Path
) -> None:
    predicted = made.report.predicted
    assert predicted is not None
    text = section(page, "times")
    for one in predicted.parts:
        assert as_text(one.ms) in text
    assert f"{predicted.tokens:,} tokens" in text
    assert "12.5 ms" in text
    assert "a clock of this test: 15.5 ms, the median of 7 runs" in text
    plain = section(write_html(tmp_path / "a.html", made.report), "times")
    assert "measured" not in plain.lower().replace("kernels measured", "")
    neither = replace(made.report, predicted=None)
    assert 'id="times"' not in write_html(tmp_path / "b.html", neither).read_text()


def test_what_is_done_once_a_prompt_and_how_stable_calibration_was(page: Path, made: Made) -> None:
    hoisting, stability = made.report.hoisting, made.report.stability
    assert hoisting is not None
    assert stability is not None
    text = section(page, "hoisted")
    for figure in (nbytes(hoisting.weight_bytes), nbytes(hoisting.cached_bytes), *hoisting.inputs):
        assert figure in text
    text = section(page, "calibration")
    assert stability.verdict[1:] in text
    for one in stability.roles:
        assert f">{one.name}</td>" in text
        assert f"{one.scale_tail:.2f} x" in text


def test_each_skip_is_listed_with_its_reason_once(page: Path, made: Made) -> None:
    text = section(page, "skipped")
    assert made.report.skips
    assert text.count("<li>") == len(made.report.skips)


def test_blocks_that_are_alike_are_shown_once(made: Made, page: Path, tmp_path: Path) -> None:
    program = wancompile.trace(*zoo.make("t2v", layers=3), dynamic=False)
    text = section(write_html(tmp_path / "a.html", made.report, programs=(program,)), "graph")
    # The first one also holds what all share.
    assert "<h3>blocks.0</h3>" in text
    assert "<h3>blocks.1, and 1 block like it</h3>" in text
    assert "blocks.2 (like blocks.1)" in text
    assert text.count('class="drawing"') == 2
    # Compiled, the end of the first block is fused with the beginning of the second one.
    assert section(page, "graph").count('class="drawing"') == 2 * 2


def test_nothing_in_a_page_leads_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:)?//""", text)
    assert "default-src 'none'" in text.replace("&#x27;", "'")


# Forty blocks -------------------------------------------------------------------------------

_BLOCK = re.compile(r"^blocks\.\d+")


def repeated(report: Report, times: int) -> Report:
    """Return the report of a model with `times` as many blocks, each the copy of one of them."""

    def moved(text: str, step: int) -> str:
        return _BLOCK.sub(lambda found: f"{found.group()}{step:02d}", text)

    def group(one: Group, step: int) -> Group:
        sites = tuple(Site(moved(site.path, step), site.call) for site in one.sites)
        return replace(one, sites=sites)

    def notes(found: tuple[Note, ...]) -> tuple[Note, ...]:
        return tuple(
            replace(note, site=moved(note.site, step)) for step in range(times) for note in found
        )

    def record(one: PassRecord) -> PassRecord:
        return replace(one, done=notes(one.done), skipped=notes(one.skipped))

    groups = tuple(group(one, step) for step in range(times) for one in report.groups)
    return replace(report, groups=groups, records=tuple(map(record, report.records)))


def test_forty_blocks_are_a_small_file(made: Made, tmp_path: Path) -> None:
    forty = repeated(made.report, 20)
    assert len(forty.groups) == 20 * len(made.report.groups)
    errors = made.comparison.errors * 20
    page = write_html(
        tmp_path / "a.html",
        forty,
        programs=(made.normal, made.compiled.program),
        comparison=replace(made.comparison, errors=errors),
    )
    assert page.stat().st_size < 1.5e6
