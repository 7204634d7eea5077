"""A preset out of the configuration that diffusers writes beside a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wancompile.errors import InputError
from wancompile.presets.preset import ANIMATE, FACTORIES, PLAIN, VACE, Preset
from wancompile.presets.table import COMMON, PRESETS, SIZE_14B


def as_preset(preset: Preset | Mapping[str, Any]) -> Preset:
    """Return a preset as it is, or make one of a diffusers configuration.

    What the configuration does not say, as the usual size of the latents, is taken from the known
    model that is alike but for the number of blocks.

    Raises:
        InputError: the configuration is not one of a Wan transformer.
    """
    return preset if isinstance(preset, Preset) else _from_config(preset)


def _from_config(config: Mapping[str, Any]) -> Preset:
    factory = config.get("_class_name")
    if factory not in FACTORIES:
        said = "names no class" if factory is None else f"is of the class {factory}"
        raise InputError(f"the configuration {said}, not one of {', '.join(FACTORIES)}")
    given = {key: _frozen(value) for key, value in config.items() if not key.startswith("_")}
    full = {**COMMON, **_DEFAULTS[factory], **given}
    full["out_channels"] = full["out_channels"] or full["in_channels"]
    known = (one for one in PRESETS.values() if one.factory == factory)
    like = next((one for one in known if _alike(one, full)), None)
    if like is not None:
        return replace(like, config=full)
    images = (full["pos_embed_seq_len"] or 257) if full["image_dim"] else 0
    return Preset(
        factory,
        f"a {factory} of its own size",
        factory=factory,
        config=full,
        image_tokens=images,
    )


# The sizes that diffusers takes where a configuration leaves them out.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: SIZE_14B,
    VACE: {**SIZE_14B, "vace_layers": tuple(range(0, 40, 5)), "vace_in_channels": 96},
    ANIMATE: {**SIZE_14B, "in_channels": 36, "latent_channels": 16, "image_dim": 1280},
}


def _alike(preset: Preset, config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of `preset`, but for the number of blocks."""
    depth = ("num_layers", "vace_layers")
    return all(config.get(key) == value for key, value in preset.config.items() if key not in depth)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
