"""Saved models in a folder, and the folder of the original."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import wancompile
from wancompile import presets
from wancompile.artifact import document
from wancompile.cli import source
from wancompile.compiled import CompiledModel
from wancompile.errors import ArtifactError, InputError
from wancompile.program import Program
from wancompile.signature import parameters_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every subcommand on a saved model asks for."""
    parser.add_argument(
        "artifact", type=Path, metavar="ARTIFACT", help="a folder that wancompile has written"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="the diffusers folder of the original, to compare with",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="where to run, such as cuda (default: cpu)"
    )


def is_artifact(text: str) -> bool:
    """Whether a word of the command line names the folder of a saved model."""
    return (Path(text) / document.FILE).is_file()


def parts(folder: Path) -> dict[str, Path]:
    """Return the folders of the models that a saved folder holds, by the names of experts.

    A model that was saved alone has no name but "".

    Raises:
        ArtifactError: there is nothing that was saved, or its document is damaged.
    """
    experts = document.read(folder).get("experts")
    if experts is None:
        return {"": folder}
    return {str(one["name"]): folder / str(one["name"]) for one in experts}


def load_model(folder: Path, device: str = "cpu", *, verify: bool = True) -> CompiledModel:
    """Load the one model in `folder`; raises what `wancompile.load` raises."""
    found = wancompile.load(folder, device=device, verify=verify)
    if not isinstance(found, CompiledModel):
        raise ArtifactError(f"{folder} holds several models where one was expected")
    return found


def files(folder: Path) -> list[Path]:
    """Return all files below a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def size_on_disk(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in files(folder))


def page(path: Path, part: str) -> Path:
    """Return where to write the page of a part: `report.html`, or `report.transformer_2.html`."""
    return path.with_suffix(f".{part}{path.suffix}") if part else path


@dataclass(frozen=True)
class Made:
    """Of what a saved model was made: the configuration, if known, and the type of its weights."""

    config: Any
    dtype: torch.dtype

    @classmethod
    def of(cls, compiled: CompiledModel) -> Made:
        """Return what `compiled` says of itself."""
        return cls(compiled.config, compiled.dtype)


def original(place: Path, made: Made, device: torch.device) -> torch.nn.Module:
    """Load the original of a saved model from its folder, in the type it was compiled in.

    Raises:
        InputError: there is no model in the folder, or another one.
    """
    _preset(place, made)
    return presets.load(place, dtype=made.dtype).to(device)


def original_program(place: Path, made: Made) -> Program:
    """Return the original of a saved model at level NORMAL, to be drawn: no weight is read.

    Raises:
        InputError: there is no model in the folder, or another one.
    """
    preset = _preset(place, made)
    model = presets.build(preset, device="meta", dtype=made.dtype)
    call = presets.example_inputs(preset, device="meta", dtype=made.dtype)
    in_one = source.in_one_piece(parameters_of(model.forward)[0])
    return wancompile.trace(model, {**call, **in_one})


def original_folder(folder: Path, part: str) -> Path:
    """Return where in a diffusers folder the original of a part lies; see `parts`."""
    if part:
        return folder / part
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder


def _preset(place: Path, made: Made) -> presets.Preset:
    if not place.is_dir():
        raise InputError(f"there is no folder {place} with the original")
    found = presets.from_folder(place)
    _refuse_others(place, found.config, made.config)
    return found


def _refuse_others(folder: Path, found: Mapping[str, Any], config: Any) -> None:
    for key, value in (config or {}).items():
        if key in found and _plain(found[key]) != _plain(value):
            raise InputError(
                f"{folder} is another model than the artifact: its {key} is {found[key]}, "
                f"not {value}"
            )


def _plain(value: Any) -> Any:
    """Return a list for a tuple: JSON knows no tuples."""
    return list(value) if isinstance(value, tuple) else value
