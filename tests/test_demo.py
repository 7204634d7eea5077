from __future__ import annotations

import io
import tomllib
from dataclasses import replace
from glob import glob
from pathlib import Path

import pytest
import torch
from PIL import Image

import wancompile
from wancompile import demo
from wancompile.demo import checkpoints, show
from wancompile.demo.animation import difference, side_by_side
from wancompile.demo.conditions import TEXT_TOKENS, image_states, prompt, text_states
from wancompile.demo.sampler import Request, calls, sample


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[demo.Result, str]:
    """The demonstration, calibrated on two steps of one video in the place of eight of three."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "_CALIBRATION_STEPS", 2)
        patch.setattr(show, "_CALIBRATION_VIDEOS", 1)
        out = tmp_path_factory.mktemp("demo")
        result = demo.run(out, digit=3, steps=2, echo=said.append, progress=False)
    return result, "\n".join(said)


def test_the_compiled_videos_are_near_the_original_and_not_the_same(shown) -> None:
    compared = shown[0].compared
    assert list(compared) == ["fp8", "int8"]
    assert 25 < compared["fp8"].psnr < compared["int8"].psnr < 70
    assert all(0.9 < one.ssim < 1 for one in compared.values())


def test_every_group_is_smoothed_and_no_error_grows(shown) -> None:
    report = shown[0].compared["int8"].report
    assert all(group.smoothing is not None for group in report.groups)
    assert all(role.error_smoothed <= role.error_plain for role in report.roles)


def test_what_is_printed_names_roles_and_videos(shown) -> None:
    text = shown[1]
    for word in ("attn_qkv_proj", "norm modulation", "PSNR", "fp8", "int8", "a handwritten three"):
        assert word in text


def test_the_folder_has_pages_and_an_animation(shown) -> None:
    files = {path.name: path for path in shown[0].files}
    assert files.keys() == {"report.html", "report-fp8.html", "side-by-side.gif"}
    for name in ("report.html", "report-fp8.html"):
        page = files[name].read_text(encoding="utf-8")
        assert "data:image/gif;base64," in page
        assert "scaled_linear" in page
    with Image.open(files["side-by-side.gif"]) as image:
        assert image.n_frames == shown[0].original.shape[2]


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_the_shipped_models_are_wan_and_small(name: checkpoints.Name) -> None:
    model = checkpoints.load(name)
    assert type(model).__name__ == "WanTransformer3DModel"
    assert sum(one.numel() for one in model.parameters()) <= 8e6
    assert model.config.attention_head_dim in (64, 128)
    assert (model.config.added_kv_proj_dim is not None) == (name == "i2v")


def test_the_shipped_files_are_small_enough() -> None:
    folder = Path(wancompile.demo.__path__[0]) / "weights"
    assert sum(one.stat().st_size for one in folder.rglob("*.safetensors")) <= 32e6


def test_a_wheel_holds_every_file_of_the_weights() -> None:
    folder = Path(wancompile.demo.__path__[0])
    project = tomllib.loads((folder.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["wancompile.demo"]
    packed = {
        path
        for pattern in patterns
        for path in map(Path, glob(pattern, root_dir=folder, recursive=True))
    }
    assert {one.relative_to(folder) for one in (folder / "weights").rglob("*.*")} <= packed


def test_text_states_are_padded_with_zeros() -> None:
    states = text_states([prompt(4), "", "four"])
    assert states.shape[1] == TEXT_TOKENS
    lengths = (states.abs().amax(-1) > 0).sum(1)
    assert lengths.tolist() == [8, 1, 2]  # seven words and the end mark
    with pytest.raises(KeyError):
        text_states(["a horse"])


def test_image_states_tell_where_a_patch_is() -> None:
    frame = torch.zeros(1, 1, 24, 24)
    frame[0, 0, 8:12, 4:8] = 1
    states = image_states(frame)
    lit = states[0, :, :16].amax(-1).nonzero().flatten()
    assert lit.tolist() == [2 * 6 + 1]
    assert len(states[0].unique(dim=0)) == 36


def test_a_video_does_not_depend_on_what_else_is_asked_for() -> None:
    one = Request(("three",), seed=6).noise()
    several = Request(("one", "two", "three"), seed=4).noise()
    assert torch.equal(one[0], several[2])


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_the_calls_of_sampling_are_those_of_the_model(name: checkpoints.Name) -> None:
    model = checkpoints.load(name)
    frames = checkpoints.first_frame(5) if name == "i2v" else None
    request = Request((prompt(5),), frames, steps=2)
    seen = calls(model, [request])
    assert len(seen) == 4
    assert ("encoder_hidden_states_image" in seen[0]) == (name == "i2v")
    assert not model._forward_pre_hooks
    video = sample(model, replace(request, steps=1))
    assert video.shape == (1, 1, 9, 24, 24)


def test_the_animation_shows_every_panel() -> None:
    video = torch.rand(3, 24, 24) * 2 - 1
    data = side_by_side({"a": video, "b": difference(video, video, 10)})
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
        panel = image.convert("L").crop((216 + 12, 40, 400, 200))
        assert panel.getextrema()[1] < 10
