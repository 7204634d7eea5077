"""`wancompile compile`, on tiny pipelines that diffusers has saved."""

from __future__ import annotations

import json
import os
import pipes
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, SIZE, call, save_pipeline, sentence, write_prompts
from test_resume import same

import wancompile
from wancompile import CompiledPipeline, Limits, Recipe
from wancompile.quant.stats import Stats


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline of two experts, compiled: `pipe`, `out`, `page*`, `calib*`."""
    folder = tmp_path_factory.mktemp("work")
    save_pipeline("t2v22", folder / "pipe")
    code, out, err = call(*_command(folder, "calib.st"), "--report", folder / "page.html")
    assert code == 0, err
    (folder / "printed").write_text(out, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(work: Path) -> CompiledPipeline:
    found = wancompile.load(work / "out")
    assert isinstance(found, CompiledPipeline)
    return found


def _command(work: Path, checkpoint: str, out: str = "out") -> tuple[object, ...]:
    """What compiles the pipeline; all runs of it see the same calls."""
    return (
        "compile", work / "pipe", "--prompts", work / "pipe" / "prompts.txt", *SHORT,
        "--checkpoint", work / checkpoint, "--out", work / out,
    )  # fmt: skip


@pytest.fixture
def pipe(work: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline that may be damaged."""
    shutil.copytree(work / "pipe", tmp_path / "pipe")
    return tmp_path / "pipe"


# What comes out --------------------------------------------------------------------------------


def test_a_pipeline_becomes_an_artifact_of_both_experts(work: Path, made: CompiledPipeline) -> None:
    assert list(made.experts) == ["transformer", "transformer_2"]
    assert made.boundary == 0.875
    first, second = (one for one in made.calibrated.values() if one is not None)
    # One prompt has two calls at the one step that an expert has; one call of four is held back.
    assert (first.calls, second.calls) == (3, 3)
    assert first.timesteps is not None
    assert second.timesteps is not None
    assert first.timesteps[0] >= 875 > second.timesteps[1]
    printed = (work / "printed").read_text(encoding="utf-8")
    assert printed.count("int8, weights ") == 2
    assert "error of the output" in printed


def test_its_pages_show_a_block_before_and_after(work: Path) -> None:
    for name in ("transformer", "transformer_2"):
        page = (work / f"page.{name}.html").read_text(encoding="utf-8")
        assert f"<h1>{name}</h1>" in page
        assert _drawn(page) == ["NORMAL", "LOWERED"]
        # 8-bit products are in the second picture and its listing alone.
        before, after = page.split("<figcaption>blocks.0 at LOWERED</figcaption>")
        assert "scaled_linear" not in before.partition("<figcaption>blocks.0 at NORMAL")[2]
        assert "scaled_linear" in after


def test_the_page_of_a_transformer_that_gave_up_its_weights(work: Path, tmp_path: Path) -> None:
    source, page = work / "pipe" / "transformer", tmp_path / "page.html"
    argv = ("compile", source, "--consume", "--limit", "off", "--report", page)
    code, _, err = call(*argv, "--out", tmp_path / "out", "--recipe", "fp8")
    assert code == 0, err
    assert _drawn(page.read_text(encoding="utf-8")) == ["NORMAL", "LOWERED"]


def _drawn(page: str) -> list[str]:
    """Return the levels at which a page shows the first block."""
    return re.findall(r"<figcaption>blocks\.0 at (\w+)</figcaption>", page)


def test_it_runs_in_the_pipeline_it_was_made_from(made: CompiledPipeline) -> None:
    pipe = pipes.make("t2v22")
    asked = pipes.arguments("t2v22")
    expected = pipes.run(pipe, asked)
    made.attach(pipe)
    actual = pipes.run(pipe, pipes.arguments("t2v22"))
    assert not torch.equal(actual, expected)
    assert (actual - expected).norm() < 0.05 * expected.norm()


def test_check_runs_the_pipeline_for_calls_of_its_own(work: Path, tmp_path: Path) -> None:
    words = write_prompts(tmp_path / "words", pipes.PROMPTS[2])
    argv = ("check", work / "out", "--against", work / "pipe", "--prompts", words)
    code, out, err = call(*argv, "--steps", "4", *SIZE)
    assert (code, err) == (0, "loading the pipeline\n")
    shapes = "hidden_states 1x16x2x4x4, timestep 1, encoder_hidden_states 1x512x40"
    for name in ("transformer", "transformer_2"):
        assert re.search(rf"forward: [24] calls of {name} in the pipeline, {shapes}: all", out)
    errors = re.findall(r"output +output of call \d +([\d.]+) %", out)
    assert [0.05 < float(one) < 5 for one in errors] == [True, True]


def test_a_transformer_alone_takes_statistics_of_a_calibration(work: Path, tmp_path: Path) -> None:
    source = work / "pipe" / "transformer_2"
    stats = work / "calib.transformer_2.st"
    code, _, err = call(
        "compile", source, "--stats", stats, "--recipe", "int8-attention", "--dtype", "float32",
        "--out", tmp_path / "out", "--size", "2x4x4",
    )  # fmt: skip
    assert code == 0, err
    report = wancompile.load(tmp_path / "out").report
    assert report.recipe.name == "int8-attention"
    assert all(group.smoothing is not None for group in report.groups)


def test_a_budget_needs_statistics(work: Path, tmp_path: Path) -> None:
    source = work / "pipe" / "transformer"
    code, _, err = call("compile", source, "--max-error", "0.1", "--out", tmp_path / "out")
    assert code == 1
    assert "a budget needs calibration data" in sentence(err)
    assert not list(tmp_path.iterdir())


# Without statistics, in bf16.
def test_beyond_the_limit_nothing_is_written(work: Path, tmp_path: Path) -> None:
    argv = ("compile", work / "pipe" / "transformer", "--recipe", "fp8", "--limit", "1e-9")
    code, out, err = call(*argv, "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "output of call 0" in err
    assert not list(tmp_path.iterdir())


class Asked(Exception):
    """Raised in the place of compiling, with what was asked for."""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), {"recipe": wancompile.recipe.resolve("int8"), "consume": False, "checkpoint": None}),
        (("--limit", "0.02", "--consume"), {"limits": Limits(output=0.02), "consume": True}),
        (("--limit", "off", "--device", "cpu"), {"limits": None, "device": "cpu"}),
        (
            ("--max-error", "0.01", "--max-ms", "900"),
            {"recipe": Recipe.auto(max_error=0.01, max_ms=900)},
        ),
    ],
)
def test_compile_hands_on_what_was_asked_for(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: tuple[str, ...],
    expected: dict[str, object],
) -> None:
    def stop(pipe: Any, data: object, **options: object) -> None:
        raise Asked(pipe, data, options)

    monkeypatch.setattr("wancompile.compile", stop)
    words = write_prompts(tmp_path / "words", " a dog ", "", "a cat")
    with pytest.raises(Asked) as caught:
        call("compile", work / "pipe", "--prompts", words, *SIZE, "--out", tmp_path / "out", *argv)
    pipe, data, options = caught.value.args
    assert type(pipe).__name__ == "WanPipeline"
    assert pipe.transformer.dtype is torch.bfloat16
    assert pipe.vae.dtype is torch.float32
    assert data[0] == {
        "prompt": "a dog", "num_inference_steps": 8, "num_frames": 5, "height": 32, "width": 32,
    }  # fmt: skip
    assert [one["prompt"] for one in data] == ["a dog", "a cat"]
    assert expected.items() <= options.items()


def test_an_image_goes_to_a_pipeline_that_takes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(pipe: object, data: object, **options: object) -> None:
        raise Asked(data)

    monkeypatch.setattr("wancompile.compile", stop)
    folder = save_pipeline("i2v", tmp_path / "pipe")
    pipes.picture(3).save(tmp_path / "first.png")
    argv = ("compile", folder, "--prompts", folder / "prompts.txt", "--out", tmp_path / "out")
    with pytest.raises(Asked) as caught:
        call(*argv, "--image", tmp_path / "first.png")
    (data,) = caught.value.args
    assert data[1]["image"].size == (pipes.SIZE, pipes.SIZE)
    code, _, err = call(*argv)
    assert code == 1
    assert sentence(err) == "a WanImageToVideoPipeline needs image besides prompts"


# What is refused -------------------------------------------------------------------------------


def _no_prompts(pipe: Path) -> None:
    (pipe / "prompts.txt").unlink()


def _blank_prompts(pipe: Path) -> None:
    (pipe / "prompts.txt").write_text("\n  \n", encoding="utf-8")


def _latin_prompts(pipe: Path) -> None:
    (pipe / "prompts.txt").write_bytes("a ball\nein Bär\n".encode("latin-1"))


def _no_index(pipe: Path) -> None:
    (pipe / "model_index.json").unlink()


def _no_second(pipe: Path) -> None:
    shutil.rmtree(pipe / "transformer_2")


def _no_weights(pipe: Path) -> None:
    (pipe / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()


def _cut_weights(pipe: Path) -> None:
    path = pipe / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _no_tokenizer(pipe: Path) -> None:
    (pipe / "tokenizer" / "tokenizer.json").unlink()


def _broken_index(pipe: Path) -> None:
    (pipe / "model_index.json").write_text('{"_class_name": ', encoding="utf-8")


def _foreign_index(pipe: Path) -> None:
    index = json.loads((pipe / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = "DiTPipelineOfTomorrow"
    (pipe / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def _our_folder(pipe: Path) -> None:
    (pipe.parent / "out").mkdir()
    (pipe.parent / "out" / "thesis.tex").touch()


def _out_is_a_file(pipe: Path) -> None:
    (pipe.parent / "out").touch()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_prompts, "prompts.txt cannot be read: No such file"),
        (_blank_prompts, "prompts.txt are empty: write one prompt a line"),
        (_latin_prompts, "prompts.txt are not UTF-8: see line 2"),
        (_no_index, "pipe is no diffusers folder: it has neither model_index.json"),
        (_no_second, "model_index.json names transformer_2, a WanTransformer3DModel, but there is"),
        (_no_weights, "diffusion_pytorch_model.safetensors cannot be read"),
        (_cut_weights, "diffusers cannot load"),
        (_no_tokenizer, "diffusers cannot load"),
        (_broken_index, "model_index.json cannot be read"),
        (_foreign_index, "a DiTPipelineOfTomorrow, which the installed diffusers lacks"),
        (_our_folder, "out holds thesis.tex, which is no part of an artifact"),
        (_out_is_a_file, "out is a file; an artifact is a folder"),
    ],
)
def test_bad_input_is_told_in_a_sentence(
    pipe: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(pipe)
    before = sorted(path.name for path in pipe.parent.iterdir())
    argv = ("compile", pipe, "--prompts", pipe / "prompts.txt", *SHORT)
    code, out, err = call(*argv, "--out", pipe.parent / "out")
    assert (code, out) == (1, "")
    assert message in sentence(err)
    assert sorted(path.name for path in pipe.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--recipe", "int9"), "no recipe 'int9'"),
        (("--device", "tpu9"), "cannot compute on the device 'tpu9'"),
        (("--max-error", "-1"), "max_error"),
        (("--image", "/nowhere.png"), "/nowhere.png cannot be read"),
        (("--image", __file__), "test_cli_compile.py is no picture"),
        (
            ("--height", "30"),
            "WanPipeline cannot be run: `height` and `width` have to be divisible",
        ),
        (("--checkpoint", "/nowhere/file"), "there is no folder /nowhere for the checkpoint"),
    ],
)
def test_bad_options_are_told_in_a_sentence(
    work: Path, tmp_path: Path, argv: tuple[str, ...], message: str
) -> None:
    prompts = work / "pipe" / "prompts.txt"
    command = ("compile", work / "pipe", "--prompts", prompts, *SHORT, "--out", tmp_path / "out")
    code, out, err = call(*command, *argv)
    assert (code, out) == (1, "")
    assert message in sentence(err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "argv", "message"),
    [
        ("", (), "a pipeline is calibrated on --prompts FILE"),
        ("", ("--prompts", "x", "--stats", "y"), "--stats does not go with the folder of a pipe"),
        ("transformer", ("--prompts", "x"), "--prompts does not go with the folder of a transf"),
        ("transformer", ("--recipe", "fp8", "--max-ms", "9"), "--recipe or a budget, not both"),
        ("transformer", ("--limit", "little"), "'little' is neither a positive number nor off"),
        ("transformer", ("--size", "1x2"), "'1x2' is not 480p, 720p or of the form FxHxW"),
        ("transformer", ("--dtype", "int4"), "invalid choice: 'int4'"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    work: Path, tmp_path: Path, part: str, argv: tuple[str, ...], message: str
) -> None:
    code, out, err = call("compile", work / "pipe" / part, "--out", tmp_path / "out", *argv)
    assert (code, out) == (2, "")
    assert message in err


def test_a_full_disk_leaves_nothing(
    work: Path, made: CompiledPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made.experts["transformer"]
    monkeypatch.setattr("wancompile.compile", lambda *args, **options: one)
    argv = ("compile", work / "pipe" / "transformer", "--out", tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code, out, err = call(*argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, out) == (1, "")
    assert "cannot be written: " in sentence(err)
    assert not list(tmp_path.iterdir())


# Ctrl-C ----------------------------------------------------------------------------------------

# A real signal to a real process, at a call that is always the same one.
_INTERRUPTED = """
import os, signal, sys
from wancompile.calibrate import Calibration
from wancompile.cli import main

observe, seen = Calibration.observe, 0

def interrupted(self, call, label=""):
    global seen
    seen += 1
    if seen == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return observe(self, call, label)

Calibration.observe = interrupted
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_in_calibration_loses_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = _command(work, "stopped.st", "resumed")
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, *map(str, argv)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert "interrupted: the same command goes on with" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (work / "resumed").exists()
    # The second expert had not been called by then.
    assert [path.name for path in work.glob("stopped*")] == ["stopped.transformer.st"]
    assert Stats.load(work / "stopped.transformer.st").calls == 1

    def stop(model: object, prepared: object, options: object) -> None:
        raise Asked

    # What follows calibration depends on the statistics alone.
    monkeypatch.setattr("wancompile.experts.make.build", stop)
    with pytest.raises(Asked):
        call(*argv)
    for name in ("transformer", "transformer_2"):
        whole, resumed = (Stats.load(work / f"{one}.{name}.st") for one in ("calib", "stopped"))
        assert same(whole, resumed)
