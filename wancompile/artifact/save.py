"""Write a compiled model to a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import wancompile
from wancompile.artifact import document, facts, values, weights
from wancompile.artifact.folder import replacing
from wancompile.artifact.program import describe
from wancompile.errors import ArtifactError
from wancompile.program import Program
from wancompile.report import Report


def save(
    program: Program, report: Report, config: Any, dtype: torch.dtype, folder: str | Path
) -> None:
    """Write a program at level FUSED, and what is known of it, to `folder`.

    Raises:
        ArtifactError: something of the model cannot be saved, `folder` holds other things, or the
            disk is full. What was there before is then as it was.
    """
    data = _facts(program, report, config, dtype)
    with replacing(Path(folder).resolve()) as new:
        shards = weights.write(new, program.state)
        text = document.render({**data, "shards": [facts.to_data(one) for one in shards]})
        with (new / document.FILE).open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _facts(program: Program, report: Report, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "made_by": {"wancompile": wancompile.__version__, "torch": torch.__version__},
        "dtype": values.dtype_name(dtype),
        "config": _config(config),
        "report": report.with_program(program).to_data(),
        **describe(program),
    }


def _config(config: Any) -> Any:
    if config is not None and not isinstance(config, Mapping):
        raise ArtifactError(
            f"the model's config is a {type(config).__name__}; only mappings can be saved"
        )
    return values.encode(config)
