"""`wancompile check`, `inspect` and `bench` on what the library has saved."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from artifacts import compiled, rewrite
from commands import call, sentence

import wancompile
from wancompile.artifact import document
from wancompile.cli import bench, calls
from wancompile.compiled import CompiledModel
from wancompile.experts.compiled import CompiledPipeline

WEIGHTS = "weights-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact `one`, its original `original`, and artifacts of two experts."""
    folder = tmp_path_factory.mktemp("work")
    model, _ = zoo.make("t2v", 1)
    model.save_pretrained(folder / "original")  # type: ignore[operator]
    one = compiled("t2v", "int8")
    one.save(folder / "one")
    experts = {"transformer": one, "transformer_2": one}
    CompiledPipeline(experts, dict.fromkeys(experts), 0.9).save(folder / "two")
    return folder


@pytest.fixture
def damaged(work: Path, tmp_path: Path) -> Path:
    """A copy of the artifact of two experts that may be damaged."""
    return Path(shutil.copytree(work / "two", tmp_path / "two"))


# check -----------------------------------------------------------------------------------------


def test_check_of_a_sound_model_passes(work: Path) -> None:
    code, out, err = call("check", work / "one")
    assert (code, err) == (0, "")
    assert re.search(r"ok      files: 2 files, \d+ kB, every byte as written", out)
    assert re.search(r"ok      weights: \d\d tensors, all numbers finite", out)
    assert "ok      when compiled: checked on 1 call" in out
    assert "ok      forward: 2 calls of random numbers, hidden_states 2x16x5x8x12," in out
    assert out.endswith("all is well\n")


def test_check_against_the_original_has_the_figures_of_the_gate(work: Path) -> None:
    code, out, _ = call("check", work / "one", "--against", work / "original", "--size", "2x4x6")
    assert code == 0
    found = re.search(r"output +output of call \d +([\d.]+) % +[\d.]+ dB", out)
    assert found is not None
    assert 0.05 < float(found[1]) < 2
    assert "blocks.0" in out
    assert "hidden_states 2x16x2x4x6" in out


def test_check_against_other_weights_fails(work: Path, tmp_path: Path) -> None:
    zoo.make("t2v", 1, seed=1)[0].save_pretrained(tmp_path / "other")  # type: ignore[operator]
    code, out, _ = call("check", work / "one", "--against", tmp_path / "other")
    assert code == 1
    assert f"FAILED  against {tmp_path / 'other'}: too far from it" in out
    assert "beyond its limit: output of call 0" in out
    assert out.endswith("1 check failed\n")


def test_check_notices_numbers_that_are_none(work: Path, tmp_path: Path) -> None:
    model = wancompile.load(work / "one")
    assert isinstance(model, CompiledModel)
    state = model._fused.state
    place = next(key for key in state if key.endswith("weight_scale"))
    state[place] = torch.full_like(state[place], torch.nan)
    model.save(tmp_path / "nan")
    code, out, _ = call("check", tmp_path / "nan")
    assert code == 1
    assert f"FAILED  weights: 1 tensor with NaN or infinity, the first is {place}" in out
    assert re.search(r"FAILED  forward: 2 calls .*: [\d,]+ NaN or infinite values in ", out)


def test_check_looks_at_every_expert(work: Path) -> None:
    code, out, _ = call("check", work / "two")
    assert code == 0
    assert out.count("ok      weights") == 2
    assert "\ntransformer_2: int8, 7 groups of linears" in out


def _cut(two: Path) -> None:
    path = two / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])


def _flip(two: Path) -> None:
    path = two / "transformer_2" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def _no_expert(two: Path) -> None:
    shutil.rmtree(two / "transformer_2")


def _other_expert(two: Path) -> None:
    rewrite(two / "transformer", lambda data: data["made_by"].update(torch="0"))


def _no_document(two: Path) -> None:
    (two / document.FILE).unlink()


def _foreign(two: Path) -> None:
    (two / document.FILE).write_text('{"format": "pickle"}', encoding="utf-8")


def _newer(two: Path) -> None:
    text = (two / document.FILE).read_text(encoding="utf-8")
    newer = text.replace(f'"version": {document.VERSION}', '"version": 99')
    (two / document.FILE).write_text(newer, encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "bytes where"),
        (_flip, "SHA-256"),
        (_no_expert, "transformer_2 is missing"),
        (_other_expert, "of another expert"),
        (_no_document, "holds no artifact"),
        (_foreign, "is no artifact of wancompile"),
        (_newer, "has format 99, newer than"),
    ],
)
def test_check_tells_damage_in_a_sentence(
    damaged: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(damaged)
    code, out, err = call("check", damaged)
    assert (code, out) == (1, "")
    assert message in sentence(err)


@pytest.mark.parametrize("command", ["check", "bench"])
@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("--device", "tpu9"), 1, "tpu9"),
        (("--against", "/nowhere"), 1, "there is no folder /nowhere with the original"),
        (("--size", "0x1x1"), 2, "'0x1x1' is not 480p, 720p or of the form FxHxW"),
    ],
)
def test_bad_options(
    work: Path, command: str, argv: tuple[str, ...], code: int, message: str
) -> None:
    found, _, err = call(command, work / "one", *argv)
    assert found == code
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("--prompts", "x"), 2, "--prompts are for the pipeline that --against names"),
        (("--steps", "3"), 2, "--steps goes with --prompts"),
        (("--against", "x", "--prompts", "y", "--size", "480p"), 2, "with --prompts the size is"),
        (
            ("--against", "ORIGINAL", "--prompts", "nowhere"),
            1,
            "the prompts nowhere cannot be read",
        ),
        (("--against", "ORIGINAL", "--prompts", __file__), 1, "--prompts need a whole pipeline"),
    ],
)
def test_prompts_need_a_pipeline(
    work: Path, argv: tuple[str, ...], code: int, message: str
) -> None:
    given = [str(work / "original") if word == "ORIGINAL" else word for word in argv]
    found, _, err = call("check", work / "one", *given)
    assert found == code
    assert message in err
    assert "Traceback" not in err


def test_an_original_of_another_shape_is_refused(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "original", tmp_path / "original")
    path = tmp_path / "original" / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "eps": 0.5}
    path.write_text(json.dumps(config), encoding="utf-8")
    code, _, err = call("check", work / "one", "--against", tmp_path / "original")
    assert code == 1
    assert sentence(err).endswith("is another model than the artifact: its eps is 0.5, not 1e-06")


# inspect ---------------------------------------------------------------------------------------


def test_inspect_tells_what_was_saved(work: Path) -> None:
    code, out, _ = call("inspect", work / "two")
    assert code == 0
    for name in ("transformer", "transformer_2"):
        assert re.search(rf"^{name}: \d+ kB in 2 files, made by wancompile ", out, re.MULTILINE)
    assert out.count("called with hidden_states[*x16x*x*x*], timestep[*]") == 2
    assert "attn_qkv_proj" in out
    assert "recipe int8" in out


def test_inspect_prints_the_graph(work: Path) -> None:
    code, out, _ = call("inspect", work / "one", "--site", "blocks.0.ffn")
    assert code == 0
    assert "= scaled_linear(" in out
    whole = call("inspect", work / "one", "--to", "lowered")[1]
    assert len(whole.splitlines()) > len(out.splitlines()) > 1


def test_inspect_writes_a_page_for_each_expert(work: Path, tmp_path: Path) -> None:
    code, out, err = call("inspect", work / "two", "--html", tmp_path / "page.html")
    assert (code, out) == (0, "")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["page.transformer.html", "page.transformer_2.html"]
    assert all(str(tmp_path / name) in err for name in names)
    text = (tmp_path / names[1]).read_text(encoding="utf-8")
    assert 'id="errors"' in text
    assert re.findall(r"<figcaption>blocks\.0 at (\w+)<", text) == ["LOWERED"]
    assert "Measured op by op" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--tiny",), "--tiny does not go with a saved model"),
        (("--from", "NORMAL"), "--from does not go with a saved model"),
        (("--recipe", "fp8"), "--recipe does not go with a saved model"),
        (("--to", "FUSED"), "a saved model is at level LOWERED, not FUSED"),
    ],
)
def test_a_saved_model_is_made_already(work: Path, argv: tuple[str, ...], message: str) -> None:
    code, out, err = call("inspect", work / "one", *argv)
    assert (code, out) == (2, "")
    assert message in err


# bench -----------------------------------------------------------------------------------------


def test_bench_measures_both_on_the_same_call(work: Path, tmp_path: Path) -> None:
    argv = ("bench", work / "one", "--against", work / "original", "--runs", "3")
    page = tmp_path / "page.html"
    code, out, err = call(*argv, "--size", "1x4x4", "--json", "--report", page)
    assert code == 0
    assert re.search(r"Measured op by op on CPU .*, the median of 3 runs", page.read_text())
    assert "blocks.0 at NORMAL" in page.read_text()
    ((name, (saved, original)),) = json.loads(out).items()
    assert name == "one"
    assert (saved["name"], original["name"]) == ("int8", "original, float32")
    for one in (saved, original):
        assert len(one["forwards"]) == 3
        assert 0 < min(one["forwards"]) <= one["first_output"]
    assert saved["peak"] > 50e6
    assert original["peak"] is None
    files = [*(work / "one").iterdir()]
    assert saved["disk"] == sum(path.stat().st_size for path in files)
    assert "hidden_states 2x16x1x4x4, timestep 2, " in err


def test_bench_prints_ratios() -> None:
    saved = bench.Figures("int8", 4.0, (0.2, 0.1, 0.3), 10**9, 2 * 10**9)
    original = bench.Figures("original, bfloat16", 2.0, (0.5, 0.4, 0.4), 3 * 10**9, 5 * 10**9)
    header, _, first, second, ratios = bench.as_text("one", [saved, original]).splitlines()
    assert header.split()[:2] == ["one", "forward"]
    assert _words(first) == "int8 200 ms 100 ms - 300 ms 4.0 s 1.00 GB 2.00 GB"
    assert second.startswith("original, bfloat16  400 ms")
    assert _words(ratios) == "faster, smaller 2.00 x 0.50 x 3.00 x 2.50 x"
    assert max(map(len, (header, first, second, ratios))) < 100
    unknown = dataclasses.replace(original, peak=None)
    last = bench.as_text("one", [saved, unknown]).splitlines()[-1]
    assert _words(last) == "faster, smaller 2.00 x 0.50 x - 2.50 x"


def _words(row: str) -> str:
    return " ".join(row.split())


def test_bench_takes_experts_in_turn(work: Path) -> None:
    code, out, _ = call("bench", work / "two", "--runs", "1", "--size", "1x2x2", "--json")
    assert code == 0
    assert list(json.loads(out)) == ["transformer", "transformer_2"]


# Calls -----------------------------------------------------------------------------------------


def test_a_timestep_for_each_token_follows_the_size() -> None:
    model = compiled("ti2v", "fp8")
    call = calls.random_call(model, 0, (3, 6, 4))
    assert call["hidden_states"].shape == (2, 48, 3, 6, 4)
    assert call["timestep"].shape == (2, 3 * 3 * 2)
    assert call["timestep"].unique().numel() == 1
    assert model(**call).sample.shape == (2, 48, 3, 6, 4)
    usual = calls.random_call(model, 1)
    assert usual["timestep"].shape == (2, 5 * 4 * 6)
    assert torch.equal(usual["hidden_states"], calls.random_call(model, 1)["hidden_states"])
    assert not torch.equal(usual["timestep"][0], calls.random_call(model, 2)["timestep"][0])


@pytest.mark.parametrize(
    ("asked", "channels", "latents"),
    [
        ("480p", 16, (21, 60, 104)),
        ("720p", 36, (21, 90, 160)),
        ("480p", 48, (31, 30, 52)),
        ("720p", 48, (31, 44, 80)),
        ((1, 2, 3), 16, (1, 2, 3)),
    ],
)
def test_sizes_by_name(asked: calls.Size, channels: int, latents: tuple[int, ...]) -> None:
    assert calls.latents(asked, channels) == latents
