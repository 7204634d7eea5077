"""Models that diffusers has saved in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from wancompile.errors import InputError
from wancompile.presets.build import build
from wancompile.presets.config import as_preset
from wancompile.presets.preset import Preset


def from_folder(path: Path | str) -> Preset:
    """Return the preset of a diffusers folder, of a pipeline or of its transformer alone.

    What the configuration does not say, as the usual size of the latents, is taken from the known
    model with the same one; `build` makes the model.

    Raises:
        InputError: there is no configuration, or not one of a Wan transformer.
    """
    root = Path(path)
    folder = _transformer_folder(root)
    preset = as_preset(read_json(folder / "config.json"))
    pipeline = folder.parent if folder == root else root
    index = pipeline / "model_index.json"
    changes: dict[str, Any] = {"name": root.resolve().name}
    if index.is_file():
        entries = read_json(index)
        changes["per_token_timestep"] = bool(entries.get("expand_timesteps"))
        changes["experts"] = sum(
            (pipeline / name / "config.json").is_file() for name in ("transformer", "transformer_2")
        )
    return replace(preset, **changes)


def load(
    path: Path | str, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Load the weights of a diffusers folder, of only the first `layers` blocks if given.

    Weights go from the file to the model without a second copy, and those of blocks left out are
    not read.

    Raises:
        InputError: there is no model in the folder, or not one of the Wan transformers, or some of
            its weights are missing or of another shape.
    """
    folder = _transformer_folder(Path(path))
    with _parameters_on_meta():
        model = build(read_json(folder / "config.json"), layers=layers, device="cpu", dtype=dtype)
    wanted = model.state_dict()
    found = _read_weights(folder, {name: tensor.dtype for name, tensor in wanted.items()})
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise InputError(f"{folder} has no weights for {missing[0]} (of {len(missing)} missing)")
    try:
        model.load_state_dict(found, assign=True)
    except RuntimeError as error:
        raise InputError(f"the weights in {folder} do not fit its config.json: {error}") from error
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Give new modules parameters without storage; buffers, which no file has, stay real."""

    # torch documents that a hook may return another parameter, but types it to return None.
    def strip(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(strip)
    try:
        yield
    finally:
        hook.remove()


def _read_weights(folder: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stored:
                names = dtypes.keys() & stored.keys()
                found.update({name: stored.get_tensor(name).to(dtypes[name]) for name in names})
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
    return found


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "diffusion_pytorch_model.safetensors"
    index = folder / f"{single.name}.index.json"
    if index.is_file():
        names = set(read_json(index).get("weight_map", {}).values())
        return [folder / name for name in sorted(names)]
    return [single]


def _transformer_folder(root: Path) -> Path:
    for folder in (root / "transformer", root):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(f"{root} has neither transformer/config.json nor config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file of JSON holds; raise `InputError` if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content
