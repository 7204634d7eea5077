"""Pages of reports: what they say, and what a browser makes of them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import zoo
from browser import Browser, chromium
from torch.fx import Node

import wancompile
from wancompile.compiled import CompiledModel
from wancompile.cost import FLOAT, costs
from wancompile.gate.compare import Comparison, compare
from wancompile.html import write_html
from wancompile.html.layers import arrange
from wancompile.html.reduce import Look, Reduced, reduce
from wancompile.inspect import is_under, path_of
from wancompile.ir import match
from wancompile.ir.edit import Note
from wancompile.ir.site import Group, Site
from wancompile.program import PassRecord, Program
from wancompile.report import Report
from wancompile.times import FIXED, REST, Measured, as_text, measure, part_of, predict
from wancompile.units import nbytes

BLOCKS = ("blocks.0", "blocks.1")


@dataclass(frozen=True)
class Made:
    compiled: CompiledModel
    normal: Program
    call: dict[str, object]
    comparison: Comparison

    @property
    def report(self) -> Report:
        return self.compiled.report


@pytest.fixture(scope="module")
def made() -> Made:
    model, first = zoo.make("t2v")
    data = [first, *(zoo.example("t2v", seed=seed) for seed in range(2, 7))]
    compiled = wancompile.compile(model, data, "int8")
    normal = wancompile.trace(model, first, dynamic=False)
    return Made(compiled, normal, first, compare(normal, compiled.program, first))


@pytest.fixture(scope="module")
def page(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(
        tmp_path_factory.mktemp("page") / "report.html",
        made.report,
        programs=(made.normal, made.compiled.program),
        comparison=made.comparison,
        measured=Measured("a clock of this test", {"attn_qkv_proj": 12.5, REST: 3.0}, 7),
        title="two blocks",
    )


def section(page: Path | str, key: str) -> str:
    text = page if isinstance(page, str) else page.read_text(encoding="utf-8")
    (found,) = re.findall(rf'<section id="{key}">.*?</section>', text, re.DOTALL)
    return str(found)


# What it says -------------------------------------------------------------------------------


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


# Pictures -----------------------------------------------------------------------------------


def inside(program: Program, block: str) -> set[Node]:
    return {
        node
        for node in program.graph.nodes
        if node.op == "call_function" and is_under(path_of(node), block)
    }


def reduced(program: Program, block: str) -> Reduced:
    return reduce(program.graph, inside(program, block), block)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_picture_has_every_op_that_computes_once(made: Made, block: str) -> None:
    for program in (made.normal, made.compiled.program):
        found = reduced(program, block)
        assert all(0 <= start < end < len(found.boxes) for start, end in found.edges)
        assert len(set(found.edges)) == len(found.edges)
        drawn = Counter(
            node for box in found.boxes if box.look is not Look.OUTSIDE for node in box.nodes
        )
        assert set(drawn.values()) == {1}
        computing = {
            node
            for node in inside(program, block)
            if match.is_linear(node) or match.is_attention(node)
        }
        assert computing
        assert computing <= drawn.keys()


def test_a_picture_keeps_who_depends_on_whom(made: Made) -> None:
    """Boxes are connected exactly where the values of their nodes are, over what lies between."""
    nodes, found = inside(made.normal, "blocks.0"), reduced(made.normal, "blocks.0")
    box_of = {
        node: index
        for index, box in enumerate(found.boxes)
        if box.look is not Look.OUTSIDE
        for node in box.nodes
    }
    expected = set()
    for node, index in box_of.items():
        waiting = [*node.all_input_nodes]
        while waiting:
            read = waiting.pop()
            if read in box_of:
                expected.add((box_of[read], index))
            elif read in nodes and match.is_tensor(read):
                waiting += read.all_input_nodes
    own = {(a, b) for a, b in found.edges if found.boxes[a].look is not Look.OUTSIDE}
    assert own == {(a, b) for a, b in expected if a != b}


def test_looks_tell_what_is_in_8_bits(made: Made) -> None:
    before, after = (reduced(one, "blocks.0") for one in (made.normal, made.compiled.program))
    assert not {Look.EIGHT, Look.ROUNDS} & {box.look for box in before.boxes}
    assert {Look.EIGHT, Look.ROUNDS} <= {box.look for box in after.boxes}
    eight = " ".join(box.title for box in after.boxes if box.look is Look.EIGHT)
    for name in ("attn1.to_q, to_k, to_v", "attn1.to_out.0", "ffn.net.0.proj"):
        assert name in eight


@pytest.mark.parametrize("seed", range(6))
def test_rows_go_down_and_nothing_overlaps(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(2, 30)
    pairs = [(a, b) for b in range(count) for a in range(b) if draw.random() < 3 / count]
    found = arrange(count, pairs, width=100, bend=10)
    assert found.places.keys() == set(range(count))
    for (start, end), line in zip(pairs, found.lines, strict=True):
        assert (line[0], line[-1]) == (found.places[start], found.places[end])
        assert [place.row for place in line] == list(range(line[0].row, line[-1].row + 1))
    for row in range(found.rows):
        across = sorted(place.x for place in found.places.values() if place.row == row)
        assert all(b - a >= 100 - 1e-6 for a, b in pairwise(across))
        assert all(50 - 1e-6 <= x <= found.width - 50 + 1e-6 for x in across)


# Times --------------------------------------------------------------------------------------


def test_parts_add_up_to_what_a_recipe_costs(made: Made) -> None:
    found = costs(made.normal)
    recipe = made.report.recipe
    predicted = predict(found, recipe, made.normal.groups)
    assert predicted.ms == pytest.approx(found.of(recipe, made.normal.groups))
    as_float = sum(one.ms[FLOAT] for one in found.sites) + found.fixed
    assert sum(one.float_ms for one in predicted.parts) == pytest.approx(as_float)
    assert predicted.parts[-1].part == FIXED
    assert made.report.predicted == predicted
    assert Report.from_data(made.report.to_data()) == made.report


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (1234.5, "1.23 s"),
        (12.345, "12.3 ms"),
        (0.9996, "1 ms"),
        (0.0123, "12.3 us"),
        (2e-6, "2 ns"),
    ],
)
def test_times_have_a_unit_that_suits(ms: float, text: str) -> None:
    assert as_text(ms) == text


def test_what_feeds_one_part_alone_belongs_to_it(made: Made) -> None:
    program = made.compiled.program
    parts = part_of(program, program.graph)
    found: dict[str, set[str]] = {}
    for node, part in parts.items():
        found.setdefault(str(node.target), set()).add(part)
    op = "wancompile.{}.default".format
    assert found[op("gelu_quantize")] == {"ffn_down_proj"}
    assert found[op("scaled_linear_residual")] <= {"attn_out_proj", "ffn_down_proj"}
    assert found[op("norm_quantize")] <= {
        "attn_qkv_proj",
        "attn_q_proj",
        "ffn_up_proj",
    }
    assert REST in parts.values()


def test_times_are_measured_part_by_part(made: Made) -> None:
    found = measure(made.compiled.program, made.call, runs=2)
    roles = {str(group.role) for group in made.normal.groups}
    assert roles | {"self-attention", "cross-attention", REST} <= found.parts.keys()
    assert all(ms > 0 for ms in found.parts.values())
    assert found.runs == 2
    assert "CPU" in found.device


# In a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium()
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


FIND, KIND = "document.getElementById('find')", "document.getElementById('kind')"
SHOWN = "[...document.querySelectorAll('.kind:not([hidden]) {}')].filter(one => !one.hidden).length"


def type_into(browser: Browser, field: str, text: str) -> None:
    browser.js(f"{field}.value = '{text}'; {field}.dispatchEvent(new Event('input'))")


def test_a_page_opens_without_errors_or_requests(browser: Browser, page: Path) -> None:
    browser.look("light", 1200)
    browser.open(page.as_uri())
    browser.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.complaints == []
    assert {one for one in browser.requests if not one.startswith(("data:", "about:"))} == {
        page.as_uri()
    }


def test_a_search_keeps_what_it_finds(browser: Browser, page: Path) -> None:
    browser.look("light", 1200)
    browser.open(f"{page.as_uri()}#find=attn1.to_q")
    total = browser.js("document.querySelectorAll('.kind:not([hidden]) .box').length")
    hits = browser.js(SHOWN.format(".box.hit"))
    assert 0 < hits < total
    assert browser.js(SHOWN.format(".box.dim")) == total - hits
    lines = browser.js(SHOWN.format(".row:not(.head)"))
    assert browser.js("document.getElementById('found').textContent") == (
        f"{hits} boxes, {lines} lines"
    )
    assert 0 < lines < 20
    assert browser.js("document.querySelectorAll('#groups tbody tr:not([hidden])').length") == 2
    type_into(browser, FIND, "nothing is called that")
    assert browser.js("document.getElementById('found').textContent") == "0 boxes, 0 lines"
    type_into(browser, FIND, "")
    assert browser.js("document.querySelectorAll('.box.dim, .kind .row[hidden]').length") == 0


def test_a_block_is_chosen_from_the_menu(browser: Browser, page: Path) -> None:
    browser.look("light", 1200)
    browser.open(page.as_uri())
    title = "document.querySelector('.kind:not([hidden]) h3').textContent"
    assert browser.js(title) == "blocks.0"
    type_into(browser, KIND, "1")
    assert browser.js(title) == "blocks.1"
    assert browser.js("document.querySelectorAll('.kind:not([hidden])').length") == 1


def test_light_and_dark_look_different_and_can_be_read(browser: Browser, page: Path) -> None:
    shots, colours = {}, {}
    for scheme in ("light", "dark"):
        browser.look(scheme, 1200)
        browser.open(page.as_uri())
        shots[scheme] = browser.screenshot()
        colours[scheme] = [
            brightness(browser.js(f"getComputedStyle(document.body).{name}"))
            for name in ("color", "backgroundColor")
        ]
    assert shots["light"] != shots["dark"]
    assert colours["light"][0] < 0.2 < 0.9 < colours["light"][1]
    assert colours["dark"][1] < 0.2 < 0.8 < colours["dark"][0]


def brightness(colour: str) -> float:
    """The mean of the channels of `rgb(r, g, b)`, 0 to 1."""
    channels = [int(one) for one in re.findall(r"\d+", colour)[:3]]
    return sum(channels) / 3 / 255


def test_a_phone_shows_all_of_the_page(browser: Browser, page: Path) -> None:
    browser.look("light", 390)
    browser.open(page.as_uri())
    browser.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.js("document.documentElement.scrollWidth") <= 390
    texts = "[...document.querySelectorAll('svg.narrow text, .drawing text')]"
    heights = browser.js(
        f"{texts}.map((one) => one.getBoundingClientRect().height).filter(Boolean)"
    )
    assert min(heights) >= 9


def test_a_page_can_be_used_with_a_keyboard(browser: Browser, page: Path) -> None:
    browser.look("light", 1200)
    browser.open(page.as_uri())
    seen = []
    for _ in range(40):
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", windowsVirtualKeyCode=9)
        focused = "document.activeElement"
        seen.append(browser.js(f"{focused}.id || {focused}.className || {focused}.tagName"))
        style = f"getComputedStyle({focused})"
        assert browser.js(f"{style}.outlineStyle") != "none", seen
    assert seen[0] == "skip"
    assert {"find", "kind", "sideways"} <= set(seen)
