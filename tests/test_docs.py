"""The documents say what is so: their Python runs, links lead somewhere, tables agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from wancompile import passes
from wancompile.ir.levels import FUSED_OPS, Level
from wancompile.quant.stats import Stats
from wancompile.recipe import resolve

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/api.md",
)

_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\S+/\S+\.py)\n")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?<!\[)`([\w.-]+/[\w./-]*)`")  # labels of links may be shorter
_PASS_ROW = re.compile(r"^\| `(\w+)` \| [^|]+ \| `([^`]+)` \|$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block; `file` is the path that its first line gives it, or empty."""

    language: str
    text: str
    file: str
    line: int


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> Iterator[Block]:
    text = read(document)
    for found in _BLOCK.finditer(text):
        file = _FILE.match(found[2])
        line = text.count("\n", 0, found.start(2))
        yield Block(found[1].strip(), found[2], file[1] if file else "", line)


def prose(document: str) -> str:
    return _BLOCK.sub("", read(document))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_runs_top_to_bottom(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(document):
        if block.language != "python" or block.file:
            continue
        code = "\n" * block.line + block.text  # so that a traceback names the line of the document
        exec(compile(code, str(ROOT / document), "exec"), namespace)


def test_the_example_pass_works_as_printed(tmp_path):
    """Its files go into a copy of the tree, where its tests run and write the golden text."""
    _copy_tree(tmp_path)
    files = [block for block in blocks("CONTRIBUTING.md") if block.file]
    for block in files:
        (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    tests = [block.file for block in files if block.file.startswith("tests/")]
    assert tests
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--update-golden", *tests],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = [path.read_text(encoding="utf-8") for path in (tmp_path / "tests/golden").iterdir()]
    assert written == [b.text for b in blocks("CONTRIBUTING.md") if b.language == "text"]


def _copy_tree(target: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "weights")
    for folder in ("wancompile", "passes"):
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=ignored)
    (target / "tests").mkdir()
    for helper in ("conftest.py", "kit.py"):
        shutil.copy(ROOT / "tests" / helper, target / "tests")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    links = [link for link in _LINK.findall(prose(document)) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _anchors(document: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_files_it_names_exist(document):
    for path in _PATH.findall(prose(document)):
        assert (ROOT / path).exists(), path


def test_the_table_of_passes_is_the_order_in_which_they_run():
    recipe = resolve("int8")
    order = [
        *passes.NORMALIZE,
        *passes.smoothing(recipe, Stats({})),
        *passes.quantization(recipe, None),
        *passes.FUSE,
        *passes.lowering(torch.device("cpu")),
    ]
    expected = [(one.name, f"passes/{type(one).__module__.rpartition('.')[2]}.py") for one in order]
    assert _PASS_ROW.findall(read("docs/architecture.md")) == expected


def test_the_table_of_levels_is_that_of_the_code():
    section = read("docs/architecture.md").partition("\n## Levels\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| ([A-Z]+) \|", section, re.MULTILINE) == [level.name for level in Level]


def test_every_op_is_in_the_documents():
    named = set(re.findall(r"`(\w+)`", prose("docs/architecture.md")))
    assert named >= {op._schema.name.removeprefix("wancompile::") for op in FUSED_OPS}


def test_every_pass_is_in_the_documents():
    named = set(re.findall(r"`(passes/\w+\.py)`", read("docs/architecture.md")))
    files = (ROOT / "passes").glob("*.py")
    helpers = {"__init__", "sources"}
    assert named >= {f"passes/{file.name}" for file in files if file.stem not in helpers}
