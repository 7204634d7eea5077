from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import wancompile
from wancompile import passes, presets
from wancompile.cli import main
from wancompile.recipe import QSpec, Recipe, Rule

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--layers", "1", "--resolution", "2x8x8")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line; return its exit code, stdout and stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in argv])
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# The command itself --------------------------------------------------------------------------


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"wancompile {wancompile.__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    assert "plan" in out
    assert "inspect" in out


@pytest.mark.parametrize(
    "argv",
    [(), ("plan",), ("inspect",), ("demo",), ("compile",), ("check",), ("bench",)],
)
def test_help_fits_a_terminal(
    run: Run, argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(*argv, "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) < 80


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wancompile.cli", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("wancompile ")


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("compile",),
        ("plan",),
        ("plan", "t2v-1.3b", "--resolution", "60x104"),
        ("plan", "t2v-1.3b", "--resolution", "0x60x104"),
        ("inspect", "t2v-1.3b", "--to", "OPTIMIZED"),
        ("inspect", "t2v-1.3b", "--layers", "0"),
        ("demo", "--digit", "10"),
        ("inspect", "t2v-1.3b", "--from", "NORMAL", "--to", "EXPORTED"),
        ("inspect", "t2v-1.3b", "--tiny", "--to", "LOWERED", "--recipe", "int8-attention"),
    ],
)
def test_a_wrong_command_line_exits_with_2(run: Run, argv: tuple[str, ...]) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert "usage: wancompile" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("plan", "t2v-9b"), "t2v-9b"),
        (("plan", "t2v-1.3b", "--recipe", "int9"), "no recipe 'int9'"),
        (("plan", "t2v-1.3b", "--recipe", "/nowhere/recipe.json"), "cannot be read"),
        (("inspect", "t2v-1.3b", "--to", "QUANTIZED"), "add --tiny"),
        (
            ("inspect", "t2v-1.3b", *SMALL, "--site", "heads.*"),
            "nothing in the graph",
        ),
    ],
)
def test_an_error_is_one_message_and_exits_with_1(
    run: Run, argv: tuple[str, ...], message: str
) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (1, "")
    assert err.count("wancompile: ") == 1
    assert message in err
    assert "Traceback" not in err


# plan ----------------------------------------------------------------------------------------


def test_plan_prints_what_matters(run: Run) -> None:
    code, out, _ = run("plan", "t2v-1.3b", "--recipe", "int8-attention", *SMALL)
    assert code == 0
    for text in ("t2v-1.3b: ", "attn_qkv_proj", "all blocks share the text states", "proj_out",
                 "self-attention", "planned in", "peak memory"):  # fmt: skip
        assert text in out
    assert "32 video tokens" in out


@pytest.mark.parametrize(("columns", "reads"), [(80, False), (100, True), (200, True)])
def test_plan_fits_the_terminal(
    run: Run, columns: int, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run("plan", "i2v-14b", *SMALL)
    assert max(map(len, out.splitlines())) <= min(columns, 100)
    assert ("modulated norm" in out) is reads
    assert out.count("attn_add_kv_proj") == 3  # its size, why it does not fold, its work


def test_plan_as_json_holds_the_plan(run: Run) -> None:
    code, out, _ = run("plan", "t2v-1.3b", *SMALL, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["facts"]["tokens"] == 2 * 4 * 4
    assert found["flops"] == sum(one["flops"] for one in found["work"])
    assert found["bytes_after"] < 0.8 * found["bytes_before"]
    assert {one["dtype"] for one in found["groups"]} == {"int8"}


def test_plan_takes_a_recipe_from_a_file(run: Run, tmp_path: Path) -> None:
    recipe = Recipe("mine", QSpec("fp8"), (Rule("*.ffn.*", None),))
    path = tmp_path / "recipe.json"
    path.write_text(recipe.to_json(), encoding="utf-8")
    _, out, _ = run("plan", "t2v-1.3b", *SMALL, "--recipe", path, "--json")
    dtypes = {one["role"]: one["dtype"] for one in json.loads(out)["groups"]}
    assert dtypes["attn_qkv_proj"] == "fp8"
    assert dtypes["ffn_up_proj"] is None


def test_planning_the_largest_model_is_quick_and_small() -> None:
    # In its own process: the peak of this one says nothing about planning.
    done = subprocess.run(
        [sys.executable, "-m", "wancompile.cli", "plan", "i2v-14b", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["seconds"] < 60
    assert found["peak_bytes"] is None or found["peak_bytes"] < 2 * 2**30
    assert found["facts"]["parameters"] > 16e9


# inspect -------------------------------------------------------------------------------------


def test_inspect_prints_a_level_without_weights(run: Run) -> None:
    code, out, _ = run("inspect", "t2v-1.3b", "--layers", "1", "--site", "blocks.0.attn1")
    assert code == 0
    assert "%blocks.0.attn1:attention: bf16[" in out
    assert "%blocks.0.attn2" not in out.partition(":")[0]


def test_inspect_prints_what_a_level_changes(run: Run) -> None:
    code, out, _ = run("inspect", "t2v-1.3b", *SMALL, "--diff")
    assert code == 0
    assert out.startswith("--- EXPORTED\n+++ NORMAL\n")


def test_inspect_quantizes_a_tiny_model(run: Run) -> None:
    code, out, _ = run(
        "inspect", "t2v-1.3b", "--tiny", "--layers", "1", "--to", "lowered", "--from", "normal",
        "--recipe", "int8-attention", "--calibrate", "1", "--site", "blocks.0.attn1",
    )  # fmt: skip
    assert code == 0
    assert "scaled_linear(" in out
    assert "scaled_attention(" in out


def test_inspect_says_when_nothing_differs(run: Run) -> None:
    # No kernel runs on a CPU, so lowering changes nothing there.
    argv = ("inspect", "t2v-1.3b", "--tiny", "--layers", "1", "--to", "LOWERED", "--diff")
    assert run(*argv)[:2] == (0, "nothing differs\n")


def test_inspect_writes_a_page_and_a_dump(run: Run, tmp_path: Path) -> None:
    page, folder = tmp_path / "page.html", tmp_path / "dump"
    code, out, err = run(
        "inspect", "t2v-1.3b", "--tiny", "--layers", "1", "--to", "QUANTIZED", "--calibrate", "1",
        "--html", page, "--dump", folder,
    )  # fmt: skip
    assert (code, out) == (0, "")
    assert str(page) in err
    text = page.read_text(encoding="utf-8")
    assert 'id="errors"' in text
    assert 'id="sites"' in text
    after = len(passes.NORMALIZE) + 1
    assert {"00_start.txt", f"{after}_smooth.diff"} <= {path.name for path in folder.iterdir()}


def test_a_page_of_a_lowered_model_compares_it_with_the_float_one(run: Run, tmp_path: Path) -> None:
    # Lowering changes nothing on a CPU, so the level just before would show nothing.
    page = tmp_path / "page.html"
    argv = ("inspect", "t2v-1.3b", "--tiny", "--layers", "1", "--to", "LOWERED", "--html", page)
    assert run(*argv)[0] == 0
    text = page.read_text(encoding="utf-8")
    assert "<b>NORMAL</b><b>LOWERED</b>" in text
    assert '<mark><span class="op">scaled_linear</span></mark>' in text
    share = re.search(r"<dt>weights</dt>.*?([\d.]+) %", text)
    assert share is not None
    assert 50 < float(share[1]) < 90
    # Weights are at hand, so the exact passes were checked.
    assert re.search(r"\de-\d\d</span>|not at all", text)


# demo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ((), {"model": "t2v"}),
        (
            ("--steps", "4", "--digit", "7", "--model", "i2v"),
            {"steps": 4, "digit": 7, "model": "i2v"},
        ),
        (("--seed", "0"), {"seed": 0, "model": "t2v"}),
    ],
)
def test_demo_hands_on_what_was_asked_for(
    run: Run,
    argv: tuple[str, ...],
    options: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Path, dict[str, object]]] = []
    monkeypatch.setattr("wancompile.demo.run", lambda out, **given: calls.append((out, given)))
    assert run("demo", "--out", tmp_path, *argv)[0] == 0
    assert calls == [(tmp_path, options)]


# A folder of a model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    preset = presets.tiny(presets.find("t2v-1.3b"))
    presets.build(preset, device="cpu", dtype=torch.float32).save_pretrained(path)  # type: ignore[operator]
    return path


def test_plan_reads_only_the_configuration_of_a_folder(run: Run, folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    code, out, _ = run("plan", folder, "--json", "--resolution", "2x8x8")
    assert code == 0
    assert json.loads(out)["facts"]["self_attentions"] == 2
    assert {path.name for path in folder.iterdir()} == before


def test_inspect_quantizes_the_weights_of_a_folder(run: Run, folder: Path) -> None:
    code, out, err = run("inspect", folder, "--to", "QUANTIZED", "--site", "blocks.1.ffn")
    assert code == 0, err
    assert "= scaled_linear(" in out


def test_a_folder_without_a_model_is_an_error(run: Run, tmp_path: Path) -> None:
    code, _, err = run("plan", tmp_path)
    assert code == 1
    assert "config.json" in err
