"""`wancompile inspect`: print a graph, or what changes between two levels of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wancompile.cli import artifact, inspect_artifact, target
from wancompile.gate.compare import compare
from wancompile.html import write_html
from wancompile.inspect import climb, diff, lines
from wancompile.ir.levels import Level
from wancompile.program import Program
from wancompile.recipe import Recipe
from wancompile.report import Report

# What a level is made from: observers are a side branch, quantization starts at NORMAL.
MADE_FROM = {
    Level.EXPORTED: Level.EXPORTED,
    Level.NORMAL: Level.EXPORTED,
    Level.OBSERVED: Level.NORMAL,
    Level.QUANTIZED: Level.NORMAL,
    Level.FUSED: Level.QUANTIZED,
    Level.LOWERED: Level.FUSED,
}

_DESCRIPTION = """\
Print the graph of a model at a level, or the difference between two levels.

  EXPORTED   as torch.export captures it
  NORMAL     one spelling, groups and folds proved
  OBSERVED   NORMAL with observers for calibration
  QUANTIZED  8-bit linears, and attention if the recipe says so
  FUSED      QUANTIZED with norms, rotations and GELUs that round themselves
  LOWERED    FUSED with a kernel chosen for each op on this machine

Values that belong to a linear or an attention are named after it. QUANTIZED
and what follows compute with weights: give a folder that has some, or --tiny.

Of a folder that wancompile has written, print the report; with --site the
graph there; with --html write its page. There is no level but LOWERED, so the
page shows blocks only as they are after compiling.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        help="print a model's graph, what a level changes in it, or a saved model",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    target.add_arguments(parser)
    target.add_tiny(parser)
    parser.add_argument(
        "--to",
        type=_level,
        metavar="LEVEL",
        help="the level to print (default: NORMAL)",
    )
    parser.add_argument(
        "--from",
        dest="start",
        type=_level,
        metavar="LEVEL",
        help="print the difference from this level on",
    )
    parser.add_argument(
        "--diff", action="store_true", help="print the difference from the level before --to"
    )
    parser.add_argument(
        "--site",
        metavar="GLOB",
        help="show only modules that match, such as 'blocks.0' or '*.to_q'",
    )
    parser.add_argument(
        "--calibrate",
        type=target.positive,
        default=0,
        metavar="N",
        help="observe N random calls, so that smoothing and attention scales "
        "show up; random numbers say nothing about quality",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    parser.add_argument(
        "--dump",
        type=Path,
        metavar="FOLDER",
        help="write the graph after every pass, and every pass's diff",
    )


def _level(text: str) -> Level:
    try:
        return Level[text.upper()]
    except KeyError:
        known = ", ".join(level.name for level in Level)
        raise argparse.ArgumentTypeError(f"no level {text!r}; there are {known}") from None


def run(args: argparse.Namespace) -> None:
    """Climb to the level and print, or print what was saved."""
    if artifact.is_artifact(args.target):
        inspect_artifact.run(args)
        return
    start, to = args.start, args.to or Level.NORMAL
    if start is None:
        start = MADE_FROM[to]
    elif start >= to:
        args.parser.error(f"--from {start.name} is not below --to {to.name}")
    recipe = target.recipe(args.recipe)
    computes = to >= Level.QUANTIZED
    if computes and recipe.rounds_attention and not args.calibrate:
        args.parser.error(f"the recipe {recipe.name} needs attention scales: add --calibrate 1")
    needs_weights = computes or args.tiny or args.calibrate
    subject = target.with_weights(args) if needs_weights else target.on_meta(args)
    calls = [target.random_call(subject, seed) for seed in range(args.calibrate)]
    programs = climb(
        subject.model, subject.inputs, to, recipe=recipe, calibration=calls, dump=args.dump
    )
    if args.html is not None:
        _write_page(args, to, subject, recipe, programs)
    elif args.diff or args.start is not None:
        print(diff(programs[start], programs[to], args.site) or "nothing differs")
    else:
        print("\n".join(line.text for line in lines(programs[to], args.site)))


def _write_page(
    args: argparse.Namespace,
    to: Level,
    subject: target.Subject,
    recipe: Recipe,
    programs: dict[Level, Program],
) -> None:
    is_quantized = to >= Level.QUANTIZED
    # What people look for in a page of a quantized program is how it differs from the float one.
    usual = Level.NORMAL if is_quantized else MADE_FROM[to]
    before, after = programs[usual if args.start is None else args.start], programs[to]
    size = programs[Level.EXPORTED].nbytes
    report = Report(recipe, (), (), (), size, 0).with_program(after)
    comparison = None
    if is_quantized:
        comparison = compare(programs[Level.NORMAL], after, subject.inputs)
    path = write_html(
        args.html,
        report,
        programs=(before, after) if before is not after else None,
        comparison=comparison,
        title=subject.name,
        block=args.site,
    )
    print(f"wrote {path}", file=sys.stderr)
