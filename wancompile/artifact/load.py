"""Read a compiled model from a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wancompile.artifact import document, facts, values, weights
from wancompile.artifact.program import rebuild
from wancompile.compiled import CompiledModel
from wancompile.errors import ArtifactError, InputError
from wancompile.report import Report


class Config(dict[str, Any]):
    """The configuration of the original model: a mapping whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no entry {name!r}") from None


def load(
    folder: str | Path, *, device: str | torch.device = "cpu", verify: bool = True
) -> CompiledModel:
    """Return the model that `CompiledModel.save` wrote; see `wancompile.load`.

    Raises:
        ArtifactError: as there; also where `folder` is the artifact of a pipeline.
        InputError: there is no such device.
    """
    folder, place = Path(folder), device_named(device)
    data = document.read(folder)
    if "experts" in data:
        raise ArtifactError(f"{folder} holds the experts of a pipeline: give the folder of one")
    return load_model(folder, data, place, verify=verify)


def load_model(
    folder: Path, data: Mapping[str, Any], place: torch.device, *, verify: bool
) -> CompiledModel:
    """Return the compiled model in `folder` on `place`; `data` is its document.

    Raises:
        ArtifactError: as `wancompile.load`.
    """
    with explained(folder):
        report = Report.from_data(data["report"])
        shards = facts.from_data(tuple[weights.Shard, ...], data["shards"])
        stored = {name: one for shard in shards for name, one in shard.tensors.items()}
        bare = rebuild(data, stored)
        config, dtype = values.decode(data["config"]), values.dtype_named(data["dtype"])
    program = replace(
        bare,
        state=weights.read(folder, shards, place, verify=verify),
        groups=report.groups,
        ungrouped=report.ungrouped,
        records=report.records,
    )
    with explained(folder):
        program.verify("load")
    known = Config(config) if config is not None else None
    return CompiledModel(program.to(place), report, known, dtype)


def device_named(device: str | torch.device) -> torch.device:
    """Return the device; raise `InputError` if there is none of this name."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device {device}: {error}") from error


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong with the facts of a document into an `ArtifactError`."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{folder} holds no model that can be rebuilt: {error!r}") from error
