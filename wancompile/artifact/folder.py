"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wancompile.artifact import document, weights
from wancompile.errors import ArtifactError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `target` when the body has ended without an error.

    It lies beside `target`, and is gone after an error or an interrupt, Ctrl-C included; an older
    artifact at `target` is then as it was. Between the two renames that replace one, both exist
    under hidden names, and an interrupt puts the older one back.

    Raises:
        ArtifactError: `target` is something else than an artifact or an empty folder, or the disk
            is full or cannot be written to.
    """
    check_replaceable(target)
    hidden = f".{target.name}.{uuid.uuid4().hex[:8]}"
    new, old = target.with_name(f"{hidden}.new"), target.with_name(f"{hidden}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        yield new
        _sync(new)
        _swap(new, old, target)
        _sync(target.parent)
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(target: Path) -> None:
    """Raise `ArtifactError` if `target` is something else than an artifact or an empty folder."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file; an artifact is a folder")
    foreign = sorted(one.name for one in target.iterdir() if not _is_ours(one))
    if foreign:
        raise ArtifactError(
            f"{target} holds {foreign[0]}, which is no part of an artifact and would be lost: "
            "give the name of a new folder"
        )


def _is_ours(path: Path) -> bool:
    if path.is_dir():  # an expert of a pipeline
        return (path / document.FILE).is_file() and all(map(_is_ours, path.iterdir()))
    return path.name == document.FILE or weights.FILE.fullmatch(path.name) is not None


def _swap(new: Path, old: Path, target: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise


def _sync(folder: Path) -> None:
    """Force the entries of `folder` to disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
