"""`wancompile export`: write a saved model for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wancompile.cli import artifact
from wancompile.errors import InputError
from wancompile.interchange import FORMATS, Summary, write
from wancompile.units import nbytes, percent, plural

_DESCRIPTION = """\
Write the weights of a saved model in a format that other programs read.

  diffusers           in floating point, a folder for from_pretrained
  modelopt            e4m3 with a scale per output channel, diffusers' names
                      and hf_quant_config.json, a folder
  comfyui-scaled-fp8  e4m3 with a scale per tensor, the names of the original
                      Wan, a single file

Smooth scales are taken out of the weights, which are rounded once more where
the format needs it; what that costs is printed. Activations are rounded as
the reader likes, attention is not in 8 bits.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "export",
        help="write a saved model for diffusers, ModelOpt's readers or ComfyUI",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "artifact", type=Path, metavar="ARTIFACT", help="a folder that wancompile has written"
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="the new file or folder"
    )
    parser.add_argument(
        "--original",
        type=Path,
        metavar="DIR",
        help="the diffusers folder of the original: all that is not in 8 bits is taken from it",
    )
    parser.add_argument(
        "--part", metavar="NAME", help="which model of a pipeline, such as transformer_2"
    )


def run(args: argparse.Namespace) -> None:
    """Write, and say what it cost."""
    part, folder = _part(artifact.parts(args.artifact), args.part)
    compiled = artifact.load_model(folder)
    originals = _originals(args.original, part, artifact.Made.of(compiled))
    print(text(write(compiled, args.out, args.format, originals=originals)))


def _part(parts: Mapping[str, Path], wanted: str | None) -> tuple[str, Path]:
    if wanted is None and len(parts) == 1:
        return next(iter(parts.items()))
    if wanted is None or wanted not in parts:
        names = [name for name in parts if name]
        named = " and ".join(names) or "one model without a name"
        verb = "are" if len(names) > 1 else "is"
        raise InputError(f"say with --part which model to write: there {verb} {named}")
    return wanted, parts[wanted]


def _originals(place: Path | None, part: str, made: artifact.Made) -> Mapping[str, Tensor] | None:
    if place is None:
        return None
    folder = artifact.original_folder(place, part)
    return artifact.original(folder, made, torch.device("cpu")).state_dict()


def text(summary: Summary) -> str:
    """Return what was written, in a few lines."""
    errors, kept = summary.errors, set(summary.kept)
    lines = [
        f"wrote {summary.path}, {nbytes(summary.nbytes)}",
        f"  {plural(len(errors), 'weight')} that the compiled model has in 8 bits, "
        f"{len(kept)} of them bit for bit",
    ]
    rounded = {name: error for name, error in errors.items() if name not in kept}
    if rounded:
        worst = max(rounded, key=rounded.__getitem__)
        mean = sum(rounded.values()) / len(rounded)
        most = percent(rounded[worst], 2)
        lines.append(f"  the others are off by {percent(mean, 2)} on average, {most} in {worst}")
    return "\n".join(lines)
