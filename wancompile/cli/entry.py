"""The command `wancompile`: its subcommands, and how errors become exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from textwrap import fill

import torch
from safetensors import SafetensorError

import wancompile
from wancompile.cli import bench, check, compile, demo, export, inspect, plan
from wancompile.errors import WancompileError

EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 130

_EPILOG = """\
examples:
  wancompile demo                        two compiled models and their videos
  wancompile plan i2v-14b                what int8 would do, what a call costs
  wancompile inspect i2v-14b --layers 1  its graph, normalized, weightless
  wancompile inspect t2v-1.3b --tiny --to QUANTIZED --diff --site blocks.0
  wancompile compile Wan2.1-T2V-14B --prompts prompts.txt --out wan-int8
  wancompile check wan-int8              its files, weights and a forward

exit codes: 0 done, 1 a check failed or an error explained on stderr,
  2 a wrong command line, 130 interrupted by Ctrl-C
"""
_COMMANDS = (demo, plan, inspect, compile, check, bench, export)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; argparse exits with 2 by itself.

    A subcommand returns an exit code of its own, or None where it is done.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s"
    )
    try:
        code: int | None = args.run(args)
        sys.stdout.flush()
    except WancompileError as error:
        logging.info("raised here:", exc_info=error)
        print(f"wancompile: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python must not try to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except (OSError, SafetensorError, torch.OutOfMemoryError) as error:
        # A full disk, a folder that is not ours, a device that is too small: no fault of the code.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        print(f"wancompile: {reason}", file=sys.stderr)
        return EXIT_ERROR
    return EXIT_OK if code is None else code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wancompile",
        description=fill(wancompile.__doc__ or "", 79),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {wancompile.__version__}")
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="say what is being done, and where errors arise",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser
