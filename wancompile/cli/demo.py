"""`wancompile demo`: from a trained model to videos of the original and the compiled ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from wancompile.cli import target

_DESCRIPTION = """\
Compile a small, really trained Wan in fp8 and int8, make a video with the
original and with each compiled model from the same seed, print a table, and
write a folder with report.html and an animated side by side. Needs no GPU.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="compile a small trained Wan and compare its videos, on any machine",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("wancompile-demo"),
        metavar="DIR",
        help="where to write (default: wancompile-demo)",
    )
    parser.add_argument(
        "--steps", type=target.positive, metavar="N", help="sampling steps (default: 16)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of the first noise (default: 0)")
    parser.add_argument(
        "--digit",
        type=int,
        choices=range(10),
        metavar="D",
        help="the digit to show, 0 to 9 (default: 7)",
    )
    parser.add_argument(
        "--model",
        choices=("t2v", "i2v"),
        default="t2v",
        help="from a prompt, or from a prompt and a first frame (default: t2v)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the demo with what was asked for; what was not has the demo's own default."""
    given = {"steps": args.steps, "seed": args.seed, "digit": args.digit}
    options = {name: value for name, value in given.items() if value is not None}
    # Only here, so that the other subcommands start without it.
    from wancompile import demo

    demo.run(args.out, model=args.model, **options)
