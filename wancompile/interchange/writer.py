"""Write a compiled model for other programs."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from wancompile import presets
from wancompile.artifact import facts
from wancompile.artifact.weights import shards
from wancompile.compiled import CompiledModel
from wancompile.errors import ArtifactError, InputError
from wancompile.interchange.formats import FORMATS, Contents
from wancompile.interchange.names import class_of
from wancompile.interchange.plain import Plain

SHARD_BYTES = 4 << 30
"""How large a file of a format with several may become; one tensor is never split."""


@dataclass(frozen=True)
class Summary:
    """What was written.

    `errors` are relative L2 errors by weight, of what is written against the 8-bit weight of the
    compiled model, times the smooth scales that were in it; `kept` are those weights whose 8 bits
    are the same.
    """

    path: Path
    nbytes: int
    errors: Mapping[str, float]
    kept: tuple[str, ...]


def write(
    compiled: CompiledModel,
    path: str | Path,
    format: str,
    *,
    originals: torch.nn.Module | Mapping[str, Tensor] | None = None,
) -> Summary:
    """Write the weights of `compiled` in a format of `FORMATS` to `path`, a new file or folder.

    Args:
        compiled: a model made from one of diffusers' Wan transformers.
        path: a file for `comfyui-scaled-fp8`, a folder for the others; nothing may be there.
        format: the name of the format.
        originals: the original model, or its parameters by name. Whatever is not in 8 bits is then
            taken from it. Needed where the compiled model has a parameter in another form only, as
            the modulation tables of a model with a timestep per token.

    Raises:
        InputError: there is no such format, or something is at `path` already.
        ArtifactError: the model is of no class that diffusers has, a parameter cannot be had back
            or has no name in this format, or the disk is full. Nothing is then at `path`.
    """
    target = Path(path)
    if format not in FORMATS:
        raise InputError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    if target.exists():
        raise InputError(f"{target} exists already: give the name of a new one")
    kind = FORMATS[format]
    config = _config(compiled)
    plain = Plain(compiled.fused, _parameters(originals))
    made = kind.make(plain, _wanted(config, compiled.dtype), config)
    hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_folder(hidden, kind.stem, made) if kind.stem else _write_file(hidden, made.tensors)
        hidden.rename(target)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.unlink(missing_ok=True)
    files = target.rglob("*") if target.is_dir() else [target]
    size = sum(one.stat().st_size for one in files if one.is_file())
    return Summary(target, size, made.errors, tuple(made.kept))


def _config(compiled: CompiledModel) -> dict[str, Any]:
    """Return diffusers' configuration of the model, with its class."""
    config = dict(compiled.config or {})
    cls = class_of(config)
    if cls is None:
        raise ArtifactError(
            "the model has no configuration of a Wan of diffusers, and these formats know no other"
        )
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    data: dict[str, Any] = facts.to_data({"_class_name": cls, **kept})
    return data


def _wanted(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the parameters of the model of this configuration, without values."""
    return dict(presets.build(config, dtype=dtype).state_dict())


def _parameters(
    originals: torch.nn.Module | Mapping[str, Tensor] | None,
) -> Mapping[str, Tensor] | None:
    return originals.state_dict() if isinstance(originals, torch.nn.Module) else originals


def _write_folder(folder: Path, stem: str, made: Contents) -> None:
    folder.mkdir()
    parts = shards(made.tensors, SHARD_BYTES)
    names = [f"{stem}-{at:05}-of-{len(parts):05}.safetensors" for at in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = [f"{stem}.safetensors"]
    for name, part in zip(names, parts, strict=True):
        _write_file(folder / name, part)
    documents = dict(made.documents)
    if len(parts) > 1:
        documents[f"{stem}.safetensors.index.json"] = {
            "metadata": {"total_size": sum(one.nbytes for one in made.tensors.values())},
            "weight_map": {
                key: name for name, part in zip(names, parts, strict=True) for key in part
            },
        }
    for name, data in documents.items():
        text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False)
        (folder / name).write_text(f"{text}\n", encoding="utf-8")


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # A copy of its own for each: views of one merged tensor may not be stored beside each other.
    plain = {name: one.detach().cpu().clone().contiguous() for name, one in tensors.items()}
    save_file(plain, str(path), metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())
