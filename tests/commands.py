"""The command line in this process, and a tiny pipeline on disk that it has compiled."""

from __future__ import annotations

import contextlib
import io
import pipes
from pathlib import Path

from wancompile.cli import main

SIZE = ("--frames", "5", "--height", str(pipes.SIZE), "--width", str(pipes.SIZE))
SHORT = ("--dtype", "float32", "--steps", "2", *SIZE)


def call(*argv: object) -> tuple[int, str, str]:
    """Run the command line; return its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in argv])
        except SystemExit as error:
            code = int(error.code or 0)
    return code, out.getvalue(), err.getvalue()


def save_pipeline(kind: str, folder: Path) -> Path:
    """Write a pipeline of `pipes` and two prompts beside its parts; return the folder."""
    pipes.make(kind).save_pretrained(folder)
    write_prompts(folder / "prompts.txt", *pipes.PROMPTS[:2])
    return folder


def write_prompts(path: Path, *words: str) -> Path:
    """Write a file of prompts with a blank line at its end; return it."""
    path.write_text("\n".join([*words, "", ""]), encoding="utf-8")
    return path


def sentence(err: str) -> str:
    """Return the only message of a command that refused; its notes of progress come before."""
    (found,) = [line for line in err.splitlines() if line.startswith("wancompile: ")]
    assert "Traceback" not in err
    return found.removeprefix("wancompile: ")
