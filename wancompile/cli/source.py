"""What is compiled: a diffusers pipeline from its folder, or one transformer from its own."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wancompile import presets
from wancompile.errors import InputError
from wancompile.presets.folder import read_json
from wancompile.presets.preset import FACTORIES

INDEX = "model_index.json"

# Animate encodes faces in pieces, which a graph does not: one piece must take those of a call.
_ONE_PIECE = {"motion_encode_batch_size": 1024}
# What others call the frames of a video is a segment to Animate, which makes one after the other.
_FRAMES, _SEGMENT = "num_frames", "segment_frame_length"


def is_pipeline_folder(folder: Path) -> bool:
    """Whether `folder` holds a pipeline, not a transformer alone.

    Raises:
        InputError: it holds neither.
    """
    if (folder / INDEX).is_file():
        return True
    if (folder / "config.json").is_file():
        return False
    raise InputError(
        f"{folder} is no diffusers folder: it has neither {INDEX}, as a pipeline, nor config.json, "
        "as a transformer"
    )


def open_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """Load a pipeline in `dtype`, its VAE in fp32, from nothing but the files in `folder`.

    Weights come from safetensors alone. The transformers are read without diffusers, which needs
    accelerate for types other than fp32.

    Raises:
        InputError: parts are missing, or cannot be loaded.
    """
    index = read_json(folder / INDEX)
    pipeline, parts = _class(folder, index), _parts(folder, index)
    import diffusers
    from transformers.utils import logging

    read = {
        name: presets.load(folder / name, dtype=dtype)
        for name, kind in parts.items()
        if kind in FACTORIES
    }
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer releases rename torch_dtype
            return pipeline.from_pretrained(
                folder,
                torch_dtype={"default": dtype, "vae": torch.float32},
                local_files_only=True,
                use_safetensors=True,
                **read,
            )
    except Exception as error:  # of diffusers, transformers or safetensors, of any kind
        reason = " ".join(str(error).split())
        raise InputError(f"diffusers cannot load {folder}: {reason}") from error


def move_helpers(pipe: Any, keep: Mapping[str, Any], device: str) -> None:
    """Move every part of a pipeline but those in `keep` to `device`: encoders and the VAE."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name not in keep:
            part.to(device)


def arguments(pipe: Any, prompts: Sequence[str], given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments of one call of `pipe` for each prompt; `given` are the same in all.

    Raises:
        InputError: the pipeline takes no such argument, or needs another one.
    """
    parameters = inspect.signature(pipe.__call__).parameters.values()
    known = [one.name for one in parameters]
    needed = [one.name for one in parameters if one.default is one.empty]
    if "video" in known and _FRAMES not in known and _SEGMENT not in known:
        needed.append("video")  # diffusers has None for it, and cannot go on with that
    if _SEGMENT in known:
        given = {_SEGMENT if name == _FRAMES else name: value for name, value in given.items()}
    kind = type(pipe).__name__
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise InputError(f"a {kind} takes no {unknown}")
    missing = next((name for name in needed if name not in ("prompt", *given)), None)
    if missing is not None:
        raise InputError(f"a {kind} needs {missing} besides prompts")
    return [{"prompt": prompt, **in_one_piece(known), **given} for prompt in prompts]


def in_one_piece(known: Iterable[str]) -> dict[str, int]:
    """Return what a pipeline or a model with these parameters must be told to be captured."""
    return {name: _ONE_PIECE[name] for name in known if name in _ONE_PIECE}


def not_run(pipe: Any, error: Exception) -> InputError:
    """Return the error for what diffusers refuses: a size that does not divide, say."""
    return InputError(f"{type(pipe).__name__} cannot be run: {error}")


def read_image(path: Path) -> Any:
    """Return a picture in RGB; raise `InputError` where there is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is no picture that can be read") from error
    except OSError as error:
        raise InputError(f"the image {path} cannot be read: {error.strerror or error}") from error


def read_video(path: Path) -> list[Any]:
    """Return frames in RGB: of an animation, or the pictures of a folder in the order of names.

    Numbers in names count as numbers: `9.png` comes before `10.png`.

    Raises:
        InputError: there are none, or something in the folder is no picture.
    """
    if not path.is_dir():
        return _frames(path)
    files = [one for one in path.iterdir() if one.is_file() and not one.name.startswith(".")]
    if not files:
        raise InputError(f"the folder {path} holds no frames")
    return [read_image(one) for one in sorted(files, key=_natural)]


def _frames(path: Path) -> list[Any]:
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is no animation that can be read, nor a folder") from error
    except OSError as error:
        raise InputError(f"the video {path} cannot be read: {error.strerror or error}") from error


def _natural(path: Path) -> list[str | int]:
    """Return text and numbers in turn, so that like meets like where names are compared."""
    return [int(one) if one.isdecimal() else one for one in re.split(r"(\d+)", path.name)]


def _class(folder: Path, index: Mapping[str, Any]) -> Any:
    """Return the pipeline's own class: the general one ignores transformers that are given."""
    import diffusers

    name = str(index.get("_class_name"))
    found: Any = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise InputError(f"{folder / INDEX} is of a {name}, which the installed diffusers lacks")
    return found


def _parts(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """Return the class of each part that the index names; all have a folder."""
    pairs = {name: one for name, one in index.items() if isinstance(one, list) and len(one) == 2}
    found = {name: str(kind) for name, (library, kind) in pairs.items() if library and kind}
    for name, kind in found.items():
        if not (folder / name).is_dir():
            raise InputError(
                f"{folder / INDEX} names {name}, a {kind}, but there is no {folder / name}"
            )
    return found
