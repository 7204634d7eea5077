"""What is known of one model: its configuration, and how its pipeline calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Latent = tuple[int, int, int]

PLAIN = "WanTransformer3DModel"
VACE = "WanVACETransformer3DModel"
ANIMATE = "WanAnimateTransformer3DModel"
FACTORIES = (PLAIN, VACE, ANIMATE)


@dataclass(frozen=True)
class Preset:
    """One transformer of the Wan family, and the shapes that its pipeline calls it with.

    Attributes:
        name: what `find` looks for.
        description: one line for people.
        factory: the name of the diffusers class; diffusers is imported only to build it.
        config: the arguments of that class; what is left out has the class's default.
        latent: frames, height and width of the latents in a usual call.
        tokens: text tokens, zero-padded to this number by the pipeline.
        image_tokens: image tokens that one video's cross attention reads, 0 without image states.
        per_token_timestep: timesteps come as [batch, tokens], not [batch].
        experts: transformers of this configuration in the pipeline, each for a range of timesteps.
    """

    name: str
    description: str
    factory: str = PLAIN
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    latent: Latent = (21, 60, 104)
    tokens: int = 512
    image_tokens: int = 0
    per_token_timestep: bool = False
    experts: int = 1

    @property
    def images_per_video(self) -> int:
        """2 for models that read the first and the last frame: they have positions for both."""
        return 1 if self.config.get("pos_embed_seq_len") is None else 2
