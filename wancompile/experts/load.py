"""Read a compiled model, or the experts of a pipeline, from a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wancompile.artifact import document, facts
from wancompile.artifact.load import device_named, explained, load_model
from wancompile.compiled import CompiledModel
from wancompile.errors import ArtifactError, of_expert
from wancompile.experts.compiled import CompiledPipeline
from wancompile.experts.facts import Manifest, Part
from wancompile.experts.save import digest

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def load(
    folder: str | Path, *, device: str | torch.device = "cpu", verify: bool = True
) -> CompiledModel | CompiledPipeline:
    """Return what `save` wrote, without the originals' weights.

    That is a `CompiledModel`, or a `CompiledPipeline` where a pipeline was compiled: `attach` it
    to the pipeline. Weights are mapped into memory and copied from there to `device`, once; on a
    CPU they stay where they are mapped. Nothing in `folder` can run code.

    Args:
        folder: what was given to `save`.
        device: where the model will run; kernels are chosen for it now.
        verify: compare the SHA-256 of every file of weights, eight at a time, at 1.8 GB/s per core
            with SHA instructions. Without it a changed byte of a weight goes unnoticed.

    Raises:
        ArtifactError: there is no artifact, or it is damaged, incomplete, of another format, or
            names an op that is not known.
        InputError: there is no such device.
    """
    folder, place = Path(folder), device_named(device)
    data = document.read(folder)
    if "experts" not in data:
        return load_model(folder, data, place, verify=verify)
    return _load_pipeline(folder, data, place, verify=verify)


def _load_pipeline(
    folder: Path, data: Mapping[str, Any], device: torch.device, *, verify: bool
) -> CompiledPipeline:
    with explained(folder):
        known = {name: data[name] for name in ("boundary", "experts")}
        manifest = facts.from_data(Manifest, known)
    experts = {}
    for part in manifest.experts:
        with of_expert(part.name):
            experts[part.name] = _load_expert(folder, part, device, verify=verify)
    calibrated = {one.name: one.calibrated for one in manifest.experts}
    return CompiledPipeline(experts, calibrated, manifest.boundary)


def _load_expert(folder: Path, part: Part, device: torch.device, *, verify: bool) -> CompiledModel:
    if not _NAME.fullmatch(part.name):
        raise ArtifactError(f"{part.name!r} is no name of an expert")
    path = folder / part.name
    if not path.is_dir():
        raise ArtifactError(f"{path} is missing")
    data = document.read(path)
    if digest(path) != part.sha256:
        raise ArtifactError(
            f"{path / document.FILE} is damaged, or of another expert: its SHA-256 is not the saved"
        )
    return load_model(path, data, device, verify=verify)
