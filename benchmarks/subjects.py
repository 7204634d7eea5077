"""What is measured: the trained checkpoints, also with outlier channels, and videos to ask for."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import record
from training.train import request
from wancompile.demo import checkpoints
from wancompile.demo.sampler import Request, calls

NAMES = checkpoints.NAMES

# The rescaling is a helper of the tests and no part of the package.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from rescale import inject_outliers  # noqa: E402

# Video i is drawn from seed + i: these must lie further apart than videos are asked for.
_CALIBRATION_SEED, _HELD_OUT_SEED = 0, 1000
# Of one step of guided sampling: with the prompt, and without.
_CALLS = 2


def options(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return which checkpoints are asked for, and how many videos calibrate and judge them."""
    return parser(description).parse_args(argv)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of `options`, for a benchmark that has more of them."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("names", nargs="*", default=NAMES, metavar="t2v|i2v")
    found.add_argument("--videos", type=int, default=4, help="to calibrate on")
    found.add_argument("--steps", type=int, default=8)
    found.add_argument("--held-out-videos", type=int, default=2)
    found.add_argument("--held-out-steps", type=int, default=4)
    found.add_argument("--out", type=Path, default=record.RESULTS)
    return found


def load(name: str) -> Any:
    """Return a checkpoint in fp32, in eval mode, on the GPU where there is one."""
    return checkpoints.load(name).to("cuda" if torch.cuda.is_available() else "cpu")


def with_outliers(model: nn.Module) -> nn.Module:
    """Return a copy that computes the same with channels of very different size."""
    return inject_outliers(copy.deepcopy(model))


def in_bf16(model: nn.Module) -> nn.Module:
    """Return a copy in bf16, but for the parameters that diffusers keeps in fp32 when it loads."""
    copied = copy.deepcopy(model)
    kept = frozenset(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in copied.named_parameters():
        if not kept.intersection(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    return copied


def calibration(name: str, videos: int, steps: int) -> Request:
    """Return the videos whose sampling shows a model's activations to the compiler."""
    asked, _ = request(name, videos, _CALIBRATION_SEED)
    return replace(asked, steps=steps)


def alternating(model: Any, asked: Request) -> list[dict[str, Any]]:
    """Return every second step of sampling, of the first half of the videos and of the other.

    Both halves together walk through the whole schedule, the first from its first step on, and are
    as many forwards as one half takes. Each step is a call with the prompt and one without.
    """
    size = -(-len(asked.prompts) // 2)
    halves = [
        calls(model, [part(asked, start, size)]) for start in range(0, len(asked.prompts), size)
    ]
    return [halves[at // _CALLS % len(halves)][at] for at in range(len(halves[0]))]


def held_out(name: str, videos: int, steps: int) -> tuple[Request, torch.Tensor]:
    """Return videos that nothing was calibrated on, and their digits."""
    asked, labels = request(name, videos, _HELD_OUT_SEED)
    return replace(asked, steps=steps), labels


def part(asked: Request, start: int, size: int) -> Request:
    """Return the request for `size` of its videos; each stays the video that it was."""
    chosen = slice(start, start + size)
    frames = asked.first_frames
    return replace(
        asked,
        prompts=asked.prompts[chosen],
        first_frames=None if frames is None else frames[chosen],
        seed=asked.seed + start,
    )
