"""Arguments in the shapes that the pipelines use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from wancompile.errors import InputError
from wancompile.presets.config import as_preset
from wancompile.presets.preset import ANIMATE, VACE, Latent, Preset


def example_inputs(
    preset: Preset | Mapping[str, Any],
    *,
    latent: Latent | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Return named arguments of the model's forward, in the shapes that the pipeline uses.

    With B the batch, C channels and (F, H, W) the latent:

        hidden_states                [B, C, F, H, W]
        timestep                     [B], or [B, N] with one for each of the N video tokens; fp32
        encoder_hidden_states        [B, tokens, text_dim]
        encoder_hidden_states_image  [B, image_tokens, image_dim], or [2 B, image_tokens / 2, ...]
                                     with first and last frame as neighbours in the batch
        control_hidden_states        [B, vace_in_channels, F, H, W]
        control_hidden_states_scale  [control blocks]
        pose_hidden_states           [B, latent_channels, F - 1, H, W]
        face_pixel_values            [B, 3, 4 (F - 2) + 1, size, size]

    Args:
        preset: a preset, or a diffusers configuration that names its class in `_class_name`.
        latent: frames, height and width of the latents, instead of the preset's.
        frames: replaces the first of them.
        height: replaces the second.
        width: replaces the third.
        batch: videos in one call; the pipelines call once with text and once without.
        device: where the tensors are made; all but on `meta` they are random.
        dtype: of all tensors but the timestep.

    Raises:
        InputError: the latents do not divide into patches.
    """
    chosen = as_preset(preset)
    usual = latent or chosen.latent
    size = (frames or usual[0], height or usual[1], width or usual[2])
    patches = _patches(chosen.config, size)
    inputs = {
        name: torch.randn(shape, device=device, dtype=dtype)
        for name, shape in _shapes(chosen, size, batch).items()
    }
    steps = (batch, patches) if chosen.per_token_timestep else (batch,)
    inputs["timestep"] = torch.full(steps, 500.0, device=device)
    if chosen.factory == VACE:
        blocks = len(chosen.config["vace_layers"])
        inputs["control_hidden_states_scale"] = torch.ones(blocks, device=device, dtype=dtype)
    return inputs


def _shapes(preset: Preset, size: Latent, batch: int) -> dict[str, tuple[int, ...]]:
    config = preset.config
    shapes: dict[str, tuple[int, ...]] = {
        "hidden_states": (batch, config["in_channels"], *size),
        "encoder_hidden_states": (batch, preset.tokens, config["text_dim"]),
    }
    if preset.image_tokens:
        count = preset.images_per_video
        shapes["encoder_hidden_states_image"] = (
            count * batch,
            preset.image_tokens // count,
            config["image_dim"],
        )
    if preset.factory == VACE:
        shapes["control_hidden_states"] = (batch, config["vace_in_channels"], *size)
    if preset.factory == ANIMATE:
        shapes.update(_face_shapes(config, size, batch))
    return shapes


def _face_shapes(config: Mapping[str, Any], size: Latent, batch: int) -> dict[str, tuple[int, ...]]:
    # The first latent frame is the reference picture: it has neither pose nor face.
    frames, height, width = size
    if frames < 2:
        raise InputError("Animate needs at least 2 latent frames, the first is the reference")
    face = config.get("motion_encoder_size", 512)
    return {
        "pose_hidden_states": (batch, config["latent_channels"], frames - 1, height, width),
        "face_pixel_values": (batch, 3, 4 * (frames - 2) + 1, face, face),
    }


def _patches(config: Mapping[str, Any], size: Latent) -> int:
    """Return the number of video tokens of a latent of this size."""
    patch = config["patch_size"]
    if any(length < 1 or length % step for length, step in zip(size, patch, strict=True)):
        raise InputError(
            f"latents of {'x'.join(map(str, size))} do not divide into patches of "
            f"{'x'.join(map(str, patch))}"
        )
    return math.prod(length // step for length, step in zip(size, patch, strict=True))
