"""Models from presets."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from wancompile.errors import InputError
from wancompile.presets.config import as_preset
from wancompile.presets.preset import FACTORIES, Preset
from wancompile.presets.shrink import truncated


def build(
    preset: Preset | Mapping[str, Any],
    *,
    layers: int | None = None,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Make the model, in eval mode, on `meta` without weights or elsewhere with random ones.

    Args:
        preset: a preset, or a diffusers configuration that names its class in `_class_name`.
        layers: keep only that many blocks.
        device: where the model is made.
        dtype: of all parameters but those that diffusers keeps in fp32 when it loads weights.

    Raises:
        InputError: the configuration is not one of a Wan transformer.
    """
    chosen = as_preset(preset)
    if layers is not None:
        chosen = truncated(chosen, layers)
    cls = _class(chosen.factory)
    try:
        with torch.device(device):
            model: nn.Module = cls(**chosen.config)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{chosen.factory} does not take the configuration {chosen.name}: {error}"
        ) from error
    _cast(model, dtype)
    return model.eval()


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    # Buffers stay as they are: the rotary tables are fp32 in every checkpoint.
    kept = frozenset(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def _class(factory: str) -> Any:
    if factory not in FACTORIES:
        raise InputError(f"{factory!r} is not a Wan transformer: {', '.join(FACTORIES)} are")
    try:
        return getattr(importlib.import_module("diffusers"), factory)
    except (AttributeError, ImportError) as error:
        raise InputError(f"the installed diffusers has no {factory}") from error
