"""Names the digit in a video: what tells whether a generated video shows what was asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

from training import digits

_WINDOW = 16
_VIDEOS = 1500  # for training; their frames are alike but for the sub-pixel position
_EVERY = 4


class Classifier:
    """A support vector machine on the window around the ink, averaged over the frames.

    Trained on videos of the digits that the models were trained on too; `accuracy` on videos of the
    digits that nothing was trained on tells how far its word can be trusted.
    """

    def __init__(self, seed: int = 0) -> None:
        glyphs, _ = digits.split()
        frames, labels = digits.videos(glyphs, _VIDEOS, torch.Generator().manual_seed(seed))
        frames = frames[:, :, ::_EVERY]
        windows = _windows(frames).flatten(1)
        repeated = labels.repeat_interleave(frames.shape[2])
        self._machine = SVC(C=10).fit(windows.numpy(), repeated.numpy())

    def __call__(self, videos: Tensor) -> Tensor:
        """Return the digits `[B]` seen in `videos [B, 1, F, 24, 24]`, in [-1, 1]."""
        windows = _windows(videos.float().cpu()).flatten(1)
        votes = torch.from_numpy(self._machine.decision_function(windows.numpy()))
        return votes.view(len(videos), -1, 10).mean(1).argmax(1)

    def accuracy(self, videos: Tensor, labels: Tensor) -> float:
        """Return the share of `videos` whose digit is that of `labels`."""
        return float((self(videos) == labels.cpu()).float().mean())


def _windows(videos: Tensor) -> Tensor:
    """Return `[B F, 1, 16, 16]`: each frame's surroundings of the centre of its ink."""
    frames = videos.transpose(1, 2).flatten(0, 1)
    ink = frames.clamp(-1, 1) / 2 + 0.5
    # Faint ink is noise of the background; it must not pull the centre.
    centre = _centre(torch.where(ink > 0.3, ink, 0.0))
    theta = torch.zeros(len(ink), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = _WINDOW / ink.shape[-1]
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, [len(ink), 1, _WINDOW, _WINDOW], align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)


def _centre(ink: Tensor) -> Tensor:
    """Return x and y `[N, 2]` of the centre of mass of `ink [N, 1, S, S]`, from -1 to 1."""
    size = ink.shape[-1]
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    mass = ink.sum((1, 2, 3)).clamp_min(1e-6)
    x, y = (ink.sum((1, dim)) @ axis / mass for dim in (2, 3))
    return torch.stack([x, y], -1)
