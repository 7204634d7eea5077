"""What a pipeline is called with on the command line, and what its transformers then get."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from wancompile.cli import source, target
from wancompile.errors import InputError
from wancompile.experts.pipe import denoisers
from wancompile.experts.play import player
from wancompile.gate.record import on_device
from wancompile.signature import name_arguments, parameters_of

_VIDEOS = {
    "video": "what video to video starts from",
    "pose_video": "the poses of Animate",
    "face_video": "the faces of Animate",
}
OPTIONS = ("prompts", "image", *_VIDEOS, "steps", "frames", "height", "width")
_STEPS = 8

Call = dict[str, Any]


def add_arguments(group: target.Options) -> None:
    """Add the options that say what a pipeline is called with."""
    group.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    group.add_argument("--image", type=Path, metavar="FILE", help="where videos begin")
    for name, meaning in _VIDEOS.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=Path,
            metavar="PATH",
            help=f"{meaning}: a folder of frames in the order of their names, or an animation "
            "(GIF, WebP, PNG)",
        )
    group.add_argument(
        "--steps", type=target.positive, metavar="N", help=f"of each video (default: {_STEPS})"
    )
    for name in ("frames", "height", "width"):
        group.add_argument(
            f"--{name}",
            type=target.positive,
            metavar="N",
            help=f"{name} of the videos (default: the pipeline's)",
        )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the pipeline besides the prompt that the command line gives.

    Raises:
        InputError: the image or a video cannot be read.
    """
    found = {
        "num_inference_steps": args.steps or _STEPS,
        "num_frames": args.frames,
        "height": args.height,
        "width": args.width,
        "image": None if args.image is None else source.read_image(args.image),
        **{name: _video(getattr(args, name)) for name in _VIDEOS},
    }
    return {name: value for name, value in found.items() if value is not None}


def _video(path: Path | None) -> list[Any] | None:
    return None if path is None else source.read_video(path)


def calls_of(pipe: Any, data: Iterable[Mapping[str, Any]], most: int) -> dict[str, list[Call]]:
    """Run `pipe` on `data` and return calls of its transformers by name, `most` of each.

    They lie evenly between the first and the last call, and are copies.

    Raises:
        InputError: the pipeline cannot be run, or does not call one of them.
    """
    heard: dict[str, list[Call]] = {name: [] for name in denoisers(pipe)}
    hooks = [
        part.register_forward_pre_hook(partial(_hear, heard[name]), with_kwargs=True)
        for name, part in denoisers(pipe).items()
    ]
    try:
        with tqdm(disable=True) as bar:
            player(pipe, list(data))(bar)
    except (ValueError, NameError) as error:
        raise source.not_run(pipe, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    silent = next((name for name, calls in heard.items() if not calls), None)
    if silent is not None:
        raise InputError(f"the pipeline did not call its {silent}: give it more --steps")
    return {name: _spread(calls, most) for name, calls in heard.items()}


def _hear(
    kept: list[Call], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Keep a copy of a call on the host: the pipeline may write to its tensors afterwards."""
    named = name_arguments(*parameters_of(module.forward), args, kwargs)
    copied = on_device(named, torch.device("cpu"), copy=True)
    kept.append({name: value for name, value in copied.items() if value is not None})


def _spread(calls: list[Call], most: int) -> list[Call]:
    count = min(most, len(calls))
    last = len(calls) - 1
    return [calls[round(index * last / max(1, count - 1))] for index in range(count)]
