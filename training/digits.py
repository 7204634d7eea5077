"""Endless videos of handwritten digits that move in a straight line and bounce off the walls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

FRAMES, SIZE = 9, 24
GLYPH = 16  # pixels of a digit's side: twice the 8 of the data set
_SPEEDS = (0.5, 2.5)  # pixels a frame, along each axis


@dataclass(frozen=True)
class Glyphs:
    """Handwritten digits `images [N, 1, 8, 8]` in [0, 1] and which they are, `labels [N]`."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Glyphs:
        return Glyphs(self.images.to(device), self.labels.to(device))


def split() -> tuple[Glyphs, Glyphs]:
    """Return four fifths of scikit-learn's digits, and the rest, which nothing is trained on."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
    held = len(order) // 5
    kept, rest = order[held:], order[:held]
    return Glyphs(images[kept], labels[kept]), Glyphs(images[rest], labels[rest])


def videos(glyphs: Glyphs, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `[batch, 1, 9, 24, 24]` in [-1, 1], background -1, and the digits `[batch]`.

    `generator` lives on the device of `glyphs`.
    """
    device = glyphs.images.device
    chosen = torch.randint(len(glyphs.labels), (batch,), generator=generator, device=device)
    room = float(SIZE - GLYPH)
    start = room * torch.rand(batch, 1, 2, generator=generator, device=device)
    low, high = _SPEEDS
    speed = low + (high - low) * torch.rand(batch, 1, 2, generator=generator, device=device)
    sign = 2.0 * torch.randint(2, (batch, 1, 2), generator=generator, device=device) - 1
    time = torch.arange(FRAMES, device=device)[:, None]
    corners = _bounce(start + time * speed * sign, room)
    images = glyphs.images[chosen].repeat_interleave(FRAMES, 0)
    frames = paint(images, corners.flatten(0, 1))
    return frames.view(batch, FRAMES, 1, SIZE, SIZE).transpose(1, 2), glyphs.labels[chosen]


def paint(images: Tensor, corners: Tensor) -> Tensor:
    """Return `[N, 1, 24, 24]` in [-1, 1]: `images [N, 1, 8, 8]` doubled, upper left at `corners`.

    `corners [N, 2]` are x and y in pixels and need not be whole.
    """
    # In affine_grid's units the canvas, and equally the image, reaches from -1 to 1.
    zoom = SIZE / GLYPH
    centre = (corners + GLYPH / 2) * 2 / SIZE - 1
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = -zoom * centre
    grid = F.affine_grid(theta, [len(images), 1, SIZE, SIZE], align_corners=False)
    painted = F.grid_sample(images, grid, mode="bicubic", align_corners=False)
    return 2 * painted.clamp(0, 1) - 1


def _bounce(position: Tensor, room: float) -> Tensor:
    """Fold a straight line into [0, room]."""
    return room - (position.remainder(2 * room) - room).abs()
