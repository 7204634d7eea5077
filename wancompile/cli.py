"""The command `wancompile`: its subcommands, and how errors become exit codes."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import wancompile
from wancompile.errors import WancompileError

# Each module offers `add_parser(subparsers)` and `run(args)`.
COMMANDS = {
    "plan": "wancompile.cli_plan",
    "inspect": "wancompile.cli_inspect",
    "demo": "wancompile.demo.command",
}

EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 130

_EPILOG = """\
examples:
  wancompile plan i2v-14b                         what int8 would do to it, and what a call costs
  wancompile inspect i2v-14b --layers 1           its graph, normalized, nothing materialised
  wancompile inspect t2v-1.3b --tiny --to QUANTIZED --diff --site "blocks.0"

exit codes: 0 done, 1 an error that is explained on stderr, 2 a wrong command line
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; argparse exits with 2 by itself."""
    modules = _modules()
    args = _parser(modules).parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s"
    )
    try:
        modules[args.command].run(args)
        sys.stdout.flush()
    except WancompileError as error:
        print(f"wancompile: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python must not try to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK


def _modules() -> dict[str, ModuleType]:
    found = {}
    for command, name in COMMANDS.items():
        try:
            found[command] = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or "?"):
                raise
    return found


def _parser(modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wancompile",
        description=wancompile.__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {wancompile.__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in modules.values():
        module.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
