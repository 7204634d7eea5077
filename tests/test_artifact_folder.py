"""An artifact appears whole or not at all, whatever stops the saving."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import calls, compiled, contents, output

import wancompile
from wancompile.artifact import document
from wancompile.compiled import CompiledModel
from wancompile.errors import ArtifactError


@pytest.fixture
def model() -> CompiledModel:
    return compiled("t2v", "int8")


@pytest.fixture
def older(tmp_path) -> tuple[Path, dict[str, bytes]]:
    """An older artifact in the place where the new one shall be, and its bytes."""
    place = tmp_path / "here" / "model"
    compiled("t2v", "fp8").save(place)
    return place, contents(place)


def assert_untouched(older: tuple[Path, dict[str, bytes]]) -> None:
    place, before = older
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert contents(place) == before
    assert wancompile.load(place).report.recipe.name == "fp8"


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Let the system refuse to write files beyond `limit` bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_writes_that_fail_leave_the_older_one(model, older, limit):
    with largest_file(limit), pytest.raises(ArtifactError, match=r"be written: .*too large"):
        model.save(older[0])
    assert_untouched(older)


def test_writes_that_fail_leave_nothing(model, tmp_path):
    with largest_file(1000), pytest.raises(ArtifactError, match="cannot be written"):
        model.save(tmp_path / "new")
    assert not list(tmp_path.iterdir())


# Stopped at each step --------------------------------------------------------------------------


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


class Stopping:
    """Stands for a function of `os`, and stops at its n-th call, before or after it is done."""

    def __init__(self, name: str, at: int, stop: Callable[[], None], after: bool = False) -> None:
        self._function = getattr(os, name)
        self._left = at
        self._stop = stop
        self._after = after

    def __call__(self, *args: Any) -> Any:
        self._left -= 1
        if self._left == 0 and not self._after:
            self._stop()
        result = self._function(*args)
        if self._left == 0 and self._after:
            self._stop()
        return result


STEPS = [
    # Weights, document, folder; then the older one away, and the new one to its place.
    *(("fsync", number, after) for number in (1, 2, 3) for after in (False, True)),
    *(("rename", number, False) for number in (1, 2)),
    ("rename", 1, True),
]


@pytest.mark.parametrize("stop", [full_disk, ctrl_c])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_whatever_stops_it_the_older_one_stays(model, older, monkeypatch, step, stop):
    name, at, after = step
    monkeypatch.setattr(os, name, Stopping(name, at, stop, after))
    expected = KeyboardInterrupt if stop is ctrl_c else ArtifactError
    with pytest.raises(expected, match=None if stop is ctrl_c else "No space"):
        model.save(older[0])
    monkeypatch.undo()
    assert_untouched(older)


@pytest.mark.parametrize("stop", [full_disk, ctrl_c])
def test_once_in_place_the_new_one_stays(model, older, monkeypatch, stop):
    monkeypatch.setattr(os, "rename", Stopping("rename", 2, stop, after=True))
    with pytest.raises((ArtifactError, KeyboardInterrupt)):
        model.save(older[0])
    monkeypatch.undo()
    assert [path.name for path in older[0].parent.iterdir()] == [older[0].name]
    assert wancompile.load(older[0]).report.recipe.name == "int8"


def test_everything_is_forced_to_disk_before_it_is_in_place(model, older, monkeypatch):
    order: list[str] = []

    def fsync(handle: int, real: Callable[[int], None] = os.fsync) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).suffix or "folder")
        real(handle)

    def rename(source: Path, target: Path, real: Callable[..., None] = os.rename) -> None:
        order.append(f"to {target.suffix or 'place'}")
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    model.save(older[0])
    assert order == [".safetensors", ".json", ".new", "to .old", "to place", "folder"]


# Places ----------------------------------------------------------------------------------------


def test_an_older_one_is_replaced(model, older):
    model.save(older[0])
    assert [path.name for path in older[0].parent.iterdir()] == [older[0].name]
    assert wancompile.load(older[0]).report.recipe.name == "int8"


def test_a_loaded_model_may_replace_what_it_was_loaded_from(older):
    place, before = older
    loaded, call = wancompile.load(place), calls("t2v")[0]
    loaded.save(place)
    assert contents(place) == before
    assert torch.equal(output(loaded, call), output(compiled("t2v", "fp8"), call))


def test_what_else_lies_there_is_not_lost(model, older):
    place, _ = older
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds notes\.txt, .* would be lost"):
        model.save(place)
    (place / document.FILE).unlink()
    with pytest.raises(ArtifactError, match=r"holds notes\.txt"):
        model.save(place)
    assert (place / "notes.txt").read_text() == "mine"
    with pytest.raises(ArtifactError, match="is a file"):
        model.save(place / "notes.txt")


def test_folders_on_the_way_are_made_with_the_usual_rights(model, tmp_path):
    (tmp_path / "empty").mkdir()
    model.save(str(tmp_path / "empty"))
    model.save(tmp_path / "a" / "b" / "c")
    usual = stat.S_IMODE((tmp_path / "a").stat().st_mode)
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert stat.S_IMODE(path.stat().st_mode) == usual
        assert wancompile.load(path).report.recipe.name == "int8"


def test_a_link_keeps_leading_to_the_artifact(model, older, tmp_path):
    (tmp_path / "link").symlink_to(older[0])
    model.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert wancompile.load(older[0]).report.recipe.name == "int8"
