"""Random calls for a saved model: at the size that it was compiled with, or at another one."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wancompile.cli.target import Options
from wancompile.compiled import CompiledModel
from wancompile.errors import InputError
from wancompile.ir import match
from wancompile.presets import Latent
from wancompile.units import shape as size_text

# Latents of five seconds by the channels of the input. The VAE of TI2V-5B, the one with 48, makes
# height and width 16 times smaller, that of all others 8 times.
_WIDE = 48
_USUAL: Mapping[str, tuple[Latent, Latent]] = {
    "480p": ((21, 60, 104), (31, 30, 52)),
    "720p": ((21, 90, 160), (31, 44, 80)),
}
# Schedulers of flow-matching models count timesteps from 0 to 1000.
_TIMESTEPS = 1000.0

Size = str | Latent
Shapes = dict[str, tuple[int, ...]]


def add_size(parser: Options, default: str = "that of a calibration call") -> None:
    """Add the option for the size of the latents; `default` says what holds without it."""
    parser.add_argument(
        "--size",
        type=size,
        metavar="SIZE",
        help=f"{', '.join(_USUAL)}, or frames, height and width of the latents as FxHxW, such as "
        f"21x60x104 (default: {default})",
    )


def size(text: str) -> Size:
    """Return a size from the command line: a usual name, or frames, height and width."""
    if text in _USUAL:
        return text
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None or "0" in found.groups():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {', '.join(_USUAL)} or of the form FxHxW, such as 21x60x104"
        )
    frames, height, width = map(int, found.groups())
    return frames, height, width


def latents(asked: Size, channels: int) -> Latent:
    """Return the latents of a size; `channels` are those of the model's input."""
    return _USUAL[asked][channels == _WIDE] if isinstance(asked, str) else asked


def random_call(model: CompiledModel, seed: int, asked: Size | None = None) -> dict[str, Tensor]:
    """Return named arguments of forward full of random numbers, on the device of `model`.

    Timesteps are uniform from 0 to 1000, one for all videos; factors of which there is a fixed
    number are 1; everything else is normal. The same seed gives the same numbers on every device.

    Args:
        model: whatever was compiled.
        seed: of the numbers.
        asked: the latents; those of a call that the model was compiled with if not given.

    Raises:
        InputError: the model cannot be called at the size asked for.
    """
    shapes = _traced(model)
    if asked is not None:
        shapes = _resized(shapes, asked)
    generator = torch.Generator().manual_seed(seed)
    call = {}
    for spec in model.program.signature.inputs:
        drawn = _drawn(shapes[spec.name], spec.shape[:1] == (None,), generator)
        call[spec.name] = drawn.to(model.device, spec.dtype)
        spec.check(call[spec.name])
    return call


def describe(call: Mapping[str, Any]) -> str:
    """Return the names and shapes of a call's tensors in one line."""
    tensors = {name: one for name, one in call.items() if isinstance(one, Tensor)}
    return ", ".join(f"{name} {size_text(one.shape)}" for name, one in tensors.items())


def _drawn(shape: tuple[int, ...], is_open: bool, generator: torch.Generator) -> Tensor:
    if len(shape) > 2:
        return torch.randn(shape, generator=generator)
    if not is_open:
        return torch.ones(shape)
    return (torch.rand(1, generator=generator) * _TIMESTEPS).expand(shape)


def _traced(model: CompiledModel) -> Shapes:
    """Return the shapes of one call that the model was exported with."""
    fakes = [match.val(node) for node in model.program.graph.find_nodes(op="placeholder")]
    inputs = model.program.signature.inputs
    return {
        spec.name: tuple(map(_example, fake.shape))
        for spec, fake in zip(inputs, fakes, strict=True)
    }


def _example(dim: Any) -> int:
    return int(dim.node.hint) if match.is_symbolic(dim) else int(dim)


def _resized(shapes: Shapes, asked: Size) -> Shapes:
    """Return shapes for other latents; whatever has a place for each of their tokens follows."""
    video = next((one for one in shapes.values() if len(one) == 5), None)
    if video is None:
        raise InputError("the model takes no video: it has only the size it was compiled with")
    new = latents(asked, video[1])
    growth = math.prod(new) / math.prod(video[2:])
    return {name: _like(one, video, new, growth) for name, one in shapes.items()}


def _like(
    shape: tuple[int, ...], video: tuple[int, ...], new: Latent, growth: float
) -> tuple[int, ...]:
    if len(shape) == 5 and shape[3:] == video[3:]:
        frames = new[0] + shape[2] - video[2]  # a pose has none for the frame of reference
        return (*shape[:2], frames, *new[1:])
    if len(shape) == 2 and shape[0] == video[0]:  # a timestep for each token
        return (shape[0], round(shape[1] * growth))
    return shape
