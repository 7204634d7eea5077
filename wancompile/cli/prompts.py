"""Prompts from a file, one a line."""

from __future__ import annotations

from pathlib import Path

from wancompile.errors import InputError


def read(path: Path) -> list[str]:
    """Return the lines of a file that are not blank.

    Raises:
        InputError: there is no such file, it is not UTF-8, or it holds no prompt.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"the prompts {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"the prompts {path} are not UTF-8: see line {line}") from error
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise InputError(f"the prompts {path} are empty: write one prompt a line")
    return found
