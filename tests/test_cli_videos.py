"""Videos on the command line: pipelines that need some besides prompts."""

from __future__ import annotations

import pipes
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from commands import SIZE, call, save_pipeline, sentence
from PIL import Image
from test_cli_compile import Asked

from wancompile.cli import artifact, play, source

COUNT = 5


def animation(path: Path, seed: int, size: int = pipes.SIZE) -> Path:
    first, *rest = pipes.frames(COUNT, seed, size)
    first.save(path, save_all=True, append_images=rest, lossless=True)
    return path


def folder(path: Path, seed: int) -> Path:
    """A folder of frames whose numbers gain a digit on the way, and of a file that is hidden."""
    path.mkdir()
    for index, frame in enumerate(pipes.frames(COUNT, seed), start=8):
        frame.save(path / f"{index}.png")
    (path / ".listing").touch()
    return path


def same(found: list[Image.Image], seed: int, size: int = pipes.SIZE) -> bool:
    expected = pipes.frames(COUNT, seed, size)
    return [one.tobytes() for one in found] == [one.tobytes() for one in expected]


def test_frames_are_those_of_a_folder_or_of_an_animation(tmp_path: Path) -> None:
    assert same(source.read_video(animation(tmp_path / "a.webp", 3)), 3)
    assert same(source.read_video(folder(tmp_path / "frames", 4)), 4)


def asked(monkeypatch: pytest.MonkeyPatch, *argv: object) -> tuple[Any, list[dict[str, Any]]]:
    """Return the pipeline and the data that the command line compiles."""

    def stop(pipe: object, data: object, **options: object) -> None:
        raise Asked(pipe, data)

    monkeypatch.setattr("wancompile.compile", stop)
    with pytest.raises(Asked) as caught:
        call("compile", *argv, "--dtype", "float32")
    pipe, data = caught.value.args
    return pipe, data


def test_video_to_video_starts_from_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save_pipeline("v2v", tmp_path / "pipe")
    argv = (saved, "--prompts", saved / "prompts.txt", "--out", tmp_path / "out", *SIZE[2:])
    code, _, err = call("compile", *argv)
    assert code == 1
    assert sentence(err) == "a WanVideoToVideoPipeline needs video besides prompts"

    frames = folder(tmp_path / "frames", 6)
    pipe, data = asked(monkeypatch, *argv, "--video", frames, "--steps", "3")
    assert [same(one["video"], 6) for one in data] == [True, True]
    # diffusers' strength of 0.8 leaves two of three steps, of two calls each.
    calls = play.calls_of(pipe, data[:1], 9)["transformer"]
    assert [tuple(one["hidden_states"].shape) for one in calls] == [(1, 16, 2, 4, 4)] * 4


def test_animate_takes_poses_and_faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_pipeline("animate", tmp_path / "pipe")
    pipes.picture(1).save(tmp_path / "image.png")
    poses = folder(tmp_path / "poses", 2)
    faces = animation(tmp_path / "faces.webp", 3, size=16)
    argv = (saved, "--prompts", saved / "prompts.txt", "--out", tmp_path / "out", *SIZE)
    given = ("--image", tmp_path / "image.png", "--pose-video", poses)
    code, _, err = call("compile", *argv, *given)
    assert code == 1
    assert sentence(err) == "a WanAnimatePipeline needs face_video besides prompts"

    pipe, data = asked(monkeypatch, *argv, *given, "--face-video", faces, "--steps", "1")
    assert same(data[1]["pose_video"], 2)
    assert same(data[1]["face_video"], 3, size=16)
    assert data[1]["segment_frame_length"] == COUNT
    (one,) = play.calls_of(pipe, data[:1], 9)["transformer"]
    assert one["pose_hidden_states"].shape == (1, 16, 2, 4, 4)
    # All faces are encoded at once: a graph has no loop over pieces of them.
    assert one["face_pixel_values"].shape[2] == COUNT <= one["motion_encode_batch_size"]


def test_animate_is_captured_in_one_piece_where_it_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capturing it takes half a minute, and is what `test_variants` does."""

    def stop(model: object, inputs: object) -> None:
        raise Asked(model, inputs)

    monkeypatch.setattr("wancompile.trace", stop)
    model, _ = zoo.make("animate", 1)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    made = artifact.Made(dict(model.config), torch.float32)  # type: ignore[call-overload]
    with pytest.raises(Asked) as caught:
        artifact.original_program(tmp_path, made)
    drawn, inputs = caught.value.args
    assert all(one.is_meta for one in drawn.parameters())
    assert inputs["face_pixel_values"].shape[2] <= inputs["motion_encode_batch_size"]


@pytest.fixture(scope="module")
def v2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("v2v", tmp_path_factory.mktemp("saved") / "pipe")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere cannot be read: No such file"),
        ("empty", "empty holds no frames"),
        ("mixed", "words.txt is no picture that can be read"),
        ("words.txt", "words.txt is no animation that can be read, nor a folder"),
        ("cut.webp", "cut.webp"),
    ],
)
def test_bad_videos_are_told_in_a_sentence(
    v2v: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "mixed", 1)
    for path in (tmp_path / "words.txt", tmp_path / "mixed" / "words.txt"):
        path.write_text("a ball", encoding="utf-8")
    whole = animation(tmp_path / "whole.webp", 1).read_bytes()
    (tmp_path / "cut.webp").write_bytes(whole[: len(whole) // 2])
    argv = ("compile", v2v, "--prompts", v2v / "prompts.txt", "--out", tmp_path / "out")
    code, out, err = call(*argv, "--video", tmp_path / name)
    assert (code, out) == (1, "")
    assert message in sentence(err)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_without_a_place_for_a_video_refuses_it(tmp_path: Path) -> None:
    saved = save_pipeline("i2v", tmp_path / "pipe")
    frames = folder(tmp_path / "frames", 6)
    argv = ("compile", saved, "--prompts", saved / "prompts.txt", "--out", tmp_path / "out")
    code, _, err = call(*argv, "--video", frames)
    assert code == 1
    assert sentence(err) == "a WanImageToVideoPipeline takes no video"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("compile", "TRANSFORMER"), "--pose-video does not go with the folder of a transformer"),
        (("check", "anything"), "--pose-video goes with --prompts"),
    ],
)
def test_videos_go_with_prompts(
    v2v: Path, tmp_path: Path, command: tuple[str, ...], message: str
) -> None:
    words = [v2v / "transformer" if word == "TRANSFORMER" else word for word in command]
    out = ("--out", tmp_path / "out") if command[0] == "compile" else ()
    code, _, err = call(*words, "--pose-video", "x", *out)
    assert code == 2
    assert message in err
