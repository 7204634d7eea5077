"""Read a compiled model from a folder."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Return the compiled model that `CompiledModel.save` wrote, without the original's weights.

    Weights are mapped into memory and copied from there to `device`, once; on a CPU they stay
    where they are mapped. Nothing in `folder` can run code.

    Args:
        folder: what was given to `save`.
        device: where the model will run; kernels are chosen for it now.
        verify: compare the SHA-256 of every file of weights, eight at a time, at 1.8 GB/s per core
            with SHA instructions. Without it a changed byte of a weight goes unnoticed.

    Raises:
        ArtifactError: there is no artifact, or it is damaged, incomplete, of a newer format, or
            names an op that is not known.
        InputError: there is no such device.
    """
    folder, place = Path(folder), _device(device)
    data = document.read(folder)
    with _explained(folder):
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
    with _explained(folder):
        program.verify("load")
    known = Config(config) if config is not None else None
    return CompiledModel(program.to(place), report, known, dtype)


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device {device}: {error}") from error


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong with the facts of a document into an `ArtifactError`."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{folder} holds no model that can be rebuilt: {error!r}") from error
