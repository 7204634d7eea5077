"""What the subcommands work on: a preset by name or a folder, without weights or with some."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wancompile import presets
from wancompile.errors import LevelError, RecipeError
from wancompile.recipe import RECIPES, Recipe, resolve

_USUAL = "int8"
Options = argparse.ArgumentParser | argparse._ArgumentGroup


@dataclass(frozen=True)
class Subject:
    """A model and one call of it.

    `name` is that of the preset or the folder, `description` a line for people, `experts` how many
    transformers of this kind the pipeline holds.
    """

    name: str
    description: str
    experts: int
    model: torch.nn.Module
    inputs: Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every subcommand asks for: the model, the recipe, the size of the latents."""
    parser.add_argument(
        "target",
        metavar="PRESET|DIR",
        help=f"the folder of a diffusers model, or one of {', '.join(presets.PRESETS)}",
    )
    add_recipe(parser)
    parser.add_argument(
        "--resolution",
        type=resolution,
        metavar="FxHxW",
        help="frames, height and width of the latents, such as 21x60x104 (default: as usual "
        "for the preset)",
    )
    parser.add_argument("--layers", type=positive, metavar="N", help="keep only N blocks")


def add_recipe(parser: Options) -> None:
    """Add the recipe."""
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help=f"{', '.join(RECIPES)}, or a JSON file (default: {_USUAL})",
    )


def add_tiny(parser: argparse.ArgumentParser) -> None:
    """Add the switch to small random weights."""
    parser.add_argument(
        "--tiny", action="store_true", help="shrink every width and use small random weights"
    )


def resolution(text: str) -> tuple[int, int, int]:
    """Return frames, height and width from the command line."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None or "0" in found.groups():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FxHxW, such as 21x60x104")
    frames, height, width = map(int, found.groups())
    return frames, height, width


def positive(text: str) -> int:
    """Return a positive whole number from the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def recipe(text: str | None) -> Recipe:
    """Return a recipe given by name or as the path of a JSON file, int8 if none is given.

    Raises:
        RecipeError: there is no such recipe or file, or the file holds no recipe.
    """
    text = text or _USUAL
    if text in RECIPES or not text.endswith(".json"):
        return resolve(text)
    try:
        return Recipe.from_json(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"the recipe {text} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe {text} is not in UTF-8") from error


def on_meta(args: argparse.Namespace) -> Subject:
    """Return the model without weights, at the size of the preset or the one asked for.

    Raises:
        WancompileError: there is no such preset, or the folder holds no model that is known.
    """
    return _subject(args, "meta")


def with_weights(args: argparse.Namespace) -> Subject:
    """Return the model with weights: those of a folder, or small random ones with `--tiny`.

    Raises:
        LevelError: a preset was asked for without `--tiny`.
        WancompileError: there is no such preset, or the folder holds no model that is known.
    """
    # The same command shows the same weights and inputs every time.
    torch.manual_seed(0)
    if args.tiny:
        return _subject(args, "cpu")
    if not Path(args.target).is_dir():
        raise LevelError(
            f"this level computes with weights, and the preset {args.target} has none: "
            "add --tiny for small random ones, or give the folder of a model"
        )
    return _loaded(args)


def random_call(subject: Subject, seed: int) -> dict[str, Any]:
    """Return a call of the same shapes with random numbers, and a random timestep."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.dim() > 2:
            drawn = torch.randn(value.shape, generator=generator)
        else:
            drawn = (torch.rand(1, generator=generator) * 1000).expand(value.shape)
        return drawn.to(value.device, value.dtype)

    return {name: draw(value) for name, value in subject.inputs.items()}


# Latents on which a CPU runs a loaded model in seconds.
_SMALL = (2, 8, 8)


def _subject(args: argparse.Namespace, device: str) -> Subject:
    preset = _preset(args)
    dtype = torch.bfloat16 if device == "meta" else torch.float32
    model = presets.build(preset, layers=args.layers, device=device, dtype=dtype)
    return _called(args, preset, model, args.resolution, device, dtype)


def _loaded(args: argparse.Namespace) -> Subject:
    model = presets.load(args.target, layers=args.layers)
    size = args.resolution or _SMALL
    return _called(args, _preset(args), model, size, "cpu", torch.bfloat16)


def _preset(args: argparse.Namespace) -> presets.Preset:
    is_folder = Path(args.target).is_dir()
    found = presets.from_folder(args.target) if is_folder else presets.find(args.target)
    return presets.tiny(found) if getattr(args, "tiny", False) else found


def _called(
    args: argparse.Namespace,
    preset: presets.Preset,
    model: torch.nn.Module,
    size: presets.Latent | None,
    device: str,
    dtype: torch.dtype,
) -> Subject:
    cut = preset if args.layers is None else presets.truncated(preset, args.layers)
    inputs = presets.example_inputs(cut, latent=size, device=device, dtype=dtype)
    return Subject(preset.name, preset.description, preset.experts, model, inputs)
