"""`wancompile compile`: from the folder of a pipeline or a transformer to an artifact."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

import wancompile
from wancompile import presets
from wancompile.artifact.folder import check_replaceable
from wancompile.cli import artifact, calls, play, prompts, source, target
from wancompile.compiled import CompiledModel
from wancompile.errors import InputError
from wancompile.experts.compiled import CompiledPipeline
from wancompile.experts.pipe import Pipeline, denoisers
from wancompile.gate.limits import DEFAULT, Limits
from wancompile.html import write_html
from wancompile.quant.stats import Stats
from wancompile.recipe import Auto, Recipe
from wancompile.signature import parameters_of
from wancompile.start import device_of
from wancompile.units import nbytes, percent, plural

_DESCRIPTION = """\
Compile a diffusers model and write it to a folder, for wancompile.load.

DIR is the folder of a whole pipeline, with model_index.json: then --prompts is
a file of prompts, one a line, and the pipeline is run on each of them while
its transformers are calibrated, up to the latents. Ten prompts or so, of the
kind you will use, at the size you will use. An image or videos that it needs
besides are the same for all of them.

DIR may also be the folder of one transformer. Then nothing is run: give the
statistics of an earlier calibration with --stats, or else nothing is smoothed,
which suits fp8 better than int8.

Only files in DIR are read, and nothing is fetched. With --checkpoint, Ctrl-C
loses nothing: the same command goes on where it was.
"""
_DTYPES = ("bfloat16", "float16", "float32")
# Only shapes are taken from it, and one comparison: a small one is quick on a CPU, too.
_SMALL = (2, 8, 8)

# Options that only a pipeline, or only a transformer, has a use for.
_OF_PIPELINES = (*play.OPTIONS, "checkpoint")
_OF_TRANSFORMERS = ("stats", "size")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "compile",
        help="quantize a diffusers model and save it",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a diffusers folder")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to write"
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a page about it, too, with each block before and after",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="where to compute, such as cuda (default: cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default=_DTYPES[0],
        metavar="TYPE",
        help=f"of what stays in floating point: {', '.join(_DTYPES)} (default: {_DTYPES[0]})",
    )
    parser.add_argument(
        "--consume",
        action="store_true",
        help="let go of each weight once it is quantized: less memory, but less can fall back",
    )
    _add_wishes(parser)
    _add_of_pipelines(parser)
    _add_of_transformers(parser)


def _add_wishes(parser: argparse.ArgumentParser) -> None:
    wishes = parser.add_argument_group("what to quantize into")
    target.add_recipe(wishes)
    wishes.add_argument(
        "--max-error",
        type=float,
        metavar="X",
        help="instead of a recipe: the fastest type for each site that keeps the relative error "
        "of the output within X, such as 0.01",
    )
    wishes.add_argument(
        "--max-ms",
        type=float,
        metavar="X",
        help="instead of a recipe: the smallest error with which a forward takes X ms on an H100",
    )
    wishes.add_argument(
        "--limit",
        type=_limit,
        default=DEFAULT,
        metavar="X|off",
        help=f"largest relative error of the output on calls that calibration has not seen; "
        f"beyond it nothing is written (default: {DEFAULT.output:g})",
    )


def _add_of_pipelines(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration of a pipeline")
    play.add_arguments(group)
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="keep what calibration has learned there, and go on from it; a file for each "
        "transformer, named after it",
    )


def _add_of_transformers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a transformer alone")
    group.add_argument("--stats", type=Path, metavar="FILE", help="what a calibration has learned")
    calls.add_size(group, "x".join(map(str, _SMALL)))


def _limit(text: str) -> Limits | None:
    if text == "off":
        return None
    try:
        return Limits(output=float(text))
    except (ValueError, InputError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor off") from None


def run(args: argparse.Namespace) -> None:
    """Compile, save, and say in a line for each transformer what came out."""
    is_pipeline = source.is_pipeline_folder(args.folder)
    _check_usage(args, is_pipeline)
    # All that can be refused is refused before hours of work.
    check_replaceable(args.out.resolve())
    device_of(args.device)
    if args.checkpoint is not None and not args.checkpoint.parent.is_dir():
        raise InputError(f"there is no folder {args.checkpoint.parent} for the checkpoint")
    options: dict[str, Any] = {
        "recipe": _recipe(args),
        "device": args.device,
        "limits": args.limit,
        "consume": args.consume,
        "progress": sys.stderr.isatty(),
    }
    made = _pipeline(args, options) if is_pipeline else _transformer(args, options)
    made.save(args.out)
    models = made.experts if isinstance(made, CompiledPipeline) else {"": made}
    for part, model in models.items():
        print(_summary(part or args.folder.resolve().name, model))
        if args.report is not None:
            page = artifact.page(args.report, part if len(models) > 1 else "")
            _write_page(page, args.folder, part, model)
    print(f"wrote {args.out}, {nbytes(artifact.size_on_disk(args.out))}", file=sys.stderr)


def _write_page(page: Path, folder: Path, part: str, model: CompiledModel) -> None:
    place = artifact.original_folder(folder, part)
    # Traced again: the model that was compiled may have given up its weights.
    before = artifact.original_program(place, artifact.Made.of(model))
    name, programs = part or folder.resolve().name, (before, model.program)
    write_html(page, model.report, programs=programs, title=name)
    print(f"wrote {page}", file=sys.stderr)


def _check_usage(args: argparse.Namespace, is_pipeline: bool) -> None:
    wrong, kind = (_OF_TRANSFORMERS, "pipeline") if is_pipeline else (_OF_PIPELINES, "transformer")
    for name in wrong:
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            args.parser.error(f"--{option} does not go with the folder of a {kind}")
    if is_pipeline and args.prompts is None:
        args.parser.error(
            f"a pipeline is calibrated on --prompts FILE; without any, compile the folder "
            f"of a transformer in it, such as {args.folder / 'transformer'}"
        )
    if args.recipe is not None and (args.max_error, args.max_ms) != (None, None):
        args.parser.error("give --recipe or a budget, not both")


def _recipe(args: argparse.Namespace) -> Recipe | Auto:
    if args.max_error is None and args.max_ms is None:
        return target.recipe(args.recipe)
    return Recipe.auto(max_error=args.max_error, max_ms=args.max_ms)


def _transformer(args: argparse.Namespace, options: Mapping[str, Any]) -> CompiledModel:
    dtype = getattr(torch, args.dtype)
    stats = None if args.stats is None else Stats.load(args.stats)
    preset = presets.from_folder(args.folder)
    size = calls.latents(args.size, preset.config["in_channels"]) if args.size else _SMALL
    torch.manual_seed(0)  # the same command compares on the same numbers
    tensors = presets.example_inputs(preset, latent=size, device="cpu", dtype=dtype)
    model = presets.load(args.folder, dtype=dtype)
    example = {**tensors, **source.in_one_piece(parameters_of(model.forward)[0])}
    return wancompile.compile(model, stats=stats, example_inputs=example, **options)


def _pipeline(args: argparse.Namespace, options: Mapping[str, Any]) -> CompiledPipeline:
    given = play.given(args)
    words = prompts.read(args.prompts)
    print(f"loading {args.folder}", file=sys.stderr)
    pipe = source.open_pipeline(args.folder, getattr(torch, args.dtype))
    data = source.arguments(pipe, words, given)
    if args.device is not None:
        source.move_helpers(pipe, denoisers(pipe), args.device)
    print(f"calibrating on {plural(len(data), 'prompt')}", file=sys.stderr)
    try:
        made = wancompile.compile(cast(Pipeline, pipe), data, checkpoint=args.checkpoint, **options)
    except KeyboardInterrupt:
        print(_interrupted(args.checkpoint), file=sys.stderr)
        raise
    except (ValueError, NameError) as error:
        raise source.not_run(pipe, error) from error
    return made


def _interrupted(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "interrupted: nothing is kept; with --checkpoint FILE the next run would go on"
    return f"interrupted: the same command goes on with what {checkpoint} and its like hold"


def _summary(name: str, model: CompiledModel) -> str:
    report = model.report
    share = percent(report.bytes_after / max(1, report.bytes_before), 0)
    sizes = f"{nbytes(report.bytes_before)} to {nbytes(report.bytes_after)} ({share})"
    found = f"{name}: {report.recipe.name}, weights {sizes}"
    if report.gate is None or not report.gate.check.outputs:
        return found
    error = max(one.relative for one in report.gate.check.outputs)
    back = len(report.gate.fallbacks)
    fell = f", {plural(back, 'site')} fell back" if back else ""
    return f"{found}, error of the output {percent(error, 2)}{fell}"
