"""`wancompile.json`: one document with a checksum of its own.

Its text is the only one that `render` gives for its data, so that no byte of it can change unseen.
Each item of a long list has a line to itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wancompile.errors import ArtifactError

FILE = "wancompile.json"
FORMAT = "wancompile-artifact"
VERSION = 2
"""Grows with every change that older readers would misread, or that misreads what was older.

    2  norms and rotations that round say whether they turn what they round, attention has scales of
       its queries: graphs of format 1 leave these arguments out

`tests/golden/test_signatures_of_ops_are_those_of_this_format.txt` holds the signatures that graphs
of this format rely on.
"""


def render(data: Mapping[str, Any]) -> str:
    """Return the text of a document with `data`, its format, version and checksum before it."""
    body = ",\n".join(f"{_dump(key)}: {_lines(value)}" for key, value in data.items())
    digest = hashlib.sha256(body.encode()).hexdigest()
    head = {"format": FORMAT, "version": VERSION, "sha256": digest}
    return (
        "{\n" + ",\n".join(f"{_dump(k)}: {_dump(v)}" for k, v in head.items()) + f",\n{body}\n}}\n"
    )


def _lines(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return _dump(value)
    return "[\n" + ",\n".join(map(_dump, value)) + "\n]"


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def read(folder: Path) -> dict[str, Any]:
    """Return the data of the document in `folder`.

    Raises:
        ArtifactError: there is none, it is not one of ours, it is of another format, or damaged.
    """
    path = folder / FILE
    try:
        text = path.read_bytes().decode()
        found = json.loads(text)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{folder} holds no artifact: there is no {path}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: it is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ArtifactError(f"{path} is no artifact of wancompile: its format is not {FORMAT!r}")
    _check_version(path, found)
    data = {key: one for key, one in found.items() if key not in ("format", "version", "sha256")}
    if render(data) != text:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one it names")
    return data


def _check_version(path: Path, found: Mapping[str, Any]) -> None:
    version = found.get("version")
    if type(version) is int and version > VERSION:
        raise ArtifactError(
            f"{path} has format {version}, newer than {VERSION}, the last that this version of "
            "wancompile reads: upgrade wancompile"
        )
    if type(version) is int and 0 < version < VERSION:
        raise ArtifactError(
            f"{path} has format {version}, older than {VERSION}, the only one that this version of "
            "wancompile reads: compile the model again, or load it with the version that saved it"
        )
    if version != VERSION:
        raise ArtifactError(f"{path} has format {version!r}; this version reads {VERSION}")
