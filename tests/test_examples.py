"""The examples run as they are, each as a program of its own would."""

from __future__ import annotations

import pipes
import re
import runpy
import sys
from pathlib import Path

import commands
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run an example with arguments, in an empty folder, and return what it printed."""

    def call(name: str, *argv: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def percents(text: str) -> list[float]:
    return [float(one) for one in re.findall(r"([\d.]+)%", text)]


def test_a_pipeline_is_compiled_saved_and_loaded(run, tmp_path):
    folder = commands.save_pipeline("t2v", tmp_path / "pipe")
    size = ("--frames", 5, "--height", pipes.SIZE, "--width", pipes.SIZE, "--steps", 2)
    told = run("pipeline.py", folder, tmp_path / "out", *size)
    assert re.search(r"^transformer +\d", told, re.MULTILINE)
    assert told.endswith(f"a video of (5, {pipes.SIZE}, {pipes.SIZE}, 3) by a CompiledModel\n")


def test_a_lora_moves_the_output_by_its_scale(run):
    whole, half, unloaded, merged = percents(run("lora.py"))
    assert 0.4 * whole < half < 0.6 * whole
    assert unloaded == 0.0
    assert 0.9 * whole < merged < 1.1 * whole


def test_the_backend_is_near_the_model(run):
    try:
        (error,) = percents(run("torch_compile.py"))
    finally:
        torch._dynamo.reset()
    assert 0.0 < error < 1.0


def test_a_graph_is_shown_before_and_after(run, tmp_path):
    told = run("inspect_graph.py", "page.html")
    assert "attn_kv_proj     reads text states" in told
    before, after = told.split("as it runs:")
    assert "= gelu(" in before
    assert "= gelu_quantize(" in after
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_pass_of_ones_own_does_what_it_says(run):
    told = run("own_pass.py")
    assert told.splitlines()[0].endswith(": 16 numbers stored")
    found = re.search(r"(\d+) -> (\d+) nodes, output moved by 0e\+00\n$", told)
    assert found
    assert int(found[1]) - int(found[2]) == 4  # arange, mul, div, exp


def test_every_example_is_run_here():
    here = Path(__file__).read_text(encoding="utf-8")
    assert [one.name for one in FOLDER.glob("*.py") if f'run("{one.name}"' not in here] == []
