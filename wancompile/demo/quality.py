"""How near two videos are, for people: PSNR, SSIM and whether they move alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_RANGE = 2.0  # videos lie in [-1, 1]
_WINDOW, _SIGMA = 7, 1.5


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio `[B]` in dB of videos `[B, ...]` in [-1, 1].

    `10 log10(range^2 / mean squared difference)`; infinity for equal videos.
    """
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * (_RANGE**2 / error).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity `[B]` of videos `[B, 1, F, H, W]` in [-1, 1].

    Wang et al. 2004, eq. 13, in windows of 7 x 7 weighted by a Gaussian of 1.5 pixels, averaged
    over the windows that lie within a frame and over the frames; 1 for equal videos.
    """
    x, y = (video.double().transpose(1, 2).flatten(0, 1) for video in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    spread_x = _blur(x * x) - mean_x**2
    spread_y = _blur(y * y) - mean_y**2
    joint = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * joint + c2) / (spread_x + spread_y + c2)
    return (luminance * structure).view(len(a), -1).mean(1)


def temporal_error(a: Tensor, b: Tensor) -> Tensor:
    """Return how differently videos `[B, C, F, H, W]` in [-1, 1] change from frame to frame, `[B]`.

    The root of the mean squared difference of their changes, as a share of the range: flicker that
    neither PSNR nor SSIM tells from an error that stands still. 0 for equal videos, and for those
    that differ by a still picture.
    """
    changes_a, changes_b = (video.double().diff(dim=2) for video in (a, b))
    return (changes_a - changes_b).square().flatten(1).mean(1).sqrt() / _RANGE


def _blur(images: Tensor) -> Tensor:
    """Weighted means of the windows of `images [N, 1, H, W]`."""
    offsets = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    return F.conv2d(images, torch.outer(weights, weights)[None, None])
