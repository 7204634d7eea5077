from __future__ import annotations

import math

import pytest
import torch

from wancompile.demo.quality import psnr, ssim, temporal_error

SHAPE = (2, 1, 3, 12, 10)
C1, C2 = 0.02**2, 0.06**2


def video(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def test_psnr_of_a_known_difference():
    black = torch.zeros(SHAPE)
    grey = black.clone()
    grey[0] += 0.2  # 10 log10(4 / 0.04)
    grey[1, :, 0] += 0.2  # in one frame of three
    expected = torch.tensor([20.0, 20 + 10 * math.log10(3)])
    torch.testing.assert_close(psnr(grey, black), expected, check_dtype=False)
    torch.testing.assert_close(psnr(black, grey), expected, check_dtype=False)


def test_equal_videos():
    one = video()
    assert psnr(one, one).tolist() == [math.inf, math.inf]
    torch.testing.assert_close(ssim(one, one), torch.ones(2), check_dtype=False)


def test_ssim_of_plain_colours_is_that_of_their_means():
    """Without any structure, only the luminance of Wang et al. 2004, eq. 6 is left."""
    u, v = 0.5, -0.25
    expected = (2 * u * v + C1) / (u * u + v * v + C1)
    found = ssim(torch.full(SHAPE, u), torch.full(SHAPE, v))
    torch.testing.assert_close(found, torch.full((2,), expected), check_dtype=False)


def test_ssim_of_one_window_by_hand():
    a, b = video(1, (1, 1, 1, 7, 7)), video(2, (1, 1, 1, 7, 7))
    found = ssim(a, b)
    assert found.item() == pytest.approx(by_hand(a.flatten().tolist(), b.flatten().tolist()))


def by_hand(x: list[float], y: list[float]) -> float:
    """Wang et al. 2004, eqs. 13 to 16, over one window of 7 x 7 pixels."""
    raw = [math.exp(-(i * i + j * j) / 4.5) for i in range(-3, 4) for j in range(-3, 4)]
    weights = [one / sum(raw) for one in raw]

    def mean(values):
        return sum(w * value for w, value in zip(weights, values, strict=True))

    mean_x, mean_y = mean(x), mean(y)
    var_x = mean((a - mean_x) ** 2 for a in x)
    var_y = mean((b - mean_y) ** 2 for b in y)
    both = mean((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    means = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return means * (2 * both + C2) / (var_x + var_y + C2)


def test_windows_and_frames_are_averaged():
    """A frame of 7 x 8 pixels has two windows, a video of two frames four."""
    a, b = video(3, (1, 1, 2, 7, 8)), video(4, (1, 1, 2, 7, 8))
    windows = [
        by_hand(
            a[0, 0, frame, :, left : left + 7].flatten().tolist(),
            b[0, 0, frame, :, left : left + 7].flatten().tolist(),
        )
        for frame in (0, 1)
        for left in (0, 1)
    ]
    assert ssim(a, b).item() == pytest.approx(sum(windows) / 4)


def test_each_video_has_its_own_value():
    a = video(5)
    b = a.clone()
    b[1] = video(6)[1]
    likeness, decibels = ssim(a, b), psnr(a, b)
    assert likeness[0] == pytest.approx(1)
    assert likeness[1] < 0.5
    assert decibels[0] == math.inf
    assert decibels[1] < 10


def test_what_stands_still_is_no_temporal_error():
    one, picture = video(9) / 2, video(10)[:, :, :1] / 2
    assert temporal_error(one + picture, one).tolist() == pytest.approx([0, 0], abs=1e-7)


def test_temporal_error_of_a_flicker():
    """Every other frame is 0.3 brighter, so each change is off by 0.3, of a range of 2."""
    still = torch.zeros(SHAPE)
    flickering = still.clone()
    flickering[1, :, 1] = 0.3
    assert temporal_error(flickering, still).tolist() == pytest.approx([0, 0.15])
    assert temporal_error(still, flickering).tolist() == pytest.approx([0, 0.15])


def test_changes_count_by_their_square():
    still = torch.zeros(1, 1, 3, 4, 4)
    brighter_at_the_end = still.clone()
    brighter_at_the_end[:, :, 2] = 0.4
    assert temporal_error(brighter_at_the_end, still).item() == pytest.approx(0.2 / math.sqrt(2))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_more_noise_is_worse(measure):
    clean, noise = video(7) / 2, video(8)
    values = [measure(clean, clean + share * noise) for share in (0.01, 0.05, 0.2)]
    assert (values[0] > values[1]).all()
    assert (values[1] > values[2]).all()
