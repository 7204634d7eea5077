"""Write the experts of a pipeline to one folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch

import wancompile
from wancompile.artifact import document, facts
from wancompile.artifact.folder import replacing
from wancompile.compiled import CompiledModel
from wancompile.errors import ArtifactError, of_expert
from wancompile.experts.facts import Calibrated, Manifest, Part


def save(
    experts: Mapping[str, CompiledModel],
    calibrated: Mapping[str, Calibrated | None],
    boundary: float | None,
    folder: str | Path,
) -> None:
    """Write `folder`: an artifact for each expert, and a document that says which they are.

    The document names the SHA-256 of each expert's own, which names those of its weights; so no
    expert can take the place of another.

    Raises:
        ArtifactError: as `CompiledModel.save`; what was there before is then as it was.
    """
    target = Path(folder).resolve()
    with replacing(target) as new:
        parts = tuple(
            Part(name, _write(model, name, new, target), calibrated[name])
            for name, model in experts.items()
        )
        data = {
            "made_by": {"wancompile": wancompile.__version__, "torch": torch.__version__},
            **facts.to_data(Manifest(boundary, parts)),
        }
        with (new / document.FILE).open("x", encoding="utf-8", newline="\n") as file:
            file.write(document.render(data))
            file.flush()
            os.fsync(file.fileno())


def _write(model: CompiledModel, name: str, new: Path, target: Path) -> str:
    """Write one expert and return the SHA-256 of its document."""
    with of_expert(name):
        try:
            model.save(new / name)
        except ArtifactError as error:  # the folder has a hidden name until all is written
            raise ArtifactError(error.reason.replace(str(new), str(target))) from error
    return digest(new / name)


def digest(folder: Path) -> str:
    """Return the SHA-256 of the document in `folder`."""
    return hashlib.sha256((folder / document.FILE).read_bytes()).hexdigest()
