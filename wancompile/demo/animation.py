"""Videos side by side as one animated picture."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_ZOOM = 8
_GAP = 12
_CAPTION = 30
_MILLISECONDS = 140
_BACKGROUND, _INK = 24, 235


def side_by_side(panels: Mapping[str, Tensor]) -> bytes:
    """Return an animated GIF of `panels`: a caption and a video `[F, H, W]` in [-1, 1] each."""
    frames = [
        _frame({name: video[f] for name, video in panels.items()}) for f in range(_length(panels))
    ]
    buffer = io.BytesIO()
    first, *rest = frames
    first.save(
        buffer,
        "GIF",
        save_all=True,
        append_images=rest,
        duration=_MILLISECONDS,
        loop=0,
        optimize=True,
    )
    return buffer.getvalue()


def difference(video: Tensor, reference: Tensor, gain: float) -> Tensor:
    """Return `gain` times the distance of two videos, black where they agree."""
    return (gain * (video - reference).abs()).clamp(0, 2) - 1


def _length(panels: Mapping[str, Tensor]) -> int:
    return min(len(video) for video in panels.values())


def _frame(images: Mapping[str, Tensor]) -> Image.Image:
    font = ImageFont.load_default(16)
    sides = [image.shape[-1] * _ZOOM for image in images.values()]
    height = max(image.shape[-2] for image in images.values()) * _ZOOM
    size = (sum(sides) + _GAP * (len(sides) + 1), height + _CAPTION + _GAP)
    canvas = Image.new("L", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    left = _GAP
    for (name, image), side in zip(images.items(), sides, strict=True):
        draw.text((left + side // 2, _CAPTION // 2), name, fill=_INK, font=font, anchor="mm")
        canvas.paste(_enlarged(image), (left, _CAPTION))
        left += side + _GAP
    return canvas


def _enlarged(image: Tensor) -> Image.Image:
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).numpy().astype(np.uint8)
    height, width = pixels.shape
    return Image.fromarray(pixels).resize((width * _ZOOM, height * _ZOOM), Image.Resampling.NEAREST)
