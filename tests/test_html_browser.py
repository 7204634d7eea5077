"""Pages of reports in a browser: they open, search, and can be read and used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
from browser import Browser, chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages.written(tmp_path_factory.mktemp("page") / "report.html")


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
