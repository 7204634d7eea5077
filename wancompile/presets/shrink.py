"""Smaller models of the same kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wancompile.errors import InputError
from wancompile.presets.preset import ANIMATE, VACE, Preset


def tiny(preset: Preset) -> Preset:
    """Return the same kind of model with every width shrunk, quick to run on a CPU.

    The widths differ from each other, so that a mix-up of two of them shows; text keeps its number
    of tokens, which diffusers has in its code.
    """
    heads, head_dim = 3, 16
    images = preset.image_tokens and 7 * preset.images_per_video
    shrunk = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "ffn_dim": 80,
        "text_dim": 40,
        "freq_dim": 32,
        "image_dim": 28,
        "added_kv_proj_dim": heads * head_dim,
        "pos_embed_seq_len": images,
    }
    config = {
        key: shrunk.get(key, value) if value is not None else None
        for key, value in preset.config.items()
    }
    if preset.factory == ANIMATE:
        config.update(_TINY_FACE)
    return replace(
        truncated(replace(preset, config=config), 2),
        name=f"{preset.name}-tiny",
        latent=(5, 8, 12),
        image_tokens=images,
    )


_TINY_FACE: Mapping[str, Any] = {
    "motion_encoder_channel_sizes": {"4": 12, "8": 10, "16": 6},
    "motion_encoder_size": 16,
    "motion_style_dim": 14,
    "motion_dim": 9,
    "motion_encoder_dim": 18,
    "face_encoder_hidden_dim": 22,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}


def truncated(preset: Preset, layers: int) -> Preset:
    """Return `preset` with `layers` blocks, and only those control blocks that still have one.

    Raises:
        InputError: Animate would lose the face adapter of one of the blocks.
    """
    config = {**preset.config, "num_layers": layers}
    if preset.factory == VACE:
        config["vace_layers"] = tuple(one for one in config["vace_layers"] if one < layers)
    if preset.factory == ANIMATE:
        config["inject_face_latents_blocks"] = _face_interval(config, layers)
    return replace(preset, config=config)


def _face_interval(config: Mapping[str, Any], layers: int) -> int:
    # diffusers makes adapters for whole intervals only, and needs one at the start of each.
    interval = int(config.get("inject_face_latents_blocks", 5))
    if layers < interval:
        return layers
    if layers % interval:
        raise InputError(
            f"there is a face adapter every {interval} blocks, so {layers} blocks are not possible:"
            f" take a multiple of {interval}, or fewer"
        )
    return interval
