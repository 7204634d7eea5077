"""The published Wan transformers, in numbers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from wancompile.errors import InputError
from wancompile.presets.preset import ANIMATE, VACE, Preset

COMMON: Mapping[str, Any] = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
_SIZE_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_SIZE_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
SIZE_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_IMAGE = {"image_dim": 1280, "added_kv_proj_dim": 5120}


def _config(size: Mapping[str, int], **changes: Any) -> Mapping[str, Any]:
    return MappingProxyType({**COMMON, **size, **changes})


_ALL = (
    Preset("t2v-1.3b", "Wan 2.1 text to video, 1.3B", config=_config(_SIZE_1B)),
    Preset("t2v-14b", "Wan 2.1 text to video, 14B", config=_config(SIZE_14B)),
    Preset(
        "t2v-a14b",
        "Wan 2.2 text to video, two experts of 14B",
        config=_config(SIZE_14B),
        experts=2,
    ),
    Preset(
        "i2v-14b",
        "Wan 2.1 image to video, 14B",
        config=_config(SIZE_14B, in_channels=36, **_IMAGE),
        image_tokens=257,
    ),
    Preset(
        "flf2v-14b",
        "Wan 2.1 first and last frame to video, 14B",
        config=_config(SIZE_14B, in_channels=36, pos_embed_seq_len=514, **_IMAGE),
        image_tokens=514,
    ),
    Preset(
        "i2v-a14b",
        "Wan 2.2 image to video, two experts of 14B",
        config=_config(SIZE_14B, in_channels=36),
        experts=2,
    ),
    Preset(
        "ti2v-5b",
        "Wan 2.2 text or image to video, 5B",
        config=_config(_SIZE_5B, in_channels=48, out_channels=48),
        # 121 frames of 704 x 1280 pixels; this model's VAE shrinks 4 x 16 x 16.
        latent=(31, 44, 80),
        per_token_timestep=True,
    ),
    Preset(
        "vace-1.3b",
        "Wan 2.1 VACE video editing, 1.3B",
        factory=VACE,
        config=_config(_SIZE_1B, vace_layers=tuple(range(0, 30, 2)), vace_in_channels=96),
    ),
    Preset(
        "vace-14b",
        "Wan 2.1 VACE video editing, 14B",
        factory=VACE,
        config=_config(SIZE_14B, vace_layers=tuple(range(0, 40, 5)), vace_in_channels=96),
    ),
    Preset(
        "animate-14b",
        "Wan 2.2 Animate, 14B",
        factory=ANIMATE,
        config=_config(SIZE_14B, in_channels=36, latent_channels=16, **_IMAGE),
        image_tokens=257,
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})


def find(name: str) -> Preset:
    """Return the preset called `name`, in any case.

    Raises:
        InputError: there is none; the message has the nearest names.
    """
    found = PRESETS.get(name.lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
    raise InputError(f"there is no preset {name!r}: {hint}")
