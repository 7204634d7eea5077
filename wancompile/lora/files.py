"""The ways in which LoRAs of a Wan are stored, as one: names of the model's modules, A and B.

diffusers and PEFT name modules as the model does, behind a prefix for the part of the pipeline.
What names them as the original Wan does (ComfyUI, Kohya) goes through diffusers' own converters.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wancompile.errors import LoraError

PARTS = ("transformer", "transformer_2")
"""The parts of a pipeline for which a LoRA may have something."""

_ORIGINAL, _KOHYA, _PEFT = "diffusion_model.", "lora_unet_", "base_model.model."
_ORIGINAL_ONLY = (".self_attn.", ".cross_attn.")
_SETTINGS = "lora_adapter_metadata"

Stored = str | Path | Mapping[str, Tensor]
"""A safetensors file, or the tensors in one by their names."""


def read(lora: Stored) -> dict[str, Tensor]:
    """Return the tensors of a LoRA under diffusers' names, with `NAME.alpha` where one is known.

    Args:
        lora: a safetensors file, or what is in one. Tensors are not changed.

    Raises:
        LoraError: there is no such file, or it is of no kind that is known here.
    """
    return _named(*_stored(lora), str(lora))


def split(lora: Stored, parts: Collection[str] = PARTS) -> dict[str, dict[str, Tensor]]:
    """Return what a LoRA has for each part of a pipeline, by the name of the part.

    Names that diffusers gives begin with that of the part; of A14B, whose two experts are
    `transformer` and `transformer_2`, each may have a LoRA of its own. What names no part, as the
    original Wan, Kohya and PEFT do not, is under the empty name.

    Args:
        lora: as for `read`.
        parts: the names that a part may have.

    Raises:
        LoraError: as for `read`.
    """
    stored, settings = _stored(lora)
    # Asked here, for diffusers' converters say `transformer` of whatever they rename.
    are_named = any(name.partition(".")[0] in parts for name in stored)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _named(stored, settings, str(lora)).items():
        part, _, rest = name.partition(".")
        part, rest = (part, rest) if are_named and part in parts else ("", name)
        found.setdefault(part, {})[rest] = tensor
    return found


def _stored(lora: Stored) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors by their own names, and the settings that diffusers stores beside them."""
    if isinstance(lora, Mapping):
        return {str(name): tensor for name, tensor in lora.items()}, None
    try:
        with safe_open(str(lora), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, (file.metadata() or {}).get(_SETTINGS)
    except Exception as error:
        raise LoraError(f"{lora} cannot be read as safetensors: {error}") from error


def _named(tensors: dict[str, Tensor], settings: str | None, path: str) -> dict[str, Tensor]:
    found = _converted(tensors)
    return found if settings is None else {**_alphas(found, settings, path), **found}


def _converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not tensors:
        raise LoraError("the LoRA is empty")
    odd = [name for name, one in tensors.items() if not isinstance(one, Tensor)]
    if odd:
        raise LoraError(f"{odd[0]} of the LoRA is a {type(tensors[odd[0]]).__name__}, no tensor")
    if any("dora_scale" in name or "lora_magnitude" in name for name in tensors):
        raise LoraError("this is a DoRA: its weights are normalized, which no branch can do")
    if all(name.startswith(_PEFT) for name in tensors):
        return {name.removeprefix(_PEFT): tensor for name, tensor in tensors.items()}
    if any(name.startswith(_KOHYA) for name in tensors):
        return _by_diffusers("_convert_musubi_wan_lora_to_diffusers", tensors)
    is_bare = not any(name.startswith(_ORIGINAL) for name in tensors)
    if is_bare and any(part in f".{name}" for part in _ORIGINAL_ONLY for name in tensors):
        tensors, is_bare = {_ORIGINAL + name: one for name, one in tensors.items()}, False
    if is_bare:
        return tensors
    _refuse_differences(tensors)
    return _by_diffusers("_convert_non_diffusers_wan_lora_to_diffusers", tensors)


def _by_diffusers(converter: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let diffusers rename; it multiplies some tensors in place, so it gets copies."""
    from diffusers.loaders import lora_conversion_utils

    convert = getattr(lora_conversion_utils, converter)
    try:
        found: dict[str, Tensor] = convert({name: one.clone() for name, one in tensors.items()})
    except Exception as error:
        raise LoraError(f"diffusers cannot convert the names of this LoRA: {error!r}") from error
    return found


def _refuse_differences(tensors: Mapping[str, Tensor]) -> None:
    """Refuse whole differences of parameters that diffusers would drop without a word.

    Those of biases become biases of B. Files hold zeros for the rest, which mean nothing.
    """
    for name, tensor in tensors.items():
        is_kept = name.endswith(".diff_b") and "norm" not in name
        if name.endswith((".diff", ".diff_b")) and not is_kept and bool(tensor.count_nonzero()):
            raise LoraError(
                f"{name} changes a parameter as a whole: only A, B and biases of linears are known"
            )


def _alphas(tensors: Mapping[str, Tensor], settings: str, path: str) -> dict[str, Tensor]:
    """Return `NAME.alpha`, so that alpha / rank is what the settings of PEFT beside a file ask for.

    Its settings name one alpha, exceptions by the end of a module's name, and whether it is divided
    by the root of the rank instead (Kalajdzievski 2023, "Rank stabilization").
    """
    try:
        known: dict[str, Any] = json.loads(settings)
    except ValueError as error:
        raise LoraError(f"{path} has settings that are not JSON: {error}") from error
    parts = {part: _of_part(known, part) for part in PARTS}
    found = {}
    for name, tensor in tensors.items():
        module, is_down, _ = name.partition(".lora_A.")
        part, _, path_in_part = module.partition(".")
        given = parts.get(part, {})
        if not is_down or "lora_alpha" not in given:
            continue
        if given.get("use_dora"):
            raise LoraError("this is a DoRA: its weights are normalized, which no branch can do")
        alpha, rank = float(given["lora_alpha"]), tensor.shape[0]
        for ending, other in (given.get("alpha_pattern") or {}).items():
            if path_in_part == ending or path_in_part.endswith(f".{ending}"):
                alpha = float(other)
        stabilized = alpha * rank**0.5 if given.get("use_rslora") else alpha
        found[f"{module}.alpha"] = torch.tensor(stabilized)
    return found


def _of_part(settings: Mapping[str, Any], part: str) -> dict[str, Any]:
    prefix = f"{part}."
    return {key[len(prefix) :]: one for key, one in settings.items() if key.startswith(prefix)}
